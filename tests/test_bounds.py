"""Statements on kernels that change: what holds always, and what only sometimes."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk.bounds import (
    condition_bracket,
    dimension_bracket,
    eigenvalue_bracket,
    factors,
    optimum_bracket,
    published_candidate_bracket,
    published_eigenvalue_bracket,
    published_risk_bracket,
    published_risk_ratio_bracket,
    relative_perturbation,
    risk_bracket,
    risk_ratio_bracket,
    weyl_bracket,
)
from ntk.spectrum import NotPSDError, NotSymmetricError

seeds = st.integers(0, 2**32 - 1)
ROUNDING = 1e-8


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@st.composite
def grams(draw, k):
    """Return a ``(k, k)`` of any rank, with eigenvalues over several decades."""
    rng = np.random.default_rng(draw(seeds))
    rank = draw(st.integers(0, k))
    values = 10.0 ** rng.uniform(draw(st.floats(-6, 1)), 2, size=rank)
    U = np.linalg.qr(rng.normal(size=(k, k)))[0][:, :rank]
    return symmetric((U * values) @ U.T)


@st.composite
def problems(draw):
    """Return K, two matrices that are added to it, targets and a ridge."""
    k = draw(st.integers(1, 7))
    K, S, other = (draw(grams(k)) for _ in range(3))
    Y = np.random.default_rng(draw(seeds)).normal(size=(k, draw(st.integers(1, 2))))
    return K, S, other, Y, 10 ** draw(st.floats(-4, 3))


@st.composite
def definite_problems(draw):
    """Return a definite K, two matrices that eta < 1 is true of, and as above."""
    k = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(seeds))
    x = rng.normal(size=(k, k))
    K = symmetric(x @ x.T + np.eye(k))
    root = scipy.linalg.sqrtm(K).real
    added = []
    for _ in range(2):
        y = rng.normal(size=(k, k))
        part = y @ y.T / np.linalg.norm(y @ y.T, 2)
        added.append(symmetric(draw(st.floats(1e-9, 0.99)) * root @ part @ root))
    return K, *added, rng.normal(size=(k, 1)), 10 ** draw(st.floats(-3, 3))


def symmetric(matrix):
    return (matrix + matrix.T) / 2


def spectrum(K):
    return np.linalg.eigvalsh(K)[::-1]


def inverse(K, s):
    return np.linalg.inv(K + s * np.eye(len(K)))


def training_risk(K, Y, s):
    return ((s * inverse(K, s) @ Y) ** 2).mean()


def condition(K, s):
    values = spectrum(K)
    return (values[0] + s) / (values[-1] + s)


def within(bracket, truth, scale=0.0):
    """Whether a bracket holds a value up to rounding, relative to a scale."""
    lower, upper = bracket.value
    slack = ROUNDING * np.maximum(np.abs(truth), scale)
    assert bracket.status == "holds"
    assert bracket.reason is None
    return np.all(lower <= truth + slack) and np.all(truth <= upper + slack)


# What holds always


@given(problems())
def test_no_corrected_bracket_is_ever_violated(problem):
    K, S, other, Y, s = problem
    pairs = {
        "added": (K, K + S),
        "removed": (K + S, K),
        "exchanged": (K + S, K + other),
    }
    for A, B in pairs.values():
        scale = np.linalg.norm(A, 2) + np.linalg.norm(B, 2) + s
        assert within(weyl_bracket(A, B), spectrum(B), scale)
        assert within(eigenvalue_bracket(A, B, s), spectrum(B), scale)
        assert within(condition_bracket(A, B, s), condition(B, s))
        dimension = np.trace(B @ inverse(B, s))
        assert within(dimension_bracket(A, B, s), dimension, len(B))
        optimum = s * np.trace(Y.T @ inverse(B, s) @ Y) / Y.size
        assert within(optimum_bracket(A, B, Y, s), optimum)
        before, after = training_risk(A, Y, s), training_risk(B, Y, s)
        assert within(risk_ratio_bracket(A, B, s), np.sqrt(after / before))
        assert within(risk_bracket(B, Y, s), after)


@given(problems())
def test_factors_are_the_best_in_the_order_of_matrices(problem):
    K, S, other, _, s = problem
    A, B = K + S + s * np.eye(len(K)), K + other + s * np.eye(len(K))
    a, b = factors(K + S, K + other, s)
    ratios = scipy.linalg.eigh(B, A, eigvals_only=True)
    close(b, ratios[-1], 1e-7)
    slack = ROUNDING * np.linalg.norm(A, 2) * b
    assert abs(spectrum(B - a * A)[-1]) <= slack
    assert abs(spectrum(b * A - B)[-1]) <= slack


@given(problems())
def test_factors_of_added_layers_are_one_and_eta_more(problem):
    K, S, _, _, s = problem
    root = np.linalg.inv(scipy.linalg.sqrtm(K + s * np.eye(len(K))).real)
    eta = np.linalg.norm(root @ S @ root, 2)
    close(relative_perturbation(K, S, s), eta, 1e-7)
    a, b = factors(K, K + S, s)
    assert a >= 1 - 1e-9
    close(b, 1 + eta, 1e-7)
    close(factors(K + S, K, s), (1 / b, 1 / a), 1e-7)
    assert factors(K + S, K, s)[1] <= 1 + 1e-9


@given(problems())
def test_brackets_of_added_layers_are_those_of_eta(problem):
    """(K + sI) <= (K + S + sI) <= (1 + eta_s)(K + sI), in every consequence."""
    K, S, _, Y, s = problem
    more, eta = 1 + relative_perturbation(K, S, s), condition(K, s)
    lower, upper = eigenvalue_bracket(K, K + S, s).value
    values = spectrum(K).clip(0)
    scale = ROUNDING * (np.linalg.norm(K + S, 2) + s)
    assert np.all(lower >= values - scale)
    assert np.all(upper <= more * (values + s) - s + scale)
    lower, upper = condition_bracket(K, K + S, s).value
    assert eta / more * (1 - ROUNDING) <= lower
    assert upper <= eta * more * (1 + ROUNDING)
    lower, upper = optimum_bracket(K, K + S, Y, s).value
    optimum = s * np.trace(Y.T @ inverse(K, s) @ Y) / Y.size
    assert optimum / more * (1 - ROUNDING) <= lower
    assert upper <= optimum * (1 + ROUNDING)


@given(problems())
def test_risk_ratio_is_reached_and_within_bounds_by_the_condition(problem):
    K, S, other, _, s = problem
    A, B = K + S, K + other
    lower, upper = risk_ratio_bracket(A, B, s).value
    ratio = inverse(B, s) @ (A + s * np.eye(len(A)))
    _, _, right = np.linalg.svd(ratio)
    for v, bound in ((right[0], upper), (right[-1], lower)):
        Y = (A + s * np.eye(len(A))) @ v
        found = np.sqrt(training_risk(B, Y, s) / training_risk(A, Y, s))
        assert abs(found - bound) <= ROUNDING * upper
    a, b = factors(A, B, s)
    spread = np.sqrt(condition(A, s))
    assert 1 / (b * spread) <= lower * (1 + ROUNDING)
    assert upper <= spread / a * (1 + ROUNDING)


def test_brackets_are_equalities_for_a_multiple():
    K, Y, s = np.diag([4.0, 2.0, 1.0]), np.ones(3), 1e-12
    for bracket, truth in [
        (eigenvalue_bracket(K, 3 * K, s), 3 * np.diag(K)),
        (condition_bracket(K, 3 * K, s), 4.0),
        (optimum_bracket(K, 3 * K, Y, s), s * (1 / 12 + 1 / 6 + 1 / 3) / 3),
        (risk_ratio_bracket(K, 3 * K, s), 1 / 3),
    ]:
        for side in bracket.value:
            np.testing.assert_allclose(side, truth, rtol=1e-9)
    lower, upper = weyl_bracket(K, K + 3 * np.eye(3)).value
    close(lower, [7, 5, 4])
    close(upper, [7, 5, 4])


def test_tensors_are_accepted():
    K, more = torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
    close(weyl_bracket(K, K + more).value, [[3, 2], [3, 2]])
    close(relative_perturbation(K, more, 1.0), 0.5)


# What was published, where it holds


@given(definite_problems())
def test_published_statements_hold_under_their_conditions(problem):
    K, S, other, Y, s = problem
    assert within(published_risk_bracket(K, Y, s), training_risk(K, Y, s))
    assert within(published_eigenvalue_bracket(K, S), spectrum(K + S))
    risks = [np.sqrt(training_risk(each, Y, s)) for each in (K, K + S, K + other)]
    first, second = (published_risk_ratio_bracket(K, each, s) for each in (S, other))
    assert within(first, risks[1] / risks[0])
    assert within(second, risks[2] / risks[0])
    both = published_candidate_bracket(K, S, other, s)
    assert within(both, risks[1] / risks[2])
    close(both.value[1], first.value[1] / second.value[0], 1e-7)


def test_published_formulas_by_hand():
    K, S, s = np.diag([4.0, 1.0]), np.diag([0.0, 0.5]), 1.0
    lower, upper = published_eigenvalue_bracket(K, S).value
    close(lower, [2, 0.5])
    close(upper, [6, 1.5])
    close(published_risk_ratio_bracket(K, S, s).value, (0.1, 10))  # 2.5 / 0.5^2 = 10
    close(published_candidate_bracket(K, S, S, s).value, (0.01, 100))
    expected = np.array([(1 / 5) ** 2, (1 / 2) ** 2]) * 12.5
    close(published_risk_bracket(K, [3.0, 4.0], s).value, expected)
    close(published_risk_bracket(K, [3.0, 4.0], s, offset=[0, 0]).value, expected)


# What was published, where it does not


def refused(bracket, *reasons):
    assert (bracket.value, bracket.status) == (None, "vacuous")
    assert all(reason in bracket.reason for reason in reasons), bracket.reason
    assert bracket.conditions
    return True


def test_theorem_5_fails_where_the_model_has_outputs():
    """A model that is right already has no risk; the bound from labels is above."""
    K, Y, s = np.diag([2.0, 1.0]), np.array([1.0, 2.0]), 1.0
    published = (s / (s + 2.0)) ** 2 * (Y**2).mean()
    assert training_risk(K, Y - Y, s) == 0 < published
    bracket = published_risk_bracket(K, Y, s, offset=Y)
    assert refused(bracket, "f_0 is not zero: ||f_0|| = 1 ||Y||")


def test_theorem_5_fails_for_the_ridge_of_equation_14():
    """(1/n) sum (f - y)^2 + s ||f||^2 has the ridge n s."""
    K, Y, s, n = np.eye(4), np.arange(1.0, 5), 1.0, 4
    objective = lambda f: ((f - Y) ** 2).mean() + s * f @ np.linalg.solve(K, f)
    f = K @ inverse(K, n * s) @ Y
    step = 1e-4 * np.ones(4)
    assert objective(f) < min(objective(f + step), objective(f - step))
    risk, upper = ((f - Y) ** 2).mean(), (s / (s + 1)) ** 2 * (Y**2).mean()
    assert risk > 2 * upper
    bracket = published_risk_bracket(K, Y, s, averaged=True)
    assert refused(bracket, "the ridge of a mean over 4 rows is 4 s")
    assert within(risk_bracket(K, Y, n * s), risk)
    one = published_risk_bracket([[1.0]], [2.0], s, averaged=True)
    assert within(one, 1.0)


def test_theorem_5_does_not_order_risks_by_the_condition_number():
    Y, s = np.array([1.0, 0.1]), 1.0
    worse, better = np.diag([2.0, 1.0]), np.diag([200.0, 1.0])
    assert condition(better, s) > 50 * condition(worse, s)
    assert training_risk(better, Y, s) < 0.1 * training_risk(worse, Y, s)
    low, high = (risk_bracket(K, Y, s).value for K in (better, worse))
    assert low[0] < high[0]
    assert low[1] == high[1]


def test_theorem_6_says_nothing_of_a_singular_kernel():
    K, S = np.diag([1.0, 1.0, 0.0]), np.diag([0.0, 0.0, 1e-3])
    assert refused(published_eigenvalue_bracket(K, S), "numerical rank is 2 of 3")
    # No multiple of l_3(K) = 0 reaches l_3(K + S).
    assert spectrum(K + S)[-1] > 0
    assert within(eigenvalue_bracket(K, K + S, 1e-2), spectrum(K + S))


def test_theorem_6_says_nothing_when_eta_is_large():
    K, S = np.diag([1.0, 1e-7]), 1e-3 * np.eye(2)
    bracket = published_eigenvalue_bracket(K, S)
    assert refused(bracket, "eta is 1e+04 for `added`, expected below 1")
    lower, upper = eigenvalue_bracket(K, K + S, 1e-2).value
    assert np.all(lower >= np.diag(K) - 1e-12)
    assert upper[1] < 1.2e-3


def test_theorem_7_fails_for_a_large_eta():
    """K = 1, S = 3, s = 1, Y = 1: c = 1, eta = 3, a = 1/4, l_1 ratio 5/2."""
    K, S, Y, s = np.eye(1), 3 * np.eye(1), np.ones(1), 1.0
    truth = np.sqrt(training_risk(K + S, Y, s) / training_risk(K, Y, s))
    a, ratio = 1 / (1 - 3) ** 2, 5 / 2
    close(truth, 0.4)
    close((ratio / a, ratio * a), (10, 0.625))
    assert truth < ratio / a
    bracket = published_risk_ratio_bracket(K, S, s)
    assert refused(bracket, "eta is 3 for `added`, expected below 1")
    assert within(risk_ratio_bracket(K, K + S, s), truth)
    close(risk_ratio_bracket(K, K + S, s).value, (0.4, 0.4))
    for pair, name in (((S, K / 2), "first"), ((K / 2, S), "second")):
        bracket = published_candidate_bracket(K, *pair, s)
        assert refused(bracket, f"eta is 3 for `{name}`")


def test_theorem_7_on_a_kernel_such_as_those_of_real_models():
    """32 examples with a smallest eigenvalue of 1e-7: the sides change places."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    K = symmetric((U * np.geomspace(1e-3, 1e-7, 32)) @ U.T)
    x = rng.normal(size=(32, 40)) * 1e-3
    S, Y, s = x @ x.T, np.sign(rng.normal(size=32)), 1e-4
    truth = np.sqrt(training_risk(K + S, Y, s) / training_risk(K, Y, s))
    root = np.linalg.inv(scipy.linalg.sqrtm(K).real)
    a = condition(K, s) / (1 - np.linalg.norm(root @ S @ root, 2)) ** 2
    ratio = (spectrum(K + S)[0] + s) / (spectrum(K)[0] + s)
    assert a * ratio < truth < ratio / a
    assert refused(published_risk_ratio_bracket(K, S, s), "eta is ")
    assert refused(published_eigenvalue_bracket(K, S), "eta is ")
    assert within(risk_ratio_bracket(K, K + S, s), truth)


def test_residual_norm_is_not_monotone_but_bounded():
    K, S, s = np.diag([0.0, 1000.0]), np.outer([1.0, 3.0], [1.0, 3.0]), 1.0
    Y = np.array([0.0, 2.0])
    ratio = np.sqrt(training_risk(K + S, Y, s) / training_risk(K, Y, s))
    assert ratio > 1.7
    assert within(risk_ratio_bracket(K, K + S, s), ratio)
    assert refused(published_risk_ratio_bracket(K, S, s), "singular")


# Errors


def test_kernels_of_different_examples_are_refused():
    with pytest.raises(ValueError, match="`other` has 3 rows; expected 2 as `gram`"):
        weyl_bracket(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match="`added` has 3 rows; expected 2 as `gram`"):
        published_eigenvalue_bracket(np.eye(2), np.eye(3))
    with pytest.raises(ValueError, match=r"`offset` has shape \(1,\); expected \(2,\)"):
        published_risk_bracket(np.eye(2), np.ones(2), 1.0, offset=[1.0])


def test_what_is_no_kernel_is_refused():
    for statement in (eigenvalue_bracket, condition_bracket, risk_ratio_bracket):
        with pytest.raises(NotPSDError, match="`other` is not positive"):
            statement(np.eye(2), np.diag([1.0, -1.0]), 1.0)
        with pytest.raises(NotSymmetricError, match="`gram` is not symmetric"):
            statement([[1.0, 0.0], [1.0, 1.0]], np.eye(2), 1.0)
        with pytest.raises(ValueError, match="`ridge=0.0`; expected"):
            statement(np.eye(2), np.eye(2), 0.0)
    with pytest.raises(NotPSDError, match="`added` is not positive"):
        published_risk_ratio_bracket(np.eye(2), -np.eye(2), 1.0)
