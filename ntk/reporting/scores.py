"""Scores of records, and their means over seeds and tasks.

A spread ``{"mean", "deviation", "values"}`` is over seeds: the deviation is the sample
standard deviation, the values are in the order of the row's seeds. A mean over tasks
``{"mean", "standard_error", "tasks"}`` averages their means over seeds. Missing and
non-finite values are None and excluded from means.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ntk.classifiers import ratio_of_means, recovery

Record = dict[str, Any]
Row = dict[str, Any]
Array = NDArray[np.float64]

CLASSIFIERS = ("ridge", "logistic", "svm", "asymmetric")
"""Ties in dev score go to the first."""


def chosen(record: Record) -> str:
    """Return the name of the classifier with the best dev score.

    Args:
        record: The record of a kernel.
    """
    names = [name for name in CLASSIFIERS if name in record["classifiers"]]
    dev = {name: record["classifiers"][name]["dev"] for name in names}
    return max(names, key=lambda name: -math.inf if dev[name] is None else dev[name])


def results(record: Record) -> Record:
    """Return outputs and scores of a kernel's `chosen` classifier, or of fine-tuning.

    Args:
        record: The record of a kernel or of fine-tuning.
    """
    if "classifiers" in record:
        return dict(record["classifiers"][chosen(record)])
    return record


def score(record: Record | None) -> float | None:
    """Return the test score by the task's primary metric.

    Args:
        record: The record of a kernel or of fine-tuning; None if it is missing.
    """
    return None if record is None else results(record)["test"][record["metric"]]


def outputs(record: Record) -> Array:
    """Return the predicted outputs, ``(n, c)``, NaN where they are not finite.

    Args:
        record: The record of a kernel or of fine-tuning.
    """
    return np.array(results(record)["outputs"], dtype=np.float64)


def points(first: float | None, second: float | None) -> float | None:
    """Return the difference of two scores in percentage points.

    Args:
        first: A score.
        second: The score that is subtracted.
    """
    return None if first is None or second is None else 100 * (first - second)


def spread(values: Iterable[float | None]) -> Row:
    """Return mean, standard deviation and values over seeds.

    Args:
        values: One value per seed.
    """
    listed = [None if v is None or not math.isfinite(v) else v for v in values]
    known = [value for value in listed if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "deviation": stdev(known) if known[1:] else None,
        "values": listed,
    }


def spreads(records: Iterable[Record], names: Sequence[str]) -> dict[str, Row]:
    """Return mean and standard deviation over seeds of several measures.

    Args:
        records: One record per seed.
        names: Dotted paths of the measures in a record.
    """
    records, by_name = list(records), {}
    for name in names:
        over_seeds = spread(value_at(record, name) for record in records)
        by_name[name] = {key: over_seeds[key] for key in ("mean", "deviation")}
    return by_name


def across(rows: Iterable[Row], *path: str) -> Row:
    """Return the mean over tasks of a field.

    Args:
        rows: One row per task.
        *path: Keys of the field, one within the other.
    """
    by_task: dict[str, float] = {}
    for row in rows:
        value: Any = row
        for key in path:
            value = None if value is None else value[key]
        if value is not None:
            by_task[row["task"]] = value
    values = list(by_task.values())
    return {
        "mean": fmean(values) if values else None,
        "standard_error": standard_error(values),
        "tasks": list(by_task),
    }


def ratio_across(rows: Iterable[Row], above: str, below: str, less: str = "") -> Row:
    """Return the ratio of the means of two fields over tasks.

    Args:
        rows: One row per task; those without one of the fields are left out.
        above: Field of the numerator.
        below: Field of the denominator.
        less: Field that is subtracted from both; empty for none.

    Returns:
        The ratio as ``"mean"``, its standard error by the jackknife over tasks, and the
        tasks.
    """
    names = [name for name in (above, below, less) if name]
    known = [row for row in rows if None not in [row.get(name) for name in names]]
    ratio: Row = {"mean": None, "standard_error": None}
    if known:
        columns = {name: [row[name] for row in known] for name in names}
        if less:
            result = recovery(columns[less], columns[above], columns[below])
        else:
            result = ratio_of_means(columns[above], columns[below])
        values = {"mean": result.estimate, "standard_error": result.standard_error}
        ratio = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return {**ratio, "tasks": [row["task"] for row in known]}


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for fewer than two values.

    Args:
        values: Independent values.
    """
    return stdev(values) / math.sqrt(len(values)) if values[1:] else None


def value_at(value: Any, name: str) -> float | None:
    """Return a nested value of a record; None if it is missing.

    Args:
        value: The record.
        name: Dotted path, such as "test.accuracy".
    """
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def select(rows: Iterable[Row], **where: object) -> list[Row]:
    """Return the rows whose fields have the given values.

    Args:
        rows: Rows of a summary.
        **where: Values by field.
    """
    return [row for row in rows if all(row[key] == v for key, v in where.items())]


class ShotsSlice(NamedTuple):
    """The rows of a summary with one number of shots.

    Attributes:
        title: Title of the section that shows them.
        name: Name in links and file names.
        tasks: Names of the tasks in order.
        summary: Rows by field of the summary.
    """

    title: str
    name: str
    tasks: list[str]
    summary: dict[str, list[Row]]

    def rows(self, field: str, **where: object) -> list[Row]:
        """Return the rows whose fields have the given values.

        Args:
            field: Field of the summary.
            **where: Values by field of a row.
        """
        return select(self.summary[field], **where)
