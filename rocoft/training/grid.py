"""Grids of learning rates: which rate is the best, and whether it is at an end.

The best rate has the highest score on dev. Of several with that score, one inside the
grid comes before one at its ends, then the first. The best is at an end of the grid if
it is the lowest or highest rate and no rate inside scores as high: then a rate beyond
the end may be better. A rate at which training diverged is part of the grid and worse
than all others, so that a rate beside it is inside. One rate is no grid and has no end.
"""

import math
from collections.abc import Mapping
from typing import Literal

End = Literal["lowest", "highest"]
"""The end of a grid at which its best rate is."""

Scores = Mapping[float, float | None]
"""Scores on dev by learning rate, in the order of the trainings; None if diverged."""

EXTENSIONS = 3
"""Rates that are added to a grid beyond each of its ends, at most."""

DIGITS = 3
"""Significant digits of an added rate."""


def best_rate(scores: Scores) -> float | None:
    """Return the best rate, see above; None if every training diverged.

    Args:
        scores: Scores by rate.

    Example:
        >>> best_rate({1e-3: 0.8, 3e-3: 0.8, 1e-2: 0.7})
        0.003
    """
    known = {rate: score for rate, score in scores.items() if score is not None}
    if not known:
        return None
    highest = max(known.values())
    best = [rate for rate, score in known.items() if score == highest]
    ends = {min(scores), max(scores)}
    return next((rate for rate in best if rate not in ends), best[0])


def grid_end(scores: Scores) -> End | None:
    """Return the end of the grid at which the best rate is; None if it is inside.

    Args:
        scores: Scores by rate.

    Example:
        >>> grid_end({1e-3: 0.8, 3e-3: 0.7, 1e-2: 0.6})
        'lowest'
        >>> grid_end({1e-3: 0.8, 3e-3: 0.8, 1e-2: 0.6}) is None
        True
    """
    best = best_rate(scores)
    if best is None or len(scores) < 2 or min(scores) < best < max(scores):
        return None
    return "lowest" if best == min(scores) else "highest"


def next_rate(scores: Scores, end: End) -> float | None:
    """Return the rate beyond an end of the grid, by the ratio of its last two rates.

    Args:
        scores: Scores by rate, at least two.
        end: The end.

    Returns:
        The rate; None where rates have no ratio because one of them is 0.

    Example:
        >>> next_rate({1e-3: 0.8, 3e-3: 0.7, 1e-2: 0.6}, "lowest")
        0.000333
    """
    first, second = sorted(scores, reverse=end == "highest")[:2]
    if not first * second > 0:
        return None
    beyond = float(f"{first * first / second:.{DIGITS}g}")
    return beyond if 0 < beyond < math.inf and beyond not in scores else None
