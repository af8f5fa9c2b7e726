"""The rows and columns that a configuration selects in each module of a model.

Nothing here changes the model. Weights are read only by strategies that score them, so
parameters can be counted on a model without weights (on the meta device).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.config import EVERY_LINEAR, RoCoFTConfig
from rocoft.commands import Strategy
from rocoft.models import (
    DATA_STRATEGIES,
    Architecture,
    Axis,
    LinearWeight,
    SelectionError,
    base_weight,
    check_counts,
    fused_parts,
    select_each,
)

READS_WEIGHTS = ("max", "min", "mixed", "activation")
Statistics = Mapping[Axis, Tensor]
"""The `statistics` of `selection.select` for one module, for rows and for columns."""

_AXES: dict[str, tuple[Axis, ...]] = {
    "row": ("row",),
    "column": ("column",),
    "both": ("row", "column"),
}


@dataclass(frozen=True)
class Selected:
    """The trained rows and columns of one module.

    Attributes:
        weight: The module's weight.
        rows: Indices of output features, ascending.
        columns: Indices of input features, ascending.
    """

    weight: LinearWeight
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of trained parameters; crossings of rows and columns count once."""
        unselected = self.weight.outputs - len(self.rows)
        return len(self.rows) * self.weight.inputs + len(self.columns) * unselected

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's parameters and buffers, by name of the attribute."""
        rows, columns = len(self.rows), len(self.columns)
        shapes: dict[str, tuple[int, ...]] = {}
        if rows:
            shapes["rocoft_rows"] = (rows, self.weight.inputs)
            shapes["rocoft_row_indices"] = (rows,)
        if columns:
            shapes["rocoft_columns"] = (self.weight.outputs - rows, columns)
            shapes["rocoft_column_indices"] = (columns,)
        return shapes


def target_names(config: RoCoFTConfig, model: nn.Module) -> list[str] | str:
    """Return `target_modules` with None and shorthands expanded.

    Args:
        config: The configuration.
        model: The model.

    Returns:
        Names of modules or their ends, or a regular expression.

    Raises:
        SelectionError: If none of the default modules is in `layers_to_transform`.
    """
    given = config.target_modules
    if given is None and config.indices is not None:
        return list(config.indices)
    if given is None or given == EVERY_LINEAR:
        architecture = Architecture(model)
        weights = architecture.linear_weights if given else architecture.targets
        names = [_original(weight.module) for weight in weights.values()]
        names = [name for name in names if _unsupported(model, name) is None]
        if given is None and config.layers_to_transform is not None:
            names = [n for n in names if _in_layers(config, n, architecture)]
            if not names:
                raise SelectionError(
                    f"layers_to_transform={config.layers_to_transform!r} (layers_"
                    f"pattern={config.layers_pattern!r}) matches no transformer block "
                    f"of {type(model).__name__}. Count from 0."
                )
        return names
    if isinstance(given, str):
        expanded: Any = _maybe_include_all_linear_layers(replace(config), model)
        return expanded.target_modules
    return list(given)


def selected(
    config: RoCoFTConfig,
    model: nn.Module,
    statistics: Mapping[str, Statistics] | None = None,
    modules: set[str] | None = None,
) -> dict[str, Selected]:
    """Return the selected rows and columns, by name of the module.

    Args:
        config: The configuration.
        model: The model; it is not changed.
        statistics: Statistics by module, for strategies that need examples.
        modules: Names of modules, in place of the configuration's.

    Returns:
        The selections, in the model's order; empty if no module matches.

    Raises:
        SelectionError: If a module is not supported, or a selection is impossible.
    """
    selections = {}
    for name, weight in targeted_weights(config, model, modules).items():
        module = model.get_submodule(name)
        statistic = None if statistics is None else statistics[name]
        selections[name] = _select(config, name, weight, module, model, statistic)
    _check_patterns(config, list(selections))
    check_counts(list(_asked(config, selections)))
    return selections


def targeted_weights(
    config: RoCoFTConfig, model: nn.Module, modules: set[str] | None = None
) -> dict[str, LinearWeight]:
    """Return the weights that a configuration targets, by name of the module.

    Args:
        config: The configuration.
        model: The model; it is not changed.
        modules: Names of modules, in place of the configuration's.

    Returns:
        The weights, in the model's order; empty if no module matches.

    Raises:
        SelectionError: If a module is not supported.
    """
    targeted = {}
    weights = Architecture(model).linear_weights.values()
    known = {_original(weight.module): weight for weight in weights}
    for name, module in _targeted(config, model, modules):
        reason = _unsupported(model, name)
        if reason is not None:
            raise SelectionError(
                f"module {name!r} cannot be targeted: {reason}. RoCoFT trains rows and "
                "columns of nn.Linear, transformers' Conv1D and their quantised "
                "versions. Narrow target_modules, or name it in exclude_modules."
            )
        targeted[name] = _linear_weight(name, module, model, known.get(name))
    return targeted


def parameter_count(config: RoCoFTConfig, model: nn.Module) -> dict[str, int]:
    """Return the number of trained parameters in each module's weight.

    Biases and `modules_to_save` are not counted.

    Args:
        config: The configuration.
        model: The model. It may be without weights (on the meta device), unless the
            strategy scores them.

    Returns:
        Numbers by name of the module.
    """
    selections = selected(config, model)
    return {name: selection.parameters for name, selection in selections.items()}


def _targeted(
    config: RoCoFTConfig, model: nn.Module, modules: set[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the configuration matches by peft's rules."""
    if modules is None:
        config = replace(config)
        config.target_modules = target_names(config, model)
    wrapper = None
    for name, module in model.named_modules():
        if not name or (wrapper is not None and name.startswith(f"{wrapper}.")):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapper = name
        if modules is None:
            matches = check_target_module_exists(config, name)
        else:
            matches = name in modules
        if matches:
            yield name, module


def _select(
    config: RoCoFTConfig,
    name: str,
    weight: LinearWeight,
    module: nn.Module,
    model: nn.Module,
    statistics: Statistics | None,
) -> Selected:
    """Select rows and columns of one module by indices, rule or score."""
    if config.indices is not None:
        return _by_indices(config.indices, name, weight)
    axis = _axis(config, name, weight)
    if config.selection in DATA_STRATEGIES and statistics is None:
        raise SelectionError(
            f"selection={config.selection!r} needs examples to score the weights. "
            "Select with some first: config = rocoft.calibrated(config, model, "
            "batches)."
        )
    values = torch.empty(weight.outputs, weight.inputs, device="meta")
    if config.selection in READS_WEIGHTS:
        stored = base_weight(module, model)
        if stored.is_meta:
            raise SelectionError(
                f"selection={config.selection!r} scores the weights, but {name!r} has "
                "none (meta device). Load them, choose 'first' or 'random', or give "
                "indices."
            )
        values = (stored if weight.output_dim == 0 else stored.t()).float()
    indices = {
        one_axis: _indices(config, name, weight, values, one_axis, statistics)
        for one_axis in _AXES[axis]
    }
    return Selected(weight, indices.get("row", ()), indices.get("column", ()))


def _indices(
    config: RoCoFTConfig,
    name: str,
    weight: LinearWeight,
    values: Tensor,
    axis: Axis,
    statistics: Statistics | None,
) -> tuple[int, ...]:
    parts = weight.parts if axis == "row" else (tuple(range(weight.inputs)),)
    counts = [_count(config, name, len(part)) for part in parts]
    statistic = None if statistics is None else statistics[axis]
    if statistic is not None and not values.is_meta:
        statistic = statistic.to(values.device)
    return select_each(
        *(weight, values, axis, counts),
        cast(Strategy, config.selection),
        seed=config.seed,
        statistics=statistic,
    )


def _count(config: RoCoFTConfig, name: str, available: int) -> int:
    pattern = get_pattern_key(list(config.rank_pattern), name)
    if pattern in config.rank_pattern:
        return config.rank_pattern[pattern]
    if config.fraction is not None:
        return max(1, round(config.fraction * available))
    return config.r


def _asked(
    config: RoCoFTConfig, selections: Mapping[str, Selected]
) -> Iterator[tuple[LinearWeight, Axis, int]]:
    """Yield how many rows and columns of each weight the configuration asks for."""
    if config.indices is not None:
        return
    for name, selection in selections.items():
        weight = selection.weight
        if selection.rows:
            yield weight, "row", _count(config, name, min(map(len, weight.parts)))
        if selection.columns:
            yield weight, "column", _count(config, name, weight.inputs)


def _axis(config: RoCoFTConfig, name: str, weight: LinearWeight) -> str:
    axis = config.axis
    if not isinstance(axis, str):
        pattern = get_pattern_key(list(axis), name)
        if pattern not in axis:
            raise SelectionError(
                f"axis={axis!r} has no pattern for module {name!r}. Add one that "
                "matches the end of its name, or '.*' as the last one for all others."
            )
        axis = axis[pattern]
    if axis == "auto":
        return weight.narrow_axis
    return axis


def _by_indices(
    indices: Mapping[str, Mapping[str, list[int]]], name: str, weight: LinearWeight
) -> Selected:
    if name not in indices:
        raise SelectionError(
            f"indices name no rows or columns of the targeted module {name!r}, only of "
            f"{len(indices)} others. Add it, or leave target_modules out to target "
            "only those."
        )
    rows, columns = indices[name].get("rows", []), indices[name].get("columns", [])
    sides = (("rows", rows, weight.outputs), ("columns", columns, weight.inputs))
    for side, chosen, available in sides:
        if max(chosen, default=0) >= available:
            raise SelectionError(
                f"indices[{name!r}][{side!r}] goes up to {max(chosen)}, but the module "
                f"has {available} {side}, counted from 0. Are the indices those of "
                "another model?"
            )
    return Selected(weight, tuple(rows), tuple(columns))


def _check_patterns(config: RoCoFTConfig, names: list[str]) -> None:
    maps = {"rank_pattern": list(config.rank_pattern)}
    if not isinstance(config.axis, str):
        maps["axis"] = list(config.axis)
    for field, patterns in maps.items():
        for pattern in patterns if names else []:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise SelectionError(
                    f"{field} pattern {pattern!r} matches the end of none of the "
                    f"{len(names)} targeted modules, such as {names[0]!r}."
                )


def _linear_weight(
    name: str, module: nn.Module, model: nn.Module, known: LinearWeight | None
) -> LinearWeight:
    """Return the description of a module's weight, also if it is quantised."""
    layer = _base(module)
    inputs, outputs = _get_in_out_features(layer)
    assert inputs is not None
    assert outputs is not None
    if known is not None and (known.outputs, known.inputs) == (outputs, inputs):
        return replace(known, name=_original(known.name), module=name)
    # Quantised weights are stored in another shape, which `Architecture` cannot read.
    config = getattr(model, "config", None)
    parts = fused_parts(name, layer, config, outputs)
    dimension = 1 if isinstance(layer, Conv1D) else 0
    return LinearWeight(f"{name}.weight", name, outputs, inputs, dimension, parts)


def adaptable(model: nn.Module, name: str) -> bool:
    """Return whether RoCoFT can adapt the weight of a module, given by its name."""
    return _unsupported(model, _original(name)) is None


def _unsupported(model: nn.Module, name: str) -> str | None:
    """Return why a module cannot be targeted, or None."""
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"its {type(parent).__name__} reads the weight without calling the layer"
    if isinstance(module, BaseTunerLayer) and not hasattr(module, "rocoft_rows"):
        return f"another peft method has adapted it ({type(module).__name__})"
    layer = _base(module)
    if isinstance(layer, nn.Linear | Conv1D):
        return None
    backend = resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    if backend is not None and backend.layer_type == "linear":
        return None
    return f"it is a {type(layer).__name__}"


def _in_layers(config: RoCoFTConfig, name: str, architecture: Architecture) -> bool:
    layers = config.layers_to_transform
    block = architecture.block(name)
    patterns = config.layers_pattern or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        block = int(match[1]) if match else None
        if match:
            break
    return block in ([layers] if isinstance(layers, int) else layers or [])


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _original(name: str) -> str:
    """Return a name without peft's wrapper of the layer."""
    return name.replace(".base_layer", "")
