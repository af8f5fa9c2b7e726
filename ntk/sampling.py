"""How a measure of kernels depends on which and how many examples it is taken on.

A kernel between the same n examples on both axes is ``(n, n)`` or ``(n, n, c, c)``. Its
submatrices over some of the examples are kernels, too, so one kernel of n examples
shows how a measure varies with the choice of m < n, and how it grows with m, without
computing another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import resample

from ntk.distance import UndefinedError
from ntk.kernel import gram_matrix
from ntk.spectrum import Array, as_array

__all__ = ["Measure", "SampleSpread", "growth", "over_examples"]

Measure = Callable[..., float]
"""From a Gram matrix ``(m c, m c)`` of each kernel, and targets if there are any."""

FEWEST = 4
"""Examples that `growth` goes down to unless told; the unbiased CKA needs as many."""


@dataclass(frozen=True)
class SampleSpread:
    """A measure over random subsets of the examples.

    Attributes:
        examples: n.
        size: Examples in a subset, m.
        draws: Number of subsets; 1 if they are all of the examples.
        value: The measure on all n examples.
        mean: Its mean over the subsets.
        std: Its deviation over the subsets, divisor draws - 1; NaN of one.
        standard_error: Of `value`, std * sqrt(m / (n - m)); NaN where std is.
    """

    examples: int
    size: int
    draws: int
    value: float
    mean: float
    std: float
    standard_error: float


def over_examples(
    measure: Measure,
    *kernels: ArrayLike,
    size: int | None = None,
    draws: int = 100,
    seed: int = 0,
    labels: ArrayLike | None = None,
    targets: ArrayLike | None = None,
) -> SampleSpread:
    """Return how a measure varies over random subsets of the examples.

    Subsets are drawn without replacement. The bootstrap would repeat examples, and a
    kernel with equal rows has another rank, spectrum and CKA than any sample of
    distinct examples. Deviations over subsets alone are too small, as subsets of
    one sample overlap: by sqrt(1 - m / n) against fresh samples of m examples. The
    delete-d jackknife (Shao and Wu 1989; with random subsets Shao 1989), d = n - m,
    corrects for that and scales from m to n examples: its standard error of the
    measure is the deviation times sqrt(m / d). It is exact for means, and consistent
    for smooth measures, and for others such as quantiles, if d is a fixed share of n.

    A measure that is biased in n (most ranks grow with it) has a mean below or above
    its `value`; the standard error is about the spread, not about that bias. See
    `growth`.

    Args:
        measure: Called with the Gram matrices of a subset, one for each kernel in
            their order, and its targets last if there are any.
        *kernels: ``(n, n)`` or ``(n, n, c, c)``, on the same examples.
        size: m, 1 to n; half of the examples unless given. At n there is one subset,
            which has no spread.
        draws: Number of subsets, at least 2.
        seed: Of the local random generator.
        labels: ``(n,)``; if given, every subset has its classes in the proportions of
            the whole, as sampling k examples of each has.
        targets: ``(n,)`` or ``(n, ...)``, of which the measure gets ``(m, ...)``.

    Returns:
        The spread.

    Raises:
        ValueError: If a shape does not fit, or a number is out of its range.
        UndefinedError: If the measure is NaN or infinite on a subset.
    """
    sample = _Sample.of(kernels, labels, targets)
    chosen = max(1, sample.n // 2) if size is None else size
    return _spread(measure, sample, sample.measured(measure), chosen, draws, seed)


def growth(
    measure: Measure,
    *kernels: ArrayLike,
    sizes: Sequence[int] | None = None,
    draws: int = 100,
    seed: int = 0,
    labels: ArrayLike | None = None,
    targets: ArrayLike | None = None,
) -> list[SampleSpread]:
    """Return a measure at growing numbers of examples; `asdict` makes each JSON.

    The mean at m < n estimates the measure on m fresh examples without bias; the
    deviation over fresh samples would be std / sqrt(1 - m / n), see `over_examples`.

    Args:
        measure: As in `over_examples`.
        *kernels: As in `over_examples`.
        sizes: Ascending, 1 to n. By default n halved again and again, down to 4.
        draws: Subsets of each size.
        seed: Of the local random generator, the same for each size. What is found at a
            size does not depend on the other sizes.
        labels: As in `over_examples`.
        targets: As in `over_examples`.

    Returns:
        The spread at each size.

    Raises:
        ValueError: If the sizes do not ascend, a shape does not fit, or a number is
            out of its range.
    """
    sample = _Sample.of(kernels, labels, targets)
    chosen = _halved(sample.n) if sizes is None else list(sizes)
    if not chosen or any(a >= b for a, b in zip(chosen, chosen[1:], strict=False)):
        raise ValueError(
            f"`sizes={chosen}`; expected ascending numbers of examples, 1 to "
            f"{sample.n}."
        )
    value = sample.measured(measure)
    return [_spread(measure, sample, value, m, draws, seed) for m in chosen]


@dataclass(frozen=True)
class _Sample:
    """The examples that are drawn from, by what is known of them."""

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
        found = {"labels": labels, "targets": targets}
        rows = {name: np.asarray(v) for name, v in found.items() if v is not None}
        for name, values in rows.items():
            if values.shape[:1] != (n,):
                raise ValueError(
                    f"`{name}` has shape {values.shape}; expected a row for each of "
                    f"the {n} examples."
                )
        return cls(arrays, rows.get("labels"), rows.get("targets"))

    @property
    def n(self) -> int:
        return len(self.kernels[0])

    def measured(
        self, measure: Measure, subset: NDArray[np.intp] | None = None
    ) -> float:
        """Return the measure on some examples, or on all."""
        own = np.arange(self.n) if subset is None else subset
        grams = [
            gram_matrix(torch.from_numpy(kernel[np.ix_(own, own)])).numpy()
            for kernel in self.kernels
        ]
        if self.targets is not None:
            grams.append(self.targets[own])
        value = float(measure(*grams))
        if not np.isfinite(value):
            raise UndefinedError(
                f"`measure` is {value} on {len(own)} of {self.n} examples. Take larger "
                "subsets, or a measure that every kernel has."
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
        nothing = float("nan")
        return SampleSpread(n, n, 1, value, value, nothing, nothing)
    found = [sample.measured(measure, s) for s in sample.subsets(size, draws, seed)]
    std = float(np.std(found, ddof=1))
    return SampleSpread(
        examples=n,
        size=size,
        draws=draws,
        value=value,
        mean=float(np.mean(found)),
        std=std,
        standard_error=std * float(np.sqrt(size / (n - size))),
    )


def _halved(n: int) -> list[int]:
    sizes = [n]
    while sizes[0] // 2 >= FEWEST:
        sizes.insert(0, sizes[0] // 2)
    return sizes
