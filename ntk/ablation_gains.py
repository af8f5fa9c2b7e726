"""What choosing rows and columns gains over drawing them at random.

The gain of a strategy is its score less that of each random selection of the same
size, on the same split, in units of the spread over random selections: their standard
deviation on a split, pooled over the task's splits. Better is positive, whatever the
measure. Random selections are the same ones on every split, so that a gain varies with
both; its standard error adds up the variances of its means over either,

    error^2 = var_j(mean_k D_jk) / J + var_k(mean_j D_jk) / K

for J selections and K splits, which counts what varies with both of them twice and is
too large rather than too small. Random selections of one seed lie within each other: a
gain over several sizes is the mean of D over them, with the same error.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ntk.ablation import AXES
from ntk.study import Key, Record
from ntk.study_scores import Row
from rocoft.selection import STRATEGIES

RANDOM = "random"


class Measure(NamedTuple):
    """A number of a kernel.

    Attributes:
        path: Where it lies in a record; METRIC stands for the task's chief metric.
        better: 1 if more is better, -1 if less is.
    """

    path: str
    better: int


MEASURES = {
    "raw": Measure("body.distance.frobenius", -1),
    "rescaled": Measure("body.distance.frobenius_rescaled", -1),
    "alignment": Measure("body.alignment", 1),
    "score_of_body": Measure("body.test.METRIC", 1),
    "rescaled_with_head": Measure("whole.distance.frobenius_rescaled", -1),
    "score": Measure("whole.test.METRIC", 1),
}
"""Of a selection: relative Frobenius distance to the full kernel, as it is and at the
best scale, alignment with the labels and test score, of its body; the two that fewshot
studies report, beside the head and from the model's own outputs."""

Point = tuple[str, int, str]
"""Axis, count and strategy of a selection."""
Split = tuple[str, int]
"""A task and a seed."""
Values = dict[tuple[int, Split], float]
"""By the seed of a selection, 0 if it is not random, and split."""
Group = dict[tuple[str, int], list[tuple[Key, Record]]]
"""Records by task and shots."""


def measured(record: Record, measure: str) -> float | None:
    """Return a measure of a record of a selection, None if it has no value.

    Args:
        record: Of a selection.
        measure: One of `MEASURES`.
    """
    value: Any = record
    for key in MEASURES[measure].path.replace("METRIC", record["metric"]).split("."):
        value = value[key]
    return value if value is not None and math.isfinite(value) else None


def values_of(
    records: Iterable[tuple[Key, Record]], measure: str
) -> dict[Point, Values]:
    """Return a measure of selections wherever it has a value.

    Args:
        records: Of selections; others are passed over.
        measure: One of `MEASURES`.
    """
    found: dict[Point, Values] = defaultdict(dict)
    for key, record in records:
        value = measured(record, measure) if "axis" in record else None
        if value is not None:
            split = key.cell.task, key.cell.seed
            point = record["axis"], record["count"], record["strategy"]
            found[point][record["seed"], split] = value
    return dict(found)


def gains(groups: Group, shots: int) -> list[Row]:
    """Return what every strategy gains over random selection.

    Args:
        groups: Records of selections.
        shots: Of the splits.

    Returns:
        Rows by measure and strategy, by task and over all of them (None), by axis and
        over all of them (None): what `combined` returns over all counts and, for one
        axis, at each of them.
    """
    own = {at[0]: records for at, records in groups.items() if at[1] == shots}
    rows = []
    for measure in MEASURES:
        values = {task: values_of(records, measure) for task, records in own.items()}
        known = {point for by_point in values.values() for point in by_point}
        axes = [axis for axis in AXES if any(axis == point[0] for point in known)]
        for strategy in STRATEGIES:
            if strategy == RANDOM:
                continue
            gained = {
                (axis, count): {
                    task: _gained(by_point, (axis, count, strategy), measure)
                    for task, by_point in values.items()
                }
                for axis, count, s in sorted(known)
                if s == strategy
            }
            where = {"shots": shots, "strategy": strategy, "measure": measure}
            rows += [
                {**where, "task": task, "axis": axis, **_gain_row(gained, task, axis)}
                for task in (*values, None)
                for axis in (*axes, None)
                if any(axis in {at[0], None} for at in gained)
            ]
    return rows


def _gained(values: Mapping[Point, Values], point: Point, measure: str) -> Values:
    """Return D on one task, by random selection and split.

    Empty where there are fewer than two random selections or they do not differ.
    """
    axis, count, _ = point
    own = {split: value for (_, split), value in values.get(point, {}).items()}
    random = values.get((axis, count, RANDOM), {})
    draws = {draw for draw, _ in random}
    splits = [split for split in own if all((draw, split) in random for draw in draws)]
    if len(draws) < 2 or not splits:
        return {}
    variances = [np.var([random[d, k] for d in draws], ddof=1) for k in splits]
    if not (unit := math.sqrt(np.mean(variances))):
        return {}
    better = MEASURES[measure].better
    return {
        (d, k): better * (own[k] - random[d, k]) / unit for k in splits for d in draws
    }


def _gain_row(
    gained: Mapping[tuple[str, int], Mapping[str, Values]],
    task: str | None,
    axis: str | None,
) -> Row:
    """Return the gains at each count and over all counts."""
    chosen = {
        at: {name: found for name, found in by.items() if task in {name, None}}
        for at, by in gained.items()
        if axis in {at[0], None}
    }
    whole: dict[str, list[Values]] = defaultdict(list)
    for by in chosen.values():
        for name, found in by.items():
            whole[name].append(found)
    row: Row = {"over_counts": combined(whole)}
    if axis is not None:
        each = [combined({n: [v] for n, v in by.items()}) for by in chosen.values()]
        row["counts"] = [count for _, count in chosen]
        row |= {key: [one[key] for one in each] for key in ("gain", "error", "wins")}
    return row


def combined(by_task: Mapping[str, Sequence[Values]]) -> Row:
    """Return the mean of D over points, splits and random selections, and its error.

    Args:
        by_task: For each task D at some points. Points without any are left out, and
            splits and selections that not all points have.

    Returns:
        ``gain``; ``error``, as this module describes, without the part of the splits
        if there is but one; ``wins``, the share of random selections that are beaten,
        equal ones counted half; and how many ``tasks``, ``splits`` and ``draws`` it is
        over. None without any.
    """
    merged: Values = {}
    wins: list[float] = []
    for several in by_task.values():
        known = [found for found in several if found]
        for at in set.intersection(*map(set, known)) if known else ():
            merged[at] = float(np.mean([found[at] for found in known]))
            wins += [0.5 + 0.5 * float(np.sign(found[at])) for found in known]
    splits = sorted({split for _, split in merged})
    draws = sorted({draw for draw, _ in merged})
    draws = [draw for draw in draws if all((draw, k) in merged for k in splits)]
    counted = {
        "tasks": len({task for task, _ in splits}),
        "splits": len(splits),
        "draws": len(draws),
    }
    if len(draws) < 2:
        return {"gain": None, "error": None, "wins": None, **counted}
    D = np.array([[merged[draw, split] for split in splits] for draw in draws])
    variance = np.var(D.mean(axis=1), ddof=1) / len(draws)
    if len(splits) > 1:
        variance += np.var(D.mean(axis=0), ddof=1) / len(splits)
    error = float(math.sqrt(variance))
    return {
        "gain": float(D.mean()),
        "error": error,
        "wins": float(np.mean(wins)),
        **counted,
    }
