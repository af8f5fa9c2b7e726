"""Ridge regression by its spectrum against dense solves, refits and SciPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal

from ntk.classifiers.estimators import KernelRidgeClassifier
from ntk.measures.risk import RidgeRegression
from ntk.measures.spectrum import NotPSDError, NumericalError

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)
columns = st.integers(1, 3)
ridges = st.floats(1e-3, 1e3)


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def problem(k, t, seed, rank=None):
    """Return a Gram matrix, singular by default, and targets ``(k, t)``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, rank or max(1, k - 2)))
    return x @ x.T, rng.normal(size=(k, t))


def hat(K, s):
    return K @ np.linalg.inv(K + s * np.eye(len(K)))


# Twins


@given(sizes, columns, seeds, ridges)
def test_measures_are_those_of_dense_matrices(k, t, seed, s):
    K, Y = problem(k, t, seed)
    H, result = hat(K, s), RidgeRegression.of(K, Y)
    residual = Y - H @ Y
    close(result.degrees_of_freedom(s), np.trace(H))
    close(result.residuals(s), residual)
    close(result.training_risk(s), (residual**2).mean())
    inverse = np.linalg.inv(K + s * np.eye(k))
    close(result.optimum(s), s * np.trace(Y.T @ inverse @ Y) / (k * t))
    close(result.gcv(s), (residual**2).mean() / (1 - np.trace(H) / k) ** 2, 1e-7)


@given(sizes, columns, seeds, ridges)
def test_optimum_is_the_value_of_the_objective_that_nothing_is_below(k, t, seed, s):
    K, Y = problem(k, t, seed, rank=k)
    a = np.linalg.solve(K + s * np.eye(k), Y)
    objective = lambda a: ((Y - K @ a) ** 2).sum() + s * np.trace(a.T @ K @ a)
    result = RidgeRegression.of(K, Y).optimum(s) * k * t
    close(result, objective(a), 1e-8)
    step = np.random.default_rng(seed + 1).normal(size=(k, t))
    assert objective(a + 1e-2 * step) >= objective(a) - 1e-9


@pytest.mark.parametrize("t", [1, 2])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_leave_one_out_is_what_refits_without_each_example_give(c, t):
    n, s = 6, 0.3
    K, Y = problem(n * c, t, 0, rank=n * c + 1)
    result = RidgeRegression.of(K, Y, outputs=c)
    residuals = result.left_out_residuals(s)
    for i in range(n):
        out = np.arange(i * c, (i + 1) * c)
        rest = np.setdiff1d(np.arange(n * c), out)
        inner = K[np.ix_(rest, rest)] + s * np.eye(len(rest))
        predicted = K[np.ix_(out, rest)] @ np.linalg.solve(inner, Y[rest])
        close(residuals[out], Y[out] - predicted)
    close(result.leave_one_out(s), (residuals**2).mean())


def test_leave_one_out_is_that_of_the_classifier_with_an_offset():
    rng = np.random.default_rng(3)
    jacobian = rng.normal(size=(9, 3, 20))
    K = np.einsum("ncp,mdp->nmcd", jacobian, jacobian)
    labels, f0 = np.arange(9) % 3, rng.normal(size=(9, 3))
    machine = KernelRidgeClassifier(alpha=0.2).fit(K, labels, offset=f0)
    gram = K.transpose(0, 2, 1, 3).reshape(27, 27)
    residual = (np.eye(3)[labels] - f0).ravel()
    result = RidgeRegression.of(gram, residual, outputs=3)
    s = 0.2 * np.trace(gram) / 27
    close(result.leave_one_out(s), machine.loo_error_)
    by_row = RidgeRegression.of(gram, residual).leave_one_out(s)
    assert abs(result.leave_one_out(s) - by_row) > 0.02


@given(sizes, columns, seeds, ridges, st.floats(1e-2, 1e2))
def test_evidence_is_the_density_of_independent_columns(k, t, seed, s, a):
    K, Y = problem(k, t, seed)
    density = multivariate_normal(cov=a * (K + s * np.eye(k)))
    expected = sum(density.logpdf(Y[:, j]) for j in range(t))
    result = RidgeRegression.of(K, Y)
    close(result.log_evidence(s, scale=a), expected, 1e-8)
    close(
        RidgeRegression.of(a * K, Y).log_evidence(a * s),
        result.log_evidence(s, scale=a),
    )


def test_best_evidence_is_the_largest_over_scales():
    K, Y = problem(7, 2, 1)
    result = RidgeRegression.of(K, Y)
    search = minimize_scalar(
        lambda u: -result.log_evidence(0.5, scale=np.exp(u)), options={"xtol": 1e-10}
    )
    close(result.evidence_scale(0.5), np.exp(search.x), 1e-6)
    close(result.log_evidence(0.5, scale=None), -search.fun)
    other = RidgeRegression.of(1e6 * K, Y)
    close(
        other.log_evidence(5e5, scale=None),
        result.log_evidence(0.5, scale=None) + 0,
    )
    assert abs(other.log_evidence(5e5) - result.log_evidence(0.5)) > 10


# Known answers


def test_two_eigenvalues_by_hand():
    K, Y = np.diag([3.0, 1.0]), np.array([2.0, 4.0])
    result = RidgeRegression.of(K, Y)
    close(result.degrees_of_freedom(1.0), 3 / 4 + 1 / 2)
    close(result.residuals(1.0), [[0.5], [2.0]])
    close(result.training_risk(1.0), (0.25 + 4) / 2)
    close(result.optimum(1.0), (4 / 4 + 16 / 2) / 2)
    close(result.gcv(1.0), (4.25 / 2) / (0.75 / 2) ** 2)
    # Nothing can be predicted for a row orthogonal to the others.
    close(result.left_out_residuals(1.0), [[2.0], [4.0]])


def test_zero_kernel_learns_nothing():
    Y = np.array([[1.0, 0.0], [2.0, 5.0]])
    result = RidgeRegression.of(np.zeros((2, 2)), Y)
    assert result.degrees_of_freedom(0.1) == 0
    for name in ("training_risk", "optimum", "gcv", "leave_one_out"):
        close(getattr(result, name)(0.1), (Y**2).mean())


@given(st.integers(2, 8), seeds)
def test_small_ridges_interpolate_and_leave_the_estimates_finite(k, seed):
    K, Y = problem(k, 1, seed, rank=k + 3)
    result = RidgeRegression.of(K, Y)
    s = 1e-14 * np.trace(K)
    assert result.training_risk(s) < 1e-3 * (Y**2).mean()
    inverse = np.linalg.inv(K)
    limit = ((inverse @ Y) ** 2).mean() / (np.trace(inverse) / k) ** 2
    close(result.gcv(s), limit, 1e-4)
    loo = (inverse @ Y)[:, 0] / np.diag(inverse)
    close(result.leave_one_out(s), (loo**2).mean(), 1e-4)
    assert np.isfinite(result.gcv(5e-324))


@given(sizes, columns, seeds, ridges, st.floats(1e-3, 1e3))
def test_scaling_kernel_and_ridge_together_changes_no_risk(k, t, seed, s, scale):
    K, Y = problem(k, t, seed)
    one, other = RidgeRegression.of(K, Y), RidgeRegression.of(scale * K, Y)
    for name in ("training_risk", "optimum", "gcv", "leave_one_out"):
        expected = getattr(one, name)(s)
        close(getattr(other, name)(scale * s), expected, 1e-7)


# Orders


@given(sizes, columns, seeds, ridges)
def test_more_kernel_lowers_the_optimum(k, t, seed, s):
    K, Y = problem(k, t, seed)
    more = K + problem(k, 1, seed + 1, rank=1)[0]
    before, after = RidgeRegression.of(K, Y), RidgeRegression.of(more, Y)
    assert after.optimum(s) <= before.optimum(s) * (1 + 1e-12)


def test_more_kernel_can_raise_the_training_risk():
    # All of the target is learnt at once; the other direction blurs it.
    K, Y = np.diag([0.0, 1000.0]), np.array([0.0, 2.0])
    added = np.outer([1.0, 3.0], [1.0, 3.0])
    before, after = RidgeRegression.of(K, Y), RidgeRegression.of(K + added, Y)
    assert after.training_risk(1.0) > 3 * before.training_risk(1.0)
    assert after.optimum(1.0) <= before.optimum(1.0)


def test_tensors_are_accepted_and_left_alone():
    gram, targets = torch.eye(2), torch.tensor([1, 3])
    result = RidgeRegression.of(gram, targets)
    close(result.training_risk(1.0), (0.25 + 9 / 4) / 2)
    assert torch.equal(gram, torch.eye(2))
    assert torch.equal(targets, torch.tensor([1, 3]))


# What is refused


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.inf, np.nan])
def test_a_ridge_that_is_not_positive_is_refused(ridge):
    result = RidgeRegression.of(np.eye(2), [1.0, 0.0])
    for name in ("degrees_of_freedom", "training_risk", "gcv", "leave_one_out"):
        with pytest.raises(ValueError, match="`ridge=.*relative_ridge"):
            getattr(result, name)(ridge)


def test_what_fits_nothing_is_refused():
    with pytest.raises(ValueError, match="`outputs=4`; expected a divisor of 6 rows"):
        RidgeRegression.of(np.eye(6), np.ones(6), outputs=4)
    with pytest.raises(ValueError, match="`outputs=0`"):
        RidgeRegression.of(np.eye(6), np.ones(6), outputs=0)
    with pytest.raises(ValueError, match=r"`targets` has shape \(5,\); expected \(6,"):
        RidgeRegression.of(np.eye(6), np.ones(5))
    with pytest.raises(NotPSDError):
        RidgeRegression.of(np.diag([1.0, -1.0]), np.ones(2))
    with pytest.raises(NumericalError):
        RidgeRegression.of(np.eye(2), [1.0, np.nan])
    with pytest.raises(ValueError, match="`scale=0`; expected a finite number above 0"):
        RidgeRegression.of(np.eye(2), np.ones(2)).log_evidence(1.0, scale=0)
