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
from torch import nn


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
            is no part of a `PeftModel`, or a parameter is quantised.
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


def _check_mergeable(model: PeftModel) -> None:
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise MergeError(
            f"adapter {model.active_adapter!r} is of type {config.peft_type}, which "
            "changes inputs and not weights: nothing can be merged. Compute the kernel "
            "of the PeftModel itself."
        )


def _check_floating_point(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
            raise MergeError(
                f"parameter {name!r} is quantised ({parameter.dtype}), so weights "
                "cannot be merged into it. Replace its layers with "
                "rocoft.dequantised_on_use(model) first."
            )
