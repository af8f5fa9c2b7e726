"""Kernels of layers, or of kinds of module, at the cost of one kernel.

A kernel is a sum over parameters, so a model's kernel is the sum of its layers'
kernels, K = K_1 + ... + K_L, and the kernel K_S of tuning a set S of layers is the sum
over S. Each parameter belongs to one layer and is contracted once, as for K alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ntk.gradients import Inputs
from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.measures import PSD_TOLERANCE, Array, as_symmetric, gram_matrix
from ntk.spaces import Full, Maps, Pinned, Space, resolve
from rocoft.commands import Progress
from rocoft.models import Architecture, SelectionError

__all__ = [
    "Grouping",
    "LayerKernel",
    "combined",
    "gram_matrices",
    "layer_kernels",
    "layer_spaces",
]

Grouping = Literal["layer", "kind", "module"]
"""One group per transformer block, per kind of module across blocks, or per module."""


@dataclass(frozen=True, eq=False)
class LayerKernel:
    """The kernel of one layer's parameters.

    Attributes:
        kernel: ``(n, m, c, d)``, or ``(n, m)`` if reduced, in float64.
        parameters: Number of coordinates of the tangent space in the layer.
    """

    kernel: Tensor
    parameters: int


def layer_spaces(
    model: nn.Module, space: Space | None = None, *, by: Grouping = "layer"
) -> dict[str, Space]:
    """Split a tangent space by layers.

    Args:
        model: The model.
        space: Any tangent space; None means `Full()`.
        by: The grouping. ``"layer"``: groups are named by block number, "0", "1", ...;
            parameters outside all blocks are in "embeddings" (tables, and everything
            before the first block), "head" or "other". ``"kind"``: by the module's path
            within its block, such as "attention.self.query", or else in the model.
            ``"module"``: by both, "0.attention.self.query". An adapter belongs to the
            module that it adapts.

    Returns:
        The spaces, in the order of the model's parameters. Each parameter and map of
        the space is in exactly one of them, so their kernels add up to the space's
        kernel.

    Raises:
        ValueError: If ``by`` is not a grouping.
    """
    if by not in get_args(Grouping):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(Grouping))}.")
    space = space or Full()
    maps = resolve({"": space}, model)[""]
    architecture = Architecture(model)
    group_of = _outside(architecture) if by == "layer" else {}
    groups: dict[str, Maps] = {}
    for name in architecture.parameters:
        if name in maps:
            group = group_of.get(name) or _group(architecture, name, by)
            groups.setdefault(group, {})[name] = maps[name]
    return {group: Pinned(space, chosen) for group, chosen in groups.items()}


def layer_kernels(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space | None = None,
    by: Grouping = "layer",
    options: KernelOptions = KernelOptions(),
    progress: Progress | None = None,
) -> dict[str, LayerKernel]:
    """Return the kernels of all layers, at the cost of one kernel.

    Args:
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples.
        other: m examples; None means ``inputs``.
        space: Any tangent space; None means `Full()`.
        by: The grouping, ``"layer"``, ``"module"`` or ``"kind"``, see `layer_spaces`.
        options: How kernels are computed.
        progress: Called as the work goes on.

    Returns:
        The kernel of each layer; their sum is the space's kernel, see `combined`.
    """
    spaces = layer_spaces(model, space, by=by)
    result = compute(
        model,
        inputs,
        other,
        spaces=spaces,
        options=options,
        progress=progress,
    )
    return {n: LayerKernel(result.kernels[n], result.sizes[n]) for n in spaces}


def combined(
    layers: Mapping[str, LayerKernel], chosen: Collection[str] | None = None
) -> Tensor:
    """Return the kernel of tuning several layers, the sum of their kernels.

    Args:
        layers: Kernels by layer.
        chosen: Names of different layers; None means all.

    Returns:
        The sum, in the shape of one kernel.

    Raises:
        SelectionError: If a name is unknown or repeated, or none is given.
    """
    names = list(layers) if chosen is None else list(chosen)
    if not names or len(set(names)) != len(names) or not set(names) <= layers.keys():
        raise SelectionError(
            f"layers={names} must be different ones, at least one, of "
            f"{', '.join(layers)}."
        )
    return torch.stack([layers[name].kernel for name in names]).sum(0)


def gram_matrices(layers: Mapping[str, LayerKernel]) -> dict[str, Array]:
    """Return the layers' Gram matrices, ``(k, k)`` in float64 on the CPU.

    Args:
        layers: Kernels by layer, with the same examples on both sides.

    Raises:
        ValueError: If there are none, or they are not symmetric and of one size.
    """
    grams = {
        name: as_symmetric(
            gram_matrix(layer.kernel).cpu(), f"layers[{name!r}]", PSD_TOLERANCE
        )
        for name, layer in layers.items()
    }
    if len(shapes := {gram.shape for gram in grams.values()}) != 1:
        raise ValueError(
            f"`layers` has kernels of shapes {sorted(shapes)}; expected at least one, "
            "all of the same examples and outputs."
        )
    return grams


def _outside(architecture: Architecture) -> dict[str, str]:
    """Return the groups of the parameters outside all blocks."""
    blocks = {name: architecture.block(name) for name in architecture.parameters}
    outside = [name for name, block in blocks.items() if block is None]
    inputs = set(architecture.embeddings)
    if len(outside) < len(blocks):
        inputs |= set(takewhile(lambda name: blocks[name] is None, blocks))
    heads = set(architecture.head)
    return {
        name: "head" if name in heads else "embeddings" if name in inputs else "other"
        for name in outside
    }


def _group(architecture: Architecture, name: str, by: Grouping) -> str:
    """Return the group of a parameter: its block, or by its module."""
    block = architecture.block(name)
    if by == "layer":
        return str(block)
    path = _module_path(architecture, name)
    return path if by == "kind" or block is None else f"{block}.{path}"


def _module_path(architecture: Architecture, name: str) -> str:
    """Return the path of the parameter's module, relative to its block if it has one.

    The path ends at a module that an adapter wraps. For a parameter held directly by
    the block or the model, it is the parameter's name.
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts))]
    inside = (
        end for end, p in enumerate(prefixes) if architecture.block(p) is not None
    )
    start = next(inside, 0)
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for end in range(start + 1, len(parts)):
        if isinstance(architecture.model.get_submodule(prefixes[end]), wrappers):
            return ".".join(parts[start:end])
    return ".".join(parts[start:-1]) or parts[-1]
