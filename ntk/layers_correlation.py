"""How well a predictor ranks sets of layers, and how well anything could.

Predictors and scores are ``(m, s)``, of m sets of layers on s splits. They are compared
by the rank correlation of their means over splits (Spearman). Its uncertainty has two
sources, which sets were tuned and the noise of splits; the bootstrap draws both anew.

More layers learn more, so most measures that grow with the layers go with the score.
What a measure tells beyond that is the partial correlation, of what is left of the
ranks of both once they are regressed on those of a third: the size of the sets.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from ntk.spectrum import Array

DRAWS = 2000
LEVEL = 0.95
ROUNDING = 1e-9
FEWEST = 4
"""Sets of layers that a rank correlation is worth saying for."""


@dataclass(frozen=True)
class Noise:
    """How far the scores of sets differ by more than the noise of splits.

    Attributes:
        halves: Rank correlation between the means of two halves of the splits, mean
            over all ways to part them; None of one split.
        ceiling: Correlation of the means of all splits with the means of infinitely
            many, which no predictor exceeds but by chance; None where halves do not
            agree at all.
        p: Of Friedman's test that all sets are equally good; None of one split.
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
        predictor: ``(m, s)``.
        scores: ``(m, s)``.
        beyond: ``(m, s)``, what the partial correlation is beyond; None for the plain
            one.

    Returns:
        It, None where it is not defined or there are fewer than `FEWEST` sets.
    """
    if len(predictor) < FEWEST:
        return None
    given = [predictor, scores, *([] if beyond is None else [beyond])]
    (found,) = _correlation(*(each.mean(axis=1)[None] for each in given))
    return None if np.isnan(found) else float(found)


def bootstrap(
    predictor: Array, scores: Array, beyond: Array | None = None, seed: int = 0
) -> Array:
    """Return rank correlations of sets and splits that are drawn with replacement.

    Args:
        predictor: ``(m, s)``.
        scores: ``(m, s)``, of the same splits.
        beyond: As in `rank_correlation`.
        seed: Of the draws.

    Returns:
        ``(DRAWS,)``, NaN where it is not defined.
    """
    m, s = scores.shape
    generator = np.random.default_rng(seed)
    sets = generator.integers(m, size=(DRAWS, m))
    splits = generator.integers(s, size=(DRAWS, s))
    drawn = sets[:, :, None], splits[:, None, :]
    given = [predictor, scores, *([] if beyond is None else [beyond])]
    return _correlation(*(each[drawn].mean(axis=2) for each in given))


def interval(draws: Array) -> tuple[float, float] | None:
    """Return the percentile interval of bootstrapped numbers.

    Args:
        draws: Numbers, NaN where one is not defined.

    Returns:
        Its ends; None where most are not defined.
    """
    known = draws[~np.isnan(draws)]
    if len(known) < len(draws) / 2:
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def noise(scores: Array) -> Noise:
    """Return how the scores of sets compare with the noise of splits.

    Args:
        scores: ``(m, s)``, of at least `FEWEST` sets.

    Returns:
        What is known of the noise.
    """
    m, s = scores.shape
    if s < 2 or m < FEWEST:
        return Noise(None, None, None, None)
    size = s // 2
    found = []
    for half in combinations(range(s), size):
        others = [i for i in range(s) if i not in half]
        first, second = scores[:, list(half)], scores[:, others]
        (r,) = _correlation(first.mean(axis=1)[None], second.mean(axis=1)[None])
        found.append(r)
    halves = float(np.nanmean(found)) if np.isfinite(found).any() else None
    ceiling = None
    if halves is not None and halves > 0:
        ceiling = reliability(halves, size, s - size) ** 0.5
    if np.all(scores == scores[:1]):
        return Noise(halves, ceiling, 1.0, 0.0)
    test = stats.friedmanchisquare(*scores)
    w = float(test.statistic) / (s * (m - 1))
    return Noise(halves, ceiling, float(test.pvalue), w)


def reliability(halves: float, first: int, second: int) -> float:
    """Return the share of variance of all splits' means that is not noise.

    With v the variance of a split's noise over that of the sets, means of a and of b
    splits correlate by ((1 + v / a) (1 + v / b))^-1/2, and those of a + b have the
    reliability 1 / (1 + v / (a + b)). For a = b it is the formula of Spearman and
    Brown.

    Args:
        halves: The correlation of the means of a and of b splits, above 0.
        first: a.
        second: b.

    Returns:
        The reliability.
    """
    together = first + second
    inside = together**2 - 4 * first * second * (1 - halves**-2)
    v = max((inside**0.5 - together) / 2, 0.0)
    return 1 / (1 + v / together)


def _correlation(first: Array, second: Array, beyond: Array | None = None) -> Array:
    """Return the rank correlation of the rows of matrices, partial if there are three.

    It is NaN where one of them is constant, or is ranked as what it shall be beyond.
    """
    a, b = _unit_ranks(first), _unit_ranks(second)
    if beyond is not None:
        c = _unit_ranks(beyond)
        a, b = (_unit(e - (e * c).sum(axis=1, keepdims=True) * c) for e in (a, b))
    return np.asarray((a * b).sum(axis=1))


def _unit_ranks(values: Array) -> Array:
    ranks = stats.rankdata(values, axis=1)
    return _unit(ranks - ranks.mean(axis=1, keepdims=True))


def _unit(rows: Array) -> Array:
    """Return rows of norm 1, NaN for those that are zero but for rounding."""
    norms = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    whole = np.full(rows.shape, np.nan)
    return np.divide(rows, norms, out=whole, where=norms > ROUNDING)
