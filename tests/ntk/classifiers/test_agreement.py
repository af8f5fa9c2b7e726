"""Agreement of two classifiers: against loops, by enumeration, and in simulation."""

import itertools
import math
from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk.classifiers.agreement import (
    agreement,
    bootstrap_difference,
    kappa,
    margin_correlation,
    margins,
    mcnemar,
    paired_difference,
    predictions,
)
from ntk.measures.distance import UndefinedError
from ntk.measures.spectrum import NumericalError
from rocoft.data.metrics import scores

seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def drawn(n, c, seed, *, ties=False):
    """Return correlated outputs of two classifiers, and labels."""
    generator = np.random.default_rng(seed)
    common = generator.standard_normal((n, c))
    first, second = (common + generator.standard_normal((n, c)) for _ in range(2))
    if ties:
        first, second = first.round(), second.round()
    return first, second, generator.integers(0, c, n)


# Predictions and margins.


@given(st.integers(1, 9), st.integers(2, 5), seeds)
def test_predictions_and_margins_match_loops(n, c, seed):
    outputs, _, labels = drawn(n, c, seed, ties=True)
    result, correct = predictions(outputs), margins(outputs, labels, correct_class=True)
    for row, label, guess, margin in zip(outputs, labels, result, correct, strict=True):
        assert guess == next(k for k in range(c) if row[k] == max(row))
        others = [row[k] for k in range(c) if k != label]
        assert margin == row[label] - max(others)
        assert (margin > 0) <= (guess == label)
    if c == 2:
        difference = margins(outputs, labels)
        close(difference, outputs[:, 1] - outputs[:, 0])
        close(correct, np.where(labels == 1, difference, -difference))
    else:
        assert (margins(outputs, labels) == correct).all()


@given(st.integers(2, 9), seeds)
def test_margins_of_two_classes_are_outputs_too(n, seed):
    first, second, labels = drawn(n, 2, seed)
    one = first[:, 1] - first[:, 0]
    assert (margins(one, labels) == one).all()
    assert (predictions(one) == predictions(first)).all()
    assert agreement(one, second) == agreement(first, second)
    assert mcnemar(one, second, labels) == mcnemar(first, second, labels)
    mixed, whole = (
        bootstrap_difference(f, second, labels, draws=10) for f in (one, first)
    )
    close(astuple(mixed), astuple(whole))


def test_the_first_of_equal_outputs_is_predicted():
    assert predictions([0.0, 1.0, -1.0]).tolist() == [0, 1, 0]
    assert predictions(torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [0]


# Agreement of predictions.


@given(st.integers(2, 12), st.integers(2, 4), seeds)
def test_agreement_and_kappa_match_counts(n, c, seed):
    first, second, _ = drawn(n, c, seed)
    a, b = predictions(first).tolist(), predictions(second).tolist()
    p = sum(x == y for x, y in zip(a, b, strict=True)) / n
    assert agreement(first, second) == p
    of_a, of_b = Counter(a), Counter(b)
    q = sum(of_a[k] * of_b[k] for k in range(c)) / n**2
    if len({*a, *b}) == 1:
        with pytest.raises(UndefinedError, match=f"predict class {a[0]} for all {n}"):
            kappa(first, second)
    else:
        close(kappa(first, second), (p - q) / (1 - q))


def test_kappa_discounts_agreement_by_chance():
    generator = np.random.default_rng(0)
    # Two independent classifiers with 90 % accuracy.
    first, second = (np.where(generator.random(20000) < 0.9, 1.0, -1) for _ in range(2))
    assert agreement(first, second) == pytest.approx(0.82, abs=0.01)
    assert kappa(first, second) == pytest.approx(0.0, abs=0.03)
    assert kappa(first, first) == 1


# Rank correlations.


def tau_b(x, y):
    """Return (C - D) / sqrt((pairs not tied in x) (pairs not tied in y))."""
    total, untied = 0, [0, 0]
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        total, untied = total + a * b, [untied[0] + abs(a), untied[1] + abs(b)]
    return total / math.sqrt(untied[0] * untied[1])


@given(st.integers(2, 9), st.integers(2, 4), seeds, st.booleans(), st.booleans())
def test_tau_matches_pairs(n, c, seed, ties, correct):
    first, second, labels = drawn(n, c, seed, ties=ties)
    options = {"correct_class": correct}
    x, y = (margins(f, labels, **options) for f in (first, second))
    if len(set(x)) == 1 or len(set(y)) == 1:
        with pytest.raises(UndefinedError, match="which have no ranks"):
            margin_correlation(first, second, labels, **options)
    else:
        tau = margin_correlation(first, second, labels, **options)
        close(tau, tau_b(x, y))


def test_correct_class_softmax_of_two_classes_has_the_same_tau():
    first, second, labels = drawn(40, 2, 5)
    p = []
    for outputs in (first, second):
        odds = np.exp(outputs)
        p.append((odds / odds.sum(axis=1, keepdims=True))[np.arange(40), labels])
    result = margin_correlation(first, second, labels, correct_class=True)
    close(result, tau_b(*p), 1e-9)
    assert result != pytest.approx(margin_correlation(first, second, labels), abs=1e-3)


@given(seeds)
def test_tau_does_not_depend_on_scale(seed):
    first, second, labels = drawn(9, 3, seed)
    tau, scaled, itself, stretched = (
        margin_correlation(first, other, labels)
        for other in (second, 7 * second + 3, first, 2 * first)
    )
    close(tau, scaled)
    close([itself, stretched], 1)


# The paired bootstrap.


def enumerated(gain, level):
    """Return percentiles of the means of all equally likely resamples."""
    means = [np.mean(some) for some in itertools.product(gain, repeat=len(gain))]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize("gain", [(0, 1, 0, 1, -1), (0, 1, 0, 0, 0)])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_bootstrap_interval_is_that_of_all_resamples(gain, level):
    # Margins: 1 where only that one is right, 0 where it is wrong.
    first, second = np.maximum(gain, 0.0), np.maximum(np.negative(gain), 0.0)
    result = bootstrap_difference(first, second, [1] * 5, level=level, draws=20_000)
    close(result.estimate, np.mean(gain))
    close([result.low, result.high], enumerated(gain, level))
    assert (result.level, result.draws) == (level, 20_000)


@given(st.integers(2, 9), st.integers(2, 4), seeds)
def test_any_metric_is_resampled_as_accuracy_is(n, c, seed):
    first, second, labels = drawn(n, c, seed)
    options = {"draws": 30, "seed": seed, "level": 0.9}
    fast = bootstrap_difference(first, second, labels, **options)
    seen = []

    def accuracy(outputs, y):
        seen.append(y)
        return sum(o.argmax() == k for o, k in zip(outputs, y, strict=True)) / len(y)

    slow = bootstrap_difference(first, second, labels, metric=accuracy, **options)
    close(astuple(fast), astuple(slow))
    # Both classifiers are scored on the same resamples.
    assert all((a == b).all() for a, b in zip(seen[::2], seen[1::2], strict=True))
    swapped = bootstrap_difference(second, first, labels, **options)
    close(
        (swapped.estimate, swapped.low, swapped.high),
        (-fast.estimate, -fast.high, -fast.low),
    )


def test_bootstrap_of_f1():
    first, second, labels = drawn(60, 2, 3)
    f1 = lambda outputs, y: scores(outputs, y, ["f1"])["f1"]
    result = bootstrap_difference(first, second, labels, metric=f1, draws=60, seed=1)
    close(result.estimate, f1(first, labels) - f1(second, labels))
    assert result.low < result.estimate < result.high
    again = bootstrap_difference(first, second, labels, metric=f1, draws=60, seed=1)
    other = bootstrap_difference(first, second, labels, metric=f1, draws=60, seed=2)
    assert result == again != other


def test_bootstrap_interval_covers_the_true_difference():
    generator = np.random.default_rng(0)
    truth, covered, repeats = 0.1, 0, 300
    for i in range(repeats):
        # Three in ten examples are hard for both.
        hard = generator.random(150) < 0.3
        chance = np.where(hard, [[0.5], [0.3]], [[0.65 / 0.7], [0.61 / 0.7]])
        right = generator.random((2, 150)) < chance
        first, second = np.where(right, 1.0, -1.0)
        result = bootstrap_difference(
            first, second, np.ones(150, int), draws=400, seed=i
        )
        covered += result.low <= truth <= result.high
    assert 0.92 <= covered / repeats <= 0.98


def test_bootstrap_leaves_the_global_generator_alone():
    state = np.random.get_state()[1].tolist()
    bootstrap_difference(*drawn(9, 2, 0), draws=5)
    assert np.random.get_state()[1].tolist() == state


# McNemar's test.


@given(st.integers(1, 12), st.integers(2, 4), seeds)
def test_mcnemar_sums_the_tails_of_a_binomial(n, c, seed):
    first, second, labels = drawn(n, c, seed)
    pairs = list(
        zip(predictions(first) == labels, predictions(second) == labels, strict=True)
    )
    ours, theirs = pairs.count((True, False)), pairs.count((False, True))
    total = ours + theirs
    chances = [math.comb(total, k) / 2**total for k in range(total + 1)]
    expected = sum(p for p in chances if p <= chances[ours] * (1 + 1e-9))
    close(mcnemar(first, second, labels), expected)
    close(mcnemar(second, first, labels), expected)


def test_mcnemar_by_hand():
    labels, right, wrong = np.ones(8, int), np.ones(8), -np.ones(8)
    assert mcnemar(right, right, labels) == 1.0
    close(mcnemar(right, wrong, labels), 2 / 2**8)


# What is refused.


GOOD = ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 3.0]], [0, 1])


@pytest.mark.parametrize(
    "function", [margin_correlation, bootstrap_difference, mcnemar]
)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [[0.0], [1.0]], r"`first` has shape \(2, 1\); expected \(n, c\)"),
        (1, [[0.0, 1.0]], "`second` has 2 classes of 1 examples; expected 2 of 2"),
        (1, np.zeros((2, 3)), "`second` has 3 classes of 2 examples; expected 2 of 2"),
        (2, [0, 2], "`labels` holds 2; expected 0 to 1"),
        (2, [-1, 1], "`labels` holds -1; expected 0 to 1"),
        (2, [0.0, 1.0], "`labels` has dtype float64 and shape"),
        (2, [0, 1, 1], r"`labels` has dtype int64 and shape \(3,\); expected"),
    ],
)
def test_misfits_are_refused(function, place, value, message):
    arguments = list(GOOD)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("function", [agreement, kappa])
def test_outputs_that_are_not_finite_are_refused(function):
    with pytest.raises(NumericalError, match="`second` has 1 of 4 entries"):
        function(GOOD[0], [[0.0, np.nan], [1.0, 3.0]])


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="`draws=0` of 2 examples"):
        bootstrap_difference(*GOOD, draws=0)
    with pytest.raises(ValueError, match="`draws=9` of 1 examples"):
        bootstrap_difference([1.0], [1.0], [0], draws=9)
    with pytest.raises(ValueError, match="`level=95`; expected a coverage in"):
        bootstrap_difference(*GOOD, level=95)
    with pytest.raises(UndefinedError, match="`metric` is nan on 2 of the examples"):
        bootstrap_difference(*GOOD, metric=lambda outputs, y: float("nan"))


# ---------------------------------------------------------------- paired differences


def test_the_paired_error_of_one_split_is_that_of_the_differences():
    rng = np.random.default_rng(0)
    a, b = rng.integers(2, size=(2, 1, 40))
    mean, error = paired_difference(a, b)
    differences = [int(x) - int(y) for x, y in zip(a[0], b[0], strict=True)]
    assert mean == pytest.approx(np.mean(differences))
    assert error == pytest.approx(np.std(differences, ddof=1) / 40**0.5)
    assert paired_difference(a, a) == (0.0, 0.0)


def test_the_paired_error_of_several_splits_is_that_of_fresh_ones():
    """Splits and examples have effects of their own, and every pair has noise."""
    rng = np.random.default_rng(0)
    k, n, estimates, means = 5, 60, [], []
    for _ in range(2000):
        table = rng.normal(size=(k, 1)) + rng.normal(size=n) + rng.normal(size=(k, n))
        mean, error = paired_difference(table, 0 * table)
        means.append(mean)
        estimates.append(error**2)
    expected = 1 / k + 1 / n + 1 / (k * n)
    assert np.var(means) == pytest.approx(expected, rel=0.1)
    assert np.mean(estimates) == pytest.approx(expected, rel=0.1)
    apart = [
        paired_difference(t := rng.normal(size=(k, n)), 0 * t, crossed=False)[1] ** 2
        for _ in range(2000)
    ]
    assert np.mean(apart) == pytest.approx(1 / (k * n), rel=0.1)


def test_paired_differences_are_of_the_same_examples():
    with pytest.raises(ValueError, match=r"shape \(1, 2\) and `second` \(2, 1\)"):
        paired_difference([[1, 0]], [[1], [0]])
