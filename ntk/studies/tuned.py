"""Records of fine-tuning: scores, outputs and the change of the full kernel."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from ntk.measures import gram_matrix, kernel_change
from ntk.spaces import Full
from ntk.studies.folder import Cell, Record
from ntk.studies.protocol import Array, Protocol, ScoredSplit, description
from rocoft.data import Split
from rocoft.models import Backbone, merged
from rocoft.training import End, FineTuned, fine_tune, grid_end

DIGITS = 6
"""Decimals of the outputs in a record."""


def tuned_on(
    protocol: Protocol,
    backbone: Backbone,
    split: Split,
    method: str,
    rates: Sequence[float] | None,
) -> FineTuned:
    """Fine-tune a model on a split as the protocol says.

    Args:
        protocol: Settings of the study.
        backbone: The model.
        split: The split.
        method: A method in the notation of `rocoft.training.methods.parse_method`.
        rates: Learning rates to choose from; None for the method's own.

    Returns:
        The fine-tuned model and its record.
    """
    return fine_tune(
        backbone,
        split,
        method,
        lrs=rates,
        arguments=protocol.arguments,
        seed=split.seed,
    )


def rate_end(record: Record) -> End | None:
    """Return the end of its grid at which the learning rate of a record is.

    Args:
        record: Record of fine-tuning, also one from before `scores_of` wrote the end.

    Returns:
        The end; None for a rate inside the grid, for a single rate, and for a rate that
        another one inside the grid equals on dev.
    """
    if "rate_at_end" in record:
        end: End | None = record["rate_at_end"]
        return end
    scores = {
        float(rate): None if dev is None else dev[record["metric"]]
        for rate, dev in record.get("grid", {}).items()
    }
    return grid_end(scores)


def scores_of(tuned: FineTuned) -> Record:
    """Return the fields of a record that every fine-tuned model has.

    Args:
        tuned: The fine-tuned model.
    """
    record = tuned.record
    names = ("test", "dev", "learning_rate", "rate_at_end", "steps", "parameters")
    return {
        **{name: record[name] for name in names},
        "grid": {
            repr(float(r["learning_rate"])): r["dev"] for r in record["learning_rates"]
        },
    }


def fine_tuning_records(
    protocol: Protocol, cell: Cell, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune on a split and measure how the full kernel changed.

    Args:
        protocol: Settings of the study.
        cell: The split.
        methods: Methods in the notation of `rocoft.training.methods.parse_method`.

    Returns:
        A record for each method.
    """
    return [
        _record(protocol, cell, method, protocol.rates.get(method))
        for method in methods
    ]


def repeated_records(
    protocol: Protocol, cell: Cell, chosen: Record, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune with the learning rate that was chosen on another split.

    Args:
        protocol: Settings of the study.
        cell: The split.
        chosen: Record of the method on the other split.
        methods: The method alone.

    Returns:
        The record, with the end of the grid at which the rate was there.
    """
    rates = [] if chosen["learning_rate"] is None else [chosen["learning_rate"]]
    end = rate_end(chosen)
    return [
        {**_record(protocol, cell, method, rates), "rate_at_end": end}
        for method in methods
    ]


def rounded_outputs(outputs: Array) -> list[list[float]]:
    """Return outputs rounded to `DIGITS` decimals.

    Args:
        outputs: ``(n, c)`` outputs.
    """
    return np.round(outputs, DIGITS).tolist()


def _record(
    protocol: Protocol, cell: Cell, method: str, rates: Sequence[float] | None
) -> Record:
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    tuned = tuned_on(protocol, backbone, split, method, rates)
    seconds = time.perf_counter() - start
    data = ScoredSplit.of(backbone, replace(split, dev=(), test=()), protocol)
    kernels = []
    for model in (backbone.module, merged(tuned.model)):
        result = protocol.kernels(
            backbone, data, {"": Full()}, right=len(data.batches), model=model
        )
        kernels.append(gram_matrix(data.in_split_order(result.kernels[""])))
    return {
        **description(backbone, split),
        "method": method,
        **scores_of(tuned),
        "outputs": rounded_outputs(tuned.logits.double().numpy()),
        "kernel_change": asdict(
            kernel_change(*kernels, targets=data.targets_of(kernels[0]))
        ),
        "seconds": seconds,
    }
