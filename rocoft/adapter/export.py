"""Export of a RoCoFT adapter as an exact LoRA adapter, for tools that know only LoRA.

Rows R are ``D = B A`` with one-hot B, ``B[R[i], i] = 1``, and the rows as A; columns C
have one-hot A and the columns as B. Both are stacked. Nothing is approximated: outputs
differ only by the order of sums.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.config import ROCOFT
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.models import SelectionError

_PREFIX = "base_model.model."


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
) -> LoraConfig:
    """Write a RoCoFT adapter as a LoRA adapter that stock peft loads.

    Its ranks are the numbers of rows and columns and its scaling is 1. Biases that
    were trained and `modules_to_save` are written as peft's LoRA writes them.

    Args:
        model: A model with the adapter, from `peft.get_peft_model` or injected.
        path: Folder for ``adapter_config.json`` and ``adapter_model.safetensors``;
            created if necessary.
        adapter_name: Name of the adapter.

    Returns:
        The LoRA adapter's configuration.

    Raises:
        SelectionError: If the model has no such RoCoFT adapter, or an adapted module
            is registered under two names, of which stock peft adapts one.
    """
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if config is None or config.peft_type != ROCOFT:
        raise SelectionError(
            f"adapter_name={adapter_name!r} is no RoCoFT adapter of this "
            f"{type(model).__name__}. Its adapters are {sorted(configs)}."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors = {
        key if key.startswith(_PREFIX) else f"{_PREFIX}{key}": value
        for key, value in get_peft_model_state_dict(
            model, adapter_name=adapter_name
        ).items()
        if ".rocoft_" not in key
    }
    ranks, transposed = {}, set()
    names: dict[nn.Module, str] = {}
    for name, layer in base.named_modules(remove_duplicate=False):
        if not isinstance(layer, RoCoFTLinear) or not layer.has(adapter_name):
            continue
        if (first := names.setdefault(layer, name)) != name:
            raise SelectionError(
                f"module {first!r} is also registered as {name!r}, which stock peft "
                "would not adapt. Merge the adapter, or save it as it is."
            )
        a, b = _factors(layer, adapter_name)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
        ranks[name] = len(a)
        transposed.add(isinstance(layer.base_layer, Conv1D))
    rank = max(ranks.values(), key=list(ranks.values()).count)
    other_ranks = {name: r for name, r in ranks.items() if r != rank}
    bias: Any = "lora_only" if config.bias == "rocoft_only" else config.bias
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=other_ranks,
        alpha_pattern=dict(other_ranks),
        target_modules=list(ranks),
        modules_to_save=config.modules_to_save,
        bias=bias,
        fan_in_fan_out=transposed == {True},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        file = Path(scratch) / SAFETENSORS_WEIGHTS_NAME
        # Copies: peft lists the bias of a saved module twice, and safetensors refuses
        # shared memory.
        copies = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        }
        save_file(copies, file, metadata={"format": "pt"})
        lora.save_pretrained(scratch)
        for written in sorted(Path(scratch).iterdir()):
            written.replace(folder / written.name)
    return lora


def _factors(layer: RoCoFTLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A ``(k, inputs)`` and B ``(outputs, k)`` with ``B A = D``."""
    slices = layer.slices(adapter)
    a, b = [], []
    if slices.rows is not None and slices.row_index is not None:
        one_hot = nn.functional.one_hot(slices.row_index.values, layer.out_features)
        a.append(slices.rows)
        b.append(one_hot.t().to(slices.rows.dtype))
    if slices.columns is not None and slices.column_index is not None:
        one_hot = nn.functional.one_hot(slices.column_index.values, layer.in_features)
        a.append(one_hot.to(slices.columns.dtype))
        b.append(slices.columns)
    return torch.cat(a), torch.cat(b, dim=1)
