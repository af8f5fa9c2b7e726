"""A memory budget, and the plan that keeps it: what is computed in which pass.

Everything that a computation holds at a time is known before it is run, or measured on
one batch: the process as it is, the activations of a pass, the kernels themselves, and
what a pass keeps of every example until it is contracted. A pass serves as many
parameters as there is room for, and kernels add up (`chunks`). Where there is none for
a single weight of all right examples, these are parted too, into columns of the kernel.

A pass whose parameters are all in the last layers records nothing of the layers below
and goes back no further than it must. Instead of passing again, what the first pass
leaves of the other parameters may wait in a file (`spilling`): whichever takes less
time by the rates of this machine.
"""

import contextlib
import ctypes
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from ntk.capture import record
from ntk.chunks import (
    ENTRY,
    Chunk,
    PassSize,
    add,
    chunks,
    compute_chunk,
    count_positions,
    packed,
    rounded_down,
)
from ntk.contraction import block_entries
from ntk.engine import KernelResult
from ntk.factor_file import FactorFile
from ntk.function import Batch, NetworkFunction, batch_length, evaluating
from ntk.kernel import Kind, Reduction
from ntk.maps import Maps
from ntk.passes import sample
from ntk.precision import Precision
from ntk.processes import Processes
from ntk.resolution import resolve
from ntk.spaces import Space
from ntk.spill_plan import SpillPlan, Work
from ntk.spilling import Spill, Spilled
from rocoft.architecture import Architecture
from rocoft.console import Progress
from rocoft.on_use import LinearOnUse

__all__ = [
    "MemoryBudgetError",
    "Plan",
    "compute_as_planned",
    "held",
    "in_units",
    "parse_bytes",
    "plan",
]

SHARE = 0.8
"""Share of the free memory that is taken unless a budget is given."""
SLACK = 0.05
"""Share of a budget that is left alone: allocators keep some of what was freed."""
SUMS = 4
"""Copies of the kernels at the end: sums, in another order, one being copied."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class MemoryBudgetError(ValueError):
    """A budget in which the work cannot be done."""


@dataclass(frozen=True)
class Plan:
    """What will be computed in which pass, and what it will hold.

    Bytes are of the device that the model is on.

    Attributes:
        budget: What may be held at most.
        held: What the process held before, the model included.
        activations: What one batch leaves between forward and backward, and then some.
        sums: The kernels and their copies.
        workspace: What contracting takes.
        chunks: What each part of the work serves, and each pass if there is no file.
        columns: The right batches, by number, that are computed at a time.
        left_bytes: What is kept of left examples at a time.
        examples: n and m.
        outputs: c.
        spill: What waits in a file; None means that every part runs its own passes.
    """

    budget: int
    held: int
    activations: int
    sums: int
    workspace: int
    chunks: tuple[Chunk, ...]
    columns: tuple[tuple[int, ...], ...]
    left_bytes: int
    examples: tuple[int, int]
    outputs: int
    spill: SpillPlan | None = None

    @property
    def peak(self) -> int:
        """What will be held at most, in bytes."""
        n, m = self.examples
        kept = ENTRY * max(chunk.entries for chunk in self.chunks)
        # The right examples of the first columns stand for those of the others.
        kept += min(self.left_bytes, kept * len(self.columns) * (n - m) // m)
        if self.spill is not None:
            kept = max(kept, self.spill.held)
        return self.held + self.activations + self.sums + self.workspace + kept

    @property
    def passes(self) -> int:
        """How often every example passes the model."""
        return self.parts if self.spill is None else 1

    @property
    def parts(self) -> int:
        """How many parts the work has, after each of which it may be gone on with."""
        return len(self.chunks) * len(self.columns)


def plan(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    *,
    spaces: Mapping[str, Space],
    memory: int | None = None,
    reduce: Reduction = "full",
    spill: Path | None = None,
    processes: Processes | None = None,
) -> Plan:
    """Plan the computation of kernels.

    Args:
        model: As in `kernel.compute`.
        batches: The left examples.
        right: How many of the batches, from the first, are the right examples too.
        spaces: Tangent spaces by name.
        memory: Most bytes that the process may hold, on the CPU the libraries that it
            has loaded included; None means what it holds and a share of what is free.
        reduce: As in `kernel.compute`.
        spill: Folder for a file of what passes leave, used if that is faster than more
            passes and the disk has room, by one process alone; None means no file.
        processes: Those that share the work, all of which call this and get the plan
            of the first; ``memory`` is what each may hold. None means one.

    Returns:
        The plan.

    Raises:
        MemoryBudgetError: If there is no room for one weight of one batch.
    """
    if processes is not None:
        own = _plan(model, batches, right, spaces, memory, reduce, None, processes)
        return processes.broadcast(own, 0)
    return _plan(model, batches, right, spaces, memory, reduce, spill, None)


def _plan(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    spaces: Mapping[str, Space],
    memory: int | None,
    reduce: Reduction,
    spill: Path | None,
    processes: Processes | None,
) -> Plan:
    """Plan what one process of several, or of one, does and holds."""
    device = next(model.parameters()).device
    before = held(device)
    n, m = (sum(map(batch_length, side)) for side in (batches, batches[:right]))
    unused = _free(device)
    if processes is not None:
        batches = processes.largest_share(batches)
        unused //= processes.neighbours if device.type == "cpu" else 1
    budget = memory or before + int(SHARE * unused)
    architecture, resolved = Architecture(model), resolve(spaces, model)
    whole = PassSize.of(model, batches, reduce)
    positions = {i: count_positions(batch) for i, batch in enumerate(batches[:right])}
    right_size = replace(whole, positions=sum(positions.values()))
    largest = _largest(resolved, architecture, right_size)
    activations = _activations(model, batches)
    pairs = whole.outputs**2 if reduce == "full" else 1
    sums = SUMS * 8 * n * m * pairs * len(spaces)
    gradients = whole.outputs * n
    workspace = 2 * ENTRY * gradients * block_entries(gradients)
    if processes is not None:
        # What another one has sent of its share.
        workspace += largest
    if any(p.dtype.itemsize < ENTRY for p in model.parameters()):
        # Of half precision one weight's factors are raised at a time.
        workspace += largest
    free = int((1 - SLACK) * budget) - before - activations - sums - workspace
    # The left examples besides the right ones need as much room as these.
    room = free if right == len(batches) else free // 2
    columns = packed(positions, int(room / largest * right_size.positions))
    most = max(columns, key=lambda some: sum(positions[i] for i in some))
    size = replace(
        whole,
        examples=max(sum(batch_length(batches[i]) for i in some) for some in columns),
        positions=sum(positions[i] for i in most),
    )
    # A round number, unless one map alone is more: parts do not depend on a little
    # memory, so that the same command has the same ones and the same last digits.
    limit = max(rounded_down(room), _largest(resolved, architecture, size))
    parts = chunks(resolved, architecture, size, limit // ENTRY)
    if (kept := ENTRY * max(part.entries for part in parts)) > room:
        need = (budget * (1 - SLACK) - free + kept * (free / room if room else 2)) / (
            1 - SLACK
        )
        raise MemoryBudgetError(
            f"memory={in_units(budget)} is too little: the process holds "
            f"{in_units(before)}, a batch takes {in_units(activations)}, the kernels "
            f"{in_units(sums)}, products {in_units(workspace)}, and a weight of a "
            f"batch {in_units(kept)}. Give about {in_units(need)}, or make the batches "
            "smaller, or examples or spaces fewer."
        )
    waiting, left_bytes = None, rounded_down(free - room)
    if spill is not None and len(parts) * len(columns) > 1:
        work = Work(architecture, batches, right, parts, len(columns), left_bytes)
        waiting = work.spilled(spill, whole, device, rounded_down(room))
    return Plan(
        budget=budget,
        held=before,
        activations=activations,
        sums=sums,
        workspace=workspace,
        chunks=tuple(parts),
        columns=tuple(map(tuple, columns)),
        left_bytes=left_bytes,
        examples=(n, m),
        outputs=whole.outputs,
        spill=waiting,
    )


def compute_as_planned(
    model: nn.Module,
    batches: Sequence[Batch],
    how: Plan,
    *,
    spaces: Mapping[str, Space],
    kind: Kind = "sgd",
    precision: Precision = "float32",
    reduce: Reduction = "full",
    start: tuple[KernelResult, int] | None = None,
    keep: Callable[[int, KernelResult], None] | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute kernels as `kernel.compute` does, part by part.

    Args:
        model: As in `plan`.
        batches: As in `plan`.
        how: The plan.
        spaces: As in `plan`.
        kind: As in `kernel.compute`.
        precision: As in `kernel.compute`.
        reduce: As in `plan`.
        start: The sums of so many first parts, changed in place; None means none.
        keep: Called after each part with how many are done and their sums.
        processes: As in `plan`.
        progress: As in `kernel.compute`.

    Returns:
        The kernels and their provenance. The same plan gives the same bits.
    """
    result, done = (KernelResult({}), 0) if start is None else start
    told = progress
    if 2 * how.peak >= how.budget:
        # What a file is read into is as large as what a batch leaves.
        freeing = {"passes"} if how.spill is None else {"passes", "contractions"}
        told = _returning_memory(progress, freeing)
    steps = [(some, chunk) for some in how.columns for chunk in how.chunks]
    with contextlib.ExitStack() as stack:
        spill = None
        if how.spill is not None and done < len(steps):
            file = stack.enter_context(FactorFile(how.spill.folder))
            parts = [chunk.spaces for _, chunk in steps]
            spill = Spill(file, parts, done, how.spill.examples)
        for number, (some, chunk) in enumerate(steps[done:], done + 1):
            ordered = [*some, *(i for i in range(len(batches)) if i not in set(some))]
            part = compute_chunk(
                model,
                [batches[i] for i in ordered],
                len(some),
                chunk,
                spaces=spaces,
                kind=kind,
                precision=precision,
                reduce=reduce,
                left_bytes=how.left_bytes,
                processes=processes,
                spilled=None if spill is None else Spilled(spill, ordered),
                sample=sample(batches),
                progress=told,
            )
            if len(how.columns) > 1:
                _widen(part, ordered, len(some), batches, how.examples)
            if number > len(how.chunks):
                # Of the same parameters as the first columns.
                part.sizes = dict.fromkeys(part.sizes, 0)
            add(result, part)
            if keep is not None:
                keep(number, result)
    return result


def held(device: torch.device) -> int:
    """Return the bytes that this process holds, on a GPU what tensors take.

    Args:
        device: Of which memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def parse_bytes(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: Such as ``4GiB``, ``500 MB`` or ``2e9``.

    Returns:
        Bytes.

    Raises:
        ValueError: If it is none.
    """
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    try:
        amount = float(found[1]) * UNITS[found[2] or ""] if found else 0.0
    except ValueError:
        amount = 0.0
    if amount < 1:
        raise ValueError(f"{text!r} is no amount of memory. Write for example 4GiB.")
    return int(amount)


def in_units(amount: float) -> str:
    """Return bytes as text, such as ``1.5 GiB``.

    Args:
        amount: Bytes.
    """
    for unit in ("GiB", "MiB"):
        size = UNITS[unit[:2].lower()]
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount / 2**10:.3g} KiB"


def _returning_memory(progress: Progress | None, freeing: Collection[str]) -> Progress:
    """Have the allocator give back what a batch has freed, before the next one.

    glibc keeps freed memory between blocks that are in use: a fifth of a budget was
    lost to it. Other allocators, without `malloc_trim`, are left alone.

    Args:
        progress: What is told of the work as well.
        freeing: After steps of which kind.

    Returns:
        What is to be told of the work.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def told(what: str, done: int, total: int) -> None:
        if trim is not None and what in freeing:
            trim(0)
        if progress is not None:
            progress(what, done, total)

    return told


def _widen(
    part: KernelResult,
    ordered: Sequence[int],
    right: int,
    batches: Sequence[Batch],
    examples: tuple[int, int],
) -> None:
    """Put columns of kernels, whose rows are in another order, among zeros."""
    lengths = list(map(batch_length, batches))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [k for i in ordered for k in range(starts[i], starts[i] + lengths[i])]
    first, count = starts[ordered[0]], sum(lengths[i] for i in ordered[:right])
    for name, kernel in part.kernels.items():
        whole = kernel.new_zeros(*examples, *kernel.shape[2:])
        whole[rows, first : first + count] = kernel
        part.kernels[name] = whole


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def _activations(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Measure what the largest batch leaves between forward and backward (bytes)."""
    batch = max(batches, key=count_positions)
    function = NetworkFunction(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with evaluating(model), hooks:
        _, recorder = record(function, batch, function.parameters)
    for use in recorder.uses:
        if use.inputs is not None:
            note(use.inputs)
    largest = max((use.shape.numel() for use in recorder.uses), default=0)
    recorder.release()
    whole = [m.weight.numel() for m in model.modules() if isinstance(m, LinearOnUse)]
    # Beside the graph a few gradients and outputs of layers live at a time, and one
    # weight that is brought and then cast.
    largest = 4 * largest + 2 * max(whole, default=0)
    return sum(kept.values()) + ENTRY * largest


def _largest(
    resolved: Mapping[str, Maps], architecture: Architecture, size: PassSize
) -> int:
    """Return the bytes kept of some right examples for the map that keeps most."""
    alone = chunks(resolved, architecture, size, 1)
    return ENTRY * max(1, *(chunk.entries for chunk in alone))
