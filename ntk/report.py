"""Records -> a table for the terminal, sentences, JSON, Markdown, self-contained HTML.

A record is a plain dictionary as JSON knows it, the evaluation's. What it lacks, and
what is None or NaN in it, is shown as a dash; fields that are not known are ignored.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
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
from ntk.plots import CLASSIFIERS, draw_figures
from ntk.storage import StorageError, finite, write_text

Record = Mapping[str, Any]

DASH = "–"
SECTIONS = ("reference", "requested", "control")
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
    for space in _spaces(record):
        section = next((s for s in SECTIONS if s == space.get("role")), "control")
        cells = {
            title: (_show(factor * _get(space, path), form), "")
            for title, path, factor, form, _ in COLUMNS
        }
        found.append(Row(section, _label(space), cells))
    for item in record.get("random") or []:
        label = f"{item.get('count')} random {item.get('axis')}"
        found.append(_repeated(f"{label} ({item.get('seeds')} seeds)", item))
    if shuffled := record.get("shuffled"):
        draws = _show(_get(shuffled, "ridge.draws"), ".0f")
        found.append(_repeated(f"shuffled labels ({draws} draws)", shuffled))
    titles = [column[0] for column in COLUMNS]
    filled = [t for t in titles if any(row.cell(t)[0] != DASH for row in found)]
    if math.isfinite(own := _get(record, "f0.accuracy")):
        # It is nobody's classifier: the first column of accuracies is its place.
        first = next((title for title in filled if title in ACCURACIES), ACCURACIES[0])
        cells = {first: (_show(100 * own, ".1f"), "")}
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


def question(record: Record) -> str:
    """Return what was asked, as a sentence.

    Args:
        record: Of one evaluation.
    """
    asked = [_spoken(s) for s in _spaces(record) if s.get("role") == "requested"]
    if not asked:
        return "What is the reference kernel like, and how well does it classify?"
    listed = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
    one, several = ("Is the kernel", "does it"), ("Are the kernels", "do they")
    opening, verb = one if len(asked) == 1 else several
    reference = _reference_name(_reference(record))
    return f"{opening} over {listed} close to {reference}, and {verb} classify as well?"


def summary_lines(record: Record) -> list[str]:
    """Return what was found, as sentences, each with how far it can be trusted.

    Args:
        record: Of one evaluation.
    """
    reference, examples = _reference(record), _get(record, "task.test")
    asked = [s for s in _spaces(record) if s.get("role") == "requested"]
    return [
        *(_comparison(space, reference, examples) for space in asked),
        *_controls(record),
        *_services(record),
        _certificate(record),
        *_estimate(record),
        *map(str, (record.get("model") or {}).get("notes") or []),
    ]


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
    asked = sum(space.get("role") == "requested" for space in _spaces(record))
    return render(
        "report.html.j2",
        record=record,
        title=_title(record),
        question=question(record),
        answers=lines[:asked],
        remarks=lines[asked:],
        titles=titles,
        rows=[(row, [row.cell(title) for title in titles]) for row in body],
        spaces=[(_label(space), space) for space in _spaces(record)],
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
        _write_bytes(files[f"{name}.png"], to_png(figure))
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


def _comparison(space: Record, reference: Record | None, examples: float) -> str:
    """Return how a kernel differs from the reference's and how both classify."""
    name = _reference_name(reference)
    text = f"The kernel over {_spoken(space)}"
    if math.isfinite(share := _get(space, "share")):
        text += f" ({_short(share)} % of the parameters)"
    difference = _get(space, "distance.frobenius_rescaled")
    if math.isfinite(difference):
        text += f" differs from {name} by {_short(difference)} % (Frobenius, best scale"
        body = _get(space, "body_distance.frobenius_rescaled")
        if math.isfinite(body):
            text += f"; {_short(body)} % without the head's block"
        text += ")"
    else:
        text += f" has no distance to {name} that could be computed"
    for kind in CLASSIFIERS:
        p = _get(space, f"classifiers.{kind}.accuracy")
        q = _get(reference, f"classifiers.{kind}.accuracy")
        if math.isfinite(p):
            reached = f"reaches {100 * p:.1f} %"
            found = _gap(p, q, examples) if math.isfinite(q) else reached
            text += f" and its {'SVM' if kind == 'svm' else kind} classifier {found}"
            break
    return f"{text}."


def _gap(p: float, q: float, examples: float) -> str:
    """Return how an accuracy compares with the reference's, and with chance."""
    points = 100 * (p - q)
    side = "above" if points > 0 else "below"
    text = f"is {abs(points):.1f} points {side} it" if p != q else "is as accurate"
    text += f" ({100 * p:.1f} % against {100 * q:.1f} %"
    if examples > 0:
        # As if independent: on the same examples a difference is mostly less noisy.
        noise = 200 * math.sqrt((p * (1 - p) + q * (1 - q)) / examples)
        text += f", {examples:.0f} test examples: differences "
        if abs(points) <= noise:
            text += f"under {noise:.1f} points are within two standard errors"
        else:
            text += f"above {noise:.1f} points are beyond two standard errors"
    return f"{text})"


def _controls(record: Record) -> Iterator[str]:
    """Yield what the controls reach, in one sentence."""
    found = []
    for space in _spaces(record):
        p = _get(space, "classifiers.ridge.accuracy")
        if space.get("role") == "control" and math.isfinite(p):
            found.append(f"{100 * p:.1f} % over {_spoken(space)}")
    for item in record.get("random") or []:
        if value := _spread(item):
            selection = f"{item.get('count')} random {item.get('axis')}"
            found.append(f"{value} over {selection} ({item.get('seeds')} seeds)")
    if value := _spread(record.get("shuffled")):
        found.append(f"{value} with shuffled labels")
    if found:
        yield f"Controls: ridge reaches {', '.join(found)}."
    if math.isfinite(own := _get(record, "f0.accuracy")):
        yield f"The model's own outputs, before any training, reach {100 * own:.1f} %."


def _services(record: Record) -> Iterator[str]:
    """Yield how parameters were served, by name where it was not by whole batches."""
    services = (record.get("kernel") or {}).get("services") or {}
    if math.isfinite(count := _get(services, "batch")):
        yield f"{count:,.0f} parameter tensors were served by factors of whole batches."
    for key, what in (
        ("single", "served by factors of one example at a time"),
        ("definition", "served by the definition (torch.func)"),
        ("unused", "without effect on the outputs, so that its kernel is zero"),
    ):
        if names := services.get(key):
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            tensors = f"{len(names)} parameter tensor{'s' if len(names) > 1 else ''}"
            yield f"{tensors} {what}: {', '.join(map(str, names[:5]))}{rest}."


def _certificate(record: Record) -> str:
    """Return how exact the kernels were found to be."""
    checked = [s for s in _spaces(record) if s.get("certificate")]
    if not checked:
        return "No entry was recomputed by the definition: exactness was not checked."
    unchecked = [_label(s) for s in _spaces(record) if not s.get("certificate")]
    besides = f" Not recomputed: {', '.join(unchecked)}." if unchecked else ""
    errors = {_label(s): _get(s, "certificate.relative_error") for s in checked}
    if bad := [label for label, error in errors.items() if not math.isfinite(error)]:
        return f"Recomputing entries gave no number for {', '.join(bad)}."
    entries = sum(_get(s, "certificate.entries") for s in checked)
    worst = max(errors, key=lambda label: errors[label])
    return (
        f"{_show(entries, ',.0f')} random entries, recomputed by the definition, agree "
        f"with the kernels within a relative error of {errors[worst]:.1e} (the worst: "
        f"{worst}).{besides}"
    )


def _estimate(record: Record) -> Iterator[str]:
    """Yield how far the full kernel may be from the exact one, if it is an estimate."""
    found = (record.get("kernel") or {}).get("estimate")
    if found:
        error = _get(found, "relative_error")
        yield (
            "The full kernel is an estimate from "
            f"{_get(found, 'entries'):,.0f} numbers of each large weight, with a "
            "relative error (Frobenius) of about "
            f"{_show(100 * error, '.1f')} %; measures against it carry that error."
        )


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageError: If it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        reason = f"{str(path)!r} could not be written: {error.strerror}."
        raise StorageError(reason) from error
    finally:
        part.unlink(missing_ok=True)


def _spaces(record: Record) -> list[Record]:
    """Return the spaces: the reference, then the requested ones, then controls."""
    order = {role: i for i, role in enumerate(SECTIONS)}
    spaces = record.get("spaces") or []
    return sorted(spaces, key=lambda s: order.get(s.get("role"), len(order)))


def _reference(record: Record) -> Record | None:
    return next((s for s in _spaces(record) if s.get("role") == SECTIONS[0]), None)


def _reference_name(reference: Record | None) -> str:
    if reference is None or _label(reference) == "full":
        return "the full kernel"
    return f"the kernel over {_spoken(reference)}"


def _label(space: Record) -> str:
    return str(space.get("label") or space.get("name"))


def _spoken(space: Record) -> str:
    """Return a space's label as it is said: "rows 3" as "3 rows"."""
    label = _label(space)
    if match := re.fullmatch(r"(row|column)s (\d+)", label):
        return f"{match[2]} {match[1]}{'' if match[2] == '1' else 's'}"
    if match := re.fullmatch(r"(?i:lora) (\d+)", label):
        return f"LoRA of rank {match[1]}"
    said = {"full": "all parameters", "head": "the head", "bias": "the biases"}
    return said.get(label.removesuffix(" only"), label)


def _repeated(label: str, results: Record) -> Row:
    """Return a row of means and standard deviations."""
    cells = {}
    for title, _, factor, form, key in COLUMNS:
        mean, std = (
            factor * _get(results, f"{key}.{part}") for part in ("mean", "std")
        )
        cells[title] = (_show(mean, form), _show(std, form).replace(DASH, ""))
    return Row("control", label, cells)


def _spread(results: Record | None) -> str:
    """Return the mean and standard deviation of ridge's accuracy, "" if unknown."""
    mean, std = (100 * _get(results, f"ridge.{part}") for part in ("mean", "std"))
    spread = f" ± {std:.1f}" if math.isfinite(std) else ""
    return f"{mean:.1f}{spread} %" if math.isfinite(mean) else ""


def _get(values: object, path: str) -> float:
    """Return a number from within dictionaries, NaN if it is not there."""
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, Real) else math.nan


def _show(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else DASH


def _number(value: object) -> str:
    """Return any value as text, a number that is no integer to four digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Real | None | ChainableUndefined):
        return _show(_get({"": value}, ""), ".4g")
    return str(value)


def _short(value: float) -> str:
    """Return a share in percent, as short as a sentence wants it."""
    percent = 100 * value
    if 0 < percent < 0.001:
        return "less than 0.001"
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.2g}"


def _title(record: Record) -> str:
    names = [(record.get(key) or {}).get("name") for key in ("model", "task")]
    return f"Tangent kernels of {names[0] or 'a model'} on {names[1] or 'a task'}"
