"""A study of layers -> tables for the terminal, sentences, the page of its report.

Everything is said by the summary (`layers_summary`), which holds no times: a study that
was stopped and taken up again has the same report.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.layers_plots import GOAL
from ntk.layers_predictors import PREDICTORS
from ntk.layers_predictors import TARGET_AWARE as PREDICTED
from ntk.layers_subsets import RANDOM, TARGET_AWARE
from ntk.layers_tables import (
    MEAN_POINTS,
    PERCENT,
    RHO,
    Part,
    choices_on_task,
    correlations,
    grids,
    layers_of_task,
    parts,
    scores_of_rules,
)
from ntk.study_grids import Grid, narrow, number, parted, write
from ntk.study_pages import WIDTH, Page, Section, terminal_table, what_ran
from ntk.study_scores import Row, across

Summary = Mapping[str, Any]

SIGNIFICANT = 0.05
TWO_ERRORS = 2
QUESTION = "Which layers should be tuned, and does their kernel tell before training?"
FIGURES = ("layers", "scores", "correlations", "sets")
CAPTIONS = {
    "layers": (
        "The layers and what the rules choose",
        "Above: by how much tuning one layer lowers r'(K + s I)⁻¹r beside the head "
        "alone; bars: standard deviation over splits. Below: how often each rule chose "
        "each layer, dark on all splits; numbers are percent of the splits.",
    ),
    "scores": (
        "What the chosen layers reached",
        "Test score of fine-tuning what each rule chose at the same budget, of all "
        "layers and of the head alone.",
    ),
    "correlations": (
        "Which measure tells the score",
        "Rank correlation, over sets of layers, of each measure before training with "
        "the test score. (+) marks measures of which more should be better, (−) those "
        "of which less should be. Right: the partial correlation, beyond that of both "
        "with the number of parameters. Black: mean over tasks and 95 % of a bootstrap "
        "over sets and splits.",
    ),
    "sets": (
        "Target-aware score and test score",
        "Each point is a set of layers, named by their numbers; bars: standard "
        "deviation over splits.",
    ),
}
WORDS = {
    "layer": "A transformer block. What the space holds outside of the blocks is left "
    "out, but for a head, which is tuned with any layers.",
    "split": "k training and k dev examples of each label, drawn by one seed. The test "
    "examples are the same for all.",
    "r": "What is to be learnt: one-hot labels less the probabilities of the model as "
    "it is, on the training examples.",
    "drop": "The share by which tuning some layers lowers r'(K + s I)⁻¹r, the smallest "
    "regularised risk, beside the head alone.",
    "target-aware": "Takes the layers with the largest drop per parameter one after "
    "another, then exchanges one or two as long as that lowers the whole.",
    "least growth": "Takes the layers that raise the largest eigenvalue least: "
    "algorithm 2 of Rahimi Afzal et al. (2025), at a fixed budget.",
    **{name: each.meaning for name, each in PREDICTORS.items() if name != PREDICTED},
}


def tables(summary: Summary) -> list[Table]:
    """Return the ranking, or once layers were fine-tuned how far it held.

    Args:
        summary: As `layers_summary.collect` returns it.

    Returns:
        Tables for a terminal of 110 columns.
    """
    shown: list[tuple[Part, Grid]] = []
    for part in parts(summary):
        known = [correlations(part), correlations(part, "beyond_size")]
        if part.verified:
            known.append(scores_of_rules(part))
        if not any(grid.rows for grid in known):
            for task in part.tasks:
                known += [layers_of_task(part, task), choices_on_task(part, task)]
        shown += [(part, narrow(grid)) for grid in known if grid.rows]
    return [
        terminal_table(f"{piece.title}, {part.title}", piece)
        for part, grid in shown
        for piece in parted(grid, WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return what the report says.

    Args:
        summary: As `layers_summary.collect` returns it.
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
                grids(part),
                [f"{what}-{part.name}" for what in FIGURES],
            )
            for part in parts(summary)
        ],
        ran=what_ran(summary),
        captions=CAPTIONS,
        words=WORDS,
    )


def _answers(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        for sentence in (
            _gain(part),
            _held(part),
            _told(part),
            _best(part, "plain"),
            _best(part, "beyond_size"),
            *_choices(part),
        ):
            if sentence:
                yield f"{part.title}: {sentence}"


def _choices(part: Part) -> Iterator[str]:
    for task in part.tasks:
        for row in part.rows("rules", task=task, rule=TARGET_AWARE):
            sets = [tuple(sets[0]) for sets in row["chosen"]]
            most = max(dict.fromkeys(sets), key=sets.count)
            yield (
                f"on {task} the target-aware rule chooses layers {', '.join(most)} on "
                f"{sets.count(most)} of {len(sets)} splits; what it chooses lowers "
                f"r'(K + s I)⁻¹r by {write(row['explained'], PERCENT)} %."
            )


def _gain(part: Part) -> str:
    """Return what the target-aware choice gained over the others."""
    rows = [row for row in part.rows("differences") if row["mean"] is not None]
    if not rows:
        return ""
    words = []
    for row in rows:
        other = "random ones" if row["rule"] == RANDOM else row["rule"]
        words.append(f"{write(row, MEAN_POINTS)} over {other}{_sure(row)}")
    tasks = len(rows[0]["tasks"])
    over = f"{tasks} tasks" if tasks > 1 else "its splits"
    return (
        "fine-tuned, the target-aware choice gains in points of the test score (mean ± "
        f"standard error over {over}): {'; '.join(words)}."
    )


def _sure(row: Row) -> str:
    error = row["standard_error"]
    if error is None:
        return " (no error)"
    return "" if abs(row["mean"]) > TWO_ERRORS * error else " (within two errors)"


def _held(part: Part) -> str:
    """Return how far the predicted order of what was chosen is that of the scores."""
    rows = part.rows("held")
    whole = across([row | {"mean": row["spearman"]["mean"]} for row in rows], "mean")
    if whole["mean"] is None:
        return ""
    form = RHO._replace(error="standard_error")
    several = len(whole["tasks"])
    return (
        "among the sets chosen within the budget, the rank correlation of the "
        f"predicted drop with the score is {write(whole, form)} (mean over {several} "
        f"task{'s' if several > 1 else ''} and their splits)."
    )


def _told(part: Part) -> str:
    """Return whether the target-aware score reaches the goal where it can."""
    rows = part.rows("noise")
    if not rows:
        return ""
    telling = [r for r in rows if r["p"] is not None and r["p"] < SIGNIFICANT]
    if not telling:
        known = "" if rows[0]["p"] is not None else ", which one split cannot tell"
        return (
            f"on none of {len(rows)} tasks do the scores of sets of layers differ by "
            f"more than noise (Friedman's test at 5 %){known}: there is nothing that "
            "a measure could tell."
        )
    words = []
    for row in telling:
        (own,) = part.rows("correlations", task=row["task"], predictor=PREDICTED)
        words.append(
            f"{row['task']} {number(own['plain']['spearman'], RHO)} (ceiling "
            f"{number(row['ceiling'], RHO)})"
        )
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


def _best(part: Part, kind: str) -> str:
    """Return which measures tell the score best, in the direction they should."""
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
    what = "" if kind == "plain" else " beyond what the number of parameters tells,"
    return (
        f"the measures that go best with the score,{what} in the direction that they "
        f"should ({mean}, 95 % interval): {'; '.join(texts)}; the target-aware score "
        f"is number {place} of {len(ranked)}."
    )


def _rho(part: Part, task: str, predictor: str) -> float | None:
    (row,) = part.rows("correlations", task=task, predictor=predictor)
    found: float | None = row["plain"]["spearman"]
    return found


def _remarks(summary: Summary) -> Iterator[str]:
    records = summary["records"]
    if not records["there"]:
        yield "There are no records yet."
        return
    if summary["missing"]:
        first = summary["missing"][0]
        yield (
            f"Of {records['asked']:,} records {len(summary['missing']):,} "
            f"{'is' if len(summary['missing']) == 1 else 'are'} missing, and every "
            f"number is over what is there. The first: {first['task']} at "
            f"{first['shots']} shots, seed {first['seed']}, {first['subject']}."
        )
    else:
        yield f"All of the {records['there']:,} records asked for are there."
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
            f"The space also holds parameters in no block ({others}); they are no "
            "layer and left out."
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
