"""How predictors rank the tuned sets of layers, and what they tell beyond controls.

The controls need no kernel: how many parameters a set has, how deep its layers are, and
how well its layers did on the other tasks. The last is the static ranking: each layer
has an additive effect on the score, estimated by least squares on the sets of all other
tasks, whose scores are standardised task by task; a set's prediction is the sum of its
layers' effects.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ntk.measures import Array
from ntk.reporting import Row
from ntk.studies.layers.correlation import (
    FEWEST,
    bootstrap,
    interval,
    rank_correlation,
)
from ntk.studies.layers.predictors import CONTROLS, PREDICTORS, STATIC
from ntk.studies.layers.subsets import Subset

KINDS = ("plain", *CONTROLS)
"""The correlations of a row: plain, and given each control."""


@dataclass(frozen=True, eq=False)
class TunedSets:
    """The m sets of layers that were tuned on all s splits of a task.

    Attributes:
        layers: The layers of each set.
        predictors: ``(m, s)`` values by the name of the predictor.
        scores: ``(m, s)`` test scores.
    """

    layers: Sequence[Subset]
    predictors: dict[str, Array]
    scores: Array


def add_static(by_task: Mapping[str, TunedSets]) -> None:
    """Add the predictor `STATIC` to the sets of each task, if there are other tasks.

    Args:
        by_task: The tuned sets by task.
    """
    for task, tuned in by_task.items():
        others = [
            each
            for name, each in by_task.items()
            if name != task and len(each.layers) >= FEWEST
        ]
        if others and tuned.layers:
            predicted = static_scores(tuned.layers, others)
            splits = tuned.scores.shape[1]
            tuned.predictors[STATIC] = np.repeat(predicted[:, None], splits, axis=1)


def static_scores(sets: Sequence[Subset], others: Iterable[TunedSets]) -> Array:
    """Return the scores of sets that layers' effects on other tasks would give.

    Args:
        sets: The m sets.
        others: The tuned sets of the other tasks.

    Returns:
        ``(m,)`` scores, in deviations of the scores of a task. A layer that no other
        task tuned has no effect.
    """
    others = list(others)
    names = sorted({n for tuned in others for each in tuned.layers for n in each})
    held, standardised = [], []
    for tuned in others:
        means = tuned.scores.mean(axis=1)
        spread = means.std() or 1.0
        inside = _indicators(tuned.layers, names)
        held.append(inside - inside.mean(axis=0))
        standardised.append((means - means.mean()) / spread)
    effects, *_ = np.linalg.lstsq(np.vstack(held), np.concatenate(standardised))
    return np.asarray(_indicators(sets, names) @ effects)


def correlated(by_task: Mapping[str, TunedSets]) -> list[Row]:
    """Return the rank correlations of predictors and scores.

    Args:
        by_task: The tuned sets by task.

    Returns:
        A row for each task and predictor, then for each predictor the means over tasks,
        whose task is None and whose intervals treat the tasks as fixed.
    """
    rows, draws = [], defaultdict(list)
    for task, tuned in by_task.items():
        if len(tuned.layers) < FEWEST:
            continue
        for name, predictor in tuned.predictors.items():
            rhos, drawn = {}, {}
            for kind in KINDS:
                control = tuned.predictors.get(CONTROLS.get(kind, ""))
                if kind == "plain" or control is not None:
                    given = (predictor, tuned.scores, control)
                    rhos[kind], drawn[kind] = (
                        rank_correlation(*given),
                        bootstrap(*given),
                    )
            draws[name].append(drawn)
            rows.append({"task": task, **_row(name, rhos, drawn)})
    over_tasks = []
    for name, of_tasks in draws.items():
        same = [row for row in rows if row["predictor"] == name]
        rhos = {kind: _mean([row[kind]["spearman"] for row in same]) for kind in KINDS}
        drawn = {
            kind: np.mean([each[kind] for each in of_tasks], axis=0)
            for kind in KINDS
            if all(kind in each for each in of_tasks)
        }
        over_tasks.append({"task": None, **_row(name, rhos, drawn)})
    return rows + over_tasks


def _row(
    name: str, rhos: Mapping[str, float | None], draws: Mapping[str, Array]
) -> Row:
    """Return a predictor's row; "towards" is positive in the expected direction."""
    row: Row = {"predictor": name}
    for kind in KINDS:
        rho, ends = rhos.get(kind), interval(draws[kind]) if kind in draws else None
        row[kind] = {
            "spearman": rho,
            "towards": None if rho is None else PREDICTORS[name].sign * rho,
            "low": ends and ends[0],
            "high": ends and ends[1],
        }
    return row


def _indicators(sets: Sequence[Subset], names: Sequence[str]) -> Array:
    """Return ``(m, l)`` whether each set holds each layer."""
    return np.array([[name in each for name in names] for each in sets], dtype=float)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
