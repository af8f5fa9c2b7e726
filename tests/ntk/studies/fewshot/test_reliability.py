"""The reliability of fine-tuning: on records and on scores of known variances."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from ntk.reporting import select
from ntk.studies.fewshot.reliability import reliability, variances

FIGURES = Path(__file__).parents[4] / "figures"

TABLE = [
    ("fewshot", [], 0.76, 0.84, (0.27, 1.33), 0.013, 2.65, 0.48),
    ("fewshot", ["head"], 0.34, 0.0, (0.0, 0.78), 0.72, 2.84, 0.07),
    ("fewshot-64", [], 1.17, 0.46, (0.0, 0.92), 0.08, 1.47, 0.79),
    ("fewshot-64", ["head"], 0.76, 0.0, (0.0, 0.71), 0.53, 1.53, 0.55),
]
"""Records, methods left out, and an independent analysis of them."""


@pytest.mark.parametrize(
    ("name", "without", "method", "both", "interval", "p", "residual", "reliable"),
    TABLE,
)
def test_the_records_have_the_reliability_that_was_found_apart(
    name, without, method, both, interval, p, residual, reliable
):
    summary = json.loads((FIGURES / f"{name}.json").read_text())
    row = reliability(summary["tuned"], without=without)
    close = lambda value: pytest.approx(value, abs=0.0051)
    assert row["method"] == close(method)
    assert row["task_method"] == close(both)
    assert (row["low"], row["high"]) == (close(interval[0]), close(interval[1]))
    assert row["p_value"] == close(p)
    assert row["residual"] == close(residual)
    assert row["reliability"] == close(reliable)
    assert row["splits"] == 5


def drawn(generator, tasks=8, splits=5, methods=6, method=0.8, both=1.5, noise=2.5):
    """Return scores with normal effects, in points, above levels of the splits."""
    normal = lambda *shape: generator.normal(size=shape) / 100
    return (
        0.6
        + 10 * normal(tasks, splits, 1)
        + method * normal(1, 1, methods)
        + both * normal(tasks, 1, methods)
        + noise * normal(tasks, splits, methods)
    )


def test_known_variances_are_found():
    generator = np.random.default_rng(0)
    found = [variances(drawn(generator)) for _ in range(1000)]
    mean = lambda name: np.sqrt(np.mean([row[name] ** 2 for row in found]))
    assert mean("residual") == pytest.approx(2.5, rel=0.02)
    assert mean("task_method") == pytest.approx(1.5, rel=0.05)
    assert mean("method") == pytest.approx(0.8, rel=0.1)
    covered = np.mean([row["low"] <= 1.5 <= row["high"] for row in found])
    assert 0.94 < covered < 0.99


def test_the_test_is_right_where_there_is_nothing():
    generator = np.random.default_rng(1)
    rows = [variances(drawn(generator, both=0.0)) for _ in range(1000)]
    p = [row["p_value"] for row in rows]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_reliability_is_the_agreement_of_two_sets_of_splits():
    generator = np.random.default_rng(2)
    values = drawn(generator, tasks=400, splits=10)
    row = variances(values[:, :5])
    contrasts = values - values.mean(axis=2, keepdims=True)
    halves = [
        contrasts[:, part].mean(axis=1).ravel()
        for part in ([*range(5)], [5, 6, 7, 8, 9])
    ]
    assert row["reliability"] == pytest.approx(np.corrcoef(*halves)[0, 1], abs=0.05)


def test_what_is_not_complete_is_left_out():
    values = drawn(np.random.default_rng(3), tasks=3, splits=3, methods=2)
    rows = [
        {
            "task": task,
            "method": method,
            "seeds": [1, 2, 3],
            "test": {"values": values[t, :, m].tolist()},
        }
        for t, task in enumerate("abc")
        for m, method in enumerate(("full", "head"))
    ]
    assert reliability(rows)["tasks"] == ["a", "b", "c"]
    rows[0]["test"]["values"][1] = None
    row = reliability(rows)
    assert row["tasks"] == ["b", "c"]
    expected = variances(values[1:])
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert reliability(rows, without=["head"]) is None
    assert reliability(select(rows, task="b")) is None
    assert reliability([]) is None
