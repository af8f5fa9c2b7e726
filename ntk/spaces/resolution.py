"""Spaces resolved on a model, cached as long as the model has not changed.

Resolving thirty spaces takes as long as a pass over a few sentences. Spaces that depend
on the values of the weights, such as the largest rows, are not cached.
"""

import warnings
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from ntk.spaces.kinds import Space
from ntk.spaces.maps import Maps
from rocoft.models import Architecture

KEPT = 256
"""Maximum number of cached spaces per model, the most recently used ones."""

_kept: WeakKeyDictionary[nn.Module, tuple[object, dict[Space, Maps]]] = (
    WeakKeyDictionary()
)


def resolve(spaces: Mapping[str, Space], model: nn.Module) -> dict[str, Maps]:
    """Resolve spaces on a model.

    Args:
        spaces: Tangent spaces by name.
        model: The model.

    Returns:
        For each space the maps of every parameter that it selects.

    Warns:
        UserWarning: If a selection of rows, columns or LoRA leaves out matrices of the
            blocks that are no linear layers, such as fused experts.
    """
    signature = _signature(model)
    last, cached = _kept.get(model, (None, {}))
    if last != signature:
        cached = {}
    architecture: Architecture | None = None
    resolved: dict[str, Maps] = {}
    for name, space in spaces.items():
        maps = cached.pop(space, None) if space.lasting else None
        if maps is None:
            architecture = architecture or Architecture(model)
            maps = space.maps(architecture)
            note = architecture.left_out(architecture.targets)
            if note is not None and space.of_linear:
                warnings.warn(f"space {space.name!r} is not all: {note}.", stacklevel=2)
        if space.lasting:
            cached[space] = maps
        resolved[name] = maps
    for space in list(cached)[:-KEPT]:
        del cached[space]
    _kept[model] = (signature, cached)
    return resolved


def _signature(model: nn.Module) -> object:
    """Return all that selections depend on except the values of the weights."""
    return [
        (path, type(module), [_described(*item) for item in module._parameters.items()])
        for path, module in model.named_modules()
    ]


def _described(name: str, parameter: nn.Parameter | None) -> object:
    if parameter is None:
        return name
    return name, id(parameter), parameter.shape, parameter.requires_grad
