"""What layers may cost together, and the search for the best ones within it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from ntk.layerwise import LayerKernel
from ntk.spectrum import Array
from rocoft.architecture import SelectionError

__all__ = ["UNLIMITED", "Budget", "LayerOrder", "by_score", "exchange", "greedy"]

TIE = 1e-9
"""Scores that differ by less, relative to the best, are equal up to rounding."""
EXCHANGES = 10_000
"""Most ways to exchange two layers at once: choosing half of 28 layers has fewer."""

Scores = Callable[[Sequence[str], Sequence[str]], Array]
"""From the layers chosen already and the candidates to the candidates' scores."""
Loss = Callable[[Sequence[str]], float]
"""From a set of layers to what it leaves undone."""


@dataclass(frozen=True)
class Budget:
    """The most that layers may be, together.

    Attributes:
        parameters: Trained parameters; None for no limit.
        layers: Number of layers; None for no limit.
    """

    parameters: int | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "layers"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise SelectionError(
                    f"{name}={limit} must be at least 1, or None for no limit."
                )

    def fits(self, parameters: int, layers: int) -> bool:
        """Return whether so much is within it."""
        return (self.parameters is None or parameters <= self.parameters) and (
            self.layers is None or layers <= self.layers
        )


UNLIMITED = Budget()


@dataclass(frozen=True)
class LayerOrder:
    """Layers to tune, as one rule chose them.

    Attributes:
        rule: Its name.
        layers: The names, as they were chosen: each is the best by the rule of those
            that the rest of the budget has room for.
        scores: Of each when it was chosen, as the rule says.
        parameters: Of all together.
    """

    rule: str
    layers: tuple[str, ...]
    scores: tuple[float, ...]
    parameters: int


def greedy(
    rule: str,
    layers: Mapping[str, LayerKernel],
    budget: Budget,
    scores: Scores,
    *,
    least: bool = False,
    begun: Sequence[str] = (),
) -> LayerOrder:
    """Choose the best layer of those that fit, until none does.

    Args:
        rule: What the order is called.
        layers: Kernels by layer.
        budget: What they may cost.
        scores: Of candidates, beside what is chosen.
        least: Whether the least score is the best.
        begun: Layers that are chosen already; their scores are not asked for.

    Returns:
        The order, of layers that were not begun with alone.

    Raises:
        SelectionError: If there is room for no layer at all.
    """
    chosen, found = list(begun), []
    spent = sum(layers[name].parameters for name in begun)
    while candidates := [
        name
        for name, layer in layers.items()
        if name not in chosen and budget.fits(spent + layer.parameters, len(chosen) + 1)
    ]:
        values = scores(chosen, candidates)
        signed = -values if least else values
        best = int(np.argmax(signed >= signed.max() - TIE * abs(signed.max())))
        chosen.append(candidates[best])
        found.append(float(values[best]))
        spent += layers[candidates[best]].parameters
    if not chosen:
        smallest = min(layer.parameters for layer in layers.values())
        raise SelectionError(
            f"{budget} has room for none of {len(layers)} layers; the smallest has "
            f"{smallest} parameters. Raise the budget, or choose a smaller space."
        )
    return LayerOrder(rule, tuple(chosen[len(begun) :]), tuple(found), spent)


def by_score(
    rule: str,
    layers: Mapping[str, LayerKernel],
    budget: Budget,
    scores: Iterable[float],
) -> LayerOrder:
    """Choose by scores that do not depend on what else is chosen.

    Args:
        rule: What the order is called.
        layers: Kernels by layer.
        budget: What they may cost.
        scores: Of the layers, in their order.

    Returns:
        The order, by descending score.
    """
    fixed = dict(zip(layers, map(float, scores), strict=True))
    pick: Scores = lambda chosen, candidates: np.array([fixed[n] for n in candidates])
    return greedy(rule, layers, budget, pick)


def exchange(
    chosen: Sequence[str],
    layers: Mapping[str, LayerKernel],
    budget: Budget,
    loss: Loss,
) -> tuple[str, ...] | None:
    """Give up one or two layers for as many others, those that lower a loss the most.

    Two at once are tried where no single one helps and there are at most `EXCHANGES`
    ways: they find layers that are of use only together.

    Args:
        chosen: Layers, within the budget.
        layers: Kernels by layer.
        budget: What they may cost.
        loss: Of a set of layers, at least 0.

    Returns:
        The better set, None where no exchange lowers the loss by more than rounding.
    """
    others = [name for name in layers if name not in chosen]
    cost = lambda names: sum(layers[name].parameters for name in names)
    now = loss(chosen)
    for count in (1, 2):
        ways = comb(len(chosen), count) * comb(len(others), count)
        if ways == 0 or (count > 1 and ways > EXCHANGES):
            break
        swaps = [
            (*kept, *taken)
            for kept in combinations(chosen, len(chosen) - count)
            for taken in combinations(others, count)
            if budget.fits(cost((*kept, *taken)), len(chosen))
        ]
        losses = np.array([loss(each) for each in swaps])
        if swaps and losses.min() < now * (1 - TIE):
            return swaps[int(np.argmax(losses <= losses.min() * (1 + TIE)))]
    return None
