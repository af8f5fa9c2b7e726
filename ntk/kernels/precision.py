"""Products of float32 matrices in lower precision: faster, with a known error.

==========  ================================================  =================
precision   what is multiplied                                relative rounding
==========  ================================================  =================
`float32`   the numbers as they are                           2^-24
`bf16x3`    high and low parts a = h + l in bfloat16, without  2^-16
            the product of both low parts
`tf32`      numbers rounded to TF32, on NVIDIA GPUs           2^-11
`bf16`      numbers rounded to bfloat16                       2^-9
==========  ================================================  =================

All sum in float32. Processors with bfloat16 units (AMX, AVX-512 BF16) multiply such
numbers several times as fast; others compute in float32, no faster than float32 itself.
Matrices of another dtype are multiplied in their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ntk.kernels.options import PRECISIONS, Precision

PART_ENTRIES = 2**23
"""Entries of both matrices that are split into high and low parts at a time."""


def check_precision(precision: str, like: Tensor) -> None:
    """Refuse a precision that would have no effect.

    Args:
        precision: One of `PRECISIONS`.
        like: A parameter of the model.

    Raises:
        ValueError: If it is not one of `PRECISIONS`, the model is in float64, or TF32
            is requested elsewhere than on a GPU.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} must be one of {', '.join(PRECISIONS)}."
        )
    if precision != "float32" and like.dtype == torch.float64:
        raise ValueError(
            f"precision={precision!r} is for products in float32, but the model is in "
            "float64. Leave it out, or load the model in float32."
        )
    if precision == "tf32" and like.device.type != "cuda":
        raise ValueError(
            f"precision='tf32' is a format of NVIDIA GPUs, but the model is on "
            f"{like.device}. Use 'bf16' or 'bf16x3'."
        )


def product(a: Tensor, b: Tensor, precision: Precision = "float32") -> Tensor:
    """Return the product of two matrices, or of a batch of pairs.

    Args:
        a: ``(..., n, k)``.
        b: ``(..., k, m)``.
        precision: Precision of the products; sums are in float32.

    Returns:
        ``(..., n, m)`` in the dtype of ``a``.
    """
    if precision == "float32" or a.dtype != torch.float32:
        return a @ b
    if precision == "tf32":
        with _inner("high"):
            return a @ b
    if precision == "bf16":
        return _rounding(a, b)
    # In pieces, so that the high and low parts take little memory.
    step = max(1, PART_ENTRIES // (a[..., 0].numel() + b[..., 0, :].numel()))
    pairs = zip(a.split(step, dim=-1), b.split(step, dim=-2), strict=True)
    first, *others = (_compensated(*pair) for pair in pairs)
    return sum(others, start=first)


def _compensated(a: Tensor, b: Tensor) -> Tensor:
    """Return ``(h + l)(h' + l')`` without ``l l'``, where h is rounded to bfloat16."""
    high_a, high_b = a.bfloat16().float(), b.bfloat16().float()
    total = _rounding(high_a, high_b)
    total += _rounding(high_a, b - high_b)
    total += _rounding(a - high_a, high_b)
    return total


def _rounding(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of float32 matrices rounded to bfloat16, in float32."""
    if a.device.type == "cuda":
        left, right = a.bfloat16(), b.bfloat16()
        if a.ndim == 2:
            return torch.mm(left, right, out_dtype=torch.float32)
        left, right = (x.flatten(0, -3) for x in (left, right))
        stacked = torch.bmm(left, right, out_dtype=torch.float32)
        return stacked.view(*a.shape[:-1], b.shape[-1])
    # A product of bfloat16 tensors would itself be rounded to bfloat16.
    with _inner("medium"):
        return a @ b


@contextmanager
def _inner(setting: str) -> Iterator[None]:
    """Set the internal precision of float32 products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
