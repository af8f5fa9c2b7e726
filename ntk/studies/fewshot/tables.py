"""Tables of a few-shot study; scores in percent, their differences in points."""

from collections import Counter
from collections.abc import Callable, Iterable

from ntk.reporting import (
    DASH,
    KERNEL_OVER,
    POINTS,
    SCORE,
    Column,
    Format,
    ReportTable,
    Row,
    by_task,
    number,
    select,
    write,
)
from ntk.studies.fewshot.kernel_tables import (
    PERCENT,
    changes,
    classifiers,
    growth,
    measures,
)
from ntk.studies.fewshot.slices import Slice, ratios_of

RATIO = Format(".2f", 1, "standard_error")
DAGGER = "†"
AT_END = (
    f"{DAGGER}: on some splits the learning rate is the lowest or highest of those "
    "tried, so that a better one may lie beyond."
)


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
        "seeds, and the ratio of the mean score of the kernel over the same "
        "parameters to it."
    )
    if any(any(row["rates_at_end"]) for row in part.tuned):
        caption = f"{caption} {AT_END}"
    columns: dict[str, Column] = {}
    for method in part.methods:
        column = {
            row["task"]: {**row["test"], "mark": _mark(row["rates_at_end"])}
            for row in select(part.tuned, method=method)
        }
        same = {"method": method, "same_parameters": True}
        ratios = ratios_of(part.comparisons, **same)
        columns |= {method: column, f"{KERNEL_OVER}{method}": ratios}
    plain = RATIO._replace(error="")
    formats = {t: plain if t.startswith(KERNEL_OVER) else SCORE for t in columns}
    table = by_task(part.tasks, columns, formats, seeds=part.seeds)
    return ReportTable("tuned", "Fine-tuning", caption, *table)


def _ratios(part: Slice) -> list[ReportTable]:
    columns = {
        space: ratios_of(part.comparisons, space=space, method="full")
        for space in part.spaces
    }
    caption = (
        "Mean score of each kernel divided by that of full fine-tuning, ± standard "
        "error over the seeds of both; last row: ratio of the means over tasks. Errors "
        "are of the jackknife."
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
        "Means over tasks, ± standard error: ratio of the mean scores; number of tasks "
        "on which it is at least 0.9, and on which significantly so (one-sided t-test "
        "over seeds, p < 0.05); difference in points; share of test examples that both "
        "assign to the same class, and Cohen's kappa; Kendall's tau of the margins of "
        "the correct class."
    )
    return [ReportTable("rule", "The 90 % rule, and agreement", caption, columns, rows)]


def recoveries(part: Slice) -> ReportTable:
    """Return what of fine-tuning's gain over f0 each kernel recovers, over tasks.

    Args:
        part: A slice of the summary.
    """
    ratio = Format(".3f", 1, "standard_error")
    rows = [
        [
            f"{row['space']} / {row['method']}",
            str(len(row["recovery"]["tasks"])),
            write(row["recovery"], RATIO),
            write(row["f0_ratio"], ratio),
            write(row["ratio"], ratio),
        ]
        for row in part.pairs
        if row["recovery"]["mean"] is not None
    ]
    caption = (
        "Recovery: (kernel - f0) / (fine-tuning - f0), the share of fine-tuning's gain "
        "over the model before training that the kernel classifier has; beside it the "
        "ratio of f0 to fine-tuning, which takes no training of the body, and that of "
        "the kernel. All are ratios of mean scores over tasks, ± standard error by the "
        "jackknife over tasks."
    )
    columns = ["kernel / fine-tuning", "tasks", "recovery", "f0 / tuned"]
    columns += ["kernel / tuned"]
    return ReportTable("recovery", "Recovery of fine-tuning", caption, columns, rows)


def _reliability(part: Slice) -> list[ReportTable]:
    two = Format(".2f")
    rows = []
    for row in part.reliability:
        interval = " to ".join(number(row[end], two) for end in ("low", "high"))
        rows.append(
            [
                " ".join(row["methods"]),
                str(len(row["tasks"])),
                str(row["splits"]),
                number(row["method"], two),
                f"{number(row['task_method'], two)} ({interval})",
                number(row["p_value"], Format(".2g")),
                number(row["residual"], two),
                number(row["reliability"], two),
            ]
        )
    caption = (
        "Analysis of variance of the test scores of fine-tuning within task and split, "
        "as standard deviations in points: main effect of the method; of the method on "
        "a task (95 % interval, p of the F test that there is none: then no choice by "
        "task beats one choice for all); residual of one run. Reliability, 0 to 1, of "
        "the differences between methods on a task, averaged over its splits."
    )
    columns = ["methods", "tasks", "splits", "method", "task x method", "p"]
    columns += ["residual", "reliability"]
    title = "What of the differences between methods is noise"
    return [ReportTable("reliability", title, caption, columns, rows)]


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


def _agreements(part: Slice) -> list[ReportTable]:
    caption = (
        "On the seeds of both. Interval: paired bootstrap over test examples of the "
        "mean difference over seeds, in points."
    )
    columns = ["task", "kernel", "tuned", "points", "95 % interval", "agree %"]
    columns += ["kappa", "Kendall"]
    found = []
    for pair in part.pairs:
        space, method = pair["space"], pair["method"]
        if not pair["same_parameters"]:
            continue
        rows = [
            [
                row["task"],
                number(row["kernel"], PERCENT),
                number(row["tuned"], PERCENT),
                write(row["points"], POINTS),
                _between(row["interval"]),
                write(row["agreement"], PERCENT),
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
    counts: dict[str, Counter[float]] = {method: Counter() for method in part.methods}
    at_end: set[tuple[str, float]] = set()
    for row in part.tuned:
        rates = row["learning_rates"]
        counts[row["method"]].update(rates)
        ends = zip(rates, row["rates_at_end"], strict=True)
        at_end |= {(row["method"], rate) for rate, end in ends if end}
    rates = sorted({rate for count in counts.values() for rate in count})
    rows = [
        [
            method,
            *(
                f"{count[rate]}{_mark([(method, rate) in at_end])}"
                if rate in count
                else DASH
                for rate in rates
            ),
        ]
        for method, count in counts.items()
    ]
    caption = "Number of splits on which each learning rate is the best on dev."
    if at_end:
        caption = f"{caption} {AT_END}"
    columns = ["method", *(f"{rate:g}" for rate in rates)]
    return [ReportTable("rates", "Learning rates", caption, columns, rows, folded=True)]


_TABLES: tuple[Callable[[Slice], list[ReportTable]], ...] = (
    lambda part: [recoveries(part), kernel_scores(part), tuned_scores(part)],
    *(
        _ratios,
        _rule,
        _reliability,
        _differences,
        _controls,
        measures,
        growth,
        changes,
    ),
    *(classifiers, _agreements, _rates),
)


def _mark(ends: Iterable[object]) -> str:
    return DAGGER if any(ends) else ""


def _between(interval: Row | None) -> str:
    if interval is None:
        return DASH
    return " to ".join(number(interval[end], POINTS) for end in ("low", "high"))
