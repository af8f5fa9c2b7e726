"""A study's records -> tables for the terminal, sentences, JSON, Markdown, HTML.

Everything is said by the summary (`study_summary`), which holds no times: a study that
was stopped and taken up again has the same report.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ntk.study_grids import Column, Form, narrow, parted, write
from ntk.study_pages import WIDTH, Page, Section, terminal_table, what_ran
from ntk.study_scores import Row, across
from ntk.study_summary import FEW_ROWS, collect, select
from ntk.study_tables import Part, grids, kernel_scores, parts, tuned_scores

__all__ = [
    "collect",
    "report_page",
    "tables",
]

Summary = Mapping[str, Any]

TWO_ERRORS = 2
QUESTION = (
    "Do classifiers on kernels reach what fine-tuning reaches, and does the kernel "
    "over a few rows do as well as the full one?"
)
CAPTIONS = {
    "scores": (
        "Scores by task",
        "Kernel classifiers (filled) and fine-tuning of the same parameters (open); "
        "the grey line is the model itself before any training. Bars: one standard "
        "deviation over seeds.",
    ),
    "scatter": (
        "Kernel against fine-tuning",
        "Each point is a task: fine-tuning of a space's parameters, and the "
        "classifier on the kernel over them. Above the line the kernel does better.",
    ),
    "ratio": (
        "Ratio by task",
        "Score of each kernel over that of full fine-tuning. At the dashed line a "
        "kernel reaches 90 % of it. Bars: one standard error over seeds.",
    ),
    "growth": (
        "Growth with the examples",
        "Relative Frobenius difference to the full kernel at the best scale, on "
        "random subsets of the training examples. Bars: standard error over tasks.",
    ),
    "change": (
        "Kernel change",
        "How far fine-tuning moves the full kernel of the training examples: each "
        "dot is a task, the bar their median.",
    ),
}
WORDS = {
    "space": (
        "The parameters that a kernel is over: all (full), rows or columns of the "
        "weight matrices, LoRA matrices at initialisation, biases, the head. A head "
        "that was made for the task belongs to each."
    ),
    "kernel classifier": (
        "Ridge regression, logistic regression or support vector machine on the "
        "kernel of the training examples; its regularisation and how much of the "
        "model's own outputs it starts from are chosen on the dev examples."
    ),
    "fine-tuning": (
        "Of just these parameters on the same training examples; learning rate and "
        "checkpoint are chosen on the same dev examples."
    ),
    "shots": ("Training examples of each label, and as many dev examples."),
    "seed": (
        "Draws the training and dev examples; the test examples are the same for all."
    ),
    "f0": (
        "The outputs of the model before any training, with a head fitted to the "
        "training examples if it had none."
    ),
    "ratio": (
        "Score of the kernel over that of fine-tuning, seed by seed, then averaged."
    ),
    "kappa": (
        "Agreement beyond what the frequencies of the predicted classes make likely: "
        "1 is equal predictions, 0 independent ones."
    ),
    "Kendall": (
        "Rank correlation tau-b of the margins of the correct class: do both find "
        "the same examples easy?"
    ),
    "surely": (
        "The one-sided t-test over seeds that the true mean ratio is at most 0.9 has "
        "p below 0.05."
    ),
    "S": (
        "Kernel distance 1 - cosine of two kernels as vectors: 0 is the same kernel "
        "up to a factor."
    ),
}
PERCENT = Form(".1f", 100)
POINTS = Form("+.1f", 1, "standard_error")


def tables(summary: Summary) -> list[Table]:
    """Return the scores of kernels and of fine-tuning for a terminal of 110 columns.

    Args:
        summary: As `study_summary.collect` returns it.

    Returns:
        Two tables for each number of shots and kind of kernel, or more where one would
        be too wide.
    """
    return [
        terminal_table(f"{piece.title}, {part.title}: test score in %", piece)
        for part in parts(summary)
        for grid in (kernel_scores(part), tuned_scores(part))
        if grid.rows
        for piece in parted(narrow(grid), WIDTH)
    ]


def report_page(summary: Summary) -> Page:
    """Return what the report says.

    Args:
        summary: As `study_summary.collect` returns it.
    """
    models = ", ".join(summary["models"]) or "no records"
    return Page(
        title=f"Kernels against fine-tuning: {models}",
        question=QUESTION,
        answers=list(_answers(summary)),
        remarks=list(_remarks(summary)),
        sections=[
            Section(part.title, part.name, grids(part), _figures(part))
            for part in parts(summary)
        ],
        ran=[*what_ran(summary), *map(_task, summary["tasks"])],
        captions=CAPTIONS,
        words=WORDS,
    )


def _answers(summary: Summary) -> Iterator[str]:
    for part in parts(summary):
        for sentence in (
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


def _ratio(part: Part) -> str:
    """Return how the full kernel does against full fine-tuning."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["ratio"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["ratio"]["tasks"]
    text = (
        f"the classifier on the full kernel reaches "
        f"{write(row['ratio'], Form('.3f', 1, 'standard_error'))} of the score of full "
        f"fine-tuning ({_over(tasks, row['ratio'])}), at least 90 % of it on "
        f"{row['reached']} of {len(tasks)}"
    )
    if row["tested"]:
        text += (
            f", on {row['surely_reached']} surely (one-sided t-test over seeds, p < "
            "0.05)"
        )
    return f"{text}."


def _few_rows(part: Part) -> str:
    """Return what a few rows lose against the full kernel."""
    found = _means(part.of_spaces("points_to_full"), [FEW_ROWS]).get(FEW_ROWS)
    if found is None:
        return ""
    mean, error = found["mean"], found["standard_error"]
    side = "above" if mean > 0 else "below"
    text = f"the kernel over {FEW_ROWS} is {abs(mean):.1f}"
    if error is not None:
        within = abs(mean) <= TWO_ERRORS * error
        text += f" ± {error:.1f}"
    text += f" points {side} the full kernel ({_over(found['tasks'], found)}"
    if error is not None:
        text += f"; {'within' if within else 'beyond'} two standard errors"
    return f"{text})."


def _all_to_full(what: str, columns: Mapping[str, Column]) -> str:
    """Return the points of everything above what is full, on the same tasks."""
    names = [name for name in columns if name != "full"]
    found = _means(columns, names)
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(found[name], POINTS)}" for name in found)
    return f"{what} in points above full ({_over(over['tasks'], over)}): {listed}."


def _agreement(part: Part) -> str:
    """Return how alike the full kernel and full fine-tuning predict."""
    rows = select(part.pairs, space="full", method="full")
    if not rows or rows[0]["agreement"]["mean"] is None:
        return ""
    (row,) = rows
    tasks = row["agreement"]["tasks"]
    text = (
        "the full kernel and full fine-tuning predict the same class for "
        f"{write(row['agreement'], PERCENT)} % of the test examples (kappa "
        f"{write(row['kappa'], Form('.2f'))}, Kendall's tau of the margins "
        f"{write(row['kendall'], Form('.2f'))}; {_mean_over(tasks)})"
    )
    tuned = [r for r in select(part.tuned, method="full") if r["task"] in tasks]
    seeds = across(tuned, "agreement_of_seeds")
    if seeds["tasks"] == tasks:
        text += f", two seeds of full fine-tuning for {write(seeds, PERCENT)} %"
    return f"{text}."


def _controls(part: Part) -> str:
    """Return what the controls reach, all on the same tasks."""
    kernels, tuned = part.of_spaces("test"), part.of_methods("test")
    columns = {
        "the model itself (f0)": part.f0,
        "ridge on the full kernel with shuffled labels": part.of_spaces("shuffled").get(
            "full", {}
        ),
        "the kernel over the head": kernels.get("head", {}),
        "the kernel over the biases": kernels.get("bias", {}),
        "fine-tuning the head": tuned.get("head", {}),
        "fine-tuning the biases": tuned.get("bitfit", {}),
    }
    found = _means(columns, list(columns))
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(r, PERCENT)} %" for name, r in found.items())
    return f"controls ({_mean_over(over['tasks'])}): {listed}."


def _change(part: Part) -> str:
    """Return how far fine-tuning moves the full kernel."""
    columns = part.of_methods("kernel_change", "distance")
    found = _means(columns, list(columns))
    if not found:
        return ""
    over = next(iter(found.values()))
    listed = ", ".join(f"{name} {write(r, Form('.2g'))}" for name, r in found.items())
    return (
        "fine-tuning moves the full kernel by a distance S = 1 - cosine "
        f"({_mean_over(over['tasks'])}): {listed}."
    )


def _remarks(summary: Summary) -> Iterator[str]:
    records = summary["records"]
    if not records["there"]:
        yield "There are no records yet."
        return
    if summary["missing"]:
        yield (
            f"Of {records['asked']:,} records {records['asked'] - records['there']:,} "
            f"are missing, and every mean is over what is there: {_missing(summary)}."
        )
    else:
        yield f"All of the {records['there']:,} records asked for are there."
    sizes = [row["test"] for row in summary["tasks"]]
    few, many = min(sizes), max(sizes)
    counted = f"{few:,} to {many:,}" if few < many else f"{few:,}"
    seeds = ", ".join(map(str, summary["seeds"]))
    yield (
        f"Each task has {counted} test examples, the same for every split: one "
        f"score's standard error from their choice is up to {50 / math.sqrt(few):.1f} "
        f"points. The seeds {seeds} draw the training and dev examples, and deviations "
        "are over these."
    )
    others: dict[str, list[str]] = {}
    for row in summary["tasks"]:
        if row["metric"] != "accuracy":
            name = "F1" if row["metric"] == "f1" else row["metric"].replace("_", " ")
            others.setdefault(name, []).append(row["task"])
    if others:
        listed = "; ".join(f"{m} for {', '.join(t)}" for m, t in others.items())
        yield f"Scores are accuracy, but {listed}."
    for row in summary["comparisons"]:
        if row["ratio"] is None and None not in (row["kernel"], row["tuned"]):
            yield (
                f"{row['task']}, {row['shots']} shots: fine-tuning {row['method']} has "
                f"a score of 0 or less, so that {row['space']} has no ratio to it."
            )
    splits = len(summary["splits"])
    for row in summary["notes"]:
        where = ", ".join(f"{task} at {shots} shots" for task, shots in row["splits"])
        everywhere = len(row["splits"]) == splits
        yield row["note"] if everywhere else f"{where}: {row['note']}"


def _missing(summary: Summary) -> str:
    """Return what is missing, in as few words as the splits allow."""
    splits = len(summary["splits"])
    seeds: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for row in summary["missing"]:
        name = (row["kind"], row["subject"], tuple(row["seeds"]))
        seeds.setdefault(name, []).append(f"{row['task']} at {row['shots']} shots")
    texts = []
    for (kind, subject, own), where in seeds.items():
        listed = "all splits" if len(where) == splits else ", ".join(where)
        texts.append(f"{kind} {subject} (seeds {', '.join(map(str, own))}; {listed})")
    return "; ".join(texts)


def _means(columns: Mapping[str, Column], names: list[str]) -> dict[str, Row]:
    """Return means over the tasks that all of the named columns with numbers have."""
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


def _mean_over(tasks: list[str]) -> str:
    return f"mean over {_count(tasks)}"


def _count(tasks: list[str]) -> str:
    return f"{len(tasks)} tasks" if len(tasks) > 1 else f"the task {tasks[0]}"


def _figures(part: Part) -> list[str]:
    """Return the names of a part's figures; the change is the same for any kernel."""
    of_kind = [f"{what}-{part.name}" for what in CAPTIONS if what != "change"]
    return [*of_kind, f"change-{part.shots}"]


def _task(row: Row) -> tuple[str, str]:
    metric = row["metric"].replace("_", " ")
    return f"task {row['task']}", (
        f"{', '.join(row['labels'])}; {metric} on {row['test']:,} test examples; "
        f"outputs: {row['readout']}"
    )
