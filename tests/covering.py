"""Few combinations of many values: what a full product tests, for less time."""

from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any


def pairs(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which any two values of two axes meet at least once.

    Mistakes that only three values together bring out are left to the full product.
    """
    several = [tuple(axis) for axis in axes]
    cases = list(product(*(range(len(axis)) for axis in several)))
    left = {pair for case in cases for pair in _pairs(case)}
    found = []
    while left:
        best = max(cases, key=lambda case: len(left.intersection(_pairs(case))))
        left.difference_update(_pairs(best))
        found.append(tuple(axis[i] for axis, i in zip(several, best, strict=True)))
    return found


def _pairs(case: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    return combinations(enumerate(case), 2)
