"""Ratios of kernel scores to fine-tuning scores, over seeds or over tasks.

A ratio is that of two means, not the mean of ratios: a small denominator of one task
then decides nothing, and the ratio of differences such as `recovery` exists at all. Its
standard error is that of the jackknife over the paired units (Efron and Stein 1981):
with q_i the ratio without unit i, ((n - 1) / n sum (q_i - mean q)^2)^(1/2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from ntk.measures import Array, as_array

__all__ = [
    "Ratio",
    "RatioSummary",
    "ratio_of_means",
    "ratio_over_seeds",
    "recovery",
]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two means.

    Attributes:
        estimate: The ratio; NaN if the mean of the denominators is 0.
        standard_error: By the jackknife; NaN for one unit.
        units: Number of paired units, such as tasks.
    """

    estimate: float
    standard_error: float
    units: int


@dataclass(frozen=True)
class RatioSummary:
    """Kernel score divided by fine-tuning score, over seeds.

    Attributes:
        mean: Mean kernel score divided by mean fine-tuning score.
        standard_error: Standard error by the jackknife over seeds.
        low: Lower end of the t interval of the ratio.
        high: Upper end of the t interval of the ratio.
        level: Coverage of the interval.
        threshold: Ratio to reach.
        reached: Whether the ratio is at least the threshold.
        p_value: One-sided paired t-test of the null hypothesis that the expected kernel
            score is at most the threshold times that of fine-tuning.
        seeds: Number of pairs.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    level: float
    threshold: float
    reached: bool
    p_value: float
    seeds: int


def ratio_of_means(numerators: ArrayLike, denominators: ArrayLike) -> Ratio:
    """Return the ratio of two means over paired units.

    Args:
        numerators: ``(n,)``, one per unit, at least 1.
        denominators: ``(n,)`` of the same units.

    Returns:
        The ratio.

    Raises:
        ValueError: If the numbers are not pairs.

    Example:
        >>> ratio_of_means([1.0, 3.0], [2.0, 2.0]).estimate
        1.0
    """
    ours, theirs = _pairs(numerators, denominators, 1)
    n = len(ours)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.divide(ours.sum(), theirs.sum())
        without = (ours.sum() - ours) / (theirs.sum() - theirs)
        spread = np.square(without - without.mean()).sum()
    error = math.sqrt((n - 1) / n * spread) if np.isfinite(spread) else math.nan
    found = float(estimate) if np.isfinite(estimate) else math.nan
    return Ratio(found, error if n > 1 else math.nan, n)


def recovery(start: ArrayLike, kernel: ArrayLike, tuned: ArrayLike) -> Ratio:
    """Return the share of fine-tuning's gain that the kernel has, over tasks.

    The mean of kernel - start divided by the mean of tuned - start. The score of the
    untouched model, with its fitted head, is most of the score of fine-tuning, so that
    the plain ratio of kernel to fine-tuning is near one for whatever classifier; of the
    gain the untouched model has 0.

    Args:
        start: ``(n,)`` scores of the model before training, one per task.
        kernel: ``(n,)`` scores of the kernel classifier.
        tuned: ``(n,)`` scores after fine-tuning.

    Returns:
        The ratio, with its jackknife over tasks.

    Raises:
        ValueError: If the scores are not of the same tasks.

    Example:
        >>> recovery([0.5, 0.5], [0.6, 0.75], [0.7, 0.75]).estimate
        0.7777777777777778
    """
    base = as_array(start, "start")
    gains = [
        _pairs(scores, base, 1)[0] - base
        for scores in (as_array(kernel, "kernel"), as_array(tuned, "tuned"))
    ]
    return ratio_of_means(*gains)


def ratio_over_seeds(
    kernel: Sequence[float],
    tuned: Sequence[float],
    *,
    threshold: float = 0.9,
    level: float = 0.95,
) -> RatioSummary:
    """Return mean kernel score / mean fine-tuning score over seeds.

    A kernel "solves" a task if it reaches 90 % of the fine-tuning score (Malladi et al.
    2023). Scores are paired by seed, since both learn from the same split. Interval and
    test have seeds - 1 degrees of freedom: a handful of seeds is too few to resample.

    Args:
        kernel: One score per seed, at least 2.
        tuned: Fine-tuning scores of the same seeds, above 0.
        threshold: Ratio to reach.
        level: Coverage of the interval, in (0, 1).

    Returns:
        The ratio.

    Raises:
        ValueError: If the scores are not pairs, or a fine-tuning score is not above 0.

    Example:
        >>> round(ratio_over_seeds([0.72, 0.76], [0.8, 0.8]).mean, 3)
        0.925
    """
    ours, theirs = _pairs(kernel, tuned, 2)
    if not (theirs > 0).all():
        raise ValueError(
            f"`tuned` has the score {theirs.min():.3g}; expected scores above 0, else "
            "a ratio says nothing. Compare differences instead."
        )
    if not 0 < level < 1:
        raise ValueError(f"`level={level}`; expected a coverage in (0, 1), like 0.95.")
    result = ratio_of_means(ours, theirs)
    ratio, error = result.estimate, result.standard_error
    ratios = ours / theirs
    if (ratios == ratios[0]).all():
        ratio, error = float(ratios[0]), 0.0
    t = scipy.stats.t(len(ours) - 1)
    half = float(t.ppf((1 + level) / 2)) * error
    above = ours - threshold * theirs
    deviation = float(scipy.stats.sem(above))
    # SciPy's t-test has no value without a spread; equal ratios leave no doubt.
    if error and deviation:
        p_value = float(t.sf(above.mean() / deviation))
    else:
        p_value = float(ratio <= threshold)
    return RatioSummary(
        mean=ratio,
        standard_error=error,
        low=ratio - half,
        high=ratio + half,
        level=level,
        threshold=threshold,
        reached=ratio >= threshold,
        p_value=p_value,
        seeds=result.units,
    )


def _pairs(kernel: ArrayLike, tuned: ArrayLike, least: int) -> tuple[Array, Array]:
    ours, theirs = as_array(kernel, "kernel"), as_array(tuned, "tuned")
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < least:
        raise ValueError(
            f"`kernel` has shape {ours.shape} and `tuned` {theirs.shape}; expected one "
            f"score of each per unit, at least {least} of them."
        )
    return ours, theirs
