"""The summary of a lambda study.

The summary is plain JSON. It depends neither on the order of the records nor on times.
Missing values are None and are not imputed.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ntk.reporting import Row, spread, standard_error, value_at
from ntk.studies.folder import Key, Record
from ntk.studies.lambdas.records import BOUNDED
from ntk.studies.order import order_of_key, order_of_subject, order_of_task
from ntk.studies.overview import overview, rounded

MEASURES = {
    "movement": "test.movement",
    "linear_movement": "test.linear_movement",
    "parameter_distance": "test.parameter_distance",
    "relative_parameter_distance": "test.relative_parameter_distance",
    "change": "test.change",
    "gap": "test.mean_logit_distance",
    "output_distance": "test.output_distance",
    "relative_gap": "test.relative_output_distance",
    "kl": "test.kl_divergence",
    "agreement": "test.agreement",
    "start_accuracy": "test.start_accuracy",
    "accuracy": "test.accuracy",
    "linear_accuracy": "test.linear_accuracy",
    "recovery": "test.recovery",
    "train_gap": "train.output_distance",
    "relative_train_gap": "train.relative_output_distance",
    "start_loss": "states.start.loss",
    "loss": "states.tuned.loss",
    "linear_loss": "states.linear.loss",
}
"""Dotted paths in a record, by measure of the summary."""

SLOPES = (
    *("movement", "parameter_distance", "gap", "relative_gap"),
    *("train_gap", "relative_train_gap"),
)
"""Measures whose slopes against lambda are fitted."""
STRONGEST = 4
"""Number of largest lambdas that the asymptotic slopes are fitted to."""
WRITTEN = ("conditions", "source")
"""Fields of a bound that do not depend on lambda."""

Group = tuple[str, int, str, str, str, bool]
"""Task, shots, method, loss, optimizer, and whether selective."""


def collect(
    records: Sequence[tuple[Key, Record | None]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of a lambda study.

    Args:
        records: Records in any order, None for missing ones.
        command: Command that computes the study.
        settings: Settings of the study, JSON values.

    Returns:
        What was run, and ``groups`` by task, shots, method, loss, optimizer and
        selectivity of the penalty. A group has ``points``, one per lambda, and
        ``slopes`` of log measures against log lambda, ``over_all`` lambdas and over
        the `STRONGEST`. A point has spreads over seeds of `MEASURES`; of ``taylor``,
        the relative remainder of the expansion at the fine-tuned weights; of
        ``unfinished_tuned`` and ``unfinished_linear``, upper bounds of the distance to
        the minimiser relative to the movement; of ``gap_to_free``, the distance on the
        training examples to the linear twin with lambda = 0; and ``bounds``.
    """
    there = [(key, record) for key, record in records if record is not None]
    there.sort(key=lambda pair: order_of_key(pair[0]))
    by_group: dict[Group, list[tuple[Key, Record]]] = defaultdict(list)
    for key, record in there:
        by_group[_group(key, record)].append((key, record))
    groups = sorted(
        by_group,
        key=lambda g: (order_of_task(g[0]), g[1], order_of_subject(g[2]), g[3:]),
    )
    tasks = list(dict.fromkeys(group[0] for group in groups))
    summary = {
        **overview([key for key, _ in records], there, command, settings),
        "tasks": tasks,
        "strengths": sorted({record["strength"] for _, record in there}),
        "groups": [_summarised(group, by_group[group]) for group in groups],
    }
    return rounded(summary)


def _group(key: Key, record: Record) -> Group:
    return (
        *(key.cell.task, key.cell.shots, record["method"], record["loss"]),
        *(record["optimizer"], record["selective"]),
    )


def _summarised(group: Group, records: Iterable[tuple[Key, Record]]) -> Row:
    by_strength: dict[float, dict[int, Record]] = defaultdict(dict)
    for key, record in records:
        by_strength[record["strength"]][key.cell.seed] = record
    free = by_strength.get(0.0, {})
    points = [
        _point(strength, dict(sorted(by_strength[strength].items())), free)
        for strength in sorted(by_strength)
    ]
    names = ("task", "shots", "method", "loss", "optimizer", "selective")
    example = next(iter(by_strength[points[-1]["strength"]].values()))
    common = ("metric", "examples", "parameters", "batch", "steps")
    return {
        **dict(zip(names, group, strict=True)),
        **{name: example[name] for name in common},
        "points": points,
        "slopes": {
            measure: {
                "over_all": _slope(points, measure, len(points)),
                "strongest": _slope(points, measure, STRONGEST),
            }
            for measure in SLOPES
        },
    }


def _point(
    strength: float, by_seed: Mapping[int, Record], free: Mapping[int, Record]
) -> Row:
    """Return the measures at one lambda over seeds."""
    records = list(by_seed.values())
    point: Row = {
        "strength": strength,
        "seeds": list(by_seed),
        "learning_rates": [record["learning_rate"] for record in records],
    }
    for name, path in MEASURES.items():
        point[name] = spread(value_at(record, path) for record in records)
    point["taylor"] = spread(record["taylor"]["ratios"][-1] for record in records)
    for end, movement in (("tuned", "movement"), ("linear", "linear_movement")):
        point[f"unfinished_{end}"] = spread(
            _unfinished(record, end, movement) for record in records
        )
    point["gap_to_free"] = spread(
        _gap_to_free(record, free.get(seed)) for seed, record in by_seed.items()
    )
    if all("bounds" in record for record in records):
        point["critical_strength"] = spread(
            record["bounds"]["critical_strength"] for record in records
        )
        point["bounds"] = {name: _bound(name, by_seed, free) for name in BOUNDED}
    return point


def _unfinished(record: Record, end: str, movement: str) -> float | None:
    """Return |gradient| / lambda, a bound of the distance to it, over the movement."""
    moved = record["train"][movement]
    if not record["strength"] or not moved:
        return None
    return record["states"][end]["gradient"] / record["strength"] / moved


def _gap_to_free(record: Record, free: Record | None) -> float | None:
    """Return ||F - G|| on the training examples, G the twin with lambda = 0.

    None unless both have the same steps and learning rate.
    """
    same = ("learning_rate", "steps")
    if free is None or any(record[key] != free[key] for key in same):
        return None
    ours, theirs = record["outputs"]["tuned"], free["outputs"]["linear"]
    return float(np.linalg.norm(np.array(ours) - np.array(theirs)))


def _bound(name: str, by_seed: Mapping[int, Record], free: Mapping[int, Record]) -> Row:
    """Return a bound and the bounded quantity over seeds."""
    values, measured, notes = [], [], []
    for seed, record in by_seed.items():
        bound = record["bounds"][name]
        path = BOUNDED[name].measure
        if path is None:
            quantity = _gap_to_free(record, free.get(seed))
        else:
            quantity = value_at(record, path)
        values.append(bound["value"])
        measured.append(quantity)
        notes.append(bound["note"])
    pairs = [
        (m, v)
        for m, v in zip(measured, values, strict=True)
        if m is not None and v is not None
    ]
    if pairs:
        # The two means are compared, so they must be over the same seeds.
        known = [
            m is not None and v is not None
            for m, v in zip(measured, values, strict=True)
        ]
        measured, values = (
            [x if both else None for x, both in zip(by_record, known, strict=True)]
            for by_record in (measured, values)
        )
    return {
        "value": spread(values),
        "measured": spread(measured),
        "compared": len(pairs),
        "held": sum(m <= v for m, v in pairs),
        "vacuous": list(dict.fromkeys(filter(None, notes))),
        **{key: by_seed[min(by_seed)]["bounds"][name][key] for key in WRITTEN},
    }


def _slope(points: Sequence[Row], measure: str, count: int) -> Row | None:
    """Return the log-log slope of a measure against the largest lambdas.

    Args:
        points: Points of all lambdas, ascending.
        measure: Name of the measure.
        count: Number of largest lambdas to use.

    Returns:
        The ``"slope"`` as the mean over seeds; its ``"standard_error"`` over seeds, or
        that of the regression for a single seed; and the range of lambdas. None if a
        seed has fewer than three lambdas.
    """
    chosen = [point for point in points if point["strength"] > 0][-count:]
    seeds = sorted({seed for point in chosen for seed in point["seeds"]})
    fits = []
    for seed in seeds:
        pairs = [
            (math.log(point["strength"]), math.log(value))
            for point in chosen
            if seed in point["seeds"]
            and (value := point[measure]["values"][point["seeds"].index(seed)])
        ]
        if len(pairs) < 3:
            return None
        fits.append(stats.linregress(*zip(*pairs, strict=True)))
    if not fits:
        return None
    slopes = [float(fit.slope) for fit in fits]
    error = standard_error(slopes) if fits[1:] else float(fits[0].stderr)
    return {
        "slope": sum(slopes) / len(slopes),
        "standard_error": error,
        "seeds": len(fits),
        "from": chosen[0]["strength"],
        "to": chosen[-1]["strength"],
        "lambdas": len(chosen),
    }
