"""RoCoFT as a method of peft: applying, loading, merging and mixing adapters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.config import ROCOFT, RoCoFTConfig
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.adapter.slices import (
    Selected,
    Statistics,
    selected,
    target_names,
    targeted_weights,
)
from rocoft.models import DATA_STRATEGIES, SelectionError

Shapes = Mapping[str, Sequence[int]]
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class RoCoFTModel(BaseTuner):
    """A model with RoCoFT adapters.

    Use `peft.get_peft_model(model, RoCoFTConfig(...))` to make one.
    """

    prefix = "rocoft_"
    tuner_layer_cls = RoCoFTLinear
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to a model; on errors the model is left unchanged.

        Args:
            model: The model.
            adapter_name: Name of the adapter; its configuration is in `peft_config`.
            autocast_adapter_dtype: Whether slices in half precision become float32.
            low_cpu_mem_usage: Create the slices on the meta device, to be loaded.
            state_dict: Tensors whose names replace the configuration's modules.
        """
        config: Any = self.peft_config[adapter_name]
        modules = None
        if state_dict is not None:
            modules = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        # All that can fail comes before the first module is replaced.
        self._selected = selected(config, model, modules=modules)
        renames = getattr(model, "_checkpoint_conversion_mapping", None)
        if config.inference_mode and config.stored_shapes is not None and not renames:
            expected = {name: s.shapes for name, s in self._selected.items()}
            _check_fit(config.stored_shapes, expected, config)
        names = target_names(config, model)
        config.target_modules = names if isinstance(names, str) else set(names)
        super().inject_adapter(
            *(model, adapter_name, autocast_adapter_dtype),
            *(low_cpu_mem_usage, state_dict),
        )
        del self._selected

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the weights, in all layers or in none.

        Args:
            adapter_names: Names of adapters; None means the active ones.
            safe_merge: Refuse weights that are not finite.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module
    ) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # peft expects a weight, which a head of several layers lacks.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        for name, layer in self.model.named_modules():
            if not isinstance(layer, RoCoFTLinear):
                continue
            for adapter in layer.mergeable(adapter_names):
                tensors = layer.tensors(adapter).values()
                if safe and not all(bool(t.isfinite().all()) for t in tensors):
                    raise ValueError(
                        f"adapter {adapter!r} has values in {name!r} that are not "
                        "finite: it seems to be broken. Nothing has been merged."
                    )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        selection: Selected = self._selected[current_key]
        if isinstance(target, RoCoFTLinear):
            target.update_layer(adapter_name, selection, peft_config.inference_mode)
            return
        options = get_quantization_kwargs(self.model)
        backend = resolve_quantization_backend(target, **options)
        layer = RoCoFTLinear(
            target, adapter_name, selection, backend, peft_config.inference_mode
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names`, if given, to each layer."""
        names = kwargs.pop("adapter_names", None)
        with ExitStack() as hooks:
            if names is not None:
                self._check_adapter_names(names)
                beams = kwargs.get("num_beams") or 1
                # Beam search repeats the examples, but only after the encoder.
                repeated = [name for name in names for _ in range(beams)]
                encoder: Any = getattr(self.model, "get_encoder", lambda: None)()
                # A model without an encoder returns itself.
                known = isinstance(encoder, nn.Module) and encoder is not self.model
                in_encoder = set(encoder.modules()) if known else set()
                for module in self.model.modules():
                    if isinstance(module, RoCoFTLinear | AuxiliaryTrainingWrapper):
                        module_names = names if module in in_encoder else repeated
                        handle = module.register_forward_pre_hook(
                            partial(_with_adapter_names, adapter_names=module_names),
                            with_kwargs=True,
                        )
                        hooks.callback(handle.remove)
            yield

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError(
                "adapter_names mixes adapters in one batch, which is for inference "
                "only. Call model.eval() first, or train one adapter at a time."
            )
        unknown = sorted(set(names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(
                f"adapter_names has {unknown}, but the adapters are "
                f"{sorted(self.peft_config)}. '__base__' means none."
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Refuse an adapter that does not fit, where peft would only warn."""
        loaded = {_original(k): v for k, v in state_dict.items() if ".rocoft_" in k}
        layers = {
            _original(name): layer
            for name, layer in model.named_modules()
            if isinstance(layer, RoCoFTLinear) and layer.has(adapter_name)
        }
        expected = {
            name: {
                key: tuple(t.shape) for key, t in layer.tensors(adapter_name).items()
            }
            for name, layer in layers.items()
        }
        shapes = {key: tuple(value.shape) for key, value in loaded.items()}
        _check_fit(shapes, expected, config)
        for key, value in loaded.items():
            module_name, _, attribute = key.rpartition(".")
            if attribute.endswith("_indices") and not value.is_meta:
                layer = layers[module_name]
                rows = attribute == "rocoft_row_indices"
                limit = layer.out_features if rows else layer.in_features
                steps = value.diff()
                if value[0] < 0 or value[-1] >= limit or bool((steps <= 0).any()):
                    raise SelectionError(
                        f"{key} in the adapter file is {value.tolist()}, which are no "
                        f"ascending numbers below {limit}: the file is damaged or of "
                        "another model. Nothing has been loaded."
                    )
        return super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )


def _check_fit(
    file_shapes: Shapes, layer_shapes: Mapping[str, Shapes], config: RoCoFTConfig
) -> None:
    """Refuse a file whose tensors are not those of the layers, given by module."""
    expected = {
        f"{module}.{key}": tuple(shape)
        for module, shapes in layer_shapes.items()
        for key, shape in shapes.items()
    }
    stored = {_original(key): tuple(shape) for key, shape in file_shapes.items()}
    missing = [key for key in expected if key not in stored]
    unexpected = [key for key in stored if key not in expected]
    wrong = [key for key in expected if stored.get(key) != expected[key]]
    if missing:
        fault = f"it lacks {len(missing)} tensors, such as {missing[0]!r}"
    elif unexpected:
        fault = (
            f"the model has no place for {len(unexpected)} of its tensors, such as "
            f"{unexpected[0]!r}"
        )
    elif wrong:
        fault = f"{wrong[0]!r} has shape {stored[wrong[0]]}, not {expected[wrong[0]]}"
    else:
        return
    raise SelectionError(
        f"the adapter's file does not fit: {fault}. Load it into the kind of model "
        f"that it was trained on ({config.base_model_name_or_path!r}), with the "
        "configuration saved beside it. Nothing has been loaded."
    )


def _original(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def _with_adapter_names(
    _: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


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


def _register() -> None:
    """Register the method with peft, once."""
    if PEFT_TYPE_TO_TUNER_MAPPING.get(ROCOFT) is not RoCoFTModel:
        register_peft_method(
            name=RoCoFTModel.prefix.rstrip("_"),
            config_cls=RoCoFTConfig,
            model_cls=RoCoFTModel,
        )


_register()
