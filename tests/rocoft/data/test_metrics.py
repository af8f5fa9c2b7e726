"""Metrics against their definitions written out."""

import math

import numpy as np
import pytest

from rocoft.data.metrics import metric_names, scores, text_scores

LABELS = np.array([0, 1, 1, 0, 1, 1, 0, 1])
GUESSES = np.array([0, 1, 0, 1, 1, 1, 0, 1])
LOGITS = np.eye(2)[GUESSES] * 3 - 1


def test_metrics_of_the_glue_tasks():
    assert metric_names("mrpc", regression=False) == ("f1", "accuracy")
    assert metric_names("cola", regression=False)[0] == "matthews_correlation"
    assert metric_names("sst2", regression=False) == ("accuracy",)
    assert metric_names("stsb", regression=True) == ("pearson", "spearman")


def test_classification_by_counting():
    found = scores(LOGITS, LABELS, ("accuracy", "f1", "matthews_correlation"))
    hit, miss, false, right = 4, 1, 1, 2  # of label 1, and of label 0
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * hit / (2 * hit + miss + false))
    product = (hit + false) * (hit + miss) * (right + false) * (right + miss)
    expected = (hit * right - false * miss) / math.sqrt(product)
    assert found["matthews_correlation"] == pytest.approx(expected, rel=1e-12)


def test_regression_by_the_formulas():
    x, y = np.array([0.1, 2.0, 1.5, 4.0, 2.0]), np.array([0.0, 2.5, 1.0, 3.0, 5.0])
    found = scores(x[:, None], y, ("pearson", "spearman"))

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    assert found["pearson"] == pytest.approx(correlation(x, y), rel=1e-12)
    ranks = np.array([1, 3.5, 2, 5, 3.5]), np.array([1, 3, 2, 4, 5.0])
    assert found["spearman"] == pytest.approx(correlation(*ranks), rel=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_correlates_with_nothing(name):
    assert scores(np.ones((3, 1)), np.arange(3.0), (name,)) == {name: 0.0}


def test_a_constant_class_correlates_with_nothing():
    names = ("matthews_correlation", "f1")
    found = scores(np.tile([1.0, 0.0], (8, 1)), LABELS, names)
    assert found == {"matthews_correlation": 0.0, "f1": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_worst(bad):
    logits = LOGITS.copy()
    logits[3, 1] = bad
    assert scores(logits, LABELS, ("accuracy",)) == {"accuracy": -math.inf}


def test_unknown_metric():
    with pytest.raises(ValueError, match="metrics bleu are unknown. Choose from accur"):
        scores(LOGITS, LABELS, ("bleu",))


def test_texts():
    found = text_scores(
        ["The big  Dog.", "a red cat", "", "one two two"],
        ["big dog", "red cat sat", "an", "two one"],
    )
    assert found["exact_match"] == 2 / 4
    expected = (1 + 2 * 2 / (2 + 3) + 1 + 2 * 2 / (3 + 2)) / 4
    assert found["token_f1"] == pytest.approx(expected)
