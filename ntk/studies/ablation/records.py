"""Records of an ablation: kernels over rows and columns chosen by various strategies.

A selection is rows, columns or both, their number, and the strategy that chooses them:
``rows:3/strategy=max``, ``columns:8/strategy=random/seed=2``, ``rows:3+columns:3`` for
both. ``all`` stands for all linear weights in the blocks, the limit of all selections.
The full kernel also has embeddings, normalisation layers and biases.

Each kernel is measured twice. *body*: the selection alone, against the full kernel
without the head, with a classifier that starts from zero. *whole*: the selection and
the head that was made for the task, with a classifier that may start from the model's
own outputs, as in the few-shot study. The classifier is ridge regression, tuned on dev.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ntk.classifiers import tune
from ntk.gradients import Batch
from ntk.measures import EIGENSPACE, distance, gram_matrix
from ntk.scale import ENTRY, room
from ntk.spaces import (
    Columns,
    Full,
    Head,
    Maps,
    Pinned,
    Rows,
    Space,
    Sum,
    Whole,
    Without,
    parse_space,
)
from ntk.studies.ablation.variance import expected_error, extreme_share, scatters
from ntk.studies.encoding import selected
from ntk.studies.folder import Cell, Record
from ntk.studies.folds import HeldOut, held_out, mean_alignment
from ntk.studies.protocol import Array, Protocol, ScoredSplit, description
from rocoft.commands import Strategy
from rocoft.data import Split
from rocoft.models import Architecture, Backbone

Axis = Literal["rows", "columns", "both"]
AXES: tuple[Axis, ...] = ("rows", "columns", "both")
ALL = "all"
FULL = "full"
HEAD = "head"
OTHER_KINDS = ("biases", "norms", "embeddings", "head")
"""Parameters other than linear weights: lists of an `Architecture`."""
REFERENCES = (FULL, ALL)
"""Reference kernels: all parameters, and all linear weights."""


@dataclass(frozen=True)
class Selection:
    """A selection of rows and columns of every linear weight.

    Attributes:
        axis: Rows, columns, or both with the same count and strategy.
        count: Number of rows or columns per weight.
        strategy: Selection strategy, see `rocoft.models.selection.select`.
        seed: Seed of the random strategy.
    """

    axis: Axis
    count: int
    strategy: Strategy
    seed: int = 0

    @classmethod
    def of(cls, name: str) -> "Selection":
        """Read a selection from the name of its space.

        Args:
            name: `Selection.name` or `Selection.estimate`.

        Returns:
            The selection.
        """
        first, *rest = _parts(parse_space(name))
        assert isinstance(first, Rows | Columns)
        assert first.count is not None
        axis: Axis = "rows" if isinstance(first, Rows) else "columns"
        if rest:
            axis = "both"
        return cls(axis, first.count, first.strategy, first.seed)

    @property
    def space(self) -> Space:
        """The tangent space."""
        kinds = {"rows": (Rows,), "columns": (Columns,), "both": (Rows, Columns)}
        one, *other = (
            kind(self.count, strategy=self.strategy, seed=self.seed)
            for kind in kinds[self.axis]
        )
        return one + other[0] if other else one

    @property
    def name(self) -> str:
        """The name of the space, which is also that of the method."""
        return self.space.name

    @property
    def is_estimate(self) -> bool:
        """Whether the expected error is known: random rows or random columns."""
        return self.strategy == "random" and self.axis != "both"

    @property
    def estimate(self) -> str:
        """The name of the rescaled space, an unbiased estimate of all weights."""
        return f"{self.name}/rescale"


def selections(
    axes: Sequence[Axis],
    counts: Sequence[int],
    strategies: Sequence[Strategy],
    draws: int,
) -> list[Selection]:
    """Return all combinations of axes, counts, strategies and seeds.

    Args:
        axes: Axes.
        counts: Numbers of rows or columns per weight.
        strategies: Selection strategies.
        draws: Number of seeds of the random strategy, from 0.
    """
    return [
        Selection(axis, count, strategy, seed)
        for axis in axes
        for count in counts
        for strategy in strategies
        for seed in range(draws if strategy == "random" else 1)
    ]


def check_counts(protocol: Protocol, cell: Cell, counts: Sequence[int]) -> None:
    """Check that every linear weight has enough rows and columns.

    Args:
        protocol: Settings of the study.
        cell: Any split.
        counts: Numbers of rows and columns.

    Raises:
        SelectionError: If a weight has fewer.
    """
    architecture = Architecture(protocol.backbone(protocol.split(cell)).module)
    for count in counts:
        (Rows(count) + Columns(count)).maps(architecture)


def selection_records(
    protocol: Protocol,
    cell: Cell,
    together: Sequence[str],
    names: Sequence[str],
) -> list[Record]:
    """Compute the kernels of selections, measure them and classify with each.

    Args:
        protocol: Settings of the study.
        cell: The split.
        together: Names of selections and `REFERENCES`. All their kernels are always
            computed: rounding depends on what is computed together, and a record that
            is computed again should be identical.
        names: Names of the requested records.

    Returns:
        A record for each name; that of the full kernel also has the scores of the head
        alone and of the model's own outputs.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = ScoredSplit.of(backbone, split, protocol)
    wanted = [*together, HEAD] if backbone.new_head else together
    spaces = _spaces(backbone, wanted, data.batches[: data.train_batches])
    result = protocol.kernels(backbone, data, spaces)
    kernels = {name: data.in_split_order(k) for name, k in result.kernels.items()}
    head = kernels.get(HEAD)
    folds = held_out(
        *(backbone, split, data),
        lambda train: protocol.kernels(backbone, train, spaces).kernels,
    )
    look = _Look(data, kernels[FULL], head, folds)
    total = sum(p.numel() for p in Architecture(backbone.module).parameters.values())
    records = []
    for name in names:
        record = {
            **_described(name, backbone, split),
            "parameters": result.sizes[name],
            "share": result.sizes[name] / total,
            "body": look.body(name, kernels[name]),
            "whole": look.whole(name, kernels[name]),
            "folds": len(folds),
        }
        if name == FULL:
            record["own_outputs"] = data.scored(data.f0[data.dev], data.f0[data.test])
            record["head"] = None if head is None else look.classify(head, data.f0)
        records.append(record)
    return records


def variance_records(
    protocol: Protocol,
    cell: Cell,
    together: Sequence[str],
    names: Sequence[str],
) -> list[Record]:
    """Compare the error of random rows or columns with its expectation.

    The error is that of the rescaled kernel as an estimate of the kernel of all linear
    weights in the blocks on the training examples: squared Frobenius norm, relative to
    that of the estimated kernel. ``"extreme"`` is `variance.extreme_share`.

    Args:
        protocol: Settings of the study.
        cell: The split.
        together: Names of random selections (`Selection.estimate`), all of which are
            computed as in `selection_records`.
        names: Names of the requested records.

    Returns:
        A record for each name.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    module = backbone.module
    data = ScoredSplit.of(backbone, replace(split, dev=(), test=()), protocol)
    reduce = protocol.reduction(data.f0.shape[1])
    spaces = _spaces(backbone, [ALL, *together], data.batches)
    kernels = protocol.kernels(backbone, data, spaces).kernels
    entries = room(next(module.parameters()).device, protocol.resources) // (2 * ENTRY)
    by_axis = {
        axis: scatters(module, data.batches, one, entries=entries, reduce=reduce)
        for axis, one in (("rows", Rows(1)), ("columns", Columns(1)))
        if any(Selection.of(name).axis == axis for name in names)
    }
    norm = float(kernels[ALL].square().sum())
    records = []
    for name in names:
        chosen = Selection.of(name)
        drawn = by_axis[chosen.axis], chosen.count
        expected = expected_error(*drawn)
        error = float((kernels[name] - kernels[ALL]).square().sum())
        records.append(
            {
                **_described(name, backbone, split),
                "expected": expected / norm,
                "measured": error / norm,
                "extreme": extreme_share(*drawn) if expected else None,
            }
        )
    return records


def origin_records(
    protocol: Protocol, cell: Cell, names: Sequence[str]
) -> list[Record]:
    """Measure the contributions of modules and layers to the full kernel.

    Args:
        protocol: Settings of the study.
        cell: The split; only its training examples are used.
        names: ``["full"]``.

    Returns:
        One record: ``"trace"`` and ``"parameters"`` by kind of module and layer,
        ``"cosine"`` of the kernel of each kind and of each layer with the full one.
    """
    assert list(names) == [FULL]
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = ScoredSplit.of(backbone, replace(split, dev=(), test=()), protocol)
    architecture = Architecture(backbone.module)
    origins = {name: origin(name, architecture) for name in architecture.parameters}
    spaces: dict[str, Space] = {FULL: Full()}
    for by, place in (("kind", 0), ("layer", 1)):
        groups: dict[str, Maps] = {}
        for name, where in origins.items():
            groups.setdefault(where[place], {})[name] = (Whole(),)
        spaces |= {f"{by} {group}": Pinned(Full(), m) for group, m in groups.items()}
    result = protocol.kernels(backbone, data, spaces)
    full = gram_matrix(result.kernels.pop(FULL)).cpu().numpy()
    cosines: dict[str, dict[str, float | None]] = {"kind": {}, "layer": {}}
    for name, kernel in result.kernels.items():
        by, _, group = name.partition(" ")
        gram = gram_matrix(kernel).cpu().numpy()
        # A pooler that the readout does not use has zero gradient.
        cosines[by][group] = distance.cosine(full, gram) if gram.any() else None
    traces: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, (kind, layer) in origins.items():
        trace = result.traces[FULL].get(name, 0.0)
        traces.setdefault(kind, {}).setdefault(layer, 0.0)
        traces[kind][layer] += trace
        sizes.setdefault(kind, {}).setdefault(layer, 0)
        sizes[kind][layer] += architecture.parameters[name].numel()
    record = _described(FULL, backbone, split)
    return [{**record, "trace": traces, "parameters": sizes, "cosine": cosines}]


def origin(parameter: str, architecture: Architecture) -> tuple[str, str]:
    """Return the kind of module and the layer of a parameter.

    Args:
        parameter: Name of the parameter.
        architecture: The model's architecture.

    Returns:
        The kind, ``"head"``, ``"norms"``, ``"embeddings"``, ``"biases"`` or the name
        of a linear layer within its block; and the layer, such as ``"layer 0"``,
        ``"embeddings"``, ``"head"`` or ``"other"``.
    """
    # The bias of a head or norm counts as head or norm.
    for kind in reversed(OTHER_KINDS):
        if parameter in getattr(architecture, kind):
            return kind, architecture.place(parameter)
    block = architecture.block(parameter)
    inside = parameter if block is None else parameter.partition(f".{block}.")[2]
    return inside.rpartition(".")[0] or inside, architecture.place(parameter)


def _spaces(
    backbone: Backbone, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Space]:
    """Return spaces by name; only that of the head contains a new head."""
    architecture = Architecture(backbone.module)
    head = tuple(architecture.head) if backbone.new_head else ()
    references: dict[str, Space] = {
        FULL: Without(Full(), head),
        ALL: Pinned(Full(), {name: (Whole(),) for name in architecture.targets}),
        HEAD: Head(),
    }
    asked = {n: _parts(parse_space(n)) for n in names if n not in references}
    # Calibrate all selections in one pass over the examples.
    every = Sum(tuple(part for parts in asked.values() for part in parts))
    fixed = iter(_parts(selected(every, backbone, batches)))
    chosen = {n: tuple(next(fixed) for _ in parts) for n, parts in asked.items()}
    spaces = {n: p[0] if len(p) == 1 else Sum(p) for n, p in chosen.items()}
    return {name: references.get(name) or spaces[name] for name in names}


def _parts(space: Space) -> tuple[Space, ...]:
    return space.parts if isinstance(space, Sum) else (space,)


def _described(name: str, backbone: Backbone, split: Split) -> Record:
    """Return the fields of a record that describe model, split and selection."""
    common = description(backbone, split)
    del common["labels"]
    if name in REFERENCES:
        return {**common, "space": name}
    return {**common, "space": name, **asdict(Selection.of(name))}


@dataclass(frozen=True)
class _Look:
    """Measures and classifiers of the kernels of a split.

    Attributes:
        data: The examples.
        full: The full kernel without a new head.
        head: The kernel of a new head; None if there is none.
        folds: Kernels under heads that were fitted without a fold.
    """

    data: ScoredSplit
    full: Tensor
    head: Tensor | None
    folds: Sequence[HeldOut]

    def body(self, name: str, kernel: Tensor) -> Record:
        """Return measures and scores of the kernel alone."""
        return {
            **self._measures(self.full, kernel, [name]),
            **self.classify(kernel, None),
        }

    def whole(self, name: str, kernel: Tensor) -> Record:
        """Return measures and scores with the head and the model's own outputs."""
        full, names = self.full, [name]
        if self.head is not None:
            full, kernel = full + self.head, kernel + self.head
            names = [name, HEAD]
        return {
            **self._measures(full, kernel, names),
            **self.classify(kernel, self.data.f0),
        }

    def classify(self, kernel: Tensor, start: Array | None) -> Record:
        """Return scores of ridge regression, starting from ``start`` or from zero."""
        data = self.data
        tuned = tune(
            kernel.numpy(),
            data.labels[: data.train],
            data.labels[data.dev],
            f0=start,
            judge=data.primary_metric,
        )
        return {
            **data.scored(tuned.dev, tuned.test),
            "regularisation": tuned.regularisation,
            "offset_scale": tuned.offset_scale,
        }

    def _measures(self, full: Tensor, kernel: Tensor, names: Sequence[str]) -> Record:
        n = self.data.train
        reference, gram = (gram_matrix(k[:n]).numpy() for k in (full, kernel))
        rank = min(EIGENSPACE, len(gram) - 1)
        unseen = [
            (fold, torch.stack([fold.unseen(name) for name in names]).sum(0))
            for fold in self.folds
        ]
        return {
            "distance": asdict(distance.summary(reference, gram, rank=rank)),
            "alignment": mean_alignment(self.data, kernel, unseen),
        }
