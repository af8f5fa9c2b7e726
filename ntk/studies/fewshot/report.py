"""The report of a few-shot study, from its summary (`ntk.studies.fewshot.summary`).

The summary holds no times, so an interrupted and resumed study has the same report.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.reporting import (
    WIDTH,
    Column,
    Format,
    Page,
    Row,
    Section,
    across,
    narrow,
    parted,
    select,
    terminal_table,
    what_ran,
    write,
)
from ntk.studies.fewshot.slices import Slice, slices
from ntk.studies.fewshot.summary import FEW_ROWS, collect
from ntk.studies.fewshot.tables import (
    AT_END,
    kernel_scores,
    recoveries,
    report_tables,
    tuned_scores,
)
from ntk.studies.overview import metric_remarks, note_remarks, record_remark

__all__ = [
    "collect",
    "report_page",
    "tables",
]

Summary = Mapping[str, Any]

TWO_ERRORS = 2
SCORED = ": test score in %"
QUESTION = (
    "Do kernel classifiers score as well as fine-tuning, and does the kernel over a "
    "few rows score as well as the full one?"
)
CAPTIONS = {
    "scores": (
        "Scores by task",
        "Kernel classifiers (filled) and fine-tuning of the same parameters (open); "
        "the grey line is the model before training. Bars: one standard deviation "
        "over seeds.",
    ),
    "scatter": (
        "Kernel against fine-tuning",
        "Each point is a task: the score of fine-tuning a space's parameters and of "
        "the classifier on their kernel. Above the line the kernel scores higher.",
    ),
    "ratio": (
        "Ratio by task",
        "Mean score of each kernel divided by that of full fine-tuning; dashed: 90 %. "
        "Bars: one standard error over seeds.",
    ),
    "growth": (
        "Growth with the number of examples",
        "Relative Frobenius difference to the full kernel at the best scale, on "
        "random subsets of the training examples. Bars: standard error over tasks.",
    ),
    "change": (
        "Kernel change",
        "Distance between the full kernels of the training examples before and after "
        "fine-tuning. Dots: tasks; bar: median.",
    ),
}
WORDS = {
    "space": (
        "The parameters of a kernel: all (full), rows or columns of the weight "
        "matrices, LoRA matrices at initialisation, biases, the head. A head that was "
        "made for the task is part of every space."
    ),
    "kernel classifier": (
        "Ridge regression, logistic regression or support vector machine on the "
        "kernel of the training examples; its regularisation and the multiple of the "
        "model's own outputs that it starts from are chosen on the dev examples."
    ),
    "fine-tuning": (
        "Training of these parameters alone on the same training examples; learning "
        "rate and checkpoint are chosen on the same dev examples."
    ),
    "shots": "Number of training examples per label, and of dev examples per label.",
    "seed": "Draws the training and dev examples; all seeds share the test examples.",
    "f0": (
        "The outputs of the model before training, with a head fitted to the training "
        "examples if the checkpoint has none."
    ),
    "recovery": (
        "(kernel - f0) / (fine-tuning - f0), of mean scores: 0 is the model before "
        "training, 1 is fine-tuning."
    ),
    "ratio": (
        "Mean score of the kernel divided by that of fine-tuning, over seeds or tasks."
    ),
    "kappa": (
        "Cohen's kappa, agreement corrected for chance: 1 for equal predictions, 0 "
        "for independent ones."
    ),
    "Kendall": (
        "Rank correlation tau-b of the margins of the correct class: are the same "
        "examples easy for both?"
    ),
    "significant": (
        "A one-sided paired t-test over seeds rejects a ratio of at most 0.9 "
        "(p < 0.05)."
    ),
    "S": (
        "Kernel distance 1 - cosine of two kernels as vectors: 0 is the same kernel "
        "up to a factor."
    ),
}
PERCENT = Format(".1f", 100)
RATIO = Format(".2f", 1, "standard_error")
POINTS = Format("+.1f", 1, "standard_error")


def tables(summary: Summary) -> list[Table]:
    """Return recovery and the scores of kernels and of fine-tuning for a terminal.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Three tables for each number of shots and kind of kernel; wide ones are split.
    """
    return [
        terminal_table(f"{piece.title}, {part.title}{unit}", piece)
        for part in slices(summary)
        for table, unit in (
            (recoveries(part), ""),
            (kernel_scores(part), SCORED),
            (tuned_scores(part), SCORED),
        )
        if table.rows
        for piece in parted(narrow(table), WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return the report of a study.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    models = ", ".join(summary["models"]) or "no records"
    return Page(
        title=f"Kernels against fine-tuning: {models}",
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        sections=[
            Section(part.title, part.name, report_tables(part), _figures(part))
            for part in slices(summary)
        ],
        ran=[*what_ran(summary), *map(_task, summary["tasks"])],
        captions=CAPTIONS,
        words=WORDS,
    )


def _answers(summary: Summary) -> Iterator[str]:
    for part in slices(summary):
        for sentence in (
            _recovery(part),
            _ratio(part),
            _few_rows(part),
            _all_to_full("kernels", part.of_spaces("points_to_full")),
            _all_to_full("fine-tuning", part.of_methods("points_to_full")),
            _agreement(part),
            _controls(part),
            _change(part),
        ):
            if sentence:
                yield f"{part.title}: {sentence}"


def _recovery(part: Slice) -> str:
    """Return what of the gain of full fine-tuning the full kernel recovers."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["recovery"]["mean"] is None:
        return ""
    (row,) = rows
    recovery, start = (
        write(row["recovery"], RATIO),
        write(row["f0_ratio"], Format(".3f", 1, "standard_error")),
    )
    tasks = row["recovery"]["tasks"]
    return (
        f"the classifier on the full kernel recovers {recovery} of the gain of full "
        f"fine-tuning over the model before training (f0), which alone has {start} of "
        f"fine-tuning's score ({_ratio_over(tasks, row['recovery'])})."
    )


def _ratio(part: Slice) -> str:
    """Return the ratio of the full kernel to full fine-tuning."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["ratio"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["ratio"]["tasks"]
    ratio = write(row["ratio"], Format(".3f", 1, "standard_error"))
    text = (
        f"the classifier on the full kernel reaches {ratio} of the score of full "
        f"fine-tuning ({_ratio_over(tasks, row['ratio'])}), at least 90 % of it on "
        f"{row['reached']} of {len(tasks)}"
    )
    if row["tested"]:
        text += (
            f", significantly on {row['surely_reached']} (one-sided t-test over seeds, "
            "p < 0.05)"
        )
    return f"{text}."


def _few_rows(part: Slice) -> str:
    """Return the score of a few rows against that of the full kernel."""
    difference = _means(part.of_spaces("points_to_full"), [FEW_ROWS]).get(FEW_ROWS)
    if difference is None:
        return ""
    mean, error = difference["mean"], difference["standard_error"]
    side = "above" if mean > 0 else "below"
    text = f"the kernel over {FEW_ROWS} is {abs(mean):.1f}"
    if error is not None:
        within = abs(mean) <= TWO_ERRORS * error
        text += f" ± {error:.1f}"
    text += f" points {side} the full kernel ({_over(difference['tasks'], difference)}"
    if error is not None:
        text += f"; {'within' if within else 'beyond'} two standard errors"
    return f"{text})."


def _all_to_full(what: str, columns: Mapping[str, Column]) -> str:
    """Return the differences to full kernels or fine-tuning, on the same tasks."""
    means = _means(columns, [name for name in columns if name != "full"])
    if not means:
        return ""
    over = next(iter(means.values()))
    listed = ", ".join(f"{name} {write(row, POINTS)}" for name, row in means.items())
    return f"{what} in points above full ({_over(over['tasks'], over)}): {listed}."


def _agreement(part: Slice) -> str:
    """Return the agreement of the full kernel with full fine-tuning."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["agreement"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["agreement"]["tasks"]
    text = (
        "the full kernel and full fine-tuning predict the same class for "
        f"{write(row['agreement'], PERCENT)} % of the test examples (kappa "
        f"{write(row['kappa'], Format('.2f'))}, Kendall's tau of the margins "
        f"{write(row['kendall'], Format('.2f'))}; {_mean_over(tasks)})"
    )
    return f"{text}."


def _controls(part: Slice) -> str:
    """Return the scores of the controls, all on the same tasks."""
    kernels, tuned = part.of_spaces("test"), part.of_methods("test")
    columns = {
        "the model before training (f0)": part.f0,
        "ridge on the full kernel with shuffled labels": part.of_spaces("shuffled").get(
            "full", {}
        ),
        "the kernel over the head": kernels.get("head", {}),
        "the kernel over the biases": kernels.get("bias", {}),
        "fine-tuning the head": tuned.get("head", {}),
        "fine-tuning the biases": tuned.get("bitfit", {}),
    }
    means = _means(columns, list(columns))
    if not means:
        return ""
    over = next(iter(means.values()))
    listed = ", ".join(f"{name} {write(r, PERCENT)} %" for name, r in means.items())
    return f"controls ({_mean_over(over['tasks'])}): {listed}."


def _change(part: Slice) -> str:
    """Return how far fine-tuning moves the full kernel."""
    columns = part.of_methods("kernel_change", "distance")
    means = _means(columns, list(columns))
    if not means:
        return ""
    over = next(iter(means.values()))
    listed = ", ".join(f"{name} {write(r, Format('.2g'))}" for name, r in means.items())
    return (
        "fine-tuning moves the full kernel by a distance S = 1 - cosine "
        f"({_mean_over(over['tasks'])}): {listed}."
    )


def _remarks(summary: Summary) -> Iterator[str]:
    yield record_remark(summary, _missing(summary))
    if not summary["records"]["there"]:
        return
    sizes = [row["test"] for row in summary["tasks"]]
    few, many = min(sizes), max(sizes)
    counted = f"{few:,} to {many:,}" if few < many else f"{few:,}"
    seeds = ", ".join(map(str, summary["seeds"]))
    yield (
        f"Each task has {counted} test examples, the same for every split; sampling "
        f"them gives a score a standard error of up to {50 / math.sqrt(few):.1f} "
        f"points. The seeds {seeds} draw the training and dev examples; deviations are "
        "over these seeds."
    )
    if any(any(row["rates_at_end"]) for row in summary["tuned"]):
        yield _at_end(summary["tuned"])
    yield from metric_remarks({row["task"]: row["metric"] for row in summary["tasks"]})
    for row in summary["comparisons"]:
        if row["ratio"] is None and None not in (row["kernel"], row["tuned"]):
            yield (
                f"{row['task']}, {row['shots']} shots: fine-tuning {row['method']} has "
                f"a score of 0 or less, so the ratio of {row['space']} to it is "
                "undefined."
            )
    yield from note_remarks(summary, len(summary["splits"]))


def _at_end(tuned: Iterable[Row]) -> str:
    """Return on how many tasks a learning rate is at an end of those tried."""
    counts: dict[str, list[bool]] = {}
    for row in tuned:
        counts.setdefault(row["method"], []).append(any(row["rates_at_end"]))
    listed = ", ".join(
        f"{method} {sum(ends)} of {len(ends)}"
        for method, ends in counts.items()
        if any(ends)
    )
    return f"{AT_END} Tasks and shots where it is, by method: {listed}."


def _missing(summary: Summary) -> str:
    """Return the missing records, those of several splits together."""
    splits = len(summary["splits"])
    places: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for row in summary["missing"]:
        name = (row["kind"], row["subject"], tuple(row["seeds"]))
        places.setdefault(name, []).append(f"{row['task']} at {row['shots']} shots")
    texts = []
    for (kind, subject, seeds), where in places.items():
        listed = "all splits" if len(where) == splits else ", ".join(where)
        texts.append(f"{kind} {subject} (seeds {', '.join(map(str, seeds))}; {listed})")
    return "; ".join(texts)


def _means(columns: Mapping[str, Column], names: list[str]) -> dict[str, Row]:
    """Return means over the tasks for which all named columns have numbers."""
    known = {
        name: {t: row["mean"] for t, row in columns[name].items() if row}
        for name in names
        if name in columns
    }
    known = {
        name: {task: mean for task, mean in column.items() if mean is not None}
        for name, column in known.items()
    }
    known = {name: column for name, column in known.items() if column}
    if not known:
        return {}
    first, *others = known.values()
    tasks = [task for task in first if all(task in column for column in others)]
    if not tasks:
        return {}
    return {
        name: across([{"task": t, "mean": column[t]} for t in tasks], "mean")
        for name, column in known.items()
    }


def _over(tasks: list[str], row: Row) -> str:
    error = "" if row["standard_error"] is None else " and standard error"
    return f"mean{error} over {_count(tasks)}"


def _ratio_over(tasks: list[str], row: Row) -> str:
    error = "" if row["standard_error"] is None else ", standard error by the jackknife"
    return f"ratio of means over {_count(tasks)}{error}"


def _mean_over(tasks: list[str]) -> str:
    return f"mean over {_count(tasks)}"


def _count(tasks: list[str]) -> str:
    return f"{len(tasks)} tasks" if len(tasks) > 1 else f"the task {tasks[0]}"


def _figures(part: Slice) -> list[str]:
    """Return the names of the figures; the change does not depend on the kernel."""
    names = [f"{what}-{part.name}" for what in CAPTIONS if what != "change"]
    return [*names, f"change-{part.shots}"]


def _task(row: Row) -> tuple[str, str]:
    metric = row["metric"].replace("_", " ")
    return f"task {row['task']}", (
        f"{', '.join(row['labels'])}; {metric} on {row['test']:,} test examples; "
        f"outputs: {row['readout']}"
    )
