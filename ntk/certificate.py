"""How exact kernels are: some of their entries, recomputed by the definition."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
        For each space how many entries were recomputed, and their worst error
        relative to the largest of them.
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
    certificates = {}
    for name, expected in result.kernels.items():
        found = kernels[name][rows][:, [j]]
        error = float((found - expected).abs().max())
        scale = float(expected.abs().max())
        certificates[name] = {
            "entries": expected.numel(),
            "relative_error": error / scale if scale else error,
        }
    return certificates


def _example(batches: Sequence[Batch], number: int) -> Batch:
    for batch in batches:
        if number < batch_length(batch):
            return take(batch, slice(number, number + 1))
        number -= batch_length(batch)
    raise IndexError(number)
