"""How a measure of kernels depends on the choice and the number of examples.

A kernel of n examples, the same on both axes, is ``(n, n)`` or ``(n, n, c, c)``. Its
submatrices are kernels of fewer examples, so one kernel shows how a measure varies with
the choice of m < n examples and how it grows with m.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import resample

from ntk.measures.distance import UndefinedError
from ntk.measures.gram import gram_matrix
from ntk.measures.spectrum import Array, as_array

__all__ = ["Measure", "SampleSpread", "growth"]

Measure = Callable[..., float]
"""Function of one Gram matrix ``(m c, m c)`` per kernel, and targets if any."""

FEWEST = 4
"""Smallest default size of `growth`; the unbiased CKA needs as many examples."""


@dataclass(frozen=True)
class SampleSpread:
    """A measure over random subsets of the examples.

    Attributes:
        examples: n.
        size: m, the number of examples in a subset.
        draws: Number of subsets; 1 if m = n.
        value: The measure on all n examples.
        mean: Mean over the subsets.
        std: Standard deviation over the subsets, divisor draws - 1; NaN if m = n.
        standard_error: Standard error of `value`, std * sqrt(m / (n - m)); NaN if
            m = n.
    """

    examples: int
    size: int
    draws: int
    value: float
    mean: float
    std: float
    standard_error: float


def growth(
    measure: Measure,
    *kernels: ArrayLike,
    sizes: Sequence[int] | None = None,
    draws: int = 100,
    seed: int = 0,
    labels: ArrayLike | None = None,
    targets: ArrayLike | None = None,
) -> list[SampleSpread]:
    """Return how a measure varies over random subsets of growing size.

    Subsets are drawn without replacement. The bootstrap would repeat examples, and a
    kernel with equal rows has another rank, spectrum and CKA than any sample of
    distinct examples. Subsets of one sample overlap, so the deviation over them is too
    small by sqrt(1 - m / n) against fresh samples of m examples. The delete-d jackknife
    (Shao and Wu 1989; with random subsets Shao 1989), d = n - m, corrects for that and
    scales from m to n examples: its standard error of the measure is the deviation
    times sqrt(m / d). It is exact for means. It is consistent for smooth measures, and
    for others such as quantiles if d is a fixed share of n.

    The mean at m < n estimates the measure on m fresh examples without bias. For a
    measure that is biased in n (most ranks grow with it) the mean differs from `value`;
    the standard error describes the spread, not that bias.

    Args:
        measure: Called with the Gram matrices of a subset, one per kernel in their
            order, and last its targets if there are any.
        *kernels: ``(n, n)`` or ``(n, n, c, c)``, on the same examples.
        sizes: Subset sizes m, ascending, 1 to n. By default n halved repeatedly, down
            to 4. At n there is one subset, which has no spread.
        draws: Number of subsets of each size, at least 2.
        seed: Seed of the local random generator, the same for each size: the result at
            one size does not depend on the other sizes.
        labels: ``(n,)``; if given, every subset keeps the class proportions, as in
            sampling k examples of each class.
        targets: ``(n,)`` or ``(n, ...)``; the measure gets ``(m, ...)``.

    Returns:
        The spread at each size; `asdict` makes each JSON.

    Raises:
        ValueError: If the sizes do not ascend, a shape does not fit, or a number is
            out of its range.
        UndefinedError: If the measure is NaN or infinite on a subset.
    """
    sample = _Sample.of(kernels, labels, targets)
    ascending = _halved(sample.n) if sizes is None else list(sizes)
    if not ascending or any(
        a >= b for a, b in zip(ascending, ascending[1:], strict=False)
    ):
        raise ValueError(
            f"`sizes={ascending}`; expected ascending numbers of examples, 1 to "
            f"{sample.n}."
        )
    value = sample.measured(measure)
    return [_spread(measure, sample, value, m, draws, seed) for m in ascending]


@dataclass(frozen=True)
class _Sample:
    """The examples to draw from: their kernels, labels and targets."""

    kernels: tuple[Array, ...]
    labels: NDArray[Any] | None
    targets: NDArray[Any] | None

    @classmethod
    def of(
        cls,
        kernels: Sequence[ArrayLike],
        labels: ArrayLike | None,
        targets: ArrayLike | None,
    ) -> "_Sample":
        arrays = tuple(as_array(kernel, "kernels") for kernel in kernels)
        shapes = [array.shape for array in arrays]
        n = shapes[0][0] if shapes and shapes[0] else 0
        if not n or any(s[:2] != (n, n) or len(s) not in {2, 4} for s in shapes):
            raise ValueError(
                f"`kernels` have shapes {shapes}; expected (n, n) or (n, n, c, c) of "
                "at least one kernel, the same examples on both axes of all."
            )
        given = {"labels": labels, "targets": targets}
        rows = {name: np.asarray(v) for name, v in given.items() if v is not None}
        for name, values in rows.items():
            if values.shape[:1] != (n,):
                raise ValueError(
                    f"`{name}` has shape {values.shape}; expected a row for each of "
                    f"{n} examples."
                )
        return cls(arrays, rows.get("labels"), rows.get("targets"))

    @property
    def n(self) -> int:
        return len(self.kernels[0])

    def measured(
        self, measure: Measure, subset: NDArray[np.intp] | None = None
    ) -> float:
        """Return the measure on a subset of the examples, by default on all."""
        rows = np.arange(self.n) if subset is None else subset
        grams = [
            gram_matrix(torch.from_numpy(kernel[np.ix_(rows, rows)])).numpy()
            for kernel in self.kernels
        ]
        if self.targets is not None:
            grams.append(self.targets[rows])
        value = float(measure(*grams))
        if not np.isfinite(value):
            raise UndefinedError(
                f"`measure` is {value} on {len(rows)} of {self.n} examples. Use larger "
                "subsets, or a measure that is defined for every kernel."
            )
        return value

    def subsets(self, size: int, draws: int, seed: int) -> Iterator[NDArray[np.intp]]:
        generator = np.random.RandomState(seed)
        for _ in range(draws):
            drawn = resample(
                np.arange(self.n),
                replace=False,
                n_samples=size,
                random_state=generator,
                stratify=self.labels,
            )
            yield np.sort(drawn)


def _spread(
    measure: Measure, sample: _Sample, value: float, size: int, draws: int, seed: int
) -> SampleSpread:
    n = sample.n
    if not 1 <= size <= n:
        raise ValueError(f"`size={size}`; expected 1 to {n}, the number of examples.")
    if draws < 2:
        raise ValueError(f"`draws={draws}`; expected at least 2 to have a spread.")
    if size == n:
        nan = float("nan")
        return SampleSpread(n, n, 1, value, value, nan, nan)
    values = [sample.measured(measure, s) for s in sample.subsets(size, draws, seed)]
    std = float(np.std(values, ddof=1))
    return SampleSpread(
        examples=n,
        size=size,
        draws=draws,
        value=value,
        mean=float(np.mean(values)),
        std=std,
        standard_error=std * float(np.sqrt(size / (n - size))),
    )


def _halved(n: int) -> list[int]:
    sizes = [n]
    while sizes[0] // 2 >= FEWEST:
        sizes.insert(0, sizes[0] // 2)
    return sizes
