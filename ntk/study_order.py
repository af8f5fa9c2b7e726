"""The order in which tasks, kernels and methods of a study are shown.

It is that of the parts, not of the records, so that a report does not depend on which
was made first.
"""

import re
from typing import Any

from ntk.kernel import KINDS
from ntk.study import Key

FINE_TUNING = "finetune"
KERNEL = "kernel-"
"""Kinds of records; those of kernels end in the kind of kernel."""

TASKS = (
    *("reviews", "sst2", "sst5", "mr", "cr", "mpqa", "subj", "trec", "ag_news"),
    *("mnli", "snli", "qnli", "rte", "mrpc", "qqp", "cola", "stsb"),
)
"""In the order of the tables of Malladi et al. (2023); others follow by name."""

ROWS_AND_COLUMNS = "rows+columns"
FAMILIES = (
    *("full", "rows", "columns", ROWS_AND_COLUMNS, "auto", "lora", "dora"),
    *("bias", "bitfit", "norm", "embeddings", "head", "probe"),
)
"""Of spaces and methods; others follow by name."""

SAME_PARAMETERS = {"bias": "bitfit"}
"""The method that trains a space's parameters, where it is not of the same name."""


def order_of_key(key: Key) -> tuple[Any, ...]:
    """Return where a record stands among others.

    Args:
        key: Of the record.
    """
    cell = key.cell
    kind, subject = order_of_kind(key.kind), order_of_subject(key.subject)
    return (order_of_task(cell.task), cell.shots, kind, subject, cell.seed)


def order_of_task(task: str) -> tuple[int, str]:
    """Return where a task stands: single texts, then pairs, then those not listed.

    Args:
        task: Its name.
    """
    return (_place(task, TASKS), task)


def order_of_kind(kind: str) -> tuple[int, str]:
    """Return where a kind of records stands: kernels, then fine-tuning.

    Args:
        kind: Of a `Key`.
    """
    return (_place(kind, (*(KERNEL + k for k in KINDS), FINE_TUNING)), kind)


def order_of_subject(name: str) -> tuple[Any, ...]:
    """Return where a space or method stands: by family, sums later, then by counts.

    Args:
        name: As `ntk.notation` or `rocoft.methods` writes it.
    """
    counts = [int(count) for count in re.findall(r":(\d+)", name)]
    return (_place(family(name), FAMILIES), "+" in name, counts, name)


def family(name: str) -> str:
    """Return one of `FAMILIES` that a space or method belongs to, or what it is called.

    Args:
        name: As `ntk.notation` or `rocoft.methods` writes it.
    """
    if "rows" in name and "columns" in name:
        return ROWS_AND_COLUMNS
    return re.split(r"[^a-z]", name.removeprefix("masked "))[0]


def same_parameters(space: str) -> str:
    """Return the method that trains a space's parameters.

    Args:
        space: As `ntk.notation` writes it.
    """
    return SAME_PARAMETERS.get(space, space)


def _place(name: str, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else len(names)
