"""Kernels as matrices: their axes, the Gram matrix, reductions over outputs.

Axes
----
A kernel between n and m examples with c outputs has shape ``(n, m, c, d)``, d being
the second copy of c: ``K[i, j]`` is the block of two examples, ``K[train][:, test]``
slices examples. `gram_matrix` turns it into ``(n c, m d)``, the Gram matrix of the rows
of the Jacobian in example-major order. Reductions by name:

- ``"full"`` keeps c and d;
- ``"trace"`` sums over c = d to ``(n, m)``;
- ``"margin"`` is the kernel of ``f[1] - f[0]``, for two outputs, ``(n, m)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["full", "trace", "margin"]


def gram_matrix(kernel: Tensor) -> Tensor:
    """Return the Gram matrix of the rows of the Jacobian, example-major.

    Args:
        kernel: ``(n, m, c, d)`` or ``(n, m)``.

    Returns:
        ``(n c, m d)``, or the kernel itself if it has no output axes.
    """
    if kernel.ndim == 2:
        return kernel
    n, m, c, d = kernel.shape
    return kernel.transpose(1, 2).reshape(n * c, m * d)


def reduced(kernel: Tensor, reduce: Reduction) -> Tensor:
    """Reduce a full kernel.

    Args:
        kernel: ``(n, m, c, d)``.
        reduce: ``"full"``, ``"trace"`` or ``"margin"``.

    Returns:
        ``(n, m, c, d)`` or ``(n, m)``.

    Raises:
        ValueError: If a margin is asked of other than two outputs.
    """
    if reduce == "full":
        return kernel
    if reduce == "trace":
        return kernel.diagonal(dim1=2, dim2=3).sum(-1)
    if kernel.shape[2] != 2:
        raise ValueError(
            f"reduce='margin' needs two outputs, but the kernel has {kernel.shape[2]}."
        )
    (k00, k01), (k10, k11) = kernel.permute(2, 3, 0, 1)
    return k00 - k01 - k10 + k11
