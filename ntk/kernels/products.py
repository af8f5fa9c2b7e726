"""Kernels by NTK-vector products: the implementation ``"jvp"``."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.gradients import (
    Batch,
    Coordinates,
    NetworkFunction,
    TangentFunction,
    batch_length,
    differing,
    looped,
    map_keys,
    pushed,
    take,
)
from ntk.kernels.contraction import Contraction
from ntk.kernels.definition import defined_kernels
from ntk.spaces import Maps

Progress = Callable[[int], None]


def products_kernel(
    function: NetworkFunction,
    left: Sequence[Batch],
    right: Sequence[Batch],
    maps: Maps,
    contraction: Contraction,
    progress: Progress | None = None,
    checked: Sequence[Batch] = (),
) -> Tensor:
    """Return a kernel by NTK-vector products: K e = J (J'^T e), a vjp, then jvps.

    Takes the memory of one gradient and time proportional to n m. Where the forward
    derivative of the examples compared is not that of plain autograd, the kernel is
    computed by its definition.

    Args:
        function: The model and its readout.
        left: n examples.
        right: m examples.
        maps: The resolved tangent space.
        contraction: How gradients are contracted, without a left transform.
        progress: Called with the number of right examples done.
        checked: More single examples on which products are compared with the
            definition.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    tangent = TangentFunction(function, map_keys(maps))
    zero = tangent.zero()
    first = take(right[0], slice(0, 1))
    tangent.check_reach(first)
    if not all(
        _agrees(tangent, zero, example, maps, contraction)
        for example in (first, *checked)
    ):
        defined = defined_kernels(function, left, right, {"": maps}, contraction)[""]
        if not contraction.coupled:
            return defined
        return defined.permute(2, 0, 3, 1).flatten(2).flatten(0, 1)
    blocks = []
    for batch in right:
        for i in range(batch_length(batch)):
            example = take(batch, slice(i, i + 1))
            blocks.append(_kernel_columns(tangent, zero, left, example, contraction))
            if progress is not None:
                progress(1)
    kernel = torch.stack(blocks, dim=3).double()  # (n, c, d, m)
    if not contraction.coupled:
        return torch.einsum("nccm->nm", kernel)
    return kernel.transpose(0, 1).flatten(2).flatten(0, 1)


def _kernel_columns(
    tangent: TangentFunction,
    zero: Coordinates,
    left: Sequence[Batch],
    example: Batch,
    contraction: Contraction,
) -> Tensor:
    """Return the kernel of all left examples with one right example, ``(n, c, d)``."""
    # Fused attention kernels have no forward-mode derivative; the math backend has.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = looped(tangent, example)
        columns = []
        for k in range(len(next(iter(gradients.values()))[0])):
            direction = {key: rows[0, k] for key, rows in gradients.items()}
            direction = tangent.weighted(direction, contraction.right)
            columns.append(
                torch.cat([pushed(tangent, zero, direction, batch) for batch in left])
            )
    return torch.stack(columns, dim=2)


def _agrees(
    tangent: TangentFunction,
    zero: Coordinates,
    example: Batch,
    maps: Maps,
    contraction: Contraction,
) -> bool:
    """Whether the products of an example with itself are those of the definition."""
    try:
        products = _kernel_columns(tangent, zero, [example], example, contraction)
    except (RuntimeError, NotImplementedError):
        # Neither a forward-mode derivative nor a second one.
        return False
    judged = defined_kernels(
        tangent.function,
        [example],
        [example],
        {"": maps},
        replace(contraction, coupled=True),
    )[""]
    return not differing([products], [judged[:, 0].to(products)])
