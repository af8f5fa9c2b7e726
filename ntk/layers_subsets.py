"""Sets of layers to tune: those that the rules choose, and some of every size.

A set is written as the method that tunes it: ``lora:8/layers=0,3`` of the space
``lora:8``, the space itself for all of its layers, and ``head`` for none.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice

import numpy as np

from ntk.layer_budget import Budget, LayerOrder
from ntk.layer_selection import (
    first_layers,
    gradient_norm,
    kernel_alignment,
    last_layers,
    least_growth,
    random_layers,
    target_aware,
)
from ntk.layers_records import HEAD, Split
from rocoft.architecture import SelectionError
from rocoft.methods import parse_method

TARGET_AWARE = "target-aware"
RANDOM = "random"
BASELINES = ("least growth", "gradient norm", "kernel alignment", "first", "last")
"""Rules that the target-aware one is compared with, beside random draws."""
Subset = tuple[str, ...]
"""Names of layers in their order."""


@dataclass(frozen=True)
class Choice:
    """What the rules shall choose by.

    Attributes:
        space: Whose layers.
        budget: What the chosen ones may cost.
        epsilon: The ridge in units of the mean eigenvalue.
        draws: Random choices, of seeds from 0.
    """

    space: str
    budget: Budget
    epsilon: float = 1e-3
    draws: int = 3

    def __call__(self, split: Split) -> dict[str, LayerOrder]:
        """Return what each rule chooses on a split.

        Args:
            split: The layers.

        Returns:
            The orders by rule; random ones are called "random 0", "random 1", ...
        """
        layers, r, base = split.layers, split.residual, split.base
        budget, epsilon = self.budget, self.epsilon
        orders = [
            target_aware(layers, r, budget=budget, base=base, epsilon=epsilon),
            least_growth(layers, budget=budget, base=base, epsilon=epsilon),
            gradient_norm(layers, r, budget=budget),
            kernel_alignment(layers, r, budget=budget),
            first_layers(layers, budget=budget),
            last_layers(layers, budget=budget),
            *(random_layers(layers, seed=s, budget=budget) for s in range(self.draws)),
        ]
        return {order.rule: order for order in orders}


def subset(order: LayerOrder) -> Subset:
    """Return the set of layers that a rule chose.

    Args:
        order: Of the rule.
    """
    return tuple(sorted(order.layers, key=int))


def spread_subsets(layers: Sequence[str], count: int) -> list[Subset]:
    """Return different sets of layers, of all sizes and at all depths.

    At most half of them are single layers, evenly spaced; one is all layers. The
    others come in rounds over the sizes between: the first or the last layers in turn,
    then random ones.

    Args:
        layers: Names, from the first.
        count: How many sets.

    Returns:
        The sets; the first of more sets are those of fewer only in part.

    Raises:
        SelectionError: If there are not so many.
    """
    depth = len(layers)
    if not 0 < count < 2**depth:
        raise SelectionError(
            f"--subsets {count} must be from 1 to {2**depth - 1}, the number of sets "
            f"of {depth} layers."
        )
    singles = min(depth, max(1, count // 2))
    places = np.linspace(0, depth - 1, singles).round().astype(int)
    found = dict.fromkeys(
        chain(((layers[i],) for i in places), [tuple(layers)], _rounds(layers, count))
    )
    return list(found)[:count]


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
    # Of few sets the last ones are found by no draw.
    for size in (1, *sizes):
        yield from islice(combinations(layers, size), count)


def method_of(chosen: Collection[str], space: str, layers: Collection[str]) -> str:
    """Return the method that tunes some layers.

    Args:
        chosen: Their names.
        space: Of all layers.
        layers: All of them.

    Returns:
        As `rocoft.methods.parse_method` reads it.
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
        method: As `method_of` writes it.
        space: Of all layers.
        layers: All of them.
    """
    if method == HEAD:
        return ()
    if method == str(parse_method(space)):
        return tuple(layers)
    return tuple(map(str, parse_method(method).blocks))


def check_method(space: str) -> None:
    """See that the layers of a space can be fine-tuned.

    Args:
        space: As `ntk.notation.parse_space` reads it.

    Raises:
        SelectionError: If no method trains them.
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
