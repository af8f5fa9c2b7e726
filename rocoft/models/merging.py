"""A fine-tuned model as a plain one, with the parameters it had before.

A model that peft has wrapped has other parameters than the plain one: those of the
adapter, with the base model's frozen. Kernels before and after fine-tuning compare only
where they are of the same parameters.
"""

import copy

from accelerate.utils import (  # type: ignore[import-untyped]
    extract_model_from_parallel,
)
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


class MergeError(ValueError):
    """A fine-tuned model that cannot be written as a plain one."""


def merged(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model with its tuned weights, all requiring gradients.

    Adapters (RoCoFT, LoRA, DoRA and whatever else peft merges) are merged into the
    weights, heads that were trained beside them take their places, and wrappers of
    data-parallel, compiled or mixed-precision training are left out. Parameters have
    the names that they had before any method was applied, so spaces resolve alike. The
    model itself is left as it was; the copy needs as much memory again.

    Args:
        model: As `rocoft.training.methods.apply_method`,
            `rocoft.training.trainer.fine_tune` or peft leave it, also in the midst of
            training. Readouts such as `rocoft.models.readouts.Prompted` may be around
            the adapted model.

    Returns:
        The copy, in the same mode of training or evaluation.

    Raises:
        MergeError: If an adapter has no weights to merge, as prompts and prefixes,
            is no part of a `PeftModel`, is on a weight that another module uses too
            (tied embeddings), or a parameter is quantised.
    """
    plain = copy.deepcopy(extract_model_from_parallel(model, keep_torch_compile=False))
    # On the copy alone: it takes autocast out of the forward of what it is given.
    plain = extract_model_from_parallel(plain, keep_fp32_wrapper=False)
    for module in list(plain.modules()):
        if isinstance(module, PeftModel):
            _check_mergeable(module)
    # peft itself unloads heads of several layers only where the method is LoRA.
    for path, module in list(plain.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain.set_submodule(
                path, module.unload_and_optionally_merge_module(True, False, None)
            )
    for path, module in list(plain.named_modules()):
        if isinstance(module, PeftModel):
            whole = module.merge_and_unload()
            if not path:
                plain = whole
            else:
                plain.set_submodule(path, whole)
    left = [n for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
    if left:
        raise MergeError(
            f"model {type(model).__name__} has {len(left)} adapted layers, such as "
            f"{left[0]!r}, but no PeftModel to merge them. Wrap the model by "
            "peft.get_peft_model, or load it by PeftModel.from_pretrained."
        )
    _check_floating_point(plain)
    return plain.requires_grad_(True)


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Return the adapted layers whose weight has another use in the model.

    Merging an adapter into such a weight, as that of an output layer which is tied to
    the embeddings, changes the other use too.

    Args:
        model: A model with layers of peft.

    Returns:
        The other use by name of the layer: a parameter, or a module.
    """
    adapted = {
        name: module.get_base_layer()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    holders: dict[object, list[tuple[str, nn.Module, Tensor]]] = {}
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = (f"{path}.{name}".lstrip("."), module, parameter)
            holders.setdefault(_memory(parameter), []).append(held)
        for name, child in module._modules.items():
            if child is not None and not isinstance(module, BaseTunerLayer):
                places.setdefault(child, []).append(f"{path}.{name}".lstrip("."))
    shared = {}
    for path, base in adapted.items():
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        others = [
            name
            for name, module, parameter in holders.get(_memory(weight), [])
            if module is not base and _overlap(weight, parameter)
        ]
        if others := [*others, *places.get(base, [])]:
            shared[path] = others[0]
    return shared


def _memory(tensor: Tensor) -> object:
    """Return what tensors in the same memory have in common."""
    address = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    return (tensor.device, address) if address else id(tensor)


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one memory have numbers in common."""
    a, b = (
        range(t.storage_offset(), t.storage_offset() + 1 + _extent(t))
        for t in (first, second)
    )
    return first is second or max(a.start, b.start) < min(a.stop, b.stop)


def _extent(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in sizes)


def _check_mergeable(model: PeftModel) -> None:
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise MergeError(
            f"adapter {model.active_adapter!r} is of type {config.peft_type}, which "
            "changes inputs and not weights: nothing can be merged. Compute the kernel "
            "of the PeftModel itself."
        )
    for name, other in shared_weights(model.get_base_model()).items():
        raise MergeError(
            f"the adapter of {name!r} cannot be merged: its weight is also that of "
            f"{other!r}, which merging would change too. Leave the module out of the "
            "adapter, or give it a weight of its own before it is adapted."
        )


def _check_floating_point(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise MergeError(
                f"parameter {name!r} is quantised ({parameter.dtype}), so weights "
                "cannot be merged into it. Replace its layers with "
                "rocoft.dequantised_on_use(model) first."
            )
