"""Expected error of the kernels of random rows or columns.

Let a weight have d rows, k_i the kernel of row i, and K = k_1 + ... + k_d. The rescaled
kernel of r rows R, drawn uniformly without replacement, is unbiased:

    K_hat = (d / r) sum_{i in R} k_i,    E K_hat = K,
    E ||K_hat - K||_F^2 = d^2 (1 / r - 1 / d) S^2,

where S^2 is the sample variance over rows of the kernel's entries, summed over entries
(Cochran 1977, Sampling Techniques, theorem 2.2). Weights, and the matrices of a fused
weight, draw independently, so their errors add up. The same holds for columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntk.gradients import (
    Batch,
    Key,
    NetworkFunction,
    autograd_rows,
    batch_length,
    coverage,
    evaluating,
    passes,
)
from ntk.kernels import Features, KernelOptions, Stored, reader
from ntk.measures import Reduction
from ntk.scale import PassSize, packed
from ntk.spaces import Columns, InputSide, Map, Maps, Rows, Slices
from rocoft.models import Architecture, LinearWeight, SelectionError


@dataclass(frozen=True)
class Scatter:
    """The variance of the kernels of single rows or columns ("slices") of a weight.

    Attributes:
        name: Name of the weight.
        slices: Number of slices d, rows of one of its matrices or its columns.
        variance: S^2, the sample variance over slices summed over the kernel's entries;
            0 for a single slice.
        extreme: Share of S^2 due to the slice farthest from the mean.
    """

    name: str
    slices: int
    variance: float
    extreme: float

    def error(self, count: int) -> float:
        """Return the mean squared error of ``count`` random slices."""
        return self.slices**2 * (1 / count - 1 / self.slices) * self.variance


def scatters(
    model: nn.Module,
    batches: Sequence[Batch],
    space: Rows | Columns,
    *,
    entries: int,
    reduce: Reduction = "full",
) -> list[Scatter]:
    """Measure how the kernels of single rows or columns vary within each weight.

    Args:
        model: The model.
        batches: The n examples of the kernels.
        space: Rows or columns of some weights; which and how many is ignored.
        entries: Maximal number of entries of features and slice kernels in memory; a
            larger weight is processed alone.
        reduce: The reduction of the kernels.

    Returns:
        A scatter for each weight, or for each matrix of a fused weight.
    """
    chosen = space.chosen_parameters(Architecture(model))
    weights = {name: of for name, of in chosen.items() if of is not None}
    by_row = isinstance(space, Rows)
    options = KernelOptions(reduce=reduce)
    size = PassSize.of(model, batches, options)
    side = size.examples * (size.outputs if options.coupled else 1)
    kept = {
        name: size.features(of.outputs * of.inputs)
        + side**2 * (of.outputs if by_row else of.inputs)
        for name, of in weights.items()
    }
    function = NetworkFunction(model, reader(options))
    by_weight = []
    with evaluating(model):
        verdicts = coverage.services(function, passes.sample(batches), weights)
        for group in packed(kept, entries):
            maps = {name: _slices(weights[name], by_row) for name in group}
            features = _features(function, batches, maps, verdicts)
            for name, each in maps.items():
                of = each.of
                width = of.inputs if by_row else of.outputs
                parts = of.parts if by_row else (range(of.inputs),)
                if name in features:
                    kernels = _kernels(features[name], width, coupled=options.coupled)
                    by_weight += [_scatter(name, kernels[list(part)]) for part in parts]
                else:
                    by_weight += [Scatter(name, len(part), 0.0, 0.0) for part in parts]
    return by_weight


def expected_error(by_weight: Sequence[Scatter], count: int) -> float:
    """Return E ||K_hat - K||_F^2 for random slices of every weight.

    Args:
        by_weight: Scatters of the weights, see `scatters`.
        count: Number of slices r drawn from each.

    Returns:
        The mean squared Frobenius error, in units of the kernel squared.

    Raises:
        SelectionError: If a weight has fewer slices.
    """
    least = min(by_weight, key=lambda each: each.slices)
    if not 1 <= count <= least.slices:
        raise SelectionError(
            f"count={count} slices cannot be drawn from the {least.slices} of "
            f"{least.name!r}. Choose a number from 1 to {least.slices}."
        )
    return sum(each.error(count) for each in by_weight)


def extreme_share(by_weight: Sequence[Scatter], count: int) -> float:
    """Return the share of the expected error due to the extreme slice of each weight.

    If it is high, most selections miss those slices and have a smaller error than
    expected, and the few that contain one have a much larger error.

    Args:
        by_weight: Scatters of the weights, see `scatters`.
        count: Number of slices drawn from each weight, fewer than all.

    Returns:
        The share, in [0, 1].
    """
    total = expected_error(by_weight, count)
    return sum(each.extreme * each.error(count) for each in by_weight) / total


def _slices(of: LinearWeight, by_row: bool) -> Slices | InputSide:
    """Return the map to the features of all rows or all columns."""
    if by_row:
        return Slices(of, tuple(range(of.outputs)), ())
    return InputSide(of, tuple(range(of.inputs)), ())


def _features(
    function: NetworkFunction,
    batches: Sequence[Batch],
    maps: Mapping[str, Map],
    verdicts: coverage.Verdicts,
) -> dict[str, Tensor]:
    """Return features ``(c, n, p)`` of the parameters that affect the outputs."""
    store: dict[Key, Stored] = {}
    some = {name: verdicts[name] for name in maps}
    n = sum(map(batch_length, batches))

    def collect(service: coverage.Service, names: set[str]) -> Features:
        wanted = {name: (maps[name],) for name in names}
        return Features(wanted, function.parameters, n, store)

    passes.run(function, batches, some, collect)
    unserved: Maps = {
        name: (maps[name],)
        for name, verdict in some.items()
        if verdict.service is coverage.Service.DEFINITION
    }
    if unserved:
        store.update(autograd_rows(function, list(batches), unserved))
    return {k[0]: value for k, value in store.items() if isinstance(value, Tensor)}


def _kernels(features: Tensor, width: int, *, coupled: bool) -> Tensor:
    """Return the kernels ``(slices, k, k)`` of single slices.

    Args:
        features: ``(c, n, slices * width)`` features.
        width: Number of entries of a slice.
        coupled: Whether k is c n, all pairs of outputs, instead of n.
    """
    by_slice = features.unflatten(2, (-1, width)).permute(2, 0, 1, 3)
    by_example = by_slice.transpose(1, 2).flatten(2)
    rows = by_slice.flatten(1, 2) if coupled else by_example
    return torch.bmm(rows, rows.transpose(1, 2)).double()


def _scatter(name: str, kernels: Tensor) -> Scatter:
    """Return the scatter of the kernels stacked along the first axis."""
    deviations = (kernels - kernels.mean(dim=0)).flatten(1).square().sum(dim=1)
    total = float(deviations.sum())
    if not total:
        return Scatter(name, len(kernels), 0.0, 0.0)
    variance = total / (len(kernels) - 1)
    return Scatter(name, len(kernels), variance, float(deviations.max()) / total)
