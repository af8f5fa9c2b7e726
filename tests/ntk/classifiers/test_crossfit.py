"""Out-of-fold choice of hyperparameters against loops over folds and grids."""

import numpy as np
import pytest
from covering import pairs
from numpy.testing import assert_allclose
from sklearn.model_selection import StratifiedKFold

from ntk.classifiers.crossfit import Fold, cross_fit
from ntk.classifiers.estimators import (
    CS,
    KernelLogisticRegression,
    KernelRidgeClassifier,
)
from ntk.measures.gram import contrasts

N = 24


def accuracy(outputs, labels):
    return float((outputs.argmax(axis=1) == labels).mean())


def draw(c, count=3, seed=0):
    """Return labels and a kernel of contrasts and outputs of its own for each fold."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(N) % c)
    Q, folds = contrasts(c).numpy(), []
    for _, held in StratifiedKFold(count, shuffle=True, random_state=0).split(y, y):
        J = rng.normal(size=(N, c, 9)) + np.eye(c)[y][:, :, None]
        K = np.einsum("ncp,mdp,ca,db->nmab", J, J, Q, Q)
        f0 = rng.normal(size=(N, c)) + np.eye(c)[y]
        folds.append(Fold(tuple(held), K, f0 - f0.mean(axis=1, keepdims=True)))
    return y, folds


@pytest.mark.parametrize(
    ("method", "c", "offset"), pairs(["ridge", "logistic"], [2, 3], [False, True])
)
def test_it_is_a_loop_over_folds_and_grid(method, c, offset):
    y, folds = draw(c)
    grid = [1e-2, 1.0, 1e2]
    Q = contrasts(c).numpy()
    outputs, losses = {}, {}
    for value in grid:
        outputs[value], losses[value] = np.zeros((N, c)), np.zeros(N)
        for fold in folds:
            rest = [i for i in range(N) if i not in fold.held]
            held = list(fold.held)
            machine = {
                "ridge": KernelRidgeClassifier(value),
                "logistic": KernelLogisticRegression(value),
            }[method]
            start = {"offset": fold.f0[rest]} if offset else {}
            machine.fit(fold.kernel[np.ix_(rest, rest)], y[rest], **start)
            start = {"offset": fold.f0[held]} if offset else {}
            K = fold.kernel[np.ix_(held, rest)]
            outputs[value][held] = machine._logits(K, start.get("offset"))
            if method == "ridge":
                squares = ((outputs[value][held] - np.eye(c)[y[held]]) @ Q) ** 2
                losses[value][held] = squares.mean(axis=1)
            else:
                p = machine.predict_proba(K, **start)
                losses[value][held] = -np.log(p[range(len(held)), y[held]])

    def best(rows):
        return max(
            grid,
            key=lambda v: (
                accuracy(outputs[v][rows], y[rows]),
                -losses[v][rows].mean(),
            ),
        )

    found = cross_fit(
        folds, y, judge=accuracy, method=method, offset=offset, regularisations=grid
    )
    assert found.regularisation == best(list(range(N)))
    expected = np.zeros((N, c))
    for fold in folds:
        others = [i for i in range(N) if i not in fold.held]
        expected[list(fold.held)] = outputs[best(others)][list(fold.held)]
    assert_allclose(found.outputs, expected, rtol=1e-6, atol=1e-8)
    assert found.score == accuracy(expected, y)


def test_labels_that_only_the_head_has_seen_are_not_learnt():
    """A kernel that holds the labels it was fitted to, and nothing of the others."""
    rng = np.random.default_rng(1)
    y = np.arange(200) % 2
    folds, scores = [], []
    for _, held in StratifiedKFold(2, shuffle=True, random_state=0).split(y, y):
        x = rng.normal(size=(len(y), 3))
        seen = np.delete(np.arange(len(y)), held)
        x[seen, 0] = 5 * (2 * y[seen] - 1)
        folds.append(Fold(tuple(held), (x @ x.T)[..., None, None], np.zeros((200, 2))))
        x[:, 0] = 5 * (2 * y - 1)
        scores.append(KernelRidgeClassifier().fit(x @ x.T, y).loo_accuracy_)
    assert min(scores) == 1.0
    found = cross_fit(folds, y, judge=accuracy)
    assert abs(found.score - 0.5) < 3 * 0.5 / np.sqrt(200)


def test_each_example_must_be_held_out_once():
    y, folds = draw(2)
    with pytest.raises(ValueError, match=r"hold out 16 .* each of the 24 once"):
        cross_fit(folds[:2], y, judge=accuracy)
    with pytest.raises(ValueError, match=r"hold out 24 examples, 16 of them distinct"):
        cross_fit([folds[0], folds[0], folds[1]], y, judge=accuracy)


def test_the_score_of_a_choice_is_no_better_than_chance_on_noise():
    """The best of a grid of scores would be."""
    scores, best = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        y, x = np.arange(32) % 2, rng.normal(size=(32, 40))
        folds = [
            Fold(tuple(held), (x @ x.T)[..., None, None], np.zeros((32, 2)))
            for _, held in StratifiedKFold(2, shuffle=True, random_state=seed).split(
                y, y
            )
        ]
        found = cross_fit(folds, y, judge=accuracy, method="svm")
        scores.append(found.score)
        single = [
            cross_fit(folds, y, judge=accuracy, method="svm", regularisations=[C]).score
            for C in CS
        ]
        best.append(max(single))
    error = np.std(scores, ddof=1) / len(scores) ** 0.5
    assert abs(np.mean(scores) - 0.5) < 3 * error
    assert np.mean(best) > np.mean(scores)
