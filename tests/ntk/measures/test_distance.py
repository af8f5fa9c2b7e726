import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from ntk.measures import distance
from ntk.measures.distance import (
    UndefinedError,
    alignment,
    best_scale,
    cka,
    cosine,
    kernel_distance,
    permutation_alignment,
    relative_difference,
    subspace_overlap,
    trace_ratio,
)
from ntk.measures.spectrum import NotPSDError, NotSymmetricError, NumericalError

NORMS = ["entrywise1", "frobenius", "spectral", "nuclear"]
ORDERS = {"frobenius": "fro", "spectral": 2, "nuclear": "nuc"}
PAIRED = [best_scale, cosine, kernel_distance, trace_ratio, cka]

seeds = st.integers(0, 2**32 - 1)
scales = st.floats(1e-3, 1e3)


def close(actual, expected, tolerance=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def features(k, seed, dim=None):
    return np.random.default_rng(seed).standard_normal((k, dim or k + 2))


def gram(k, seed, dim=None):
    x = features(k, seed, dim)
    return x @ x.T


def orthogonal(k, seed):
    return np.linalg.qr(features(k, seed, k))[0]


def centring(k):
    return np.eye(k) - np.ones((k, k)) / k


def norm(matrix, name):
    if name == "entrywise1":
        return sum(abs(x) for row in matrix for x in row)
    return np.linalg.norm(matrix, ORDERS[name])


# Norms and the best scale


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("rescale", [False, True])
def test_relative_difference_by_hand(name, rescale):
    A, B = np.diag([3.0, 1.0]), np.diag([2.0, 2.0])  # best scale 1
    expected = {"spectral": 1 / 3, "frobenius": 1 / math.sqrt(5)}.get(name, 1 / 2)
    close(relative_difference(A, B, name, rescale=rescale), expected)
    doubled = relative_difference(A, 2 * B, name, rescale=rescale)
    close(doubled, expected if rescale else norm(2 * B - A, name) / norm(A, name))


@given(st.integers(1, 7), st.integers(1, 7), seeds)
def test_relative_difference_matches_a_dumb_twin(k, m, seed):
    A, B = features(k, seed, m), features(k, seed + 1, m)
    cells = [(i, j) for i in range(k) for j in range(m)]
    a = sum(A[c] * B[c] for c in cells) / sum(B[c] ** 2 for c in cells)
    close(best_scale(A, B), a)
    for name in NORMS:
        size = norm(A, name)
        close(relative_difference(A, B, name), norm(B - A, name) / size)
        after = relative_difference(A, B, name, rescale=True)
        close(after, norm(a * B - A, name) / size)


@given(st.integers(1, 7), seeds)
def test_symmetric_matrices_have_the_same_norms(k, seed):
    A, B = gram(k, seed), gram(k, seed + 1)
    for name in NORMS:
        expected = norm(B - A, name) / norm(A, name)
        close(relative_difference(A, B, name), expected)


@given(st.integers(2, 6), seeds, scales)
def test_best_scale_is_the_optimum(k, seed, scale):
    A, B = gram(k, seed), scale * gram(k, seed + 1)
    found = minimize_scalar(lambda a: np.linalg.norm(a * B - A) ** 2)
    np.testing.assert_allclose(best_scale(A, B), found.x, rtol=1e-5)
    best = relative_difference(A, B, "frobenius", rescale=True)
    close(best, math.sqrt(1 - cosine(A, B) ** 2), 1e-7)
    for nudge in (0.999, 1.001):
        worse = nudge * best_scale(A, B) * B
        assert best < relative_difference(A, worse, "frobenius")


@given(st.integers(1, 6), seeds, scales)
def test_a_scaled_copy_is_no_different_after_the_best_scale(k, seed, scale):
    A = gram(k, seed)
    close(best_scale(A, scale * A), 1 / scale)
    close(trace_ratio(A, scale * A), scale)
    for name in NORMS:
        close(relative_difference(A, A, name), 0)
        close(relative_difference(A, scale * A, name), abs(scale - 1), 1e-9)
        close(relative_difference(A, scale * A, name, rescale=True), 0)


def test_the_frobenius_scale_is_used_for_every_norm():
    A, B = np.diag([1.0, 1.0]), np.diag([3.0, 1.0])  # best scale 4 / 10
    close(relative_difference(A, B, "spectral", rescale=True), 0.6)
    close(relative_difference(A, B, "entrywise1", rescale=True), (0.2 + 0.6) / 2)


def test_a_zero_other_differs_by_one():
    for name in NORMS:
        close(relative_difference(gram(3, 0), np.zeros((3, 3)), name), 1)


# Cosine, distance, trace ratio


def test_cosine_by_hand():
    A, B = np.diag([1.0, 0.0]), np.ones((2, 2))
    close(cosine(A, B), 1 / 2)
    close(kernel_distance(A, B), 1 / 2)
    close(kernel_distance(A, np.diag([0.0, 1.0])), 1)
    close(trace_ratio(np.diag([1.0, 3.0]), B), 1 / 2)


@given(st.integers(1, 7), st.integers(1, 7), seeds, scales, scales)
def test_cosine_matches_a_loop_and_ignores_scale(k, m, seed, p, q):
    A, B = features(k, seed, m), features(k, seed + 1, m)
    dot = sum(A[i, j] * B[i, j] for i in range(k) for j in range(m))
    expected = dot / math.sqrt(sum(x**2 for x in A.flat) * sum(x**2 for x in B.flat))
    close(cosine(p * A, q * B), expected)
    close(cosine(q * B, p * A), expected)
    close(kernel_distance(p * A, q * B), 1 - expected)


def test_kernel_distance_keeps_digits_of_close_kernels():
    step = 1e-10  # the distance is step^2 / 2 to first order, below the float64 eps
    A, B = np.diag([1.0, 0.0]), np.array([[1.0, step], [0.0, 0.0]])
    np.testing.assert_allclose(kernel_distance(A, B), step**2 / 2, rtol=1e-6)
    assert kernel_distance(A, A) == 0


@given(st.integers(4, 7), seeds)
def test_measures_ignore_a_common_rotation_but_cka_only_a_permutation(k, seed):
    A, B, Q = gram(k, seed), gram(k, seed + 1), orthogonal(k, seed + 2)
    P = np.eye(k)[np.random.default_rng(seed).permutation(k)]
    for measure in (best_scale, cosine, kernel_distance, trace_ratio):
        close(measure(Q @ A @ Q.T, Q @ B @ Q.T), measure(A, B), 1e-8)
    for unbiased in (False, True):
        shuffled = cka(P @ A @ P.T, P @ B @ P.T, unbiased=unbiased)
        close(shuffled, cka(A, B, unbiased=unbiased), 1e-9)


# CKA


def hsic_u_statistic(A, B):
    """Average over distinct (i, j, q, r), Song et al.'s definition."""
    terms = [
        A[i, j] * (B[i, j] + B[q, r] - 2 * B[i, q])
        for i, j, q, r in itertools.permutations(range(len(A)), 4)
    ]
    return sum(terms) / len(terms)


def hsic_closed_form(A, B):
    k, one = len(A), np.ones(len(A))
    A, B = A - np.diag(np.diag(A)), B - np.diag(np.diag(B))
    middle = (one @ A @ one) * (one @ B @ one) / ((k - 1) * (k - 2))
    last = 2 * (one @ A @ B @ one) / (k - 2)
    return (np.trace(A @ B) + middle - last) / (k * (k - 3))


@pytest.mark.parametrize("k", [4, 5, 6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hsic", [hsic_u_statistic, hsic_closed_form])
def test_unbiased_cka_is_the_u_statistic(k, seed, hsic):
    A, B = gram(k, seed), gram(k, seed + 9)
    expected = hsic(A, B) / math.sqrt(hsic(A, A) * hsic(B, B))
    close(cka(A, B), expected)
    assert abs(cka(A, B, unbiased=False) - expected) > 1e-3


@given(st.integers(2, 8), seeds)
def test_biased_cka_is_the_cosine_of_centred_kernels(k, seed):
    A, B, H = gram(k, seed), gram(k, seed + 1), centring(k)
    expected = np.sum((H @ A @ H) * (H @ B @ H))
    expected /= np.linalg.norm(H @ A @ H) * np.linalg.norm(H @ B @ H)
    close(cka(A, B, unbiased=False), expected, 1e-9)


@given(st.integers(5, 8), seeds, scales, scales)
def test_cka_ignores_scale_and_offset(k, seed, p, offset):
    A, B = gram(k, seed), gram(k, seed + 1)
    # A common offset of the features is centred away.
    shift = features(k, seed).sum(axis=1) + offset
    moved = p * A + shift[:, None] + shift[None, :]
    for unbiased in (False, True):
        close(cka(A, A, unbiased=unbiased), 1)
        expected = cka(A, B, unbiased=unbiased)
        close(cka(moved, B, unbiased=unbiased), expected, 1e-7)
        close(cka(B, moved, unbiased=unbiased), expected, 1e-7)


def test_unbiased_cka_ignores_the_diagonal():
    A, B = gram(6, 0), gram(6, 1)
    close(cka(A + np.diag([5.0, 0, 1, 2, 0, 9]), B), cka(A, B))


def test_only_unbiased_cka_is_zero_for_independent_features():
    pairs = [(gram(10, 2 * s, 40), gram(10, 2 * s + 1, 40)) for s in range(400)]
    unbiased = [cka(A, B) for A, B in pairs]
    biased = [cka(A, B, unbiased=False) for A, B in pairs]
    error = np.std(unbiased) / math.sqrt(len(pairs))
    assert abs(np.mean(unbiased)) < 4 * error < 0.05
    assert np.mean(biased) > 0.5


# Alignment with targets


def test_alignment_by_hand():
    y = np.array([1.0, -1.0, 1.0, -1.0])
    close(alignment(np.outer(y, y), y), 1)
    close(alignment(np.eye(4), y), 1 / 2)
    # Centred, an offset of the kernel along 1 1' disappears; uncentred, it does not.
    offset = np.outer(y, y) + np.ones((4, 4))
    close(alignment(offset, y), 1 / math.sqrt(2))
    close(alignment(offset, y, centred=True), 1)
    close(alignment(offset, y + 7, centred=True), 1)


@given(st.integers(2, 7), st.integers(1, 3), seeds, scales, scales)
def test_alignment_matches_the_full_matrices(k, t, seed, p, q):
    K, Y = p * gram(k, seed), q * features(k, seed + 1, t)
    YY = Y @ Y.T
    close(alignment(K, Y), np.sum(K * YY) / np.linalg.norm(K) / np.linalg.norm(YY))
    close(alignment(K, Y, centred=True), cka(K, YY, unbiased=False), 1e-9)


def test_targets_may_have_one_axis():
    K, y = gram(5, 0), features(5, 1, 1)
    assert alignment(K, y) == alignment(K, y[:, 0])


# Permutation null


def test_permutation_null_matches_shuffled_alignments():
    K, Y = gram(6, 0), features(6, 1, 2)
    for centred in (False, True):
        null = permutation_alignment(K, Y, seed=3, draws=50, centred=centred)
        generator = np.random.default_rng(3)
        values = [
            alignment(K, generator.permutation(Y), centred=centred) for _ in range(50)
        ]
        close(null.observed, alignment(K, Y, centred=centred))
        close(null.mean, np.mean(values))
        close(null.std, np.std(values, ddof=1))
        close(null.p_value, (1 + sum(v >= null.observed for v in values)) / 51)
        assert null.draws == 50


def test_permutation_null_is_the_enumeration_in_the_limit():
    K, y = gram(4, 5), np.array([1.0, 2.0, -1.0, 0.5])
    values = [alignment(K, y[list(p)]) for p in itertools.permutations(range(4))]
    null = permutation_alignment(K, y, seed=0, draws=20000)
    assert abs(null.mean - np.mean(values)) < 5 * np.std(values) / math.sqrt(20000)
    share = np.mean(np.array(values) >= alignment(K, y) - 1e-12)
    assert abs(null.p_value - share) < 0.02


def test_p_value_separates_signal_from_noise():
    y = np.repeat([1.0, -1.0], 10)
    signal = permutation_alignment(np.outer(y, y) + np.eye(20), y, seed=1, draws=99)
    assert signal.p_value == 1 / 100
    noise = permutation_alignment(np.eye(20), y, seed=0, draws=99)
    assert noise.p_value == 1  # every shuffle ties
    close(noise.std, 0)


def test_p_values_are_uniform_without_signal():
    p = [
        permutation_alignment(gram(8, s), features(8, s + 999, 1), seed=s, draws=39)
        for s in range(300)
    ]
    share = np.mean([null.p_value <= 0.25 for null in p])
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 300)


def test_permutation_seed_is_local():
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    K, y = gram(6, 0), features(6, 1, 1)
    one = permutation_alignment(K, y, seed=1, draws=20)
    assert one == permutation_alignment(K, y, seed=1, draws=20)
    assert one != permutation_alignment(K, y, seed=2, draws=20)
    assert np.array_equal(np.random.get_state()[1], state)


def test_outputs_of_one_example_move_together():
    # Outputs 0 and 1 have different scales, the same for all examples.
    y = np.tile([1.0, 5.0], 6)
    K = np.outer(y, y)
    together = permutation_alignment(K, y, seed=0, draws=30, outputs=2)
    close([together.mean, together.p_value], [1, 1])
    apart = permutation_alignment(K, y, seed=0, draws=30)
    assert apart.mean < 0.95


# Subspaces


def test_subspace_overlap_by_hand():
    A, B = np.diag([4.0, 3.0, 2.0, 1.0]), np.diag([1.0, 4.0, 2.0, 3.0])
    close([subspace_overlap(A, B, rank) for rank in (1, 2, 3, 4)], [0, 0.5, 2 / 3, 1])
    c, s = math.cos(0.3), math.sin(0.3)
    R = np.array([[c, -s], [s, c]])
    D = np.diag([2.0, 1.0])
    close(subspace_overlap(D, R @ D @ R.T, 1), c**2)


@given(st.integers(2, 7), seeds, scales, st.data())
def test_subspace_overlap_compares_projectors(k, seed, scale, data):
    rank = data.draw(st.integers(1, k))
    values = 2.0 ** -np.arange(k)
    U, V = orthogonal(k, seed), orthogonal(k, seed + 1)
    A, B = (U * values) @ U.T, (V * values) @ V.T
    P, Q = U[:, :rank] @ U[:, :rank].T, V[:, :rank] @ V[:, :rank].T
    close(subspace_overlap(A, scale * B, rank), np.trace(P @ Q) / rank, 1e-9)
    close(subspace_overlap(A, scale * A, rank), 1)
    close(subspace_overlap(A, B, k), 1)


def test_overlap_needs_as_many_directions_as_its_rank():
    A, B = gram(5, 0), gram(5, 1, 2)
    assert subspace_overlap(A, B, 2) < 1
    with pytest.raises(UndefinedError, match="`rank=3`.*at most 2.*`other`"):
        subspace_overlap(A, B, 3)
    with pytest.raises(UndefinedError, match="`reference`"):
        subspace_overlap(B, A, 3)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"`rank={rank}`; expected 1\.\.5"):
            subspace_overlap(A, A, rank)


# Summary


def test_summary_holds_the_functions_and_is_json():
    A, B = gram(6, 0), gram(6, 1)
    expected = {
        "best_scale": best_scale(A, B),
        "cosine": cosine(A, B),
        "cka": cka(A, B),
        "trace_ratio": trace_ratio(A, B),
        "overlap": subspace_overlap(A, B, 2),
    }
    for name in NORMS:
        expected[name] = relative_difference(A, B, name)
        expected[f"{name}_rescaled"] = relative_difference(A, B, name, rescale=True)
    result = distance.summary(A, B, rank=2)
    record = json.loads(json.dumps(dataclasses.asdict(result)))
    assert set(record) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(record[name], value, rtol=1e-10, err_msg=name)
    assert {type(value) for value in dataclasses.astuple(result)} == {float}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.cka = 0.0


def test_summary_has_nan_where_a_measure_is_undefined():
    small = distance.summary(gram(3, 0), gram(3, 1), rank=1)
    assert math.isnan(small.cka)
    assert not math.isnan(small.overlap)
    low_rank = distance.summary(gram(5, 0), gram(5, 1, 1), rank=2)
    assert math.isnan(low_rank.overlap)
    close(low_rank.cka, cka(gram(5, 0), gram(5, 1, 1)))
    with pytest.raises(ValueError, match="`rank=6`"):
        distance.summary(gram(5, 0), gram(5, 1), rank=6)


def test_tolerance_reaches_the_eigenvalues():
    A, B = gram(4, 0), np.diag([1.0, 0.8, 0.5, -1e-4])
    for function in (subspace_overlap, distance.summary):
        with pytest.raises(NotPSDError, match="`other` is not positive"):
            function(A, B, rank=1)
        function(A, B, rank=1, tolerance=1e-3)


# Arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_are_accepted_and_left_alone(dtype):
    A = torch.from_numpy(gram(6, 0)).to(dtype)
    B, y = torch.from_numpy(gram(6, 1)).to(dtype), torch.arange(6.0)
    before = [A.clone(), B.clone(), y.clone()]
    A64, B64 = A.double().numpy().copy(), B.double().numpy().copy()
    # float32 products differ in the two triangles: symmetric up to rounding.
    for measure in PAIRED:
        close(measure(A, B), measure(A64, B64))
        assert type(measure(A, B)) is float
    close(alignment(A, y, centred=True), alignment(A64, y.numpy(), centred=True))
    assert distance.summary(A, B, rank=2) == distance.summary(A64, B64, rank=2)
    permutation_alignment(A, y, seed=0, draws=3)
    assert all(map(torch.equal, [A, B, y], before))


@pytest.mark.parametrize(
    "measure",
    [
        *PAIRED,
        lambda A, B: relative_difference(A, B, "nuclear"),
        lambda A, B: subspace_overlap(A, B, 1),
        lambda A, B: distance.summary(A, B, rank=1),
    ],
)
def test_bad_pairs(measure):
    A = gram(5, 0)
    broken = A.copy()
    broken[1, 2] = np.nan
    with pytest.raises(NumericalError, match="`reference` has 1 of 25"):
        measure(broken, A)
    with pytest.raises(NumericalError, match="`other` has 1 of 25"):
        measure(A, broken)
    with pytest.raises(
        ValueError, match=r"`other` has shape \(4, 4\); expected \(5, 5\)"
    ):
        measure(A, gram(4, 0))
    with pytest.raises(ValueError, match=r"`reference` has shape \(5,\)"):
        measure(A[0], A[0])


@pytest.mark.parametrize("name", NORMS)
def test_zero_reference_has_no_relative_difference(name):
    for rescale in (False, True):
        with pytest.raises(ValueError, match="`reference` is all zero"):
            relative_difference(np.zeros((2, 2)), np.eye(2), name, rescale=rescale)
    with pytest.raises(ValueError, match="`other` is all zero"):
        relative_difference(np.eye(2), np.zeros((2, 2)), name, rescale=True)


def test_zero_kernels_are_named():
    A, zero = gram(5, 0), np.zeros((5, 5))
    for measure in (cosine, kernel_distance):
        with pytest.raises(ValueError, match="`reference` is all zero"):
            measure(zero, A)
        with pytest.raises(ValueError, match="`other` is all zero"):
            measure(A, zero)
    with pytest.raises(ValueError, match="`other` is all zero"):
        best_scale(A, zero)
    with pytest.raises(ValueError, match="`reference` has trace 0"):
        trace_ratio(zero, A)
    with pytest.raises(ValueError, match="`reference` is all zero"):
        distance.summary(zero, A, rank=1)
    with pytest.raises(ValueError, match="`gram` is all zero"):
        alignment(zero, np.ones(5))


@pytest.mark.parametrize("bad", ["fro", "Frobenius", 2, None])
def test_unknown_norms_are_listed(bad):
    with pytest.raises(ValueError, match=f"`norm={bad!r}`.*entrywise1.*nuclear"):
        relative_difference(np.eye(2), np.eye(2), bad)


def test_squareness_and_symmetry_where_needed():
    rectangle, skew = np.ones((4, 5)), np.triu(np.ones((5, 5)))
    for measure in (cka, trace_ratio):
        with pytest.raises(ValueError, match=r"\(4, 5\)"):
            measure(rectangle, rectangle)
    with pytest.raises(NotSymmetricError, match="`other`"):
        cka(np.eye(5), skew)
    with pytest.raises(NotSymmetricError, match="`reference`"):
        subspace_overlap(skew, np.eye(5), 1)
    with pytest.raises(NotSymmetricError, match="`gram`"):
        alignment(skew, np.ones(5))


def test_cka_is_undefined_without_enough_or_varying_rows():
    with pytest.raises(UndefinedError, match="3 rows.*at least 4"):
        cka(gram(3, 0), gram(3, 1))
    close(cka(gram(3, 0), gram(3, 0), unbiased=False), 1)
    A, constant = gram(6, 0), 0.1 * np.ones((6, 6))
    for unbiased in (False, True):
        with pytest.raises(UndefinedError, match="`other` does not survive"):
            cka(A, constant, unbiased=unbiased)
    with pytest.raises(UndefinedError, match="`reference` does not survive"):
        cka(np.diag([1.0, 2, 3, 4, 5, 6]), A)


def test_bad_targets_and_draws():
    K = gram(6, 0)
    with pytest.raises(ValueError, match=r"`targets` has shape \(5,\)"):
        alignment(K, np.ones(5))
    with pytest.raises(ValueError, match="`targets` is all zero"):
        alignment(K, np.zeros(6))
    with pytest.raises(UndefinedError, match="`targets` does not survive"):
        alignment(K, 0.1 * np.ones(6), centred=True)
    with pytest.raises(UndefinedError, match="`gram` does not survive"):
        alignment(np.ones((6, 6)), np.arange(6), centred=True)
    with pytest.raises(ValueError, match="`draws=1`"):
        permutation_alignment(K, np.ones(6), seed=0, draws=1)
    for outputs in (0, 4):
        with pytest.raises(ValueError, match=f"`outputs={outputs}`"):
            permutation_alignment(K, np.ones(6), seed=0, draws=9, outputs=outputs)
