"""Ratios of means: by hand, against loops, and in simulation."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ntk.classifiers.ratios import ratio_of_means, ratio_over_seeds, recovery

score = st.floats(0.1, 1.0)


def jackknife(values, function):
    """Return the standard error of a function of rows, leaving out each row."""
    n = len(values)
    left = [function(values[:i] + values[i + 1 :]) for i in range(n)]
    middle = sum(left) / n
    return math.sqrt((n - 1) / n * sum((x - middle) ** 2 for x in left))


@given(st.lists(st.tuples(score, score), min_size=2, max_size=8))
def test_the_ratio_of_means_is_that_of_a_loop(pairs):
    function = lambda rows: sum(a for a, _ in rows) / sum(b for _, b in rows)
    result = ratio_of_means(*zip(*pairs, strict=True))
    assert result.estimate == pytest.approx(function(pairs))
    assert result.standard_error == pytest.approx(jackknife(pairs, function), abs=1e-9)
    assert result.units == len(pairs)


@given(st.lists(st.tuples(score, score, score), min_size=3, max_size=8))
def test_recovery_is_that_of_a_loop(rows):
    rows = [(a, b, a + 0.1 + c) for a, b, c in rows]
    gain = lambda rows, k: sum(row[k] - row[0] for row in rows)
    function = lambda rows: gain(rows, 1) / gain(rows, 2)
    result = recovery(*zip(*rows, strict=True))
    assert result.estimate == pytest.approx(function(rows), abs=1e-9)
    assert result.standard_error == pytest.approx(jackknife(rows, function), abs=1e-9)


def test_recovery_is_0_for_the_start_and_1_for_fine_tuning():
    start, tuned = [0.4, 0.6, 0.5], [0.5, 0.9, 0.4]
    assert recovery(start, start, tuned).estimate == 0.0
    assert recovery(start, tuned, tuned).estimate == 1.0
    # One task gains nothing: the mean of ratios does not exist.
    assert recovery([0.4, 0.5], [0.5, 0.6], [0.6, 0.5]).estimate == pytest.approx(1.0)
    assert math.isnan(recovery([0.5], [0.6], [0.5]).estimate)
    assert math.isnan(recovery([0.5], [0.6], [0.7]).standard_error)


def test_the_jackknife_gives_the_spread_of_the_ratio():
    generator = np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(1000):
        start = generator.normal(0.6, 0.1, 14)
        gain = generator.normal(0.05, 0.03, 14)
        kernel = start + 0.8 * gain + generator.normal(0, 0.01, 14)
        result = recovery(start, kernel, start + gain)
        estimates.append(result.estimate)
        errors.append(result.standard_error)
    assert np.median(estimates) == pytest.approx(0.8, abs=0.01)
    assert np.median(errors) == pytest.approx(np.std(estimates), rel=0.15)


def test_the_ratio_over_seeds_by_hand():
    kernel, tuned = [0.88, 0.80, 0.90, 0.84, 0.76], [0.8, 0.8, 0.9, 0.8, 0.8]
    result = ratio_over_seeds(kernel, tuned)
    assert result.mean == pytest.approx(4.18 / 4.1)
    pairs = list(zip(kernel, tuned, strict=True))
    error = jackknife(pairs, lambda p: sum(a for a, _ in p) / sum(b for _, b in p))
    assert result.standard_error == pytest.approx(error)
    half = 2.7764451051977987 * error  # t of 4 degrees, 97.5 %
    assert [result.low, result.high] == pytest.approx(
        [result.mean - half, result.mean + half]
    )
    floor = [0.9 * b for b in tuned]
    expected = scipy.stats.ttest_rel(kernel, floor, alternative="greater")
    assert result.p_value == pytest.approx(expected.pvalue)
    assert result.reached
    assert result.seeds == 5
    assert json.loads(json.dumps(asdict(result)))["reached"] is True


def test_a_ratio_below_the_threshold():
    result = ratio_over_seeds([0.5, 0.6], [1.0, 1.0], threshold=0.8)
    assert not result.reached
    assert result.p_value > 0.9
    assert ratio_over_seeds([0.5, 0.6], [1.0, 1.0], threshold=0.5).reached


@pytest.mark.parametrize(("ratio", "p"), [(0.95, 0.0), (0.85, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("tuned", [[1.0] * 3, [1.0, 0.5, 0.25]])
def test_seeds_without_spread_leave_no_doubt(ratio, p, tuned):
    result = ratio_over_seeds([ratio * score for score in tuned], tuned)
    assert (result.p_value, result.standard_error) == (p, 0.0)
    assert result.low == result.high == result.mean
    assert result.reached == (ratio >= 0.9)


def test_interval_and_test_of_the_ratio_hold_what_they_promise():
    generator = np.random.default_rng(1)
    covered = rejected = 0
    for _ in range(2000):
        tuned = generator.normal(0.8, 0.05, 5)
        kernel = tuned * generator.normal(0.9, 0.04, 5)
        result = ratio_over_seeds(kernel, tuned, level=0.9)
        covered += result.low <= 0.9 <= result.high
        rejected += result.p_value < 0.05
    assert covered / 2000 == pytest.approx(0.9, abs=0.02)
    assert rejected / 2000 == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    ("kernel", "tuned", "message"),
    [
        ([0.9], [0.9], r"`kernel` has shape \(1,\) .* at least 2"),
        ([0.9, 0.8], [0.9], r"and `tuned` \(1,\)"),
        ([0.9, 0.8], [0.9, 0.0], "`tuned` has the score 0; expected scores above 0"),
        ([0.9, np.inf], [0.9, 0.9], "`kernel` has 1 of 2 entries"),
    ],
)
def test_scores_without_a_ratio_are_refused(kernel, tuned, message):
    with pytest.raises(ValueError, match=message):
        ratio_over_seeds(kernel, tuned)
    with pytest.raises(ValueError, match="`level=95`; expected a coverage"):
        ratio_over_seeds([0.9, 0.8], [0.9, 0.9], level=95)
