"""Kernels as matrices: their axes, the Gram matrix, reductions over outputs.

Axes
----
A kernel between n and m examples with c outputs has shape ``(n, m, c, d)``, d being
the second copy of c: ``K[i, j]`` is the block of two examples, ``K[train][:, test]``
slices examples. `gram_matrix` turns it into ``(n c, m d)``, the Gram matrix of the rows
of the Jacobian in example-major order. Reductions by name:

- ``"full"`` keeps c and d;
- ``"trace"`` sums over c = d to ``(n, m)``;
- ``"margin"`` is the kernel of ``f[1] - f[0]``, for two outputs, ``(n, m)``;
- ``"contrast"`` is the kernel ``Q^T K Q`` of the `contrasts` ``Q^T f`` of the outputs,
  ``(n, m, c - 1, c - 1)``;
- ``"contrast_trace"`` is its trace, ``(n, m)``.

Contrasts
---------
Softmax and cross-entropy do not change when one number is added to all c outputs, so
fine-tuning a classifier is governed by the kernel of the contrasts, not by that of the
outputs. For two classes the one contrast is the margin over the root of 2, and its
kernel is half the margin's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["full", "trace", "margin", "contrast", "contrast_trace"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

COUPLED: tuple[Reduction, ...] = ("full", "contrast")
"""Reductions that keep pairs of outputs; the others have shape ``(n, m)``."""


def contrasts(c: int) -> Tensor:
    """Return the orthonormal contrasts of c outputs.

    Column k - 1 compares output k with the mean of the outputs before it (Helmert): it
    is ``k`` at row k and -1 at the rows before it, over the root of ``k (k + 1)``.
    ``Q^T Q = I`` and ``Q^T 1 = 0``, so ``Q Q^T = I - 1 1^T / c``. No statement about a
    kernel depends on the basis: another one turns the contrasts.

    Args:
        c: Number of outputs, at least 2.

    Returns:
        ``(c, c - 1)`` in float64.

    Raises:
        ValueError: If there are fewer than two outputs.

    >>> contrasts(2)
    tensor([[-0.7071],
            [ 0.7071]], dtype=torch.float64)
    """
    import torch

    if c < 2:
        raise ValueError(
            f"c={c}; expected 2 outputs or more: fewer have no contrast. For a "
            "regression, take the outputs themselves."
        )
    k = torch.arange(1, c, dtype=torch.float64)
    rows = torch.arange(c)[:, None]
    values = (rows == k) * k - (rows < k).double()
    return values / torch.sqrt(k * (k + 1))


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
        reduce: One of `REDUCTIONS`.

    Returns:
        The reduced kernel, in the shape that the module describes.

    Raises:
        ValueError: If a margin is asked of other than two outputs, or contrasts of one.
    """
    if reduce == "full":
        return kernel
    if reduce == "trace":
        return kernel.diagonal(dim1=2, dim2=3).sum(-1)
    c = kernel.shape[2]
    if reduce == "margin":
        if c != 2:
            raise ValueError(
                f"reduce='margin' needs two outputs, but the kernel has {c}."
            )
        return 2 * reduced(kernel, "contrast")[..., 0, 0]
    basis = contrasts(c).to(kernel)
    contrast = basis.T @ kernel @ basis
    return contrast if reduce == "contrast" else reduced(contrast, "trace")
