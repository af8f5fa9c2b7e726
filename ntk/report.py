"""Records -> a table for the terminal, sentences, JSON, Markdown, self-contained HTML.

A record is a plain dictionary as JSON knows it, the evaluation's. What it lacks, and
what is None or NaN in it, is shown as a dash; fields that are not known are ignored.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from ntk.drawing import inline_svg, to_png, to_svg
from ntk.findings import question, summary_lines
from ntk.plots import CLASSIFIERS, draw_figures
from ntk.record_values import (
    DASH,
    SECTIONS,
    Record,
    label_of,
    number,
    shown,
    spaces_of,
)
from ntk.storage import StorageError, finite, write_bytes, write_text

COLUMNS = (
    # title, place in a space, factor, format, place in a repeated result
    ("parameters", "parameters", 1, ",.0f", ""),
    ("%", "share", 100, ".3g", ""),
    ("diff %", "distance.frobenius_rescaled", 100, ".1f", "frobenius_rescaled"),
    ("body %", "body_distance.frobenius_rescaled", 100, ".1f", ""),
    ("cosine", "distance.cosine", 1, ".3f", "cosine"),
    ("CKA", "distance.cka", 1, ".3f", "cka"),
    ("eff. dim.", "spectrum.effective_dimension", 1, ".1f", "effective_dimension"),
    ("align.", "alignment.value", 1, ".3f", "alignment"),
    *((f"{k} %", f"classifiers.{k}.accuracy", 100, ".1f", k) for k in CLASSIFIERS),
)
ACCURACIES = tuple(f"{kind} %" for kind in CLASSIFIERS)


class Row(NamedTuple):
    """A row of the table: of a space, or of a control that is none."""

    section: str
    label: str
    cells: dict[str, tuple[str, str]]
    """By column title, the value as text and its standard deviation or ""."""

    def cell(self, title: str) -> tuple[str, str]:
        """Return the cell of a column, a dash where there is none."""
        return self.cells.get(title, (DASH, ""))


def rows(record: Record) -> tuple[list[str], list[Row]]:
    """Return the table's columns, without those that hold nothing, and its rows.

    Args:
        record: Of one evaluation.
    """
    found = []
    for space in spaces_of(record):
        section = next((s for s in SECTIONS if s == space.get("role")), "control")
        cells = {
            title: (shown(factor * number(space, path), form), "")
            for title, path, factor, form, _ in COLUMNS
        }
        found.append(Row(section, label_of(space), cells))
    for item in record.get("random") or []:
        label = f"{item.get('count')} random {item.get('axis')}"
        found.append(_repeated(f"{label} ({item.get('seeds')} seeds)", item))
    if shuffled := record.get("shuffled"):
        draws = shown(number(shuffled, "ridge.draws"), ".0f")
        found.append(_repeated(f"shuffled labels ({draws} draws)", shuffled))
    titles = [column[0] for column in COLUMNS]
    filled = [t for t in titles if any(row.cell(t)[0] != DASH for row in found)]
    if math.isfinite(own := number(record, "f0.accuracy")):
        # It is nobody's classifier: the first column of accuracies is its place.
        first = next((title for title in filled if title in ACCURACIES), ACCURACIES[0])
        cells = {first: (shown(100 * own, ".1f"), "")}
        found.append(Row("control", "model's own outputs", cells))
        filled.append(first)
    found.sort(key=lambda row: SECTIONS.index(row.section))
    return [t for t in titles if t in filled or t in {"parameters", "%"}], found


def table(record: Record) -> Table:
    """Return the table for a terminal of 100 columns.

    Args:
        record: Of one evaluation.
    """
    titles, body = rows(record)
    name = Text(_title(record))
    result = Table(box=box.HORIZONTALS, padding=0, pad_edge=False, title=name)
    result.add_column("space", overflow="fold", min_width=16)
    for title in titles:  # a unit goes below its name
        result.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for i, row in enumerate(body):
        if i and row.section != body[i - 1].section:
            result.add_section()
        cells = (row.cell(title) for title in titles)
        result.add_row(
            Text(row.label), *(Text("\n±".join(filter(None, c))) for c in cells)
        )
    return result


def markdown(record: Record) -> str:
    """Return a report as Markdown: sentences, table, what was run.

    Args:
        record: Of one evaluation.
    """
    titles, body = rows(record)
    lines = [f"# {escape(_title(record))}", "", escape(question(record)), ""]
    lines += [f"- {escape(line)}" for line in summary_lines(record)]
    lines += ["", f"| space | {' | '.join(titles)} |"]
    lines += ["|---" + "|---:" * len(titles) + "|"]
    for row in body:
        cells = (" ± ".join(filter(None, row.cell(title))) for title in titles)
        lines.append(f"| {escape(row.label)} | {' | '.join(cells)} |")
    lines += ["", "## What was run", ""]
    ran = ("command", "created", "model", "task", "kernel", "versions", "timing")
    lines += [f"- {key}: {escape(flat(record.get(key)))}" for key in ran]
    return "\n".join(lines) + "\n"


def html(record: Record, figures: Mapping[str, str]) -> str:
    """Return a report as one HTML page that needs nothing else.

    Args:
        record: Of one evaluation.
        figures: SVG by name, as `ntk.drawing.to_svg` writes it.
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


def render(template: str, **values: Any) -> str:
    """Return a page: every text escaped, None and what is missing shown as a dash.

    Args:
        template: Of this package.
        **values: What it shows.
    """
    environment = Environment(
        loader=PackageLoader("ntk", "."),
        autoescape=True,
        undefined=ChainableUndefined,
        finalize=lambda value: DASH if value is None else value,
    )
    environment.filters["number"] = _number
    return environment.get_template(template).render(values)


def to_json(record: Record) -> str:
    """Return a record as JSON, indented, each list of numbers on one line.

    Args:
        record: Of one evaluation. What has no value becomes null: JSON has no NaN.
    """
    text = json.dumps(finite(record), indent=2, ensure_ascii=False, allow_nan=False)
    # No text within JSON holds a line break, so these are lists.
    numbers = r"\[\n[-+.,\s\deENaInfity]*\]"
    joined = re.sub(numbers, lambda m: f"[{' '.join(m[0][1:-1].split())}]", text)
    return f"{joined}\n"


def write_report(record: Record, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each whole or not.

    Args:
        record: Of one evaluation.
        folder: Where, made if it does not exist.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``spectra.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    figures = draw_figures(record)
    page = lambda texts: html(record, texts)
    return write_files(folder, record, markdown(record), figures, page)


def write_files(
    folder: Path,
    record: Record,
    text: str,
    figures: Mapping[str, Figure],
    page: Callable[[Mapping[str, str]], str],
) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each whole or not.

    Args:
        folder: Where, made if it does not exist.
        record: For report.json.
        text: For report.md.
        figures: By name.
        page: From the figures as SVG to report.html.

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
            f"{str(folder)!r} cannot be made: {error.strerror}. Choose another folder "
            "with --output."
        ) from error
    write_text(files["json"], to_json(record))
    write_text(files["markdown"], text)
    texts = {}
    for name, figure in figures.items():
        texts[name] = to_svg(figure)
        for kind in ("svg", "png"):
            files[f"{name}.{kind}"] = folder / "figures" / f"{name}.{kind}"
        write_text(files[f"{name}.svg"], texts[name])
        write_bytes(files[f"{name}.png"], to_png(figure))
    write_text(files["html"], page(texts))
    return files


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, also within a table.

    Args:
        text: Any.
    """
    text = re.sub(r"([\\|*_`\[\]#])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def flat(value: object) -> str:
    """Return what is within dictionaries and lists, on one line.

    Args:
        value: As JSON knows it.
    """
    if isinstance(value, Mapping):
        parts = ((k, flat(v)) for k, v in value.items() if v not in (None, "", []))
        return ", ".join(f"{k} {text}" for k, text in parts)
    if isinstance(value, list):
        return f"({', '.join(map(flat, value))})"
    return _number(value) if isinstance(value, float) else str(value)


def _repeated(label: str, results: Record) -> Row:
    """Return a row of means and standard deviations."""
    cells = {}
    for title, _, factor, form, key in COLUMNS:
        mean, std = (
            factor * number(results, f"{key}.{part}") for part in ("mean", "std")
        )
        cells[title] = (shown(mean, form), shown(std, form).replace(DASH, ""))
    return Row("control", label, cells)


def _number(value: object) -> str:
    """Return any value as text, a number that is no integer to four digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Real | None | ChainableUndefined):
        return shown(number({"": value}, ""), ".4g")
    return str(value)


def _title(record: Record) -> str:
    names = [(record.get(key) or {}).get("name") for key in ("model", "task")]
    return f"Tangent kernels of {names[0] or 'a model'} on {names[1] or 'a task'}"
