"""The JSON record of a comparison, which `report` renders.

The kernels have training and test examples as rows and training examples as columns.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk.kernels import (
    ApproximateKernel,
    KernelResult,
    check_entries,
    reference_model,
    require_small_errors,
    tolerated_error,
)
from ntk.scale import Computation, Plan, Resources, held, kernels
from ntk.spaces import Space
from ntk.studies.comparison.measurement import Measurement
from ntk.studies.comparison.subject import Comparison
from ntk.studies.encoding import EncodedSplit, own_outputs
from ntk.studies.folds import HeldOut, held_out
from rocoft.commands import Progress
from rocoft.models import Architecture, order_of_place

Array = NDArray[np.float64]
Record = dict[str, Any]
GRADIENTS = 4
"""Copies of a space's gradient that the spot check holds besides its C gradients."""


@dataclass
class Evaluation:
    """The record of a comparison and its kernels.

    Attributes:
        record: JSON values.
        kernels: Kernels of contrasts by space, ``(train + test, train, c - 1, c - 1)``;
            rows in the order of the split, training examples first.
    """

    record: Record
    kernels: dict[str, Tensor]


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = (
                self.seconds.get(what, 0.0) + time.perf_counter() - start
            )


def evaluate(
    compared: Comparison,
    computation: Computation,
    *,
    folds: "Folds | None" = None,
    offset: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the kernels of several spaces with the full kernel.

    Args:
        compared: The model, the examples and the spaces.
        computation: The computed kernels.
        folds: Kernels of the training examples under heads that were fitted without
            some of them, where the head has seen their labels.
        offset: Whether classifiers start from the model's own outputs.
        progress: Called after each space.

    Returns:
        The record and the kernels.
    """
    folds = folds or Folds()
    watch = _Stopwatch({"kernels": computation.seconds + folds.seconds})
    backbone, split, module = (
        compared.backbone,
        compared.split,
        compared.backbone.module,
    )
    architecture = Architecture(module)
    roles, spaces, data = compared.roles, compared.spaces, compared.data
    options, result = compared.options, computation.result
    plan, kept = computation.plan, computation.cache
    estimate = compared.estimated(result)
    outputs = own_outputs(backbone, data)
    if estimate is not None:
        result.sizes["full"] = _size(spaces["full"], architecture)
    ordered = {k: data.in_split_order(v) for k, v in result.kernels.items()}
    with watch("certificate"):
        checks = _worst([_checks(compared, computation), *folds.checks])
        dtype = next(module.parameters()).dtype
        require_small_errors(checks, tolerated_error(options, dtype))
    measure = Measurement(
        data, ordered, options.kind, outputs, offset, split.seed, folds.entries
    )
    entries = []
    steps = len(roles)
    for number, (name, role) in enumerate(roles.items()):
        entry = _entry(name, role, spaces[name], result, architecture, checks)
        with watch("measures"):
            entry |= measure.measures(name, "head" if compared.with_head else None)
        with watch("classifiers"):
            entry["classifiers"] = measure.classify(name)
        entries.append(entry)
        if progress is not None:
            progress("measures", number + 1, steps)
    with watch("classifiers"):
        random = measure.random_selections([n for n in spaces if n not in roles])
        shuffled = measure.shuffled()
    test = data.labels[data.train :]
    accuracy = float((outputs[data.train :].argmax(axis=1) == test).mean())
    record: Record = {
        "model": {
            "name": backbone.name,
            "parameters": sum(p.numel() for p in architecture.parameters.values()),
            "readout": backbone.readout,
            "new_head": backbone.new_head,
            "notes": backbone.notes,
            "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        },
        "task": {
            "name": split.task.name,
            "labels": list(split.task.labels),
            "source": split.task.source,
            "seed": split.seed,
            "shots": len(split.train) // len(split.task.labels),
            "train": len(split.train),
            "test": len(split.test),
            "outputs": outputs.shape[1],
        },
        "kernel": {
            "kind": options.kind,
            "reduction": options.reduce,
            "precision": options.precision,
            "implementation": options.implementation,
            "services": _services(result),
            "with_head": compared.with_head,
            "folds": len(folds.entries),
            "head_saw_labels": backbone.fitted_head,
            "offset": offset,
            "estimate": None if estimate is None else _estimate(estimate),
            "processes": computation.processes,
            "passes": None if plan is None else plan.passes,
            "parts": None if plan is None else plan.parts,
            "kept": None
            if kept is None
            else {"found": kept.parts_found, "problem": kept.problem},
        },
        "f0": {"accuracy": accuracy},
        "spaces": entries,
        "random": random,
        "shuffled": shuffled,
        "heatmap": measure.heatmaps(
            [n for n, r in roles.items() if r != "control"][:4]
        ),
        "timing": watch.seconds,
    }
    return Evaluation(record, {name: ordered[name] for name in roles})


@dataclass
class Folds:
    """Kernels under heads that were fitted without a fold of the training examples.

    Attributes:
        entries: One for each fold.
        checks: Their spot checks, see `check_entries`.
        seconds: Wall time of the kernels.
    """

    entries: list[HeldOut] = field(default_factory=list)
    checks: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0


def fold_kernels(
    compared: Comparison,
    resources: Resources,
    *,
    count: int = 2,
    progress: Progress | None = None,
) -> Folds:
    """Compute the kernels of the training examples under heads fitted without them.

    Args:
        compared: The model, the examples and the spaces.
        resources: The memory, disk and processes to use.
        count: Number of folds.
        progress: Called as the work goes on.

    Returns:
        The kernels; empty if the model's head has not seen the labels.
    """
    folds, processes = Folds(), resources.processes

    def compute(train: EncodedSplit) -> Mapping[str, Tensor]:
        work = replace(compared.work, batches=train.batches)
        computation = kernels(work, resources, progress=progress)
        compared.estimated(computation.result)
        if processes is None or processes.is_first:
            folds.checks.append(_checks(compared, computation))
        folds.seconds += computation.seconds
        return computation.result.kernels

    backbone, split, data = compared.backbone, compared.split, compared.data
    folds.entries = held_out(backbone, split, data, compute, count=count)
    return folds


def _checks(
    compared: Comparison, computation: Computation
) -> dict[str, dict[str, Any]]:
    """Recompute a few entries of each kernel that is exact and small enough."""
    module, result = compared.backbone.module, computation.result
    room = _room(computation.plan, module)
    copies = next(iter(result.kernels.values())).shape[2] + GRADIENTS
    exact = {
        name: compared.spaces[name]
        for name in compared.roles
        if (name != "full" or compared.approximate is None)
        and 4 * copies * result.sizes[name] <= room
    }
    return check_entries(
        reference_model(module, room),
        compared.data.batches,
        exact,
        result.kernels,
        options=compared.options,
        seed=compared.split.seed,
    )


def _worst(checks: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the checks of several computations as one: all entries, largest error."""
    return {
        name: {
            **check,
            "entries": sum(each[name]["entries"] for each in checks),
            "relative_error": max(each[name]["relative_error"] for each in checks),
        }
        for name, check in checks[0].items()
        if all(name in each for each in checks)
    }


def _room(plan: Plan | None, module: nn.Module) -> float:
    """Return the bytes of a plan's budget that are not in use."""
    if plan is None:
        return float("inf")
    return plan.budget - held(next(module.parameters()).device)


def _services(result: KernelResult) -> dict[str, Any]:
    by: dict[str, list[str]] = {}
    for name, service in result.services.items():
        by.setdefault(service.value, []).append(name)
    return {
        "batch": len(by.get("batch", [])),
        **{kind: by.get(kind, []) for kind in ("single", "definition", "unused")},
    }


def _size(space: Space, architecture: Architecture) -> int:
    """Return the number of coordinates of a space."""
    shapes = {name: p.shape for name, p in architecture.parameters.items()}
    maps = space.maps(architecture)
    return sum(m.size(shapes[name]) for name, several in maps.items() for m in several)


def _estimate(estimate: ApproximateKernel) -> Record:
    return {
        "entries": estimate.entries,
        "unit": estimate.unit,
        "replicates": estimate.replicates,
        "relative_error": estimate.relative_error(),
    }


def _entry(
    name: str,
    role: str,
    space: Space,
    result: KernelResult,
    architecture: Architecture,
    checks: Mapping[str, dict[str, Any]],
) -> Record:
    total = sum(p.numel() for p in architecture.parameters.values())
    layers: dict[str, float] = {}
    for parameter, trace in result.traces.get(name, {}).items():
        where = architecture.place(parameter)
        layers[where] = layers.get(where, 0.0) + trace
    return {
        "name": space.name,
        "label": name,
        "role": role,
        "parameters": result.sizes[name],
        "share": result.sizes[name] / total,
        "certificate": checks.get(name),
        "trace_by_layer": dict(
            sorted(layers.items(), key=lambda item: order_of_place(item[0]))
        ),
    }
