"""Plans a computation within a memory budget, and follows the plan.

The memory of a computation is known in advance or measured on one batch: the process so
far, the activations of a pass, the kernels, and the features and factors that a pass
keeps until they are contracted. Each pass serves as many parameters as there is room
for, and the passes' kernels add up (`ntk.scale.parts`). If even one weight of all right
examples does not fit, the right examples are split too, into columns of the kernel.

A pass that serves only the last layers records nothing of the layers below and
back-propagates no further than needed. If the disk has room, the first pass writes the
features and factors of all parameters to a file, and no other pass is needed
(`ntk.scale.spilled`).
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ntk.gradients import (
    Batch,
    NetworkFunction,
    batch_length,
    evaluating,
    record,
    sample,
)
from ntk.kernels import (
    Engine,
    EngineInput,
    KernelResult,
    block_entries,
    reader,
)
from ntk.scale.factor_file import FactorFile
from ntk.scale.parts import (
    ENTRY,
    Chunk,
    PassSize,
    add,
    chunks,
    compute_chunk,
    count_positions,
    kept_bytes,
    packed,
    rounded_down,
)
from ntk.scale.processes import Processes
from ntk.scale.resources import Resources
from ntk.scale.sharded import ShardedEngine
from ntk.scale.spill_plan import SpillPlan
from ntk.scale.spilled import SpillFile, SpillingEngine
from ntk.scale.units import in_units
from ntk.scale.work import Work
from ntk.spaces import Maps
from rocoft.commands import Progress
from rocoft.models import Architecture, LinearOnUse

__all__ = [
    "MemoryBudgetError",
    "Plan",
    "compute_as_planned",
    "held",
    "plan",
    "room",
]

SHARE = 0.8
"""Share of the free memory that is used if no budget is given."""
SLACK = 0.05
"""Share of a budget that stays unused: allocators keep some freed memory."""
NOISE = 2**24
"""Bytes by which the memory that a process uses may differ from run to run."""
SUMS = 4
"""Copies of the kernels that may exist at the same time at the end."""


class MemoryBudgetError(ValueError):
    """A memory budget that is too small for the work."""


@dataclass(frozen=True)
class Plan:
    """What is computed in which pass, and the memory that it takes.

    All amounts are bytes on the device of the model.

    Attributes:
        budget: Largest memory that the process may use.
        held: Memory that the process used before, the model included.
        activations: Memory between forward and backward of one batch.
        sums: Memory of the kernels and their copies.
        workspace: Memory that contractions take.
        chunks: Parameters and maps of each part, and of each pass if there is no file.
        columns: For each column block of the kernel, its right batches by index.
        left_bytes: Memory for a group of left examples.
        examples: n and m.
        outputs: c.
        spill: The file for features and factors; None means that every part runs its
            own passes.
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
        """Largest memory that the process will use, in bytes."""
        n, m = self.examples
        kept = ENTRY * max(chunk.entries for chunk in self.chunks)
        # Assume every column block is as large as the first.
        kept += min(self.left_bytes, kept * len(self.columns) * (n - m) // m)
        if self.spill is not None:
            kept = max(kept, self.spill.held)
        return self.held + self.activations + self.sums + self.workspace + kept

    @property
    def passes(self) -> int:
        """Number of passes over every example."""
        return self.parts if self.spill is None else 1

    @property
    def parts(self) -> int:
        """Number of parts of the work, after each of which it can be resumed."""
        return len(self.chunks) * len(self.columns)


def plan(work: Work, resources: Resources = Resources()) -> Plan:
    """Plan the computation of kernels.

    Args:
        work: The kernels to compute.
        resources: Available memory, disk and processes. Several processes must all call
            this; they get the plan of the first one, without a file.

    Returns:
        The plan.

    Raises:
        MemoryBudgetError: If one weight of one batch does not fit.
    """
    processes = resources.processes
    if processes is not None:
        return processes.broadcast(_plan(work, replace(resources, spill=None)), 0)
    return _plan(work, resources)


def _plan(work: Work, resources: Resources) -> Plan:
    """Plan the computation and memory of one process."""
    model, batches, right = work.model, work.batches, work.right
    processes = resources.processes
    device = next(model.parameters()).device
    before = held(device)
    n, m = (sum(map(batch_length, side)) for side in (batches, batches[:right]))
    unused = _free(device)
    if processes is not None:
        batches = processes.largest_share(batches)
        unused //= processes.neighbours if device.type == "cpu" else 1
    budget = _budget(resources, before, unused)
    architecture, resolved = Architecture(model), work.resolved
    whole = PassSize.of(model, batches, work.options)
    positions = {i: count_positions(batch) for i, batch in enumerate(batches[:right])}
    right_size = replace(whole, positions=sum(positions.values()))
    largest = _largest(resolved, architecture, right_size)
    activations = _activations(work, batches)
    pairs = whole.outputs**2 if work.options.coupled else 1
    sums = SUMS * 8 * n * m * pairs * len(work.spaces)
    gradients = whole.outputs * n
    workspace = 2 * ENTRY * gradients * block_entries(gradients)
    if processes is not None:
        # Receive buffer for another process's factors.
        workspace += largest
    if any(p.dtype.itemsize < ENTRY for p in model.parameters()):
        # One weight's factors are cast to float32 at a time.
        workspace += largest
    free = int((1 - SLACK) * budget) - before - activations - sums - workspace
    # Left examples get the same room as right ones.
    room = free if right == len(batches) else free // 2
    columns = packed(positions, int(room / largest * right_size.positions))
    longest = max(columns, key=lambda block: sum(positions[i] for i in block))
    size = replace(
        whole,
        examples=max(sum(batch_length(batches[i]) for i in block) for block in columns),
        positions=sum(positions[i] for i in longest),
    )
    # Rounded, unless a single map needs more: small changes in free memory then change
    # neither the parts nor the last digits.
    limit = max(rounded_down(room), _largest(resolved, architecture, size))
    parts = chunks(resolved, architecture, size, limit // ENTRY)
    if (kept := ENTRY * max(part.entries for part in parts)) > room:
        need = (budget * (1 - SLACK) - free + kept * (free / room if room else 2)) / (
            1 - SLACK
        )
        # So much that it is enough also if the process then uses a little more.
        need = 1.03 * need + NOISE
        raise MemoryBudgetError(
            f"memory={in_units(budget)} is too little: the process uses "
            f"{in_units(before)}, the activations of a batch {in_units(activations)}, "
            f"the kernels {in_units(sums)}, products {in_units(workspace)}, and one "
            f"weight of a batch {in_units(kept)}. Give about {in_units(need)}, or use "
            "smaller batches, or fewer examples or spaces."
        )
    spill, left_bytes = None, rounded_down(free - room)
    if resources.spill is not None and len(parts) * len(columns) > 1:
        size_of = partial(kept_bytes, parts, architecture)
        spill = SpillPlan.of(
            resources.spill, batches, whole, size_of, rounded_down(room)
        )
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
        spill=spill,
    )


def compute_as_planned(
    work: Work,
    plan: Plan,
    *,
    start: tuple[KernelResult, int] | None = None,
    keep: Callable[[int, KernelResult], None] | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute kernels part by part.

    Args:
        work: The kernels to compute.
        plan: The plan of this work.
        start: Sums of the parts that are done, changed in place, and their number; None
            starts from the beginning.
        keep: Called after each part with the number of parts done and their sums.
        processes: The processes that share the work.
        progress: Called as the work goes on.

    Returns:
        The kernels, with traces, sizes and services. The same plan gives the same bits.
    """
    result, done = (KernelResult({}), 0) if start is None else start
    if 2 * plan.peak >= plan.budget:
        # Reading the file back allocates as much as a batch does.
        freeing = {"passes"} if plan.spill is None else {"passes", "contractions"}
        progress = _returning_memory(progress, freeing)
    batches = work.batches
    steps = [(columns, chunk) for columns in plan.columns for chunk in plan.chunks]
    with contextlib.ExitStack() as stack:
        spill = None
        if plan.spill is not None and done < len(steps):
            file = stack.enter_context(FactorFile(plan.spill.folder))
            parts = [chunk.spaces for _, chunk in steps]
            spill = SpillFile(file, parts, done, plan.spill.examples)
        for number, (columns, chunk) in enumerate(steps[done:], done + 1):
            others = (i for i in range(len(batches)) if i not in set(columns))
            order = [*columns, *others]
            engine: Callable[[EngineInput], Engine] = Engine
            if processes is not None:
                engine = partial(ShardedEngine, processes=processes)
            elif spill is not None:
                engine = partial(SpillingEngine, spill=spill, order=order)
            part = compute_chunk(
                work,
                chunk,
                order,
                len(columns),
                engine=engine,
                left_bytes=plan.left_bytes,
                sample=sample(batches),
                progress=progress,
            )
            if len(plan.columns) > 1:
                _widen(part, order, len(columns), batches, plan.examples)
            if number > len(plan.chunks):
                # The first column block has counted these parameters already.
                part.sizes = dict.fromkeys(part.sizes, 0)
            add(result, part)
            if keep is not None:
                keep(number, result)
    return result


def held(device: torch.device) -> int:
    """Return the memory that this process uses, in bytes; on a GPU that of tensors.

    Freed memory is returned to the system first: what an earlier computation has left
    behind is not in use, and would make the plan depend on what ran before.

    Args:
        device: The device whose memory is measured.
    """
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    gc.collect()
    return_freed_memory()
    return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed memory between blocks in use, which took a fifth of a budget.
    Other allocators, without `malloc_trim`, are left alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def room(device: torch.device, resources: Resources = Resources()) -> int:
    """Return the memory that a computation may still use on a device, in bytes.

    Args:
        device: The device.
        resources: The memory budget; without one, a share of the free memory.
    """
    before = held(device)
    budget = _budget(resources, before, _free(device))
    return max(0, int((1 - SLACK) * budget) - before)


def _returning_memory(progress: Progress | None, freeing: Collection[str]) -> Progress:
    """Return a progress callback that also returns freed memory to the system.

    Args:
        progress: The callback to wrap.
        freeing: Kinds of steps after which memory is returned.

    Returns:
        The callback.
    """

    def report(step: str, done: int, total: int) -> None:
        if step in freeing:
            return_freed_memory()
        if progress is not None:
            progress(step, done, total)

    return report


def _widen(
    part: KernelResult,
    ordered: Sequence[int],
    right: int,
    batches: Sequence[Batch],
    examples: tuple[int, int],
) -> None:
    """Embed a column block in the whole kernel and restore the order of its rows."""
    lengths = list(map(batch_length, batches))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = [k for i in ordered for k in range(starts[i], starts[i] + lengths[i])]
    first, count = starts[ordered[0]], sum(lengths[i] for i in ordered[:right])
    for name, kernel in part.kernels.items():
        whole = kernel.new_zeros(*examples, *kernel.shape[2:])
        whole[rows, first : first + count] = kernel
        part.kernels[name] = whole


def _budget(resources: Resources, before: int, unused: int) -> int:
    """Return the bytes that may be in use; by default a share of what is unused."""
    return resources.memory or before + int(SHARE * unused)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def _activations(work: Work, batches: Sequence[Batch]) -> int:
    """Measure the bytes that the largest batch takes between forward and backward."""
    batch = max(batches, key=count_positions)
    model = work.model
    function = NetworkFunction(model, reader(work.options))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        # The output of the node that saves it would never be freed.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with evaluating(model), hooks:
        _, recorder = record(function, batch, function.parameters)
    for use in recorder.uses:
        if use.inputs is not None:
            note(use.inputs)
    largest = max((use.shape.numel() for use in recorder.uses), default=0)
    recorder.release()
    whole = [m.weight.numel() for m in model.modules() if isinstance(m, LinearOnUse)]
    # Besides the graph: a few gradients and layer outputs, and one weight that is
    # loaded and cast.
    largest = 4 * largest + 2 * max(whole, default=0)
    return sum(saved.values()) + ENTRY * largest


def _largest(
    resolved: Mapping[str, Maps], architecture: Architecture, size: PassSize
) -> int:
    """Return the memory of the largest single map in a pass of this size, in bytes."""
    single = chunks(resolved, architecture, size, 1)
    return ENTRY * max(1, *(chunk.entries for chunk in single))
