"""Helpers to compute kernels in parts."""

from dataclasses import replace

from cases import BY_NAME

from ntk.gradients.function import take
from ntk.kernels.engine import KernelResult
from ntk.kernels.options import KernelOptions
from ntk.scale.parts import PassSize, add, chunks, compute_chunk
from ntk.scale.planning import compute_as_planned, plan
from ntk.scale.resources import Resources
from ntk.scale.work import Work
from ntk.spaces.kinds import Bias, Columns, Full, LoRA, Rows
from rocoft.models.architecture import Architecture

SPACES = {
    "full": Full(),
    "both": Rows(2) + Columns(2),
    "sum": LoRA(2) + Rows(1) + Bias(),
}


def in_pairs(family, n=6):
    """Return a model and its examples in batches of two."""
    model, whole = BY_NAME[family].build(), BY_NAME[family].inputs(n)
    return model, [take(whole, slice(i, i + 2)) for i in range(0, n, 2)]


def plan_of(model, batches, right, *, spaces, memory=None, spill=None, **options):
    """Return a plan within a memory budget."""
    work = Work(model, batches, right, spaces, KernelOptions(**options))
    return plan(work, Resources(memory=memory, spill=spill))


def as_planned(
    model, batches, plan, *, spaces, start=None, keep=None, progress=None, **options
):
    """Compute kernels by a plan."""
    # The plan says which batches are right ones.
    work = Work(model, batches, 0, spaces, KernelOptions(**options))
    return compute_as_planned(work, plan, start=start, keep=keep, progress=progress)


def in_chunks(model, batches, right, *, spaces, entries, **options):
    """Compute kernels in passes that keep at most ``entries`` numbers."""
    work = Work(model, batches, right, spaces, KernelOptions(**options))
    size, total = PassSize.of(model, batches, work.options), KernelResult({})
    for chunk in chunks(work.resolved, Architecture(model), size, entries):
        add(total, compute_chunk(work, chunk, range(len(batches)), right))
    return total


def in_parts(model, batches, right, spaces, entries, columns=None):
    """Return a plan whose parts keep at most ``entries`` numbers."""
    work = Work(model, batches, right, spaces)
    whole = plan(work)
    size = PassSize.of(model, batches, work.options)
    parts = chunks(work.resolved, Architecture(model), size, entries)
    return replace(whole, chunks=tuple(parts), columns=columns or whole.columns)
