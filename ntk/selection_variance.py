"""How far the kernels of random rows or columns lie from those of the whole weights.

With d rows in a weight, k_i the kernel of row i alone and K = k_1 + ... + k_d, the
rescaled kernel of r rows R, drawn uniformly without replacement, is unbiased:

    K_hat = (d / r) sum_{i in R} k_i,    E K_hat = K,
    E ||K_hat - K||_F^2 = d^2 (1 / r - 1 / d) S^2,

with S^2 the sum over the kernel's entries of their sample variances over rows (Cochran
1977, Sampling Techniques, theorem 2.2). Each weight draws for itself, as does each
matrix of a fused weight, so their errors add up. All of it holds for columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ntk import coverage, passes
from ntk.chunks import PassSize, packed
from ntk.features import Features, Stored
from ntk.function import Batch, NetworkFunction, batch_length, evaluating
from ntk.jacobian import Key, jacobian
from ntk.kernel import Reduction, reader
from ntk.maps import InputSide, Map, Maps, Slices
from ntk.spaces import Columns, Rows
from rocoft.architecture import Architecture, LinearWeight, SelectionError


@dataclass(frozen=True)
class Scatter:
    """What a random selection of slices draws from.

    Attributes:
        name: The weight.
        slices: d, rows of one of its matrices or its columns.
        variance: S^2, the sample variance over slices of the kernel's entries, summed
            over the entries; 0 for a single slice.
        extreme: Share in S^2 of the one slice that lies farthest from the mean.
    """

    name: str
    slices: int
    variance: float
    extreme: float

    def error(self, count: int) -> float:
        """Return the mean squared error of so many random slices."""
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
        space: Rows or columns, of which weights; how many and which does not matter.
        entries: Most numbers that are kept at a time, as in
            `chunks.compute_in_chunks`; here the kernels of a weight's slices count too.
        reduce: As in `kernel.compute`.

    Returns:
        One for each weight, or matrix of a fused weight.
    """
    chosen = space.chosen_parameters(Architecture(model))
    weights = {name: of for name, of in chosen.items() if of is not None}
    by_row = isinstance(space, Rows)
    size = PassSize.of(model, batches, reduce)
    side = size.examples * (size.outputs if reduce == "full" else 1)
    kept = {
        name: size.features(of.outputs * of.inputs)
        + side**2 * (of.outputs if by_row else of.inputs)
        for name, of in weights.items()
    }
    function = NetworkFunction(model, reader(None, reduce))
    found = []
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
                    kernels = _kernels(features[name], width, reduce)
                    found += [_scatter(name, kernels[list(part)]) for part in parts]
                else:
                    found += [Scatter(name, len(part), 0.0, 0.0) for part in parts]
    return found


def expected_error(found: Sequence[Scatter], count: int) -> float:
    """Return E ||K_hat - K||_F^2 of so many random slices of every weight.

    Args:
        found: Of the weights, see `scatters`.
        count: r, slices drawn from each.

    Returns:
        The mean squared Frobenius error, in units of the kernel squared.

    Raises:
        SelectionError: If a weight does not have as many.
    """
    least = min(found, key=lambda each: each.slices)
    if not 1 <= count <= least.slices:
        raise SelectionError(
            f"count={count} slices cannot be drawn from the {least.slices} of "
            f"{least.name!r}. Choose a number from 1 to {least.slices}."
        )
    return sum(each.error(count) for each in found)


def extreme_share(found: Sequence[Scatter], count: int) -> float:
    """Return the share of the expected error that few slices account for.

    Where it is high, most selections miss those slices and do better than expected,
    and the rare ones that hold one do far worse.

    Args:
        found: As in `expected_error`.
        count: As in `expected_error`, less than all.

    Returns:
        The share of the one most extreme slice of every weight, in [0, 1].
    """
    total = expected_error(found, count)
    return sum(each.extreme * each.error(count) for each in found) / total


def _slices(of: LinearWeight, by_row: bool) -> Slices | InputSide:
    """Return the map whose features are those of all rows, or of all columns."""
    if by_row:
        return Slices(of, tuple(range(of.outputs)), ())
    return InputSide(of, tuple(range(of.inputs)), ())


def _features(
    function: NetworkFunction,
    batches: Sequence[Batch],
    maps: Mapping[str, Map],
    verdicts: coverage.Verdicts,
) -> dict[str, Tensor]:
    """Return the features ``(c, n, p)`` of the parameters that the outputs use."""
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
        store.update(jacobian(function, list(batches), unserved))
    return {k[0]: value for k, value in store.items() if isinstance(value, Tensor)}


def _kernels(features: Tensor, width: int, reduce: Reduction) -> Tensor:
    """Return the kernels ``(slices, k, k)`` of single slices.

    Args:
        features: ``(c, n, slices * width)``.
        width: Entries of a slice.
        reduce: As in `kernel.compute`; k is n, or c n for ``"full"``.
    """
    by_slice = features.unflatten(2, (-1, width)).permute(2, 0, 1, 3)
    if reduce == "full":
        rows = by_slice.flatten(1, 2)
    else:
        rows = by_slice.transpose(1, 2).flatten(2)
    return torch.bmm(rows, rows.transpose(1, 2)).double()


def _scatter(name: str, kernels: Tensor) -> Scatter:
    """Return the scatter of some kernels, stacked along the first axis."""
    away = (kernels - kernels.mean(dim=0)).flatten(1).square().sum(dim=1)
    total = float(away.sum())
    if not total:
        return Scatter(name, len(kernels), 0.0, 0.0)
    variance = total / (len(kernels) - 1)
    return Scatter(name, len(kernels), variance, float(away.max()) / total)
