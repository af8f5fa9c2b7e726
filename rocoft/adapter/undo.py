"""Taking back an adapter that was put into a model to be loaded and then refused.

peft reads an adapter's weights only after it has changed the model's layers.
"""

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from rocoft.adapter.layer import RoCoFTLinear


class Before:
    """A model as it was before an adapter was put into it.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self._active = {name: layer.active_adapters for name, layer in _tuned(model)}
        self._configured = hasattr(model, "peft_config")

    def restore(self, model: nn.Module, adapter_name: str) -> None:
        """Remove an adapter from a model, with the wrappers that only it needs.

        An adapter with values other than zero is left: it has been trained or loaded.

        Args:
            model: The model, or a `PeftModel` around it.
            adapter_name: Name of the adapter.
        """
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = [m for m in base.modules() if isinstance(m, RoCoFTLinear)]
        if not all(layer.is_zero(adapter_name) for layer in layers):
            return
        parents = {
            id(child): [
                (parent, name)
                for parent in base.modules()
                for name, other in parent.named_children()
                if other is child
            ]
            for _, child in _tuned(base)
        }
        for name, layer in _tuned(base):
            plain = _without(layer, adapter_name)
            if plain is not layer:
                for parent, child_name in parents[id(layer)]:
                    setattr(parent, child_name, plain)
            elif name in self._active and isinstance(layer, BaseTunerLayer):
                layer.set_adapter(self._active[name])
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        getattr(base, "peft_config", {}).pop(adapter_name, None)
        if not self._configured and hasattr(base, "peft_config"):
            del base.peft_config


def holding(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the names of the modules that hold an adapter, of any method of peft.

    Args:
        model: The model.
        adapter_name: Name of the adapter.
    """
    return [name for name, m in _tuned(model) if adapter_name in _adapters(m)]


def _tuned(
    model: nn.Module,
) -> Iterator[tuple[str, BaseTunerLayer | AuxiliaryTrainingWrapper]]:
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield name, module


def _adapters(module: BaseTunerLayer | AuxiliaryTrainingWrapper) -> set[str]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return set(module._adapters)
    return set(module._all_available_adapter_names())


def _without(
    module: BaseTunerLayer | AuxiliaryTrainingWrapper, adapter_name: str
) -> nn.Module:
    """Remove an adapter of a wrapper; return what it wraps if no other is left."""
    adapters = _adapters(module)
    assert isinstance(module, nn.Module)
    if adapter_name not in adapters:
        return module
    if isinstance(module, AuxiliaryTrainingWrapper):
        if adapters == {adapter_name}:
            return module.original_module
        module.delete_adapter(adapter_name, new_active_adapters=None)
        return module
    if adapters == {adapter_name}:
        return module.get_base_layer()
    module.delete_adapter(adapter_name)
    return module
