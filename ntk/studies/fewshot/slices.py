"""The parts of the summary of a few-shot study that one section of the report shows."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ntk.reporting import Column, Row, select


class Slice(NamedTuple):
    """The rows of a summary with one number of shots and one kind of kernel.

    Attributes:
        title: Shots, and the kind if there are several.
        name: Name in links and file names.
        shots: Number of training examples per label.
        seeds: Number of seeds of the study.
        splits: Rows of splits, with the scores of f0.
        kernels: Rows of kernels.
        tuned: Rows of fine-tuning.
        comparisons: Rows of kernels against fine-tuning, by task.
        pairs: Means of these over tasks.
        reliability: Variances of the scores of fine-tuning.
    """

    title: str
    name: str
    shots: int
    seeds: int
    splits: list[Row]
    kernels: list[Row]
    tuned: list[Row]
    comparisons: list[Row]
    pairs: list[Row]
    reliability: list[Row]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [row["task"] for row in self.splits]

    @property
    def spaces(self) -> list[str]:
        """Names of the kernels' spaces."""
        return list(dict.fromkeys(row["space"] for row in self.kernels))

    @property
    def methods(self) -> list[str]:
        """Names of the fine-tuning methods."""
        return list(dict.fromkeys(row["method"] for row in self.tuned))

    @property
    def f0(self) -> Column:
        """Scores of the model before training, by task."""
        return {row["task"]: row["f0"] for row in self.splits}

    def of_spaces(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of the kernels by space and task."""
        return {s: column_of(self.kernels, field, *path, space=s) for s in self.spaces}

    def of_methods(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of fine-tuning by method and task."""
        return {m: column_of(self.tuned, field, *path, method=m) for m in self.methods}


def slices(summary: Mapping[str, Any]) -> list[Slice]:
    """Return the slices of a summary by shots and kind of kernel.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    several = len(summary["kinds"]) > 1
    found = []
    for shots in summary["shots"]:
        for kind in summary["kinds"] or [None]:
            where = {"shots": shots, "kind": kind}
            found.append(
                Slice(
                    f"{shots} shots, {kind}" if several else f"{shots} shots",
                    f"{shots}-{kind}" if several else f"{shots}",
                    shots,
                    len(summary["seeds"]),
                    select(summary["splits"], shots=shots),
                    select(summary["kernels"], **where),
                    select(summary["tuned"], shots=shots),
                    select(summary["comparisons"], **where),
                    select(summary["over_tasks"]["comparisons"], **where),
                    select(summary["reliability"], shots=shots),
                )
            )
    return found


def column_of(rows: Iterable[Row], field: str, *path: str, **where: object) -> Column:
    """Return a field of the selected rows, or a value nested in it, by task.

    Args:
        rows: Rows by task.
        field: The field.
        *path: Keys within it.
        **where: Values by field of the selected rows.
    """
    column: dict[str, Row | None] = {}
    for row in select(rows, **where):
        value = row[field]
        for key in path:
            value = value[key]
        column[row["task"]] = value
    return column


def ratios_of(rows: Iterable[Row], **where: object) -> Column:
    """Return ratios with their terms, by task.

    Args:
        rows: Rows of comparisons.
        **where: Values by field of the selected rows.
    """
    return {
        row["task"]: row["ratio"]
        and {**row["ratio"], "kernel": row["kernel"], "tuned": row["tuned"]}
        for row in select(rows, **where)
    }
