"""Sets of layers to tune: those that rules choose, and some of every size.

A set is written as the method that tunes it: for the space ``lora:8``,
``lora:8/layers=0,3`` for two layers, ``lora:8`` for all and ``head`` for none.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice

import numpy as np

from ntk.layer_selection import (
    Budget,
    LayerOrder,
    first_layers,
    gradient_norm,
    kernel_alignment,
    last_layers,
    least_growth,
    random_layers,
    target_aware,
)
from ntk.studies.layers.records import HEAD, LayerKernels
from rocoft.models import SelectionError
from rocoft.training import parse_method

TARGET_AWARE = "target-aware"
RANDOM = "random"
BASELINES = ("least growth", "gradient norm", "kernel alignment", "first", "last")
"""Rules that the target-aware one is compared with, besides random selection."""
Subset = tuple[str, ...]
"""Names of layers in order."""


@dataclass(frozen=True)
class Choice:
    """The settings of the rules that choose layers.

    Attributes:
        space: The space whose layers are chosen.
        budget: Budget of the chosen layers.
        epsilon: The ridge in units of the mean eigenvalue.
        draws: Number of random selections, with seeds from 0.
    """

    space: str
    budget: Budget
    epsilon: float = 1e-3
    draws: int = 3

    def __call__(self, kernels: LayerKernels) -> dict[str, LayerOrder]:
        """Return the choice of each rule on a split.

        Args:
            kernels: The kernels of the layers.

        Returns:
            The orders by rule; random ones are called "random 0", "random 1", ...
        """
        layers, base, honest = kernels.layers, kernels.base, kernels.honest
        unseen, r = honest.layers, honest.residual
        budget, epsilon = self.budget, self.epsilon
        orders = [
            target_aware(unseen, r, budget=budget, base=honest.base, epsilon=epsilon),
            least_growth(layers, budget=budget, base=base, epsilon=epsilon),
            gradient_norm(unseen, r, budget=budget),
            kernel_alignment(unseen, r, budget=budget),
            first_layers(layers, budget=budget),
            last_layers(layers, budget=budget),
            *(random_layers(layers, seed=s, budget=budget) for s in range(self.draws)),
        ]
        return {order.rule: order for order in orders}


def subset(order: LayerOrder) -> Subset:
    """Return the set of layers that a rule chose.

    Args:
        order: The layers in the order in which the rule chose them.
    """
    return tuple(sorted(order.layers, key=int))


def spread_subsets(layers: Sequence[str], count: int) -> list[Subset]:
    """Return distinct sets of layers of all sizes and depths.

    At most half of them are single layers, evenly spaced; one is all layers. The
    others cycle through the sizes in between: first or last layers in turn, then
    random ones. The sets for a smaller count are not a prefix of those for a larger.

    Args:
        layers: Names of all layers in order.
        count: Number of sets.

    Returns:
        The sets.

    Raises:
        SelectionError: If there are fewer sets than ``count``.
    """
    depth = len(layers)
    if not 0 < count < 2**depth:
        raise SelectionError(
            f"--subsets {count} must be from 1 to {2**depth - 1}, the number of sets "
            f"of {depth} layers."
        )
    singles = min(depth, max(1, count // 2))
    places = np.linspace(0, depth - 1, singles).round().astype(int)
    distinct = dict.fromkeys(
        chain(((layers[i],) for i in places), [tuple(layers)], _rounds(layers, count))
    )
    return list(distinct)[:count]


def _rounds(layers: Sequence[str], count: int) -> Iterator[Subset]:
    sizes = range(2, len(layers))
    for turn in (0, 1):
        for size in sizes:
            nested = layers[:size] if (size + turn) % 2 == 0 else layers[-size:]
            yield tuple(nested)
    generator = np.random.default_rng(0)
    for _ in range(count):
        for size in sizes:
            chosen = sorted(generator.choice(len(layers), size, replace=False))
            yield tuple(layers[i] for i in chosen)
    # With few layers random draws may miss some sets: enumerate them.
    for size in (1, *sizes):
        yield from islice(combinations(layers, size), count)


def method_of(chosen: Collection[str], space: str, layers: Collection[str]) -> str:
    """Return the method that tunes some layers.

    Args:
        chosen: Names of the layers to tune.
        space: The method that tunes all layers.
        layers: Names of all layers.

    Returns:
        The method in the notation of `rocoft.training.methods.parse_method`.
    """
    if not chosen:
        return HEAD
    method = parse_method(space)
    if set(chosen) == set(layers):
        return str(method)
    return str(replace(method, blocks=tuple(sorted(map(int, chosen)))))


def layers_of(method: str, space: str, layers: Sequence[str]) -> Subset:
    """Return the layers that a method tunes, the inverse of `method_of`.

    Args:
        method: A method of `method_of`.
        space: The method that tunes all layers.
        layers: Names of all layers.
    """
    if method == HEAD:
        return ()
    if method == str(parse_method(space)):
        return tuple(layers)
    return tuple(map(str, parse_method(method).blocks))


def check_method(space: str) -> None:
    """Check that the layers of a space can be fine-tuned.

    Args:
        space: Space in the notation of `ntk.spaces.notation.parse_space`.

    Raises:
        SelectionError: If no method trains single layers of it.
    """
    try:
        method = str(replace(parse_method(space), blocks=(0,)))
    except SelectionError as error:
        method, reason = "", str(error)
    else:
        reason = f"method {space!r} trains no single layers."
    if "/layers=0" not in method:
        raise SelectionError(
            f"--space {space} can be ranked but not fine-tuned: {reason} Leave "
            "--verify and --subsets out, or give a space such as lora:8 or rows:3."
        )
