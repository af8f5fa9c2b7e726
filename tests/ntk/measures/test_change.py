"""How a kernel changes, against plain loops."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk.measures import distance
from ntk.measures.change import kernel_change

seeds = st.integers(0, 2**32 - 1)
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
METHODS = ("full", "rows:2", "columns:2", "rows:1+columns:1", "rows:2+bias", "lora:2")
METHODS += ("dora:2", "bitfit", "head", "probe", "masked rows:2")


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def features(k, seed, p=None):
    return np.random.default_rng(seed).standard_normal((k, p or k + 2))


def gram(k, seed):
    x = features(k, seed)
    return x @ x.T


def blocks(n, c, seed):
    """Return a kernel ``(n, n, c, c)`` and its Gram matrix, by loops."""
    J = features(n * c, seed)
    K, G = np.empty((n, n, c, c)), J @ J.T
    for i, j, a, b in np.ndindex(K.shape):
        K[i, j, a, b] = G[i * c + a, j * c + b]
    return K, G


def numbers(change):
    found = asdict(change)
    return found.pop("measures") | found


@given(st.integers(2, 5), st.integers(1, 3), seeds)
def test_change_matches_a_dumb_twin(n, c, seed):
    (before, A), (after, B) = blocks(n, c, seed), blocks(n, c, seed + 1)
    Y = features(n, seed + 2, c)
    found = kernel_change(before, after, targets=Y)
    norms = [math.sqrt(sum(x * x for x in K.flatten())) for K in (A, B)]
    product = sum(a * b for a, b in zip(A.flatten(), B.flatten(), strict=True))
    close(found.distance, 1 - product / norms[0] / norms[1])
    close(found.norm_ratio, norms[1] / norms[0])
    close(found.measures.frobenius, np.linalg.norm(B - A) / norms[0])
    assert found.rank == max(1, min(10, n * c - 1))
    assert asdict(found.measures) == pytest.approx(
        asdict(distance.summary(A, B, rank=found.rank)), nan_ok=True
    )
    y = np.array([Y[i, k] for i in range(n) for k in range(c)])
    for value, K, size in (
        (found.alignment_before, A, norms[0]),
        (found.alignment_after, B, norms[1]),
    ):
        close(value, y @ K @ y / (size * (y @ y)))


@given(st.integers(2, 5), st.integers(2, 3), seeds)
def test_change_of_gram_matrices_is_that_of_kernels(n, c, seed):
    (before, A), (after, B) = blocks(n, c, seed), blocks(n, c, seed + 1)
    Y = features(n, seed, c)
    kernels = torch.from_numpy(before), torch.from_numpy(after)
    found = kernel_change(*kernels, targets=torch.from_numpy(Y), rank=2)
    of_grams = kernel_change(A, B, targets=Y.reshape(-1), rank=2)
    assert numbers(found) == pytest.approx(numbers(of_grams), nan_ok=True)
    columns = features(n * c, seed, 3)
    shapes = [kernel_change(*pair, targets=columns) for pair in (kernels, (A, B))]
    assert numbers(shapes[0]) == pytest.approx(numbers(shapes[1]), nan_ok=True)
    assert kernel_change(A, B).alignment_before is None


@given(st.integers(4, 9), seeds, st.floats(0.01, 100))
def test_a_scaled_kernel_has_not_turned(k, seed, scale):
    A = gram(k, seed)
    found = kernel_change(A, scale * A, rank=2)
    close(found.distance, 0)
    close(found.norm_ratio, scale)
    close((found.measures.cka, found.measures.overlap), 1)
    close(found.measures.frobenius, abs(scale - 1), 1e-7)


def test_change_is_plain_numbers():
    found = kernel_change(gram(12, 0), gram(12, 1), targets=np.ones(12))
    assert found.rank == 10
    text = json.dumps(asdict(found), allow_nan=False)
    assert json.loads(text)["measures"]["cka"] == found.measures.cka


def test_alignment_shows_a_kernel_that_turns_to_its_targets():
    y = np.repeat([1.0, -1.0], 6)
    found = kernel_change(np.eye(12), np.eye(12) + np.outer(y, y), targets=y)
    close(found.alignment_before, 1 / math.sqrt(12))
    close(found.alignment_after, 13 / math.sqrt(11 + 13**2))


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        (np.eye(3), np.eye(4), {}, r"`other` has shape \(4, 4\); expected \(3, 3\)"),
        (np.ones(3), np.eye(3), {}, r"`before` has shape \(3,\); expected \(n, n, c"),
        (np.eye(3), np.ones((3, 3, 1)), {}, r"`after` has shape \(3, 3, 1\)"),
        (np.eye(3), np.eye(3), {"rank": 4}, "`rank=4`; expected 1..3"),
        (np.eye(3), np.eye(3), {"rank": 0}, "`rank=0`; expected 1..3"),
        (np.eye(3), np.eye(3), {"targets": np.ones(2)}, r"`targets` has shape \(2,\)"),
    ],
)
def test_misfits_are_refused(before, after, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_change(before, after, **options)
