"""Linear layers whose weights exist only while they are used.

The base values B are fetched for each product, forward and backward, and released
again. The layer's weight W is the offset from them:

    y = x (B + W)^T + b,   W = 0,   dy/dW = dy/dB.

W has the shape of B but takes no memory. So gradients with respect to W, its rows,
columns and low-rank parts are those of the model with weights B, although the weights
of two layers never exist together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["LinearOnUse", "base_weight"]


class LinearOnUse(nn.Module):
    """A linear layer whose base values are fetched for each product.

    Args:
        shape: ``(outputs, inputs)``.
        bias: ``(outputs,)``, if any.
        dtype: Type of the offset.
        device: Device of the offset, on which the layer computes.
    """

    def __init__(
        self,
        shape: torch.Size,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        zero = torch.zeros((), dtype=dtype, device=device)
        self.weight = nn.Parameter(zero.expand(shape))
        self.bias = bias

    def base_values(self) -> Tensor:
        """Return the base values ``(outputs, inputs)``, on the layer's device."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., inputs)`` to ``(..., outputs)``."""
        return linear(x, self.weight, self.bias, self)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, layer: LinearOnUse
) -> Tensor:
    """Return a layer's output, like `torch.nn.functional.linear`.

    Args:
        input: ``(..., inputs)``.
        weight: ``(outputs, inputs)``, the offset from the layer's base values.
        bias: ``(outputs,)``, if any.
        layer: The layer, which provides the base values.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(
            linear, (input, weight), input, weight, bias, layer
        )
    if any(weight.stride()):
        return F.linear(input, layer.base_values().to(input) + weight, bias)
    output = _Product.apply(input, weight, layer)
    return output if bias is None else output + bias.to(output)


def base_weight(module: nn.Module, model: nn.Module) -> Tensor:
    """Return a linear layer's weight as it is stored, dequantised if necessary.

    Args:
        module: The layer, also wrapped by peft.
        model: The model that contains it, which knows how it was quantised.

    Returns:
        ``(outputs, inputs)``, or ``(inputs, outputs)`` for a `Conv1D`.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    backend = resolve_quantization_backend(module, **get_quantization_kwargs(model))
    if backend is not None:
        return backend.get_base_weight(module).detach()
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


class _Product(torch.autograd.Function):
    """The product with the base values, which are fetched again for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, layer: LinearOnUse) -> Tensor:
        return F.linear(x, layer.base_values().to(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.layer = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        dx, dweight = None, None
        if ctx.needs_input_grad[0]:
            dx = gradient @ ctx.layer.base_values().to(gradient)
        if ctx.needs_input_grad[1]:
            dweight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return dx, dweight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        dx, dweight, _ = tangents
        (x,) = ctx.saved_tensors
        dy = None
        if dx is not None:
            dy = F.linear(dx, ctx.layer.base_values().to(dx))
        if dweight is not None:
            from_weight = F.linear(x, dweight)
            dy = from_weight if dy is None else dy + from_weight
        return dy
