"""How exact kernels are: some of their entries, recomputed by the definition.

A model in half precision is judged by itself in float32: its relative errors are then
about as large as half precision rounds, 2^-8 in bfloat16 and 2^-11 in float16, as each
layer's rounding adds a random part to gradients that are summed over many weights.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk.function import Batch, batch_length, take
from ntk.kernel import Kind, compute
from ntk.spaces import Space


def certify(
    module: nn.Module,
    batches: Sequence[Batch],
    spaces: Mapping[str, Space],
    kernels: Mapping[str, Tensor],
    *,
    kind: Kind,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Recompute a few entries of each kernel by the definition.

    Args:
        module: The model.
        batches: The left examples; the right ones are the first of them.
        spaces: Tangent spaces by name.
        kernels: For each space ``(n, m, c, d)``, in the order of the batches.
        kind: Of the kernels.
        seed: Of the entries: a right example with itself, with another right one and
            with any left one.

    Returns:
        For each space how many entries were recomputed, their worst error relative to
        the largest of them, and the precision that they were recomputed in.
    """
    if not spaces:
        return {}
    generator = np.random.default_rng(seed)
    total, m = next(iter(kernels.values())).shape[:2]
    j = int(generator.integers(m))
    rows = sorted({j, int(generator.integers(m)), int(generator.integers(total))})
    singles = [_example(batches, i) for i in rows]
    result = compute(
        module,
        singles,
        [_example(batches, j)],
        spaces=spaces,
        kind=kind,
        implementation="jacobian" if kind == "signgd" else "jvp",
    )
    precision = str(next(module.parameters()).dtype).removeprefix("torch.")
    certificates = {}
    for name, expected in result.kernels.items():
        found = kernels[name][rows][:, [j]]
        error = float((found - expected).abs().max())
        scale = float(expected.abs().max())
        certificates[name] = {
            "entries": expected.numel(),
            "relative_error": error / scale if scale else error,
            "precision": precision,
        }
    return certificates


def judge(module: nn.Module, room: float = float("inf")) -> nn.Module:
    """Return the model that entries are recomputed with.

    Args:
        module: The model that kernels were computed with.
        room: Bytes that a copy of it may take.

    Returns:
        A copy in float32 if it is in half precision and there is room, else itself.
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
