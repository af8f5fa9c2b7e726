"""The summary of an ablation.

The summary is plain JSON. It depends neither on the order of the records nor on times.
Missing values are None and are not imputed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ntk.reporting import Row, points, spread
from ntk.studies.ablation.gains import (
    MEASURES,
    Group,
    Point,
    TaskSeed,
    Values,
    gains,
    measured,
    values_of,
)
from ntk.studies.ablation.records import ALL, AXES, FULL, HEAD, OTHER_KINDS
from ntk.studies.folder import Key, Record
from ntk.studies.order import order_of_subject, order_of_task
from ntk.studies.overview import overview, rounded
from rocoft.commands import STRATEGIES
from rocoft.models import order_of_place

OWN_OUTPUTS = "own outputs"


def collect(
    records: Sequence[tuple[Key, Record | None]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of an ablation.

    Args:
        records: Records in any order, None for missing ones.
        command: Command that computes the ablation.
        settings: Settings of the study, JSON values.

    Returns:
        Rows by task and shots: ``references``; ``curves``, measures at each count by
        axis and strategy, with the deviation over random selections, or over splits if
        there is only one; ``variance``, ``origins`` and ``tuned``. ``gains`` by task
        (None for all) and axis (None for all), at each count and over all counts;
        ``variance_ratios`` over tasks and counts.
    """
    there = [(key, record) for key, record in records if record is not None]
    there.sort(key=lambda pair: _order(pair[0]))
    by_kind: dict[str, list[tuple[Key, Record]]] = defaultdict(list)
    for key, record in there:
        by_kind[key.kind].append((key, record))
    groups = {
        kind: _by_split(by_kind[kind])
        for kind in ("selection", "variance", "origin", "finetune")
    }
    shots = sorted({key.cell.shots for key, _ in there})
    summary = {
        **overview([key for key, _ in records], there, command, settings),
        "tasks": list(dict.fromkeys(key.cell.task for key, _ in there)),
        "metrics": {key.cell.task: record["metric"] for key, record in there},
        "references": _references(groups["selection"]),
        "curves": _curves(groups["selection"]),
        "gains": [row for some in shots for row in gains(groups["selection"], some)],
        "variance": _variance(groups["variance"]),
        "variance_ratios": _variance_ratios(groups["variance"]),
        "origins": _origins(groups["origin"]),
        "tuned": _tuned(groups["finetune"], groups["selection"]),
    }
    return rounded(summary)


def _by_split(records: Iterable[tuple[Key, Record]]) -> Group:
    found: Group = defaultdict(list)
    for key, record in records:
        found[key.cell.task, key.cell.shots].append((key, record))
    return dict(found)


def _order(key: Key) -> tuple[Any, ...]:
    cell = key.cell
    subject = order_of_subject(key.subject)
    return order_of_task(cell.task), cell.shots, key.kind, subject, cell.seed


def _references(groups: Group) -> list[Row]:
    """Return the scores of the full kernel, all linear weights, the head and f0."""
    rows = []
    for (task, shots), records in groups.items():
        where = {"task": task, "shots": shots}
        for name in (FULL, ALL):
            own = [record for key, record in records if key.subject == name]
            if own:
                rows.append(
                    {
                        **where,
                        "name": name,
                        "parameters": own[-1]["parameters"],
                        "share": own[-1]["share"],
                        **{m: spread(measured(r, m) for r in own) for m in MEASURES},
                    }
                )
        full = [record for key, record in records if key.subject == FULL]
        for name, field in ((HEAD, "head"), (OWN_OUTPUTS, "own_outputs")):
            own = [record for record in full if record[field] is not None]
            scores = [record[field]["test"][record["metric"]] for record in own]
            if own:
                rows.append({**where, "name": name, "score": spread(scores)})
    return rows


def _curves(groups: Group) -> list[Row]:
    """Return the measures of selections by size."""
    rows = []
    for (task, shots), records in groups.items():
        found: dict[Point, list[Record]] = defaultdict(list)
        for _, record in records:
            if "axis" in record:
                point = record["axis"], record["count"], record["strategy"]
                found[point].append(record)
        values = {m: values_of(records, m) for m in MEASURES}
        for axis, strategy in _lines(found):
            counts = sorted(c for a, c, s in found if (a, s) == (axis, strategy))
            some = [found[axis, count, strategy][-1] for count in counts]
            rows.append(
                {
                    "task": task,
                    "shots": shots,
                    "axis": axis,
                    "strategy": strategy,
                    "counts": counts,
                    "parameters": [record["parameters"] for record in some],
                    "share": [record["share"] for record in some],
                    **{
                        m: _curve([own.get((axis, c, strategy), {}) for c in counts])
                        for m, own in values.items()
                    },
                }
            )
    return rows


def _lines(points: Iterable[Point]) -> list[tuple[str, str]]:
    """Return the axes and strategies of points, in display order."""
    order = lambda line: (AXES.index(line[0]), STRATEGIES.index(line[1]))
    return sorted({(axis, strategy) for axis, _, strategy in points}, key=order)


def _curve(points: Sequence[Values]) -> Row:
    """Return the mean and deviation of each point."""
    return {
        "mean": [float(np.mean(list(p.values()))) if p else None for p in points],
        "deviation": [_deviation(point) for point in points],
    }


def _deviation(values: Values) -> float | None:
    """Return the deviation over selections, or over splits for a single selection."""
    by_split: dict[TaskSeed, list[float]] = defaultdict(list)
    for (_, split), value in values.items():
        by_split[split].append(value)
    if all(len(of_split) == 1 for of_split in by_split.values()):
        return spread(values.values())["deviation"]
    variances = [np.var(v, ddof=1) for v in by_split.values() if len(v) > 1]
    return float(np.sqrt(np.mean(variances)))


def _variance(groups: Group) -> list[Row]:
    """Return the error of random selections and its expectation."""
    rows = []
    for (task, shots), records in groups.items():
        found: dict[tuple[str, int], list[tuple[Key, Record]]] = defaultdict(list)
        for key, record in records:
            found[record["axis"], record["count"]].append((key, record))
        for axis, count in sorted(found, key=lambda at: (AXES.index(at[0]), at[1])):
            own = found[axis, count]
            rows.append(
                {
                    "task": task,
                    "shots": shots,
                    "axis": axis,
                    "count": count,
                    "expected": _mean(record["expected"] for _, record in own),
                    "measured": _over_draws(own, lambda record: record["measured"]),
                    "extreme": _mean(record["extreme"] for _, record in own),
                }
            )
    return rows


def _variance_ratios(groups: Group) -> list[Row]:
    """Return the ratio of measured to expected error over tasks, splits and counts."""
    found: dict[tuple[int, str], list[tuple[Key, Record]]] = defaultdict(list)
    for (_, shots), records in groups.items():
        for key, record in records:
            if record["expected"]:
                found[shots, record["axis"]].append((key, record))
    return [
        {
            "shots": shots,
            "axis": axis,
            **_over_draws(own, lambda record: record["measured"] / record["expected"]),
        }
        for (shots, axis), own in sorted(found.items(), reverse=True)
    ]


def _over_draws(
    records: Iterable[tuple[Key, Record]], value: Callable[[Record], float]
) -> Row:
    """Return a mean, and its standard error over random selections."""
    by_draw: dict[int, list[float]] = defaultdict(list)
    for _, record in records:
        by_draw[record["seed"]].append(value(record))
    means = [float(np.mean(of_draw)) for of_draw in by_draw.values()]
    error = np.std(means, ddof=1) / math.sqrt(len(means)) if means[1:] else None
    return {
        "mean": float(np.mean(means)),
        "standard_error": None if error is None else float(error),
        "draws": len(means),
    }


def _origins(groups: Group) -> list[Row]:
    """Return the contributions to the full kernels, means over splits."""
    rows = []
    for (task, shots), records in groups.items():
        own = [record for _, record in records]
        totals = [sum(sum(by.values()) for by in r["trace"].values()) for r in own]
        found = own[0]["parameters"]
        kinds = [kind for kind in found if kind not in OTHER_KINDS]
        kinds += [kind for kind in OTHER_KINDS if kind in found]
        parameters = {kind: found[kind] for kind in kinds}
        layers = sorted(own[0]["cosine"]["layer"], key=order_of_place)
        size = sum(sum(by.values()) for by in parameters.values())
        rows.append(
            {
                "task": task,
                "shots": shots,
                "trace": {
                    kind: {
                        layer: _mean(
                            r["trace"][kind][layer] / total
                            for r, total in zip(own, totals, strict=True)
                        )
                        for layer in by
                    }
                    for kind, by in parameters.items()
                },
                "share": {
                    kind: {layer: count / size for layer, count in by.items()}
                    for kind, by in parameters.items()
                },
                "cosine": {
                    by: {
                        group: _mean(record["cosine"][by][group] for record in own)
                        for group in groups
                    }
                    for by, groups in (("kind", kinds), ("layer", layers))
                },
            }
        )
    return rows


def _tuned(groups: Group, kernels: Group) -> list[Row]:
    """Return scores of fine-tuning and of the kernel over the same parameters."""
    rows = []
    for (task, shots), records in groups.items():
        by_method: dict[str, dict[int, float]] = defaultdict(dict)
        for key, record in records:
            by_method[key.subject][key.cell.seed] = record["test"][record["metric"]]
        known = {
            (key.subject, key.cell.seed): measured(record, "score")
            for key, record in kernels.get((task, shots), [])
        }
        for method, by_seed in by_method.items():
            paired = [
                (score, kernel)
                for seed, score in by_seed.items()
                if (kernel := known.get((method, seed))) is not None
            ]
            rows.append(
                {
                    "task": task,
                    "shots": shots,
                    "method": method,
                    "score": spread(by_seed.values()),
                    "kernel": spread(kernel for _, kernel in paired),
                    "points": spread(points(kernel, score) for score, kernel in paired),
                }
            )
    return rows


def _mean(values: Iterable[float | None]) -> float | None:
    return spread(values)["mean"]
