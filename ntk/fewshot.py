"""One split of a few-shot study: kernels and fine-tuning on the same examples.

The kernel classifier's regularisation and offset are chosen on the dev examples, as the
learning rate is.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk import distance, spectrum
from ntk.calibration import calibrate
from ntk.evolution import kernel_change, merged
from ntk.kernel import Kind, compute, gram_matrix
from ntk.notation import parse_space
from ntk.protocol import Array, Examples, Protocol, description
from ntk.sampling import growth
from ntk.spaces import Full, Head, Space
from ntk.study import Cell, Record
from ntk.tuning import Method, Tuned, tune
from rocoft.architecture import Architecture
from rocoft.trainer import fine_tune

CLASSIFIERS: tuple[Method, ...] = ("ridge", "logistic", "svm")
"""Of a symmetric kernel, ties on dev in this order."""
SHUFFLES = 5
"""Draws of shuffled training labels, for the control."""
GROWTH_DRAWS = 20
DIGITS = 6
"""Of outputs in a record."""


def kernel_records(
    protocol: Protocol, cell: Cell, kind: Kind, spaces: Sequence[str]
) -> list[Record]:
    """Compute the kernels of some spaces in one pass and classify with each.

    Args:
        protocol: Of the study.
        cell: The split.
        kind: Of kernel.
        spaces: As `notation.parse_space` reads them. A head that was made for the task
            belongs to each of them, as fine-tuning trains it.

    Returns:
        A record for each space.
    """
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = Examples.of(backbone, split, protocol)
    module = backbone.module
    named: dict[str, Space] = {"": Full()}
    for text in spaces:
        space = calibrate(parse_space(text), module, data.batches[: data.train_batches])
        if backbone.new_head and not isinstance(space, Full | Head):
            space = space + Head()
        named[text] = space
    result = compute(
        module,
        data.batches,
        data.train_batches,
        spaces=named,
        reduce=protocol.reduction(data.f0.shape[1]),
        kind=kind,
    )
    kernels = {name: data.sorted(kernel) for name, kernel in result.kernels.items()}
    seconds = time.perf_counter() - start
    total = sum(p.numel() for p in Architecture(module).parameters.values())
    common = {
        **description(backbone, split),
        "kernel": kind,
        "reduction": protocol.reduction(data.f0.shape[1]),
        "f0": data.scored(data.f0[data.dev], data.f0[data.test]),
        "seconds_of_pass": seconds,
        "spaces_of_pass": len(named),
    }
    records = []
    for text in spaces:
        kernel = kernels[text]
        record = {
            **common,
            "space": text,
            "parameters": result.sizes[text],
            "share": result.sizes[text] / total,
            "classifiers": _classify(data, kernel, kind),
        }
        if kind != "asymmetric_signgd":
            record |= _measures(data, kernels[""], kernel)
            record["shuffled"] = _shuffled(data, kernel)
        records.append(record)
    return records


def fine_tuning_records(
    protocol: Protocol, cell: Cell, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune on a split and measure how the full kernel changed.

    Args:
        protocol: Of the study.
        cell: The split.
        methods: As `rocoft.methods.parse_method` reads them.

    Returns:
        A record for each method.
    """
    return [
        _fine_tuning_record(protocol, cell, method, protocol.rates.get(method))
        for method in methods
    ]


def repeated_records(
    protocol: Protocol, cell: Cell, chosen: Record, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune on another split with the learning rate that one has chosen.

    Args:
        protocol: Of the study.
        cell: The split.
        chosen: The other split's record of the method.
        methods: One.

    Returns:
        A record.
    """
    rates = [] if chosen["learning_rate"] is None else [chosen["learning_rate"]]
    return [_fine_tuning_record(protocol, cell, method, rates) for method in methods]


def _fine_tuning_record(
    protocol: Protocol, cell: Cell, method: str, rates: Sequence[float] | None
) -> Record:
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    found = fine_tune(
        backbone,
        split,
        method,
        lrs=rates,
        arguments=protocol.arguments,
        seed=cell.seed,
    )
    seconds = time.perf_counter() - start
    keep = ("test", "dev", "learning_rate", "steps", "parameters")
    data = Examples.of(backbone, replace(split, dev=(), test=()), protocol)
    reduction = protocol.reduction(found.logits.shape[1])
    kernels = []
    for module in (backbone.module, merged(found.model)):
        kernel = compute(module, data.batches, spaces={"": Full()}, reduce=reduction)
        kernels.append(gram_matrix(data.sorted(kernel.kernels[""])))
    return {
        **description(backbone, split),
        "method": method,
        **{key: found.record[key] for key in keep},
        "grid": {
            f"{run['learning_rate']:g}": run["dev"]
            for run in found.record["learning_rates"]
        },
        "outputs": _rounded(found.logits.double().numpy()),
        "kernel_change": asdict(kernel_change(*kernels, targets=data.targets())),
        "seconds": seconds,
    }


def _classify(data: Examples, kernel: Tensor, kind: Kind) -> Record:
    """Return what each classifier chose on dev and reached on the test examples."""
    methods: tuple[Method, ...] = ("ridge",) if data.regression else CLASSIFIERS
    if kind == "asymmetric_signgd":
        methods = ("asymmetric",)
    found: Record = {}
    for method in methods:
        tuned = _tuned(data, kernel, data.labels[: data.train], method)
        found[method] = {
            **data.scored(tuned.dev, tuned.test),
            "regularisation": tuned.regularisation,
            "offset_scale": tuned.offset_scale,
            "outputs": _rounded(tuned.test),
        }
    return found


def _tuned(
    data: Examples, kernel: Tensor, labels: NDArray[Any], method: Method
) -> Tuned:
    return tune(
        kernel.numpy(),
        labels,
        data.labels[data.dev],
        method=method,
        f0=None if method == "svm" else data.f0,
        judge=data.judge,
        regression=data.regression,
    )


def _shuffled(data: Examples, kernel: Tensor) -> Record:
    """Return what ridge reaches when the training labels mean nothing."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(SHUFFLES):
        labels = generator.permutation(data.labels[: data.train])
        # f0 of a probe knows the true labels.
        tuned = _tuned(replace(data, f0=0 * data.f0), kernel, labels, "ridge")
        found.append(data.judge(tuned.test, data.labels[data.test]))
    return {"ridge": float(np.mean(found)), "draws": SHUFFLES}


def _measures(data: Examples, full: Tensor, kernel: Tensor) -> Record:
    """Return how a kernel over the training examples is and lies to the full one."""
    reference, gram = (gram_matrix(k[: data.train]).numpy() for k in (full, kernel))
    rank = min(10, len(gram) - 1)
    return {
        "distance": asdict(distance.summary(reference, gram, rank=rank)),
        "spectrum": asdict(spectrum.summary(gram, eps=float(np.finfo(np.float32).eps))),
        "alignment": distance.alignment(gram, data.targets_of(gram)),
        "growth": [
            asdict(spread)
            for spread in growth(
                partial(distance.relative_difference, norm="frobenius", rescale=True),
                full[: data.train].numpy(),
                kernel[: data.train].numpy(),
                draws=GROWTH_DRAWS,
                labels=data.labels[: data.train],
            )
        ],
    }


def _rounded(outputs: Array) -> list[list[float]]:
    return np.round(outputs, DIGITS).tolist()
