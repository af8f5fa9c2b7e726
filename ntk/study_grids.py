"""Tables of text, the same for a terminal, Markdown and HTML.

A mean over tasks is over those that have a number in every column, so that columns can
be compared, and says how many these are.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ntk.record_values import DASH
from ntk.report import escape
from ntk.study_scores import Row, across

Column = Mapping[str, Row | None]
"""Spreads, ratios or means over tasks: rows with a "mean", by task."""


class Form(NamedTuple):
    """How a number is written, and its error beside it.

    Attributes:
        spec: Of `format`.
        factor: Of the number.
        error: Which field of its row is shown after ±; none if that is empty.
    """

    spec: str
    factor: float = 1
    error: str = ""


KERNEL_OVER = "kernel / "
"""Titles of ratios begin with it; they stand beside what is below the line."""

SCORE = Form(".1f", 100, "deviation")
POINTS = Form("+.1f", 1, "deviation")


class Grid(NamedTuple):
    """A table of text.

    Attributes:
        name: In file names and links, the same for any shots.
        title: As it is shown.
        caption: What the numbers are.
        columns: Titles; the first is that of the rows' labels.
        rows: Label and cells.
        means: Rows over all tasks.
        folded: Whether it is a detail.
    """

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    means: list[list[str]] = []  # noqa: RUF012
    folded: bool = False


def write(row: Row | None, form: Form) -> str:
    """Return a mean and its error as text, a dash where there is none.

    Args:
        row: With a ``"mean"``, and the error of the form.
        form: How.
    """
    if row is None or row["mean"] is None:
        return DASH
    text = number(row["mean"], form)
    if not form.error or row[form.error] is None:
        return text
    return f"{text} ± {number(row[form.error], form).lstrip('+')}"


def number(value: float | None, form: Form) -> str:
    """Return a number as text, a dash where there is none.

    Args:
        value: The number.
        form: How, without error.
    """
    if value is None:
        return DASH
    text = format(form.factor * value, form.spec)
    return text if float(text) else text.lstrip("+-")


def by_task(
    tasks: Sequence[str],
    columns: Mapping[str, Column],
    forms: Form | Mapping[str, Form],
    *,
    seeds: int,
    error_of_mean: bool = False,
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return titles, rows and means of a table with a row for each task.

    Args:
        tasks: In their order; those without any number are left out.
        columns: By title; those without any number are left out.
        forms: Of all columns, or by title.
        seeds: Of the study. A number that is over fewer says over how many.
        error_of_mean: Whether means have a standard error.
    """
    known = {
        title: {task: row for task, row in column.items() if row and _has(row)}
        for title, column in columns.items()
    }
    known = {title: column for title, column in known.items() if column}
    form = {
        title: forms if isinstance(forms, Form) else forms[title] for title in known
    }
    present = [task for task in tasks if any(task in c for c in known.values())]
    rows = [
        [
            task,
            *(_cell(column.get(task), form[t], seeds) for t, column in known.items()),
        ]
        for task in present
    ]
    complete = [task for task in present if all(task in c for c in known.values())]
    means = []
    if len(complete) > 1:
        error = "standard_error" if error_of_mean else ""
        cells = [
            write(
                across([column[task] | {"task": task} for task in complete], "mean"),
                form[title]._replace(error=error),
            )
            for title, column in known.items()
        ]
        means = [[f"mean of {len(complete)}", *cells]]
    return ["task", *known], rows, means


def markdown_table(grid: Grid) -> str:
    """Return a table as Markdown.

    Args:
        grid: The table.
    """
    rule = "|---" + "|---:" * (len(grid.columns) - 1) + "|"
    first, *others = (
        f"| {' | '.join(map(escape, cells))} |"
        for cells in (grid.columns, *grid.rows, *grid.means)
    )
    return "\n".join([first, rule, *others])


def parted(grid: Grid, width: int) -> list[Grid]:
    """Return a table in parts that a terminal has room for.

    Args:
        grid: The table.
        width: Of the terminal, in characters.

    Returns:
        Tables with the same rows.
    """
    lines = [*grid.rows, *grid.means]
    widths = [
        max(map(len, (*heading(title).split("\n"), *(line[i] for line in lines))))
        for i, title in enumerate(grid.columns)
    ]
    groups: list[list[int]] = []
    used = width
    for i, title in enumerate(grid.columns[1:], 1):
        if title.startswith(KERNEL_OVER):
            continue
        own = [i]
        if grid.columns[i + 1 : i + 2] == [KERNEL_OVER + title]:
            own.append(i + 1)
        wanted = sum(widths[j] + 1 for j in own)
        if used + wanted > width:
            groups.append([0])
            # The edges of the table are spaces.
            used = widths[0] + 2
        groups[-1] += own
        used += wanted
    return [
        grid._replace(
            columns=[grid.columns[i] for i in group],
            rows=[[row[i] for i in group] for row in grid.rows],
            means=[[row[i] for i in group] for row in grid.means],
        )
        for group in groups
    ]


def heading(title: str) -> str:
    """Return a column's title on lines of its own, for a terminal.

    Args:
        title: Such as "rows:3+columns:3".
    """
    if title.startswith(KERNEL_OVER):
        return "ratio"
    for mark in "+,":
        title = title.replace(mark, f"{mark}\n")
    for mark in "@/":
        title = title.replace(mark, f"\n{mark}")
    return title


def narrow(grid: Grid) -> Grid:
    """Return a table without spaces around ±, for a terminal.

    Args:
        grid: The table.
    """
    rows, means = (
        [[cell.replace(" ± ", "±") for cell in row] for row in lines]
        for lines in (grid.rows, grid.means)
    )
    return grid._replace(rows=rows, means=means)


def _cell(row: Row | None, form: Form, seeds: int) -> str:
    text = write(row, form)
    values = (row or {}).get("values", [])
    count = sum(value is not None for value in values)
    return f"{text} ({count})" if 0 < count < seeds else text


def _has(row: Row) -> bool:
    return row["mean"] is not None
