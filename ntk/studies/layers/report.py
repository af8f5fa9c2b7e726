"""The report of a study of layers, from its summary (`ntk.studies.layers.summary`).

The summary holds no times, so an interrupted and resumed study has the same report.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.reporting import (
    WIDTH,
    Page,
    ReportTable,
    Row,
    Section,
    across,
    narrow,
    number,
    parted,
    terminal_table,
    what_ran,
    write,
)
from ntk.studies.layers.figures import GOAL
from ntk.studies.layers.predictors import CONTROLS, PREDICTORS
from ntk.studies.layers.predictors import TARGET_AWARE as PREDICTED
from ntk.studies.layers.subsets import RANDOM, TARGET_AWARE
from ntk.studies.layers.tables import (
    GIVEN,
    MEAN_POINTS,
    PERCENT,
    RHO,
    Slice,
    bounds,
    choices_on_task,
    correlations,
    layers_of_task,
    report_tables,
    scores_of_rules,
    slices,
)
from ntk.studies.overview import metric_remarks, note_remarks, record_remark

Summary = Mapping[str, Any]

SIGNIFICANT = 0.05
TWO_ERRORS = 2
QUESTION = "Which layers should be tuned, and do their kernels predict it?"
FIGURES = ("layers", "scores", "correlations", "sets")
CAPTIONS = {
    "layers": (
        "The layers and the choices of the rules",
        "Top: relative decrease of r'(K + s I)⁻¹r by tuning one layer and the head "
        "against the head alone; bars: standard deviation over splits. Bottom: how "
        "often each rule chose each layer, in percent of the splits.",
    ),
    "scores": (
        "Scores of the chosen layers",
        "Test score of fine-tuning the layers that each rule chose at the same budget, "
        "of all layers and of the head alone.",
    ),
    "correlations": (
        "Which measure predicts the score",
        "Rank correlation, over sets of layers, of each measure before training with "
        "the test score. (+): larger should be better; (−): smaller should be better. "
        "Right: partial correlation given the mean index of the layers. Black: mean "
        "over tasks with a 95 % bootstrap interval over sets and splits.",
    ),
    "sets": (
        "Target-aware score and test score",
        "Each point is a set of layers, named by their numbers; bars: standard "
        "deviation over splits.",
    ),
}
WORDS = {
    "layer": "A transformer block. Parameters outside the blocks are left out, except "
    "a head, which is tuned with any layers.",
    "split": "k training and k dev examples per label, drawn by one seed. All splits "
    "share the test examples.",
    "r": "One-hot labels minus the probabilities of the model before training, on the "
    "training examples.",
    "drop": "Relative decrease of r'(K + s I)⁻¹r, the smallest regularised risk, by "
    "tuning some layers and the head against the head alone.",
    "target-aware": "Adds the layer with the largest drop per parameter, one after "
    "another, then exchanges one or two while that lowers the risk.",
    "least growth": "Chooses the layers that raise the largest eigenvalue least: "
    "algorithm 2 of Rahimi Afzal et al. (2025), at a fixed budget.",
    **{name: each.meaning for name, each in PREDICTORS.items() if name != PREDICTED},
}


def tables(summary: Summary) -> list[Table]:
    """Return the ranking of layers, or its verification if layers were fine-tuned.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Tables for a terminal; wide ones are split.
    """
    shown: list[tuple[Slice, ReportTable]] = []
    for part in slices(summary):
        known = [correlations(part), correlations(part, "beyond_depth")]
        if part.verified:
            known.append(scores_of_rules(part))
        if not any(table.rows for table in known):
            for task in part.tasks:
                known += [layers_of_task(part, task), choices_on_task(part, task)]
        known.append(bounds(part))
        shown += [(part, narrow(table)) for table in known if table.rows]
    return [
        terminal_table(f"{piece.title}, {part.title}", piece)
        for part, table in shown
        for piece in parted(table, WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return the report of a study.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    models = ", ".join(summary["models"]) or "no records"
    return Page(
        title=f"Which layers to tune: {models}, {summary['space']}",
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        sections=[
            Section(
                part.title,
                part.name,
                report_tables(part),
                [f"{what}-{part.name}" for what in FIGURES],
            )
            for part in slices(summary)
        ],
        ran=what_ran(summary),
        captions=CAPTIONS,
        words=WORDS,
    )


def _answers(summary: Summary) -> Iterator[str]:
    for part in slices(summary):
        for sentence in (
            _gain(part),
            _held(part),
            _told(part),
            _best(part, "plain"),
            *(_best(part, kind) for kind in CONTROLS),
            *_choices(part),
        ):
            if sentence:
                yield f"{part.title}: {sentence}"


def _choices(part: Slice) -> Iterator[str]:
    for task in part.tasks:
        for row in part.rows("rules", task=task, rule=TARGET_AWARE):
            sets = [tuple(sets[0]) for sets in row["chosen"]]
            most = max(dict.fromkeys(sets), key=sets.count)
            yield (
                f"on {task} the target-aware rule chooses layers {', '.join(most)} on "
                f"{sets.count(most)} of {len(sets)} splits; its choice lowers "
                f"r'(K + s I)⁻¹r by {write(row['explained'], PERCENT)} %."
            )


def _gain(part: Slice) -> str:
    """Return the gain of the target-aware choice over the other rules."""
    rows = [row for row in part.rows("differences") if row["mean"] is not None]
    if not rows:
        return ""
    words = []
    for row in rows:
        other = "random ones" if row["rule"] == RANDOM else row["rule"]
        words.append(f"{write(row, MEAN_POINTS)} over {other}{_significance(row)}")
    tasks = len(rows[0]["tasks"])
    over = f"{tasks} tasks" if tasks > 1 else "its splits"
    return (
        "fine-tuned, the target-aware choice gains in points of the test score (mean ± "
        f"standard error over {over}): {'; '.join(words)}."
    )


def _significance(row: Row) -> str:
    error = row["standard_error"]
    if error is None:
        return " (no error)"
    within = abs(row["mean"]) <= TWO_ERRORS * error
    return " (within two standard errors)" if within else ""


def _held(part: Slice) -> str:
    """Return the rank correlation of predicted drop and score over chosen sets."""
    rows = part.rows("held")
    mean = across([row | {"mean": row["spearman"]["mean"]} for row in rows], "mean")
    if mean["mean"] is None:
        return ""
    fmt = RHO._replace(error="standard_error")
    tasks = len(mean["tasks"])
    return (
        "among the sets chosen within the budget, the rank correlation of the "
        f"predicted drop with the score is {write(mean, fmt)} (mean over {tasks} "
        f"task{'s' if tasks > 1 else ''} and their splits)."
    )


def _told(part: Slice) -> str:
    """Return how well the target-aware score predicts scores, given their noise."""
    rows = part.rows("noise")
    if not rows:
        return ""
    telling = [r for r in rows if r["p"] is not None and r["p"] < SIGNIFICANT]
    if not telling:
        known = "" if rows[0]["p"] is not None else ", unknown with one split"
        return (
            f"on none of {len(rows)} tasks do the scores of sets of layers differ by "
            f"more than noise (Friedman's test at 5 %){known}: there is nothing to "
            "predict."
        )
    words = []
    for row in telling:
        rho = number(_rho(part, row["task"], PREDICTED), RHO)
        words.append(f"{row['task']} {rho} (ceiling {number(row['ceiling'], RHO)})")
    reached = [
        row["task"]
        for row in telling
        if (_rho(part, row["task"], PREDICTED) or 0) >= GOAL
    ]
    return (
        f"on {len(telling)} of {len(rows)} tasks the scores of sets of layers differ "
        "by more than noise (Friedman's test at 5 %); there the target-aware score "
        f"reaches a rank correlation of {GOAL:g} on {len(reached)}: "
        f"{', '.join(words)}."
    )


def _best(part: Slice, kind: str) -> str:
    """Return which measures predict the score best, in the expected direction."""
    tasks = [row["task"] for row in part.rows("noise")]
    if not tasks:
        return ""
    of = None if tasks[1:] else tasks[0]
    rows = [
        {"predictor": row["predictor"], **row[kind]}
        for row in part.rows("correlations", task=of)
        if row[kind]["towards"] is not None
    ]
    ranked = sorted(rows, key=lambda row: -row["towards"])
    texts = []
    for row in ranked[:3]:
        text = f"{row['predictor']} {number(row['spearman'], RHO)}"
        if row["low"] is not None:
            text += f" [{number(row['low'], RHO)}, {number(row['high'], RHO)}]"
        texts.append(text)
    names = [row["predictor"] for row in ranked]
    place = names.index(PREDICTED) + 1 if PREDICTED in names else 0
    if not place:
        return ""
    mean = f"mean of {len(tasks)} tasks" if tasks[1:] else tasks[0]
    given = "" if kind == "plain" else f" given {GIVEN[kind][0]}"
    return (
        f"the measures that correlate best with the score{given}, in the expected "
        f"direction ({mean}, 95 % interval): {'; '.join(texts)}; the target-aware "
        f"score is number {place} of {len(ranked)}."
    )


def _rho(part: Slice, task: str, predictor: str) -> float | None:
    (row,) = part.rows("correlations", task=task, predictor=predictor)
    rho: float | None = row["plain"]["spearman"]
    return rho


def _remarks(summary: Summary) -> Iterator[str]:
    yield record_remark(summary)
    if not summary["records"]["there"]:
        return
    budget = summary["budget"]
    most = (
        f"{budget['layers']} layers"
        if budget["parameters"] is None
        else f"{budget['parameters']:,} parameters"
    )
    yield (
        f"Space {summary['space']}, budget {most}, ridge {summary['epsilon']:g} of the "
        f"mean eigenvalue; seeds {', '.join(map(str, summary['seeds']))}."
    )
    if summary["left_out"]:
        others = ", ".join(summary["left_out"])
        yield (
            f"The space also has parameters outside the blocks ({others}); they are "
            "left out."
        )
    yield from metric_remarks(summary["metrics"])
    yield from note_remarks(summary)
