"""An ablation's records -> tables for the terminal, sentences, JSON, Markdown, HTML.

Everything is said by the summary (`ablation_summary`), which holds no times: a study
that was stopped and taken up again has the same report.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table
from scipy import stats

from ntk.ablation import ALL, AXES
from ntk.ablation_gains import RANDOM
from ntk.ablation_summary import collect
from ntk.ablation_tables import (
    GAIN,
    PERCENT,
    TITLES,
    gains_of_measures,
    grids,
    parts,
    total,
)
from ntk.study_grids import Form, number, parted, write
from ntk.study_pages import WIDTH, Page, Section, terminal_table, what_ran
from ntk.study_scores import Row
from ntk.study_summary import ShotsPart

__all__ = [
    "collect",
    "report_page",
    "tables",
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

CAPTIONS = {
    "gain": (
        "Gain over random selection",
        "How much better each choice is than random rows and columns of the same "
        "number, in units of the spread over random selections; mean over tasks, "
        "splits and sizes. Within the grey band a choice is worth less than another "
        "random draw would move. Bars: two standard errors.",
    ),
    "distance": (
        "Distance against size",
        "Relative Frobenius difference to the full kernel at the best scale, both "
        "without the head. The grey band is one standard deviation over random "
        "selections; the star is all linear weights.",
    ),
    "score": (
        "Score against size",
        "Test score of ridge regression on the kernel of the selection and the head, "
        "from a multiple of the model's own outputs that is chosen on dev.",
    ),
    "alone": (
        "Score of the selection alone",
        "Test score of ridge regression on the kernel of the selection alone: "
        "neither the head nor the model's own outputs take part.",
    ),
    "variance": (
        "Error of random selections",
        "Points: root mean squared relative Frobenius error of the unbiased kernel "
        "of random rows or columns; lines: its expectation. Bars: one standard error "
        "over selections.",
    ),
    "origin": (
        "Where the full kernel comes from",
        "Share of the trace of the full kernel on the training examples by kind of "
        "module and layer, and beside it the share of the parameters; mean over "
        "tasks and splits.",
    ),
}
WORDS = {
    "selection": (
        "Rows (output features) or columns (input features) of every linear weight "
        "in the blocks, the same number r of each."
    ),
    "first, last": ("The first or last r."),
    "random": (
        "Uniformly, each weight for itself; the same selections on every split."
    ),
    "max, min, mixed": ("The largest or smallest Euclidean norms, or half of each."),
    "activation": (
        "The largest sums of |W| times the norm of the inputs on the training examples."
    ),
    "gradient": ("The most energy of the gradient on the training examples."),
    "spread": (
        "Standard deviation over random selections of the same size on the same "
        "split, pooled over the splits of a task."
    ),
    "gain": (
        "Score less that of random selections on the same split, or the distance "
        "less, in spreads; positive is better."
    ),
    "all": (
        "Every row of every linear weight, which is every column and both: it is not "
        "the full kernel, which has embeddings, normalisation layers and biases too."
    ),
    "alone": (
        "The kernel of the selection without the head that was made for the task, "
        "compared with the full kernel without it."
    ),
    "distance": (
        "Frobenius norm of kernel minus full kernel over that of the full kernel; at "
        "the best scale after the factor that makes it smallest."
    ),
    "alignment": ("Cosine between the kernel and the kernel of the labels."),
}


def tables(summary: Summary) -> list[Table]:
    """Return what choosing gains, for a terminal of 110 columns.

    Args:
        summary: As `ablation_summary.collect` returns it.

    Returns:
        A table for each number of shots, or more where one would be too wide.
    """
    return [
        terminal_table(
            f"{piece.title}, {part.title}: in spreads, ± standard error", piece
        )
        for part in parts(summary)
        if (grid := gains_of_measures(part)).rows
        for piece in parted(grid, WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return what the report says.

    Args:
        summary: As `ablation_summary.collect` returns it.
    """
    models = ", ".join(summary["models"]) or "no records"
    return Page(
        title=f"Which rows and columns a kernel needs: {models}",
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        sections=[
            Section(
                part.title,
                part.name,
                grids(part),
                [f"{what}-{part.name}" for what in CAPTIONS],
            )
            for part in parts(summary)
        ],
        ran=what_ran(summary),
        captions=CAPTIONS,
        words=WORDS,
    )


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


def _answer(part: ShotsPart) -> str:
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


def _verdicts(part: ShotsPart, measure: str) -> dict[str, tuple[str, Row]]:
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


def _judged(part: ShotsPart, measure: str) -> str:
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


def _another_draw(part: ShotsPart) -> str:
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


def _whole(part: ShotsPart) -> str:
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


def _variance(part: ShotsPart) -> str:
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


def _origin(part: ShotsPart) -> str:
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
