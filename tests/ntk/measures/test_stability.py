"""Subsets of a kernel's examples: how they are drawn, and the spread over them."""

import itertools
import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk.measures.distance import UndefinedError, alignment, cosine, relative_difference
from ntk.measures.spectrum import NumericalError, eigenvalues, entropy_rank
from ntk.measures.stability import SampleSpread, growth

seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def blocks(n, c, seed, features=6):
    """Return a kernel ``(n, n, c, c)``."""
    J = np.random.default_rng(seed).standard_normal((n, c, features))
    return np.einsum("icp,jdp->ijcd", J, J)


def numbered(n, c=1):
    """Return a kernel whose entries encode their examples and outputs."""
    i, j, a, b = np.indices((n, n, c, c))
    return (((i * n) + j) * c + a) * c + b


def examples_of(gram, n, c=1):
    """Return the examples of a submatrix of a numbered kernel."""
    return [int(entry) // (n * c * c) for entry in gram[::c, 0]]


def over_examples(measure, *kernels, size=None, **options):
    """Return the spread at one size, by default half of the examples."""
    half = len(kernels[0]) // 2 if kernels else 1
    (spread,) = growth(
        measure, *kernels, sizes=[half if size is None else size], **options
    )
    return spread


def seen(n, **options):
    """Return the subsets that a measure is called with, except the whole."""
    result = []

    def measure(gram, *_):
        result.append(examples_of(gram, n))
        return 0.0

    over_examples(measure, numbered(n)[:, :, 0, 0], **options)
    return result[1:]


# Subsets.


@given(st.integers(2, 6), st.integers(1, 3), seeds)
def test_measures_get_the_gram_matrices_of_the_same_examples(n, c, seed):
    whole, other = numbered(n, c), blocks(n, c, seed % 1000)
    targets = np.arange(n)[:, None] * [1, 10]
    calls = 0

    def measure(first, second, rows):
        nonlocal calls
        calls += 1
        examples = examples_of(first, n, c)
        m = n if calls == 1 else size
        assert len(set(examples)) == m
        for (p, i), (q, j) in itertools.product(enumerate(examples), repeat=2):
            for a, b in itertools.product(range(c), repeat=2):
                assert first[p * c + a, q * c + b] == whole[i, j, a, b]
                assert second[p * c + a, q * c + b] == other[i, j, a, b]
        assert rows.tolist() == [[i, 10 * i] for i in examples]
        return 1.0

    size = 1 + seed % (n - 1)
    options = {"size": size, "draws": 3, "seed": seed % 97, "targets": targets}
    result = over_examples(measure, whole, torch.from_numpy(other), **options)
    assert calls == 4
    assert result == SampleSpread(n, size, 3, 1.0, 1.0, 0.0, 0.0)


def test_every_subset_is_as_likely():
    counts = Counter(tuple(subset) for subset in seen(5, size=2, draws=4000))
    assert len(counts) == math.comb(5, 2)
    expected = 4000 / len(counts)
    assert sum((k - expected) ** 2 / expected for k in counts.values()) < 27.9  # 0.1 %


def test_subsets_keep_the_proportions_of_the_labels():
    labels = np.array([0, 1, 2, 0, 1, 0, 1, 0, 0, 0, 2, 1])  # 6, 4, 2
    for subset in seen(12, size=6, draws=50, labels=labels):
        assert np.bincount(labels[subset]).tolist() == [3, 2, 1]
    named = np.array(["bad", "good"] * 6)
    for subset in seen(12, size=5, draws=50, labels=named):
        assert set(Counter(named[subset]).values()) == {2, 3}
    plain = [np.bincount(labels[s], minlength=3).tolist() for s in seen(12, size=6)]
    assert len(set(map(tuple, plain))) > 1


def test_seeds_repeat_and_leave_the_global_generator_alone():
    state = np.random.get_state()[1].tolist()
    subsets = [seen(20, draws=5, seed=seed) for seed in (1, 1, 2)]
    assert subsets[0] == subsets[1] != subsets[2]
    assert np.random.get_state()[1].tolist() == state


# The spread.


def mean_of_diagonal(gram):
    return float(np.mean(np.diag(gram)))


def test_spread_matches_all_subsets():
    kernel = blocks(7, 2, 0)
    diagonal = np.einsum("iicc->ic", kernel).mean(axis=1)
    means = [np.mean(some) for some in itertools.combinations(diagonal, 3)]
    result = over_examples(mean_of_diagonal, kernel, size=3, draws=4000)
    close(result.value, diagonal.mean())
    assert result.mean == pytest.approx(np.mean(means), abs=0.05 * np.std(means))
    assert result.std == pytest.approx(np.std(means), rel=0.05)
    # The textbook standard error of a mean, whatever the size of the subsets.
    assert result.standard_error == pytest.approx(
        diagonal.std(ddof=1) / math.sqrt(7), rel=0.05
    )


@pytest.mark.parametrize("size", [1, 4, 9])
def test_standard_error_of_a_mean_does_not_depend_on_the_size(size):
    kernel = np.diag(np.random.default_rng(3).standard_normal(10) ** 2)
    result = over_examples(mean_of_diagonal, kernel, size=size, draws=3000)
    expected = np.diag(kernel).std(ddof=1) / math.sqrt(10)
    assert result.standard_error == pytest.approx(expected, rel=0.06)


def test_standard_error_is_the_deviation_over_fresh_samples():
    """For the cosine of two kernels, which is not a mean."""
    generator = np.random.default_rng(0)

    def kernels(n):
        features = generator.standard_normal((n, 5)) * [3, 2, 1, 1, 1]
        return features @ features.T, features[:, 1:] @ features[:, 1:].T

    fresh = [cosine(*kernels(60)) for _ in range(400)]
    errors = [
        over_examples(cosine, *kernels(60), draws=60, seed=i).standard_error
        for i in range(60)
    ]
    truth = np.std(fresh, ddof=1)
    assert np.mean(errors) == pytest.approx(truth, rel=0.15)
    # The uncorrected deviation over subsets is too large.
    half = over_examples(cosine, *kernels(60), size=15, draws=200)
    assert half.std > 1.3 * truth


def test_stratified_standard_error_is_that_of_the_strata():
    labels = np.repeat([0, 1], 10)
    values = 5.0 * labels + np.random.default_rng(2).standard_normal(20) ** 2
    strata = [values[labels == k] for k in (0, 1)]
    expected = math.sqrt(sum(0.25 * s.var(ddof=1) / 10 for s in strata))
    options = {"size": 10, "draws": 3000}
    result = over_examples(mean_of_diagonal, np.diag(values), labels=labels, **options)
    assert result.standard_error == pytest.approx(expected, rel=0.06)
    plain = over_examples(mean_of_diagonal, np.diag(values), **options)
    assert plain.standard_error > 1.5 * result.standard_error


def test_all_of_the_examples_have_no_spread():
    kernel = blocks(5, 2, 1)
    result = over_examples(mean_of_diagonal, kernel, size=5, draws=9)
    assert (result.size, result.draws) == (5, 1)
    assert (
        result.value
        == result.mean
        == mean_of_diagonal(kernel.transpose(0, 2, 1, 3).reshape(10, 10))
    )
    assert math.isnan(result.std)
    assert math.isnan(result.standard_error)


# Growth.


def test_growth_is_the_spread_at_each_size():
    kernel, other = blocks(24, 1, 0), blocks(24, 1, 1)
    measure = lambda a, b: relative_difference(a, b, "frobenius", rescale=True)
    result = growth(measure, kernel, other, sizes=[2, 5, 24], draws=6, seed=3)
    assert [point.size for point in result] == [2, 5, 24]
    for point in result[:-1]:
        options = {"size": point.size, "draws": 6, "seed": 3}
        assert over_examples(measure, kernel, other, **options) == point
    assert growth(measure, kernel, other, sizes=[5], draws=6, seed=3) == [result[1]]
    assert result[-1].mean == result[0].value
    text = json.dumps([asdict(point) for point in result])
    assert json.loads(text)[0]["mean"] == result[0].mean


@pytest.mark.parametrize(
    ("n", "sizes"), [(64, [4, 8, 16, 32, 64]), (50, [6, 12, 25, 50]), (5, [5])]
)
def test_growth_halves_the_examples_unless_told(n, sizes):
    result = growth(mean_of_diagonal, np.eye(n), draws=2)
    assert [point.size for point in result] == sizes


def test_ranks_grow_and_saturate():
    """The mean at m examples is what m fresh examples have on average."""
    rank = lambda gram: entropy_rank(eigenvalues(gram))
    features = np.random.default_rng(1).standard_normal((80, 6))
    result = growth(rank, features @ features.T, draws=40)
    means = [point.mean for point in result]
    assert means == sorted(means)
    assert means[0] < 4 < means[-1] < 6
    generator, fresh = np.random.default_rng(2), []
    for _ in range(300):
        x = generator.standard_normal((10, 6))
        fresh.append(rank(x @ x.T))
    at_ten = next(point for point in result if point.size == 10)
    assert at_ten.mean == pytest.approx(np.mean(fresh), rel=0.03)


def test_growth_of_an_alignment_takes_the_targets_along():
    generator = np.random.default_rng(4)
    labels = np.repeat([0, 1], 16)
    signs = 2.0 * labels - 1
    features = generator.standard_normal((32, 3)) + 3 * signs[:, None] * [1, 0, 0]
    gram = features @ features.T
    result = growth(alignment, gram, targets=signs, labels=labels, draws=20)
    close(result[-1].value, alignment(gram, signs))
    assert all(point.mean > 0.7 for point in result)
    # Targets of other examples are not aligned.
    mixed = growth(alignment, gram, targets=generator.permutation(signs), draws=20)
    assert mixed[-1].mean < 0.3


@given(st.integers(2, 12), st.integers(1, 2), seeds)
def test_a_measure_of_scale_has_no_spread(n, c, seed):
    kernel = blocks(n, c, seed)
    ratio = lambda a, b: float(np.trace(b) / np.trace(a))
    result = over_examples(ratio, kernel, 3 * kernel, draws=4, seed=1)
    close((result.value, result.mean, result.std, result.standard_error), (3, 3, 0, 0))


# What is refused.


@pytest.mark.parametrize(
    ("kernels", "options", "message"),
    [
        ([], {}, r"`kernels` have shapes \[\]; expected \(n, n\)"),
        ([np.ones((3, 2))], {}, r"`kernels` have shapes \[\(3, 2\)\]; expected"),
        ([np.ones((3, 3, 2))], {}, "the same examples on both axes of all"),
        ([np.ones((3, 3)), np.ones((4, 4))], {}, r"\[\(3, 3\), \(4, 4\)\]"),
        ([np.eye(3)], {"size": 0}, "`size=0`; expected 1 to 3"),
        ([np.eye(3)], {"size": 4}, "`size=4`; expected 1 to 3"),
        ([np.eye(3)], {"draws": 1}, "`draws=1`; expected at least 2"),
        ([np.eye(3)], {"labels": [0, 1]}, r"`labels` has shape \(2,\); expected a row"),
        ([np.eye(3)], {"targets": 1.0}, r"`targets` has shape \(\); expected a row"),
    ],
)
def test_misfits_are_refused(kernels, options, message):
    with pytest.raises(ValueError, match=message):
        over_examples(lambda *_: 0.0, *kernels, **options)


@pytest.mark.parametrize("sizes", [[], [3, 3], [4, 2]])
def test_sizes_that_do_not_ascend_are_refused(sizes):
    with pytest.raises(
        ValueError, match="expected ascending numbers of examples, 1 to 5"
    ):
        growth(mean_of_diagonal, np.eye(5), sizes=sizes)


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(NumericalError, match="`kernels` has 1 of 9 entries"):
        over_examples(mean_of_diagonal, np.diag([1.0, np.nan, 1.0]))
    where = lambda gram: 1.0 if len(gram) == 4 else float("inf")
    with pytest.raises(UndefinedError, match="`measure` is inf on 2 of 4 examples"):
        over_examples(where, np.eye(4))
