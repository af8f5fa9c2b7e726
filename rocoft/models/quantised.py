"""Linear layers that keep a quantised weight and dequantise it for each product.

bitsandbytes' layers store packed bytes of another shape, for which there are no
gradients. The layers here have a weight of the true shape (`on_use`). So kernels are
those of the dequantised model, one layer of which is dequantised at a time. 8-bit
layers of bitsandbytes also round their inputs; these do not.
"""

import torch
from torch import Tensor, nn

from rocoft.models.on_use import LinearOnUse, base_weight

__all__ = ["dequantised_on_use", "is_quantised"]


class QuantisedLinear(LinearOnUse):
    """A linear layer over a quantised one.

    Args:
        layer: The quantised layer; its weight stays where it is.
        model: The model that contains it, which knows how it was quantised.
        dtype: Type of the offset.
    """

    def __init__(self, layer: nn.Linear, model: nn.Module, dtype: torch.dtype) -> None:
        values = base_weight(layer, model)
        super().__init__(values.shape, layer.bias, dtype, values.device)
        # In a tuple, so that nn.Module does not register them as submodules.
        self._quantised = (layer, model)

    def base_values(self) -> Tensor:
        """Return the dequantised weight ``(outputs, inputs)``."""
        return base_weight(*self._quantised)


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose weight is quantised."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def dequantised_on_use(model: nn.Module) -> nn.Module:
    """Replace quantised linear layers, so that the model has tangent kernels.

    Args:
        model: A model with layers quantised by bitsandbytes. It is changed in place;
            its weights stay quantised.

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
