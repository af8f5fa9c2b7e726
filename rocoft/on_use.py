"""Linear layers whose weights exist only while they are used.

A layer here has a weight of the true shape, the offset from base values that are
brought when they are needed, forward and backward, and let go again:

    y = x (B + W)^T + b,   W = 0,   dy/dW = dy/dB.

The offset is zero and takes no memory. So these are linear layers to whatever looks at
a model, and gradients with respect to W, its rows, columns and low-rank parts are those
of the model with the weights B, which never exist together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["LinearOnUse"]


class LinearOnUse(nn.Module):
    """A linear layer whose base values are brought for each product.

    Args:
        shape: ``(outputs, inputs)``.
        bias: ``(outputs,)``, if any.
        dtype: Of the offset.
        device: Of the offset, where the layer computes.
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
        """Return ``(..., outputs)`` of ``(..., inputs)``."""
        return linear(x, self.weight, self.bias, self)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, layer: LinearOnUse
) -> Tensor:
    """Return a linear layer's output as `torch.nn.functional.linear` does.

    Args:
        input: ``(..., inputs)``.
        weight: ``(outputs, inputs)`` the offset from the layer's base values.
        bias: ``(outputs,)``, if any.
        layer: The layer.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(
            linear, (input, weight), input, weight, bias, layer
        )
    if any(weight.stride()):
        return F.linear(input, layer.base_values().to(input) + weight, bias)
    output = _Product.apply(input, weight, layer)
    return output if bias is None else output + bias.to(output)


class _Product(torch.autograd.Function):
    """The product with a weight that is brought anew in each direction."""

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
        of_x, of_weight = None, None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.layer.base_values().to(gradient)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, of_weight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        moved, offset, _ = tangents
        (x,) = ctx.saved_tensors
        found = None
        if moved is not None:
            found = F.linear(moved, ctx.layer.base_values().to(moved))
        if offset is not None:
            part = F.linear(x, offset)
            found = part if found is None else found + part
        return found
