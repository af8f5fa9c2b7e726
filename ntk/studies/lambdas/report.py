"""The report of a lambda study, from its summary (`ntk.studies.lambdas.summary`).

The summary holds no times, so an interrupted and resumed study has the same report.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.reporting import (
    SCORE,
    WIDTH,
    Page,
    Row,
    Section,
    narrow,
    number,
    parted,
    terminal_table,
    what_ran,
    write,
)
from ntk.studies.lambdas.records import BOUNDED
from ntk.studies.lambdas.tables import (
    PERCENT,
    PLAIN,
    VACUOUS,
    Slice,
    of_lambdas,
    report_tables,
    slices,
    slope,
)
from ntk.studies.overview import note_remarks, record_remark

Summary = Mapping[str, Any]

EXPLAINED = 0.1
"""Largest relative gap at which the linearised model explains fine-tuning."""
FINISHED = 0.1
"""Largest distance to a minimiser, relative to the movement, of a finished training."""
QUESTION = (
    "When does the linearised model explain fine-tuning with the penalty "
    "(lambda / 2) ||theta - theta0||²?"
)
CAPTIONS = {
    "distance": (
        "Distances against lambda",
        "Top: movement of the parameters and distance between both models' "
        "parameters. Bottom: distance between both models' outputs on the training "
        "examples, with the same lambda in both and with lambda = 0 in the linear "
        "twin, as in published bounds. Mean over seeds; bars: standard deviation. "
        "Dashed: bounds, where their conditions hold. Grey: theoretical slope of the "
        "minimisers, drawn through the largest lambda.",
    ),
    "accuracy": (
        "Accuracy against lambda",
        "Share of test examples that are classified correctly, mean over seeds; bars: "
        "standard deviation. Grey: the model before training.",
    ),
}
WORDS = {
    "linearised": (
        "f0(x) + J(x) (theta - theta0), the model's first-order expansion at its "
        "start in all trained parameters, trained in the same way."
    ),
    "lambda": (
        "Strength of the penalty in an objective with the mean loss over the n "
        "training examples. With the summed loss it is n times larger."
    ),
    "movement": "||theta - theta0|| over all trained parameters after training.",
    "gap": (
        "Distance between the logits of fine-tuning and its linear twin: the mean norm "
        "over test examples, or the norm over all examples."
    ),
    "relative gap": (
        "Norm of the gap over all test examples, relative to that of the change by "
        "fine-tuning."
    ),
    "KL": "Mean divergence of the linearised model's probabilities from fine-tuning's.",
    "recovery": (
        "Gain in accuracy of the linearised model over the start, relative to that of "
        "fine-tuning (Malladi et al. 2023); undefined if fine-tuning gains nothing."
    ),
    "Taylor remainder": (
        "||f(theta) - f0 - J (theta - theta0)|| relative to ||f(theta) - f0||, at the "
        "fine-tuned weights: the nonlinear part of the change of the outputs."
    ),
    "lambda_0": (
        "2 rho ||r0|| L / R of Rahimi Afzal et al. (2025), theorem 4: for larger "
        "lambda training stays within the radius R, for squared loss and gradient flow."
    ),
    VACUOUS: "A condition of the bound is not met, so that it says nothing.",
}


def tables(summary: Summary) -> list[Table]:
    """Return the table by lambda of each task, for a terminal.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Tables; wide ones are split.
    """
    return [
        terminal_table(f"{table.title}: {part.title}", piece)
        for part in slices(summary)
        for group in part.groups
        for table in [of_lambdas(group)]
        for piece in parted(narrow(table), WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return the report of a study.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    models = ", ".join(summary["models"]) or "no records"
    return Page(
        title=f"When linearisation explains fine-tuning: {models}",
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


def explained_from(group: Row) -> Row | None:
    """Return the smallest lambda from which on the relative gap is at most `EXPLAINED`.

    Args:
        group: A group of the summary.

    Returns:
        The point of this lambda; None if there is none.
    """
    smallest = None
    for point in reversed(group["points"]):
        gap = point["relative_gap"]["mean"]
        if gap is None or gap > EXPLAINED:
            break
        smallest = point
    return smallest


def _answers(summary: Summary) -> Iterator[str]:
    for part in slices(summary):
        for group in part.groups:
            place = f"{group['task']} ({part.title})"
            yield f"{place}: {_explained(group)}"
            for sentence in (_slopes(group), _comparator(group), *_bounds(group)):
                if sentence:
                    yield f"{group['task']}: {sentence}"


def _explained(group: Row) -> str:
    """Return from which lambda on both models agree, with their accuracies there."""
    points = group["points"]
    best = max(points, key=lambda point: point["accuracy"]["mean"] or 0.0)
    smallest = explained_from(group)
    point = points[-1] if smallest is None else smallest
    gap = write(point["relative_gap"], PERCENT)
    if smallest is None:
        within = [
            f"{p['strength']:g}"
            for p in points
            if p["relative_gap"]["mean"] is not None
            and p["relative_gap"]["mean"] <= EXPLAINED
        ]
        first = "at no lambda does the linearised model explain fine-tuning"
        if within:
            first = (
                "the linearised model explains fine-tuning at lambda = "
                f"{', '.join(within)} but not from there on"
            )
        text = (
            f"{first}: at lambda = {point['strength']:g} their logits still differ by "
            f"{gap} % of the change that fine-tuning makes"
        )
    else:
        text = (
            f"from lambda = {point['strength']:g} on the linearised model explains "
            f"fine-tuning: there their logits differ by {gap} % of the change that "
            f"fine-tuning makes, and by no more than {100 * EXPLAINED:g} % beyond"
        )
    return (
        f"{text}; {write(point['agreement'], SCORE)} % of the test examples get "
        f"the same label. Fine-tuning classifies {write(point['accuracy'], SCORE)} % "
        f"correctly there and its linear twin "
        f"{write(point['linear_accuracy'], SCORE)} %, against "
        f"{write(best['accuracy'], SCORE)} % of fine-tuning at lambda = "
        f"{best['strength']:g}, its best here, and "
        f"{write(point['start_accuracy'], SCORE)} % before training."
    )


def _slopes(group: Row) -> str:
    """Return the slopes of movement and gap against lambda, with those of theory."""
    slopes = {name: group["slopes"][name] for name in ("movement", "gap")}
    if any(None in row.values() for row in slopes.values()):
        return ""
    words = []
    for which, where in (("over_all", "all"), ("strongest", "the largest")):
        row = slopes["movement"][which]
        words.append(
            f"over {where} {row['lambdas']} from {row['from']:g} to {row['to']:g}: "
            f"{slope(row)} and {slope(slopes['gap'][which])}"
        )
    counts = {row["lambdas"] for row in slopes["movement"].values()}
    if len(counts) == 1:
        del words[1]
    return (
        f"exponents of movement and gap as powers of lambda, {', '.join(words)} (± "
        "standard error; for the minimisers at large lambda they are -1 and -2)."
    )


def _comparator(group: Row) -> str:
    """Return the distances to both twins at the smallest and the largest lambda."""
    above = [p for p in group["points"] if p["strength"] > 0]
    if not above or above[-1]["gap_to_free"]["mean"] is None:
        return ""
    first, last = above[0], above[-1]
    same, free = (
        [write(point[measure], PLAIN) for point in (first, last)]
        for measure in ("train_gap", "gap_to_free")
    )
    return (
        f"from lambda = {first['strength']:g} to {last['strength']:g} the gap on the "
        f"training examples changes from {same[0]} to {same[1]} with the same lambda "
        "in both models. To the linear twin with lambda = 0, as in published bounds, "
        f"it changes from {free[0]} to {free[1]}."
    )


def _bounds(group: Row) -> Iterator[str]:
    """Return how bounds compare with the quantities that they bound."""
    points = [point for point in group["points"] if "bounds" in point]
    if not points:
        return
    words, vacuous = [], []
    for name, each in BOUNDED.items():
        rows = [point["bounds"][name] for point in points]
        compared = sum(row["compared"] for row in rows)
        if not compared:
            vacuous.append(each.title)
            continue
        ratios = [
            value / measured
            for row in rows
            for value, measured in zip(
                row["value"]["values"], row["measured"]["values"], strict=True
            )
            if value is not None and measured
        ]
        held = sum(row["held"] for row in rows)
        text = (
            f"{each.title} (of the {each.of}) holds in {held} of {compared} trainings "
            "that meet its conditions"
        )
        if ratios:
            low, high = (number(end(ratios), PLAIN) for end in (min, max))
            text += f" and is {low} to {high} times as large"
        words.append(text)
    if words:
        yield f"bounds: {'; '.join(words)}."
    if vacuous:
        yield f"bounds that are {VACUOUS} at every lambda: {', '.join(vacuous)}."


def _remarks(summary: Summary) -> Iterator[str]:
    for part in slices(summary):
        yield from _of_part(part)
    yield record_remark(summary)
    yield from note_remarks(summary)


def _of_part(part: Slice) -> Iterator[str]:
    facts: dict[tuple[int, ...], list[str]] = {}
    for group in part.groups:
        seeds = len({seed for point in group["points"] for seed in point["seeds"]})
        sizes = (group["parameters"], group["steps"], group["batch"])
        tasks = facts.setdefault((*sizes, group["examples"][0], seeds), [])
        tasks.append(group["task"])
    for (parameters, steps, batch, examples, seeds), tasks in facts.items():
        which = f", {', '.join(tasks)}" if len(facts) > 1 else ""
        yield (
            f"{part.title}{which}: {parameters:,} trained parameters, {steps} steps of "
            f"{min(batch, examples)} of {examples} training examples, without dropout "
            f"and early stopping, {seeds} {'seeds' if seeds > 1 else 'seed'}. lambda "
            f"belongs to the mean loss; for the sum it is {examples} times as large."
        )
    unfinished = {
        f"{point['strength']:g}"
        for group in part.groups
        for point in group["points"]
        for end in ("tuned", "linear")
        if (point[f"unfinished_{end}"]["mean"] or 0.0) > FINISHED
    }
    if unfinished:
        yield (
            f"{part.title}: training may have ended more than {100 * FINISHED:g} % of "
            "its movement short of a minimiser at lambda = "
            f"{', '.join(sorted(unfinished, key=float))}; slopes and bounds of "
            "minimisers need not hold there."
        )
    if part.groups[0]["loss"] != "squared":
        yield f"{part.title}: no bounds are shown; they hold for squared loss only."
