"""Computations in parts: their spaces, their examples and their plans."""

from dataclasses import replace

from cases import BY_NAME

from ntk import memory
from ntk.chunks import chunks
from ntk.function import take
from ntk.resolution import resolve
from ntk.spaces import Bias, Columns, Full, LoRA, Rows

SPACES = {
    "full": Full(),
    "both": Rows(2) + Columns(2),
    "sum": LoRA(2) + Rows(1) + Bias(),
}


def in_pairs(family, n=6):
    """Return a model and its examples in batches of two."""
    model, whole = BY_NAME[family].build(), BY_NAME[family].inputs(n)
    return model, [take(whole, slice(i, i + 2)) for i in range(0, n, 2)]


def in_parts(model, batches, right, spaces, entries, columns=None):
    """Return a plan whose parts have few entries, whatever memory there is."""
    how = memory.plan(model, batches, right, spaces=spaces)
    size = memory.PassSize.of(model, batches, "full")
    architecture = memory.Architecture(model)
    parts = chunks(resolve(spaces, model), architecture, size, entries)
    return replace(how, chunks=tuple(parts), columns=columns or how.columns)
