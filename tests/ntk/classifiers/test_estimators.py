"""Kernel classifiers against scikit-learn, brute force and algebra."""

import warnings

import numpy as np
import pytest
import torch
from covering import pairs
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax
from sklearn import config_context
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from ntk.classifiers.estimators import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
)
from ntk.measures.gram import contrasts
from ntk.measures.spectrum import NotPSDError, NotSymmetricError

FIXED = {
    "ridge": KernelRidgeClassifier(alpha=0.1),
    "logistic": KernelLogisticRegression(C=3.0),
    "svc": KernelSVC(C=3.0),
}
CHOSEN = {
    "ridge": KernelRidgeClassifier(),
    "logistic": KernelLogisticRegression(Cs=(0.01, 1.0, 100.0)),
    "svc": KernelSVC(Cs=(0.01, 1.0, 100.0)),
}
machines = pytest.mark.parametrize("machine", FIXED.values(), ids=FIXED)
choosing = pytest.mark.parametrize("machine", CHOSEN.values(), ids=CHOSEN)
offsetting = pytest.mark.parametrize("name", ["ridge", "logistic"])
classes = pytest.mark.parametrize("c", [2, 3])


def draw(c, *, n=24, m=15, features=6, seed=0):
    """Return train X, y and test X, y of c noisy, unbalanced classes."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(c), np.arange(c), rng.integers(c, size=n + m - 2 * c)]
    means = 1.5 * rng.normal(size=(c, features))
    x = means[y] + rng.normal(size=(n + m, features))
    return x[:n], y[:n], x[n:], y[n:]


def draw_block(c, *, n=18, m=9, parameters=40, seed=0):
    """Return coupled block kernels of random Jacobians, and labels they can learn."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(c, c))
    jacobian = np.einsum("cd,ndp->ncp", mix, rng.normal(size=(n + m, c, parameters)))
    y = (jacobian @ rng.normal(size=parameters)).argmax(axis=1)
    y[: 2 * c] = np.tile(np.arange(c), 2)
    K = np.einsum("ncp,mdp->nmcd", jacobian, jacobian)
    return K[:n, :n], y[:n], K[n:, :n], y[n:]


def contrasted(K):
    """Return Q^T K Q of a block kernel, by its definition."""
    Q = contrasts(K.shape[2]).numpy()
    return np.einsum("nmcd,ca,db->nmab", K, Q, Q)


def kernels(form, c, seed=0):
    if form == "block":
        return draw_block(c, seed=seed)
    if form == "contrasts":
        K, y, K_test, y_test = draw_block(c, seed=seed)
        return contrasted(K), y, contrasted(K_test), y_test
    x, y, x_test, y_test = draw(c, seed=seed)
    return x @ x.T, y, x_test @ x.T, y_test


def gram(K):
    n, m, c, d = K.shape
    return K.transpose(0, 2, 1, 3).reshape(n * c, m * d)


def kron(K, c):
    return np.einsum("nm,cd->nmcd", K, np.eye(c))


# ---------------------------------------------------------------- ridge


@classes
def test_ridge_is_sklearn_kernel_ridge_on_centred_targets(c):
    K, y, K_test, _ = kernels("scalar", c)
    targets = np.eye(3)[y] if c == 3 else 2.0 * y - 1
    machine = KernelRidgeClassifier(alpha=0.3).fit(K, y)
    reference = KernelRidge(alpha=0.3 * np.trace(K) / len(K), kernel="precomputed")
    reference.fit(K, targets - targets.mean(axis=0))
    expected = reference.predict(K_test) + targets.mean(axis=0)
    assert_allclose(machine.decision_function(K_test), expected, rtol=1e-9, atol=1e-12)


def test_ridge_with_offset_is_sklearn_ridge_on_explicit_features():
    x, y, x_test, _ = draw(3)
    f0, f0_test = np.sin(x[:, :3]), np.sin(x_test[:, :3])
    machine = KernelRidgeClassifier(alpha=0.3).fit(x @ x.T, y, offset=f0)
    reference = Ridge(alpha=0.3 * (x**2).sum() / len(x), fit_intercept=False)
    expected = reference.fit(x, np.eye(3)[y] - f0).predict(x_test) + f0_test
    result = machine.decision_function(x_test @ x.T, offset=f0_test)
    assert_allclose(result, expected, rtol=1e-9, atol=1e-12)


@classes
def test_block_ridge_is_the_dense_solution(c):
    K, y, K_test, _ = draw_block(c)
    targets, G = np.eye(c)[y], gram(K)
    ridge = 0.05 * np.trace(G) / len(G)
    mean = targets.mean(axis=0)
    a = np.linalg.solve(G + ridge * np.eye(len(G)), (targets - mean).ravel())
    f = (gram(K_test) @ a).reshape(-1, c) + mean
    machine = KernelRidgeClassifier(alpha=0.05).fit(K, y)
    expected = f if c == 3 else f[:, 1] - f[:, 0]
    assert_allclose(machine.decision_function(K_test), expected, rtol=1e-9, atol=1e-12)
    assert_array_equal(machine.predict(K_test), f.argmax(axis=1))


@classes
@pytest.mark.parametrize("form", ["scalar", "block", "contrasts"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_leave_one_out_is_brute_force(form, c, with_offset):
    K, y, *_ = kernels(form, c)
    y = np.random.default_rng(0).permutation(y)  # hard: some predictions are wrong
    f0 = np.random.default_rng(1).normal(size=(len(y), c)) if with_offset else None
    machine = KernelRidgeClassifier(alpha=0.02).fit(K, y, offset=f0)
    targets = np.eye(c)[y]
    squares, right = [], []
    for i in range(len(y)):
        rest = np.delete(np.arange(len(y)), i)
        inner = K[np.ix_(rest, rest)]
        square = inner if form == "scalar" else gram(inner)
        alpha = (
            0.02 * machine.scale_ * len(square) / np.trace(square)
        )  # the same absolute ridge
        fold = KernelRidgeClassifier(alpha=alpha)
        fold.fit(inner, y[rest], offset=None if f0 is None else f0[rest])
        held_out = K[np.ix_([i], rest)]
        offset = None if f0 is None else f0[[i]]
        right.append(fold.predict(held_out, offset=offset)[0] == y[i])
        f = fold._logits(held_out, offset)[0]
        miss = fold.outputs_.encoded(targets[i] - f)
        squares.append(miss**2)
    assert_allclose(machine.loo_error_, np.mean(squares), rtol=1e-9)
    assert_allclose(machine.loo_accuracy_, np.mean(right), rtol=1e-12)
    assert 0 < machine.loo_accuracy_ < 1


@pytest.mark.parametrize("form", ["scalar", "block"])
def test_ridge_chooses_the_smallest_leave_one_out_error(form):
    K, y, *_ = kernels(form, 3)
    alphas = [1e-3, 1e-1, 10.0, 1e3]
    errors = [KernelRidgeClassifier(alpha=a).fit(K, y).loo_error_ for a in alphas]
    machine = KernelRidgeClassifier(alphas=alphas[::-1]).fit(K, y)
    assert machine.alpha_ == alphas[int(np.argmin(errors))]
    assert machine.loo_error_ == min(errors)


def test_equal_leave_one_out_errors_choose_the_largest_alpha():
    # Orthogonal examples say nothing about each other: every alpha errs the same.
    y = np.array([0, 1, 0, 1])
    machine = KernelRidgeClassifier(alphas=[0.1, 10.0, 1.0]).fit(np.eye(4), y)
    assert machine.alpha_ == 10.0


# ---------------------------------------------------------------- logistic


@classes
@pytest.mark.parametrize("C", [0.05, 1.0, 50.0])
def test_logistic_is_sklearn_on_explicit_features(c, C):
    x, y, x_test, _ = draw(c)
    zeros = np.zeros((len(x), c))  # An offset of zero: no class frequencies either.
    machine = KernelLogisticRegression(C=C).fit(x @ x.T, y, offset=zeros)
    scale = np.sqrt((x**2).sum() / len(x))
    reference = LogisticRegression(C=C, fit_intercept=False, tol=1e-12, max_iter=10_000)
    reference.fit(x / scale, y)
    K_test, zeros = x_test @ x.T, np.zeros((len(x_test), c))
    assert_allclose(
        machine.predict_proba(K_test, offset=zeros),
        reference.predict_proba(x_test / scale),
        atol=1e-6,
    )
    result, expected = (
        machine.decision_function(K_test, offset=zeros),
        reference.decision_function(x_test / scale),
    )
    if c == 3:  # scikit-learn's logits may differ by a constant per example.
        result = result - result.mean(axis=1, keepdims=True)
        expected = expected - expected.mean(axis=1, keepdims=True)
    assert_allclose(result, expected, atol=1e-6, rtol=1e-6)


@classes
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("C", [1e-3, 1.0, 1e4])
def test_gradient_of_block_logistic_is_zero(c, with_offset, C):
    K, y, *_ = draw_block(c)
    f0 = np.random.default_rng(1).normal(size=(len(y), c)) if with_offset else None
    machine = KernelLogisticRegression(C=C).fit(K, y, offset=f0)
    residual = np.eye(c)[y] - machine.predict_proba(K, offset=f0)
    # Of sum CE + a'Ka / (2 C s) with respect to a: K (p - y) + K a / (C s).
    a = machine.dual_coef_ / (C / machine.scale_)
    gradient = gram(K) @ (a - residual).ravel()
    assert np.abs(gradient).max() < 1e-6 * np.abs(gram(K) @ residual.ravel()).max()
    assert np.abs(residual).max() > 1e-6


def test_logistic_without_offset_starts_from_the_class_frequencies():
    K, y, K_test, _ = kernels("scalar", 3)
    log = np.log(np.bincount(y) / len(y))
    free = KernelLogisticRegression(C=1.0).fit(K, y)
    given = KernelLogisticRegression(C=1.0).fit(K, y, offset=np.tile(log, (len(y), 1)))
    offset = np.tile(log, (len(K_test), 1))
    assert_allclose(
        free.predict_proba(K_test), given.predict_proba(K_test, offset), rtol=1e-9
    )
    strong = KernelLogisticRegression(C=1e-9).fit(K, y)
    expected = np.tile(np.bincount(y) / len(y), (len(K_test), 1))
    assert_allclose(strong.predict_proba(K_test), expected, atol=1e-6)


def test_offset_in_the_span_of_the_kernel_only_moves_the_penalty():
    # |f - f0|^2 with f0 = K b: the same minimiser from its definition, by brute force.
    K, y, *_ = draw_block(3)
    G, n = gram(K) / np.trace(gram(K)) * K.shape[0] * 3, len(y)
    f0 = (G @ np.random.default_rng(2).normal(size=3 * n)).reshape(n, 3) / 10
    machine = KernelLogisticRegression(C=2.0).fit(K, y, offset=f0)
    probability = softmax(machine.decision_function(K, offset=f0), axis=1)
    f = f0 + 2.0 * (G @ (np.eye(3)[y] - probability).ravel()).reshape(n, 3)
    assert_allclose(machine.decision_function(K, offset=f0), f, atol=1e-6)


def test_logistic_chooses_the_smallest_log_loss_of_the_folds():
    K, y, *_ = draw_block(3, n=30)
    Cs = (1e-2, 1.0, 1e2)
    machine = KernelLogisticRegression(Cs=Cs, cv=3, random_state=5).fit(K, y)
    k = min(3, np.bincount(y).min())
    losses = np.zeros(len(Cs))
    for train, test in StratifiedKFold(k, shuffle=True, random_state=5).split(y, y):
        inner = K[np.ix_(train, train)]
        ratio = np.trace(gram(inner)) / (3 * len(train)) / machine.scale_
        for i, C in enumerate(Cs):  # scale_ is that of the whole kernel
            fold = KernelLogisticRegression(C=C * ratio).fit(inner, y[train])
            p = fold.predict_proba(K[np.ix_(test, train)])
            losses[i] -= np.log(p[np.arange(len(test)), y[test]]).sum() / len(y)
    assert_allclose(machine.cv_loss_, losses.min(), rtol=1e-6)
    assert list(Cs).index(machine.C_) == losses.argmin()


# ---------------------------------------------------------------- SVC


@classes
def test_svc_is_sklearn_svc_on_the_linear_kernel(c):
    x, y, x_test, _ = draw(c)
    scale = (x**2).sum() / len(x)
    reference = SVC(kernel="linear", C=3.0 / scale, break_ties=True, tol=1e-10)
    reference.fit(x, y)
    machine = KernelSVC(C=3.0).fit(x @ x.T, y)
    K_test = x_test @ x.T
    # C scales with the kernel; the decision function does not change.
    result, expected = (
        machine.decision_function(K_test),
        reference.decision_function(x_test),
    )
    assert_allclose(result, expected, atol=5e-3)
    assert_array_equal(machine.predict(K_test), reference.predict(x_test))


def test_block_svc_uses_the_margin_of_two_classes_and_the_trace_of_three():
    K, y, K_test, _ = draw_block(2)
    vector = np.array([-1.0, 1.0])
    margin, margin_test = (
        np.einsum("nmcd,c,d->nm", k, vector, vector) for k in (K, K_test)
    )
    expected = KernelSVC(C=1.0).fit(margin, y).decision_function(margin_test)
    result = KernelSVC(C=1.0).fit(K, y).decision_function(K_test)
    assert_allclose(result, expected, rtol=1e-9)
    K, y, K_test, _ = draw_block(3)
    trace, trace_test = (np.einsum("nmcc->nm", k) for k in (K, K_test))
    expected = KernelSVC(C=1.0).fit(trace, y).decision_function(trace_test)
    result = KernelSVC(C=1.0).fit(K, y).decision_function(K_test)
    assert_allclose(result, expected, rtol=1e-9)


def test_svc_decisions_agree_with_predictions():
    K, y, K_test, _ = kernels("scalar", 3)
    machine = KernelSVC(C=1.0).fit(K, y)
    assert_array_equal(
        machine.predict(K_test), machine.decision_function(K_test).argmax(axis=1)
    )
    assert not hasattr(machine, "predict_proba")
    assert not hasattr(KernelRidgeClassifier(), "predict_proba")


# ---------------------------------------------------------------- contrasts


def test_svc_of_two_classes_sees_contrasts_only():
    K, y, K_test, _ = draw_block(2)
    expected = KernelSVC(C=1.0).fit(K, y).decision_function(K_test)
    machine = KernelSVC(C=1.0).fit(contrasted(K), y)
    assert_allclose(machine.decision_function(contrasted(K_test)), expected, rtol=1e-6)


@pytest.mark.parametrize("c", [2, 3, 5])
@pytest.mark.parametrize("with_offset", [False, True])
def test_logistic_sees_contrasts_only(c, with_offset):
    K, y, K_test, _ = draw_block(c, n=24)
    rng = np.random.default_rng(1)
    f0, f0_test = (rng.normal(size=(len(k), c)) * with_offset for k in (K, K_test))
    full = KernelLogisticRegression(C=2.0).fit(K, y, offset=f0)
    Q = contrasted(K)
    # The strength is in units of the mean diagonal, which differ.
    C = 2.0 * np.trace(gram(Q)) / len(gram(Q)) / full.scale_
    machine = KernelLogisticRegression(C=C).fit(Q, y, offset=f0)
    assert_allclose(
        machine.predict_proba(contrasted(K_test), offset=f0_test),
        full.predict_proba(K_test, offset=f0_test),
        atol=1e-7,
    )


@pytest.mark.parametrize("c", [2, 3, 5])
def test_ridge_on_contrasts_is_ridge_if_the_ignored_direction_is_apart(c):
    # K = k (x) I + h (x) 1 1^T / c: the outputs' sum has a kernel of its own, h.
    x, y, x_test, _ = draw(c, n=26)
    k, k_test = x @ x.T, x_test @ x.T
    h, h_test = np.cos(k), np.cos(k_test)
    ones = np.ones((c, c)) / c

    def outputs(k, h):
        return kron(k, c) + np.einsum("nm,cd->nmcd", h, ones)

    K, K_test = outputs(k, 30 * (h @ h.T)), outputs(k_test, 30 * (h_test @ h.T))
    full = KernelRidgeClassifier(alpha=0.1).fit(K, y)
    Q = contrasted(K)
    scale = np.trace(gram(Q)) / len(gram(Q))
    machine = KernelRidgeClassifier(alpha=0.1 * full.scale_ / scale).fit(Q, y)
    result = machine._logits(contrasted(K_test), None)
    expected = full._logits(K_test, None)
    expected = expected - expected.mean(axis=1, keepdims=True)
    assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FIXED)
@classes
def test_the_basis_of_contrasts_does_not_matter(name, c):
    K, y, K_test, _ = kernels("contrasts", c)
    rng = np.random.default_rng(3)
    full, *_ = kernels("block", c)
    # Another function of the input, added to all outputs, is not seen.
    more = rng.normal(size=(len(y), c, 7))
    same = np.repeat(rng.normal(size=(len(y), 1, 7)), c, axis=1)
    K_more = full + np.einsum("ncp,mdp->nmcd", same, same)
    assert_allclose(contrasted(K_more), K, rtol=1e-9, atol=1e-9)
    assert not np.allclose(contrasted(full + np.einsum("ncp,mdp->nmcd", more, more)), K)
    decision = clone(FIXED[name]).fit(K, y).decision_function(K_test)
    assert decision.shape == ((len(K_test), c) if c > 2 else (len(K_test),))
    if name != "svc":
        logits = clone(FIXED[name]).fit(K, y)._logits(K_test, None)
        assert_allclose(logits.sum(axis=1), 0, atol=1e-12)


# ---------------------------------------------------------------- all of them


@classes
@pytest.mark.parametrize("name", FIXED)
def test_block_kernel_of_independent_outputs_is_the_scalar_machine(name, c):
    K, y, K_test, _ = kernels("scalar", c)
    scalar, block = clone(FIXED[name]), clone(FIXED[name])
    if name == "logistic" and c == 2:
        scalar.set_params(C=2 * block.C)
    expected = scalar.fit(K, y).decision_function(K_test)
    result = block.fit(kron(K, c), y).decision_function(kron(K_test, c))
    tolerance = 1e-9 if name == "ridge" else 1e-6
    assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "c", "form"), pairs(CHOSEN, [2, 3], ["scalar", "block"])
)
def test_learns_labels_and_not_shuffled_ones(name, c, form):
    machine = CHOSEN[name]
    rng = np.random.default_rng(0)
    if form == "scalar":
        x, y, x_test, y_test = draw(c, n=60, m=200)
        K, K_test = x @ x.T, x_test @ x.T
    else:
        K, y, K_test, y_test = draw_block(c, n=60, m=120, parameters=8)
    accuracy = clone(machine).fit(K, y).score(K_test, y_test)
    shuffled = [
        clone(machine).fit(K, rng.permutation(y)).score(K_test, y_test)
        for _ in range(8)
    ]
    frequent = np.bincount(y_test).max() / len(y_test)
    assert accuracy > frequent + 0.15
    assert np.mean(shuffled) < frequent + 0.1


@machines
@pytest.mark.parametrize("form", ["scalar", "block"])
def test_cross_validation_and_grid_search(machine, form):
    K, y, *_ = draw_block(3, n=30)
    K = K if form == "block" else np.einsum("nmcc->nm", K)
    folds = StratifiedKFold(2)
    scores = cross_val_score(machine, K, y, cv=folds, error_score="raise")
    for score, (train, test) in zip(scores, folds.split(K, y), strict=True):
        fold = clone(machine).fit(K[train][:, train], y[train])
        assert score == fold.score(K[test][:, train], y[test])
    parameter = "alpha" if isinstance(machine, KernelRidgeClassifier) else "C"
    grid = {parameter: [1e-6, 1e-2, 1.0, 100.0]}
    search = GridSearchCV(machine, grid, cv=folds, error_score="raise").fit(K, y)
    assert search.best_score_ >= scores.mean() - 0.2
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    assert search.predict(K).shape == y.shape


@offsetting
def test_cross_validation_with_offset_by_metadata_routing(name):
    K, y, *_ = draw_block(2, n=20)
    f0 = 5.0 * np.eye(2)[1 - y]  # Outputs that are always wrong.
    strong = {"alpha": 1e9} if name == "ridge" else {"C": 1e-9}
    with config_context(enable_metadata_routing=True):
        machine = clone(FIXED[name]).set_params(**strong)
        machine.set_fit_request(offset=True).set_score_request(offset=True)
        scores = cross_val_score(
            machine, K, y, cv=2, params={"offset": f0}, error_score="raise"
        )
    assert_array_equal(scores, 0.0)


@machines
@classes
def test_string_labels(machine, c):
    K, y, K_test, _ = kernels("scalar", c)
    names = np.array(["no", "maybe", "yes"])[:c]
    order = np.argsort(names)
    expected = clone(machine).fit(K, np.argsort(order)[y])
    result = clone(machine).fit(K, names[y])
    assert_array_equal(result.classes_, names[order])
    assert_array_equal(result.predict(K_test), names[order][expected.predict(K_test)])
    assert 0 < result.score(K, names[y]) <= 1


@machines
@pytest.mark.parametrize("form", ["scalar", "block"])
def test_order_and_scale_do_not_matter(machine, form):
    K, y, K_test, _ = kernels(form, 3)
    expected = clone(machine).fit(K, y).decision_function(K_test)
    p = np.random.default_rng(4).permutation(len(y))
    permuted = clone(machine).fit(K[np.ix_(p, p)], y[p])
    scaled = clone(machine).fit(1e-6 * K, y)
    tolerance = 5e-3 if isinstance(machine, KernelSVC) else 1e-7
    result = permuted.decision_function(K_test[::-1][:, p])[::-1]
    assert_allclose(result, expected, atol=tolerance)
    assert_allclose(scaled.decision_function(1e-6 * K_test), expected, atol=tolerance)


@choosing
def test_fitting_is_deterministic_and_leaves_the_kernel_alone(machine):
    K, y, K_test, _ = draw_block(3)
    before = K.copy()
    first = clone(machine).fit(K, y).decision_function(K_test)
    np.random.default_rng().random()
    second = clone(machine).fit(K, y).decision_function(K_test)
    assert_array_equal(first, second)
    assert_array_equal(K, before)


@machines
def test_torch_and_float32_kernels(machine):
    K, y, K_test, _ = draw_block(3)
    expected = clone(machine).fit(K, y).decision_function(K_test)
    result = clone(machine).fit(torch.tensor(K), torch.tensor(y))
    assert_array_equal(result.decision_function(torch.tensor(K_test)), expected)
    single = clone(machine).fit(K.astype(np.float32), y)
    assert_allclose(single.decision_function(K_test), expected, atol=1e-2)


@choosing
@pytest.mark.parametrize("form", ["scalar", "block"])
def test_four_examples(machine, form):
    K, y, K_test, _ = draw_block(2, n=4)
    if form == "scalar":
        K, K_test = (np.einsum("nmcc->nm", k) for k in (K, K_test))
    machine = clone(machine).fit(K, y)
    assert machine.decision_function(K_test).shape == (len(K_test),)


@offsetting
@classes
@pytest.mark.parametrize("form", ["scalar", "block"])
def test_huge_regularisation_returns_the_offset(name, c, form):
    K, y, K_test, _ = kernels(form, c)
    rng = np.random.default_rng(7)
    f0, f0_test = rng.normal(size=(len(K), c)), rng.normal(size=(len(K_test), c))
    strong = {"alpha": 1e12} if name == "ridge" else {"C": 1e-12}
    machine = clone(FIXED[name]).set_params(**strong).fit(K, y, offset=f0)
    assert_array_equal(machine.predict(K_test, offset=f0_test), f0_test.argmax(axis=1))
    weak = clone(FIXED[name]).fit(K, y, offset=f0)
    assert (weak.predict(K_test, offset=f0_test) != f0_test.argmax(axis=1)).any()


@offsetting
def test_a_margin_offset_is_the_difference_of_logits(name):
    K, y, K_test, _ = kernels("scalar", 2)
    rng = np.random.default_rng(7)
    f0, f0_test = rng.normal(size=(len(K), 2)), rng.normal(size=(len(K_test), 2))
    logits = clone(FIXED[name]).fit(K, y, offset=f0)
    margin = clone(FIXED[name]).fit(K, y, offset=f0[:, 1] - f0[:, 0])
    assert_array_equal(
        logits.decision_function(K_test, offset=f0_test),
        margin.decision_function(K_test, offset=f0_test[:, 1] - f0_test[:, 0]),
    )


# Checks with inputs that are no kernels, which these classifiers must reject.
NO_KERNEL = {
    "check_positive_only_tag_during_fit": "a kernel minus its mean is indefinite",
    "check_estimators_dtypes": "a kernel truncated to integers is indefinite",
    "check_decision_proba_consistency": "passes features, 80 x 2, and not a kernel",
}


@pytest.mark.filterwarnings("ignore:A class has one example")
@pytest.mark.parametrize(
    ("machine", "failing"),
    [
        pytest.param(KernelRidgeClassifier(), list(NO_KERNEL)[:2], id="ridge"),
        pytest.param(
            KernelLogisticRegression(Cs=(0.1, 10.0)),
            list(NO_KERNEL),
            id="logistic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            KernelSVC(Cs=(0.1, 10.0)),
            list(NO_KERNEL)[:2],
            id="svc",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scikit_learn_contract(machine, failing):
    expected = {name: NO_KERNEL[name] for name in failing}
    results = check_estimator(
        machine, expected_failed_checks=expected, on_skip=None, on_fail=None
    )
    failed = {
        r["check_name"]: r["exception"] for r in results if r["status"] == "failed"
    }
    assert not failed
    # Every check in the list does fail.
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(failing)
    assert sum(r["status"] == "passed" for r in results) > 50


# ---------------------------------------------------------------- errors


@machines
def test_errors_of_fit(machine):
    K, y, *_ = draw_block(3)
    flat = np.einsum("nmcc->nm", K)
    n = len(y)
    skew, nan, indefinite = flat.copy(), flat.copy(), flat - 2 * flat.max() * np.eye(n)
    skew[0, 1] += 1.0
    nan[2, 3] = np.nan
    indefinite[0, 0] = 1e3 * flat.max()
    for bad_K, bad_y, error, message in [
        (flat[:-1], y, ValueError, rf"`K` has shape \({n - 1}, {n}\).*square"),
        (flat, y[:-1], ValueError, rf"`y` has {n - 1} labels"),
        (flat, np.zeros(n), ValueError, "`y` holds one class"),
        (K, y % 2, ValueError, r"2 classes; expected .*\(n, n, 2, 2\)"),
        (K[..., 0], y, ValueError, r"expected \(n, n\) or \(n, n, 3, 3\)"),
        (nan, y, ValueError, "K contains NaN"),
        (skew, y, NotSymmetricError, r"`K` is not symmetric: .* 1\.00e\+00"),
        (indefinite, y, NotPSDError, r"smallest eigenvalue is -\d"),
        (0 * flat, y, ValueError, "`K` has mean diagonal 0"),
    ]:
        with pytest.raises(error, match=message):
            clone(machine).fit(bad_K, bad_y)


@machines
def test_errors_of_predict(machine):
    K, y, K_test, _ = draw_block(3)
    machine = clone(machine).fit(K, y)
    m, n = K_test.shape[:2]
    for bad in [K_test[:, :-1], K_test[..., 0, 0], K_test[..., :2, :2]]:
        with pytest.raises(ValueError, match=rf"of shape \({m}, {n}, 3, 3\); `K` has"):
            machine.predict(bad)
    with pytest.raises(ValueError, match="`offset` was not given to `fit`"):
        machine.predict(K_test, offset=np.zeros((m, 3)))


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (KernelRidgeClassifier(alpha=0.0), "alpha=0.0"),
        (KernelRidgeClassifier(alphas=()), r"alphas=\(\)"),
        (KernelLogisticRegression(C=-1.0), "C=-1.0"),
        (KernelSVC(Cs=(1.0, np.inf)), "Cs="),
    ],
)
def test_errors_of_parameters(machine, name):
    K, y, *_ = kernels("scalar", 2)
    with pytest.raises(ValueError, match=name):
        machine.fit(K, y)


def test_errors_of_offsets():
    K, y, K_test, _ = draw_block(3)
    f0 = np.zeros((len(y), 3))
    with pytest.raises(ValueError, match="SVM cannot use"):
        KernelSVC().fit(K, y, offset=f0)
    with pytest.raises(ValueError, match=rf"`offset` has shape .*\({len(y)}, 3\)"):
        KernelRidgeClassifier().fit(K, y, offset=f0[:, :2])
    machine = KernelLogisticRegression(C=1.0).fit(K, y, offset=f0)
    with pytest.raises(ValueError, match="`offset` was given to `fit`"):
        machine.predict_proba(K_test)


def test_one_example_of_a_class_cannot_choose():
    K, y, *_ = kernels("scalar", 2)
    y = np.r_[1, np.zeros(len(y) - 1)]
    for machine in [KernelLogisticRegression(Cs=(5.0, 0.5)), KernelSVC(Cs=(5.0, 0.5))]:
        with pytest.warns(UserWarning, match="one example") as caught:
            machine.fit(K, y)
        assert caught[0].filename == __file__
        assert machine.C_ == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KernelLogisticRegression(C=1.0).fit(K, y)
