"""One split of an ablation: kernels over rows and columns chosen in every way.

The space of a selection is rows, columns or both, how many, and by which strategy they
are chosen: ``rows:3/strategy=max``, ``columns:8/strategy=random/seed=2``, and
``rows:3+columns:3`` for both. ``all`` is every row of every linear weight in the
blocks, which is every column and both too: the kernel that selections tend to. It is
not the full kernel, which has the embeddings, normalisation layers and biases as well.

Each kernel is looked at twice. Its *body* is the selection alone, beside the full
kernel without the head; its classifier starts from nothing. With a head that was made
for the task, which every method trains and whose kernel they all share, and a
classifier that may start from the model's own outputs, it is *whole*: what the study of
`fewshot` reports. The classifier is ridge regression, chosen on dev.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from torch import Tensor

from ntk import distance
from ntk.calibration import calibrate
from ntk.chunks import compute_in_chunks
from ntk.evolution import EIGENSPACE, Pinned
from ntk.function import Batch
from ntk.kernel import compute, gram_matrix
from ntk.maps import Maps, Whole
from ntk.notation import parse_space
from ntk.protocol import Array, Examples, Protocol, description
from ntk.selection_variance import expected_error, extreme_share, scatters
from ntk.spaces import Columns, Full, Head, Rows, Space, Sum, Without
from ntk.study import Cell, Record
from ntk.tuning import tune
from rocoft.architecture import Architecture
from rocoft.backbone import Backbone
from rocoft.selection import Strategy
from rocoft.splits import Split

Axis = Literal["rows", "columns", "both"]
AXES: tuple[Axis, ...] = ("rows", "columns", "both")
ALL = "all"
FULL = "full"
HEAD = "head"
OTHER_KINDS = ("biases", "norms", "embeddings", "head")
"""What is not the weight of a linear layer: lists of an `Architecture`."""
REFERENCES = (FULL, ALL)
"""Names of kernels that no selection makes: all parameters, all linear weights."""


@dataclass(frozen=True)
class Selection:
    """Which rows and columns of every linear weight.

    Attributes:
        axis: Rows, columns, or both with the same count and strategy.
        count: How many of each weight.
        strategy: How they are chosen, see `rocoft.selection.select`.
        seed: Of random ones.
    """

    axis: Axis
    count: int
    strategy: Strategy
    seed: int = 0

    @classmethod
    def of(cls, name: str) -> "Selection":
        """Read a selection from the name of its space.

        Args:
            name: As `Selection.name` or `Selection.estimate` writes it.

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
        """The space in the notation, which is also that of methods."""
        return self.space.name

    @property
    def is_estimate(self) -> bool:
        """Whether its error is known in expectation: random rows or random columns."""
        return self.strategy == "random" and self.axis != "both"

    @property
    def estimate(self) -> str:
        """The name of the space weighted so that it estimates the whole weights'."""
        return f"{self.name}/rescale"


def selections(
    axes: Sequence[Axis],
    counts: Sequence[int],
    strategies: Sequence[Strategy],
    draws: int,
) -> list[Selection]:
    """Return the selections of a grid.

    Args:
        axes: Rows, columns or both.
        counts: How many.
        strategies: How they are chosen.
        draws: Seeds of the random strategy, from 0.
    """
    return [
        Selection(axis, count, strategy, seed)
        for axis in axes
        for count in counts
        for strategy in strategies
        for seed in range(draws if strategy == "random" else 1)
    ]


def check_counts(protocol: Protocol, cell: Cell, counts: Sequence[int]) -> None:
    """See that every linear weight has as many rows and columns as are asked for.

    Args:
        protocol: Of the study.
        cell: Any split.
        counts: Numbers of rows and columns.

    Raises:
        SelectionError: If one has fewer.
    """
    architecture = Architecture(protocol.backbone(protocol.split(cell)).module)
    for count in counts:
        (Rows(count) + Columns(count)).maps(architecture)


def selection_records(
    protocol: Protocol,
    cell: Cell,
    entries: int,
    together: Sequence[str],
    names: Sequence[str],
) -> list[Record]:
    """Compute the kernels of selections, measure them and classify with each.

    Args:
        protocol: Of the study.
        cell: The split.
        entries: Most numbers that a pass keeps, see `chunks.compute_in_chunks`.
        together: Names of selections and `REFERENCES`. All their kernels are computed
            whichever are asked for: rounding depends on what is computed together, and
            a record that is made again shall be the same.
        names: Those of them that are asked for.

    Returns:
        A record for each name; that of the full kernel also says what the head alone
        and the model's own outputs reach.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = Examples.of(backbone, split, protocol)
    wanted = [*together, HEAD] if backbone.new_head else together
    result = compute_in_chunks(
        backbone.module,
        data.batches,
        data.train_batches,
        spaces=_spaces(backbone, wanted, data.batches[: data.train_batches]),
        entries=entries,
        reduce=protocol.reduction(data.f0.shape[1]),
    )
    kernels = {name: data.sorted(kernel) for name, kernel in result.kernels.items()}
    head = kernels.get(HEAD)
    look = _Look(data, kernels[FULL], head)
    total = sum(p.numel() for p in Architecture(backbone.module).parameters.values())
    records = []
    for name in names:
        record = {
            **_described(name, backbone, split),
            "parameters": result.sizes[name],
            "share": result.sizes[name] / total,
            "body": look.body(kernels[name]),
            "whole": look.whole(kernels[name]),
        }
        if name == FULL:
            record["own_outputs"] = data.scored(data.f0[data.dev], data.f0[data.test])
            record["head"] = None if head is None else look.classify(head, data.f0)
        records.append(record)
    return records


def variance_records(
    protocol: Protocol,
    cell: Cell,
    entries: int,
    together: Sequence[str],
    names: Sequence[str],
) -> list[Record]:
    """Compare the error of random rows or columns with its expectation.

    Both are of the rescaled kernel of the selection as an estimate of that of all
    linear weights in the blocks, on the training examples: its squared Frobenius
    error, relative to the squared norm of that kernel. ``"extreme"`` is the share of
    the expectation that `selection_variance.extreme_share` describes.

    Args:
        protocol: Of the study.
        cell: The split.
        entries: As in `selection_records`.
        together: Of random selections, see `Selection.estimate`; as in
            `selection_records`.
        names: Those of them that are asked for.

    Returns:
        A record for each name.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    module = backbone.module
    data = Examples.of(backbone, replace(split, dev=(), test=()), protocol)
    reduce = protocol.reduction(data.f0.shape[1])
    kernels = compute_in_chunks(
        module,
        data.batches,
        data.train_batches,
        spaces=_spaces(backbone, [ALL, *together], data.batches),
        entries=entries,
        reduce=reduce,
    ).kernels
    found = {
        axis: scatters(module, data.batches, one, entries=entries, reduce=reduce)
        for axis, one in (("rows", Rows(1)), ("columns", Columns(1)))
        if any(Selection.of(name).axis == axis for name in names)
    }
    norm = float(kernels[ALL].square().sum())
    records = []
    for name in names:
        chosen = Selection.of(name)
        drawn = found[chosen.axis], chosen.count
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
    """Measure which modules and layers the full kernel comes from.

    Args:
        protocol: Of the study.
        cell: The split; its training examples are taken.
        names: ``"full"`` alone.

    Returns:
        One record. ``"trace"`` and ``"parameters"`` have a number for each kind of
        module and each layer, ``"cosine"`` the cosine of each kind's and each layer's
        kernel to the full one.
    """
    assert list(names) == [FULL]
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = Examples.of(backbone, replace(split, dev=(), test=()), protocol)
    architecture = Architecture(backbone.module)
    origins = {name: origin(name, architecture) for name in architecture.parameters}
    spaces: dict[str, Space] = {FULL: Full()}
    for by, place in (("kind", 0), ("layer", 1)):
        groups: dict[str, Maps] = {}
        for name, where in origins.items():
            groups.setdefault(where[place], {})[name] = (Whole(),)
        spaces |= {f"{by} {group}": Pinned(Full(), m) for group, m in groups.items()}
    result = compute(
        backbone.module,
        data.batches,
        data.train_batches,
        spaces=spaces,
        reduce=protocol.reduction(data.f0.shape[1]),
    )
    full = gram_matrix(result.kernels.pop(FULL)).cpu().numpy()
    cosines: dict[str, dict[str, float | None]] = {"kind": {}, "layer": {}}
    for name, kernel in result.kernels.items():
        by, _, group = name.partition(" ")
        gram = gram_matrix(kernel).cpu().numpy()
        # A pooler that the readout skips has no gradient.
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
    """Return the kind of module and the layer that a parameter belongs to.

    Args:
        parameter: Its name.
        architecture: Of the model.

    Returns:
        The kind: ``"head"``, ``"norms"``, ``"embeddings"``, ``"biases"``, or a linear
        layer's name from below its block; and the layer, ``"layer 0"``,
        ``"embeddings"``, ``"head"`` or ``"other"``.
    """
    # The bias of a head or norm is of that first of all.
    for kind in reversed(OTHER_KINDS):
        if parameter in getattr(architecture, kind):
            return kind, architecture.place(parameter)
    block = architecture.block(parameter)
    inside = parameter if block is None else parameter.partition(f".{block}.")[2]
    return inside.rpartition(".")[0] or inside, architecture.place(parameter)


def _spaces(
    backbone: Backbone, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Space]:
    """Return spaces by name; none but the head's own holds a new head."""
    architecture = Architecture(backbone.module)
    head = tuple(architecture.head) if backbone.new_head else ()
    references: dict[str, Space] = {
        FULL: Without(Full(), head),
        ALL: Pinned(Full(), {name: (Whole(),) for name in architecture.targets}),
        HEAD: Head(),
    }
    asked = {n: _parts(parse_space(n)) for n in names if n not in references}
    # One look at the examples serves all that choose by them.
    every = Sum(tuple(part for parts in asked.values() for part in parts))
    fixed = iter(_parts(calibrate(every, backbone.module, batches)))
    chosen = {n: tuple(next(fixed) for _ in parts) for n, parts in asked.items()}
    spaces = {n: p[0] if len(p) == 1 else Sum(p) for n, p in chosen.items()}
    return {name: references.get(name) or spaces[name] for name in names}


def _parts(space: Space) -> tuple[Space, ...]:
    return space.parts if isinstance(space, Sum) else (space,)


def _described(name: str, backbone: Backbone, split: Split) -> Record:
    """Return what a record says of its model, split and selection."""
    common = description(backbone, split)
    del common["labels"]
    if name in REFERENCES:
        return {**common, "space": name}
    return {**common, "space": name, **asdict(Selection.of(name))}


@dataclass(frozen=True)
class _Look:
    """Measures kernels over selections of a split's model.

    Attributes:
        data: The examples.
        full: ``(rows, n)``, the full kernel without a new head.
        head: That of a new head, None if there is none.
    """

    data: Examples
    full: Tensor
    head: Tensor | None

    def body(self, kernel: Tensor) -> Record:
        """Return how a selection's kernel alone is."""
        return {
            **self._measures(self.full, kernel),
            **self.classify(kernel, None),
        }

    def whole(self, kernel: Tensor) -> Record:
        """Return how it is beside the head and the model's own outputs."""
        full = self.full
        if self.head is not None:
            full, kernel = full + self.head, kernel + self.head
        return {
            **self._measures(full, kernel),
            **self.classify(kernel, self.data.f0),
        }

    def classify(self, kernel: Tensor, start: Array | None) -> Record:
        """Return what ridge regression reaches, from the model's outputs if given."""
        data = self.data
        tuned = tune(
            kernel.numpy(),
            data.labels[: data.train],
            data.labels[data.dev],
            f0=start,
            judge=data.judge,
        )
        return {
            **data.scored(tuned.dev, tuned.test),
            "regularisation": tuned.regularisation,
            "offset_scale": tuned.offset_scale,
        }

    def _measures(self, full: Tensor, kernel: Tensor) -> Record:
        n = self.data.train
        reference, gram = (gram_matrix(k[:n]).numpy() for k in (full, kernel))
        rank = min(EIGENSPACE, len(gram) - 1)
        targets = self.data.targets_of(gram)
        return {
            "distance": asdict(distance.summary(reference, gram, rank=rank)),
            "alignment": distance.alignment(gram, targets),
        }
