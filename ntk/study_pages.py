"""What a study's report says -> Markdown, a self-contained HTML page, tables, files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from ntk.drawing import inline_svg
from ntk.report import escape, flat, render, write_files
from ntk.study_grids import Grid, heading, markdown_table

WIDTH = 110
"""Of the terminal that tables are made for."""


@dataclass(frozen=True)
class Section:
    """What is shown together, such as all of one number of shots.

    Attributes:
        title: Of it.
        name: The same for links.
        grids: Tables, those that are folded last.
        figures: Names of the figures, in their order; those not drawn are left out.
    """

    title: str
    name: str
    grids: Sequence[Grid]
    figures: Sequence[str]


@dataclass(frozen=True)
class Page:
    """A report but for its figures.

    Attributes:
        title: Of it.
        question: That the study asks.
        answers: Sentences.
        remarks: Sentences on how far these can be trusted.
        sections: Tables and figures.
        ran: What was run, names and values, of which ``"command"`` is one.
        captions: Heading and text of figures, by their names' part before "-".
        words: Glossary.
    """

    title: str
    question: str
    answers: Sequence[str]
    remarks: Sequence[str]
    sections: Sequence[Section]
    ran: Sequence[tuple[str, Any]]
    captions: Mapping[str, tuple[str, str]]
    words: Mapping[str, str]

    @property
    def lines(self) -> list[str]:
        """What was found, as sentences, each with how far it can be trusted."""
        return [*self.answers, *self.remarks]


def what_ran(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what a study's summary says of the command, the model and the settings.

    Args:
        summary: With these.
    """
    return [
        ("command", summary["command"]),
        ("model", ", ".join(summary["models"])),
        *summary["settings"].items(),
    ]


def terminal_table(title: str, grid: Grid) -> Table:
    """Return a table for a terminal.

    Args:
        title: Above it.
        grid: The table; see `study_grids.parted` for one that is too wide.
    """
    result = Table(box=box.HORIZONTALS, padding=0, pad_edge=False, title=Text(title))
    result.add_column(grid.columns[0], no_wrap=True)
    for name in grid.columns[1:]:
        result.add_column(Text(heading(name)), justify="right", no_wrap=True)
    for row in grid.rows:
        result.add_row(*map(Text, row))
    result.add_section()
    for row in grid.means:
        result.add_row(*map(Text, row))
    return result


def markdown(page: Page) -> str:
    """Return a report as Markdown: sentences, all tables, what was run.

    Args:
        page: What it says.
    """
    lines = [f"# {escape(page.title)}", "", page.question, ""]
    lines += [f"- {escape(line)}" for line in page.lines]
    for section in page.sections:
        lines += ["", f"## {escape(section.title)}"]
        for grid in section.grids:
            lines += ["", f"### {escape(grid.title)}", "", escape(grid.caption), ""]
            lines.append(markdown_table(grid))
    lines += ["", "## What was run", ""]
    lines += [f"- {escape(f'{key}: {flat(value)}')}" for key, value in page.ran]
    return "\n".join(lines) + "\n"


def html(page: Page, figures: Mapping[str, str]) -> str:
    """Return a report as one HTML page that needs nothing else.

    Args:
        page: What it says.
        figures: SVG by name, as `ntk.drawing.to_svg` writes it.
    """
    drawn = [
        [
            (name, page.captions[name.partition("-")[0]], _inline(figures[name], name))
            for name in section.figures
            if name in figures
        ]
        for section in page.sections
    ]
    return render(
        "study.html.j2",
        page=page,
        sections=list(zip(page.sections, drawn, strict=True)),
        flat=flat,
    )


def write_page(
    page: Page, summary: Mapping[str, Any], figures: Mapping[str, Figure], folder: Path
) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each whole or not.

    Args:
        page: What the report says.
        summary: For report.json.
        figures: By name.
        folder: Where, made if it does not exist.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``scores-16.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    whole = lambda drawn: html(page, drawn)
    return write_files(folder, summary, markdown(page), figures, whole)


def _inline(svg: str, name: str) -> Markup:
    return Markup(inline_svg(svg, name))
