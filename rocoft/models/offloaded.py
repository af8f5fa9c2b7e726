"""Linear layers whose weights stay in host memory while a GPU computes.

Each weight is copied to the device for every product, forward and backward, and
released again. So kernels of models larger than the GPU can be computed: the device
holds one weight at a time, embeddings, biases, norms and the results of passes. Tools
that copy weights only for forward passes keep all of them for the backward pass.
"""

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from rocoft.models.on_use import LinearOnUse

__all__ = ["OffloadedLinear", "keep_on_host"]


class OffloadedLinear(LinearOnUse):
    """A linear layer whose weight is in host memory.

    Args:
        layer: The layer to replace.
        device: Device of the products.
    """

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        weight = layer.weight.detach().cpu()
        super().__init__(weight.shape, layer.bias, weight.dtype, device)
        # Copies from pinned memory do not block the CPU.
        self._host = weight.pin_memory() if device.type == "cuda" else weight

    def base_values(self) -> Tensor:
        """Return the weight ``(outputs, inputs)`` on the layer's device."""
        return self._host.to(self.weight.device, non_blocking=True)


def keep_on_host(
    model: nn.Module, device: str | torch.device, but: Collection[nn.Module] = ()
) -> nn.Module:
    """Leave the weights of linear layers in host memory, and move the rest.

    Args:
        model: A model in host memory; changed in place. Linear layers that share their
            weight with another module, or subclass `nn.Linear`, are moved whole.
        device: Device on which the model computes.
        but: More modules to move whole.

    Returns:
        The model.
    """
    device = torch.device(device)
    excluded = {id(module) for module in but}
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or id(module) in excluded:
            continue
        if owners[id(module.weight)] == 1:
            offloaded = OffloadedLinear(module, device)
            model.set_submodule(name, offloaded.train(module.training))
    return model.to(device)
