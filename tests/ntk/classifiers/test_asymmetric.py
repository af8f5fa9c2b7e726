"""Ridge regression on an asymmetric kernel against dense solves and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.utils.estimator_checks import check_estimator

from ntk.classifiers.asymmetric import (
    AsymmetricRidgeClassifier,
    SingularSystemError,
    ridge_solution,
)
from ntk.classifiers.estimators import KernelRidgeClassifier
from ntk.kernels.empirical import empirical_ntk
from ntk.measures.gram import gram_matrix

classes = pytest.mark.parametrize("c", [2, 3])
forms = pytest.mark.parametrize("form", ["scalar", "block"])
offsets = pytest.mark.parametrize("with_offset", [False, True])
seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-9):
    scale = np.abs(expected).max()
    assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def draw(form, c, *, n=14, m=6, parameters=30, seed=0):
    """Return labels, gradients and signs ``(n + m, [c,] p)``, the kernel and f0."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(c), np.arange(c), rng.integers(c, size=n + m - 2 * c)]
    shape = (n + m, c, parameters) if form == "block" else (n + m, parameters)
    phi = rng.normal(size=shape) + 0.5 * y.reshape(-1, *(1,) * (len(shape) - 1))
    psi = np.sign(phi)
    letters = "icp,jdp->ijcd" if form == "block" else "ip,jp->ij"
    return y, phi, psi, np.einsum(letters, phi, psi), rng.normal(size=(n + m, c))


def flat(K):
    """Return the Gram matrix of a scalar or a block kernel."""
    return gram_matrix(torch.tensor(K)).numpy()


def start(f0, rows, with_offset):
    return {"offset": f0[rows]} if with_offset else {}


# ---------------------------------------------------------------- the solution


def system(form, c, y, f0, with_offset):
    """Return the residual targets and the offset of the predictions."""
    n = len(y)
    signs = form == "scalar" and c == 2
    targets = 2.0 * y[:, None] - 1 if signs else np.eye(c)[y]
    begin = np.tile(targets.mean(axis=0), (len(f0), 1))
    if with_offset:
        begin = f0[:, 1:] - f0[:, :1] if signs else f0
    return targets - begin[:n], begin[n:]


@offsets
@classes
@forms
@given(seeds, st.sampled_from([1e-3, 0.1, 10.0]))
def test_ridge_is_the_dense_solution(form, c, with_offset, seed, alpha):
    y, _, _, K, f0 = draw(form, c, seed=seed)
    n = 14
    G = flat(K[:n, :n])
    matrix = G + alpha * np.trace(G) / len(G) * np.eye(len(G))
    assume(np.linalg.cond(matrix) < 1e5)
    residual, begin = system(form, c, y[:n], f0, with_offset)
    # Scalar form: one column per output. Block form: one for all.
    r = residual if form == "scalar" else residual.reshape(-1, 1)
    a = np.linalg.inv(matrix) @ r
    f = (flat(K[n:, :n]) @ a).reshape(len(begin), -1) + begin
    machine = AsymmetricRidgeClassifier(alpha).fit(
        K[:n, :n], y[:n], **start(f0, slice(0, n), with_offset)
    )
    rest = start(f0, slice(n, None), with_offset)
    expected = f if c == 3 else f[:, -1] - (f[:, 0] if form == "block" else 0)
    close(machine.decision_function(K[n:, :n], **rest), expected)
    decided = expected.argmax(axis=1) if c == 3 else expected > 0
    assert_array_equal(machine.predict(K[n:, :n], **rest), decided)


@forms
def test_prediction_is_that_of_the_weights_the_steps_lead_to(form):
    # w = sum_j a_j sign g_j fits the training examples and is applied to the others.
    y, phi, psi, K, f0 = draw(form, 3, parameters=60)
    n = 14
    machine = AsymmetricRidgeClassifier(1e-9).fit(K[:n, :n], y[:n], offset=f0[:n])
    a = machine.dual_coef_
    if form == "block":
        w = np.einsum("jdp,jd->p", psi[:n], a)
        f = f0 + phi @ w
    else:
        w = np.einsum("jp,jo->po", psi[:n], a)
        f = f0 + phi @ w
    assert_allclose(f[:n], np.eye(3)[y[:n]], atol=1e-5)
    close(machine.decision_function(K[n:, :n], offset=f0[n:]), f[n:])
    # Mixing up the transposes, as published, gives another function.
    swapped = K.swapaxes(0, 1).swapaxes(2, 3) if form == "block" else K.T
    mixed = machine.decision_function(swapped[n:, :n], offset=f0[n:])
    assert np.abs(mixed - f[n:]).max() > 0.1


@classes
@forms
@offsets
def test_ridge_on_a_symmetric_kernel_is_kernel_ridge(form, c, with_offset):
    y, phi, _, _, f0 = draw(form, c, parameters=5)
    letters = "icp,jdp->ijcd" if form == "block" else "ip,jp->ij"
    K, n = np.einsum(letters, phi, phi), 14
    fit = start(f0, slice(0, n), with_offset)
    expected = KernelRidgeClassifier().fit(K[:n, :n], y[:n], **fit)
    result = AsymmetricRidgeClassifier().fit(K[:n, :n], y[:n], **fit)
    assert result.alpha_ == expected.alpha_
    assert result.loo_accuracy_ == expected.loo_accuracy_
    close(result.loo_error_, expected.loo_error_)
    rest = start(f0, slice(n, None), with_offset)
    close(
        result.decision_function(K[n:, :n], **rest),
        expected.decision_function(K[n:, :n], **rest),
    )


@classes
@forms
@offsets
def test_leave_one_out_of_ridge_is_brute_force(form, c, with_offset):
    y, _, _, K, f0 = draw(form, c, m=0)
    y = np.random.default_rng(0).permutation(y)
    fit = start(f0, slice(None), with_offset)
    machine = AsymmetricRidgeClassifier(0.05).fit(K, y, **fit)
    squares, right = [], []
    for i in range(len(y)):
        rest = np.delete(np.arange(len(y)), i)
        inner = K[np.ix_(rest, rest)]
        alpha = 0.05 * machine.scale_ / (np.trace(flat(inner)) / len(flat(inner)))
        fold = AsymmetricRidgeClassifier(alpha)
        fold.fit(inner, y[rest], **start(f0, rest, with_offset))
        f = fold._logits(K[np.ix_([i], rest)], f0[[i]] if with_offset else None)[0]
        miss = fold.outputs_.encoded(np.eye(c)[y[i]] - f)
        squares.append(miss**2)
        right.append(f.argmax() == y[i])
    close(machine.loo_error_, np.mean(squares))
    close(machine.loo_accuracy_, np.mean(right))


def test_equal_leave_one_out_errors_choose_the_strongest():
    # Orthogonal examples say nothing about each other: every ridge errs the same.
    y = np.array([0, 1, 0, 1])
    ridge = AsymmetricRidgeClassifier(alphas=[0.1, 10.0, 1.0]).fit(np.eye(4), y)
    assert ridge.alpha_ == 10.0


# ---------------------------------------------------------------- as an estimator


def test_learns_labels_of_the_sign_kernel_of_a_model(bert):
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(5, 60, size=(20, 6)))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    K = empirical_ntk(bert, inputs, reduce="trace", kind="asymmetric_signgd").numpy()
    assert np.abs(K - K.T).max() > 0.01 * np.abs(K).max()
    y = np.tile([0, 1], 10)
    fitted = AsymmetricRidgeClassifier(1e-9).fit(K, y)
    assert fitted.score(K, y) == 1.0


def test_order_and_scale_do_not_matter():
    y, _, _, K, _ = draw("scalar", 3)
    n, m = 14, 6
    expected = (
        AsymmetricRidgeClassifier(0.1)
        .fit(K[:n, :n], y[:n])
        .decision_function(K[n:, :n])
    )
    p = np.r_[np.random.default_rng(4).permutation(n), n + np.arange(m)]
    mixed = 1e-6 * K[np.ix_(p, p)]
    result = AsymmetricRidgeClassifier(0.1).fit(mixed[:n, :n], y[p[:n]])
    close(result.decision_function(mixed[n:, :n]), expected)


def test_fitting_leaves_the_kernel_alone_and_forgets_it():
    y, _, _, K, _ = draw("scalar", 3)
    before = K.copy()
    fitted = AsymmetricRidgeClassifier(0.1).fit(torch.tensor(K), y)
    assert_array_equal(K, before)
    kept = [v for v in vars(fitted).values() if np.shape(v) == K.shape]
    assert not kept


def test_string_labels_cross_validation_and_grid_search():
    y, _, _, K, _ = draw("scalar", 3, n=30, m=0)
    y = np.array(["no", "maybe", "yes"])[y]
    folds = StratifiedKFold(2)
    machine = AsymmetricRidgeClassifier(0.1)
    scores = cross_val_score(machine, K, y, cv=folds, error_score="raise")
    for score, (train, test) in zip(scores, folds.split(K, y), strict=True):
        fold = AsymmetricRidgeClassifier(0.1).fit(K[np.ix_(train, train)], y[train])
        assert score == fold.score(K[np.ix_(test, train)], y[test])
    grid = {"alpha": [1e-4, 1e-2, 1.1, 110.0]}
    search = GridSearchCV(machine, grid, cv=folds, error_score="raise").fit(K, y)
    assert len(set(search.cv_results_["mean_test_score"])) > 1
    assert set(search.predict(K)) <= {"no", "maybe", "yes"}


def test_scikit_learn_contract():
    results = check_estimator(
        AsymmetricRidgeClassifier(0.1), on_skip=None, on_fail=None
    )
    failed = {
        r["check_name"]: r["exception"] for r in results if r["status"] == "failed"
    }
    assert not failed
    assert sum(r["status"] == "passed" for r in results) > 50


# ---------------------------------------------------------------- errors


def test_a_singular_system_is_an_error():
    K = np.array([[1.0, 2.0], [2.0, 1.0]])  # Eigenvalues 3 and -1.
    with pytest.raises(SingularSystemError, match=r"K \+ 1\.000e\+00 I is singular"):
        ridge_solution(K, np.eye(2), 1.0)
    with pytest.raises(SingularSystemError, match="another regularisation"):
        AsymmetricRidgeClassifier(1.0).fit(K, [0, 1])
    nearly = K + np.diag([0.0, 1e-16])
    with pytest.raises(SingularSystemError, match=r"condition number is \d"):
        ridge_solution(1e3 * nearly, np.eye(2), 1e3 * (1 - 2e-16))


def test_errors_of_fit():
    y, _, _, K, _ = draw("scalar", 3, m=0)
    n, nan = len(y), K.copy()
    nan[2, 3] = np.nan
    for bad_K, bad_y, message in [
        (K[:-1], y, rf"`K` has shape \({n - 1}, {n}\).*square"),
        (K, y[:-1], rf"`y` has {n - 1} labels"),
        (K, np.zeros(n), "`y` holds one class"),
        (np.zeros((n, n, 4, 4)), y, r"3 classes; expected .*\(n, n, 3, 3\)"),
        (nan, y, "K contains NaN"),
        (-K, y, "`K` has mean diagonal -"),
    ]:
        with pytest.raises(ValueError, match=message):
            AsymmetricRidgeClassifier(0.1).fit(bad_K, bad_y)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (AsymmetricRidgeClassifier(0.0), r"`alpha=0\.0`"),
        (AsymmetricRidgeClassifier(alphas=()), r"`alphas=\(\)`"),
    ],
)
def test_errors_of_parameters(machine, message):
    y, _, _, K, _ = draw("scalar", 2, m=0)
    with pytest.raises(ValueError, match=message):
        machine.fit(K, y)
