"""Errors for gradients that are too large or too small to be multiplied."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ntk.gradients import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    output_gradients,
    take,
)

UNDERFLOW = 2.0**-100
"""Products of float32 gradients below this have lost digits, about 1e-30."""


def check_magnitude(
    kernels: Mapping[str, Tensor],
    parameters: Mapping[str, Iterable[str]],
    function: NetworkFunction,
    batches: Sequence[Batch],
) -> None:
    """Check that kernels are numbers, and not zero because products underflow.

    Args:
        kernels: Kernels of any shape by the name of their space.
        parameters: The parameters of each space.
        function: The model and its readout, in evaluation mode.
        batches: The left examples.

    Raises:
        FunctionError: If a kernel has NaN or infinite entries, or if all its entries
            are below what its precision can tell from zero but its gradients are not
            zero.
    """
    for name, kernel in kernels.items():
        finite = bool(torch.isfinite(kernel).all())
        names = list(parameters[name])
        narrow = any(function.parameters[p].dtype != torch.float64 for p in names)
        floor = UNDERFLOW if narrow else torch.finfo(torch.float64).tiny * 2**52
        if finite and (not kernel.numel() or float(kernel.abs().max()) >= floor):
            continue
        norm = _largest_norm(function, batches, names)
        if finite and (norm == 0 or norm**2 >= floor):
            # Not used, or examples whose gradients are orthogonal.
            continue
        what = "underflow" if finite else "overflow"
        raise FunctionError(
            f"the kernel{f' of {name}' if name else ''} cannot be computed: gradients "
            f"have norms of about {norm:.1e}, whose products {what} in "
            f"{'float32' if narrow else 'float64'}. Rescale the outputs (outputs=)"
            f"{', or use model.double()' if narrow else ''}."
        )


SEARCHED = 4
"""Number of examples whose gradients are looked at."""


def _largest_norm(
    function: NetworkFunction, batches: Sequence[Batch], names: Sequence[str]
) -> float:
    """Return the largest norm of a gradient of a few examples, in float64."""
    singles = (
        take(batch, slice(i, i + 1))
        for batch in batches
        for i in range(batch_length(batch))
    )
    norms = [0.0]
    for example, _ in zip(singles, range(SEARCHED), strict=False):
        for gradients in output_gradients(function, example, names):
            norms.append(
                sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
            )
    return max(norms)
