"""An ablation's records -> tables for the terminal, sentences, JSON, Markdown, HTML.

Everything is said by the summary (`ablation_summary`), which holds no times: a study
that was stopped and taken up again has the same report.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.table import Table
from scipy import stats

from ntk.ablation import ALL, AXES
from ntk.ablation_gains import RANDOM
from ntk.ablation_plots import draw_figures
from ntk.ablation_summary import collect
from ntk.ablation_tables import (
    GAIN,
    PERCENT,
    TITLES,
    Part,
    gains_of_measures,
    grids,
    parts,
    total,
)
from ntk.plots import inline_svg
from ntk.report import escape, flat, render, write_files
from ntk.study_grids import Form, markdown_table, number, parted, write
from ntk.study_report import WIDTH, _ran, _table
from ntk.study_scores import Row

__all__ = [
    "collect",
    "html",
    "markdown",
    "summary_lines",
    "tables",
    "write_ablation",
]

Summary = Mapping[str, Any]

INFORMED = {"max": "magnitude", "activation": "activation", "gradient": "gradient"}
"""Strategies that the question is about, and what they choose by."""
JUDGED = ("score", "score_of_body", "rescaled")
TWO_ERRORS = 2
QUESTION = (
    "Does choosing rows and columns by magnitude, activation or gradient energy beat "
    "random ones by more than the random spread?"
)


def tables(summary: Summary) -> list[Table]:
    """Return what choosing gains, for a terminal of 110 columns.

    Args:
        summary: As `ablation_summary.collect` returns it.

    Returns:
        A table for each number of shots, or more where one would be too wide.
    """
    return [
        _table(f"{piece.title}, {part.title}: in spreads, ± standard error", piece)
        for part in parts(summary)
        if (grid := gains_of_measures(part)).rows
        for piece in parted(grid, WIDTH)
    ]


def summary_lines(summary: Summary) -> list[str]:
    """Return what was found, as sentences, each with how far it can be trusted.

    Args:
        summary: As `ablation_summary.collect` returns it.
    """
    return [*_answers(summary), *_remarks(summary)]


def markdown(summary: Summary) -> str:
    """Return a report as Markdown: sentences, all tables, what was run.

    Args:
        summary: As `ablation_summary.collect` returns it.
    """
    lines = [f"# {escape(_title(summary))}", "", QUESTION, ""]
    lines += [f"- {escape(line)}" for line in summary_lines(summary)]
    for part in parts(summary):
        lines += ["", f"## {part.title}"]
        for grid in grids(part):
            lines += ["", f"### {escape(grid.title)}", "", escape(grid.caption), ""]
            lines.append(markdown_table(grid))
    lines += ["", "## What was run", ""]
    lines += [f"- {key}: {escape(flat(value))}" for key, value in _ran(summary)]
    return "\n".join(lines) + "\n"


def html(summary: Summary, figures: Mapping[str, str]) -> str:
    """Return a report as one HTML page that needs nothing else.

    Args:
        summary: As `ablation_summary.collect` returns it.
        figures: SVG by name, as `ntk.plots.to_svg` writes it.
    """
    return render(
        "ablation.html.j2",
        title=_title(summary),
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        parts=[(part, grids(part), _of_part(part, figures)) for part in parts(summary)],
        ran=_ran(summary),
        flat=flat,
    )


def write_ablation(summary: Summary, folder: Path) -> dict[str, Path]:
    """Write report.json, report.md, report.html and the figures, each whole or not.

    Args:
        summary: As `ablation_summary.collect` returns it.
        folder: Where, made if it does not exist.

    Returns:
        The files: ``json``, ``markdown``, ``html``, and figures as ``gain-16.svg``.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    page = lambda figures: html(summary, figures)
    text = markdown(summary)
    return write_files(folder, summary, text, draw_figures(summary), page)


def verdict(over: Row) -> str:
    """Return whether a gain is more than the random spread.

    Args:
        over: As `ablation_gains.combined` returns it.

    Returns:
        ``"yes"`` or ``"no"`` where the gain lies beyond one spread, or short of it, by
        two standard errors, and ``"worse"`` where the loss does; else ``"open"``, as
        with a single split, whose choice the error does not hold.
    """
    gain, error = over["gain"], over["error"]
    if over["splits"] < 2:
        return "open"
    if gain - TWO_ERRORS * error > 1:
        return "yes"
    if gain + TWO_ERRORS * error < -1:
        return "worse"
    return "no" if gain + TWO_ERRORS * error < 1 else "open"


def _answers(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        for sentence in (
            _answer(part),
            *(_judged(part, measure) for measure in JUDGED),
            _another_draw(part),
            _whole(part),
            _variance(part),
            _origin(part),
        ):
            if sentence:
                yield f"{part.title}: {sentence}"


def _answer(part: Part) -> str:
    """Return the verdicts on all informed choices, counted."""
    words = []
    for measure in JUDGED:
        found = _verdicts(part, measure)
        if not found:
            return ""
        names = {
            answer: [name for name, (said, _) in found.items() if said == answer]
            for answer in ("yes", "open", "worse")
        }
        text = f"{len(names['yes'])} of {len(found)}"
        if names["yes"] and len(names["yes"]) < len(found):
            text += f" ({', '.join(names['yes'])})"
        if names["open"]:
            text += f", {len(names['open'])} undecided"
        if names["worse"]:
            text += f", {len(names['worse'])} worse by more than it"
        words.append(f"by the {TITLES[measure]} {text}")
    return (
        "choices by magnitude, activation or gradient energy that beat random ones by "
        f"more than the random spread: {'; '.join(words)}."
    )


def _verdicts(part: Part, measure: str) -> dict[str, tuple[str, Row]]:
    """Return the verdict on each informed choice, and its gain."""
    found = {}
    for axis in AXES:
        for strategy, name in INFORMED.items():
            where = {"task": None, "axis": axis, "strategy": strategy}
            for row in part.rows("gains", **where, measure=measure):
                over = row["over_counts"]
                if over["gain"] is not None:
                    found[f"{name} of {axis}"] = verdict(over), over
    return found


def _judged(part: Part, measure: str) -> str:
    """Return what the informed strategies gain by a measure."""
    found = _verdicts(part, measure)
    if not found:
        return ""
    listed = ", ".join(
        f"{name} {write({'mean': over['gain'], 'error': over['error']}, GAIN)} ({said})"
        for name, (said, over) in found.items()
    )
    _, over = next(iter(found.values()))
    counts = (("tasks", "task"), ("splits", "split"), ("draws", "random selection"))
    tasks, splits, draws = (
        f"{over[key]} {name}{'s' if over[key] > 1 else ''}" for key, name in counts
    )
    return (
        f"gains by the {TITLES[measure]} over random selections, in spreads (mean ± "
        f"standard error over sizes, {tasks}, {splits} and {draws}; yes, no and worse "
        f"are beyond two standard errors): {listed}."
    )


def _another_draw(part: Part) -> str:
    """Return how often one more random selection would gain more than a spread."""
    draws = [row["over_counts"]["draws"] for row in part.rows("gains", task=None)]
    if not draws or (most := max(draws)) < 2:
        return ""
    odds = stats.t.sf(1 / math.sqrt(1 + 1 / most), most - 1)
    return (
        "for comparison, at one size and on one split a further random selection "
        f"gains more than one spread over {most} others in {100 * odds:.0f} % of cases "
        "(if normally distributed)."
    )


def _whole(part: Part) -> str:
    """Return how near the linear weights come, and few random rows."""
    rows = part.rows("references", name=ALL)
    means = [row["rescaled"]["mean"] for row in rows]
    if not means or None in means:
        return ""
    text = (
        f"the kernel of all linear weights ({number(rows[0]['share'], PERCENT)} % of "
        f"the parameters) differs from the full one by {_mean_percent(means)} % at the "
        "best scale, without the head"
    )
    for axis in AXES[:2]:
        ends = [
            (row["counts"], row["rescaled"]["mean"])
            for row in part.rows("curves", axis=axis, strategy=RANDOM)
        ]
        if ends:
            first, last = ends[0][0][0], ends[0][0][-1]
            few = _mean_percent(curve[0] for _, curve in ends)
            many = _mean_percent(curve[-1] for _, curve in ends)
            unit = axis.removesuffix("s") if first == 1 else axis
            text += f"; {first} random {unit} by {few} %, {last} by {many} %"
    return f"{text}."


def _variance(part: Part) -> str:
    """Return how the error of random selections compares with its expectation."""
    words = []
    for row in part.rows("variance_ratios"):
        extremes = [
            own["extreme"]
            for own in part.rows("variance", axis=row["axis"])
            if own["extreme"] is not None
        ]
        form = Form(".2f", 1, "standard_error")
        words.append(
            f"for random {row['axis']} {write(row, form)} of its expectation, "
            f"{_mean_percent(extremes)} % of which is due to the one most extreme of "
            "each weight's"
        )
    if not words:
        return ""
    draws = max(row["draws"] for row in part.rows("variance_ratios"))
    return (
        f"the squared error of the unbiased kernel is {'; '.join(words)} (mean ± "
        f"standard error over {draws} selections; one that misses the extreme errs "
        "less than expected, one that holds it far more)."
    )


def _origin(part: Part) -> str:
    """Return which modules and layers most of the full kernel comes from."""
    origins = part.rows("origins")
    if not origins:
        return ""
    words = []
    for by in ("kind", "layer"):
        shares = {
            group: sum(total(row["trace"], by, group) for row in origins) / len(origins)
            for group in origins[0]["cosine"][by]
        }
        most = sorted(shares, key=lambda group: -shares[group])[:3]
        words.append(", ".join(f"{g} {100 * shares[g]:.0f} %" for g in most))
    return (
        f"most of the full kernel's trace comes from {words[0]}; by layer {words[1]}."
    )


def _remarks(summary: Summary) -> Iterator[str]:
    records = summary["records"]
    if not records["there"]:
        yield "There are no records yet."
        return
    if summary["missing"]:
        lacking = records["asked"] - records["there"]
        first = summary["missing"][0]
        yield (
            f"Of {records['asked']:,} records {lacking:,} "
            f"{'is' if lacking == 1 else 'are'} missing, and every mean is over what "
            f"is there. The first: {first['task']} at {first['shots']} "
            f"shots, {first['kind']} {first['subject']}, seeds "
            f"{', '.join(map(str, first['seeds']))}."
        )
    else:
        yield f"All of the {records['there']:,} records asked for are there."
    yield (
        f"Tasks {', '.join(summary['tasks'])}; seeds of the splits "
        f"{', '.join(map(str, summary['seeds']))}. All is every row of every linear "
        "weight in the blocks, which is every column; the full kernel has embeddings, "
        "normalisation layers and biases too."
    )
    odd = {
        task: name for task, name in summary["metrics"].items() if name != "accuracy"
    }
    if odd:
        listed = ", ".join(f"{name} for {task}" for task, name in odd.items())
        yield f"Scores are accuracy, but {listed.replace('_', ' ')}."
    for row in summary["notes"]:
        where = ", ".join(f"{task} at {shots} shots" for task, shots in row["splits"])
        yield f"{where}: {row['note']}"


def _mean_percent(values: Iterable[float]) -> str:
    several = list(values)
    return number(sum(several) / len(several), PERCENT) if several else "–"


def _of_part(part: Part, figures: Mapping[str, str]) -> dict[str, tuple[str, Markup]]:
    """Return a part's figures, by what they show, with their names."""
    found = {}
    for name, svg in figures.items():
        what, _, shots = name.partition("-")
        if shots == part.name:
            found[what] = (name, Markup(inline_svg(svg, name)))
    return found


def _title(summary: Summary) -> str:
    models = ", ".join(summary["models"]) or "no records"
    return f"Which rows and columns a kernel needs: {models}"
