"""A study's records -> tables for the terminal, sentences, JSON, Markdown, HTML.

Everything is said by the summary (`study_summary`), which holds no times: a study that
was stopped and taken up again has the same report.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from ntk.plots import inline_svg
from ntk.report import escape, flat, render, write_files
from ntk.study_figures import draw_figures
from ntk.study_grids import (
    Column,
    Form,
    Grid,
    heading,
    markdown_table,
    narrow,
    parted,
    write,
)
from ntk.study_scores import Row, across
from ntk.study_summary import FEW_ROWS, collect, select
from ntk.study_tables import Part, grids, kernel_scores, parts, tuned_scores

__all__ = [
    "collect",
    "html",
    "markdown",
    "summary_lines",
    "tables",
    "write_study",
]

Summary = Mapping[str, Any]

WIDTH = 110
"""Of the terminal that tables are made for."""
TWO_ERRORS = 2
QUESTION = (
    "Do classifiers on kernels reach what fine-tuning reaches, and does the kernel "
    "over a few rows do as well as the full one?"
)
PERCENT = Form(".1f", 100)
POINTS = Form("+.1f", 1, "standard_error")


def tables(summary: Summary) -> list[Table]:
    """Return the scores of kernels and of fine-tuning for a terminal of 110 columns.

    Args:
        summary: As `study_summary.collect` returns it.

    Returns:
        Two tables for each number of shots and kind of kernel, or more where one would
        be too wide.
    """
    return [
        _table(f"{piece.title}, {part.title}: test score in %", piece)
        for part in parts(summary)
        for grid in (kernel_scores(part), tuned_scores(part))
        if grid.rows
        for piece in parted(narrow(grid), WIDTH)
    ]


def summary_lines(summary: Summary) -> list[str]:
    """Return what was found, as sentences, each with how far it can be trusted.

    Args:
        summary: As `study_summary.collect` returns it.
    """
    return [*_answers(summary), *_remarks(summary)]


def markdown(summary: Summary) -> str:
    """Return a report as Markdown: sentences, all tables, what was run.

    Args:
        summary: As `study_summary.collect` returns it.
    """
    lines = [f"# {escape(_title(summary))}", "", QUESTION, ""]
    lines += [f"- {escape(line)}" for line in summary_lines(summary)]
    for part in parts(summary):
        lines += ["", f"## {part.title}"]
        for grid in grids(part):
            lines += ["", f"### {escape(grid.title)}", "", escape(grid.caption), ""]
            lines.append(markdown_table(grid))
    lines += ["", "## What was run", ""]
    lines += [f"- {escape(f'{key}: {flat(value)}')}" for key, value in _ran(summary)]
    return "\n".join(lines) + "\n"


def html(summary: Summary, figures: Mapping[str, str]) -> str:
    """Return a report as one HTML page that needs nothing else.

    Args:
        summary: As `study_summary.collect` returns it.
        figures: SVG by name, as `ntk.plots.to_svg` writes it.
    """
    return render(
        "study.html.j2",
        title=_title(summary),
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        parts=[(part, grids(part), _of_part(part, figures)) for part in parts(summary)],
        tasks=summary["tasks"],
        ran=_ran(summary),
        flat=flat,
    )


def write_study(summary: Summary, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each whole or not.

    Args:
        summary: As `study_summary.collect` returns it.
        folder: Where, made if it does not exist.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``scores-16.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    page = lambda figures: html(summary, figures)
    text = markdown(summary)
    return write_files(folder, summary, text, draw_figures(summary), page)


def _table(title: str, grid: Grid) -> Table:
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


def _answers(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        for sentence in (
            _ratio(part),
            _few_rows(part),
            _all_to_full("kernels", part.of_spaces("points_to_full")),
            _all_to_full("fine-tuning", part.of_methods("points_to_full")),
            _agreement(part),
            _controls(part),
            _change(part),
        ):
            if sentence:
                yield f"{part.title}: {sentence}"


def _ratio(part: Part) -> str:
    """Return how the full kernel does against full fine-tuning."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["ratio"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["ratio"]["tasks"]
    text = (
        f"the classifier on the full kernel reaches "
        f"{write(row['ratio'], Form('.3f', 1, 'standard_error'))} of the score of full "
        f"fine-tuning ({_over(tasks, row['ratio'])}), at least 90 % of it on "
        f"{row['reached']} of {len(tasks)}"
    )
    if row["tested"]:
        text += (
            f", on {row['surely_reached']} surely (one-sided t-test over seeds, p < "
            "0.05)"
        )
    return f"{text}."


def _few_rows(part: Part) -> str:
    """Return what a few rows lose against the full kernel."""
    found = _means(part.of_spaces("points_to_full"), [FEW_ROWS]).get(FEW_ROWS)
    if found is None:
        return ""
    mean, error = found["mean"], found["standard_error"]
    side = "above" if mean > 0 else "below"
    text = f"the kernel over {FEW_ROWS} is {abs(mean):.1f}"
    if error is not None:
        within = abs(mean) <= TWO_ERRORS * error
        text += f" ± {error:.1f}"
    text += f" points {side} the full kernel ({_over(found['tasks'], found)}"
    if error is not None:
        text += f"; {'within' if within else 'beyond'} two standard errors"
    return f"{text})."


def _all_to_full(what: str, columns: Mapping[str, Column]) -> str:
    """Return the points of everything above what is full, on the same tasks."""
    names = [name for name in columns if name != "full"]
    found = _means(columns, names)
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(found[name], POINTS)}" for name in found)
    return f"{what} in points above full ({_over(over['tasks'], over)}): {listed}."


def _agreement(part: Part) -> str:
    """Return how alike the full kernel and full fine-tuning predict."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["agreement"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["agreement"]["tasks"]
    text = (
        "the full kernel and full fine-tuning predict the same class for "
        f"{write(row['agreement'], PERCENT)} % of the test examples (kappa "
        f"{write(row['kappa'], Form('.2f'))}, Kendall's tau of the margins "
        f"{write(row['kendall'], Form('.2f'))}; {_mean_over(tasks)})"
    )
    tuned = [r for r in select(part.tuned, method="full") if r["task"] in tasks]
    seeds = across(tuned, "agreement_of_seeds")
    if seeds["tasks"] == tasks:
        text += f", two seeds of full fine-tuning for {write(seeds, PERCENT)} %"
    return f"{text}."


def _controls(part: Part) -> str:
    """Return what the controls reach, all on the same tasks."""
    kernels, tuned = part.of_spaces("test"), part.of_methods("test")
    columns = {
        "the model itself (f0)": part.f0,
        "ridge on the full kernel with shuffled labels": part.of_spaces("shuffled").get(
            "full", {}
        ),
        "the kernel over the head": kernels.get("head", {}),
        "the kernel over the biases": kernels.get("bias", {}),
        "fine-tuning the head": tuned.get("head", {}),
        "fine-tuning the biases": tuned.get("bitfit", {}),
    }
    found = _means(columns, list(columns))
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(r, PERCENT)} %" for name, r in found.items())
    return f"controls ({_mean_over(over['tasks'])}): {listed}."


def _change(part: Part) -> str:
    """Return how far fine-tuning moves the full kernel."""
    columns = part.of_methods("kernel_change", "distance")
    found = _means(columns, list(columns))
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(r, Form('.2g'))}" for name, r in found.items())
    return (
        "fine-tuning moves the full kernel by a distance S = 1 - cosine "
        f"({_mean_over(over['tasks'])}): {listed}."
    )


def _remarks(summary: Summary) -> Iterator[str]:
    records = summary["records"]
    if not records["there"]:
        yield "There are no records yet."
        return
    if summary["missing"]:
        yield (
            f"Of {records['asked']:,} records {records['asked'] - records['there']:,} "
            f"are missing, and every mean is over what is there: {_missing(summary)}."
        )
    else:
        yield f"All of the {records['there']:,} records asked for are there."
    sizes = [row["test"] for row in summary["tasks"]]
    few, many = min(sizes), max(sizes)
    counted = f"{few:,} to {many:,}" if few < many else f"{few:,}"
    seeds = ", ".join(map(str, summary["seeds"]))
    yield (
        f"Each task has {counted} test examples, the same for every split: one "
        f"score's standard error from their choice is up to {50 / math.sqrt(few):.1f} "
        f"points. The seeds {seeds} draw the training and dev examples, and deviations "
        "are over these."
    )
    others: dict[str, list[str]] = {}
    for row in summary["tasks"]:
        if row["metric"] != "accuracy":
            name = "F1" if row["metric"] == "f1" else row["metric"].replace("_", " ")
            others.setdefault(name, []).append(row["task"])
    if others:
        listed = "; ".join(f"{m} for {', '.join(t)}" for m, t in others.items())
        yield f"Scores are accuracy, but {listed}."
    for row in summary["comparisons"]:
        if row["ratio"] is None and None not in (row["kernel"], row["tuned"]):
            yield (
                f"{row['task']}, {row['shots']} shots: fine-tuning {row['method']} has "
                f"a score of 0 or less, so that {row['space']} has no ratio to it."
            )
    splits = len(summary["splits"])
    for row in summary["notes"]:
        where = ", ".join(f"{task} at {shots} shots" for task, shots in row["splits"])
        everywhere = len(row["splits"]) == splits
        yield row["note"] if everywhere else f"{where}: {row['note']}"


def _missing(summary: Summary) -> str:
    """Return what is missing, in as few words as the splits allow."""
    splits = len(summary["splits"])
    seeds: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for row in summary["missing"]:
        name = (row["kind"], row["subject"], tuple(row["seeds"]))
        seeds.setdefault(name, []).append(f"{row['task']} at {row['shots']} shots")
    texts = []
    for (kind, subject, own), where in seeds.items():
        listed = "all splits" if len(where) == splits else ", ".join(where)
        texts.append(f"{kind} {subject} (seeds {', '.join(map(str, own))}; {listed})")
    return "; ".join(texts)


def _means(columns: Mapping[str, Column], names: list[str]) -> dict[str, Row]:
    """Return means over the tasks that all of the named columns with numbers have."""
    known = {
        name: {t: row["mean"] for t, row in columns[name].items() if row}
        for name in names
        if name in columns
    }
    known = {
        name: {task: mean for task, mean in column.items() if mean is not None}
        for name, column in known.items()
    }
    known = {name: column for name, column in known.items() if column}
    if not known:
        return {}
    first, *others = known.values()
    tasks = [task for task in first if all(task in column for column in others)]
    if not tasks:
        return {}
    return {
        name: across([{"task": t, "mean": column[t]} for t in tasks], "mean")
        for name, column in known.items()
    }


def _over(tasks: list[str], row: Row) -> str:
    error = "" if row["standard_error"] is None else " and standard error"
    return f"mean{error} over {_count(tasks)}"


def _mean_over(tasks: list[str]) -> str:
    return f"mean over {_count(tasks)}"


def _count(tasks: list[str]) -> str:
    return f"{len(tasks)} tasks" if len(tasks) > 1 else f"the task {tasks[0]}"


def _of_part(part: Part, figures: Mapping[str, str]) -> dict[str, tuple[str, Markup]]:
    """Return a part's figures, by what they show, with their names."""
    found = {}
    for what in ("scores", "scatter", "ratio", "growth", "change"):
        for name in (f"{what}-{part.name}", f"{what}-{part.shots}"):
            if name in figures:
                found[what] = (name, Markup(inline_svg(figures[name], name)))
                break
    return found


def _ran(summary: Summary) -> list[tuple[str, Any]]:
    return [
        ("command", summary["command"]),
        ("model", ", ".join(summary["models"])),
        *summary["settings"].items(),
    ]


def _title(summary: Summary) -> str:
    return (
        f"Kernels against fine-tuning: {', '.join(summary['models']) or 'no records'}"
    )
