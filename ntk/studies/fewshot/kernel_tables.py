"""Tables of the kernels of a few-shot study: measures, changes, classifiers."""

from collections import Counter
from statistics import fmean

from ntk.reporting import (
    CLASSIFIERS,
    DASH,
    SCORE,
    Format,
    ReportTable,
    across,
    by_task,
    number,
    select,
    write,
)
from ntk.studies.fewshot.slices import Slice
from ntk.studies.fewshot.summary import growth_by_sizes

PERCENT = Format(".1f", 100)
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


def measures(part: Slice) -> list[ReportTable]:
    """Return measures of the kernels over tasks, and their distances by task.

    Args:
        part: A slice of the summary.
    """
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


def growth(part: Slice) -> list[ReportTable]:
    """Return distances to the full kernel by number of examples.

    Args:
        part: A slice of the summary.
    """
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


def changes(part: Slice) -> list[ReportTable]:
    """Return how fine-tuning changes the kernel.

    Args:
        part: A slice of the summary.
    """
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


def classifiers(part: Slice) -> list[ReportTable]:
    """Return the scores of each classifier, and how often it is the best.

    Args:
        part: A slice of the summary.
    """
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
