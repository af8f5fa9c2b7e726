"""Spaces resolved on a model, many of them kept as long as the model has not changed.

Resolving thirty spaces anew takes as long as a pass over a few sentences. What depends
on the values of the weights, such as their largest rows, is always resolved anew.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from ntk.maps import Maps
from ntk.spaces import Space
from rocoft.architecture import Architecture

KEPT = 256
"""Spaces of a model that are kept, those used last."""

_kept: WeakKeyDictionary[nn.Module, tuple[object, dict[Space, Maps]]] = (
    WeakKeyDictionary()
)


def resolve(spaces: Mapping[str, Space], model: nn.Module) -> dict[str, Maps]:
    """Resolve spaces on a model.

    Args:
        spaces: Tangent spaces by name.
        model: The model.

    Returns:
        For each space the maps of every parameter that it touches.
    """
    signature = _signature(model)
    last, known = _kept.get(model, (None, {}))
    if last != signature:
        known = {}
    architecture: Architecture | None = None
    found: dict[str, Maps] = {}
    for name, space in spaces.items():
        maps = known.pop(space, None) if space.lasting else None
        if maps is None:
            architecture = architecture or Architecture(model)
            maps = space.maps(architecture)
        if space.lasting:
            known[space] = maps
        found[name] = maps
    for space in list(known)[:-KEPT]:
        del known[space]
    _kept[model] = (signature, known)
    return found


def _signature(model: nn.Module) -> object:
    """Return what selections depend on but for the values of the weights."""
    return [
        (path, type(module), [_described(p) for p in module._parameters.items()])
        for path, module in model.named_modules()
    ]


def _described(own: tuple[str, nn.Parameter | None]) -> object:
    name, parameter = own
    if parameter is None:
        return name
    return name, id(parameter), parameter.shape, parameter.requires_grad
