"""Kernels of many spaces in several passes, where one would not fit into memory.

A pass keeps the features of every selected row and column of all examples, and the
factors of weights that are wanted whole, until they are contracted. Kernels are sums
over parameters and maps, so they can be cut: each pass serves some parameters, for all
spaces, and the passes' kernels add up. What a pass keeps is known before it is run.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from ntk.engine import LEFT_BYTES, KernelResult
from ntk.evolution import Pinned
from ntk.function import Batch, NetworkFunction, batch_length, evaluating, take
from ntk.jobs import jobs
from ntk.kernel import Kind, Reduction, compute
from ntk.maps import Map, Maps, Whole
from ntk.precision import Precision
from ntk.processes import Processes
from ntk.resolution import resolve
from ntk.spaces import Space
from ntk.spilling import Spilled
from rocoft.architecture import Architecture, LinearWeight
from rocoft.console import Progress

Item = TypeVar("Item", bound=Hashable)
ENTRY = 4
"""Bytes of a number that a pass keeps, of float32."""


@dataclass(frozen=True)
class PassSize:
    """How much of each kind of number a pass over some batches leaves.

    Attributes:
        examples: n.
        positions: Of all examples, padding included.
        outputs: Functions whose gradients are kept, one for a margin.
    """

    examples: int
    positions: int
    outputs: int

    @classmethod
    def of(
        cls, model: nn.Module, batches: Sequence[Batch], reduce: Reduction
    ) -> "PassSize":
        """Measure batches.

        Args:
            model: The model; its number of outputs is that for one example.
            batches: The examples.
            reduce: As in `kernel.empirical_ntk`.

        Returns:
            Their size.
        """
        outputs = 1
        if reduce != "margin":
            with evaluating(model), torch.no_grad():
                one = NetworkFunction(model)(take(batches[0], slice(0, 1)))
            outputs = one.shape[1]
        return cls(
            sum(map(batch_length, batches)), sum(map(count_positions, batches)), outputs
        )

    def features(self, numbers: int) -> int:
        """Return the entries of so many features of every example and output."""
        return self.outputs * self.examples * numbers

    def factors(self, inputs: int, outputs: int) -> int:
        """Return the entries of the factors of a layer."""
        return self.positions * (inputs + self.outputs * outputs)


@dataclass(frozen=True)
class Chunk:
    """What one pass over all examples serves, or one part of what a pass left.

    Attributes:
        spaces: For each space that it serves a part of, the maps of that part.
        entries: Numbers of features and factors that it takes.
    """

    spaces: Mapping[str, Maps]
    entries: int


def compute_in_chunks(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    *,
    spaces: Mapping[str, Space],
    entries: int,
    reduce: Reduction = "full",
) -> KernelResult:
    """Compute kernels as `kernel.compute` does, in as many passes as memory asks for.

    Args:
        model: As in `kernel.compute`.
        batches: The left examples.
        right: How many of the batches, from the first, are the right examples too.
        spaces: Tangent spaces by name.
        entries: Most numbers of features and factors that one pass keeps; contracting
            them takes about as many again. A single map of one parameter that is
            larger has a pass of its own. Parameters that only the definition serves
            (`coverage.Service`) may take more.
        reduce: As in `kernel.compute`.

    Returns:
        The kernels and their provenance. Their last digits depend on what is computed
        together: the same spaces and entries give the same bits.
    """
    size = PassSize.of(model, batches, reduce)
    total = KernelResult({})
    for chunk in chunks(resolve(spaces, model), Architecture(model), size, entries):
        add(
            total,
            compute_chunk(model, batches, right, chunk, spaces=spaces, reduce=reduce),
        )
    return total


def compute_chunk(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    chunk: Chunk,
    *,
    spaces: Mapping[str, Space],
    kind: Kind = "sgd",
    precision: Precision = "float32",
    reduce: Reduction = "full",
    left_bytes: int = LEFT_BYTES,
    processes: Processes | None = None,
    spilled: Spilled | None = None,
    sample: Batch | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute what one pass adds to the kernels.

    Args:
        model: As in `kernel.compute`.
        batches: The left examples.
        right: How many of the batches, from the first, are the right examples too.
        chunk: What the pass serves.
        spaces: Tangent spaces by name.
        kind: As in `kernel.compute`.
        precision: As in `kernel.compute`.
        reduce: As in `kernel.compute`.
        left_bytes: As in `kernel.compute`.
        processes: As in `kernel.compute`.
        spilled: As in `kernel.compute`.
        sample: As in `kernel.compute`.
        progress: As in `kernel.compute`.

    Returns:
        Kernels of those spaces that the chunk serves, which are parts of sums.
    """
    return compute(
        model,
        batches,
        right,
        spaces={n: Pinned(spaces[n], maps) for n, maps in chunk.spaces.items()},
        kind=kind,
        precision=precision,
        reduce=reduce,
        left_bytes=left_bytes,
        processes=processes,
        spilled=spilled,
        sample=sample,
        progress=progress,
    )


def add(total: KernelResult, part: KernelResult) -> None:
    """Add the kernels of one pass, and what is known of them, to those before.

    Args:
        total: Changed in place.
        part: What another pass gave.
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
    """Part things, in their order, into groups whose sizes add up to no more.

    Args:
        sizes: Of each thing. One that is larger than ``most`` is a group of its own.
        most: Most of a group.

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


def _kept(
    stored: Map, shape: torch.Size, of: LinearWeight | None, size: PassSize
) -> int:
    """Return what a pass keeps of one stored map of a parameter."""
    if not isinstance(stored, Whole) or len(shape) < 2:
        return size.features(stored.size(shape))
    if of is not None:
        return size.factors(of.inputs, of.outputs)
    return size.factors(0, shape.numel() // shape[0])


@dataclass(frozen=True)
class _Parameter:
    """A parameter, what it is as a layer's weight, and the maps that spaces hold."""

    name: str
    shape: torch.Size
    of: LinearWeight | None
    held: Mapping[Map, Sequence[str]]

    def entries(self, maps: Sequence[Map], size: PassSize) -> int:
        """Return what a pass keeps that serves some of the maps."""
        spaces: dict[str, Maps] = {
            str(i): {self.name: (each,)} for i, each in enumerate(maps)
        }
        return sum(_kept(job.stored, self.shape, self.of, size) for job in jobs(spaces))

    def cut(
        self, maps: Sequence[Map], size: PassSize, entries: int
    ) -> Iterator[tuple[Sequence[Map], int]]:
        """Yield parts of the maps that a pass has room for, and what it keeps."""
        kept = self.entries(maps, size)
        if kept <= entries or len(maps) == 1:
            yield maps, kept
            return
        middle = len(maps) // 2
        for half in (maps[:middle], maps[middle:]):
            yield from self.cut(half, size, entries)


def chunks(
    resolved: Mapping[str, Maps],
    architecture: Architecture,
    size: PassSize,
    entries: int,
) -> list[Chunk]:
    """Cut resolved spaces into parts whose kernels add up to theirs.

    Args:
        resolved: The maps of every space.
        architecture: The model they are of.
        size: Of a pass over the examples.
        entries: Most numbers that a pass keeps, see `compute_in_chunks`.

    Returns:
        The chunks, parameters in the order of the spaces.
    """
    held: dict[str, dict[Map, list[str]]] = {}
    for space, maps in resolved.items():
        for name, several in maps.items():
            for each in several:
                held.setdefault(name, {}).setdefault(each, []).append(space)
    pieces: dict[tuple[str, int], tuple[_Parameter, Sequence[Map]]] = {}
    sizes: dict[tuple[str, int], int] = {}
    for name, by_map in held.items():
        shape = architecture.parameters[name].shape
        of = architecture.linear_weights.get(name)
        parameter = _Parameter(name, shape, of, by_map)
        parts = parameter.cut(list(by_map), size, entries)
        for number, (some, kept) in enumerate(parts):
            pieces[name, number] = parameter, some
            sizes[name, number] = kept
    found = []
    for group in packed(sizes, entries):
        chunk: dict[str, Maps] = {}
        for parameter, some in (pieces[key] for key in group):
            for each in some:
                for space in parameter.held[each]:
                    own = chunk.setdefault(space, {})
                    own[parameter.name] = (*own.get(parameter.name, ()), each)
        found.append(Chunk(chunk, sum(sizes[key] for key in group)))
    return found


def rounded_down(amount: int) -> int:
    """Return the largest 4, 5, 6 or 7 times a power of two that is no more, or 0.

    Args:
        amount: Of memory, of which a little more or less should change nothing.
    """
    if amount < 4:
        return max(amount, 0)
    step = 1 << (amount.bit_length() - 3)
    return amount // step * step


def kept_entries(
    parts: Sequence[Chunk], architecture: Architecture, size: PassSize
) -> int:
    """Return what one pass keeps that serves several chunks, each as it is served.

    Args:
        parts: The chunks.
        architecture: The model that they are of.
        size: Of the pass.

    Returns:
        Numbers of features and factors.
    """
    found = {job.key: job for part in parts for job in jobs(part.spaces)}
    return sum(
        _kept(
            job.stored,
            architecture.parameters[job.name].shape,
            architecture.linear_weights.get(job.name),
            size,
        )
        for job in found.values()
    )


def count_positions(batch: Batch) -> int:
    """Return the positions of all examples: tokens, or vectors of features.

    Args:
        batch: The examples.
    """
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    return max(
        t.numel() // t.shape[-1] if t.is_floating_point() else t.numel()
        for t in tensors
    )
