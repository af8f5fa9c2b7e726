"""How well a predictor ranks sets of layers, and the ceiling set by noise.

Predictors and scores are ``(m, s)``, for m sets of layers on s splits. They are
compared by Spearman's correlation of their means over splits. Its uncertainty comes
from the choice of sets and from the noise of splits; the bootstrap resamples both.

Larger sets tend to score higher, so any measure that grows with the number of layers
correlates with the score. The partial rank correlation, given the size of the sets,
shows what a measure predicts beyond size.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from ntk.measures import Array

DRAWS = 2000
LEVEL = 0.95
ROUNDING = 1e-9
FEWEST = 4
"""Smallest number of sets for which a rank correlation is reported."""


@dataclass(frozen=True)
class Noise:
    """Whether the scores of sets differ by more than the noise of splits.

    Attributes:
        halves: Rank correlation between the means of two halves of the splits, averaged
            over all halvings; None for one split.
        ceiling: Correlation of the means of all splits with those of infinitely many,
            an upper limit for predictors; None unless ``halves`` is positive.
        p: p-value of Friedman's test that all sets are equally good; None for one
            split.
        concordance: Kendall's W of the splits' rankings, from 0 to 1.
    """

    halves: float | None
    ceiling: float | None
    p: float | None
    concordance: float | None


def rank_correlation(
    predictor: Array, scores: Array, beyond: Array | None = None
) -> float | None:
    """Return Spearman's correlation of the means over splits.

    Args:
        predictor: ``(m, s)`` predictor.
        scores: ``(m, s)`` scores.
        beyond: ``(m, s)`` control variable of the partial correlation; None for the
            plain one.

    Returns:
        The correlation; None if undefined or for fewer than `FEWEST` sets.
    """
    if len(predictor) < FEWEST:
        return None
    given = [predictor, scores, *([] if beyond is None else [beyond])]
    (rho,) = _correlation(*(each.mean(axis=1)[None] for each in given))
    return None if np.isnan(rho) else float(rho)


def bootstrap(
    predictor: Array, scores: Array, beyond: Array | None = None, seed: int = 0
) -> Array:
    """Return rank correlations of resampled sets and splits.

    Args:
        predictor: ``(m, s)`` predictor.
        scores: ``(m, s)`` scores on the same splits.
        beyond: ``(m, s)`` control variable of the partial correlation, or None.
        seed: Seed of the draws.

    Returns:
        ``(DRAWS,)`` correlations, NaN where undefined.
    """
    m, s = scores.shape
    generator = np.random.default_rng(seed)
    sets = generator.integers(m, size=(DRAWS, m))
    splits = generator.integers(s, size=(DRAWS, s))
    drawn = sets[:, :, None], splits[:, None, :]
    given = [predictor, scores, *([] if beyond is None else [beyond])]
    return _correlation(*(each[drawn].mean(axis=2) for each in given))


def interval(draws: Array) -> tuple[float, float] | None:
    """Return the percentile interval of bootstrap draws.

    Args:
        draws: Bootstrap draws, NaN where undefined.

    Returns:
        The ends of the interval; None if most draws are undefined.
    """
    known = draws[~np.isnan(draws)]
    if len(known) < len(draws) / 2:
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def noise(scores: Array) -> Noise:
    """Compare the differences between sets with the noise of splits.

    Args:
        scores: ``(m, s)`` scores of m sets on s splits.

    Returns:
        Measures of noise; all None for one split or fewer than `FEWEST` sets.
    """
    m, s = scores.shape
    if s < 2 or m < FEWEST:
        return Noise(None, None, None, None)
    size = s // 2
    rhos = []
    for half in combinations(range(s), size):
        others = [i for i in range(s) if i not in half]
        first, second = scores[:, list(half)], scores[:, others]
        (rho,) = _correlation(first.mean(axis=1)[None], second.mean(axis=1)[None])
        rhos.append(rho)
    halves = float(np.nanmean(rhos)) if np.isfinite(rhos).any() else None
    ceiling = None
    if halves is not None and halves > 0:
        ceiling = reliability(halves, size, s - size) ** 0.5
    if np.all(scores == scores[:1]):
        return Noise(halves, ceiling, 1.0, 0.0)
    test = stats.friedmanchisquare(*scores)
    w = float(test.statistic) / (s * (m - 1))
    return Noise(halves, ceiling, float(test.pvalue), w)


def reliability(halves: float, first: int, second: int) -> float:
    """Return the share of the variance of the means over all splits that is not noise.

    Let v be the noise variance of a split relative to the variance of the sets. Means
    of a and of b splits correlate by ((1 + v / a) (1 + v / b))^-1/2, and means of
    a + b splits have the reliability 1 / (1 + v / (a + b)). For a = b this is the
    Spearman-Brown formula.

    Args:
        halves: Correlation of the means of a and of b splits, above 0.
        first: Number of splits a.
        second: Number of splits b.

    Returns:
        The reliability.
    """
    together = first + second
    inside = together**2 - 4 * first * second * (1 - halves**-2)
    v = max((inside**0.5 - together) / 2, 0.0)
    return 1 / (1 + v / together)


def _correlation(first: Array, second: Array, beyond: Array | None = None) -> Array:
    """Return the rank correlation of each row; partial if ``beyond`` is given.

    It is NaN where a row is constant or has the ranks of ``beyond``.
    """
    a, b = _unit_ranks(first), _unit_ranks(second)
    if beyond is not None:
        c = _unit_ranks(beyond)
        a, b = (_unit(e - (e * c).sum(axis=1, keepdims=True) * c) for e in (a, b))
    return np.asarray((a * b).sum(axis=1))


def _unit_ranks(values: Array) -> Array:
    # Means over splits that are equal may differ by rounding; they are ties.
    scale = np.abs(values).max(axis=1, keepdims=True, initial=np.finfo(float).tiny)
    ranks = stats.rankdata(np.round(values / scale / ROUNDING), axis=1)
    return _unit(ranks - ranks.mean(axis=1, keepdims=True))


def _unit(rows: Array) -> Array:
    """Return rows normalised to 1, NaN for those that are zero up to rounding."""
    norms = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    unit = np.full(rows.shape, np.nan)
    return np.divide(rows, norms, out=unit, where=norms > ROUNDING)
