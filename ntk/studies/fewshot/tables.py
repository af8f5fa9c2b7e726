"""Tables of a few-shot study; scores in percent, their differences in points."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from ntk.reporting import (
    CLASSIFIERS,
    DASH,
    KERNEL_OVER,
    POINTS,
    SCORE,
    Column,
    Format,
    ReportTable,
    Row,
    across,
    by_task,
    number,
    select,
    write,
)
from ntk.studies.fewshot.summary import growth_by_sizes

PERCENT = Format(".1f", 100)
RATIO = Format(".2f", 1, "standard_error")
MEASURES = {
    "diff %": ("distance.frobenius", PERCENT),
    "best scale %": ("distance.frobenius_rescaled", PERCENT),
    "cosine": ("distance.cosine", Format(".3f")),
    "CKA": ("distance.cka", Format(".3f")),
    "overlap": ("distance.overlap", Format(".3f")),
    "trace ratio": ("distance.trace_ratio", Format(".3g")),
    "align.": ("alignment", Format(".3f")),
    "eff. dim.": ("spectrum.effective_dimension", Format(".1f")),
    "entropy rank": ("spectrum.entropy_rank", Format(".1f")),
}
CHANGES = {
    "S": ("distance", Format(".3g", 1, "standard_error")),
    "norm ratio": ("norm_ratio", Format(".3g", 1, "standard_error")),
    "rel. change": ("measures.frobenius", Format(".3g", 1, "standard_error")),
    "CKA": ("measures.cka", Format(".3f", 1, "standard_error")),
    "overlap": ("measures.overlap", Format(".3f", 1, "standard_error")),
    "align. before": ("alignment_before", Format(".3f", 1, "standard_error")),
    "align. after": ("alignment_after", Format(".3f", 1, "standard_error")),
}


class Slice(NamedTuple):
    """The rows of a summary with one number of shots and one kind of kernel.

    Attributes:
        title: Shots, and the kind if there are several.
        name: Name in links and file names.
        shots: Number of training examples per label.
        seeds: Number of seeds of the study.
        splits: Rows of splits, with the scores of f0.
        kernels: Rows of kernels.
        tuned: Rows of fine-tuning.
        comparisons: Rows of kernels against fine-tuning, by task.
        pairs: Means of these over tasks.
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
        """Names of the kernels' spaces."""
        return list(dict.fromkeys(row["space"] for row in self.kernels))

    @property
    def methods(self) -> list[str]:
        """Names of the fine-tuning methods."""
        return list(dict.fromkeys(row["method"] for row in self.tuned))

    @property
    def f0(self) -> Column:
        """Scores of the model before training, by task."""
        return {row["task"]: row["f0"] for row in self.splits}

    def of_spaces(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of the kernels by space and task."""
        return {s: _column(self.kernels, field, *path, space=s) for s in self.spaces}

    def of_methods(self, field: str, *path: str) -> dict[str, Column]:
        """Return a field of fine-tuning by method and task."""
        return {m: _column(self.tuned, field, *path, method=m) for m in self.methods}


def slices(summary: Mapping[str, Any]) -> list[Slice]:
    """Return the slices of a summary by shots and kind of kernel.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    several = len(summary["kinds"]) > 1
    found = []
    for shots in summary["shots"]:
        for kind in summary["kinds"] or [None]:
            where = {"shots": shots, "kind": kind}
            found.append(
                Slice(
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


def report_tables(part: Slice) -> list[ReportTable]:
    """Return all tables that have rows.

    Args:
        part: A slice of the summary.
    """
    return [table for make in _TABLES for table in make(part) if table.rows]


def kernel_scores(part: Slice) -> ReportTable:
    """Return the scores of kernels, by task and space.

    Args:
        part: A slice of the summary.
    """
    caption = (
        "Test score of the classifier on the kernel over each space, mean ± standard "
        "deviation over seeds; f0 is the model before training."
    )
    columns = {"f0": part.f0, **part.of_spaces("test")} if part.kernels else {}
    table = by_task(part.tasks, columns, SCORE, seeds=part.seeds)
    return ReportTable("kernels", "Kernel classifiers", caption, *table)


def tuned_scores(part: Slice) -> ReportTable:
    """Return the scores of fine-tuning and the ratios of kernels to them.

    Args:
        part: A slice of the summary.
    """
    caption = (
        "Test score of fine-tuning by each method, mean ± standard deviation over "
        "seeds, and the mean ratio of the score of the kernel over the same "
        "parameters to it."
    )
    columns: dict[str, Column] = {}
    for method, column in part.of_methods("test").items():
        same = {"method": method, "same_parameters": True}
        ratios = _column(part.comparisons, "ratio", **same)
        columns |= {method: column, f"{KERNEL_OVER}{method}": ratios}
    plain = RATIO._replace(error="")
    formats = {t: plain if t.startswith(KERNEL_OVER) else SCORE for t in columns}
    table = by_task(part.tasks, columns, formats, seeds=part.seeds)
    return ReportTable("tuned", "Fine-tuning", caption, *table)


def _ratios(part: Slice) -> list[ReportTable]:
    columns = {
        space: _column(part.comparisons, "ratio", space=space, method="full")
        for space in part.spaces
    }
    caption = (
        "Score of each kernel divided by that of full fine-tuning, mean ± standard "
        "error over the seeds of both; last row: mean ± standard error over tasks."
    )
    table = by_task(part.tasks, columns, RATIO, seeds=part.seeds, error_of_mean=True)
    return [ReportTable("ratios", "Ratio to full fine-tuning", caption, *table)]


def _rule(part: Slice) -> list[ReportTable]:
    ratio = Format(".3f", 1, "standard_error")
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
            write(row["kappa"], Format(".2f")),
            write(row["kendall"], Format(".2f")),
        ]
        for row in part.pairs
    ]
    columns = ["kernel / fine-tuning", "tasks", "ratio", "reach 90 %", "significant"]
    columns += ["points", "agree %", "kappa", "Kendall"]
    caption = (
        "Means over tasks, ± standard error: ratio of the scores; number of tasks on "
        "which it is at least 0.9, and on which significantly so (one-sided t-test "
        "over seeds, p < 0.05); difference in points; share of test examples that both "
        "assign to the same class, and Cohen's kappa; Kendall's tau of the margins of "
        "the correct class."
    )
    return [ReportTable("rule", "The 90 % rule, and agreement", caption, columns, rows)]


def _differences(part: Slice) -> list[ReportTable]:
    end = (
        "mean ± standard deviation over seeds; last row: mean ± standard error over "
        "tasks."
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
        ReportTable("kernels-to-full", "Against the full kernel", caption, *kernels),
        ReportTable("tuned-to-full", "Against full fine-tuning", other, *tuned),
    ]


def _controls(part: Slice) -> list[ReportTable]:
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
        "Test scores of the model before training (f0), of ridge regression on the "
        "full kernel with shuffled training labels, and of the head or the biases "
        "alone beside all parameters; mean ± standard deviation over seeds."
    )
    table = by_task(part.tasks, columns, SCORE, seeds=part.seeds)
    return [ReportTable("controls", "Controls", caption, *table)]


def _measures(part: Slice) -> list[ReportTable]:
    rows = []
    for space in part.spaces:
        of_tasks = select(part.kernels, space=space)
        cells = [
            write(across(of_tasks, "measures", name, "mean"), fmt)
            for name, fmt in MEASURES.values()
        ]
        if any(cell != DASH for cell in cells):
            share = across(of_tasks, "share")
            rows.append(
                [space, str(len(of_tasks)), write(share, Format(".3g", 100)), *cells]
            )
    caption = (
        "Means over tasks and seeds, on the training examples: share of the "
        "parameters; comparison with the full kernel (relative Frobenius difference "
        "without and with the best scale, cosine, unbiased CKA, overlap of the leading "
        "eigenvectors, ratio of the traces); alignment with the labels; effective "
        "dimension and entropy rank."
    )
    columns = ["space", "tasks", "share %", *MEASURES]
    title = "Measures of the kernels"
    found = [ReportTable("measures", title, caption, columns, rows)]
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
    return [*found, ReportTable("distances", title, caption, *table, folded=True)]


def _growth(part: Slice) -> list[ReportTable]:
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
        title = f"Growth with the number of examples, {sizes[0]} to {sizes[-1]}"
        name = f"growth-{sizes[0]}-{sizes[-1]}"
        found.append(ReportTable(name, title, caption, columns, rows))
    return found


def _changes(part: Slice) -> list[ReportTable]:
    rows = []
    for method in part.methods:
        of_tasks = select(part.tuned, method=method)
        cells = [
            write(across(of_tasks, "kernel_change", name, "mean"), fmt)
            for name, fmt in CHANGES.values()
        ]
        if any(cell != DASH for cell in cells):
            rows.append([method, str(len(of_tasks)), *cells])
    caption = (
        "The full kernel of the training examples before and after fine-tuning, mean ± "
        "standard error over tasks: kernel distance S = 1 - cosine; ratio of the "
        "Frobenius norms; relative Frobenius difference; unbiased CKA; overlap of the "
        "leading eigenvectors; alignment with the labels that were trained on."
    )
    columns = ["method", "tasks", *CHANGES]
    title = "How fine-tuning changes the kernel"
    found = [ReportTable("change", title, caption, columns, rows)]
    table = by_task(
        part.tasks,
        part.of_methods("kernel_change", "distance"),
        Format(".2g", 1, "deviation"),
        seeds=part.seeds,
    )
    caption = "Kernel distance S, mean ± standard deviation over seeds."
    title = "Kernel change by task"
    return [*found, ReportTable("change-by-task", title, caption, *table, folded=True)]


def _classifiers(part: Slice) -> list[ReportTable]:
    names = [n for n in CLASSIFIERS if any(n in r["classifiers"] for r in part.kernels)]
    rows = []
    for space in part.spaces:
        of_tasks = select(part.kernels, space=space)
        scores = [
            across(
                [r for r in of_tasks if name in r["classifiers"]],
                *("classifiers", name, "test", "mean"),
            )
            for name in names
        ]
        chosen = [
            (name, row["classifiers"][name]["offset_scale"][i])
            for row in of_tasks
            for i, name in enumerate(row["chosen"])
        ]
        counts = Counter(name for name, _ in chosen)
        offset = sum(bool(scale) for _, scale in chosen)
        rows.append(
            [
                space,
                *(write(score, PERCENT) for score in scores),
                write(across(of_tasks, "test", "mean"), PERCENT),
                *(str(counts[name]) for name in names),
                str(offset),
                str(len(chosen)),
            ]
        )
    caption = (
        "Test score of each classifier and of the best one on dev, means over tasks "
        "and seeds; number of splits on which each is the best on dev, and on which "
        "the best starts from a multiple of the model's own outputs f0."
    )
    columns = ["space", *names, "best on dev", *(f"{name} best" for name in names)]
    columns += ["from f0", "splits"]
    return [ReportTable("classifiers", "Which classifier", caption, columns, rows)]


def _agreements(part: Slice) -> list[ReportTable]:
    caption = (
        "On the seeds of both. Interval: paired bootstrap over test examples of the "
        "mean difference over seeds, in points. Seeds agree: how often two seeds of "
        "this fine-tuning predict the same class."
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
                write(row["kappa"], Format(".2f")),
                write(row["kendall"], Format(".2f")),
            ]
            for row in select(part.comparisons, space=space, method=method)
        ]
        name = "agreement-" + "".join(c if c.isalnum() else "-" for c in space)
        title = f"Example by example: kernel {space}, fine-tuning {method}"
        found.append(ReportTable(name, title, caption, columns, rows, folded=True))
    return found


def _rates(part: Slice) -> list[ReportTable]:
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
    caption = "Number of splits on which each learning rate is the best on dev."
    columns = ["method", *(f"{rate:g}" for rate in rates)]
    return [ReportTable("rates", "Learning rates", caption, columns, rows, folded=True)]


_TABLES: tuple[Callable[[Slice], list[ReportTable]], ...] = (
    lambda part: [kernel_scores(part), tuned_scores(part)],
    *(_ratios, _rule, _differences, _controls, _measures, _growth, _changes),
    *(_classifiers, _agreements, _rates),
)


def _column(rows: Iterable[Row], field: str, *path: str, **where: object) -> Column:
    """Return a field of the selected rows, or a value nested in it, by task."""
    column: dict[str, Row | None] = {}
    for row in select(rows, **where):
        value = row[field]
        for key in path:
            value = value[key]
        column[row["task"]] = value
    return column


def _between(interval: Row | None) -> str:
    if interval is None:
        return DASH
    return " to ".join(number(interval[end], POINTS) for end in ("low", "high"))
