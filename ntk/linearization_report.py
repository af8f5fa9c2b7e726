"""A lambda study's summary -> sentences, tables for the terminal, JSON, Markdown, HTML.

Everything is said by the summary (`linearization_summary`), which holds no times: a
study that was stopped and taken up again has the same report.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.linearization import BOUNDED
from ntk.linearization_tables import (
    PERCENT,
    PLAIN,
    VACUOUS,
    Part,
    grids,
    of_lambdas,
    parts,
    slope,
)
from ntk.study_grids import SCORE, narrow, number, parted, write
from ntk.study_pages import (
    WIDTH,
    Page,
    Section,
    terminal_table,
    what_ran,
)
from ntk.study_scores import Row

Summary = Mapping[str, Any]

EXPLAINED = 0.1
"""The relative gap up to which the linearised model is said to explain fine-tuning."""
FINISHED = 0.1
"""Of the movement: what may be left of the way to a minimiser."""
QUESTION = (
    "When does the linearised model explain fine-tuning that is held near its start by "
    "(lambda / 2) ||theta - theta0||²?"
)
CAPTIONS = {
    "distance": (
        "Distances against lambda",
        "Above: how far parameters move, and how far both models' parameters are "
        "apart. Below: distance of both models' outputs on the training examples, "
        "with the same lambda in both, and to the linear twin trained with lambda = 0, "
        "which published bounds are of. Mean over seeds; bars: standard deviation. "
        "Dashed: bounds, where their conditions hold. Grey: the slope of theory for "
        "minimisers, through the largest lambda.",
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
        "start in all parameters that are trained, itself trained in the same way."
    ),
    "lambda": (
        "Strength of the pull to the start, in an objective with the mean loss over "
        "the training examples. An objective with the sum has a lambda as many times "
        "larger as there are training examples."
    ),
    "movement": (
        "||theta - theta0|| over all trained parameters, at the end of training."
    ),
    "gap": (
        "Distance of the logits of fine-tuning and its linear twin: the mean of the "
        "norms of single test examples, or the norm over all examples."
    ),
    "relative gap": (
        "The norm of that distance over all test examples, relative to that of the "
        "change which fine-tuning makes."
    ),
    "KL": "Mean divergence of the linearised model's probabilities from fine-tuning's.",
    "recovery": (
        "Gain in accuracy of the linearised model over the start, relative to that of "
        "fine-tuning (Malladi et al. 2023); none where fine-tuning gains nothing."
    ),
    "Taylor remainder": (
        "||f(theta) - f0 - J (theta - theta0)|| relative to ||f(theta) - f0||, at the "
        "weights of fine-tuning: what its own movement has that is not linear."
    ),
    "lambda_0": (
        "2 rho ||r0|| L / R of Rahimi Afzal et al. (2025), theorem 4: from there on "
        "training stays within the radius R, for squared loss and gradient flow."
    ),
    VACUOUS: "A condition of the bound is not met: it says nothing.",
}


def tables(summary: Summary) -> list[Table]:
    """Return each task's table by lambda, for a terminal of 110 columns.

    Args:
        summary: As `linearization_summary.collect` returns it.

    Returns:
        Tables, more for a task where one would be too wide.
    """
    return [
        terminal_table(f"{grid.title}: {part.title}", piece)
        for part in parts(summary)
        for group in part.groups
        for grid in [of_lambdas(group)]
        for piece in parted(narrow(grid), WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return what the report says.

    Args:
        summary: As `linearization_summary.collect` returns it.
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
                grids(part),
                [f"{what}-{part.name}" for what in CAPTIONS],
            )
            for part in parts(summary)
        ],
        ran=what_ran(summary),
        captions=CAPTIONS,
        words=WORDS,
    )


def explained_from(group: Row) -> Row | None:
    """Return the smallest lambda from which on the relative gap is at most `EXPLAINED`.

    Args:
        group: Of a summary.

    Returns:
        Its point, None if there is none.
    """
    found = None
    for point in reversed(group["points"]):
        gap = point["relative_gap"]["mean"]
        if gap is None or gap > EXPLAINED:
            break
        found = point
    return found


def _answers(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        for group in part.groups:
            place = f"{group['task']} ({part.title})"
            yield f"{place}: {_explained(group)}"
            for sentence in (_slopes(group), _comparator(group), *_bounds(group)):
                if sentence:
                    yield f"{group['task']}: {sentence}"


def _explained(group: Row) -> str:
    """Return from which lambda on both models do the same, and what that costs."""
    points = group["points"]
    best = max(points, key=lambda point: point["accuracy"]["mean"] or 0.0)
    found = explained_from(group)
    point = points[-1] if found is None else found
    gap = write(point["relative_gap"], PERCENT)
    if found is None:
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
    """Return how movement and gap fall with lambda, beside theory."""
    slopes = {name: group["slopes"][name] for name in ("movement", "gap")}
    if any(None in row.values() for row in slopes.values()):
        return ""
    words = []
    for which, where in (("over_all", "all"), ("strongest", "the largest")):
        row = slopes["movement"][which]
        words.append(
            f"over {where} {row['lambdas']} from {row['from']:g} to {row['to']:g} by "
            f"{slope(row)} and {slope(slopes['gap'][which])}"
        )
    counts = {row["lambdas"] for row in slopes["movement"].values()}
    if len(counts) == 1:
        del words[1]
    return (
        f"movement and gap go as powers of lambda, {', '.join(words)} (± standard "
        "error; those of minimisers for large lambda are -1 and -2)."
    )


def _comparator(group: Row) -> str:
    """Return how the distance to the unpenalised twin goes with lambda."""
    above = [p for p in group["points"] if p["strength"] > 0]
    if not above or above[-1]["gap_to_free"]["mean"] is None:
        return ""
    first, last = above[0], above[-1]
    own, free = (
        [write(point[measure], PLAIN) for point in (first, last)]
        for measure in ("train_gap", "gap_to_free")
    )
    return (
        f"from lambda = {first['strength']:g} to {last['strength']:g} the gap on the "
        f"training examples goes from {own[0]} to {own[1]} where both models have the "
        "same lambda. To the linear twin with lambda = 0, which published bounds are "
        f"of, it goes from {free[0]} to {free[1]}."
    )


def _bounds(group: Row) -> Iterator[str]:
    """Return how bounds compare with what they bound."""
    points = [point for point in group["points"] if "bounds" in point]
    if not points:
        return
    words, nothing = [], []
    for name, each in BOUNDED.items():
        rows = [point["bounds"][name] for point in points]
        compared = sum(row["compared"] for row in rows)
        if not compared:
            nothing.append(each.title)
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
    if nothing:
        yield f"bounds that are {VACUOUS} at every lambda: {', '.join(nothing)}."


def _remarks(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        yield from _of_part(part)
    records = summary["records"]
    if not records["there"]:
        yield "There are no records yet."
    elif summary["missing"]:
        first = summary["missing"][0]
        yield (
            f"Of {records['asked']} records {records['asked'] - records['there']} are "
            "missing, and every mean is over what is there. The first: "
            f"{first['task']} at {first['shots']} shots, {first['subject']}, seeds "
            f"{', '.join(map(str, first['seeds']))}."
        )
    for note in summary["notes"]:
        places = ", ".join(f"{task} at {shots}" for task, shots in note["splits"])
        yield f"{note['note']} ({places} shots)"


def _of_part(part: Part) -> Iterator[str]:
    facts: dict[tuple[int, ...], list[str]] = {}
    for group in part.groups:
        seeds = len({seed for point in group["points"] for seed in point["seeds"]})
        own = (group["parameters"], group["steps"], group["batch"])
        facts.setdefault((*own, group["examples"][0], seeds), []).append(group["task"])
    for (parameters, steps, batch, examples, seeds), tasks in facts.items():
        which = f", {', '.join(tasks)}" if len(facts) > 1 else ""
        yield (
            f"{part.title}{which}: {parameters:,} trained parameters, {steps} steps of "
            f"{min(batch, examples)} of {examples} training examples, without dropout "
            f"and to the end, {seeds} {'seeds' if seeds > 1 else 'seed'}. lambda is of "
            f"the mean loss; of the sum it would be {examples} times as large."
        )
    short = {
        f"{point['strength']:g}"
        for group in part.groups
        for point in group["points"]
        for end in ("tuned", "linear")
        if (point[f"unfinished_{end}"]["mean"] or 0.0) > FINISHED
    }
    if short:
        yield (
            f"{part.title}: training may have ended more than {100 * FINISHED:g} % of "
            "its movement short of a minimiser at lambda = "
            f"{', '.join(sorted(short, key=float))}; there slopes and bounds of "
            "minimisers need not show."
        )
    if part.groups[0]["loss"] != "squared":
        yield f"{part.title}: no bound is claimed; bounds are of squared loss."
