"""A lambda study's summary -> its tables.

Accuracies, agreement and relative distances are in percent. Numbers are means over
seeds ± their standard deviation.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ntk.linearization import BOUNDED
from ntk.linearization_summary import SLOPES, STRONGEST
from ntk.record_values import DASH
from ntk.study_grids import SCORE, Form, Grid, number, write
from ntk.study_scores import Row

PLAIN = Form(".2g", 1, "deviation")
PERCENT = Form(".2g", 100, "deviation")
SLOPE = Form(".2f", 1, "error")
VACUOUS = "vacuous"

MAIN = {
    "movement": ("movement", PLAIN),
    "gap": ("gap", PLAIN),
    "relative_gap": ("relative gap", PERCENT),
    "kl": ("KL", PLAIN),
    "agreement": ("agreement", SCORE),
    "accuracy": ("tuned", SCORE),
    "linear_accuracy": ("linearised", SCORE),
    "start_accuracy": ("start", SCORE),
}
DETAILS = {
    "linear_movement": ("movement, linearised", PLAIN),
    "parameter_distance": ("parameter distance", PLAIN),
    "relative_parameter_distance": ("relative distance", PERCENT),
    "output_distance": ("gap, all test examples", PLAIN),
    "change": ("change, all test examples", PLAIN),
    "taylor": ("Taylor remainder", PERCENT),
    "recovery": ("recovery", PERCENT),
}
TRAINING = {
    "loss": ("loss, tuned", PLAIN),
    "linear_loss": ("loss, linearised", PLAIN),
    "start_loss": ("loss, start", PLAIN),
    "unfinished_tuned": ("unfinished, tuned", PERCENT),
    "unfinished_linear": ("unfinished, linearised", PERCENT),
    "train_gap": ("gap", PLAIN),
    "gap_to_free": ("gap to lambda = 0", PLAIN),
}
"""Columns of the tables: their titles and forms, by measure."""

SLOPE_TITLES = {
    "movement": ("movement", -1),
    "parameter_distance": ("parameter distance", -2),
    "gap": ("gap", -2),
    "relative_gap": ("relative gap", -1),
    "train_gap": ("gap, training examples", -2),
    "relative_train_gap": ("relative gap, training examples", -1),
}
"""Titles, and the slopes of minimisers for large lambda."""


class Part(NamedTuple):
    """The groups of a summary that are shown together, those of the same training.

    Attributes:
        title: Which.
        name: For links.
        groups: One for each task.
    """

    title: str
    name: str
    groups: list[Row]


def parts(summary: Mapping[str, Any]) -> list[Part]:
    """Return what is shown together.

    Args:
        summary: As `linearization_summary.collect` returns it.
    """
    found: dict[str, list[Row]] = {}
    for group in summary["groups"]:
        loss = group["loss"].replace("_", "-")
        pull = ", selective pull" if group["selective"] else ""
        title = f"{group['method']}, {group['shots']} shots, {loss} loss, "
        title += {"adamw": "AdamW", "sgd": "gradient descent"}[group["optimizer"]]
        found.setdefault(title + pull, []).append(group)
    return [
        Part(title, re.sub(r"[^a-z0-9]+", "-", title.lower()), groups)
        for title, groups in found.items()
    ]


def grids(part: Part) -> list[Grid]:
    """Return the tables of a part.

    Args:
        part: Of a summary.
    """
    found = [of_lambdas(group) for group in part.groups]
    found.append(_slopes(part))
    for group in part.groups:
        if any("bounds" in point for point in group["points"]):
            found += [_bounds(group), _vacuous(group)]
    for group in part.groups:
        found += [_details(group), _training(group)]
    return [grid for grid in found if grid.rows]


def of_lambdas(group: Row) -> Grid:
    """Return how far both models move and how close they are, by lambda.

    Args:
        group: Of a summary.
    """
    caption = (
        "On the test examples. Movement: ||theta - theta0|| of fine-tuning. Gap: mean "
        "norm of the difference of both models' logits; relative, over all examples, "
        "to the change that fine-tuning makes. KL in nat. Agreement: share of "
        "examples with the same label. Tuned, linearised, start: "
        "accuracies. Mean ± standard deviation over seeds."
    )
    return _by_lambda(group, "lambdas", "by lambda", caption, MAIN)


def _details(group: Row) -> Grid:
    caption = (
        "Distance: between both models' parameters, and relative to the movement. "
        "Taylor remainder: what the expansion leaves of the outputs' change at the "
        "fine-tuned weights, on the training examples. Recovery: gain in accuracy of "
        "the linearised model over that of fine-tuning."
    )
    title = "distances by lambda"
    return _by_lambda(group, "distances", title, caption, DETAILS, folded=True)


def _training(group: Row) -> Grid:
    caption = (
        "On the training examples, without the penalty. Unfinished: norm of the "
        "objective's gradient where training ended over lambda, which no minimiser of "
        "the linearised objective is farther away than, relative to the movement. Gap: "
        "norm over all examples, to the linear twin with the same lambda, and to that "
        "with lambda = 0."
    )
    title = "training by lambda"
    return _by_lambda(group, "training", title, caption, TRAINING, folded=True)


def _by_lambda(
    group: Row,
    name: str,
    title: str,
    caption: str,
    columns: Mapping[str, tuple[str, Form]],
    *,
    folded: bool = False,
) -> Grid:
    rows = [
        [
            f"{point['strength']:g}",
            *(write(point[measure], form) for measure, (_, form) in columns.items()),
        ]
        for point in group["points"]
    ]
    titles = ["lambda", *(text for text, _ in columns.values())]
    task = group["task"]
    return Grid(f"{name}-{task}", f"{task}, {title}", caption, titles, rows, [], folded)


def _slopes(part: Part) -> Grid:
    rows = []
    for measure in SLOPES:
        title, expected = SLOPE_TITLES[measure]
        cells = []
        for group in part.groups:
            slopes = group["slopes"][measure]
            cells += [slope(slopes[which]) for which in ("over_all", "strongest")]
        if any(cell != DASH for cell in cells):
            rows.append([title, *cells, str(expected)])
    columns = ["slope of"]
    for group in part.groups:
        columns += [f"{group['task']}, all", f"{group['task']}, strongest"]
    return Grid(
        "slopes",
        "Slopes against lambda",
        "Of the logarithm of a measure against that of lambda: over all lambdas above "
        f"0 and over the {STRONGEST} largest; mean over seeds ± standard error (of the "
        "regression where there is one seed). Theory: of the minimisers, for large "
        "lambda.",
        [*columns, "theory"],
        rows,
    )


def slope(row: Row | None) -> str:
    """Return a slope and its standard error as text, a dash where there is none.

    Args:
        row: Of a summary.
    """
    if row is None:
        return DASH
    return write({"mean": row["slope"], "error": row["standard_error"]}, SLOPE)


def _bounds(group: Row) -> Grid:
    shown = [
        name
        for name in BOUNDED
        if any(p["bounds"][name]["compared"] for p in group["points"] if "bounds" in p)
    ]
    rows = []
    for point in group["points"]:
        if "bounds" in point:
            cells = [_bound(point["bounds"][name]) for name in BOUNDED]
            critical = write(point["critical_strength"], PLAIN)
            rows.append([f"{point['strength']:g}", critical, *cells])
    columns = [f"{each.title} ({each.of})" for each in BOUNDED.values()]
    return Grid(
        f"bounds-{group['task']}",
        f"{group['task']}, bounds by lambda",
        "What is bounded ≤ its bound, on the training examples; mean over seeds. "
        "Constants are the largest at the start, half-way and at the end of the "
        "straight way of fine-tuning, whose length is the radius of lambda_0; that "
        "they hold between these points, and under flow along the whole path, is "
        "assumed and not checked. Published bounds are of the distance to "
        "a linear twin without a penalty."
        + ("" if shown else " None of them holds its conditions here."),
        ["lambda", "lambda_0", *columns],
        rows,
    )


def _bound(row: Row) -> str:
    value = number(row["value"]["mean"], PLAIN)
    if row["value"]["mean"] is None:
        return VACUOUS
    measured = number(row["measured"]["mean"], PLAIN)
    broken = row["compared"] - row["held"]
    text = f"{measured} ≤ {value}"
    return f"{measured} against {value}, broken {broken} times" if broken else text


def _vacuous(group: Row) -> Grid:
    """Return why bounds are vacuous, and where."""
    found: dict[tuple[str, str], list[str]] = {}
    for point in group["points"]:
        for name, row in point.get("bounds", {}).items():
            for note in row["vacuous"]:
                found.setdefault((name, note), []).append(f"{point['strength']:g}")
    rows = [
        [BOUNDED[name].title, ", ".join(strengths), reason.partition(": ")[2]]
        for (name, reason), strengths in found.items()
    ]
    return Grid(
        f"vacuous-{group['task']}",
        f"{group['task']}, vacuous bounds",
        "Conditions that are not met: there the bound says nothing.",
        ["bound", "lambda", "why"],
        rows,
        [],
        folded=True,
    )
