"""Splits a computation into passes that fit into memory.

Until they are contracted, a pass keeps features of every selected row and column, and
factors of whole weights, of all examples. Kernels are sums over parameters and maps, so
each pass can serve some of them, for all spaces, and the passes' kernels add up. The
memory that a pass needs is known before it is run.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ntk.gradients import Batch, NetworkFunction, batch_length, evaluating, take
from ntk.kernels import (
    LEFT_BYTES,
    Engine,
    EngineInput,
    KernelOptions,
    KernelResult,
    compute,
    reader,
    shared_features,
)
from ntk.scale.work import Work
from ntk.spaces import Map, Maps, Pinned, Whole
from rocoft.commands import Progress
from rocoft.models import Architecture, LinearWeight

Item = TypeVar("Item", bound=Hashable)
ENTRY = 4
"""Bytes of one stored number, in float32."""


@dataclass(frozen=True)
class PassSize:
    """The size of a pass: examples, positions and outputs.

    Attributes:
        examples: n.
        positions: Number of positions of all examples, padding included.
        outputs: Number of functions that are differentiated; c - 1 for contrasts.
    """

    examples: int
    positions: int
    outputs: int

    @classmethod
    def of(
        cls, model: nn.Module, batches: Sequence[Batch], options: KernelOptions
    ) -> "PassSize":
        """Return the size of a pass over batches; runs the model on one example.

        Args:
            model: The model.
            batches: The examples.
            options: How kernels are computed.

        Returns:
            The size.
        """
        with evaluating(model), torch.no_grad():
            function = NetworkFunction(model, reader(options))
            outputs = function(take(batches[0], slice(0, 1))).shape[1]
        return cls(
            sum(map(batch_length, batches)), sum(map(count_positions, batches)), outputs
        )

    def features(self, numbers: int) -> int:
        """Return the entries of some number of features per example and output."""
        return self.outputs * self.examples * numbers

    def factors(self, inputs: int, outputs: int) -> int:
        """Return the entries of the factors of a layer of some width."""
        return self.positions * (inputs + self.outputs * outputs)


@dataclass(frozen=True)
class Chunk:
    """The parameters and maps of one pass, or of one stage of a spilled pass.

    Attributes:
        spaces: The maps of the chunk for each space that it contributes to.
        entries: Entries of the features and factors that it keeps.
    """

    spaces: Mapping[str, Maps]
    entries: int


def compute_chunk(
    work: Work,
    chunk: Chunk,
    order: Sequence[int],
    right: int,
    *,
    engine: Callable[[EngineInput], Engine] = Engine,
    left_bytes: int = LEFT_BYTES,
    sample: Batch | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute one chunk's contribution to the kernels.

    Args:
        work: The kernels to compute.
        chunk: The parameters and maps to serve.
        order: Indices of the left batches, the right ones first.
        right: Number of right batches, from the first in this order.
        engine: Constructor of the engine that computes it.
        left_bytes: Memory for features and factors of a group of left examples, in
            bytes.
        sample: Examples on which it is determined how parameters are served.
        progress: Called as the work goes on.

    Returns:
        The contribution to the kernel of each space of the chunk.
    """
    return compute(
        work.model,
        [work.batches[i] for i in order],
        right,
        spaces={n: Pinned(work.spaces[n], maps) for n, maps in chunk.spaces.items()},
        options=work.options,
        engine=engine,
        left_bytes=left_bytes,
        sample=sample,
        progress=progress,
    )


def add(total: KernelResult, part: KernelResult) -> None:
    """Add the kernels, sizes and traces of one part to the sums so far.

    Args:
        total: The sums; changed in place.
        part: The result of another part.
    """
    for name, kernel in part.kernels.items():
        if name in total.kernels:
            total.kernels[name] += kernel.to(total.kernels[name].device)
        else:
            total.kernels[name] = kernel
        total.sizes[name] = total.sizes.get(name, 0) + part.sizes[name]
        traces = total.traces.setdefault(name, {})
        for parameter, trace in part.traces.get(name, {}).items():
            traces[parameter] = traces.get(parameter, 0.0) + trace
    total.services |= part.services


def packed(sizes: Mapping[Item, int], most: int) -> list[list[Item]]:
    """Split items, in order, into groups of limited total size.

    Args:
        sizes: The size of each item. An item larger than ``most`` is its own group.
        most: Largest total size of a group.

    Returns:
        The groups.
    """
    groups: list[list[Item]] = []
    room = 0
    for item, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(item)
        room -= size
    return groups


def _entries(
    stored: Map, shape: torch.Size, weight: LinearWeight | None, size: PassSize
) -> int:
    """Return the entries that a pass keeps for one stored map of a parameter."""
    if not isinstance(stored, Whole) or len(shape) < 2:
        return size.features(stored.size(shape))
    if weight is not None:
        return size.factors(weight.inputs, weight.outputs)
    return size.factors(0, shape.numel() // shape[0])


@dataclass(frozen=True)
class _Parameter:
    """A parameter, its linear weight if it is one, and its maps with their spaces."""

    name: str
    shape: torch.Size
    weight: LinearWeight | None
    spaces_of: Mapping[Map, Sequence[str]]

    def entries(self, maps: Sequence[Map], size: PassSize) -> int:
        """Return the entries that a pass keeps to serve some of the maps."""
        spaces: dict[str, Maps] = {
            str(i): {self.name: (map_,)} for i, map_ in enumerate(maps)
        }
        return sum(
            _entries(shared.stored, self.shape, self.weight, size)
            for shared in shared_features(spaces)
        )

    def cut(
        self, maps: Sequence[Map], size: PassSize, limit: int
    ) -> Iterator[tuple[Sequence[Map], int]]:
        """Halve maps until each part fits a pass; yield parts and their entries."""
        entries = self.entries(maps, size)
        if entries <= limit or len(maps) == 1:
            yield maps, entries
            return
        middle = len(maps) // 2
        for half in (maps[:middle], maps[middle:]):
            yield from self.cut(half, size, limit)


def chunks(
    resolved: Mapping[str, Maps],
    architecture: Architecture,
    size: PassSize,
    entries: int,
) -> list[Chunk]:
    """Split resolved spaces into chunks whose kernels add up to the spaces' kernels.

    Args:
        resolved: The maps of every space.
        architecture: The architecture of the model.
        size: The size of a pass over the examples.
        entries: Largest number of entries that a pass keeps; contracting them takes
            about as many again. A single larger map is a chunk of its own.

    Returns:
        The chunks, parameters in the order of the spaces.
    """
    holders: dict[str, dict[Map, list[str]]] = {}
    for space, maps in resolved.items():
        for name, held in maps.items():
            for map_ in held:
                holders.setdefault(name, {}).setdefault(map_, []).append(space)
    pieces: dict[tuple[str, int], tuple[_Parameter, Sequence[Map]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for name, spaces_of in holders.items():
        shape = architecture.parameters[name].shape
        weight = architecture.linear_weights.get(name)
        parameter = _Parameter(name, shape, weight, spaces_of)
        parts = parameter.cut(list(spaces_of), size, entries)
        for number, (part, kept) in enumerate(parts):
            pieces[name, number] = parameter, part
            sizes[name, number] = kept
    cut = []
    for group in packed(sizes, entries):
        chunk: dict[str, Maps] = {}
        for parameter, part in (pieces[key] for key in group):
            for map_ in part:
                for space in parameter.spaces_of[map_]:
                    of_space = chunk.setdefault(space, {})
                    so_far = of_space.get(parameter.name, ())
                    of_space[parameter.name] = (*so_far, map_)
        cut.append(Chunk(chunk, sum(sizes[key] for key in group)))
    return cut


def rounded_down(amount: int) -> int:
    """Return the largest 4, 5, 6 or 7 times a power of two up to an amount, or 0.

    Args:
        amount: Memory in bytes, whose small changes should change no plan.
    """
    if amount < 4:
        return max(amount, 0)
    step = 1 << (amount.bit_length() - 3)
    return amount // step * step


def kept_bytes(
    parts: Sequence[Chunk], architecture: Architecture, size: PassSize
) -> int:
    """Return the bytes that one pass keeps to serve several chunks.

    Args:
        parts: The chunks.
        architecture: The architecture of the model.
        size: The size of the pass.
    """
    by_key = {
        shared.key: shared for part in parts for shared in shared_features(part.spaces)
    }
    return ENTRY * sum(
        _entries(
            shared.stored,
            architecture.parameters[shared.name].shape,
            architecture.linear_weights.get(shared.name),
            size,
        )
        for shared in by_key.values()
    )


def count_positions(batch: Batch) -> int:
    """Return the number of positions: tokens, or feature vectors.

    Args:
        batch: The examples.
    """
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    return max(
        t.numel() // t.shape[-1] if t.is_floating_point() else t.numel()
        for t in tensors
    )
