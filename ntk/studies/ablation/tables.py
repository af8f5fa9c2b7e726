"""Tables of an ablation.

Distances and scores are in percent; gains are in spreads over random selections, ± the
standard error.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ntk.reporting import (
    POINTS,
    SCORE,
    Format,
    ReportTable,
    Row,
    ShotsSlice,
    number,
    select,
    write,
)
from ntk.studies.ablation.gains import MEASURES, RANDOM
from ntk.studies.ablation.records import ALL, AXES, FULL, HEAD
from ntk.studies.ablation.summary import OWN_OUTPUTS

TITLES = {
    "raw": "distance",
    "rescaled": "distance, best scale",
    "alignment": "alignment",
    "score_of_body": "score alone",
    "rescaled_with_head": "distance with head, best scale",
    "score": "score",
}
"""Titles of `MEASURES`."""
CURVES = ("rescaled", "raw", "score", "score_of_body")
"""Measures with a table by count."""
PERCENT = Format(".1f", 100)
GAIN = Format("+.1f", 1, "error")


def slices(summary: Mapping[str, Any]) -> list[ShotsSlice]:
    """Return the slices of a summary by shots.

    Args:
        summary: The summary that `summary.collect` returns.
    """
    fields = ("references", "curves", "gains", "variance", "variance_ratios")
    return [
        ShotsSlice(
            f"{shots} shots",
            str(shots),
            list(summary["tasks"]),
            {
                field: select(summary[field], shots=shots)
                for field in (*fields, "origins", "tuned")
            },
        )
        for shots in summary["shots"]
    ]


def report_tables(part: ShotsSlice) -> list[ReportTable]:
    """Return the tables that have rows.

    Args:
        part: A slice of the summary.
    """
    tables = [
        gains_of_measures(part),
        *(_gains_at_counts(part, measure) for measure in MEASURES),
        *(_gains_on_tasks(part, measure) for measure in MEASURES),
        *(_curves(part, measure) for measure in CURVES),
        _references(part),
        _variance(part),
        _origins(part, "kind"),
        _origins(part, "layer"),
        _tuned(part),
    ]
    return [table for table in tables if table.rows]


def gains_of_measures(part: ShotsSlice) -> ReportTable:
    """Return the gain of each strategy over all tasks and counts.

    Args:
        part: A slice of the summary.
    """
    rows = []
    for axis, strategy in _lines(part):
        where = {"task": None, "axis": axis, "strategy": strategy}
        cells = []
        for measure in MEASURES:
            (row,) = part.rows("gains", **where, measure=measure)
            cells.append(_gain(row["over_counts"]))
        rows.append([f"{axis or 'all axes'}, {strategy}", *cells])
    caption = (
        "Gain over random rows or columns, in units of the spread over random "
        "selections of the same size: mean over tasks, splits and sizes, ± standard "
        "error. A gain above 1 exceeds the typical effect of another random draw. "
        "Distances, alignment and the score alone are of the selected weights; the "
        "score is of the selected weights and the head, as in fine-tuning."
    )
    columns = ["axis, strategy", *TITLES.values()]
    return ReportTable("gains", "Gain over random selection", caption, columns, rows)


def _gains_at_counts(part: ShotsSlice, measure: str) -> ReportTable:
    gains = part.rows("gains", task=None, measure=measure)
    counts = sorted({c for row in gains if row["axis"] for c in row["counts"]})
    rows = []
    for axis, strategy in _lines(part):
        if axis is None:
            continue
        (row,) = select(gains, axis=axis, strategy=strategy)
        place = {count: i for i, count in enumerate(row["counts"])}
        cells = [
            _gain({key: row[key][place[count]] for key in ("gain", "error")})
            if count in place
            else _gain(None)
            for count in counts
        ]
        rows.append([f"{axis}, {strategy}", *cells])
    return ReportTable(
        f"gains-at-{measure}",
        f"Gain by size: {TITLES[measure]}",
        "Mean over tasks and splits, ± standard error, in spreads.",
        ["axis, strategy", *(f"r = {count}" for count in counts)],
        rows,
        folded=True,
    )


def _gains_on_tasks(part: ShotsSlice, measure: str) -> ReportTable:
    rows = []
    for axis, strategy in _lines(part) if part.tasks[1:] else ():
        own = part.rows("gains", axis=axis, strategy=strategy, measure=measure)
        by_task = {row["task"]: row["over_counts"] for row in own}
        cells = [_gain(by_task.get(task)) for task in (*part.tasks, None)]
        rows.append([f"{axis or 'all axes'}, {strategy}", *cells])
    return ReportTable(
        f"gains-on-{measure}",
        f"Gain by task: {TITLES[measure]}",
        "Mean over splits and sizes, ± standard error, in spreads.",
        ["axis, strategy", *part.tasks, "all tasks"],
        rows,
        folded=True,
    )


def _curves(part: ShotsSlice, measure: str) -> ReportTable:
    """Return a measure of selections by size, as means over tasks."""
    curves = part.rows("curves")
    counts = sorted({count for row in curves for count in row["counts"]})
    whole = [row[measure] for row in part.rows("references", name=ALL)]
    rows = []
    for axis, strategy in dict.fromkeys((r["axis"], r["strategy"]) for r in curves):
        own = select(curves, axis=axis, strategy=strategy)
        fmt = SCORE if strategy == RANDOM else PERCENT
        cells = [write(_mean_at(own, measure, count), fmt) for count in counts]
        rows.append([f"{axis}, {strategy}", *cells, write(_mean(whole), PERCENT)])
    return ReportTable(
        f"curves-{measure}",
        f"{TITLES[measure].capitalize()} by size",
        "In percent, mean over splits and tasks; random selections ± their spread, the "
        "standard deviation over selections on a split. All: all linear weights in "
        "the blocks.",
        ["axis, strategy", *(f"r = {count}" for count in counts), "all"],
        rows,
        folded=measure not in {"rescaled", "score"},
    )


def _references(part: ShotsSlice) -> ReportTable:
    titles = {
        FULL: "full kernel",
        ALL: "all linear weights",
        HEAD: "head alone",
        OWN_OUTPUTS: "model itself",
    }
    rows = []
    for task in part.tasks:
        by_name = {row["name"]: row for row in part.rows("references", task=task)}
        if not by_name:
            continue
        cells = [write((by_name.get(n) or {}).get("score"), SCORE) for n in titles]
        for name, measure in (
            (FULL, "score_of_body"),
            (ALL, "score_of_body"),
            (ALL, "raw"),
            (ALL, "rescaled"),
        ):
            cells.append(write((by_name.get(name) or {}).get(measure), SCORE))
        rows.append([task, *cells])
    columns = ["task", *titles.values(), "full alone", "linear alone"]
    columns += ["linear to full", "linear to full, best scale"]
    return ReportTable(
        "references",
        "References",
        "Test scores of kernels with the head and alone, and distances between the "
        "kernel of all linear weights and the full one, in percent, mean ± standard "
        "deviation over splits.",
        columns,
        rows,
    )


def _variance(part: ShotsSlice) -> ReportTable:
    rows = []
    found = part.rows("variance")
    for axis, count in dict.fromkeys((row["axis"], row["count"]) for row in found):
        own = select(found, axis=axis, count=count)
        by_task = {row["task"]: row for row in own}
        cells = []
        for task in part.tasks:
            row = by_task.get(task) or {"expected": None, "measured": {"mean": None}}
            cells += [_root(row["expected"]), _root(row["measured"]["mean"])]
        extreme = _mean([{"mean": row["extreme"]} for row in own])
        rows.append([f"{axis}, r = {count}", *cells, write(extreme, PERCENT)])
    columns = ["axis, size"]
    for task in part.tasks:
        columns += [f"{task}, expected", f"{task}, measured"]
    return ReportTable(
        "errors",
        "Error of random selections and its expectation",
        "Root of the mean squared relative Frobenius error, in percent, of the "
        "unbiased kernel of random rows or columns against that of all linear weights. "
        "Extreme: share of the expected squared error due to the most extreme row or "
        "column of each weight.",
        [*columns, "extreme"],
        rows,
    )


def _origins(part: ShotsSlice, by: str) -> ReportTable:
    origins = part.rows("origins")
    groups = list(dict.fromkeys(g for row in origins for g in row["cosine"][by]))
    rows = []
    for group in groups:
        cells = [number(total(origins[0]["share"], by, group), PERCENT)]
        for task in part.tasks:
            own = select(origins, task=task)
            trace = total(own[0]["trace"], by, group) if own else None
            cells.append(number(trace, PERCENT))
            cosine = own[0]["cosine"][by].get(group) if own else None
            cells.append(number(cosine, Format(".3f")))
        rows.append([group, *cells])
    columns = [by, "parameters"]
    for task in part.tasks:
        columns += [f"{task}, trace", f"{task}, cosine"]
    return ReportTable(
        f"origins-{by}",
        f"Contributions to the full kernel by {'module' if by == 'kind' else by}",
        "Share of the parameters and of the full kernel's trace on the training "
        "examples, in percent, and cosine between the kernel of these parameters and "
        "the full one; means over splits.",
        columns,
        rows,
    )


def total(nested: Mapping[str, Mapping[str, float]], by: str, group: str) -> float:
    """Return the sum over a kind of modules or over a layer.

    Args:
        nested: Numbers by kind and layer.
        by: ``"kind"`` or ``"layer"``.
        group: Name of the kind or layer.
    """
    if by == "kind":
        return sum(nested[group].values())
    return sum(by_layer.get(group, 0.0) for by_layer in nested.values())


def _tuned(part: ShotsSlice) -> ReportTable:
    rows = [
        [
            f"{row['task']}, {row['method']}",
            write(row["score"], SCORE),
            write(row["kernel"], SCORE),
            write(row["points"], POINTS),
        ]
        for row in part.rows("tuned")
    ]
    return ReportTable(
        "tuned",
        "Fine-tuning",
        "Test scores of fine-tuning and of the kernel over the same parameters, in "
        "percent, and their difference in points (kernel minus fine-tuning) on the "
        "same splits; mean ± standard deviation over splits.",
        ["task, method", "fine-tuning", "kernel", "points"],
        rows,
    )


def _lines(part: ShotsSlice) -> list[tuple[str | None, str]]:
    """Return the axes and strategies that have gains, all axes last."""
    found = {(row["axis"], row["strategy"]) for row in part.rows("gains")}
    strategies = dict.fromkeys(row["strategy"] for row in part.rows("gains"))
    return [
        (axis, strategy)
        for axis in (*AXES, None)
        for strategy in strategies
        if (axis, strategy) in found
    ]


def _gain(row: Row | None) -> str:
    if row is None or row["gain"] is None:
        return write(None, GAIN)
    return write({"mean": row["gain"], "error": row["error"]}, GAIN)


def _mean_at(rows: Iterable[Row], measure: str, count: int) -> Row | None:
    """Return the mean over tasks and the mean spread at a count."""
    places = [
        (row, row["counts"].index(count)) for row in rows if count in row["counts"]
    ]
    means = [{"mean": row[measure]["mean"][i]} for row, i in places]
    spreads = [{"mean": row[measure]["deviation"][i]} for row, i in places]
    mean, deviation = _mean(means), _mean(spreads)
    if mean is None:
        return None
    return {**mean, "deviation": deviation and deviation["mean"]}


def _mean(rows: Sequence[Row]) -> Row | None:
    """Return the mean over tasks; None if a task has no value."""
    values = [row["mean"] for row in rows]
    if not values or None in values:
        return None
    return {"mean": sum(values) / len(values)}


def _root(square: float | None) -> str:
    return number(None if square is None else square**0.5, PERCENT)
