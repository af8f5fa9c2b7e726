"""Rows and columns that are selected by examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.config import RoCoFTConfig
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.adapter.slices import Statistics, selected, targeted_weights
from rocoft.models import DATA_STRATEGIES, SelectionError

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def calibrated(
    config: RoCoFTConfig,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Loss | None = None,
) -> RoCoFTConfig:
    """Select rows and columns by examples, for strategies that need them.

    ``"activation"`` scores by ``sum |W| ||x||``, with the norm of each input feature
    over all positions without padding (Sun et al. 2024, Wanda). ``"gradient"`` scores
    by the squared gradient of the loss, summed over each row or column and over
    examples.

    Args:
        config: The configuration.
        model: The model without the adapter; it is left unchanged.
        batches: Keyword arguments of the model, with labels for ``"gradient"``.
        loss: Loss of the model on one example, for models that do not return one.

    Returns:
        The configuration with explicit indices; the same one if the strategy needs no
        examples or there are indices already.

    Raises:
        SelectionError: If the examples do not reach a targeted module, or the model
            returns no loss.
    """
    if config.selection not in DATA_STRATEGIES or config.indices is not None:
        return config
    names = list(targeted_weights(config, model))
    training = {module: module.training for module in model.modules()}
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    model.eval()
    try:
        if config.selection == "activation":
            statistics = _input_norms(model, names, batches)
        else:
            statistics = _squared_gradients(model, names, batches, loss or _model_loss)
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
    selections = selected(config, model, statistics)
    indices = {
        name: {"rows": list(selection.rows), "columns": list(selection.columns)}
        for name, selection in selections.items()
    }
    return replace(config, indices=indices)


def _input_norms(
    model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Statistics]:
    """Return the norm of each input feature of each module, ``(inputs,)``."""
    squares: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        square = args[0].detach().double().flatten(0, -2).square().sum(dim=0)
        squares[name] = squares[name] + square if name in squares else square

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(add, name))
            hooks.callback(handle.remove)
        for example in _examples(model, batches):
            model(**example)
    _check_reached(names, squares)
    norms = {name: square.sqrt().float() for name, square in squares.items()}
    return {name: {"row": norm, "column": norm} for name, norm in norms.items()}


def _squared_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss,
) -> dict[str, Statistics]:
    """Return squared gradients, summed over each row and each column and examples."""
    layers = {name: _linear(model.get_submodule(name)) for name in names}
    weights = {}
    for name, layer in layers.items():
        if resolve_quantization_backend(layer, **get_quantization_kwargs(model)):
            raise SelectionError(
                f"selection='gradient' cannot score {name!r}: its weight is quantised "
                "and has no gradient. Choose 'activation', or calibrate on the "
                "unquantised model."
            )
        weights[name] = layer.get_parameter("weight").requires_grad_()
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for example in _examples(model, batches):
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                loss(model, example), list(weights.values()), allow_unused=True
            )
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                continue
            square = gradient.double().square()
            if isinstance(layers[name], Conv1D):
                square = square.t()
            rows[name] = rows.get(name, 0) + square.sum(dim=1)
            columns[name] = columns.get(name, 0) + square.sum(dim=0)
    _check_reached(names, rows)
    return {name: {"row": rows[name], "column": columns[name]} for name in names}


def _examples(
    model: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield examples one at a time, without their padding."""
    device = next(model.parameters()).device
    for batch in batches:
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        others = {k: v for k, v in batch.items() if k not in tensors}
        for i in range(len(next(iter(tensors.values()), ()))):
            example = {key: value[i : i + 1] for key, value in tensors.items()}
            yield {**others, **_unpadded(example)}


def _unpadded(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the positions that an example's masks exclude from all its tensors."""
    unpadded = dict(example)
    decoder = {key for key in example if key.startswith("decoder_")}
    if decoder and "labels" in example:
        decoder.add("labels")
    for mask_name, keys in (
        ("decoder_attention_mask", decoder),
        ("attention_mask", set(example) - decoder),
    ):
        mask = example.get(mask_name)
        if mask is None or mask.ndim != 2:
            continue
        for key in keys:
            if example[key].shape[:2] == mask.shape:
                unpadded[key] = example[key][:, mask[0].bool()]
    return unpadded


def _model_loss(model: nn.Module, example: Mapping[str, Any]) -> Tensor:
    value = getattr(model(**example), "loss", None)
    if value is None:
        raise SelectionError(
            "selection='gradient' needs a loss, but the model returns none for a batch "
            f"of {', '.join(example)}. Add labels, or pass loss=."
        )
    return value


def _check_reached(names: Sequence[str], statistics: Mapping[str, Any]) -> None:
    unreached = [name for name in names if name not in statistics]
    if unreached:
        raise SelectionError(
            f"the examples of batches do not reach {len(unreached)} targeted modules, "
            f"such as {unreached[0]!r}. Give at least one example, and target modules "
            "that the model uses."
        )


def _linear(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, RoCoFTLinear) else module
