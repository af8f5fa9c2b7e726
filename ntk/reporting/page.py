"""Render a report as Markdown, self-contained HTML, terminal tables and files."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from ntk.reporting.style import inline_svg, to_png, to_svg
from ntk.reporting.tables import ReportTable, heading, markdown_table
from ntk.reporting.text import as_text, flat
from ntk.reporting.values import DASH, Record
from ntk.scale import StorageError, finite, write_bytes, write_text
from rocoft.commands import markdown as in_markdown
from rocoft.commands import printable, printable_json

WIDTH = 110
"""Width of terminal tables, in characters."""


@dataclass(frozen=True)
class Section:
    """A section of a report, such as the results with 16 shots.

    Attributes:
        title: Title.
        name: Title in links.
        tables: Tables, folded ones last.
        figures: Names of the figures in order; those that were not drawn are skipped.
    """

    title: str
    name: str
    tables: Sequence[ReportTable]
    figures: Sequence[str]


@dataclass(frozen=True)
class Page:
    """The text and tables of a report.

    Attributes:
        title: Title.
        question: The question that the study asks.
        answers: Sentences that answer it.
        remarks: Sentences on missing data and uncertainty.
        sections: Tables and figures.
        ran: Names and values of what was run, among them ``"command"``.
        captions: Heading and caption of each figure, by its name up to the first "-".
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
        """Answers, then remarks."""
        return [*self.answers, *self.remarks]


def what_ran(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the command, models and settings of a study for the report.

    Args:
        summary: The study's summary.
    """
    return [
        ("command", summary["command"]),
        ("model", ", ".join(summary["models"])),
        *summary["settings"].items(),
    ]


def terminal_table(title: str, table: ReportTable) -> Table:
    """Return a table for a terminal.

    Args:
        title: Title above the table.
        table: The table; `tables.parted` splits one that is too wide.
    """
    result = Table(
        box=box.HORIZONTALS, padding=0, pad_edge=False, title=Text(printable(title))
    )
    text = lambda cell: Text(printable(cell))
    result.add_column(text(table.columns[0]), no_wrap=True)
    for name in table.columns[1:]:
        shown = Text(heading(printable(name)))
        result.add_column(shown, justify="right", no_wrap=True)
    for row in table.rows:
        result.add_row(*map(text, row))
    result.add_section()
    for row in table.means:
        result.add_row(*map(text, row))
    return result


def markdown(page: Page) -> str:
    """Return a report as Markdown: sentences, all tables, what was run.

    Args:
        page: The report.
    """
    lines = [f"# {in_markdown(page.title)}", "", in_markdown(page.question), ""]
    lines += [f"- {in_markdown(line)}" for line in page.lines]
    for section in page.sections:
        lines += ["", f"## {in_markdown(section.title)}"]
        for table in section.tables:
            lines += [
                "",
                f"### {in_markdown(table.title)}",
                "",
                in_markdown(table.caption),
                "",
            ]
            lines.append(markdown_table(table))
    lines += ["", "## What was run", ""]
    lines += [f"- {in_markdown(f'{key}: {flat(value)}')}" for key, value in page.ran]
    return "\n".join(lines) + "\n"


def html(page: Page, figures: Mapping[str, str]) -> str:
    """Return a report as one self-contained HTML page.

    Args:
        page: The report.
        figures: SVG texts by figure name, see `ntk.reporting.style.to_svg`.
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
    """Write report.json, report.md, report.html and the figures, each file atomically.

    Args:
        page: The report.
        summary: The study's summary, written to report.json.
        figures: Figures by name.
        folder: Output folder; created if missing.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``scores-16.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    to_html = lambda svgs: html(page, svgs)
    return write_files(folder, summary, markdown(page), figures, to_html)


def _inline(svg: str, name: str) -> Markup:
    return Markup(inline_svg(svg, name))


def render(template: str, **values: Any) -> str:
    """Return a page with all text escaped and dashes for None and missing values.

    Args:
        template: File name of a template of this package.
        **values: Values that the template shows.
    """
    environment = Environment(
        loader=PackageLoader("ntk.reporting", "."),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=_finalized,
    )
    environment.filters["number"] = as_text
    return environment.get_template(template).render(values)


def _finalized(value: Any) -> Any:
    """Return a value as a page shows it: a dash for None, no control characters."""
    if value is None:
        return DASH
    # What is marked as HTML already holds line breaks of its own.
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value) if is_text else value


def to_json(record: Record) -> str:
    """Return a record as indented JSON, each list of numbers on one line.

    Args:
        record: The record. NaN and infinity become null, which JSON lacks.
    """
    text = json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON strings hold no line breaks, so this matches lists only.
    numbers = r"\[\n[-+.,\s\deENaInfity]*\]"
    joined = re.sub(numbers, lambda m: f"[{' '.join(m[0][1:-1].split())}]", text)
    return f"{printable_json(joined)}\n"


def write_files(
    folder: Path,
    record: Record,
    text: str,
    figures: Mapping[str, Figure],
    page: Callable[[Mapping[str, str]], str],
) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each file atomically.

    Args:
        folder: Output folder; created if missing.
        record: Content of report.json.
        text: Content of report.md.
        figures: Figures by name.
        page: Function from the figures' SVG texts to the content of report.html.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``spectra.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    ends = {"json": "json", "markdown": "md", "html": "html"}
    files = {kind: folder / f"report.{end}" for kind, end in ends.items()}
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create folder {str(folder)!r}: {error.strerror}. Choose another "
            "one with --output."
        ) from error
    write_text(files["json"], to_json(record))
    write_text(files["markdown"], text)
    svgs = {}
    for name, figure in figures.items():
        svgs[name] = to_svg(figure)
        for kind in ("svg", "png"):
            files[f"{name}.{kind}"] = folder / "figures" / f"{name}.{kind}"
        write_text(files[f"{name}.svg"], svgs[name])
        write_bytes(files[f"{name}.png"], to_png(figure))
    write_text(files["html"], page(svgs))
    return files
