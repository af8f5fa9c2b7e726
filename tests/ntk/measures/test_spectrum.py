import dataclasses
import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntk.measures import spectrum
from ntk.measures.spectrum import (
    NotPSDError,
    NotSymmetricError,
    NumericalError,
    condition_number,
    cumulative_power,
    decay_exponent,
    effective_dimension,
    eigensystem,
    eigenvalues,
    entropy_rank,
    numerical_rank,
    participation_ratio,
    relative_ridge,
    stable_rank,
    target_power,
)

RANKS = [entropy_rank, stable_rank, participation_ratio]

spectra = arrays(
    np.float64, st.integers(1, 12), elements=st.floats(0, 1e3, allow_subnormal=False)
).filter(lambda l: l.max() > 1e-3)
seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def orthogonal(k, seed):
    matrix = np.random.default_rng(seed).standard_normal((k, k))
    return np.linalg.qr(matrix)[0]


def with_spectrum(values, seed=0):
    U = orthogonal(len(values), seed)
    gram = (U * np.asarray(values)) @ U.T
    return (gram + gram.T) / 2


# Known answers


@pytest.mark.parametrize("k", [1, 2, 7])
def test_identity_uses_all_directions(k):
    values = eigenvalues(np.eye(k))
    close(values, np.ones(k))
    for rank in [*RANKS, numerical_rank]:
        close(rank(values), k)
    close(relative_ridge(values, 0.25), 0.25)
    close(effective_dimension(values, 0.25), k / 1.25)
    close(condition_number(values, 0.25), 1)


def test_rank_one_uses_one_direction():
    v = np.array([1.0, -2.0, 3.0, 0.5])
    values = eigenvalues(np.outer(v, v))
    close(values, [v @ v, 0, 0, 0])
    for rank in RANKS:
        close(rank(values), 1)
    assert numerical_rank(values) == 1
    close(effective_dimension(values, v @ v), 0.5)
    close(relative_ridge(values, 1e-3), 1e-3 * (v @ v) / 4)
    close(condition_number(values, 1.0), v @ v + 1)


def test_two_to_one_by_hand():
    values = [1.0, 3.0]  # any order
    close(stable_rank(values), 10 / 9)
    close(participation_ratio(values), 16 / 10)
    close(entropy_rank(values), 4 / 3**0.75)
    close(effective_dimension(values, 1.0), 3 / 4 + 1 / 2)
    close(condition_number(values, 1.0), 2)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("first", "last"), [(1, None), (1, 40), (5, 17)])
def test_power_law_gives_its_exponent(alpha, first, last):
    values = 7.0 * np.arange(1, 41) ** -alpha
    fit = decay_exponent(values[::-1], first=first, last=last)
    close(fit.exponent, alpha)
    close(fit.r_squared, 1)
    assert (fit.first, fit.last) == (first, last or 40)


def test_decay_window_is_indices_from_one():
    values = np.r_[1e6, 5.0 * np.arange(2, 21) ** -1.5, 1e-7, 0.0]
    close(decay_exponent(values, first=2, last=20).exponent, 1.5)
    assert abs(decay_exponent(values, first=1, last=20).exponent - 1.5) > 0.5
    assert abs(decay_exponent(values, first=2, last=21).exponent - 1.5) > 0.5
    assert decay_exponent(values).last == 21
    assert decay_exponent(values * np.r_[np.ones(20), 1e-10, 1]).last == 20


def test_decay_agrees_with_a_library_fit():
    values = np.sort(np.random.default_rng(0).gamma(0.5, size=15))[::-1]
    x, y = np.log(np.arange(3, 13)), np.log(values[2:12])
    slope, intercept = np.polyfit(x, y, 1)
    fit = decay_exponent(values, first=3, last=12)
    close(fit.exponent, -slope)
    residual = y - slope * x - intercept
    close(fit.r_squared, 1 - residual.var() / y.var())
    assert fit.r_squared < 0.999


@pytest.mark.parametrize("values", [[1.0], [2.0, 1.0], [2.0, 1.0, 1e-30, 0.0]])
def test_decay_of_fewer_than_three_eigenvalues_is_nan(values):
    fit = decay_exponent(values)
    assert math.isnan(fit.exponent)
    assert math.isnan(fit.r_squared)
    assert fit.last == min(len(values), 2)


def test_flat_spectrum_has_exponent_zero_and_no_r_squared():
    fit = decay_exponent(eigenvalues(with_spectrum(np.full(9, 3.0))))
    close(fit.exponent, 0)
    assert math.isnan(fit.r_squared)


def test_numerical_rank_depends_on_the_dtype_of_the_computation():
    values = [1.0, 1e-5, 1e-6, 1e-12, 0.0]
    assert numerical_rank(values) == 4
    assert numerical_rank(values, eps=float(np.finfo(np.float32).eps)) == 3
    assert numerical_rank([0.0, 0.0]) == 0
    # k eps l_1 = 0.4 is not above itself, and the floor grows with k.
    assert numerical_rank([1.0, 0.4, 0.5, 0.1], eps=0.1) == 2
    assert numerical_rank([1.0, 0.4, 0.5], eps=0.1) == 3


# Eigenvalues and eigenvectors


@given(spectra, seeds)
def test_eigensystem_recovers_a_matrix_built_from_it(values, seed):
    gram = with_spectrum(values, seed)
    expected = np.sort(values)[::-1]
    actual, vectors = eigensystem(gram)
    scale = expected[0]
    close(actual / scale, expected / scale)
    close(eigenvalues(gram) / scale, expected / scale)
    close((vectors * actual) @ vectors.T / scale, gram / scale)
    close(vectors.T @ vectors, np.eye(len(values)))
    assert np.all(np.diff(actual, append=0.0) <= 0)  # and the last is not negative


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])  # the tolerance is relative
def test_rounding_is_clipped_to_exactly_zero(scale):
    gram = scale * np.diag([1.0, 0.5, -1e-9])
    assert eigenvalues(gram)[-1] == eigensystem(gram)[0][-1] == 0.0
    for function in (eigenvalues, eigensystem, spectrum.summary):
        with pytest.raises(NotPSDError):
            function(gram, tolerance=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_asymmetry_within_tolerance_is_averaged(scale):
    gram = scale * np.array([[2.0, 1.0 + 1e-7], [1.0 - 1e-7, 2.0]])
    close(eigenvalues(gram) / scale, [3, 1], 1e-12)
    with pytest.raises(NotSymmetricError):
        eigenvalues(gram, tolerance=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_and_lists_are_accepted_and_left_alone(dtype):
    tensor = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)
    before = tensor.clone()
    close(eigenvalues(tensor), [3, 1])
    close(spectrum.summary(tensor).trace, 4)
    assert torch.equal(tensor, before)
    assert eigenvalues(tensor).dtype == np.float64
    close(eigenvalues(tensor.tolist()), [3, 1])
    close(entropy_rank(torch.ones(5, dtype=dtype)), 5)
    close(target_power(torch.eye(2, dtype=dtype), torch.tensor([0, 3])), [0, 1])


# Plain reimplementations and invariances


@given(spectra, st.floats(1e-3, 1e3))
def test_measures_match_loops(values, ridge):
    total = sum(values)
    p = [l / total for l in values]
    close(effective_dimension(values, ridge), sum(l / (l + ridge) for l in values))
    close(entropy_rank(values), math.prod(q**-q for q in p if q > 0))
    close(participation_ratio(values), total**2 / sum(l**2 for l in values))
    close(stable_rank(values), sum(l**2 for l in values) / max(values) ** 2)
    ratio = (max(values) + ridge) / (min(values) + ridge)
    close(condition_number(values, ridge), ratio)


@given(spectra, st.floats(1e-6, 1e6))
def test_ranks_ignore_scale_and_order(values, scale):
    for rank in [*RANKS, numerical_rank]:
        close(rank(scale * values[::-1]), rank(values))
        assert 0.999999 <= rank(values) <= len(values) * 1.000001
    s1, s2 = relative_ridge(values, 0.01), relative_ridge(scale * values, 0.01)
    close(s2, scale * s1)
    close(
        effective_dimension(scale * values, s2), effective_dimension(values, s1), 1e-9
    )
    close(condition_number(scale * values, s2), condition_number(values, s1), 1e-9)


@given(spectra, seeds)
def test_summary_ignores_rotations(values, seed):
    values = values + 0.1  # keeps the rank away from the rounding floor
    one = spectrum.summary(np.diag(values))
    other = spectrum.summary(with_spectrum(values, seed))
    assert one.numerical_rank == other.numerical_rank == len(values)
    for name, value in dataclasses.asdict(one).items():
        if name == "decay_r_squared" and np.ptp(np.log(values)) < 2e-6:
            continue  # 0 / 0 but for rounding
        np.testing.assert_allclose(
            getattr(other, name), value, rtol=1e-7, atol=1e-7, err_msg=name
        )


def test_effective_dimension_is_the_trace_of_the_hat_matrix():
    gram = with_spectrum([5.0, 2.0, 0.1, 0.0])
    hat = gram @ np.linalg.inv(gram + 0.3 * np.eye(4))
    close(effective_dimension(eigenvalues(gram), 0.3), np.trace(hat))


def test_stable_rank_is_that_of_the_gram_matrix():
    gram = with_spectrum([5.0, 2.0, 0.1])
    expected = np.linalg.norm(gram) ** 2 / np.linalg.norm(gram, 2) ** 2
    close(stable_rank(eigenvalues(gram)), expected)
    assert abs(expected - np.trace(gram) / 5.0) > 0.1


# Target-weighted spectrum


def test_target_power_by_hand():
    close(target_power(np.eye(3), [3.0, 0.0, 4.0]), [0.36, 0, 0.64])
    close(cumulative_power(np.eye(3), [3.0, 0.0, 4.0]), [0.36, 0.36, 1])
    two = [[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]
    close(target_power(np.eye(3), two), [1 / 9, 4 / 9, 4 / 9])
    close(target_power(np.eye(3)[:, 1:], two), [4 / 9, 4 / 9])


@given(st.integers(1, 8), st.integers(1, 3), seeds, st.floats(1e-3, 1e3))
def test_target_power_matches_loops(k, t, seed, scale):
    targets = np.random.default_rng(seed).standard_normal((k, t))
    U = orthogonal(k, seed + 1)
    expected = [
        sum((U[:, i] @ targets[:, j]) ** 2 for j in range(t)) / (targets**2).sum()
        for i in range(k)
    ]
    close(target_power(U, targets), expected)
    close(target_power(U, scale * targets), expected)
    close(cumulative_power(U, targets), [sum(expected[: i + 1]) for i in range(k)])
    close(cumulative_power(U, targets)[-1], 1)


def test_target_along_the_first_eigenvector_has_all_its_power_there():
    _, vectors = eigensystem(with_spectrum([1.0, 9.0, 4.0]))
    close(cumulative_power(vectors, 1e200 * vectors[:, 0]), [1, 1, 1])
    close(cumulative_power(vectors, vectors[:, 2]), [0, 0, 1])


# Summary


def test_summary_holds_the_functions_and_is_json():
    values = np.arange(1.0, 9.0) ** -1.2
    gram = with_spectrum(values)
    result = spectrum.summary(gram, epsilon=1e-2)
    ridge = 1e-2 * values.sum() / 8
    expected = {
        "trace": np.trace(gram),
        "largest_eigenvalue": 1.0,
        "ridge": ridge,
        "effective_dimension": effective_dimension(values, ridge),
        "condition_number": condition_number(values, ridge),
        "entropy_rank": entropy_rank(values),
        "stable_rank": stable_rank(values),
        "participation_ratio": participation_ratio(values),
        "numerical_rank": 8,
        "decay_exponent": 1.2,
        "decay_r_squared": 1.0,
    }
    record = json.loads(json.dumps(dataclasses.asdict(result)))
    assert set(record) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(record[name], value, rtol=1e-10, err_msg=name)
    assert {type(value) for value in dataclasses.astuple(result)} == {int, float}


def test_summary_decomposes_once(monkeypatch):
    counted = Mock(wraps=spectrum.scipy.linalg.eigvalsh)
    monkeypatch.setattr(spectrum.scipy.linalg, "eigvalsh", counted)
    monkeypatch.setattr(spectrum.scipy.linalg, "eigh", None)
    spectrum.summary(np.eye(4))
    assert counted.call_count == 1


def test_summary_default_ridge_and_floor():
    gram = np.diag([1.0, 0.5, 0.25, 1e-9])
    close(spectrum.summary(gram).ridge, 1e-3 * np.trace(gram) / 4)
    assert spectrum.summary(gram).numerical_rank == 4
    single = spectrum.summary(gram, eps=float(np.finfo(np.float32).eps))
    assert single.numerical_rank == 3
    close(single.decay_exponent, decay_exponent([1.0, 0.5, 0.25]).exponent)


def test_summary_of_rank_two_has_nan_decay():
    result = spectrum.summary(np.diag([1.0, 1.0, 0.0]))
    assert math.isnan(result.decay_exponent)
    assert math.isnan(result.decay_r_squared)
    close(result.entropy_rank, 2)


def test_results_are_frozen():
    for result in (decay_exponent([1.0]), spectrum.summary(np.eye(3))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.trace = 2.0


# Errors


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("function", [eigenvalues, eigensystem, spectrum.summary])
def test_non_finite_entries_are_named_and_counted(function, bad):
    gram = np.eye(3)
    gram[0, 1] = gram[1, 0] = bad
    with pytest.raises(NumericalError, match=r"`gram` has 2 of 9 entries"):
        function(gram)


@pytest.mark.parametrize(
    ("gram", "error", "match"),
    [
        (np.ones((2, 3)), ValueError, r"`gram` has shape \(2, 3\); expected \(k, k\)"),
        (np.ones(4), ValueError, r"shape \(4,\)"),
        (np.ones((2, 2, 1, 1)), ValueError, r"Flatten"),
        (np.ones((0, 0)), ValueError, r"shape \(0, 0\)"),
        (np.eye(2) * 1j, ValueError, "complex128"),
        ([[1.0, 2.0], [0.0, 5.0]], NotSymmetricError, r"2\.00e\+00.*5\.00e\+00"),
        ([[1.0, 2.0], [2.0, 1.0]], NotPSDError, r"-1\.00e\+00.*3\.00e\+00"),
        (-np.eye(2), NotPSDError, r"-1\.00e\+00"),
        (np.diag([0.0, -1.0]), NotPSDError, r"-1\.00e\+00"),
    ],
)
def test_bad_gram_matrices(gram, error, match):
    for function in (eigenvalues, eigensystem, spectrum.summary):
        with pytest.raises(error, match=match):
            function(gram)


def test_errors_call_the_matrix_by_the_given_name():
    for function in (eigenvalues, eigensystem):
        with pytest.raises(NotPSDError, match="`other` is not positive"):
            function(-np.eye(2), name="other")


@pytest.mark.parametrize(
    "measure",
    [
        *RANKS,
        numerical_rank,
        decay_exponent,
        lambda l: relative_ridge(l, 0.1),
        lambda l: effective_dimension(l, 0.1),
        lambda l: condition_number(l, 0.1),
    ],
)
def test_bad_eigenvalues(measure):
    with pytest.raises(NotPSDError, match=r"-1\.00e-03"):
        measure([1.0, -1e-3])
    with pytest.raises(NumericalError, match="`eigenvalues` has 1 of 2"):
        measure([1.0, np.nan])
    with pytest.raises(ValueError, match="not the Gram matrix"):
        measure(np.eye(2))
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        measure([])


@pytest.mark.parametrize("measure", RANKS)
def test_zero_spectrum_has_no_rank_profile(measure):
    with pytest.raises(ValueError, match="all zero"):
        measure(np.zeros(3))
    with pytest.raises(ValueError, match="all zero"):
        spectrum.summary(np.zeros((3, 3)))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_bad_numbers(bad):
    for call in (
        lambda: relative_ridge([1.0], bad),
        lambda: effective_dimension([1.0], bad),
        lambda: condition_number([1.0], bad),
        lambda: numerical_rank([1.0], eps=bad),
        lambda: eigenvalues(np.eye(2), tolerance=bad),
        lambda: spectrum.summary(np.eye(2), epsilon=bad),
    ):
        with pytest.raises(ValueError, match=rf"={bad!r}`; expected a finite number"):
            call()


def test_zero_ridge_and_eps_are_refused():
    for measure in (effective_dimension, condition_number):
        with pytest.raises(ValueError, match="`ridge=0.0`.*relative_ridge"):
            measure([1.0, 0.0], 0.0)
    for eps in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"`eps={eps}`.*finfo"):
            numerical_rank([1.0], eps=eps)


@pytest.mark.parametrize(
    ("first", "last"), [(0, 3), (3, 2), (1, 5), (-1, None), (1, 4)]
)
def test_bad_decay_windows(first, last):
    with pytest.raises(ValueError, match=f"`first={first}, last={last}`.*<= 3"):
        decay_exponent([3.0, 2.0, 1.0, 0.0], first=first, last=last)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([1.0, 2.0], r"`targets` has shape \(2,\); expected \(3,\)"),
        (np.ones((3, 1, 1)), "`targets` has shape"),
        (np.zeros(3), "all zero"),
        ([1.0, np.nan, 0.0], "`targets` has 1 of 3"),
    ],
)
def test_bad_targets(targets, match):
    for function in (target_power, cumulative_power):
        with pytest.raises(ValueError, match=match):
            function(np.eye(3), targets)


def test_a_gram_matrix_is_not_taken_for_eigenvectors():
    with pytest.raises(ValueError, match="not orthonormal.*eigensystem"):
        target_power(with_spectrum([3.0, 2.0, 1.0]), np.ones(3))
