"""Kernels layer by layer, or by kind of module, from the passes of one kernel.

A kernel is a sum over parameters, so that of a model is the sum of those of its layers:
K = K_1 + ... + K_L, and the kernel K_S of tuning some of them is the sum over S. A
parameter belongs to one layer, so it is contracted once, as for K alone.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ntk.evolution import Pinned
from ntk.function import Inputs, Readout
from ntk.kernel import Kind, Reduction, compute, gram_matrix
from ntk.maps import Maps
from ntk.resolution import resolve
from ntk.spaces import Full, Space
from ntk.spectrum import PSD_TOLERANCE, Array, as_symmetric
from rocoft.architecture import Architecture, SelectionError
from rocoft.console import Progress

__all__ = [
    "Grouping",
    "LayerKernel",
    "combined",
    "gram_matrices",
    "layer_kernels",
    "layer_spaces",
    "trace_shares",
]

Grouping = Literal["layer", "kind", "module"]
"""A group for each transformer block; for each kind of module, whatever its block; or
for each module."""


@dataclass(frozen=True, eq=False)
class LayerKernel:
    """What one layer adds to a kernel.

    Attributes:
        kernel: ``(n, m, c, d)``, or ``(n, m)`` if reduced, in float64.
        parameters: The number of coordinates of the tangent space in the layer.
    """

    kernel: Tensor
    parameters: int


def layer_spaces(
    model: nn.Module, space: Space | None = None, *, by: Grouping = "layer"
) -> dict[str, Space]:
    """Part a tangent space into those of layers.

    Args:
        model: The model.
        space: Any tangent space; `Full()` if not given.
        by: What makes a group. For ``"layer"`` they are called by the blocks' numbers,
            "0", "1", ..., and what lies in no block is in "embeddings" (tables, and all
            before the first block), "head" or "other"; for ``"kind"`` by the modules'
            paths within a block, such as "attention.self.query", and else in the model;
            for ``"module"`` by both, "0.attention.self.query". An adapter is in the
            group of the module that it adapts.

    Returns:
        The spaces in the order of the model's parameters. Every parameter and map of
        the space is in one of them, so their kernels add up to that of the space.

    Raises:
        ValueError: If there is no such grouping.
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
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerKernel]:
    """Return the kernels of all layers, from the passes of one.

    Args:
        model: As in `ntk.kernel.empirical_ntk`.
        inputs: n examples, as there.
        other: m examples, as there.
        space: Any tangent space; `Full()` if not given.
        by: As in `layer_spaces`.
        outputs: As in `empirical_ntk`.
        reduce: As in `empirical_ntk`.
        kind: As in `empirical_ntk`.
        batch_size: As in `empirical_ntk`.
        progress: As in `ntk.kernel.compute`.

    Returns:
        For each layer its kernel; they add up to that of the space, see `combined`.
    """
    spaces = layer_spaces(model, space, by=by)
    result = compute(
        model,
        inputs,
        other,
        spaces=spaces,
        outputs=outputs,
        reduce=reduce,
        kind=kind,
        batch_size=batch_size,
        progress=progress,
    )
    return {n: LayerKernel(result.kernels[n], result.sizes[n]) for n in spaces}


def combined(
    layers: Mapping[str, LayerKernel], chosen: Collection[str] | None = None
) -> Tensor:
    """Return the kernel of tuning several layers, the sum of theirs.

    Args:
        layers: Kernels by layer.
        chosen: Names of different layers; all if not given.

    Returns:
        Of the shape of one.

    Raises:
        SelectionError: If a name is none of a layer, is repeated, or none is given.
    """
    names = list(layers) if chosen is None else list(chosen)
    if not names or len(set(names)) != len(names) or not set(names) <= layers.keys():
        raise SelectionError(
            f"layers={names} must be different ones, at least one, of "
            f"{', '.join(layers)}."
        )
    return torch.stack([layers[name].kernel for name in names]).sum(0)


def trace_shares(layers: Mapping[str, LayerKernel]) -> dict[str, float]:
    """Return each layer's share of the trace of the whole kernel; they add up to 1.

    Args:
        layers: Kernels by layer, of examples with themselves.

    Raises:
        ValueError: If a kernel is not square, or the whole one has no trace.
    """
    grams = gram_matrices(layers)
    traces = {name: float(np.trace(gram)) for name, gram in grams.items()}
    if not (total := sum(traces.values())) > 0:
        raise ValueError(
            f"the kernels of layers={list(layers)} have trace {total:.2e}; expected "
            "above 0. Check that the space holds parameters that reach the output."
        )
    return {name: trace / total for name, trace in traces.items()}


def gram_matrices(layers: Mapping[str, LayerKernel]) -> dict[str, Array]:
    """Return the layers' Gram matrices, ``(k, k)`` in float64 on the CPU.

    Args:
        layers: Kernels by layer, of examples with themselves.

    Raises:
        ValueError: If there are none, or they are not symmetric matrices of one size.
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
    """Return the groups of the parameters that lie in no block."""
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
    """Return the group of a parameter, in a block or by module."""
    block = architecture.block(name)
    if by == "layer":
        return str(block)
    path = _module_path(architecture, name)
    return path if by == "kind" or block is None else f"{block}.{path}"


def _module_path(architecture: Architecture, name: str) -> str:
    """Return the path of the parameter's module, from its block if it is in one.

    It ends at a module that an adapter wraps, and is the parameter's own name where the
    block or the model holds it itself.
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
