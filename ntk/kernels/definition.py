"""Kernels by their definition: plain autograd, one example and output at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ntk.gradients import (
    Batch,
    Key,
    NetworkFunction,
    batch_length,
    coordinate_rows,
    map_keys,
    take,
)
from ntk.kernels.contraction import Contraction
from ntk.spaces import Map, Maps


def defined_kernels(
    function: NetworkFunction,
    left: Sequence[Batch],
    right: Sequence[Batch],
    spaces: Mapping[str, Maps],
    contraction: Contraction,
) -> dict[str, Tensor]:
    """Return kernels of a few examples, from gradients of one example at a time.

    Takes the memory of the gradients of all right examples and of one left one.

    Args:
        function: The model and its readout, in evaluation mode.
        left: n examples.
        right: m examples.
        spaces: The resolved tangent spaces by name.
        contraction: How gradients are contracted.

    Returns:
        For each space ``(n, m, c, c)`` in float64, or ``(n, m)`` if not coupled.
    """
    union: dict[str, tuple[Map, ...]] = {}
    for maps in spaces.values():
        for name, group in maps.items():
            union[name] = tuple(dict.fromkeys((*union.get(name, ()), *group)))
    theirs = [coordinate_rows(function, one, union) for one in _singles(right)]
    entries: dict[str, list[list[list[list[float]]]]] = {name: [] for name in spaces}
    for one in _singles(left):
        ours = coordinate_rows(function, one, union)
        for space, maps in spaces.items():
            keys = map_keys(maps)
            entries[space].append(
                [
                    [[_product(a, b, keys, contraction) for b in columns] for a in ours]
                    for columns in theirs
                ]
            )
    kernels = {
        name: torch.tensor(e, dtype=torch.float64) for name, e in entries.items()
    }
    if contraction.coupled:
        return kernels
    return {name: torch.einsum("nmcc->nm", kernel) for name, kernel in kernels.items()}


def _product(
    a: Mapping[Key, Tensor],
    b: Mapping[Key, Tensor],
    keys: Sequence[Key],
    contraction: Contraction,
) -> float:
    """Return the weighted product of two transformed gradients."""
    total = 0.0
    for key in keys:
        x, y = a[key].double(), b[key].double()
        x = x if contraction.left is None else contraction.left(x)
        y = y if contraction.right is None else contraction.right(y)
        weights = key[1].weights()
        total += float(x @ (y if weights is None else y * weights.to(y)))
    return total


def _singles(batches: Sequence[Batch]) -> list[Batch]:
    return [
        take(batch, slice(i, i + 1))
        for batch in batches
        for i in range(batch_length(batch))
    ]
