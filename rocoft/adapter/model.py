"""RoCoFT as a method of peft: applying, loading, merging and mixing adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from rocoft.adapter.config import ROCOFT, RoCoFTConfig
from rocoft.adapter.coverage import warn_of_left_out
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.adapter.slices import (
    Selected,
    selected,
    target_names,
)
from rocoft.adapter.undo import Before, holding
from rocoft.models import SelectionError, shared_weights

Shapes = Mapping[str, Sequence[int]]


class RoCoFTModel(BaseTuner):
    """A model with RoCoFT adapters.

    Use `peft.get_peft_model(model, RoCoFTConfig(...))` to make one. A model that holds
    adapters takes more by ``add_adapter`` or ``load_adapter``, or is wrapped again
    under another name, which leaves only the new adapter active and trained. A name
    that is taken and layers of another method are refused; so are merges into a weight
    that has another use. What is refused leaves the model as it was.

    Example:
        >>> import peft
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> model = peft.get_peft_model(base, RoCoFTConfig(r=1, target_modules=["0"]))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['base_model.model.0.rocoft_rows.default']
    """

    prefix = "rocoft_"
    tuner_layer_cls = RoCoFTLinear
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        *args: Any,
        **kw: Any,
    ) -> None:
        known = getattr(model, "peft_config", None)
        before = None if known is None else dict(known)
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kw)
        except BaseException:
            if known is not None and before is not None:
                # peft has entered the new configuration already.
                known.clear()
                known.update(before)
            raise
        if before:
            # Adapters that were there neither train nor count beside the new one.
            config: Any = self.peft_config[adapter_name]
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    for name, copy in module.modules_to_save.items():
                        if name != adapter_name:
                            copy.requires_grad_(False)

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
        _check_free(model, adapter_name)
        config.check_weights()
        renames = getattr(model, "_checkpoint_conversion_mapping", None)
        if config.inference_mode and config.stored_shapes is not None and not renames:
            expected = {name: s.shapes for name, s in self._selected.items()}
            _check_fit(config.stored_shapes, expected, config)
        if modules is None:
            warn_of_left_out(config, model)
        targets = target_names(config, model)
        config.target_modules = targets if isinstance(targets, str) else set(targets)
        if config.is_loaded:
            config.before = Before(model)
        self._repeated = _repeated(model)
        super().inject_adapter(
            *(model, adapter_name, autocast_adapter_dtype),
            *(low_cpu_mem_usage, state_dict),
        )
        del self._selected, self._repeated

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
        self._repeated = _repeated(self.model)
        try:
            return super()._unload_and_optionally_merge(
                merge, progressbar, safe_merge, adapter_names
            )
        finally:
            del self._repeated

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module
    ) -> None:
        # peft knows one name of a module that is registered under several.
        for other, name in self._repeated.get(child, []):
            setattr(other, name, new_module)
        if isinstance(child, AuxiliaryTrainingWrapper):
            # peft expects a weight, which a head of several layers lacks.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        shared = shared_weights(self.model)
        for name, layer in self.model.named_modules():
            if not isinstance(layer, RoCoFTLinear):
                continue
            adapters = layer.mergeable(adapter_names)
            if adapters and name in shared:
                raise SelectionError(
                    f"adapters {adapters} cannot be merged into {name!r}: its weight "
                    f"is also that of {shared[name]!r}, which merging would change "
                    "too. Leave them unmerged, export them by rocoft.export_lora, or "
                    f"train with exclude_modules=[{name!r}]. Nothing has been merged."
                )
            for adapter in adapters:
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
        try:
            cls._check_loaded(model, config, adapter_name, state_dict)
        except SelectionError:
            if config.before is not None:
                config.before.restore(model, adapter_name)
            raise
        config.before = None
        return super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )

    @classmethod
    def _check_loaded(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> None:
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


def _check_free(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that adapters of the model have, and adapters of other methods."""
    if held := holding(model, adapter_name):
        raise SelectionError(
            f"{type(model).__name__} holds an adapter {adapter_name!r} already, in "
            f"{len(held)} modules such as {held[0]!r}: both would train. Remove it "
            "first (model = model.unload()), or give the new one another name "
            "(adapter_name=...). The model is unchanged."
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, RoCoFTLinear):
            raise SelectionError(
                f"{type(model).__name__} holds adapters of another peft method, such "
                f"as the {type(module).__name__} at {name!r}: they would train too, "
                "and not be saved. Merge them first (model = model.merge_and_unload())"
                " or remove them (model = model.unload()). The model is unchanged."
            )


def _repeated(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return where each module is registered that has several places."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    return {child: found for child, found in places.items() if len(found) > 1}


def _original(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")


def _with_adapter_names(
    _: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _register() -> None:
    """Register the method with peft, once."""
    if PEFT_TYPE_TO_TUNER_MAPPING.get(ROCOFT) is not RoCoFTModel:
        register_peft_method(
            name=RoCoFTModel.prefix.rstrip("_"),
            config_cls=RoCoFTConfig,
            model_cls=RoCoFTModel,
        )


_register()
