"""RoCoFT as a method of peft: applied, loaded, merged and mixed like any other."""

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

from rocoft.architecture import SelectionError
from rocoft.config import ROCOFT, RoCoFTConfig
from rocoft.layer import RoCoFTLinear
from rocoft.selection import DATA_STRATEGIES
from rocoft.slices import (
    Selected,
    Statistics,
    selected,
    target_names,
    targeted_weights,
)

Shapes = Mapping[str, Sequence[int]]
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


class RoCoFTModel(BaseTuner):
    """A model some of whose rows and columns train.

    Made by `peft.get_peft_model(model, RoCoFTConfig(...))`.
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
        """Put an adapter into a model, or raise and leave the model as it was.

        Args:
            model: The model.
            adapter_name: Name of the adapter, whose configuration is known.
            autocast_adapter_dtype: As in peft.
            low_cpu_mem_usage: Make the slices on the meta device, to be loaded.
            state_dict: Whose keys name the modules, in place of the configuration.
        """
        config: Any = self.peft_config[adapter_name]
        modules = None
        if state_dict is not None:
            modules = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
        # Everything that can fail is done before the first module is replaced.
        self._selected = selected(config, model, modules=modules)
        renames = getattr(model, "_checkpoint_conversion_mapping", None)
        if config.inference_mode and config.stored_shapes is not None and not renames:
            expected = {name: of.shapes for name, of in self._selected.items()}
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
            adapter_names: Which; None means the active ones.
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
            # A head of several layers has no weight of its own, which peft expects.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        for name, layer in self.model.named_modules():
            if not isinstance(layer, RoCoFTLinear):
                continue
            for adapter in layer.mergeable(adapter_names):
                kept = layer.kept(adapter).values()
                if safe and not all(bool(t.isfinite().all()) for t in kept):
                    raise ValueError(
                        f"adapter {adapter!r} has numbers in {name!r} that are not "
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
        of: Selected = self._selected[current_key]
        if isinstance(target, RoCoFTLinear):
            target.update_layer(adapter_name, of, peft_config.inference_mode)
            return
        options = get_quantization_kwargs(self.model)
        backend = resolve_quantization_backend(target, **options)
        layer = RoCoFTLinear(
            target, adapter_name, of, backend, peft_config.inference_mode
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand each layer the names of the examples' adapters, if there are any."""
        names = kwargs.pop("adapter_names", None)
        with ExitStack() as hooks:
            if names is not None:
                self._check_adapter_names(names)
                beams = kwargs.get("num_beams") or 1
                # Beam search repeats the examples, but only after the encoder.
                repeated = [name for name in names for _ in range(beams)]
                encoder: Any = getattr(self.model, "get_encoder", lambda: None)()
                # A model without one names itself.
                known = isinstance(encoder, nn.Module) and encoder is not self.model
                inside = set(encoder.modules()) if known else set()
                for module in self.model.modules():
                    if isinstance(module, RoCoFTLinear | AuxiliaryTrainingWrapper):
                        given = names if module in inside else repeated
                        handle = module.register_forward_pre_hook(
                            partial(_with_adapter_names, adapter_names=given),
                            with_kwargs=True,
                        )
                        hooks.callback(handle.remove)
            yield

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError(
                "adapter_names mixes adapters in one batch, which is for inference. "
                "Call model.eval() first, or train one adapter at a time."
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
        loaded = {_plain(k): v for k, v in state_dict.items() if ".rocoft_" in k}
        layers = {
            _plain(name): layer
            for name, layer in model.named_modules()
            if isinstance(layer, RoCoFTLinear) and layer.has(adapter_name)
        }
        expected = {
            name: {key: tuple(t.shape) for key, t in layer.kept(adapter_name).items()}
            for name, layer in layers.items()
        }
        found = {key: tuple(value.shape) for key, value in loaded.items()}
        _check_fit(found, expected, config)
        for key, value in loaded.items():
            side = key.rpartition(".")[2]
            if side.endswith("_indices") and not value.is_meta:
                layer = layers[key.rpartition(".")[0]]
                rows = side == "rocoft_row_indices"
                limit = layer.out_features if rows else layer.in_features
                steps = value.diff()
                if value[0] < 0 or value[-1] >= limit or bool((steps <= 0).any()):
                    raise SelectionError(
                        f"{key} in the adapter file is {value.tolist()}, which are no "
                        f"ascending numbers below {limit}: it is of another model or "
                        "damaged. Nothing has been loaded."
                    )
        return super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )


def _check_fit(
    found: Shapes, expected_of: Mapping[str, Shapes], config: RoCoFTConfig
) -> None:
    """Raise if the tensors of a checkpoint are not those that the layers keep."""
    expected = {
        f"{module}.{key}": tuple(shape)
        for module, shapes in expected_of.items()
        for key, shape in shapes.items()
    }
    found = {_plain(key): tuple(shape) for key, shape in found.items()}
    lacking = [key for key in expected if key not in found]
    surplus = [key for key in found if key not in expected]
    wrong = [k for k in expected if k in found and found[k] != expected[k]]
    what = ""
    if lacking:
        what = f"it lacks {len(lacking)} tensors, such as {lacking[0]!r}"
    elif surplus:
        what = f"the model has no place for {len(surplus)}, such as {surplus[0]!r}"
    elif wrong:
        what = f"{wrong[0]!r} has shape {found[wrong[0]]}, not {expected[wrong[0]]}"
    if what:
        raise SelectionError(
            f"the adapter's file does not fit: {what}. Load it into the kind of model "
            f"that it was trained on ({config.base_model_name_or_path!r}), with the "
            "configuration saved beside it. Nothing has been loaded."
        )


def _plain(name: str) -> str:
    """Return a name without what wrappers put into it."""
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
    """Select on some examples what a strategy chooses by data.

    ``"activation"`` scores by ``sum |W| ||x||`` with the norm of each of the layer's
    inputs over all positions that are no padding (Sun et al. 2024, Wanda);
    ``"gradient"`` by the sum of squares of each row or column of the loss's gradient,
    over examples.

    Args:
        config: The configuration.
        model: The model, before an adapter is put into it; it is left as it was.
        batches: Keyword arguments of the model, with labels for ``"gradient"``.
        loss: Of the model and one example, for models that do not return theirs.

    Returns:
        The configuration with explicit indices; if the strategy needs no examples or
        there are indices already, the same one.

    Raises:
        SelectionError: If the examples do not reach a targeted module, or give no
            loss.
    """
    if config.selection not in DATA_STRATEGIES or config.indices is not None:
        return config
    names = list(targeted_weights(config, model))
    training = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        if config.selection == "activation":
            statistics = _input_norms(model, names, batches)
        else:
            statistics = _energies(model, names, batches, loss or _own_loss)
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
    found = selected(config, model, statistics)
    indices = {
        name: {"rows": list(of.rows), "columns": list(of.columns)}
        for name, of in found.items()
    }
    return replace(config, indices=indices)


def _input_norms(
    model: nn.Module, names: Sequence[str], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Statistics]:
    """Return the norm of each input feature of each module, ``(inputs,)``."""
    squares: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        power = args[0].detach().double().flatten(0, -2).square().sum(dim=0)
        squares[name] = squares[name] + power if name in squares else power

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(partial(add, name))
            hooks.callback(handle.remove)
        for example in _examples(model, batches):
            model(**example)
    _check_reached(names, squares)
    norms = {name: power.sqrt().float() for name, power in squares.items()}
    return {name: {"row": norm, "column": norm} for name, norm in norms.items()}


def _energies(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Mapping[str, Any]],
    loss: Loss,
) -> dict[str, Statistics]:
    """Return the squared gradient of each module's rows and of its columns, summed."""
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
            value = loss(model, example)
            found = torch.autograd.grad(
                value, list(weights.values()), allow_unused=True
            )
        for name, gradient in zip(weights, found, strict=True):
            if gradient is None:
                continue
            stored = gradient.double().square()
            power = stored.t() if isinstance(layers[name], Conv1D) else stored
            rows[name] = rows.get(name, 0) + power.sum(dim=1)
            columns[name] = columns.get(name, 0) + power.sum(dim=0)
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
            one = {key: value[i : i + 1] for key, value in tensors.items()}
            yield {**others, **_unpadded(one)}


def _unpadded(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the positions that an example's masks exclude, in all that has them."""
    kept = dict(example)
    decoder = {k for k in kept if k.startswith("decoder_")}
    if decoder and "labels" in kept:
        decoder.add("labels")
    for mask_name, keys in (
        ("decoder_attention_mask", decoder),
        ("attention_mask", set(kept) - decoder),
    ):
        mask = example.get(mask_name)
        if mask is None or mask.ndim != 2:
            continue
        for key in keys:
            if kept[key].shape[:2] == mask.shape:
                kept[key] = kept[key][:, mask[0].bool()]
    return kept


def _own_loss(model: nn.Module, example: Mapping[str, Any]) -> Tensor:
    value = getattr(model(**example), "loss", None)
    if value is None:
        raise SelectionError(
            "selection='gradient' needs a loss, but the model returns none for a batch "
            f"of {', '.join(example)}. Add labels, or pass loss=."
        )
    return value


def _check_reached(names: Sequence[str], found: Mapping[str, Any]) -> None:
    lost = [name for name in names if name not in found]
    if lost:
        raise SelectionError(
            f"the examples of batches do not reach {len(lost)} targeted modules, such "
            f"as {lost[0]!r}. Give at least one example, and target modules that the "
            "model uses."
        )


def _linear(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, RoCoFTLinear) else module


def _register() -> None:
    """Make peft know the method, once."""
    if PEFT_TYPE_TO_TUNER_MAPPING.get(ROCOFT) is not RoCoFTModel:
        register_peft_method(
            name=RoCoFTModel.prefix.rstrip("_"),
            config_cls=RoCoFTConfig,
            model_cls=RoCoFTModel,
        )


_register()
