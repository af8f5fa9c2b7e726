"""How much of the differences between methods of fine-tuning is noise.

The test score of method m on split s of task t is taken as

    y_tsm = mu_ts + a_m + b_tm + e_tsm:

the level of the split, the main effect of the method, that of the method on this task,
and the residual: what of the method is peculiar to the split, and the randomness of
training. Analysis of variance within the splits, with T tasks, S splits of each and M
methods, gives from the mean squares of methods (A), tasks x methods (B) and residuals
(E) the variances (A - B) / (T S), (B - E) / S and E; negative ones count as 0. The F
test of B / E asks whether a choice of the method for each task can be better than one
choice for all. The reliability of the mean over S splits of a task's contrasts between
methods, 1 where noise adds nothing, is that of the sum of both effects.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.stats

from ntk.reporting import Array, Row

LEVEL = 0.95
"""Coverage of the interval of the deviation of task x method."""


def reliability(rows: Iterable[Row], *, without: Sequence[str] = ()) -> Row | None:
    """Return the variances of the scores of fine-tuning.

    Args:
        rows: Rows of fine-tuning with one number of shots, from
            `ntk.studies.fewshot.summary`: task, method, seeds and test scores.
        without: Methods that are left out.

    Returns:
        ``methods``, ``tasks``, ``splits`` (of each task), and in percentage points
        ``method`` (deviation of the main effects), ``task_method`` with ``low`` and
        ``high``, and ``residual`` of one run; ``p_value`` of the F test;
        ``reliability`` of a task's contrasts. Tasks on which a method lacks a split
        that others have are left out. None for fewer than two tasks, splits or methods.
    """
    scores = _balanced([row for row in rows if row["method"] not in without])
    if scores is None:
        return None
    methods, tasks, values = scores
    return {
        "methods": methods,
        "tasks": tasks,
        "splits": values.shape[1],
        **variances(values),
    }


def variances(values: Array) -> dict[str, Any]:
    """Return the variances of scores as deviations in points, see above.

    Args:
        values: ``(tasks, splits, methods)`` scores, at least 2 of each.

    Returns:
        The fields of `reliability` but its names and counts. The interval is that of
        the ratio of both variances, exact for normal ones, times the residual's, which
        makes it a little too wide.
    """
    T, S, M = values.shape
    z = 100 * (values - values.mean(axis=2, keepdims=True))
    of_task = z.mean(axis=1)
    of_method = of_task.mean(axis=0)
    within = (T - 1) * (M - 1), T * (S - 1) * (M - 1)
    A = T * S * np.square(of_method).sum() / (M - 1)
    B = S * np.square(of_task - of_method).sum() / within[0]
    E = np.square(z - of_task[:, None]).sum() / within[1]
    method, both = max(A - B, 0) / (T * S), max(B - E, 0) / S
    F = B / E if E else math.nan
    quantiles = scipy.stats.f(*within).ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    low, high = (math.sqrt(max(F / q - 1, 0) * E / S) for q in quantiles)
    signal = method + both
    return {
        "method": math.sqrt(method),
        "task_method": math.sqrt(both),
        "low": low,
        "high": high,
        "p_value": float(scipy.stats.f(*within).sf(F)),
        "residual": math.sqrt(E),
        "reliability": float(signal / (signal + E / S)) if signal + E else None,
    }


def _balanced(rows: Sequence[Row]) -> tuple[list[str], list[str], Array] | None:
    """Return methods, tasks and scores ``(tasks, splits, methods)``."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    by_task: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        known = by_task.setdefault(row["task"], {})
        for seed, value in zip(row["seeds"], row["test"]["values"], strict=True):
            if value is not None:
                known[seed, row["method"]] = value
    whole = {t: k for t, k in by_task.items() if len(k) == len(seeds) * len(methods)}
    if min(len(whole), len(seeds), len(methods)) < 2:
        return None
    values = [[[k[s, m] for m in methods] for s in seeds] for k in whole.values()]
    return methods, list(whole), np.array(values)
