"""Gains of selection strategies over random selection.

The gain D_jk of a strategy on split k is its score minus that of random selection j of
the same size, in units of the spread: the standard deviation over random selections on
a split, pooled over the task's splits. Positive is better for every measure. Random
selections are the same on every split, so the standard error has two terms,

    error^2 = var_j(mean_k D_jk) / J + var_k(mean_j D_jk) / K

for J selections and K splits. This counts their interaction twice, so it is rather too
large. Random selections of one seed are nested: a gain over several sizes is the mean
of D over sizes, with the same error.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ntk.reporting import Row
from ntk.studies.ablation.records import AXES
from ntk.studies.folder import Key, Record
from rocoft.commands import STRATEGIES

RANDOM = "random"


class Measure(NamedTuple):
    """A measure of a selection's kernel.

    Attributes:
        path: Dotted path in a record; METRIC stands for the task's primary metric.
        better: 1 if larger is better, -1 if smaller is.
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
"""Of the body: relative Frobenius distance to the full kernel without and with the best
scale, alignment with the labels, test score. With the head and the model's own outputs:
distance and score as in few-shot studies."""

Point = tuple[str, int, str]
"""Axis, count and strategy of a selection."""
TaskSeed = tuple[str, int]
"""Task and seed of a split."""
Values = dict[tuple[int, TaskSeed], float]
"""Values by the seed of a selection (0 unless random) and split."""
Group = dict[tuple[str, int], list[tuple[Key, Record]]]
"""Records by task and shots."""


def measured(record: Record, measure: str) -> float | None:
    """Return a measure of a selection; None if it is missing or not finite.

    Args:
        record: Record of a selection.
        measure: Name in `MEASURES`.
    """
    value: Any = record
    for key in MEASURES[measure].path.replace("METRIC", record["metric"]).split("."):
        value = value[key]
    return value if value is not None and math.isfinite(value) else None


def values_of(
    records: Iterable[tuple[Key, Record]], measure: str
) -> dict[Point, Values]:
    """Return the finite values of a measure by selection.

    Args:
        records: Records of selections; others are ignored.
        measure: Name in `MEASURES`.
    """
    by_point: dict[Point, Values] = defaultdict(dict)
    for key, record in records:
        value = measured(record, measure) if "axis" in record else None
        if value is not None:
            split = key.cell.task, key.cell.seed
            point = record["axis"], record["count"], record["strategy"]
            by_point[point][record["seed"], split] = value
    return dict(by_point)


def gains(groups: Group, shots: int) -> list[Row]:
    """Return the gain of every strategy over random selection.

    Args:
        groups: Records of selections.
        shots: Number of shots of the splits.

    Returns:
        Rows by measure, strategy, task (None for all tasks) and axis (None for all
        axes) with the results of `combined` over all counts and, for a single axis, at
        each count.
    """
    by_task = {at[0]: records for at, records in groups.items() if at[1] == shots}
    rows = []
    for measure in MEASURES:
        values = {
            task: values_of(records, measure) for task, records in by_task.items()
        }
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

    Empty for fewer than two random selections or if they do not differ.
    """
    axis, count, _ = point
    chosen = {split: value for (_, split), value in values.get(point, {}).items()}
    random = values.get((axis, count, RANDOM), {})
    draws = {draw for draw, _ in random}
    splits = [k for k in chosen if all((draw, k) in random for draw in draws)]
    if len(draws) < 2 or not splits:
        return {}
    variances = [np.var([random[d, k] for d in draws], ddof=1) for k in splits]
    if not (unit := math.sqrt(np.mean(variances))):
        return {}
    better = MEASURES[measure].better
    return {
        (d, k): better * (chosen[k] - random[d, k]) / unit
        for k in splits
        for d in draws
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
        by_task: D at several points, by task. Empty points are left out, as are splits
            and selections that some points lack.

    Returns:
        ``gain``; ``error`` as defined in this module, without the term of splits for a
        single split; ``wins``, the share of random selections that are beaten, ties
        counted half; the numbers of ``tasks``, ``splits`` and ``draws``. The first
        three are None for fewer than two draws.
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
