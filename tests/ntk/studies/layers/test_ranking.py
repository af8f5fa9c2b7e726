"""What ranks sets of layers without a kernel: on the records and on known effects."""

import json
from pathlib import Path

import numpy as np
import pytest

from ntk.studies.layers.correlation import rank_correlation
from ntk.studies.layers.ranking import (
    TunedSets,
    add_static,
    correlated,
    static_scores,
)

FIGURES = Path(__file__).parents[4] / "figures"
SIGNS = {"condition number": -1, "mean layer": -1, "other tasks": 1}


@pytest.fixture(scope="module")
def recorded():
    """The sets of the committed study, their predictors as means over splits."""
    summary = json.loads((FIGURES / "layers.json").read_text())
    by_task = {}
    for task in summary["tasks"]:
        rows = [row for row in summary["subsets"] if row["task"] == task]
        layers = [tuple(row["layers"]) for row in rows]
        # Equal means are equal there, and equal up to rounding of values here.
        scores = np.array([[row["score"]["mean"]] for row in rows])
        wide = lambda values, like=scores: np.repeat(
            np.array(values, dtype=float)[:, None], like.shape[1], axis=1
        )
        predictors = {
            "condition number": wide(
                [row["predictors"]["condition number"] for row in rows]
            ),
            "parameters": wide([row["predictors"]["parameters"] for row in rows]),
            "mean layer": wide([np.mean([int(n) for n in each]) for each in layers]),
        }
        by_task[task] = TunedSets(layers, predictors, scores)
    add_static(by_task)
    return by_task


def test_depth_and_other_tasks_rank_the_recorded_sets_nearly_as_well(recorded):
    """An independent analysis of the records has the same figures."""
    plain, beyond = {}, {}
    for name, sign in SIGNS.items():
        plain[name] = np.mean(
            [
                sign * rank_correlation(tuned.predictors[name], tuned.scores)
                for tuned in recorded.values()
            ]
        )
    assert plain["condition number"] == pytest.approx(0.82, abs=0.005)
    assert plain["mean layer"] == pytest.approx(0.74, abs=0.005)
    assert plain["other tasks"] == pytest.approx(0.78, abs=0.005)
    for control in ("mean layer", "other tasks"):
        beyond[control] = -np.mean(
            [
                rank_correlation(
                    tuned.predictors["condition number"],
                    tuned.scores,
                    tuned.predictors[control],
                )
                for tuned in recorded.values()
            ]
        )
    assert beyond["mean layer"] == pytest.approx(0.57, abs=0.005)
    # 0.42 there, whose least squares may differ in detail.
    assert beyond["other tasks"] == pytest.approx(0.42, abs=0.02)


def drawn(generator, effects, sets=20, level=0.7):
    names = [str(i) for i in range(len(effects))]
    inside = generator.random((sets, len(names))) < 0.5
    inside[:, 0] |= ~inside.any(axis=1)
    layers = [tuple(n for n, i in zip(names, row, strict=True) if i) for row in inside]
    return TunedSets(layers, {}, (level + inside @ effects)[:, None] * np.ones(2))


def test_effects_that_tasks_share_are_found():
    """Levels and scales of tasks do not matter, and the own task is not looked at."""
    generator = np.random.default_rng(0)
    effects = generator.normal(size=5) / 100
    by_task = {
        name: drawn(generator, scale * effects, level=level)
        for name, scale, level in (("a", 1, 0.5), ("b", 3, 0.9), ("c", -2, 0.7))
    }
    predicted = static_scores(by_task["a"].layers, [by_task["b"]])
    found = np.corrcoef(predicted, by_task["a"].scores[:, 0])[0, 1]
    assert found == pytest.approx(1.0)
    # The scores of c are turned round.
    add_static(by_task)
    rho = rank_correlation(by_task["c"].predictors["other tasks"], by_task["c"].scores)
    assert rho < -0.95


def test_one_task_has_no_other_tasks():
    generator = np.random.default_rng(1)
    tuned = drawn(generator, generator.normal(size=4))
    tuned.predictors["trace"] = generator.normal(size=tuned.scores.shape)
    by_task = {"a": tuned, "b": TunedSets([], {}, np.empty((0, 2)))}
    add_static(by_task)
    assert set(tuned.predictors) == {"trace"}
    row, mean = correlated(by_task)
    assert row["task"] == "a"
    assert mean["task"] is None
    assert row["beyond_static"]["spearman"] is row["beyond_static"]["low"] is None
    assert row["plain"]["spearman"] == mean["plain"]["spearman"]
