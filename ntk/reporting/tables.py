"""Tables of text for a terminal, Markdown and HTML.

A mean over tasks covers those that have a number in every column, so that columns are
comparable; its label gives their number.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ntk.reporting.scores import Row, across, ratio_across
from ntk.reporting.values import DASH
from rocoft.commands import markdown as in_markdown

Column = Mapping[str, Row | None]
"""Rows with a "mean" (spreads, ratios, means over tasks), by task."""


class Format(NamedTuple):
    """Format of a number and its error.

    Attributes:
        spec: Format specification of the built-in `format`.
        factor: Factor applied before formatting.
        error: Field of the row that is shown after ±; empty for no error.
    """

    spec: str
    factor: float = 1
    error: str = ""


KERNEL_OVER = "kernel / "
"""Prefix of the titles of ratio columns, which follow the column they divide by."""

SCORE = Format(".1f", 100, "deviation")
POINTS = Format("+.1f", 1, "deviation")


class ReportTable(NamedTuple):
    """A table of text.

    Attributes:
        name: Name in links, the same for any number of shots.
        title: Title.
        caption: What the numbers are.
        columns: Column titles, that of the row labels first.
        rows: Label and cells of each row.
        means: Rows of means over all tasks.
        folded: Whether the page shows it folded, as a detail.
    """

    name: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    means: list[list[str]] = []  # noqa: RUF012
    folded: bool = False


def write(row: Row | None, fmt: Format) -> str:
    """Return a mean and its error as text; a dash for None.

    Args:
        row: A row with a ``"mean"`` and the format's error field.
        fmt: The format.
    """
    if row is None or row["mean"] is None:
        return DASH
    text = number(row["mean"], fmt)
    if not fmt.error or row[fmt.error] is None:
        return text
    return f"{text} ± {number(row[fmt.error], fmt).lstrip('+')}"


def number(value: float | None, fmt: Format) -> str:
    """Return a number as text; a dash for None.

    Args:
        value: The number.
        fmt: The format; its error is ignored.
    """
    if value is None:
        return DASH
    text = format(fmt.factor * value, fmt.spec)
    return text if float(text) else text.lstrip("+-")


def by_task(
    tasks: Sequence[str],
    columns: Mapping[str, Column],
    formats: Format | Mapping[str, Format],
    *,
    seeds: int,
    error_of_mean: bool = False,
) -> tuple[list[str], list[list[str]], list[list[str]]]:
    """Return titles, rows and means of a table with a row for each task.

    Args:
        tasks: Tasks in order; those without any number are left out.
        columns: Columns by title; those without any number are left out. A row's
            ``"mark"`` follows its number. Ratios hold their terms as ``"kernel"`` and
            ``"tuned"``: over tasks the ratio is that of the means of these.
        formats: One format for all columns, or one per title.
        seeds: Number of seeds; a mean over fewer is followed by their count.
        error_of_mean: Whether means over tasks show a standard error.
    """
    known = {
        title: {task: row for task, row in column.items() if row and _has(row)}
        for title, column in columns.items()
    }
    known = {title: column for title, column in known.items() if column}
    by_title = {
        title: formats if isinstance(formats, Format) else formats[title]
        for title in known
    }
    present = [task for task in tasks if any(task in c for c in known.values())]
    rows = [
        [
            task,
            *(
                _cell(column.get(task), by_title[t], seeds)
                for t, column in known.items()
            ),
        ]
        for task in present
    ]
    complete = [task for task in present if all(task in c for c in known.values())]
    means = []
    if len(complete) > 1:
        error = "standard_error" if error_of_mean else ""
        cells = [
            write(
                _over([column[task] | {"task": task} for task in complete]),
                by_title[title]._replace(error=error),
            )
            for title, column in known.items()
        ]
        means = [[f"mean of {len(complete)}", *cells]]
    return ["task", *known], rows, means


def markdown_table(table: ReportTable) -> str:
    """Return a table as Markdown.

    Args:
        table: The table.
    """
    rule = "|---" + "|---:" * (len(table.columns) - 1) + "|"
    first, *others = (
        f"| {' | '.join(map(in_markdown, cells))} |"
        for cells in (table.columns, *table.rows, *table.means)
    )
    return "\n".join([first, rule, *others])


def parted(table: ReportTable, width: int) -> list[ReportTable]:
    """Split a table into tables that fit a terminal.

    Args:
        table: The table.
        width: Width of the terminal, in characters.

    Returns:
        Tables with the same rows and some of the columns.
    """
    lines = [*table.rows, *table.means]
    widths = [
        max(map(len, (*heading(title).split("\n"), *(line[i] for line in lines))))
        for i, title in enumerate(table.columns)
    ]
    groups: list[list[int]] = []
    used = width
    for i, title in enumerate(table.columns[1:], 1):
        if title.startswith(KERNEL_OVER):
            continue
        together = [i]
        if table.columns[i + 1 : i + 2] == [KERNEL_OVER + title]:
            together.append(i + 1)
        needed = sum(widths[j] + 1 for j in together)
        if used + needed > width:
            groups.append([0])
            used = widths[0] + 2  # A space at either edge.
        groups[-1] += together
        used += needed
    return [
        table._replace(
            columns=[table.columns[i] for i in group],
            rows=[[row[i] for i in group] for row in table.rows],
            means=[[row[i] for i in group] for row in table.means],
        )
        for group in groups
    ]


def heading(title: str) -> str:
    """Return a column's title with line breaks for a terminal.

    Args:
        title: A title such as "rows:3+columns:3".
    """
    if title.startswith(KERNEL_OVER):
        return "ratio"
    for mark in "+,":
        title = title.replace(mark, f"{mark}\n")
    for mark in "@/":
        title = title.replace(mark, f"\n{mark}")
    return title


def narrow(table: ReportTable) -> ReportTable:
    """Return a table without the spaces around ±, for a terminal.

    Args:
        table: The table.
    """
    rows, means = (
        [[cell.replace(" ± ", "±") for cell in row] for row in lines]
        for lines in (table.rows, table.means)
    )
    return table._replace(rows=rows, means=means)


def _cell(row: Row | None, fmt: Format, seeds: int) -> str:
    text = write(row, fmt)
    values = (row or {}).get("values", [])
    count = sum(value is not None for value in values)
    text = f"{text} ({count})" if 0 < count < seeds else text
    return text + (row or {}).get("mark", "")


def _over(rows: Sequence[Row]) -> Row:
    """Return the mean over tasks, or the ratio of the means."""
    if all({"kernel", "tuned"} <= row.keys() for row in rows):
        return ratio_across(rows, "kernel", "tuned")
    return across(rows, "mean")


def _has(row: Row) -> bool:
    return row["mean"] is not None
