"""What a study's records say in numbers, and means of it over seeds and tasks.

A spread ``{"mean", "deviation", "values"}`` is over seeds: the deviation has divisor
count - 1, and the values stand in the order of their row's seeds. A mean over tasks
``{"mean", "standard_error", "tasks"}`` is of their means over seeds. What is missing or
not finite is None, and left out of the means.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk.study import Record

Row = dict[str, Any]
Array = NDArray[np.float64]

CLASSIFIERS = ("ridge", "logistic", "svm", "asymmetric")
"""The first of those with equal dev scores is chosen."""


def chosen(record: Record) -> str:
    """Return the name of the classifier that is best on dev, the first of equals.

    Args:
        record: Of a kernel.
    """
    names = [name for name in CLASSIFIERS if name in record["classifiers"]]
    dev = {name: record["classifiers"][name]["dev"] for name in names}
    return max(names, key=lambda name: -math.inf if dev[name] is None else dev[name])


def results(record: Record) -> Record:
    """Return what was predicted, and how good it is, by its chief metric.

    Args:
        record: Of a kernel, whose `chosen` classifier is meant, or of fine-tuning.
    """
    if "classifiers" in record:
        return dict(record["classifiers"][chosen(record)])
    return record


def score(record: Record | None) -> float | None:
    """Return the test score of `results`, by the task's chief metric.

    Args:
        record: As of `results`; None if it is missing.
    """
    return None if record is None else results(record)["test"][record["metric"]]


def outputs(record: Record) -> Array:
    """Return the ``(n, c)`` outputs of `results`, NaN where they are not finite.

    Args:
        record: As of `results`.
    """
    return np.array(results(record)["outputs"], dtype=np.float64)


def points(first: float | None, second: float | None) -> float | None:
    """Return the difference of two scores in points, hundredths of a score.

    Args:
        first: A score.
        second: What is taken from it.
    """
    return None if first is None or second is None else 100 * (first - second)


def spread(values: Iterable[float | None]) -> Row:
    """Return mean and deviation over seeds.

    Args:
        values: One for each seed.
    """
    listed = [None if v is None or not math.isfinite(v) else v for v in values]
    known = [value for value in listed if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "deviation": stdev(known) if known[1:] else None,
        "values": listed,
    }


def spreads(records: Iterable[Record], names: Sequence[str]) -> dict[str, Row]:
    """Return mean and deviation over seeds of several measures, without the values.

    Args:
        records: One for each seed.
        names: Where the measures lie in them, dotted.
    """
    several, found = list(records), {}
    for name in names:
        whole = spread(at(record, name) for record in several)
        found[name] = {key: whole[key] for key in ("mean", "deviation")}
    return found


def across(rows: Iterable[Row], *path: str) -> Row:
    """Return the mean over tasks of what lies at a path of their rows.

    Args:
        rows: One for each task.
        *path: Keys.
    """
    found: dict[str, float] = {}
    for row in rows:
        value: Any = row
        for key in path:
            value = None if value is None else value[key]
        if value is not None:
            found[row["task"]] = value
    several = list(found.values())
    return {
        "mean": fmean(several) if several else None,
        "standard_error": standard_error(several),
        "tasks": list(found),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, None of fewer than two values.

    Args:
        values: Independent ones.
    """
    return stdev(values) / math.sqrt(len(values)) if values[1:] else None


def at(value: Any, name: str) -> float | None:
    """Return what lies at a place in a record, None where there is nothing.

    Args:
        value: The record.
        name: Keys, one within the other, such as "test.accuracy".
    """
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
