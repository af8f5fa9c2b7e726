"""Records of a few-shot study: kernel classifiers on the examples of one split.

Like the learning rate of fine-tuning, the classifier's regularisation and offset are
chosen on the dev examples.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk.classifiers import Method, Tuned, tune
from ntk.kernels import Kind
from ntk.measures import distance, gram_matrix, growth, spectrum
from ntk.spaces import Full, Head, Space, parse_space
from ntk.studies.encoding import selected
from ntk.studies.folder import Cell, NoRecord, Record
from ntk.studies.folds import held_out, mean_alignment
from ntk.studies.protocol import Protocol, ScoredSplit, description
from ntk.studies.tuned import rounded_outputs
from rocoft.models import Architecture

CLASSIFIERS: tuple[Method, ...] = ("ridge", "logistic", "svm")
"""Classifiers of symmetric kernels; ties on dev go to the first."""
SHUFFLES = 5
"""Permutations of the training labels for the control."""
GROWTH_DRAWS = 20
"""Random subsets of each size."""


def kernel_records(
    protocol: Protocol, cell: Cell, kind: Kind, spaces: Sequence[str]
) -> list[Record | NoRecord]:
    """Compute the kernels of several spaces in one pass and classify with each.

    Args:
        protocol: Settings of the study.
        cell: The split.
        kind: The kind of kernel.
        spaces: Spaces in the notation of `notation.parse_space`. A head that was made
            for the task is added to each, since fine-tuning trains it too.

    Returns:
        A record for each space.
    """
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = ScoredSplit.of(backbone, split, protocol)
    module = backbone.module
    named: dict[str, Space] = {"": Full()}
    for text in spaces:
        space = selected(
            parse_space(text),
            backbone,
            data.batches[: data.train_batches],
            regression=data.regression,
        )
        if backbone.new_head and not isinstance(space, Full | Head):
            space = space + Head()
        named[text] = space
    result = protocol.kernels(backbone, data, named, kind=kind)
    kernels = {
        name: data.in_split_order(kernel) for name, kernel in result.kernels.items()
    }
    folds = held_out(
        *(backbone, split, data),
        lambda train: protocol.kernels(backbone, train, named, kind=kind).kernels,
    )
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
    records: list[Record | NoRecord] = []
    for text in spaces:
        kernel = kernels[text]
        if kind != "asymmetric_signgd" and not kernel[: data.train].any():
            records.append(NoRecord("its kernel is zero: no output depends on it."))
            continue
        record = {
            **common,
            "space": text,
            "parameters": result.sizes[text],
            "share": result.sizes[text] / total,
            "classifiers": _classify(data, kernel, kind),
        }
        if kind != "asymmetric_signgd":
            record |= _measures(data, kernels[""], kernel)
            unseen = [(fold, fold.unseen(text)) for fold in folds]
            record["alignment"] = mean_alignment(data, kernel, unseen)
            record["folds"] = len(folds)
            record["shuffled"] = _shuffled(data, kernel)
        records.append(record)
    return records


def _classify(data: ScoredSplit, kernel: Tensor, kind: Kind) -> Record:
    """Return the hyperparameters, scores and outputs of each classifier."""
    methods: tuple[Method, ...] = ("ridge",) if data.regression else CLASSIFIERS
    if kind == "asymmetric_signgd":
        methods = ("asymmetric",)
    results: Record = {}
    for method in methods:
        tuned = _tuned(data, kernel, data.labels[: data.train], method)
        results[method] = {
            **data.scored(tuned.dev, tuned.test),
            "regularisation": tuned.regularisation,
            "offset_scale": tuned.offset_scale,
            "outputs": rounded_outputs(tuned.test),
        }
    return results


def _tuned(
    data: ScoredSplit, kernel: Tensor, labels: NDArray[Any], method: Method
) -> Tuned:
    return tune(
        kernel.numpy(),
        labels,
        data.labels[data.dev],
        method=method,
        f0=None if method == "svm" else data.f0,
        judge=data.primary_metric,
        regression=data.regression,
    )


def _shuffled(data: ScoredSplit, kernel: Tensor) -> Record:
    """Return the test score of ridge regression with shuffled training labels."""
    generator = np.random.default_rng(0)
    test_scores = []
    for _ in range(SHUFFLES):
        labels = generator.permutation(data.labels[: data.train])
        # Without f0: a probe head was fitted to the true labels.
        tuned = _tuned(replace(data, f0=0 * data.f0), kernel, labels, "ridge")
        test_scores.append(data.primary_metric(tuned.test, data.labels[data.test]))
    return {"ridge": float(np.mean(test_scores)), "draws": SHUFFLES}


def _measures(data: ScoredSplit, full: Tensor, kernel: Tensor) -> Record:
    """Return measures of a kernel of the training examples, also against the full."""
    reference, gram = (gram_matrix(k[: data.train]).numpy() for k in (full, kernel))
    rank = min(10, len(gram) - 1)
    return {
        "distance": asdict(distance.summary(reference, gram, rank=rank)),
        "spectrum": asdict(spectrum.summary(gram, eps=float(np.finfo(np.float32).eps))),
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
