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
