"""The report of a comparison: terminal table, Markdown, self-contained HTML, JSON.

Missing values, None and NaN of the record are shown as dashes; unknown fields are
ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from ntk.reporting import (
    DASH,
    SECTIONS,
    Record,
    flat,
    inline_svg,
    label_of,
    number_at,
    render,
    shown,
    spaces_of,
    write_files,
)
from ntk.studies.comparison.figures import CLASSIFIERS, draw_figures
from ntk.studies.comparison.findings import question, summary_lines
from rocoft.commands import markdown as in_markdown
from rocoft.commands import printable

COLUMNS = (
    # title, path in a space, factor, format, key in a repeated result
    ("parameters", "parameters", 1, ",.0f", ""),
    ("%", "share", 100, ".3g", ""),
    ("diff %", "distance.frobenius_rescaled", 100, ".1f", "frobenius_rescaled"),
    ("body %", "body_distance.frobenius_rescaled", 100, ".1f", ""),
    ("cosine", "distance.cosine", 1, ".3f", "cosine"),
    ("CKA", "distance.cka", 1, ".3f", "cka"),
    ("rank", "spectrum.entropy_rank", 1, ".1f", "entropy_rank"),
    ("align.", "alignment.value", 1, ".3f", "alignment"),
    *((f"{k} %", f"classifiers.{k}.accuracy", 100, ".1f", k) for k in CLASSIFIERS),
)
ACCURACIES = tuple(f"{kind} %" for kind in CLASSIFIERS)


class Row(NamedTuple):
    """A row of the table: a space, or a control that is not a space."""

    section: str
    label: str
    cells: dict[str, tuple[str, str]]
    """Value and standard deviation (or "") as text, by column title."""

    def cell(self, title: str) -> tuple[str, str]:
        """Return the cell of a column, a dash if there is none."""
        return self.cells.get(title, (DASH, ""))


def rows(record: Record) -> tuple[list[str], list[Row]]:
    """Return the titles of columns with values, and the rows.

    Args:
        record: The record of a comparison.
    """
    body = []
    for space in spaces_of(record):
        section = next((s for s in SECTIONS if s == space.get("role")), "control")
        cells = {
            title: (shown(factor * number_at(space, path), fmt), "")
            for title, path, factor, fmt, _ in COLUMNS
        }
        body.append(Row(section, label_of(space), cells))
    for item in record.get("random") or []:
        label = f"{item.get('count')} random {item.get('axis')}"
        body.append(_repeated(f"{label} ({item.get('seeds')} seeds)", item))
    if shuffled := record.get("shuffled"):
        draws = shown(number_at(shuffled, "ridge.draws"), ".0f")
        body.append(_repeated(f"shuffled labels ({draws} draws)", shuffled))
    titles = [column[0] for column in COLUMNS]
    filled = [t for t in titles if any(row.cell(t)[0] != DASH for row in body)]
    if math.isfinite(accuracy := number_at(record, "f0.accuracy")):
        # Not a kernel classifier: shown in the first accuracy column.
        first = next((title for title in filled if title in ACCURACIES), ACCURACIES[0])
        cells = {first: (shown(100 * accuracy, ".1f"), "")}
        body.append(Row("control", "model's own outputs", cells))
        filled.append(first)
    body.sort(key=lambda row: SECTIONS.index(row.section))
    return [t for t in titles if t in filled or t in {"parameters", "%"}], body


def table(record: Record) -> Table:
    """Return the table for a terminal of 100 columns.

    Args:
        record: The record of a comparison.
    """
    titles, body = rows(record)
    name = Text(printable(_title(record)))
    result = Table(box=box.HORIZONTALS, padding=0, pad_edge=False, title=name)
    result.add_column("space", overflow="fold", min_width=16)
    for title in titles:  # Units on a line of their own.
        result.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for i, row in enumerate(body):
        if i and row.section != body[i - 1].section:
            result.add_section()
        cells = (row.cell(title) for title in titles)
        result.add_row(
            Text(printable(row.label)),
            *(Text("\n±".join(filter(None, c))) for c in cells),
        )
    return result


def markdown(record: Record) -> str:
    """Return a report as Markdown: sentences, table, what was run.

    Args:
        record: The record of a comparison.
    """
    titles, body = rows(record)
    lines = [f"# {in_markdown(_title(record))}", "", in_markdown(question(record)), ""]
    lines += [f"- {in_markdown(line)}" for line in summary_lines(record)]
    lines += ["", f"| space | {' | '.join(titles)} |"]
    lines += ["|---" + "|---:" * len(titles) + "|"]
    for row in body:
        cells = (" ± ".join(filter(None, row.cell(title))) for title in titles)
        lines.append(f"| {in_markdown(row.label)} | {' | '.join(cells)} |")
    lines += ["", "## What was run", ""]
    ran = ("command", "created", "model", "task", "kernel", "versions", "timing")
    lines += [f"- {key}: {in_markdown(flat(record.get(key)))}" for key in ran]
    return "\n".join(lines) + "\n"


def html(record: Record, figures: Mapping[str, str]) -> str:
    """Return a report as one self-contained HTML page.

    Args:
        record: The record of a comparison.
        figures: SVG texts by figure name, see `ntk.reporting.style.to_svg`.
    """
    titles, body = rows(record)
    lines = summary_lines(record)
    asked = sum(space.get("role") == "requested" for space in spaces_of(record))
    return render(
        "report.html.j2",
        record=record,
        title=_title(record),
        question=question(record),
        answers=lines[:asked],
        remarks=lines[asked:],
        titles=titles,
        rows=[(row, [row.cell(title) for title in titles]) for row in body],
        spaces=[(label_of(space), space) for space in spaces_of(record)],
        figures={n: Markup(inline_svg(svg, n)) for n, svg in figures.items()},
    )


def write_report(record: Record, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each file atomically.

    Args:
        record: The record of a comparison.
        folder: Output folder; created if missing.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``spectra.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    figures = draw_figures(record)
    page = lambda svgs: html(record, svgs)
    return write_files(folder, record, markdown(record), figures, page)


def _repeated(label: str, results: Record) -> Row:
    """Return a row of means and standard deviations."""
    cells = {}
    for title, _, factor, fmt, key in COLUMNS:
        mean, std = (
            factor * number_at(results, f"{key}.{part}") for part in ("mean", "std")
        )
        cells[title] = (shown(mean, fmt), shown(std, fmt).replace(DASH, ""))
    return Row("control", label, cells)


def _title(record: Record) -> str:
    names = [(record.get(key) or {}).get("name") for key in ("model", "task")]
    return f"Tangent kernels of {names[0] or 'a model'} on {names[1] or 'a task'}"
