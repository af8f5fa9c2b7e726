"""A study of layers in numbers -> its tables.

Scores are in percent; plus or minus is the standard deviation over splits, of means
over tasks the standard error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ntk.layers_predictors import PREDICTORS, SIZE
from ntk.layers_records import HEAD
from ntk.layers_summary import ALL
from ntk.record_values import DASH
from ntk.study_grids import SCORE, Form, Grid, number, write
from ntk.study_scores import Row
from ntk.study_summary import ShotsPart, select

PERCENT = Form(".1f", 100)
RHO = Form("+.2f")
MEAN_POINTS = Form("+.1f", 1, "standard_error")
FIELDS = ("layers", "rules", "references", "held", "subsets", "noise", "correlations")


class Part(ShotsPart):
    """The rows of a summary of one number of shots."""

    @property
    def verified(self) -> bool:
        """Whether something that a rule chose was fine-tuned."""
        rules = self.summary["rules"]
        return any(row["score"]["mean"] is not None for row in rules)


def parts(summary: Mapping[str, Any]) -> list[Part]:
    """Return what is shown together.

    Args:
        summary: As `layers_summary.collect` returns it.
    """
    return [
        Part(
            f"{shots} shots",
            str(shots),
            [
                task
                for task in summary["tasks"]
                if select(summary["layers"], task=task, shots=shots)
            ],
            {
                field: select(summary[field], shots=shots)
                for field in (*FIELDS, "differences")
            },
        )
        for shots in summary["shots"]
    ]


def grids(part: Part) -> list[Grid]:
    """Return the tables of a part that have anything to show, details last.

    Args:
        part: Of a summary.
    """
    found = [
        *([scores_of_rules(part)] if part.verified else []),
        correlations(part),
        correlations(part, "beyond_size"),
        _noise(part),
        *(layers_of_task(part, task) for task in part.tasks),
        *(choices_on_task(part, task) for task in part.tasks),
        *(_subsets(part, task) for task in part.tasks),
    ]
    return [grid for grid in found if grid.rows]


def layers_of_task(part: Part, task: str) -> Grid:
    """Return the layers of a task, the one that explains most first.

    Args:
        part: Of a summary.
        task: Which.
    """
    own = part.rows("layers", task=task)
    # The head is no choice, so it has no place among them.
    ranked = sorted(own, key=lambda r: (r["layer"] == HEAD, -(r["drop"]["mean"] or 0)))
    rows = [
        [
            row["layer"],
            number(row["parameters"], Form(".0f")),
            write(row["drop"], PERCENT._replace(error="deviation")),
            write(row["trace_share"], PERCENT._replace(error="deviation")),
            write(row["largest_eigenvalue"], Form(".3g", 1, "deviation")),
            write(row["alignment"], Form(".3f", 1, "deviation")),
            write(row["gradient_norm"], Form(".3g", 1, "deviation")),
        ]
        for row in ranked
    ]
    return Grid(
        f"layers-{task}",
        f"Layers, ranked: {task}",
        "Of each layer alone, before training. Drop: by how much tuning it lowers "
        "r'(K + s I)⁻¹r beside the head alone, in percent. Trace: its share of the "
        "trace of all kernels. Largest eigenvalue, alignment with r and gradient norm "
        "are of its own kernel. Mean ± standard deviation over splits. The head is "
        "tuned with any of them.",
        ["layer", "parameters", "drop", "trace", "eigenvalue", "alignment", "gradient"],
        rows,
        folded=len(part.tasks) > 1,
    )


def choices_on_task(part: Part, task: str) -> Grid:
    """Return what each rule chose on a task.

    Args:
        part: Of a summary.
        task: Which.
    """
    rows = []
    for row in part.rows("rules", task=task):
        rows.append(
            [
                row["rule"],
                _listed(row["chosen"]),
                number(row["parameters"]["mean"], Form(".0f")),
                write(row["explained"], PERCENT._replace(error="deviation")),
                *([write(row["score"], SCORE)] if part.verified else []),
            ]
        )
    for row in part.rows("references", task=task) if part.verified else ():
        shares = write(row["explained"], PERCENT._replace(error="deviation"))
        rows.append([row["name"], DASH, DASH, shares, write(row["score"], SCORE)])
    columns = ["rule", "layers", "parameters", "drop"]
    return Grid(
        f"choices-{task}",
        f"What each rule chose: {task}",
        "Layers that each rule chose at the same budget, and on how many splits where "
        "not on all; drop of r'(K + s I)⁻¹r by all of them, in percent, mean ± "
        "standard deviation over splits.",
        [*columns, *(["score"] if part.verified else [])],
        rows,
        folded=len(part.tasks) > 1,
    )


def scores_of_rules(part: Part) -> Grid:
    """Return what the choices of each rule reached, and what the target-aware gained.

    Args:
        part: Of a summary.
    """
    differences = {row["rule"]: row for row in part.rows("differences")}
    rows = []
    for rule in dict.fromkeys(row["rule"] for row in part.rows("rules")):
        own = {row["task"]: row["score"] for row in part.rows("rules", rule=rule)}
        cells = [write(own.get(task), SCORE) for task in part.tasks]
        rows.append([rule, *cells, write(differences.get(rule), MEAN_POINTS)])
    for name in dict.fromkeys(row["name"] for row in part.rows("references")):
        own = {row["task"]: row["score"] for row in part.rows("references", name=name)}
        rows.append([name, *(write(own.get(t), SCORE) for t in part.tasks), DASH])
    held = {row["task"]: row["spearman"] for row in part.rows("held")}
    rhos = [write(held.get(t), RHO._replace(error="deviation")) for t in part.tasks]
    return Grid(
        "scores",
        "What the chosen layers reached",
        "Test score of fine-tuning what each rule chose, in percent, mean ± standard "
        "deviation over splits. Points: of the target-aware choice above the rule's on "
        "the same splits, mean over tasks ± its standard error (of one task: over its "
        "splits). Last row: rank correlation on each split of the predicted drop with "
        "the score, among what was chosen within the budget.",
        ["rule", *part.tasks, "points"],
        rows,
        [["predicted order", *rhos, DASH]],
    )


def correlations(part: Part, kind: str = "plain") -> Grid:
    """Return how each predictor correlates with the score, by task.

    Args:
        part: Of a summary.
        kind: ``"plain"``, or ``"beyond_size"`` for the partial correlation.
    """
    beyond = kind != "plain"
    tasks = [row["task"] for row in part.rows("noise")]
    several = tasks[1:]
    rows = []
    for name, predictor in PREDICTORS.items():
        found = part.rows("correlations", predictor=name)
        if not found or (beyond and name == SIZE):
            continue
        by_task = {row["task"]: row for row in found}
        shown = [*tasks, *([None] if several else [])]
        expected = "more" if predictor.sign > 0 else "less"
        rows.append([name, expected, *(_interval(by_task[t][kind]) for t in shown)])
    columns = ["predictor", "better is", *tasks, *(["mean"] if several else [])]
    rest = (
        "means over splits; in brackets 95 % of a bootstrap over sets and splits. The "
        "mean is over tasks, and its interval holds for these tasks."
    )
    if beyond:
        return Grid(
            "beyond",
            "Which measure tells more than the number of parameters",
            "The same once the ranks of both are regressed on those of the number of "
            f"parameters (partial correlation): larger sets learn more; {rest}",
            columns,
            rows,
        )
    return Grid(
        "correlations",
        "Which measure tells the score",
        "Spearman's rank correlation, over sets of layers, of each measure before "
        f"training with the test score after it, {rest}",
        columns,
        rows,
    )


def _noise(part: Part) -> Grid:
    rows = [
        [
            row["task"],
            str(row["subsets"]),
            str(row["splits"]),
            number(row["least"], PERCENT),
            number(row["most"], PERCENT),
            "<0.001"
            if row["p"] is not None and row["p"] < 0.001
            else (number(row["p"], Form(".3f"))),
            number(row["concordance"], Form(".2f")),
            number(row["halves"], RHO),
            number(row["ceiling"], Form(".2f")),
        ]
        for row in part.rows("noise")
    ]
    return Grid(
        "noise",
        "Whether there is anything to tell",
        "The sets of layers that were tuned on every split, their least and most test "
        "score in percent, and whether they differ by more than noise: p of Friedman's "
        "test that all are alike, Kendall's W of the splits' rankings, the rank "
        "correlation of one half of the splits with the other, and the ceiling that "
        "follows for the correlation of any predictor.",
        ["task", "sets", "splits", "least", "most", "p", "W", "halves", "ceiling"],
        rows,
    )


def _subsets(part: Part, task: str) -> Grid:
    own = part.rows("subsets", task=task)
    own = sorted(own, key=lambda row: -(row["score"]["mean"] or 0))
    depth = sum(r["layer"] != HEAD for r in part.rows("layers", task=task))
    rows = [
        [
            ALL if len(row["layers"]) == depth > 1 else ", ".join(row["layers"]),
            write(row["score"], SCORE),
            *(number(value, Form(".3g")) for value in row["predictors"].values()),
        ]
        for row in own
    ]
    return Grid(
        f"subsets-{task}",
        f"Sets of layers: {task}",
        "Test score in percent, mean ± standard deviation over splits, and what was "
        "measured before training, mean over splits.",
        ["layers", "score", *PREDICTORS],
        rows,
        folded=True,
    )


def _listed(chosen: Sequence[Sequence[Sequence[str]]]) -> str:
    """Return the sets that were chosen on splits, the most frequent first."""
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
