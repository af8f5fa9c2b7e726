"""Display order of tasks, kernels and methods, whichever record was computed first."""

import re
from typing import Any

from ntk.kernels import KINDS
from ntk.studies.folder import Key

FINE_TUNING = "finetune"
KERNEL = "kernel-"
"""Kinds of records; kernel records append the kind of kernel."""

TASKS = (
    *("reviews", "sst2", "sst5", "mr", "cr", "mpqa", "subj", "trec", "ag_news"),
    *("mnli", "snli", "qnli", "rte", "mrpc", "qqp", "cola", "stsb"),
)
"""Tasks in the order of Malladi et al. (2023); others follow by name."""

ROWS_AND_COLUMNS = "rows+columns"
FAMILIES = (
    *("full", "rows", "columns", ROWS_AND_COLUMNS, "auto", "lora", "dora"),
    *("bias", "bitfit", "norm", "embeddings", "head", "probe"),
)
"""Families of spaces and methods; others follow by name."""

SAME_PARAMETERS = {"bias": "bitfit"}
"""Methods that train a space's parameters under another name, by space."""


def order_of_key(key: Key) -> tuple[Any, ...]:
    """Return the sort key of a record.

    Args:
        key: Key of the record.
    """
    cell = key.cell
    kind, subject = order_of_kind(key.kind), order_of_subject(key.subject)
    return (order_of_task(cell.task), cell.shots, kind, subject, cell.seed)


def order_of_task(task: str) -> tuple[int, str]:
    """Return the sort key of a task: single texts, pairs of texts, other tasks.

    Args:
        task: Name of the task.
    """
    return (_place(task, TASKS), task)


def order_of_kind(kind: str) -> tuple[int, str]:
    """Return the sort key of a kind of records: kernels, then fine-tuning.

    Args:
        kind: Kind of a `Key`.
    """
    return (_place(kind, (*(KERNEL + k for k in KINDS), FINE_TUNING)), kind)


def order_of_subject(name: str) -> tuple[Any, ...]:
    """Return the sort key of a space or method: family, sums last, counts.

    Args:
        name: Name in the notation of spaces or methods.
    """
    counts = [int(count) for count in re.findall(r":(\d+)", name)]
    return (_place(family(name), FAMILIES), "+" in name, counts, name)


def family(name: str) -> str:
    """Return the family of a space or method, one of `FAMILIES` or its first word.

    Args:
        name: Name in the notation of spaces or methods.
    """
    if "rows" in name and "columns" in name:
        return ROWS_AND_COLUMNS
    return re.split(r"[^a-z]", name.removeprefix("masked "))[0]


def same_parameters(space: str) -> str:
    """Return the method that trains the parameters of a space.

    Args:
        space: Name of the space.
    """
    return SAME_PARAMETERS.get(space, space)


def _place(name: str, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else len(names)
