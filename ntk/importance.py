"""Kernels of rows or columns drawn by importance: unbiased, whatever the odds.

The kernel of a whole weight is a sum over its rows, K = sum_i k_i, and so is that of
its signs. A draw that holds row i with probability pi_i estimates it by

    sum over drawn i of k_i / pi_i,   whose mean is K     (Horvitz and Thompson 1952)

and varies least where pi_i is in proportion to k_i. So the odds follow the squared
gradient of each row on a few examples; a part of them is the same for all rows, since a
row that is small on those may be large on others, and a small pi_i would multiply it
(the defensive mixture of Hesterberg 1995). The same holds for columns.

As many rows are drawn as are asked for, without repetition, by systematic sampling of
the rows in random order (Madow 1949), which keeps the odds exactly.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Self, overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ntk.approximation import (
    REPLICATES,
    ApproximateKernel,
    Estimated,
    Estimator,
    estimated,
    whole_weights,
)
from ntk.calibration import statistics
from ntk.function import Batch, Inputs, Readout, take, to_batches
from ntk.kernel import Kind, Reduction, reader
from ntk.maps import Map, Slices
from ntk.spaces import Full, Space
from rocoft.architecture import Architecture, LinearWeight
from rocoft.console import Progress

__all__ = ["Sampled", "Samples", "inclusion_odds", "sampled_ntk", "systematic_sample"]

Axis = Literal["rows", "columns"]
Odds = Mapping[str, tuple[float, ...]]
"""By weight the probability of each of its rows, or columns, to be drawn."""

PILOTS = 8
"""Examples whose gradients decide the odds."""
EVEN = 0.1
"""Share of the odds that is the same for all rows."""


def inclusion_odds(scores: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return how probably each of d things is drawn if count of them are.

    Args:
        scores: ``(d,)`` not negative; the odds are in proportion to them, but for the
            even share, and nowhere above 1.
        count: How many are drawn, at most d.

    Returns:
        ``(d,)`` probabilities above 0 that add up to count.

    Raises:
        ValueError: If a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(
            "gradients on the first examples are not finite, so that they decide no "
            "odds. Check the model's dtype and the inputs."
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
    """Draw without repetition, each thing with its own probability.

    Args:
        odds: ``(d,)`` that add up to a whole number, see `inclusion_odds`.
        generator: Draws.

    Returns:
        As many indices, in ascending order.
    """
    certain = np.flatnonzero(odds >= 1)
    order = generator.permutation(np.flatnonzero(odds < 1))
    count = round(float(odds[order].sum()))
    ends = np.cumsum(odds[order])
    places = generator.random() + np.arange(count)
    # The last end is a whole number but for rounding.
    drawn = order[np.searchsorted(ends[:-1], places, side="right")]
    return np.sort(np.concatenate([certain, drawn]).astype(np.int64))


@dataclass(frozen=True)
class Sampled(Estimated):
    """A space whose whole weights are replaced by a few of their rows or columns.

    Args:
        space: The space.
        count: Rows, or columns, of each weight; all of one that has no more.
        axis: Which of the two.
        odds: Of each weight.
        seed: Of the draw; each weight draws from its own stream.
    """

    count: int
    axis: Axis
    odds: Odds = field(hash=False)
    seed: int = 0

    @property
    def lasting(self) -> bool:
        """False: odds are of the values of the weights."""
        return False

    def instead(self, name: str, of: LinearWeight) -> Map | None:
        """Return the draw of a weight, see `Estimated`."""
        if name not in self.odds or len(self.odds[name]) <= self.count:
            return None
        odds = np.array(self.odds[name])
        stream = zlib.crc32(f"{self.seed} {name}".encode())
        drawn = systematic_sample(odds, np.random.default_rng(stream))
        of_drawn, indices = tuple(odds[drawn].tolist()), tuple(drawn.tolist())
        rows, columns = (indices, ()) if self.axis == "rows" else ((), indices)
        return Slices(of, rows, columns, rescale=True, odds=of_drawn)


@dataclass(frozen=True)
class Samples(Estimator):
    """Estimates whole weights by rows or columns of them, drawn by importance.

    Attributes:
        axis: ``"rows"`` or ``"columns"``.
        odds: Of each weight; `fitted` finds them.
    """

    axis: Axis = "rows"
    odds: Odds | None = None

    @property
    def unit(self) -> str:
        """What is counted."""
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
        """Return it with odds by the gradients of the first examples.

        Of signs all rows carry about as much, so that their odds are even.
        """
        known = Architecture(model)
        weights: dict[str, LinearWeight] = {}
        for space in spaces:
            weights |= whole_weights(space.maps(known), known)
        if not weights:
            return replace(self, odds={})
        pilots = take(batches[0], slice(0, PILOTS))
        found = statistics(model, weights, pilots, outputs=outputs)
        key = "row energy" if self.axis == "rows" else "column energy"
        count = self.entries // self.replicates
        odds = {}
        for name in weights:
            # The outputs may not depend on a weight at all.
            if key in found[name]:
                scores = _coarse(found[name][key].cpu().numpy())
                if kind == "signgd":
                    scores = np.ones_like(scores)
                some = inclusion_odds(scores, min(count, len(scores)))
                odds[name] = tuple(some.tolist())
        return replace(self, odds=odds)

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return the space with its whole weights sampled, see `Estimator`."""
        assert self.odds is not None, "fitted first"
        return Sampled(space, entries, self.axis, self.odds, seed)


def _coarse(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return scores of two digits.

    The last ones, which differ between machines, must not decide the odds, by which
    kept kernels are found again.
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

    Unlike `approximation.sketched_ntk` it estimates the kernels of signs too.

    Args:
        model: As in `kernel.empirical_ntk`.
        inputs: As in `kernel.empirical_ntk`; the first few decide the odds.
        other: As in `kernel.empirical_ntk`.
        space: As in `kernel.empirical_ntk`.
        count: Rows, or columns, of each weight, of all replicates together.
        axis: ``"rows"`` or ``"columns"``.
        replicates: Independent draws that share them, at least 2.
        seed: Of the draws.
        outputs: As in `kernel.empirical_ntk`.
        reduce: As in `kernel.empirical_ntk`.
        kind: As in `kernel.empirical_ntk`.
        batch_size: As in `kernel.empirical_ntk`.
        progress: As in `kernel.compute`.

    Returns:
        The estimate; for a mapping of spaces a dictionary of them. Blocks of examples
        that are computed apart are parts of one estimate only if their first examples
        are the same.

    Raises:
        ValueError: If ``axis`` is neither, or ``count`` cannot be parted among the
            replicates.
    """
    if axis not in ("rows", "columns"):
        raise ValueError(f"axis={axis!r} must be 'rows' or 'columns'.")
    spaces = space.values() if isinstance(space, Mapping) else [space or Full()]
    batches = to_batches(inputs, next(model.parameters()).device, batch_size)
    samples = Samples(count, replicates, seed, axis).fitted(
        model, batches, spaces=spaces, outputs=reader(outputs, reduce), kind=kind
    )
    run = partial(estimated, samples, model, inputs, other, space=space, kind=kind)
    return run(outputs=outputs, reduce=reduce, batch_size=batch_size, progress=progress)
