"""A study's summary -> its tables.

Scores are in percent, differences of them in points.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from ntk.record_values import DASH
from ntk.study_grids import (
    KERNEL_OVER,
    POINTS,
    SCORE,
    Column,
    Form,
    Grid,
    by_task,
    number,
    write,
)
from ntk.study_scores import CLASSIFIERS, Row, across
from ntk.study_summary import growth_by_sizes, select

PERCENT = Form(".1f", 100)
RATIO = Form(".2f", 1, "standard_error")
MEASURES = {
    "diff %": ("distance.frobenius", PERCENT),
    "best scale %": ("distance.frobenius_rescaled", PERCENT),
    "cosine": ("distance.cosine", Form(".3f")),
    "CKA": ("distance.cka", Form(".3f")),
    "overlap": ("distance.overlap", Form(".3f")),
    "trace ratio": ("distance.trace_ratio", Form(".3g")),
    "align.": ("alignment", Form(".3f")),
    "eff. dim.": ("spectrum.effective_dimension", Form(".1f")),
    "entropy rank": ("spectrum.entropy_rank", Form(".1f")),
}
CHANGES = {
    "S": ("distance", Form(".3g", 1, "standard_error")),
    "norm ratio": ("norm_ratio", Form(".3g", 1, "standard_error")),
    "rel. change": ("measures.frobenius", Form(".3g", 1, "standard_error")),
    "CKA": ("measures.cka", Form(".3f", 1, "standard_error")),
    "overlap": ("measures.overlap", Form(".3f", 1, "standard_error")),
    "align. before": ("alignment_before", Form(".3f", 1, "standard_error")),
    "align. after": ("alignment_after", Form(".3f", 1, "standard_error")),
}


class Part(NamedTuple):
    """The rows of a summary of one number of shots and one kind of kernel.

    Attributes:
        title: Which shots, and which kind where there are several.
        name: The same for links and files.
        shots: Training examples of each label.
        seeds: Number of the study's seeds.
        splits: With f0's scores.
        kernels: Of this kind.
        tuned: Of these shots.
        comparisons: Of both, by task.
        pairs: Of both, over tasks.
    """

    title: str
    name: str
    shots: int
    seeds: int
    splits: list[Row]
    kernels: list[Row]
    tuned: list[Row]
    comparisons: list[Row]
    pairs: list[Row]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [row["task"] for row in self.splits]

    @property
    def spaces(self) -> list[str]:
        """Of the kernels."""
        return list(dict.fromkeys(row["space"] for row in self.kernels))

    @property
    def methods(self) -> list[str]:
        """Of fine-tuning."""
        return list(dict.fromkeys(row["method"] for row in self.tuned))

    @property
    def f0(self) -> Column:
        """The model's own scores."""
        return {row["task"]: row["f0"] for row in self.splits}

    def of_spaces(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of the kernels by space and task."""
        return {s: _column(self.kernels, field, *path, space=s) for s in self.spaces}

    def of_methods(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of fine-tuning by method and task."""
        return {m: _column(self.tuned, field, *path, method=m) for m in self.methods}


def parts(summary: Mapping[str, Any]) -> list[Part]:
    """Part a summary by shots and kinds of kernel.

    Args:
        summary: As `study_summary.collect` returns it.

    Returns:
        A part for each pair, for each number of shots where there are no kernels.
    """
    several = len(summary["kinds"]) > 1
    found = []
    for shots in summary["shots"]:
        for kind in summary["kinds"] or [None]:
            where = {"shots": shots, "kind": kind}
            found.append(
                Part(
                    f"{shots} shots, {kind}" if several else f"{shots} shots",
                    f"{shots}-{kind}" if several else f"{shots}",
                    shots,
                    len(summary["seeds"]),
                    select(summary["splits"], shots=shots),
                    select(summary["kernels"], **where),
                    select(summary["tuned"], shots=shots),
                    select(summary["comparisons"], **where),
                    select(summary["over_tasks"]["comparisons"], **where),
                )
            )
    return found


def grids(part: Part) -> list[Grid]:
    """Return all tables of a part that it has numbers for.

    Args:
        part: Of a summary.
    """
    several = [grid for table in _TABLES for grid in table(part)]
    return [grid for grid in several if grid.rows]


def kernel_scores(part: Part) -> Grid:
    """Return the scores of kernels, by task and space.

    Args:
        part: Of a summary.
    """
    caption = (
        "Test score of the classifier on the kernel over each space, mean ± standard "
        "deviation over seeds; f0 is the model itself before any training."
    )
    columns = {"f0": part.f0, **part.of_spaces("test")} if part.kernels else {}
    table = by_task(part.tasks, columns, SCORE, seeds=part.seeds)
    return Grid("kernels", "Kernel classifiers", caption, *table)


def tuned_scores(part: Part) -> Grid:
    """Return the scores of fine-tuning, by task and method, with the kernels' ratio.

    Args:
        part: Of a summary.
    """
    caption = (
        "Test score of fine-tuning by each method, mean ± standard deviation over "
        "seeds, and the mean ratio of the kernel over the same parameters to it."
    )
    columns: dict[str, Column] = {}
    for method, column in part.of_methods("test").items():
        same = {"method": method, "same_parameters": True}
        ratios = _column(part.comparisons, "ratio", **same)
        columns |= {method: column, f"{KERNEL_OVER}{method}": ratios}
    plain = RATIO._replace(error="")
    forms = {t: plain if t.startswith(KERNEL_OVER) else SCORE for t in columns}
    table = by_task(part.tasks, columns, forms, seeds=part.seeds)
    return Grid("tuned", "Fine-tuning", caption, *table)


def _ratios(part: Part) -> list[Grid]:
    columns = {
        space: _column(part.comparisons, "ratio", space=space, method="full")
        for space in part.spaces
    }
    caption = (
        "Score of each kernel over that of full fine-tuning, mean ± standard error "
        "over the seeds that both have; below, mean ± standard error over tasks."
    )
    table = by_task(part.tasks, columns, RATIO, seeds=part.seeds, error_of_mean=True)
    return [Grid("ratios", "Ratio to full fine-tuning", caption, *table)]


def _rule(part: Part) -> list[Grid]:
    ratio = Form(".3f", 1, "standard_error")
    points = POINTS._replace(error="standard_error")
    rows = [
        [
            f"{row['space']} / {row['method']}",
            str(len(row["ratio"]["tasks"])),
            write(row["ratio"], ratio),
            f"{row['reached']} of {len(row['ratio']['tasks'])}",
            f"{row['surely_reached']} of {row['tested']}",
            write(row["points"], points),
            write(row["agreement"], PERCENT),
            write(row["kappa"], Form(".2f")),
            write(row["kendall"], Form(".2f")),
        ]
        for row in part.pairs
    ]
    columns = ["kernel / fine-tuning", "tasks", "ratio", "reach 90 %", "surely"]
    columns += ["points", "agree %", "kappa", "Kendall"]
    caption = (
        "Means over tasks, ± standard error: the ratio of the scores; on how many "
        "tasks it is at least 0.9, and on how many surely (one-sided t-test over "
        "seeds, p < 0.05); the difference in points; the share of test examples that "
        "both assign to the same class, and Cohen's kappa of that; Kendall's tau of "
        "the margins of the correct class."
    )
    return [Grid("rule", "The 90 % rule, and agreement", caption, columns, rows)]


def _differences(part: Part) -> list[Grid]:
    end = (
        "mean ± standard deviation over seeds; below, mean ± standard error over tasks."
    )
    kernels, tuned = (
        by_task(
            part.tasks,
            {name: column for name, column in columns.items() if name != "full"},
            POINTS,
            seeds=part.seeds,
            error_of_mean=True,
        )
        for columns in (
            part.of_spaces("points_to_full"),
            part.of_methods("points_to_full"),
        )
    )
    caption = f"Points of each kernel above the full one on the same seeds, {end}"
    other = f"Points of each method above full fine-tuning on the same seeds, {end}"
    return [
        Grid("kernels-to-full", "Against the full kernel", caption, *kernels),
        Grid("tuned-to-full", "Against full fine-tuning", other, *tuned),
    ]


def _controls(part: Part) -> list[Grid]:
    kernels, tuned = part.of_spaces("test"), part.of_methods("test")
    columns = {
        "f0": part.f0,
        "shuffled labels": part.of_spaces("shuffled").get("full", {}),
        "kernel head": kernels.get("head", {}),
        "tuned head": tuned.get("head", {}),
        "kernel bias": kernels.get("bias", {}),
        "tuned bitfit": tuned.get("bitfit", {}),
        "kernel full": kernels.get("full", {}),
        "tuned full": tuned.get("full", {}),
    }
    caption = (
        "What needs no training (f0), what ridge on the full kernel reaches with "
        "shuffled training labels, and what the head or the biases alone do, beside "
        "all parameters; mean ± standard deviation over seeds."
    )
    table = by_task(part.tasks, columns, SCORE, seeds=part.seeds)
    return [Grid("controls", "Controls", caption, *table)]


def _measures(part: Part) -> list[Grid]:
    rows = []
    for space in part.spaces:
        own = [row for row in part.kernels if row["space"] == space]
        cells = [
            write(across(own, "measures", name, "mean"), form)
            for name, form in MEASURES.values()
        ]
        if any(cell != DASH for cell in cells):
            share = across(own, "share")
            rows.append([space, str(len(own)), write(share, Form(".3g", 100)), *cells])
    caption = (
        "Means over tasks and seeds, on the training examples: the share of the "
        "parameters; how far the kernel is from the full one (relative Frobenius "
        "difference as it is and at the best scale, cosine, unbiased CKA, overlap of "
        "the leading eigenvectors, ratio of the traces); alignment with the labels; "
        "effective dimension and entropy rank."
    )
    columns = ["space", "tasks", "share %", *MEASURES]
    title = "What the kernels are like"
    found = [Grid("measures", title, caption, columns, rows)]
    name = MEASURES["best scale %"][0]
    distances = part.of_spaces("measures", name)
    table = by_task(
        part.tasks,
        {space: column for space, column in distances.items() if space != "full"},
        SCORE,
        seeds=part.seeds,
    )
    caption = (
        "Relative Frobenius difference to the full kernel at the best scale, in "
        "percent, mean ± standard deviation over seeds."
    )
    title = "Distance to the full kernel by task"
    return [*found, Grid("distances", title, caption, *table, folded=True)]


def _growth(part: Part) -> list[Grid]:
    caption = (
        "Relative Frobenius difference to the full kernel at the best scale, in "
        "percent, on random subsets of n training examples; means over tasks and "
        "seeds."
    )
    found = []
    for sizes, spaces in growth_by_sizes(part.kernels).items():
        rows = [
            [
                space,
                str(len(points[sizes[-1]])),
                *(number(fmean(points[size].values()), PERCENT) for size in sizes),
            ]
            for space, points in spaces.items()
        ]
        columns = ["space", "tasks", *(f"n = {size}" for size in sizes)]
        title = f"Growth with the examples, {sizes[0]} to {sizes[-1]}"
        name = f"growth-{sizes[0]}-{sizes[-1]}"
        found.append(Grid(name, title, caption, columns, rows))
    return found


def _changes(part: Part) -> list[Grid]:
    rows = []
    for method in part.methods:
        own = [row for row in part.tuned if row["method"] == method]
        cells = [
            write(across(own, "kernel_change", name, "mean"), form)
            for name, form in CHANGES.values()
        ]
        if any(cell != DASH for cell in cells):
            rows.append([method, str(len(own)), *cells])
    caption = (
        "The full kernel of the training examples before and after fine-tuning, mean ± "
        "standard error over tasks: kernel distance S = 1 - cosine; ratio of the "
        "Frobenius norms; relative Frobenius difference; unbiased CKA; overlap of the "
        "leading eigenvectors; alignment with the labels that were trained on."
    )
    columns = ["method", "tasks", *CHANGES]
    title = "How fine-tuning changes the kernel"
    found = [Grid("change", title, caption, columns, rows)]
    table = by_task(
        part.tasks,
        part.of_methods("kernel_change", "distance"),
        Form(".2g", 1, "deviation"),
        seeds=part.seeds,
    )
    caption = "Kernel distance S, mean ± standard deviation over seeds."
    title = "Kernel change by task"
    return [*found, Grid("change-by-task", title, caption, *table, folded=True)]


def _classifiers(part: Part) -> list[Grid]:
    names = [n for n in CLASSIFIERS if any(n in r["classifiers"] for r in part.kernels)]
    rows = []
    for space in part.spaces:
        own = [row for row in part.kernels if row["space"] == space]
        scores = [
            across(
                [r for r in own if name in r["classifiers"]],
                *("classifiers", name, "test", "mean"),
            )
            for name in names
        ]
        chosen = [
            (name, row["classifiers"][name]["offset_scale"][i])
            for row in own
            for i, name in enumerate(row["chosen"])
        ]
        counts = Counter(name for name, _ in chosen)
        offset = sum(bool(scale) for _, scale in chosen)
        rows.append(
            [
                space,
                *(write(score, PERCENT) for score in scores),
                write(across(own, "test", "mean"), PERCENT),
                *(str(counts[name]) for name in names),
                str(offset),
                str(len(chosen)),
            ]
        )
    caption = (
        "Test score of each classifier and of the one that is best on dev, means over "
        "tasks and seeds; in how many splits each was the best, and in how many the "
        "best one starts from a multiple of the model's own outputs f0."
    )
    columns = ["space", *names, "best on dev", *(f"{name} best" for name in names)]
    columns += ["from f0", "splits"]
    return [Grid("classifiers", "Which classifier", caption, columns, rows)]


def _agreements(part: Part) -> list[Grid]:
    caption = (
        "On the seeds that both have. The interval is a paired bootstrap over the test "
        "examples, of the mean difference over seeds in points; seeds agree: how often "
        "two seeds of this fine-tuning predict the same class."
    )
    columns = ["task", "kernel", "tuned", "points", "95 % interval", "agree %"]
    columns += ["seeds agree %", "kappa", "Kendall"]
    found = []
    for pair in part.pairs:
        space, method = pair["space"], pair["method"]
        if not pair["same_parameters"]:
            continue
        seeds = {
            row["task"]: row["agreement_of_seeds"]
            for row in select(part.tuned, method=method)
        }
        rows = [
            [
                row["task"],
                number(row["kernel"], PERCENT),
                number(row["tuned"], PERCENT),
                write(row["points"], POINTS),
                _between(row["interval"]),
                write(row["agreement"], PERCENT),
                number(seeds[row["task"]], PERCENT),
                write(row["kappa"], Form(".2f")),
                write(row["kendall"], Form(".2f")),
            ]
            for row in select(part.comparisons, space=space, method=method)
        ]
        name = "agreement-" + "".join(c if c.isalnum() else "-" for c in space)
        title = f"Example by example: kernel {space}, fine-tuning {method}"
        found.append(Grid(name, title, caption, columns, rows, folded=True))
    return found


def _rates(part: Part) -> list[Grid]:
    counts = {
        method: Counter(
            rate
            for row in select(part.tuned, method=method)
            for rate in row["learning_rates"]
        )
        for method in part.methods
    }
    rates = sorted({rate for count in counts.values() for rate in count})
    rows = [
        [method, *(str(count[rate]) if rate in count else DASH for rate in rates)]
        for method, count in counts.items()
    ]
    caption = "In how many splits each learning rate was the best on dev."
    columns = ["method", *(f"{rate:g}" for rate in rates)]
    return [Grid("rates", "Learning rates", caption, columns, rows, folded=True)]


_TABLES: tuple[Callable[[Part], list[Grid]], ...] = (
    lambda part: [kernel_scores(part), tuned_scores(part)],
    *(_ratios, _rule, _differences, _controls, _measures, _growth, _changes),
    *(_classifiers, _agreements, _rates),
)


def _column(rows: Iterable[Row], field: str, *path: str, **where: object) -> Column:
    """Return a field of some rows by task, or what lies at a path in it."""
    found: dict[str, Row | None] = {}
    for row in select(rows, **where):
        value = row[field]
        for key in path:
            value = value[key]
        found[row["task"]] = value
    return found


def _between(interval: Row | None) -> str:
    if interval is None:
        return DASH
    return " to ".join(number(interval[end], POINTS) for end in ("low", "high"))
