"""Tables of a study of layers.

Scores are in percent, ± the standard deviation over splits; means over tasks are ± the
standard error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ntk.reporting import (
    DASH,
    SCORE,
    Format,
    ReportTable,
    Row,
    ShotsSlice,
    number,
    select,
    write,
)
from ntk.studies.layers.predictors import CONTROLS, PREDICTORS
from ntk.studies.layers.records import HEAD
from ntk.studies.layers.summary import ALL

PERCENT = Format(".1f", 100)
RHO = Format("+.2f")
FOUR_DIGITS = Format(".4g")
MEAN_POINTS = Format("+.1f", 1, "standard_error")
FIELDS = ("layers", "rules", "references", "held", "subsets", "noise", "correlations")


GIVEN = {
    "beyond_size": (
        "the number of parameters",
        "since larger sets tend to score higher",
    ),
    "beyond_depth": (
        "the mean index of the layers",
        "since sets of low layers tend to score higher",
    ),
    "beyond_static": (
        "what layers are worth on the other tasks",
        "the ranking that needs no kernel of this task",
    ),
}
"""What is held fixed in a partial correlation, and why."""


class Slice(ShotsSlice):
    """The rows of a summary with one number of shots."""

    @property
    def verified(self) -> bool:
        """Whether the choice of some rule was fine-tuned."""
        rules = self.summary["rules"]
        return any(row["score"]["mean"] is not None for row in rules)


def slices(summary: Mapping[str, Any]) -> list[Slice]:
    """Return the slices of a summary by shots.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    return [
        Slice(
            f"{shots} shots",
            str(shots),
            [
                task
                for task in summary["tasks"]
                if select(summary["layers"], task=task, shots=shots)
            ],
            {
                # Older summaries have no brackets.
                field: select(summary.get(field, []), shots=shots)
                for field in (*FIELDS, "brackets", "differences")
            },
        )
        for shots in summary["shots"]
    ]


def report_tables(part: Slice) -> list[ReportTable]:
    """Return the tables that have rows, details last.

    Args:
        part: A slice of the summary.
    """
    tables = [
        *([scores_of_rules(part)] if part.verified else []),
        correlations(part),
        *(correlations(part, kind) for kind in CONTROLS),
        _noise(part),
        bounds(part),
        *(layers_of_task(part, task) for task in part.tasks),
        *(choices_on_task(part, task) for task in part.tasks),
        *(_subsets(part, task) for task in part.tasks),
    ]
    return [table for table in tables if table.rows]


def layers_of_task(part: Slice, task: str) -> ReportTable:
    """Return the layers of a task, ranked by their drop.

    Args:
        part: A slice of the summary.
        task: Name of the task.
    """
    # The head cannot be chosen, so it comes last.
    ranked = sorted(
        part.rows("layers", task=task),
        key=lambda r: (r["layer"] == HEAD, -(r["drop"]["mean"] or 0)),
    )
    rows = [
        [
            row["layer"],
            number(row["parameters"], Format(".0f")),
            write(row["drop"], PERCENT._replace(error="deviation")),
            write(row["trace_share"], PERCENT._replace(error="deviation")),
            write(row["largest_eigenvalue"], Format(".3g", 1, "deviation")),
            write(row["alignment"], Format(".3f", 1, "deviation")),
            write(row["gradient_norm"], Format(".3g", 1, "deviation")),
        ]
        for row in ranked
    ]
    return ReportTable(
        f"layers-{task}",
        f"Layers, ranked: {task}",
        "Measures of each layer alone, before training. Drop: relative decrease of "
        "r'(K + s I)⁻¹r by tuning it and the head against the head alone, in percent. "
        "Trace: its share of the trace of all kernels, in percent. Eigenvalue (the "
        "largest), alignment with r and gradient norm: of its own kernel. Mean ± "
        "standard deviation over splits. The head is tuned with any layer.",
        ["layer", "parameters", "drop", "trace", "eigenvalue", "alignment", "gradient"],
        rows,
        folded=len(part.tasks) > 1,
    )


def choices_on_task(part: Slice, task: str) -> ReportTable:
    """Return the choice of each rule on a task.

    Args:
        part: A slice of the summary.
        task: Name of the task.
    """
    rows = []
    for row in part.rows("rules", task=task):
        rows.append(
            [
                row["rule"],
                _listed(row["chosen"]),
                number(row["parameters"]["mean"], Format(".0f")),
                write(row["explained"], PERCENT._replace(error="deviation")),
                *([write(row["score"], SCORE)] if part.verified else []),
            ]
        )
    for row in part.rows("references", task=task) if part.verified else ():
        shares = write(row["explained"], PERCENT._replace(error="deviation"))
        rows.append([row["name"], DASH, DASH, shares, write(row["score"], SCORE)])
    columns = ["rule", "layers", "parameters", "drop"]
    return ReportTable(
        f"choices-{task}",
        f"What each rule chose: {task}",
        "Layers that each rule chose at the same budget, with the number of splits "
        "unless it is all; relative decrease of r'(K + s I)⁻¹r by all of them, in "
        "percent, mean ± standard deviation over splits.",
        [*columns, *(["score"] if part.verified else [])],
        rows,
        folded=len(part.tasks) > 1,
    )


def scores_of_rules(part: Slice) -> ReportTable:
    """Return the scores of each rule's choices and the gains of the target-aware one.

    Args:
        part: A slice of the summary.
    """
    differences = {row["rule"]: row for row in part.rows("differences")}
    rows = []
    for rule in dict.fromkeys(row["rule"] for row in part.rows("rules")):
        by_task = {row["task"]: row["score"] for row in part.rows("rules", rule=rule)}
        cells = [write(by_task.get(task), SCORE) for task in part.tasks]
        rows.append([rule, *cells, write(differences.get(rule), MEAN_POINTS)])
    for name in dict.fromkeys(row["name"] for row in part.rows("references")):
        references = part.rows("references", name=name)
        by_task = {row["task"]: row["score"] for row in references}
        rows.append([name, *(write(by_task.get(t), SCORE) for t in part.tasks), DASH])
    held = {row["task"]: row["spearman"] for row in part.rows("held")}
    rhos = [write(held.get(t), RHO._replace(error="deviation")) for t in part.tasks]
    return ReportTable(
        "scores",
        "Scores of the chosen layers",
        "Test score of fine-tuning the layers that each rule chose, in percent, mean ± "
        "standard deviation over splits. Points: target-aware choice minus the rule's, "
        "on the same splits, mean ± standard error over tasks (over splits for one "
        "task). Last row: rank correlation, per split, of predicted drop and score "
        "over the chosen sets.",
        ["rule", *part.tasks, "points"],
        rows,
        [["predicted order", *rhos, DASH]],
    )


def correlations(part: Slice, kind: str = "plain") -> ReportTable:
    """Return how each predictor correlates with the score, by task.

    Args:
        part: A slice of the summary.
        kind: ``"plain"``, or a name of `predictors.CONTROLS` for a partial correlation.
    """
    control = CONTROLS.get(kind)
    tasks = [row["task"] for row in part.rows("noise")]
    several = tasks[1:]
    rows = []
    for name, predictor in PREDICTORS.items():
        found = part.rows("correlations", predictor=name)
        known = [row for row in found if row[kind]["spearman"] is not None]
        if name == control or not known:
            continue
        by_task = {row["task"]: row for row in found}
        shown = [*tasks, *([None] if several else [])]
        expected = "more" if predictor.sign > 0 else "less"
        rows.append([name, expected, *(_interval(by_task[t][kind]) for t in shown)])
    columns = ["predictor", "better is", *tasks, *(["mean"] if several else [])]
    rest = (
        "means over splits; in brackets the 95 % bootstrap interval over sets and "
        "splits. The mean is over tasks; its interval is conditional on these tasks."
    )
    if control is not None:
        what, why = GIVEN[kind]
        return ReportTable(
            kind.replace("_", "-"),
            f"Which measure predicts more than {what}",
            f"Partial rank correlation given {what}, {why}; {rest}",
            columns,
            rows,
        )
    return ReportTable(
        "correlations",
        "Which measure predicts the score",
        "Spearman's rank correlation, over sets of layers, of each measure before "
        "training with the test score after training. The last three need no kernel: "
        f"a measure is worth what it tells beyond them; {rest}",
        columns,
        rows,
    )


def bounds(part: Slice) -> ReportTable:
    """Return the published bounds of the spectrum beside the measured values.

    Args:
        part: A slice of the summary.
    """
    rows = []
    for row in part.rows("brackets"):
        lower, least, most, upper = (
            number(row[end], FOUR_DIGITS) for end in ("lower", "least", "most", "upper")
        )
        conditions = [
            f"{condition}: {count} of {row['kernels']}"
            for condition, count in row["conditions"].items()
        ]
        rows.append(
            [
                row["task"],
                row["quantity"],
                # Infinite bounds are not in the summary.
                DASH if lower == upper == DASH else f"{lower} to {upper}",
                least if least == most else f"{least} to {most}",
                ", ".join(conditions) or "none needed",
            ]
        )
    return ReportTable(
        "bounds",
        "How one layer changes the spectrum: bounds and measured values",
        "K is the kernel of the head and all layers but one, S the kernel of that "
        "layer, K + S the kernel of all. Bound: from K and the size of S alone; "
        "measured: value for K + S. Numbers are medians over layers and splits. "
        "Theorem 6 of Rahimi Afzal et al. (2025, arXiv 2602.08239): each eigenvalue "
        "grows by a factor λᵢ(K + S) / λᵢ(K) from 1 − η to 1 + η, where η = ‖K^(-1/2) "
        "S K^(-1/2)‖; measured are the least and the largest factor. Conditions: on "
        "how many layers and splits each holds. The theorem needs K to be positive "
        "definite, by more than rounding; unless η < 1 its lower bound says nothing, "
        "and theorem 7, on the training risk, need not hold. The other bounds hold for "
        "every kernel: they have K + s I in place of K, s being the ridge.",
        ["task", "quantity", "bound", "measured", "conditions"],
        rows,
    )


def _noise(part: Slice) -> ReportTable:
    rows = [
        [
            row["task"],
            str(row["subsets"]),
            str(row["splits"]),
            number(row["least"], PERCENT),
            number(row["most"], PERCENT),
            "<0.001"
            if row["p"] is not None and row["p"] < 0.001
            else (number(row["p"], Format(".3f"))),
            number(row["concordance"], Format(".2f")),
            number(row["halves"], RHO),
            number(row["ceiling"], Format(".2f")),
        ]
        for row in part.rows("noise")
    ]
    return ReportTable(
        "noise",
        "Whether scores differ by more than noise",
        "Number of sets of layers that were tuned on every split, their lowest and "
        "highest test score in percent, p-value of Friedman's test that all are "
        "equal, Kendall's W of the splits' rankings, rank correlation between halves "
        "of the splits, and the resulting ceiling for the correlation of any "
        "predictor.",
        ["task", "sets", "splits", "lowest", "highest", "p", "W", "halves", "ceiling"],
        rows,
    )


def _subsets(part: Slice, task: str) -> ReportTable:
    subsets = part.rows("subsets", task=task)
    ranked = sorted(subsets, key=lambda row: -(row["score"]["mean"] or 0))
    depth = sum(r["layer"] != HEAD for r in part.rows("layers", task=task))
    rows = [
        [
            ALL if len(row["layers"]) == depth > 1 else ", ".join(row["layers"]),
            write(row["score"], SCORE),
            *(number(row["predictors"].get(n), Format(".3g")) for n in PREDICTORS),
        ]
        for row in ranked
    ]
    return ReportTable(
        f"subsets-{task}",
        f"Sets of layers: {task}",
        "Test score in percent, mean ± standard deviation over splits, and measures "
        "before training, means over splits.",
        ["layers", "score", *PREDICTORS],
        rows,
        folded=True,
    )


def _listed(chosen: Sequence[Sequence[Sequence[str]]]) -> str:
    """Return the chosen sets, the most frequent first."""
    counts = Counter(", ".join(each) for sets in chosen for each in sets)
    total = sum(counts.values())
    return "; ".join(
        text if count == total else f"{text} ({count} of {total})"
        for text, count in counts.most_common()
    )


def _interval(row: Row) -> str:
    if row["spearman"] is None:
        return DASH
    text = number(row["spearman"], RHO)
    if row["low"] is None:
        return text
    return f"{text} [{number(row['low'], RHO)}, {number(row['high'], RHO)}]"
