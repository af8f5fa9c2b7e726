"""The report of an ablation, from its summary (`ntk.studies.ablation.summary`).

The summary holds no times, so an interrupted and resumed study has the same report.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table
from scipy import stats

from ntk.reporting import (
    WIDTH,
    Format,
    Page,
    Row,
    Section,
    ShotsSlice,
    number,
    parted,
    terminal_table,
    what_ran,
    write,
)
from ntk.studies.ablation.gains import RANDOM
from ntk.studies.ablation.records import ALL, AXES
from ntk.studies.ablation.summary import collect
from ntk.studies.ablation.tables import (
    GAIN,
    PERCENT,
    TITLES,
    gains_of_measures,
    report_tables,
    slices,
    total,
)

__all__ = [
    "collect",
    "report_page",
    "tables",
]

from ntk.reporting import DASH
from ntk.studies.overview import metric_remarks, note_remarks, record_remark

Summary = Mapping[str, Any]

INFORMED = {"max": "magnitude", "activation": "activation", "gradient": "gradient"}
"""Strategies that the question is about, with the criterion of each."""
JUDGED = ("score", "score_of_body", "rescaled")
"""Measures for which the question is answered."""
TWO_ERRORS = 2
QUESTION = (
    "Does choosing rows and columns by magnitude, activation or gradient energy beat "
    "random ones by more than the random spread?"
)

CAPTIONS = {
    "gain": (
        "Gain over random selection",
        "Gain of each strategy over the same number of random rows and columns, in "
        "units of the spread over random selections; mean over tasks, splits and "
        "sizes. Grey band: one spread, the typical effect of another random draw. "
        "Bars: two standard errors.",
    ),
    "distance": (
        "Distance against size",
        "Relative Frobenius difference to the full kernel at the best scale, both "
        "without the head. Grey band: one standard deviation over random selections; "
        "star: all linear weights.",
    ),
    "score": (
        "Score against size",
        "Test score of ridge regression on the kernel of the selection and the head; "
        "it starts from a multiple of the model's own outputs, chosen on dev.",
    ),
    "alone": (
        "Score of the selection alone",
        "Test score of ridge regression on the kernel of the selection, without the "
        "head and the model's own outputs.",
    ),
    "variance": (
        "Error of random selections",
        "Points: root mean squared relative Frobenius error of the unbiased kernel "
        "of random rows or columns; lines: its expectation. Bars: one standard error "
        "over selections.",
    ),
    "origin": (
        "Contributions to the full kernel",
        "Share of the trace of the full kernel on the training examples by kind of "
        "module and layer, and share of the parameters; mean over tasks and splits.",
    ),
}
WORDS = {
    "selection": (
        "Rows (output features) or columns (input features) of every linear weight "
        "in the blocks, the same number r of each."
    ),
    "first, last": "The first or last r.",
    "random": "Uniform, independent for each weight; the same on every split.",
    "max, min, mixed": "The largest or smallest Euclidean norms, or half of each.",
    "activation": (
        "The largest sums of |W| times the norm of the inputs on the training examples."
    ),
    "gradient": "The largest squared gradients on the training examples.",
    "spread": (
        "Standard deviation over random selections of the same size on the same "
        "split, pooled over the splits of a task."
    ),
    "gain": (
        "Score minus that of random selections on the same split (or the reverse for "
        "a distance), in spreads; positive is better."
    ),
    "all": (
        "All linear weights in the blocks. The full kernel also has embeddings, "
        "normalisation layers and biases."
    ),
    "alone": (
        "The kernel of the selection without the head that was made for the task, "
        "compared with the full kernel without it."
    ),
    "distance": (
        "Frobenius norm of kernel minus full kernel, relative to that of the full "
        "kernel; best scale: after multiplying by the factor that minimises it."
    ),
    "alignment": "Cosine between the kernel and the kernel of the labels.",
}


def tables(summary: Summary) -> list[Table]:
    """Return the gains over random selection, for a terminal.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        A table for each number of shots; wide ones are split.
    """
    return [
        terminal_table(
            f"{piece.title}, {part.title}: in spreads, ± standard error", piece
        )
        for part in slices(summary)
        if (table := gains_of_measures(part)).rows
        for piece in parted(table, WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return the report of an ablation.

    Args:
        summary: The summary that `summary.collect` returns.
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
                report_tables(part),
                [f"{what}-{part.name}" for what in CAPTIONS],
            )
            for part in slices(summary)
        ],
        ran=what_ran(summary),
        captions=CAPTIONS,
        words=WORDS,
    )


def verdict(over: Row) -> str:
    """Return whether a gain is more than the random spread.

    Args:
        over: Result of `gains.combined`.

    Returns:
        ``"yes"`` or ``"no"`` if the gain is above or below one spread by more than two
        standard errors, ``"worse"`` if the loss is above one spread. Otherwise
        ``"open"``, also for a single split, for which the error is incomplete.
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
    for part in slices(summary):
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


def _answer(part: ShotsSlice) -> str:
    """Return the numbers of informed choices by verdict."""
    words = []
    for measure in JUDGED:
        verdicts = _verdicts(part, measure)
        if not verdicts:
            return ""
        names = {
            answer: [name for name, (given, _) in verdicts.items() if given == answer]
            for answer in ("yes", "open", "worse")
        }
        text = f"{len(names['yes'])} of {len(verdicts)}"
        if names["yes"] and len(names["yes"]) < len(verdicts):
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


def _verdicts(part: ShotsSlice, measure: str) -> dict[str, tuple[str, Row]]:
    """Return the verdict on each informed choice, and its gain."""
    verdicts = {}
    for axis in AXES:
        for strategy, name in INFORMED.items():
            where = {"task": None, "axis": axis, "strategy": strategy}
            for row in part.rows("gains", **where, measure=measure):
                over = row["over_counts"]
                if over["gain"] is not None:
                    verdicts[f"{name} of {axis}"] = verdict(over), over
    return verdicts


def _judged(part: ShotsSlice, measure: str) -> str:
    """Return the gains of the informed strategies by a measure."""
    verdicts = _verdicts(part, measure)
    if not verdicts:
        return ""
    listed = ", ".join(
        f"{name} {write({'mean': over['gain'], 'error': over['error']}, GAIN)} ({said})"
        for name, (said, over) in verdicts.items()
    )
    _, over = next(iter(verdicts.values()))
    counts = (("tasks", "task"), ("splits", "split"), ("draws", "random selection"))
    tasks, splits, draws = (
        f"{over[key]} {name}{'s' if over[key] > 1 else ''}" for key, name in counts
    )
    return (
        f"gains by the {TITLES[measure]} over random selections, in spreads (mean ± "
        f"standard error over sizes, {tasks}, {splits} and {draws}; yes, no and worse "
        f"are beyond two standard errors): {listed}."
    )


def _another_draw(part: ShotsSlice) -> str:
    """Return how often a further random selection gains more than one spread."""
    draws = [row["over_counts"]["draws"] for row in part.rows("gains", task=None)]
    if not draws or (most := max(draws)) < 2:
        return ""
    odds = stats.t.sf(1 / math.sqrt(1 + 1 / most), most - 1)
    return (
        "for comparison, at one size and on one split a further random selection "
        f"gains more than one spread over {most} others in {100 * odds:.0f} % of cases "
        "(if normally distributed)."
    )


def _whole(part: ShotsSlice) -> str:
    """Return the distances of all linear weights and of random rows or columns."""
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
        curves = part.rows("curves", axis=axis, strategy=RANDOM)
        if curves:
            first, last = (curves[0]["counts"][i] for i in (0, -1))
            few, many = (
                _mean_percent(row["rescaled"]["mean"][i] for row in curves)
                for i in (0, -1)
            )
            unit = axis.removesuffix("s") if first == 1 else axis
            text += f"; {first} random {unit} by {few} %, {last} by {many} %"
    return f"{text}."


def _variance(part: ShotsSlice) -> str:
    """Return how the error of random selections compares with its expectation."""
    words = []
    for row in part.rows("variance_ratios"):
        extremes = [
            variance["extreme"]
            for variance in part.rows("variance", axis=row["axis"])
            if variance["extreme"] is not None
        ]
        fmt = Format(".2f", 1, "standard_error")
        words.append(
            f"for random {row['axis']} {write(row, fmt)} of its expectation, "
            f"{_mean_percent(extremes)} % of which is due to the most extreme "
            f"{row['axis'].removesuffix('s')} of each weight"
        )
    if not words:
        return ""
    draws = max(row["draws"] for row in part.rows("variance_ratios"))
    return (
        f"the squared error of the unbiased kernel is {'; '.join(words)} (mean ± "
        f"standard error over {draws} selections; without the extreme ones the error "
        "is smaller than expected, with one of them it is much larger)."
    )


def _origin(part: ShotsSlice) -> str:
    """Return the modules and layers that contribute most to the full kernel."""
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
    yield record_remark(summary)
    if not summary["records"]["there"]:
        return
    yield (
        f"Tasks {', '.join(summary['tasks'])}; seeds of the splits "
        f'{", ".join(map(str, summary["seeds"]))}. "All" stands for all linear '
        "weights in the blocks; the full kernel also has embeddings, normalisation "
        "layers and biases."
    )
    yield from metric_remarks(summary["metrics"])
    yield from note_remarks(summary)


def _mean_percent(values: Iterable[float]) -> str:
    values = list(values)
    return number(sum(values) / len(values), PERCENT) if values else DASH
