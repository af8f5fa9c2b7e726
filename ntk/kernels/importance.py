"""Unbiased estimates of kernels from rows or columns drawn by importance.

The kernel of a whole weight is a sum over its rows, K = sum_i k_i, also with signs. A
sample that holds row i with probability pi_i estimates it by

    sum over drawn i of k_i / pi_i,   whose mean is K     (Horvitz and Thompson 1952)

and the variance is least where pi_i is proportional to k_i. So the inclusion
probabilities ("odds") follow the squared gradient of each row on a few examples. They
are mixed with equal ones (the defensive mixture of Hesterberg 1995): a row that is
small on those examples may be large on others, and a small pi_i would multiply it. The
same holds for columns.

A fixed number of rows is drawn without replacement, by systematic sampling in random
order (Madow 1949), which has exactly these inclusion probabilities.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ntk.gradients import Batch, Inputs, Readout, statistics, take, to_batches
from ntk.kernels.empirical import reader
from ntk.kernels.estimates import (
    REPLICATES,
    ApproximateKernel,
    EstimatedSpace,
    Estimator,
    estimated_ntk,
    whole_weights,
)
from ntk.kernels.options import KernelOptions, Kind
from ntk.measures import Reduction
from ntk.spaces import Full, Map, Slices, Space
from rocoft.commands import Progress
from rocoft.models import Architecture, LinearWeight

__all__ = [
    "SampledSpace",
    "SamplingEstimator",
    "inclusion_odds",
    "sampled_ntk",
    "systematic_sample",
]

Axis = Literal["rows", "columns"]
Odds = Mapping[str, tuple[float, ...]]
"""For each weight, the probability of each row or column to be drawn."""

PILOTS = 8
"""Number of examples whose gradients determine the odds."""
EVEN = 0.1
"""Share of the odds that is equal for all rows."""


def inclusion_odds(scores: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the inclusion probabilities of d items of which ``count`` are drawn.

    Args:
        scores: ``(d,)`` nonnegative; apart from the equal share, odds are proportional
            to them, clipped at 1.
        count: Number of items drawn, at most d.

    Returns:
        ``(d,)`` probabilities above 0 that sum to ``count``.

    Raises:
        ValueError: If a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(
            "gradients on the first examples are not finite, so they give no odds. "
            "Check the model's dtype and the inputs."
        )
    total = scores.sum()
    parts = scores / total if total > 0 else np.full(len(scores), 1 / len(scores))
    parts = (1 - EVEN) * parts + EVEN / len(scores)
    odds = np.ones(len(scores))
    open_ = np.ones(len(scores), dtype=bool)
    while True:
        left = count - (~open_).sum()
        odds[open_] = left * parts[open_] / parts[open_].sum()
        above = open_ & (odds >= 1)
        if not above.any():
            return odds
        odds[above] = 1.0
        open_ &= ~above
        if not open_.any():
            return odds


def systematic_sample(
    odds: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Draw items without replacement, with given inclusion probabilities.

    Args:
        odds: ``(d,)`` probabilities whose sum is an integer, see `inclusion_odds`.
        generator: Source of randomness.

    Returns:
        Indices in ascending order; their number is the sum of the odds.
    """
    certain = np.flatnonzero(odds >= 1)
    order = generator.permutation(np.flatnonzero(odds < 1))
    count = round(float(odds[order].sum()))
    ends = np.cumsum(odds[order])
    places = generator.random() + np.arange(count)
    # Without the last end: rounding may put it below the last place.
    drawn = order[np.searchsorted(ends[:-1], places, side="right")]
    return np.sort(np.concatenate([certain, drawn]).astype(np.int64))


@dataclass(frozen=True)
class SampledSpace(EstimatedSpace):
    """A space whose whole weights are replaced by a few of their rows or columns.

    Args:
        space: The wrapped space.
        count: Number of rows or columns per weight; smaller weights stay exact.
        axis: ``"rows"`` or ``"columns"``.
        odds: Inclusion probabilities of each weight.
        seed: Seed of the draw; each weight has its own stream.
    """

    count: int
    axis: Axis
    odds: Odds = field(hash=False)
    seed: int = 0

    @property
    def lasting(self) -> bool:
        """False: odds depend on the values of the weights."""
        return False

    def replacement(self, name: str, weight: LinearWeight) -> Map | None:
        """Return the sampled rows or columns of a weight, see `EstimatedSpace`."""
        if name not in self.odds or len(self.odds[name]) <= self.count:
            return None
        odds = np.array(self.odds[name])
        stream = zlib.crc32(f"{self.seed} {name}".encode())
        drawn = systematic_sample(odds, np.random.default_rng(stream))
        indices, drawn_odds = tuple(drawn.tolist()), tuple(odds[drawn].tolist())
        rows, columns = (indices, ()) if self.axis == "rows" else ((), indices)
        return Slices(weight, rows, columns, rescale=True, odds=drawn_odds)


@dataclass(frozen=True)
class SamplingEstimator(Estimator):
    """Estimates whole weights by rows or columns drawn by importance.

    Attributes:
        axis: ``"rows"`` or ``"columns"``.
        odds: Inclusion probabilities of each weight; `fitted` computes them.
    """

    axis: Axis = "rows"
    odds: Odds | None = None

    @property
    def unit(self) -> str:
        """What ``entries`` counts."""
        return self.axis

    def fitted(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        spaces: Iterable[Space],
        outputs: Readout | None = None,
        kind: Kind = "sgd",
    ) -> Self:
        """Return the estimator with odds from the gradients of the first examples.

        For signs the odds are equal: all rows contribute about as much.
        """
        architecture = Architecture(model)
        weights: dict[str, LinearWeight] = {}
        for space in spaces:
            weights |= whole_weights(space.maps(architecture), architecture)
        if not weights:
            return replace(self, odds={})
        pilots = take(batches[0], slice(0, PILOTS))
        measured = statistics(model, weights, pilots, outputs=outputs)
        key = "row energy" if self.axis == "rows" else "column energy"
        count = self.entries // self.replicates
        odds = {}
        for name in weights:
            # Missing if the outputs do not depend on the weight.
            if key in measured[name]:
                scores = _coarse(measured[name][key].cpu().numpy())
                if kind == "signgd":
                    scores = np.ones_like(scores)
                inclusion = inclusion_odds(scores, min(count, len(scores)))
                odds[name] = tuple(inclusion.tolist())
        return replace(self, odds=odds)

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return the space with its whole weights sampled, see `Estimator`."""
        assert self.odds is not None, "fitted first"
        return SampledSpace(space, entries, self.axis, self.odds, seed)


def _coarse(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores rounded to two digits.

    The last digits differ between machines. The odds must not: they are part of the key
    of cached kernels.
    """
    with np.errstate(divide="ignore"):
        size = 10.0 ** np.floor(np.log10(scores))
    rounded = np.divide(scores, size, out=np.zeros_like(scores), where=size > 0)
    return np.round(rounded, 1) * size


@overload
def sampled_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space = ...,
    count: int = ...,
    axis: Axis = ...,
    replicates: int = ...,
    seed: int = ...,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ApproximateKernel: ...
@overload
def sampled_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Mapping[str, Space],
    count: int = ...,
    axis: Axis = ...,
    replicates: int = ...,
    seed: int = ...,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, ApproximateKernel]: ...
def sampled_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space | Mapping[str, Space] | None = None,
    count: int = 64,
    axis: Axis = "rows",
    replicates: int = REPLICATES,
    seed: int = 0,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ApproximateKernel | dict[str, ApproximateKernel]:
    """Estimate the empirical NTK from rows or columns drawn by importance.

    Unlike `estimates.sketched_ntk` it also estimates kernels of signs.

    Args:
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples; the first few determine the odds.
        other: m examples; None means ``inputs``.
        space: A tangent space, or several by name; None means `Full()`.
        count: Number of rows or columns per weight, over all replicates.
        axis: ``"rows"`` or ``"columns"``.
        replicates: Number of independent draws that share them, at least 2.
        seed: Seed of the draws.
        outputs: Maps the model's output to ``(n, c)``.
        reduce: One of `ntk.measures.REDUCTIONS`.
        kind: The kind of kernel.
        batch_size: Largest number of examples in one pass.
        progress: Called as the work goes on.

    Returns:
        The estimate; for a mapping of spaces, a dictionary of estimates. Blocks
        computed separately belong to one estimate only if their first examples are the
        same.

    Raises:
        ValueError: If ``axis`` is neither ``"rows"`` nor ``"columns"``, or ``count`` is
            not a multiple of ``replicates``.
    """
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis={axis!r} must be 'rows' or 'columns'.")
    spaces = space.values() if isinstance(space, Mapping) else [space or Full()]
    batches = to_batches(inputs, next(model.parameters()).device, batch_size)
    options = KernelOptions(
        kind=kind, reduce=reduce, outputs=outputs, batch_size=batch_size
    )
    estimator = SamplingEstimator(count, replicates, seed, axis).fitted(
        model, batches, spaces=spaces, outputs=reader(options), kind=kind
    )
    return estimated_ntk(
        estimator, model, inputs, other, space=space, options=options, progress=progress
    )
