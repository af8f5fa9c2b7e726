"""Tables of a lambda study.

Accuracies, agreement and relative distances are in percent. Numbers are means ±
standard deviations over seeds.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ntk.reporting import DASH, SCORE, Format, ReportTable, Row, number, write
from ntk.studies.lambdas.records import BOUNDED
from ntk.studies.lambdas.summary import SLOPES, STRONGEST

PLAIN = Format(".2g", 1, "deviation")
PERCENT = Format(".2g", 100, "deviation")
SLOPE = Format(".2f", 1, "error")
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
"""Titles and formats of columns, by measure."""

SLOPE_TITLES = {
    "movement": ("movement", -1),
    "parameter_distance": ("parameter distance", -2),
    "gap": ("gap", -2),
    "relative_gap": ("relative gap", -1),
    "train_gap": ("gap, training examples", -2),
    "relative_train_gap": ("relative gap, training examples", -1),
}
"""Titles and the asymptotic slopes of minimisers for large lambda."""


class Slice(NamedTuple):
    """The groups of a summary with the same training.

    Attributes:
        title: Description of the training.
        name: Name in links and file names.
        groups: Groups, one per task.
    """

    title: str
    name: str
    groups: list[Row]


def slices(summary: Mapping[str, Any]) -> list[Slice]:
    """Return the slices of a summary, one per training.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    by_title: dict[str, list[Row]] = {}
    for group in summary["groups"]:
        loss = group["loss"].replace("_", "-")
        pull = ", selective pull" if group["selective"] else ""
        title = f"{group['method']}, {group['shots']} shots, {loss} loss, "
        title += {"adamw": "AdamW", "sgd": "gradient descent"}[group["optimizer"]]
        by_title.setdefault(title + pull, []).append(group)
    return [
        Slice(title, re.sub(r"[^a-z0-9]+", "-", title.lower()), groups)
        for title, groups in by_title.items()
    ]


def report_tables(part: Slice) -> list[ReportTable]:
    """Return the tables that have rows.

    Args:
        part: A slice of the summary.
    """
    tables = [of_lambdas(group) for group in part.groups]
    tables.append(_slopes(part))
    for group in part.groups:
        if any("bounds" in point for point in group["points"]):
            tables += [_bounds(group), _vacuous(group)]
    for group in part.groups:
        tables += [_details(group), _training(group)]
    return [table for table in tables if table.rows]


def of_lambdas(group: Row) -> ReportTable:
    """Return movement, distance and accuracies of both models by lambda.

    Args:
        group: A group of the summary.
    """
    caption = (
        "On the test examples. Movement: ||theta - theta0|| of fine-tuning. Gap: mean "
        "norm of the difference between both models' logits. Relative gap: norm over "
        "all examples, relative to the change by fine-tuning. KL in nats. Agreement: "
        "share of examples with the same predicted label. Tuned, linearised, start: "
        "accuracies. Mean ± standard deviation over seeds."
    )
    return _by_lambda(group, "lambdas", "by lambda", caption, MAIN)


def _details(group: Row) -> ReportTable:
    caption = (
        "Distance: between both models' parameters, also relative to the movement. "
        "Taylor remainder: error of the expansion at the fine-tuned weights relative "
        "to the change of the outputs, on the training examples. Recovery: gain in "
        "accuracy of the linearised model relative to that of fine-tuning."
    )
    title = "distances by lambda"
    return _by_lambda(group, "distances", title, caption, DETAILS, folded=True)


def _training(group: Row) -> ReportTable:
    caption = (
        "On the training examples, without the penalty. Unfinished: norm of the final "
        "gradient of the objective divided by lambda (an upper bound of the distance "
        "to the minimiser of the linearised objective), relative to the movement. Gap: "
        "norm over all examples, to the linear twin with the same lambda and to the "
        "one with lambda = 0."
    )
    title = "training by lambda"
    return _by_lambda(group, "training", title, caption, TRAINING, folded=True)


def _by_lambda(
    group: Row,
    name: str,
    title: str,
    caption: str,
    columns: Mapping[str, tuple[str, Format]],
    *,
    folded: bool = False,
) -> ReportTable:
    rows = [
        [
            f"{point['strength']:g}",
            *(write(point[measure], fmt) for measure, (_, fmt) in columns.items()),
        ]
        for point in group["points"]
    ]
    titles = ["lambda", *(text for text, _ in columns.values())]
    task = group["task"]
    return ReportTable(
        f"{name}-{task}", f"{task}, {title}", caption, titles, rows, [], folded
    )


def _slopes(part: Slice) -> ReportTable:
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
    return ReportTable(
        "slopes",
        "Slopes against lambda",
        "Slope of the logarithm of a measure against that of lambda: over all lambdas "
        f"above 0 and over the {STRONGEST} largest; mean over seeds ± standard error "
        "(of the regression for one seed). Theory: slope of the minimisers for large "
        "lambda.",
        [*columns, "theory"],
        rows,
    )


def slope(row: Row | None) -> str:
    """Return a slope and its standard error as text; a dash for None.

    Args:
        row: A slope of the summary.
    """
    if row is None:
        return DASH
    return write({"mean": row["slope"], "error": row["standard_error"]}, SLOPE)


def _bounds(group: Row) -> ReportTable:
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
    return ReportTable(
        f"bounds-{group['task']}",
        f"{group['task']}, bounds by lambda",
        "Quantity ≤ bound, on the training examples; mean over seeds. Constants are "
        "maxima over the start, the midpoint and the end of the line from initial to "
        "fine-tuned weights; for bounds under flow, over the same of the lines to four "
        "points of the descent, the farthest of which gives the radius in lambda_0. "
        "That they hold between these points is assumed and not checked. Published "
        "bounds are of the distance to a linear twin without a penalty."
        + ("" if shown else " No bound has its conditions met here."),
        ["lambda", "lambda_0", *columns],
        rows,
    )


def _bound(row: Row) -> str:
    value = number(row["value"]["mean"], PLAIN)
    if row["value"]["mean"] is None:
        return VACUOUS
    measured = number(row["measured"]["mean"], PLAIN)
    violated = row["compared"] - row["held"]
    if violated:
        return f"{measured} against {value}, violated {violated} times"
    return f"{measured} ≤ {value}"


def _vacuous(group: Row) -> ReportTable:
    """Return which bounds are vacuous, at which lambda and why."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for point in group["points"]:
        for name, row in point.get("bounds", {}).items():
            for note in row["vacuous"]:
                strengths = by_reason.setdefault((name, note), [])
                strengths.append(f"{point['strength']:g}")
    rows = [
        [BOUNDED[name].title, ", ".join(strengths), reason.partition(": ")[2]]
        for (name, reason), strengths in by_reason.items()
    ]
    return ReportTable(
        f"vacuous-{group['task']}",
        f"{group['task']}, vacuous bounds",
        "Conditions that are not met, so that the bound says nothing.",
        ["bound", "lambda", "why"],
        rows,
        [],
        folded=True,
    )
