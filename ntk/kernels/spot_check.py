"""Spot checks: a few entries of kernels, recomputed by the definition.

A model in half precision is checked against its float32 copy. Relative errors are then
about the rounding of half precision, 2^-8 in bfloat16 and 2^-11 in float16: each
layer's rounding adds a random part to gradients that are summed over many weights.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk.gradients import Batch, NetworkFunction, batch_length, evaluating, take
from ntk.kernels.contraction import Contraction
from ntk.kernels.definition import defined_kernels
from ntk.kernels.empirical import TRANSFORMS, reader
from ntk.kernels.options import KernelOptions
from ntk.spaces import Space, resolve
from rocoft.commands import CheckFailedError

TOLERATED = {
    "float64": 1e-7,
    "float32": 1e-2,
    "tf32": 0.05,
    "bf16x3": 1e-2,
    "bf16": 0.2,
}
"""Largest relative error of a spot check, by the precision of model or products."""
SIGNS = 0.05
"""The same for kernels of signs: gradients that are rounding have signs at random."""


class SpotCheckError(CheckFailedError):
    """Kernels are not what the definition says: nothing computed from them is right."""


def tolerated_error(options: KernelOptions, dtype: torch.dtype) -> float:
    """Return the largest relative error of entries that counts as rounding.

    Args:
        options: How the kernels were computed.
        dtype: The dtype of the model's weights.

    >>> tolerated_error(KernelOptions(), torch.float64)
    1e-07
    """
    half = dtype in (torch.bfloat16, torch.float16)
    of_model = "bf16" if half else str(dtype).removeprefix("torch.")
    errors = [TOLERATED[of_model], SIGNS if options.kind != "sgd" else 0.0]
    if options.precision != "float32":
        errors.append(TOLERATED[options.precision])
    return max(errors)


def require_small_errors(
    checks: Mapping[str, Mapping[str, Any]], allowed: float
) -> None:
    """Refuse kernels whose spot checks have failed.

    Args:
        checks: For each space its check, see `check_entries`.
        allowed: The largest relative error, see `tolerated_error`.

    Raises:
        SpotCheckError: If an error is larger, or not a number.
    """
    for name, check in checks.items():
        error = check["relative_error"]
        if not error <= allowed:
            raise SpotCheckError(
                f"the kernel over {name} is wrong: {check['entries']} entries, "
                f"recomputed by plain autograd, differ from it by {error:.1e} of the "
                f"largest, more than rounding ({allowed:.0e}). No report was written. "
                "Run it again without kept kernels (--no-cache); if it persists, use "
                "--implementation autograd, and please report the model."
            )


def check_entries(
    module: nn.Module,
    batches: Sequence[Batch],
    spaces: Mapping[str, Space],
    kernels: Mapping[str, Tensor],
    *,
    options: KernelOptions,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Recompute a few entries of each kernel by the definition.

    Args:
        module: The model to recompute with, see `reference_model`.
        batches: The left examples; the right ones are the first of them.
        spaces: Tangent spaces by name.
        kernels: For each space ``(n, m, c, d)``, in the order of the batches.
        options: How the kernels were computed; their reduction keeps pairs of outputs.
        seed: Seed of the choice of entries: a right example with itself, with another
            right one and with any left one.

    Returns:
        For each space the number of entries, their largest error relative to the
        largest of them, and the precision of the recomputation.
    """
    if not spaces:
        return {}
    generator = np.random.default_rng(seed)
    total, m = next(iter(kernels.values())).shape[:2]
    j = int(generator.integers(m))
    rows = sorted({j, int(generator.integers(m)), int(generator.integers(total))})
    singles = [_example(batches, i) for i in rows]
    with evaluating(module):
        recomputed = defined_kernels(
            NetworkFunction(module, reader(options)),
            singles,
            [_example(batches, j)],
            resolve(spaces, module),
            Contraction(*TRANSFORMS[options.kind], options.coupled),
        )
    precision = str(next(module.parameters()).dtype).removeprefix("torch.")
    checks = {}
    for name, expected in recomputed.items():
        entries = kernels[name][rows][:, [j]].to(expected)
        error = float((entries - expected).abs().max())
        scale = float(expected.abs().max())
        checks[name] = {
            "entries": expected.numel(),
            "relative_error": error / scale if scale else error,
            "precision": precision,
        }
    return checks


def reference_model(module: nn.Module, room: float = float("inf")) -> nn.Module:
    """Return the model to recompute entries with.

    Args:
        module: The model that the kernels were computed with.
        room: Memory for a copy, in bytes.

    Returns:
        A float32 copy if the model is in half precision and there is room, else the
        model itself.
    """
    parameters = list(module.parameters())
    if not any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        return module
    if 2 * 4 * sum(p.numel() for p in parameters) > room:
        return module
    return copy.deepcopy(module).float()


def _example(batches: Sequence[Batch], number: int) -> Batch:
    for batch in batches:
        if number < batch_length(batch):
            return take(batch, slice(number, number + 1))
        number -= batch_length(batch)
    raise IndexError(number)
