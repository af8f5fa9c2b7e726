"""Linear layers that keep a quantised weight and dequantise it for each product.

bitsandbytes' own layers hide their weights: packed bytes of another shape, which
nothing can be differentiated with respect to. The layers here have a weight of the
true shape instead, the offset from the quantised values, which is zero and takes no
memory:

    y = x (Q + W)^T + b,   W = 0,   dy/dW = dy/dQ.

So they are linear layers to whatever looks at a model, and gradients with respect to
W, its rows, columns and low-rank parts are those of the dequantised model, whose
weights never exist together. 8-bit layers of bitsandbytes round their inputs too;
these do not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from rocoft.slices import base_weight

__all__ = ["QuantisedLinear", "dequantised_on_use", "is_quantised"]


class QuantisedLinear(nn.Module):
    """A linear layer over a quantised one.

    Args:
        layer: The quantised layer; its weight stays where it is.
        model: The model that it lies in, which knows how it was quantised.
        dtype: Of the offset.
    """

    def __init__(self, layer: nn.Linear, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # In a tuple, so that they are no modules of this one.
        self._quantised = (layer, model)
        values = self.dequantised()
        self.out_features, self.in_features = values.shape
        zero = torch.zeros((), dtype=dtype, device=values.device)
        self.weight = nn.Parameter(zero.expand(values.shape))
        self.bias = layer.bias

    def dequantised(self) -> Tensor:
        """Return the weight's values ``(outputs, inputs)``."""
        return base_weight(*self._quantised)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., outputs)`` of ``(..., inputs)``."""
        return linear(x, self.weight, self.bias, self)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, layer: QuantisedLinear
) -> Tensor:
    """Return a linear layer's output as `torch.nn.functional.linear` does.

    Args:
        input: ``(..., inputs)``.
        weight: ``(outputs, inputs)`` the offset from the layer's weight.
        bias: ``(outputs,)``, if any.
        layer: The layer.
    """
    if has_torch_function((input, weight)):
        return handle_torch_function(
            linear, (input, weight), input, weight, bias, layer
        )
    if any(weight.stride()):
        return F.linear(input, layer.dequantised().to(input) + weight, bias)
    output = _Product.apply(input, weight, layer)
    return output if bias is None else output + bias.to(output)


class _Product(torch.autograd.Function):
    """The product with a weight that is dequantised anew in each direction."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, layer: QuantisedLinear) -> Tensor:
        return F.linear(x, layer.dequantised().to(x))

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
            of_x = gradient @ ctx.layer.dequantised().to(gradient)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, of_weight, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        moved, offset, _ = tangents
        (x,) = ctx.saved_tensors
        found = None
        if moved is not None:
            found = F.linear(moved, ctx.layer.dequantised().to(moved))
        if offset is not None:
            part = F.linear(x, offset)
            found = part if found is None else found + part
        return found


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose weight is quantised.

    Args:
        module: Any.
    """
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def dequantised_on_use(model: nn.Module) -> nn.Module:
    """Replace quantised linear layers, so that the model has tangent kernels.

    Args:
        model: With layers that bitsandbytes has quantised; changed in place, its
            weights stay quantised.

    Returns:
        The model.
    """
    names = [name for name, module in model.named_modules() if is_quantised(module)]
    plain = (p for p in model.parameters() if p.is_floating_point())
    dtype = next((p.dtype for p in plain if not hasattr(p, "quant_state")), None)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        replaced = QuantisedLinear(layer, model, dtype or torch.float32)
        model.set_submodule(name, replaced.train(layer.training))
    return model
