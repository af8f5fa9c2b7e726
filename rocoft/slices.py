"""The rows and columns that a configuration selects in each module of a model.

Nothing here changes the model, and only the strategies that score weights read them:
parameters can be counted on a model without weights (on the meta device).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
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

from rocoft.architecture import (
    Architecture,
    LinearWeight,
    SelectionError,
    fused_parts,
)
from rocoft.config import EVERY_LINEAR, RoCoFTConfig
from rocoft.selection import DATA_STRATEGIES, Axis, Strategy, select

READS_WEIGHTS = ("max", "min", "mixed", "activation")
Statistics = Mapping[Axis, Tensor]
"""Of one module: what `selection.select` takes, for rows and for columns."""

_SIDES: dict[str, tuple[Axis, ...]] = {
    "row": ("row",),
    "column": ("column",),
    "both": ("row", "column"),
}


@dataclass(frozen=True)
class Selected:
    """What is trained of one module.

    Attributes:
        weight: The module's weight.
        rows: Output features, ascending.
        columns: Input features, ascending.
    """

    weight: LinearWeight
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers are trained; a crossing of row and column counts once."""
        crossed = self.weight.outputs - len(self.rows)
        return len(self.rows) * self.weight.inputs + len(self.columns) * crossed

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a layer keeps of it, by name of the layer's attribute."""
        rows, columns = len(self.rows), len(self.columns)
        kept: dict[str, tuple[int, ...]] = {}
        if rows:
            kept["rocoft_rows"] = (rows, self.weight.inputs)
            kept["rocoft_row_indices"] = (rows,)
        if columns:
            kept["rocoft_columns"] = (self.weight.outputs - rows, columns)
            kept["rocoft_column_indices"] = (columns,)
        return kept


def target_names(config: RoCoFTConfig, model: nn.Module) -> list[str] | str:
    """Return `target_modules` with None and the shorthands written out.

    Args:
        config: The configuration.
        model: The model that it is for.

    Returns:
        Names of modules or their ends, or a regular expression.

    Raises:
        SelectionError: If `layers_to_transform` leaves nothing of the default.
    """
    given = config.target_modules
    if given is None and config.indices is not None:
        return list(config.indices)
    if given is None or given == EVERY_LINEAR:
        architecture = Architecture(model)
        every = given == EVERY_LINEAR
        weights = architecture.linear_weights if every else architecture.targets
        names = [
            _plain(weight.module)
            for weight in weights.values()
            if _unsupported(model, _plain(weight.module)) is None
        ]
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
    """Return what a configuration selects of a model, by name of the module.

    Args:
        config: The configuration.
        model: The model; it is not changed.
        statistics: Scores by module for the strategies that need examples.
        modules: The modules to take, in place of the configuration's.

    Returns:
        The selections, in the model's order; empty if no module is matched.

    Raises:
        SelectionError: If a module cannot be served or a selection cannot be made.
    """
    found = {}
    for name, weight in targeted_weights(config, model, modules).items():
        module = model.get_submodule(name)
        statistic = None if statistics is None else statistics[name]
        found[name] = _select(config, name, weight, module, model, statistic)
    _check_patterns(config, list(found))
    return found


def targeted_weights(
    config: RoCoFTConfig, model: nn.Module, modules: set[str] | None = None
) -> dict[str, LinearWeight]:
    """Return the weights that a configuration targets, by name of the module.

    Args:
        config: The configuration.
        model: The model; it is not changed.
        modules: The modules to take, in place of the configuration's.

    Returns:
        The weights, in the model's order; empty if no module is matched.

    Raises:
        SelectionError: If a module cannot be served.
    """
    found = {}
    architecture = Architecture(model)
    weights = {_plain(w.module): w for w in architecture.linear_weights.values()}
    for name, module in _targeted(config, model, modules):
        reason = _unsupported(model, name)
        if reason is not None:
            raise SelectionError(
                f"module {name!r} cannot be targeted: {reason}. RoCoFT trains rows and "
                "columns of nn.Linear, transformers' Conv1D and their quantised kinds. "
                "Narrow target_modules, or name it in exclude_modules."
            )
        found[name] = _described(name, module, model, weights.get(name))
    return found


def parameter_count(config: RoCoFTConfig, model: nn.Module) -> dict[str, int]:
    """Return how many numbers of each module's weight a configuration trains.

    Biases and `modules_to_save` are not counted.

    Args:
        config: The configuration.
        model: The model; one without weights (meta device) will do, unless the
            strategy scores them.

    Returns:
        Numbers by name of the module.
    """
    return {name: of.parameters for name, of in selected(config, model).items()}


def base_weight(module: nn.Module, model: nn.Module) -> Tensor:
    """Return a linear layer's weight as it is stored, dequantised if need be.

    Args:
        module: The layer.
        model: The model that it lies in, which knows how it was quantised.

    Returns:
        ``(outputs, inputs)``, or ``(inputs, outputs)`` of a `Conv1D`.
    """
    module = _base(module)
    options = get_quantization_kwargs(model)
    backend = resolve_quantization_backend(module, **options)
    if backend is not None:
        return backend.get_base_weight(module).detach()
    assert isinstance(module.weight, Tensor)
    return module.weight.detach()


def _targeted(
    config: RoCoFTConfig, model: nn.Module, modules: set[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that the configuration matches, as peft matches them."""
    if modules is None:
        config = replace(config)
        config.target_modules = target_names(config, model)
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in inside[-1:]):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(name)
        wanted = (
            check_target_module_exists(config, name)
            if modules is None
            else name in modules
        )
        if wanted:
            yield name, module


def _select(
    config: RoCoFTConfig,
    name: str,
    weight: LinearWeight,
    module: nn.Module,
    model: nn.Module,
    statistics: Statistics | None,
) -> Selected:
    """Select of one module by index, rule or score."""
    if config.indices is not None:
        return _given(config.indices, name, weight)
    axis = _axis(config, name, weight)
    if config.selection in DATA_STRATEGIES and statistics is None:
        raise SelectionError(
            f"selection={config.selection!r} needs examples to score the weights. "
            "Choose on some first: config = rocoft.calibrated(config, model, batches)."
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
    chosen = {
        side: _indices(config, name, weight, values, side, statistics)
        for side in _SIDES[axis]
    }
    return Selected(weight, chosen.get("row", ()), chosen.get("column", ()))


def _indices(
    config: RoCoFTConfig,
    name: str,
    weight: LinearWeight,
    values: Tensor,
    side: Axis,
    statistics: Statistics | None,
) -> tuple[int, ...]:
    parts = weight.parts if side == "row" else (tuple(range(weight.inputs)),)
    counts = [_count(config, name, len(part)) for part in parts]
    statistic = None if statistics is None else statistics[side]
    if statistic is not None and not values.is_meta:
        statistic = statistic.to(values.device)
    choose = partial(
        select,
        values=values,
        axis=side,
        strategy=cast(Strategy, config.selection),
        seed=config.seed,
        statistics=statistic,
    )
    if len(set(counts)) == 1:
        return choose(weight, count=counts[0])
    # A share of queries, keys and values is not the same number where heads share keys.
    chosen: list[int] = []
    for part, count in zip(parts, counts, strict=True):
        chosen += choose(replace(weight, parts=(part,)), count=count)
    return tuple(sorted(chosen))


def _count(config: RoCoFTConfig, name: str, available: int) -> int:
    pattern = get_pattern_key(list(config.rank_pattern), name)
    if pattern in config.rank_pattern:
        return config.rank_pattern[pattern]
    if config.fraction is not None:
        return max(1, round(config.fraction * available))
    return config.r


def _axis(config: RoCoFTConfig, name: str, weight: LinearWeight) -> str:
    axis = config.axis
    if not isinstance(axis, str):
        pattern = get_pattern_key(list(axis), name)
        if pattern not in axis:
            raise SelectionError(
                f"axis={axis!r} says nothing of module {name!r}. Add a pattern that "
                "fits the end of its name, or '.*' as the last one for all others."
            )
        axis = axis[pattern]
    if axis == "auto":
        return weight.narrow_axis
    return axis


def _given(
    indices: Mapping[str, Mapping[str, list[int]]], name: str, weight: LinearWeight
) -> Selected:
    if name not in indices:
        raise SelectionError(
            f"indices name no rows or columns of the targeted module {name!r}, only of "
            f"{len(indices)} others. Add it, or leave target_modules out to target "
            "just those."
        )
    rows, columns = indices[name].get("rows", []), indices[name].get("columns", [])
    sides = (("rows", rows, weight.outputs), ("columns", columns, weight.inputs))
    for side, chosen, available in sides:
        if max(chosen, default=0) >= available:
            raise SelectionError(
                f"indices[{name!r}][{side!r}] goes up to {max(chosen)}, but the module "
                f"has {available} {side}, counted from 0. Are they of another model?"
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
                    f"{field} pattern {pattern!r} fits the end of none of the "
                    f"{len(names)} targeted modules, such as {names[0]!r}."
                )


def _described(
    name: str, module: nn.Module, model: nn.Module, known: LinearWeight | None
) -> LinearWeight:
    """Return what is known of a module's weight, whatever it is stored as."""
    layer = _base(module)
    inputs, outputs = _get_in_out_features(layer)
    assert inputs is not None
    assert outputs is not None
    if known is not None and (known.outputs, known.inputs) == (outputs, inputs):
        return replace(known, name=_plain(known.name), module=name)
    # The stored shape of a quantised weight says nothing, so its parts are found here.
    config = getattr(model, "config", None)
    parts = fused_parts(name, layer, config, outputs)
    dimension = 1 if isinstance(layer, Conv1D) else 0
    return LinearWeight(f"{name}.weight", name, outputs, inputs, dimension, parts)


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
    wanted = config.layers_to_transform
    block = architecture.block(name)
    patterns = config.layers_pattern or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        block = int(match[1]) if match else None
        if match:
            break
    return block in ([wanted] if isinstance(wanted, int) else wanted or [])


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _plain(name: str) -> str:
    """Return a name as it was before peft wrapped the layer."""
    return name.replace(".base_layer", "")
