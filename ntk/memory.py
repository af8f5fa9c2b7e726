"""A memory budget, and the plan that keeps it: what is computed in which pass.

Everything that a computation holds at a time is known before it is run, or measured on
one batch: the process as it is, the activations of a pass, the kernels themselves, and
what a pass keeps of every example until it is contracted. A pass serves as many
parameters as there is room for, and kernels add up (`chunks`). Where there is none for
a single weight of all right examples, these are parted too, into columns of the kernel.

A pass whose parameters are all in the last layers records nothing of the layers below
and goes back no further than it must.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from ntk.capture import backward, record
from ntk.chunks import (
    Chunk,
    PassSize,
    add,
    chunks,
    compute_chunk,
    count_positions,
    packed,
)
from ntk.contraction import Operations, block_entries
from ntk.engine import KernelResult
from ntk.function import Batch, NetworkFunction, batch_length, evaluating
from ntk.kernel import Kind, Reduction
from ntk.maps import Maps, Whole
from ntk.resolution import resolve
from ntk.spaces import Space
from rocoft.architecture import Architecture
from rocoft.console import Progress

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
ENTRY = 4
"""Bytes of a number that a pass keeps, of float32."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PRODUCT = 512
"""Rows of the matrix product whose rate is measured."""


class MemoryBudgetError(ValueError):
    """A budget in which the work cannot be done."""


@dataclass(frozen=True)
class Route:
    """How weights of one shape are contracted.

    Attributes:
        shape: ``(d_out, d_in)``.
        weights: How many there are.
        route: ``"positions"`` or ``"blocks"``.
        operations: Multiply-adds of all of them.
    """

    shape: tuple[int, int]
    weights: int
    route: str
    operations: float


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
        chunks: What each pass serves.
        columns: The right batches, by number, that are computed at a time.
        left_bytes: What is kept of left examples at a time.
        examples: n and m.
        outputs: c.
        seconds_per_example: Of a pass, forward and c times backward, on one batch.
        routes: How whole weights are contracted.
        multiply_adds_per_second: Of a matrix product here.
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
    seconds_per_example: float
    routes: tuple[Route, ...]
    multiply_adds_per_second: float

    @property
    def peak(self) -> int:
        """What will be held at most, in bytes."""
        n, m = self.examples
        kept = ENTRY * max(chunk.entries for chunk in self.chunks)
        # The right examples of the first columns stand for those of the others.
        kept += min(self.left_bytes, kept * len(self.columns) * (n - m) // m)
        return self.held + self.activations + self.sums + self.workspace + kept

    @property
    def passes(self) -> int:
        """How often every example passes the model."""
        return len(self.chunks) * len(self.columns)

    @property
    def seconds(self) -> float:
        """About how long it will take: all passes whole, and products at full speed."""
        operations = sum(route.operations for route in self.routes)
        passes = self.passes * self.examples[0] * self.seconds_per_example
        return passes + operations / self.multiply_adds_per_second

    def lines(self) -> list[str]:
        """Return the plan as text."""
        n, m = self.examples
        columns = "" if len(self.columns) == 1 else f" in {len(self.columns)} parts"
        found = [
            f"budget {in_units(self.budget)}, at most {in_units(self.peak)} held: "
            f"{in_units(self.held)} before, {in_units(self.activations)} by a batch, "
            f"{in_units(self.sums)} by the kernels, {in_units(self.workspace)} by "
            "products, the rest by what is kept of examples",
            f"kernels {n} x {m}{columns}; every example passes {self.passes} x, "
            f"forward and {self.outputs} x backward, {self.seconds_per_example:.2g} s",
        ]
        for number, chunk in enumerate(self.chunks, 1):
            names = {name for maps in chunk.spaces.values() for name in maps}
            found.append(
                f"pass {number}: {len(names)} parameters, {len(chunk.spaces)} spaces, "
                f"{in_units(chunk.entries * ENTRY)} kept of the right examples"
            )
        for route in self.routes:
            d_out, d_in = route.shape
            found.append(
                f"{route.weights} whole weights {d_out} x {d_in}: contracted by "
                f"{route.route}, {route.operations:.2g} multiply-adds"
            )
        return [*found, f"about {self.seconds:.2g} s in all"]


def plan(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    *,
    spaces: Mapping[str, Space],
    memory: int | None = None,
    reduce: Reduction = "full",
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

    Returns:
        The plan.

    Raises:
        MemoryBudgetError: If there is no room for one weight of one batch.
    """
    device = next(model.parameters()).device
    before = held(device)
    budget = memory or before + int(SHARE * _free(device))
    whole = PassSize.of(model, batches, reduce)
    activations, seconds = _one_pass(model, batches)
    n, m = (sum(map(batch_length, side)) for side in (batches, batches[:right]))
    pairs = whole.outputs**2 if reduce == "full" else 1
    sums = SUMS * 8 * n * m * pairs * len(spaces)
    gradients = whole.outputs * n
    workspace = 2 * ENTRY * gradients * block_entries(gradients)
    free = int((1 - SLACK) * budget) - before - activations - sums - workspace
    # The left examples besides the right ones need as much room as these.
    room = free if right == len(batches) else free // 2

    architecture, resolved = Architecture(model), resolve(spaces, model)
    positions = {i: count_positions(batch) for i, batch in enumerate(batches[:right])}
    share = room / _largest(resolved, architecture, whole, positions)
    columns = packed(positions, int(share * sum(positions.values())))
    most = max(columns, key=lambda some: sum(positions[i] for i in some))
    size = replace(
        whole,
        examples=max(sum(batch_length(batches[i]) for i in some) for some in columns),
        positions=sum(positions[i] for i in most),
    )
    # A power of two, unless one map alone is more: passes do not depend on a little
    # memory, so that the same command has the same plan and the same last digits.
    least = max(c.entries for c in chunks(resolved, architecture, size, 1))
    limit = max(_power_of_two(room) // ENTRY, least)
    parts = chunks(resolved, architecture, size, limit)
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
    return Plan(
        budget=budget,
        held=before,
        activations=activations,
        sums=sums,
        workspace=workspace,
        chunks=tuple(parts),
        columns=tuple(map(tuple, columns)),
        left_bytes=_power_of_two(free - room),
        examples=(n, m),
        outputs=whole.outputs,
        seconds_per_example=seconds,
        routes=tuple(_routes(parts, architecture, whole, (n, m))),
        multiply_adds_per_second=_rate(device),
    )


def compute_as_planned(
    model: nn.Module,
    batches: Sequence[Batch],
    how: Plan,
    *,
    spaces: Mapping[str, Space],
    kind: Kind = "sgd",
    reduce: Reduction = "full",
    start: tuple[KernelResult, int] | None = None,
    keep: Callable[[int, KernelResult], None] | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute kernels as `kernel.compute` does, pass by pass.

    Args:
        model: As in `plan`.
        batches: As in `plan`.
        how: The plan.
        spaces: As in `plan`.
        kind: As in `kernel.compute`.
        reduce: As in `plan`.
        start: The sums of so many first passes, changed in place; None means none.
        keep: Called after each pass with how many are done and their sums.
        progress: As in `kernel.compute`.

    Returns:
        The kernels and their provenance. The same plan gives the same bits.
    """
    result, done = (KernelResult({}), 0) if start is None else start
    steps = [(some, chunk) for some in how.columns for chunk in how.chunks]
    for number, (some, chunk) in enumerate(steps[done:], done + 1):
        ordered = [*some, *(i for i in range(len(batches)) if i not in set(some))]
        part = compute_chunk(
            model,
            [batches[i] for i in ordered],
            len(some),
            chunk,
            spaces=spaces,
            kind=kind,
            reduce=reduce,
            left_bytes=how.left_bytes,
            progress=progress,
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


def _power_of_two(amount: int) -> int:
    """Return the largest power of two that is no more, 0 if there is none."""
    return 1 << (amount.bit_length() - 1) if amount > 0 else 0


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        unused = reserved - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def _one_pass(model: nn.Module, batches: Sequence[Batch]) -> tuple[int, float]:
    """Measure what the largest batch's pass holds (bytes), and seconds an example."""
    batch = max(batches, key=count_positions)
    function = NetworkFunction(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with evaluating(model):
        for _ in range(2):  # The first one is slower.
            kept: dict[int, int] = {}
            note = lambda tensor, kept=kept: _note(tensor, own, kept)
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                found, recorder = record(function, batch, function.parameters)
            for use in recorder.uses:
                if use.inputs is not None:
                    note(use.inputs)
            largest = max((use.shape.numel() for use in recorder.uses), default=0)
            backward(found, recorder, lambda use, k, factor: None)
            took = time.perf_counter() - start
    # Beside the graph a few gradients and outputs of layers live at a time.
    return sum(kept.values()) + 4 * ENTRY * largest, took / batch_length(batch)


def _note(tensor: Tensor, own: set[int], kept: dict[int, int]) -> Tensor:
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in own:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor


def _largest(
    resolved: Mapping[str, Maps],
    architecture: Architecture,
    size: PassSize,
    positions: Mapping[int, int],
) -> int:
    """Return the bytes kept of the right examples for the map that keeps most."""
    right = replace(size, positions=sum(positions.values()))
    alone = chunks(resolved, architecture, right, 1)
    return ENTRY * max(1, *(chunk.entries for chunk in alone))


def _routes(
    parts: Sequence[Chunk],
    architecture: Architecture,
    size: PassSize,
    examples: tuple[int, int],
) -> Iterator[Route]:
    """Yield how whole weights are contracted, by their shape."""
    n, m = examples
    p = size.positions
    q = round(p * m / n)
    held = {
        name
        for part in parts
        for maps in part.spaces.values()
        for name, several in maps.items()
        if any(isinstance(each, Whole) for each in several)
    }
    tables = set(architecture.embeddings)
    found: dict[tuple[int, int], list[str]] = {}
    for name in sorted(held - tables):
        of = architecture.linear_weights.get(name)
        if of is not None:
            found.setdefault((of.outputs, of.inputs), []).append(name)
    for shape, names in found.items():
        square = Operations.count(shape, size.outputs, (m, m), (q, q), symmetric=True)
        rest = Operations.count(
            shape, size.outputs, (n - m, m), (p - q, q), symmetric=False
        )
        how = "positions" if square.positions_are_cheaper else "blocks"
        operations = len(names) * (square.least + (rest.least if n > m else 0))
        yield Route(shape, len(names), how, operations)


def _rate(device: torch.device) -> float:
    """Return multiply-adds a second of a float32 matrix product."""
    a = torch.ones(PRODUCT, PRODUCT, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # Waits for the device.
        best = min(best, time.perf_counter() - start)
    return PRODUCT**3 / best
