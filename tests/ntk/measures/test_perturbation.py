"""Bounds of the spectrum of a kernel that gains a layer."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk.measures.perturbation import brackets
from ntk.measures.spectrum import NotPSDError, NotSymmetricError

seeds = st.integers(0, 2**32 - 1)
NAMES = [
    "eigenvalue growth, theorem 6",
    "eigenvalue growth, ridge",
    "condition number",
    "effective dimension",
]
PUBLISHED, GROWTH, CONDITION, DIMENSION = NAMES


@st.composite
def grams(draw, k):
    """Return a ``(k, k)`` of rank 1 to k, with eigenvalues over several decades."""
    rng = np.random.default_rng(draw(seeds))
    rank = draw(st.integers(1, k))
    values = 10.0 ** rng.uniform(draw(st.floats(-6, 1)), 2, size=rank)
    U = np.linalg.qr(rng.normal(size=(k, k)))[0][:, :rank]
    return symmetric((U * values) @ U.T)


@st.composite
def problems(draw):
    """Return K, S of any rank and a ridge."""
    k = draw(st.integers(1, 7))
    return draw(grams(k)), draw(grams(k)), 10 ** draw(st.floats(-3, 3))


@st.composite
def definite_problems(draw):
    """Return K, S and eta < 1 such that theorem 6 applies."""
    k = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(seeds))
    x, y = rng.normal(size=(2, k, k))
    K = symmetric(x @ x.T + np.eye(k))
    root = scipy.linalg.sqrtm(K).real
    eta = draw(st.floats(1e-3, 0.99))
    part = y @ y.T / np.linalg.norm(y @ y.T, 2)
    return K, symmetric(eta * root @ part @ root), eta


def symmetric(matrix):
    return (matrix + matrix.T) / 2


def spectrum(K):
    return np.linalg.eigvalsh(K)[::-1].clip(0)


def relative_norm(K, S, s):
    root = np.linalg.inv(scipy.linalg.sqrtm(K + s * np.eye(len(K))).real)
    return np.linalg.norm(root @ S @ root, 2)


def holds(bracket):
    slack = 1e-7 * np.abs(bracket.measured)
    return np.all(bracket.lower <= bracket.measured + slack) and np.all(
        bracket.measured <= bracket.upper + slack
    )


@given(problems())
def test_bounds_with_a_ridge_hold_for_every_kernel(problem):
    K, S, s = problem
    found = brackets(K, S, s)
    assert list(found) == NAMES
    for name in NAMES[1:]:
        assert holds(found[name]), name
        assert found[name].conditions == {}


@given(problems())
def test_measured_values_and_bounds_are_those_of_plain_formulas(problem):
    K, S, s = problem
    found = brackets(K, S, s)
    k, before, after = len(K), spectrum(K), spectrum(K + S)
    factor = 1 + relative_norm(K, S, s)
    condition = (before[0] + s) / (before[-1] + s)
    dimension = np.trace(K @ np.linalg.inv(K + s * np.eye(k)))
    for name, lower, measured, upper in (
        (GROWTH, 1, (after + s) / (before + s), factor),
        (
            CONDITION,
            max(condition / factor, 1),
            (after[0] + s) / (after[-1] + s),
            condition * factor,
        ),
        (
            DIMENSION,
            dimension,
            np.trace((K + S) @ np.linalg.inv(K + S + s * np.eye(k))),
            k - (k - dimension) / factor,
        ),
    ):
        bracket = found[name]
        np.testing.assert_allclose(bracket.lower, lower, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(bracket.measured, measured, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(bracket.upper, upper, rtol=1e-6, err_msg=name)


@given(definite_problems())
def test_theorem_6_holds_under_its_conditions(problem):
    K, S, eta = problem
    bracket = brackets(K, S, 1.0)[PUBLISHED]
    assert bracket.conditions == {"K definite": True, "η < 1": True}
    assert holds(bracket)
    np.testing.assert_allclose(bracket.measured, spectrum(K + S) / spectrum(K))
    np.testing.assert_allclose(bracket.lower, 1 - eta, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(bracket.upper, 1 + eta, rtol=1e-7)


def test_bounds_by_hand():
    found = brackets(np.diag([3.0, 1.0]), np.diag([0.0, 0.5]), 1.0)
    for name, lower, measured, upper in (
        (PUBLISHED, 0.5, [1, 1.5], 1.5),
        (GROWTH, 1, [1, 1.25], 1.25),
        (CONDITION, 1.6, [1.6], 2.5),
        (DIMENSION, 1.25, [1.35], 1.4),
    ):
        np.testing.assert_allclose(found[name].lower, lower)
        np.testing.assert_allclose(found[name].measured, measured)
        np.testing.assert_allclose(found[name].upper, upper)


def test_upper_bounds_are_reached_by_a_multiple():
    K = np.diag([4.0, 2.0, 1.0])
    found = brackets(K, 2 * K, 1e-12)
    np.testing.assert_allclose(found[PUBLISHED].measured, [3, 3, 3])
    np.testing.assert_allclose(found[PUBLISHED].upper, 3)
    np.testing.assert_allclose(found[GROWTH].measured, found[GROWTH].upper)
    np.testing.assert_allclose(found[DIMENSION].measured, found[DIMENSION].upper)


def test_theorem_6_says_nothing_of_a_singular_kernel():
    K, S = np.diag([1.0, 1.0, 0.0]), np.diag([0.0, 0.0, 1e-3])
    bracket = brackets(K, S, 1e-2)[PUBLISHED]
    assert (bracket.lower, bracket.upper) == (-np.inf, np.inf)
    assert bracket.conditions == {"K definite": False, "η < 1": False}
    np.testing.assert_allclose(bracket.measured, [1, 1])


def test_theorem_6_says_nothing_from_below_when_eta_is_large():
    """Every eigenvalue grows, but the lower bound is far below 0."""
    bracket = brackets(np.diag([1.0, 1e-5]), 1e-3 * np.eye(2), 1e-2)[PUBLISHED]
    np.testing.assert_allclose((bracket.lower, bracket.upper), (-99, 101))
    assert bracket.conditions == {"K definite": True, "η < 1": False}
    np.testing.assert_allclose(bracket.measured, [1.001, 101])


def test_an_eigenvalue_within_rounding_is_not_positive():
    bracket = brackets(np.diag([1.0, 1e-7]), np.diag([0.1, 0.0]), 1e-2)[PUBLISHED]
    assert bracket.conditions == {"K definite": False, "η < 1": True}


def test_tensors_are_accepted():
    K, S = torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
    np.testing.assert_allclose(brackets(K, S, 1.0)[PUBLISHED].measured, [1.5, 2])


def test_what_is_no_kernel_is_refused():
    with pytest.raises(ValueError, match="`added` has 3 rows; expected 2 as `gram`"):
        brackets(np.eye(2), np.eye(3), 1.0)
    with pytest.raises(NotPSDError, match="`added` is not positive"):
        brackets(np.eye(2), -np.eye(2), 1.0)
    with pytest.raises(NotSymmetricError, match="`gram` is not symmetric"):
        brackets([[1.0, 0.0], [1.0, 1.0]], np.eye(2), 1.0)
    with pytest.raises(ValueError, match="`ridge=0.0`; expected"):
        brackets(np.eye(2), np.eye(2), 0.0)
