"""Linear layers whose weights stay in the host's memory while a GPU computes.

Each weight is copied to the device for every product, forward and backward, and let go
again, so that models larger than a GPU have kernels there: the device holds one weight
at a time, embeddings, biases, norms and what passes leave. Tools that copy weights for
a forward pass alone keep them for the backward pass, all of them together.
"""

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from rocoft.on_use import LinearOnUse

__all__ = ["OffloadedLinear", "keep_on_host"]


class OffloadedLinear(LinearOnUse):
    """A linear layer whose weight is in the host's memory.

    Args:
        layer: The layer whose weight this takes over.
        device: Where it computes.
    """

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        weight = layer.weight.detach().cpu()
        super().__init__(weight.shape, layer.bias, weight.dtype, device)
        # Copies from pinned memory need no help of the processor.
        self._host = weight.pin_memory() if device.type == "cuda" else weight

    def base_values(self) -> Tensor:
        """Return the weight ``(outputs, inputs)`` on the layer's device."""
        return self._host.to(self.weight.device, non_blocking=True)


def keep_on_host(
    model: nn.Module, device: str | torch.device, but: Collection[nn.Module] = ()
) -> nn.Module:
    """Leave the weights of linear layers in the host's memory, and move the rest.

    Args:
        model: In the host's memory; changed in place. Linear layers that share their
            weight with another module, or subclass `nn.Linear`, are moved whole.
        device: Where the model computes.
        but: Modules that are moved whole, too.

    Returns:
        The model.
    """
    place = torch.device(device)
    whole = {id(module) for module in but}
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or id(module) in whole:
            continue
        if owners[id(module.weight)] == 1:
            replaced = OffloadedLinear(module, place)
            model.set_submodule(name, replaced.train(module.training))
    return model.to(place)
