"""Reference times of the machine: the floor of a pass, and the rate of matrix products.

The *floor* is one forward pass and c backward passes to the outputs of all layers,
without gradients of parameters and without capture: no method by back-propagation can
be faster. The *rate* is that of a large matrix product. A full kernel's *bound* is the
floor plus its multiply-adds at that rate.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ntk.gradients import Batch, NetworkFunction, evaluating

__all__ = ["multiply_adds_per_second", "run_floor", "seconds"]

PRODUCT = {"cpu": 512, "cuda": 4096}
"""Rows of the matrix product whose rate is measured; on a GPU the overhead of a call
would dominate smaller ones."""
PRODUCTS = 5


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, including its work on the device.

    Args:
        work: The function to time.
        device: The device that it runs on.
    """
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def run_floor(function: NetworkFunction, batches: Sequence[Batch]) -> None:
    """Run one forward pass and c backward passes to the outputs of all layers.

    Args:
        function: The model and its readout.
        batches: The examples.
    """
    model = function.model
    owners = [
        m
        for m in model.modules()
        if next(m.parameters(recurse=False), None) is not None
    ]
    flags = {p: p.requires_grad for p in model.parameters()}
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            if not output.requires_grad:
                output.requires_grad_()
            outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in owners]
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        with evaluating(model):
            for batch in batches:
                outputs.clear()
                values = function(batch)
                c = values.shape[1]
                for k in range(c):
                    torch.autograd.grad(
                        values[:, k].sum(),
                        outputs,
                        retain_graph=k + 1 < c,
                        allow_unused=True,
                    )
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def multiply_adds_per_second(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> float:
    """Return the rate of a matrix product, the best of several runs.

    Args:
        device: The device to measure.
        dtype: The dtype of the matrices.
    """
    rows = PRODUCT.get(device.type, PRODUCT["cuda"])
    a = torch.ones(rows, rows, device=device, dtype=dtype)
    out = torch.empty_like(a)
    work = lambda: torch.mm(a, a, out=out)
    best = min(seconds(work, device) for _ in range(PRODUCTS))
    return rows**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
