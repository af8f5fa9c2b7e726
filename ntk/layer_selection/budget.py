"""A budget for layers, and the search for the best layers within it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from ntk.kernels import LayerKernel
from ntk.measures import Array
from rocoft.models import SelectionError

__all__ = ["UNLIMITED", "Budget", "LayerOrder", "by_score", "exchange", "greedy"]

TIE = 1e-9
"""Relative difference up to which scores count as equal."""
EXCHANGES = 10_000
"""Maximum number of exchanges of two layers to try; 14 of 28 layers have fewer."""

Scores = Callable[[Sequence[str], Sequence[str]], Array]
"""Function of the chosen layers and the candidates: the candidates' scores."""
Loss = Callable[[Sequence[str]], float]
"""Function of a set of layers, to be minimised."""


@dataclass(frozen=True)
class Budget:
    """The most that the chosen layers may cost together.

    Attributes:
        parameters: Maximum number of trained parameters; None for no limit.
        layers: Maximum number of layers; None for no limit.
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
        """Return whether so many parameters and layers are within the budget."""
        return (self.parameters is None or parameters <= self.parameters) and (
            self.layers is None or layers <= self.layers
        )


UNLIMITED = Budget()


@dataclass(frozen=True)
class LayerOrder:
    """The layers that a rule chose, in order.

    Attributes:
        rule: Name of the rule.
        layers: Names in the order of choice: each is the best by the rule among those
            that fit into the rest of the budget.
        scores: Score of each layer when it was chosen, defined by the rule.
        parameters: Number of parameters of all layers together.
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
    """Choose the best layer that fits, until none fits.

    Args:
        rule: Name of the rule.
        layers: Kernels by layer.
        budget: The most that the layers may cost.
        scores: Function that scores candidates given the chosen layers.
        least: Whether the smallest score is the best.
        begun: Layers chosen before the search.

    Returns:
        The order of the newly chosen layers; `parameters` counts all.

    Raises:
        SelectionError: If no layer fits.
    """
    chosen, best_scores = list(begun), []
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
        best_scores.append(float(values[best]))
        spent += layers[candidates[best]].parameters
    if not chosen:
        smallest = min(layer.parameters for layer in layers.values())
        raise SelectionError(
            f"{budget} has room for none of {len(layers)} layers; the smallest has "
            f"{smallest} parameters. Raise the budget, or choose a smaller space."
        )
    return LayerOrder(rule, tuple(chosen[len(begun) :]), tuple(best_scores), spent)


def by_score(
    rule: str,
    layers: Mapping[str, LayerKernel],
    budget: Budget,
    scores: Iterable[float],
) -> LayerOrder:
    """Choose by scores that do not depend on the other chosen layers.

    Args:
        rule: Name of the rule.
        layers: Kernels by layer.
        budget: The most that the layers may cost.
        scores: One score per layer, in the order of `layers`.

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
    """Exchange one or two layers for as many others so that a loss falls the most.

    Two at once are tried if no single exchange helps and there are at most `EXCHANGES`
    ways: that finds layers that help only together.

    Args:
        chosen: Layers within the budget.
        layers: Kernels by layer.
        budget: The most that the layers may cost.
        loss: Function of a set of layers, at least 0.

    Returns:
        The better set, or None if no exchange lowers the loss by more than rounding.
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
