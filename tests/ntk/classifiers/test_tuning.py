"""Tuning against an explicit loop over the classifiers, and scikit-learn."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from covering import pairs
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import log_softmax
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import KernelCenterer

from ntk.classifiers import tuning
from ntk.classifiers.asymmetric import AsymmetricRidgeClassifier, SingularSystemError
from ntk.classifiers.estimators import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
)
from ntk.classifiers.tuning import OFFSETS, REGULARISATIONS, tune
from ntk.kernels.empirical import empirical_ntk
from ntk.measures.spectrum import NotPSDError, NotSymmetricError, NumericalError
from rocoft.data.metrics import scores

N, D, M = 12, 9, 7  # Training, dev and test examples.
TRAIN, REST = slice(0, N), slice(N, None)
GRIDS = {
    "ridge": (1e-4, 0.1, 10.0),
    "asymmetric": (1e-4, 0.1, 10.0),
    "logistic": (0.1, 10.0),
    "svm": (0.1, 10.0),
}
SCALES = (0.0, 0.01, 1.0)
MACHINES = {
    "ridge": lambda alpha: KernelRidgeClassifier(alpha),
    "asymmetric": lambda alpha: AsymmetricRidgeClassifier(alpha),
    "logistic": lambda C: KernelLogisticRegression(C),
    "svm": lambda C: KernelSVC(C),
}
classes = pytest.mark.parametrize("c", [2, 3])
forms = pytest.mark.parametrize("form", ["scalar", "block"])
methods = pytest.mark.parametrize("method", GRIDS)
seeds = st.integers(0, 2**32 - 1)


def draw(form, c, *, asymmetric=False, parameters=20, seed=0):
    """Return a kernel, train and dev labels, and f0, for overlapping classes."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(c), np.arange(c), rng.integers(c, size=N + D + M - 2 * c)]
    y[: N + D] = np.r_[y[:N], rng.permutation(y[N : N + D])]
    shape = (len(y), c, parameters) if form == "block" else (len(y), parameters)
    means = rng.normal(size=(c, *shape[1:]))
    left = rng.normal(size=shape) + 0.5 * means[y]
    right = np.sign(left) if asymmetric else left
    letters = "icp,jdp->ijcd" if form == "block" else "ip,jp->ij"
    K = np.einsum(letters, left, right[:N])
    return K, y[:N], y[N : N + D], rng.normal(size=(len(y), c)) + np.eye(c)[y]


def accuracy(outputs, labels):
    return accuracy_score(labels, outputs.argmax(axis=1))


def close(actual, expected, tolerance=1e-9):
    scale = np.abs(expected).max()
    assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def margins(outputs):
    """Return decisions in the form of the classifiers' `decision_function`."""
    return outputs if outputs.shape[1] > 2 else outputs[:, 1] - outputs[:, 0]


def same(outputs, decisions):
    """Compare logits with outputs, or with margins."""
    if decisions.ndim == 1:
        decisions = np.array([[-m / 2, m / 2] for m in decisions])
    close(outputs, decisions)


def fitted(method, K, y, f0, regularisation, scale):
    """Return the decisions of one classifier, without a grid.

    Where ridge has an output for each class, all of them and not their margin.
    """
    fit, rest = {}, {}
    if scale:
        fit, rest = {"offset": scale * f0[TRAIN]}, {"offset": scale * f0[REST]}
    machine = MACHINES[method](regularisation).fit(K[:N], y, **fit)
    if method in {"ridge", "asymmetric"} and K.ndim == 4:
        return machine._logits(K[N:], rest.get("offset"))
    return machine.decision_function(K[N:], **rest)


def dev_loss(method, decisions, dev):
    """Return the dev loss of each method, from decisions."""
    c = dev.max() + 1
    if method == "svm":
        return None
    if method == "logistic":
        two = decisions.ndim == 1
        logits = np.c_[0 * decisions, decisions] if two else decisions
        return -log_softmax(logits, axis=1)[range(D), dev].mean()
    if decisions.ndim == 1:
        return ((decisions - (2 * dev - 1)) ** 2).mean()
    return ((decisions - np.eye(c)[dev]) ** 2).mean()


# ---------------------------------------------------------------- the loop it replaces


@pytest.mark.parametrize(
    ("method", "c", "form", "seed"),
    pairs(GRIDS, [2, 3], ["scalar", "block"], range(3)),
)
def test_tuning_is_a_loop_over_the_classifiers(method, c, form, seed):
    K, y, dev, f0 = draw(form, c, asymmetric=method == "asymmetric", seed=seed)
    grid, scales = GRIDS[method], SCALES if method != "svm" else (0.0,)
    given = {} if method == "svm" else {"f0": f0, "offsets": scales}
    tuned = tune(
        K, y, dev, method=method, regularisations=grid, judge=accuracy, **given
    )
    assert len(tuned.grid) == len(grid) * len(scales)
    best = None
    for point in tuned.grid:
        where = point["regularisation"], point["offset_scale"]
        alone = {"regularisations": where[:1]}
        if given:
            alone |= {"f0": f0, "offsets": where[1:]}
        single = tune(K, y, dev, method=method, judge=accuracy, **alone)
        expected = fitted(method, K, y, f0, *where)
        outputs = np.r_[single.dev, single.test]
        assert outputs.shape == (D + M, c)
        same(outputs, expected)
        score = accuracy(single.dev, dev)
        assert point["dev_score"] == single.dev_score == score
        loss = dev_loss(method, expected[:D], dev)
        if loss is not None:
            close(point["dev_loss"], loss)
        sign = -1 if method in {"ridge", "asymmetric"} else 1
        rank = (-score, loss or 0.0, sign * where[0], where[1])
        if best is None or rank < best[0]:
            best = rank, where, outputs
    assert (tuned.regularisation, tuned.offset_scale) == best[1]
    close(np.r_[tuned.dev, tuned.test], best[2])
    assert len(tuned.dev) == D


@classes
@forms
@pytest.mark.parametrize("method", ["ridge", "asymmetric"])
@given(seeds, st.sampled_from([1e-5, 1e-2, 10.0]), st.sampled_from([0.0, 1e-3, 0.7]))
def test_ridge_at_a_point_is_the_classifier(method, c, form, seed, alpha, scale):
    asymmetric = method == "asymmetric"
    # More parameters than examples: an asymmetric kernel is then far from singular.
    K, y, dev, f0 = draw(form, c, asymmetric=asymmetric, parameters=60, seed=seed)
    point = {"regularisations": [alpha], "offsets": [scale]}
    tuned = tune(K, y, dev, method=method, f0=f0, judge=accuracy, **point)
    expected = fitted(method, K, y, f0, alpha, scale)
    same(np.r_[tuned.dev, tuned.test], expected)


def test_one_decomposition_serves_the_whole_grid(monkeypatch):
    counts = {"eigensystem": 0, "ridge_solution": 0}

    def counted(name):
        function = getattr(tuning, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(tuning, name, counted(name))
    K, y, dev, f0 = draw("block", 3)
    tuned = tune(K, y, dev, f0=f0, judge=accuracy)
    assert len(tuned.grid) == len(REGULARISATIONS["ridge"]) * len(OFFSETS)
    assert counts == {"eigensystem": 1, "ridge_solution": 0}
    tuned = tune(K, y, dev, f0=f0, judge=accuracy, method="asymmetric")
    assert counts == {"eigensystem": 1, "ridge_solution": len(REGULARISATIONS["ridge"])}


@classes
@forms
def test_asymmetric_on_a_symmetric_kernel_is_ridge(c, form):
    K, y, dev, f0 = draw(form, c)
    ridge = tune(K, y, dev, f0=f0, judge=accuracy)
    other = tune(K, y, dev, f0=f0, judge=accuracy, method="asymmetric")
    assert (other.regularisation, other.offset_scale) == (
        ridge.regularisation,
        ridge.offset_scale,
    )
    close(other.test, ridge.test)
    for p, q in zip(ridge.grid, other.grid, strict=True):
        close(list(q.values()), list(p.values()), 1e-7)


def test_f1_chooses_another_point_than_accuracy():
    def f1(outputs, labels):
        return f1_score(labels, outputs.argmax(axis=1), zero_division=0.0)

    differ, grid = 0, {"regularisations": (1e-4, 1e-2, 1.0), "offsets": (0.0, 1.0)}
    for seed in range(10):
        K, y, dev, f0 = draw("scalar", 2, parameters=3, seed=seed)
        by_accuracy = tune(K, y, dev, f0=f0, judge=accuracy, **grid)
        by_f1 = tune(K, y, dev, f0=f0, judge=f1, **grid)
        assert by_f1.dev_score == max(point["dev_score"] for point in by_f1.grid)
        assert by_f1.dev_score == f1(by_f1.dev, dev)
        differ += not np.array_equal(by_f1.dev, by_accuracy.dev)
    assert differ


# ---------------------------------------------------------------- scikit-learn


@classes
def test_ridge_is_sklearn_ridge_classifier_on_the_features(c):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N + D + M, 5))
    y = np.r_[np.arange(c), rng.integers(c, size=N + D + M - c)]
    y[N : N + c] = np.arange(c)
    centred = KernelCenterer().fit(x[:N] @ x[:N].T)
    K = np.r_[centred.transform(x[:N] @ x[:N].T), centred.transform(x[N:] @ x[:N].T)]
    ridge = 0.3 * np.trace(K[:N]) / N
    reference = RidgeClassifier(alpha=ridge).fit(x[:N], y[:N])
    expected = reference.decision_function(x[N:])
    dev = y[N : N + D]
    tuned = tune(K, y[:N], dev, regularisations=[0.3], judge=accuracy)
    outputs = np.r_[tuned.dev, tuned.test]
    # For several classes its targets are +-1 and ours one-hot.
    close(margins(outputs) if c == 2 else 2 * outputs - 1, expected)
    assert_array_equal(outputs.argmax(axis=1), reference.predict(x[N:]))


@classes
def test_ridge_from_f0_is_sklearn_ridge_on_the_features(c):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N + D + M, 5)), np.arange(N + D + M) % c
    f0, K = rng.normal(size=(N + D + M, c)), x @ x[:N].T
    ridge = 0.3 * np.trace(K[:N]) / N
    targets, start = np.eye(c)[y], 0.1 * f0
    if c == 2:
        targets, start = 2.0 * y - 1, start[:, 1] - start[:, 0]
    reference = Ridge(alpha=ridge, fit_intercept=False)
    reference.fit(x[:N], targets[:N] - start[:N])
    tuned = tune(
        K,
        y[:N],
        y[N : N + D],
        f0=f0,
        offsets=[0.1],
        regularisations=[0.3],
        judge=accuracy,
    )
    close(margins(np.r_[tuned.dev, tuned.test]), reference.predict(x[N:]) + start[N:])


# ---------------------------------------------------------------- regression


def pearson(outputs, labels):
    return scores(outputs, labels, ("pearson",))["pearson"]


@given(seeds, st.sampled_from([1e-4, 0.1, 10.0]))
def test_regression_is_sklearn_kernel_ridge(seed, alpha):
    K, *_ = draw("scalar", 2, seed=seed)
    rng = np.random.default_rng(seed)
    y, f0 = 5 * rng.random(N + D), rng.normal(size=(N + D + M, 1))
    reference = KernelRidge(alpha=alpha * np.trace(K[:N]) / N, kernel="precomputed")
    tuned = tune(
        K, y[:N], y[N:], regularisations=[alpha], judge=pearson, regression=True
    )
    mean = y[:N].mean()
    expected = reference.fit(K[:N], y[:N] - mean).predict(K[N:]) + mean
    assert tuned.dev.shape == (D, 1)
    close(np.r_[tuned.dev, tuned.test][:, 0], expected)
    assert tuned.dev_score == pearson(tuned.dev, y[N:])
    close(tuned.grid[0]["dev_loss"], ((expected[:D] - y[N:]) ** 2).mean())
    from_f0 = tune(
        K,
        y[:N],
        y[N:],
        f0=f0,
        offsets=[0.5],
        regularisations=[alpha],
        judge=pearson,
        regression=True,
    )
    r = y[:N] - 0.5 * f0[:N, 0]
    expected = reference.fit(K[:N], r).predict(K[N:]) + 0.5 * f0[N:, 0]
    close(np.r_[from_f0.dev, from_f0.test][:, 0], expected)


def test_regression_chooses_by_correlation():
    K, *_ = draw("scalar", 2, parameters=4)
    y = np.random.default_rng(0).normal(size=N + D)
    for method in ("ridge", "asymmetric"):
        tuned = tune(K, y[:N], y[N:], judge=pearson, method=method, regression=True)
        result = [point["dev_score"] for point in tuned.grid]
        assert tuned.dev_score == max(result) > min(result)


# ---------------------------------------------------------------- ties


def test_points_that_score_alike_are_told_apart_by_their_loss():
    K, y, dev, f0 = draw("scalar", 3, parameters=60)
    for method in ("ridge", "asymmetric", "logistic"):
        tuned = tune(K, y, dev, f0=f0, method=method, judge=lambda f, labels: 0.5)
        losses = [point["dev_loss"] for point in tuned.grid]
        chosen = tuned.grid[int(np.argmin(losses))]
        assert len(set(losses)) == len(losses)
        assert tuned.regularisation == chosen["regularisation"]
        assert tuned.offset_scale == chosen["offset_scale"]


@methods
def test_points_that_are_alike_choose_the_strongest_and_no_offset(method):
    # Orthogonal to the training examples, the others get the constant at every point.
    K = np.r_[np.eye(4), np.zeros((5, 4))]
    y, dev = np.array([0, 1, 0, 1]), np.array([1, 0])
    grid = GRIDS[method]
    given = {} if method == "svm" else {"f0": np.zeros((9, 2)), "offsets": SCALES}
    tuned = tune(
        K, y, dev, method=method, regularisations=grid, judge=accuracy, **given
    )
    strongest = max(grid) if method in {"ridge", "asymmetric"} else min(grid)
    assert (tuned.regularisation, tuned.offset_scale) == (strongest, 0.0)
    assert tuned.test.shape == (3, 2)


@methods
@given(st.data())
def test_order_and_repetition_of_the_grid_do_not_matter(method, data):
    K, y, dev, f0 = draw("scalar", 3, parameters=3, asymmetric=method == "asymmetric")
    fixed = {"method": method, "judge": accuracy}
    grid = list(GRIDS[method])
    mixed = data.draw(st.permutations([*grid, grid[0]]))
    one, other = {"regularisations": grid}, {"regularisations": mixed}
    if method != "svm":
        one |= {"f0": f0, "offsets": SCALES}
        other |= {"f0": f0, "offsets": data.draw(st.permutations(SCALES))}
    expected = tune(K, y, dev, **fixed, **one)
    result = tune(K, y, dev, **fixed, **other)
    assert result.grid == expected.grid
    assert result.regularisation == expected.regularisation
    assert result.offset_scale == expected.offset_scale
    assert_array_equal(result.test, expected.test)


def test_scores_equal_up_to_rounding_are_ties():
    # The correlation of multiples is the same up to rounding.
    K = np.r_[np.eye(3), np.eye(3), np.eye(3)]
    y = np.array([0.3, -0.5, 0.2])
    tuned = tune(K, y, -y + 0.1, judge=pearson, regression=True)
    result = [point["dev_score"] for point in tuned.grid]
    assert max(result) - min(result) < 1e-12
    # Anticorrelated: the smaller the outputs, the smaller the error.
    assert tuned.regularisation == max(REGULARISATIONS["ridge"])


def test_losses_equal_up_to_rounding_are_ties():
    K, y, *_ = draw("scalar", 2)
    K = np.r_[K[:N], K[:N]]
    tuned = tune(K, y, y, regularisations=[1e11, 1e12, 1e13], judge=accuracy)
    losses = [point["dev_loss"] for point in tuned.grid]
    assert losses[0] < losses[1] < losses[2] < losses[0] * (1 + 1e-10)
    assert len({point["dev_score"] for point in tuned.grid}) == 1
    assert tuned.regularisation == 1e13


# ---------------------------------------------------------------- a model


@pytest.mark.parametrize("kind", ["sgd", "asymmetric_signgd"])
@pytest.mark.parametrize("reduce", ["full", "margin"])
def test_tuning_on_the_kernel_of_a_model(kind, reduce, bert):
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(5, 60, size=(10, 6)))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        f0 = bert(**inputs).logits.double().numpy()
    K = empirical_ntk(bert, inputs, reduce=reduce, kind=kind)
    # Dev equals train, so the labels must be reached.
    rows = np.r_[np.arange(10), np.arange(10), np.arange(4)]
    y = np.arange(10) % 2
    tuned = tune(
        K[torch.tensor(rows)],
        y,
        y,
        f0=f0[rows],
        regularisations=[1e-9, 1e9],
        method="asymmetric" if kind == "asymmetric_signgd" else "ridge",
        judge=lambda f, labels: scores(f, labels, ("accuracy",))["accuracy"],
    )
    assert tuned.dev_score == 1.0
    assert tuned.regularisation == 1e-9
    assert_allclose(margins(tuned.dev), 2.0 * y - 1, atol=1e-3)
    close(tuned.test, tuned.dev[:4])
    # With the strongest ridge nothing is learnt: the outputs are f0.
    still = tune(
        K[torch.tensor(rows)],
        y,
        y,
        f0=f0[rows],
        offsets=[0.1],
        regularisations=[1e12],
        judge=accuracy,
        method="asymmetric",
    )
    close(margins(still.dev), 0.1 * (f0[:, 1] - f0[:, 0]), 1e-6)


def test_grid_is_json_and_results_are_frozen():
    K, y, dev, f0 = draw("scalar", 2)
    for method in GRIDS:
        tuned = tune(K, y, dev, method=method, judge=accuracy)
        assert json.loads(json.dumps(tuned.grid)) == tuned.grid
        values = [point["regularisation"] for point in tuned.grid]
        assert values == list(REGULARISATIONS[method])
        assert {point["offset_scale"] for point in tuned.grid} == {0.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        tuned.dev_score = 1.0


def test_no_test_examples_and_a_reversed_read_only_kernel():
    K, y, dev, _ = draw("block", 3)
    tuned = tune(K[: N + D], y, dev, judge=accuracy)
    assert tuned.test.shape == (0, 3)
    other = K[:, ::-1].copy()[:, ::-1]
    other.flags.writeable = False
    close(tune(other, y, dev, judge=accuracy).dev, tuned.dev)


# ---------------------------------------------------------------- errors


def test_errors_of_shapes_and_values():
    K, y, dev, f0 = draw("block", 3)
    flat = np.einsum("nmcc->nm", K)
    nan = flat.copy()
    nan[2, 3] = np.nan
    total = len(K)
    for bad, message in [
        (
            {"kernel": flat[:, :-1]},
            rf"`kernel` has shape \({total}, {N - 1}\).*columns",
        ),
        ({"kernel": flat[: N + D - 1]}, rf"expected \({N + D}, {N}\) or"),
        ({"kernel": K[..., 0]}, rf"expected .* or \({N + D}, {N}, 3, 3\), or of"),
        ({"kernel": K[..., :1, :1]}, r"`kernel` has shape"),
        ({"kernel": nan}, "`kernel` has 1 of .* NaN or Inf"),
        ({"labels_dev": dev[:0]}, r"`labels_dev` has shape \(0,\).*one or more"),
        ({"labels_dev": dev + 1}, r"`labels_dev` holds class 3; expected .* 0 to 2"),
        ({"labels_train": np.zeros(N, int)}, r"`labels_train` holds the classes \[0\]"),
        ({"labels_train": 2 * (y > 0)}, r"holds the classes \[0, 2\]; expected"),
        ({"labels_train": y / 2}, "`labels_train` has dtype float64.*regression=True"),
        ({"labels_dev": dev - 1}, "`labels_dev` has dtype int64 and holds .*-1"),
        ({"f0": f0[:, :2]}, rf"`f0` has shape \({total}, 2\); expected \({total}, 3\)"),
        ({"f0": f0[:-1]}, rf"`f0` has shape \({total - 1}, 3\)"),
        ({"f0": np.full_like(f0, np.inf)}, "`f0` has .* NaN or Inf"),
        ({"offsets": [0.1]}, "`offsets=.*` is given without `f0`"),
        ({"f0": f0, "offsets": []}, r"`offsets=\[\]`; expected finite"),
        ({"f0": f0, "offsets": [-0.1]}, r"`offsets=\[-0\.1\]`; expected finite"),
        ({"regularisations": []}, r"`regularisations=\[\]`; expected positive"),
        ({"regularisations": [0.0]}, r"`regularisations=\[0\.0\]`; expected positive"),
        ({"method": "knn"}, "`method='knn'` is unknown; expected one of ridge, asymm"),
        ({"method": "svm", "f0": f0}, "`f0` is given; expected None. An SVM"),
        ({"method": "svm", "regression": True}, "`method='svm'` classifies; expected"),
        ({"regression": True}, rf"`kernel` has shape .* expected \({N + D}, {N}\), or"),
        ({"kernel": -flat}, "`kernel` has mean diagonal -"),
    ]:
        arguments = {"kernel": K, "labels_train": y, "labels_dev": dev} | bad
        with pytest.raises(ValueError, match=message):
            tune(**arguments, judge=accuracy)


def test_errors_of_numbers_have_their_types():
    K, y, dev, _ = draw("scalar", 3)
    skew, indefinite = K.copy(), K.copy()
    skew[0, 1] += 1.0
    indefinite[:N] -= 2 * np.abs(K).max() * np.eye(N) * (np.arange(N) == 3)
    for method in ("ridge", "logistic", "svm"):
        with pytest.raises(NotSymmetricError):
            tune(skew, y, dev, method=method, judge=accuracy)
        with pytest.raises(NotPSDError):
            tune(indefinite, y, dev, method=method, judge=accuracy)
    with pytest.raises(NumericalError):
        tune(K * np.inf, y, dev, judge=accuracy)
    singular = np.r_[[[1.0, 2.0], [2.0, 1.0]], np.eye(2)]
    with pytest.raises(SingularSystemError):
        tune(singular, [0, 1], [0], method="asymmetric", judge=accuracy)


def test_a_score_that_is_no_number_is_an_error():
    K, y, dev, _ = draw("scalar", 2)
    with pytest.raises(ValueError, match="`judge` returned nan at .*=1e-06"):
        tune(K, y, dev, judge=lambda f, labels: float("nan"))
