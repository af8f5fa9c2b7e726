"""Comparison of kernel classifiers with fine-tuned models on the same splits.

Both use the same training, dev and test examples, so they are compared seed by seed and
example by example.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk.classifiers import (
    Interval,
    RatioSummary,
    kappa,
    margin_correlation,
    ratio_over_seeds,
)
from ntk.classifiers.agreement import agreement
from ntk.measures import UndefinedError
from ntk.reporting import (
    Array,
    Row,
    outputs,
    points,
    score,
    spread,
    spreads,
    value_at,
)
from ntk.studies.folder import Record

THRESHOLD = 0.9
"""Ratio to fine-tuning from which a kernel solves a task (Malladi et al. 2023)."""
LEVEL = 0.95
DRAWS = 2000
"""Coverage and number of resamples of the bootstrap intervals."""
AGREEMENTS = ("agreement", "kappa", "kendall")


def compare(kernels: Mapping[int, Record], tuned: Mapping[int, Record]) -> Row:
    """Compare kernels over one space with fine-tuning by one method.

    The interval is a paired bootstrap over test examples of the mean difference over
    seeds. It excludes the choice of training examples, which the deviation over seeds
    shows. Kendall's tau is that of the margins of the correct class.

    Args:
        kernels: Records of kernels by seed.
        tuned: Records of fine-tuning by seed; at least one seed in common.

    Returns:
        The common ``seeds`` and, over these, the mean scores ``kernel``, ``tuned`` and
        ``f0``, the ``ratio`` of the first two (`ratios.RatioSummary`; None unless all
        scores of fine-tuning are above 0), the spread ``points`` and its ``interval``
        (`agreement.Interval`), and ``agreement``, ``kappa`` and ``kendall`` as means
        and deviations. Regression has no agreement and no interval.
    """
    seeds = [seed for seed in kernels if seed in tuned]
    both = [(kernels[seed], tuned[seed]) for seed in seeds]
    scores = [(score(ours), score(theirs)) for ours, theirs in both]
    pairs = [(outputs(ours), outputs(theirs)) for ours, theirs in both]
    labels, metric = np.array(both[0][0]["labels"]), both[0][0]["metric"]
    agreements = [_agreement(*pair, labels) for pair in pairs]
    known = [pair for pair, a in zip(pairs, agreements, strict=True) if a]
    return {
        "seeds": seeds,
        "kernel": spread(ours for ours, _ in scores)["mean"],
        "tuned": spread(theirs for _, theirs in scores)["mean"],
        "f0": spread(score_of_f0(ours) for ours, _ in both)["mean"],
        "ratio": ratio_to_tuned(scores),
        "points": spread(points(*pair) for pair in scores),
        "interval": _interval(known, labels, metric),
        **spreads(agreements, AGREEMENTS),
    }


def score_of_f0(record: Record) -> float | None:
    """Return the test score of the model before training, by the primary metric.

    Args:
        record: The record of a kernel; others do not hold it.
    """
    return value_at(record, f"f0.test.{record['metric']}")


def ratio_to_tuned(scores: Iterable[tuple[float | None, float | None]]) -> Row | None:
    """Return the ratio of the mean scores of a kernel and of fine-tuning.

    Args:
        scores: Both scores for each seed.

    Returns:
        `ratios.RatioSummary`; None unless all scores of fine-tuning are above 0.
    """
    known = [(a, b) for a, b in scores if a is not None and b is not None]
    if not known or any(b <= 0 for _, b in known):
        return None
    if len(known) > 1:
        ours, theirs = zip(*known, strict=True)
        return asdict(ratio_over_seeds(ours, theirs, threshold=THRESHOLD))
    ((first, second),) = known
    ratio, nan = first / second, math.nan
    reached = ratio >= THRESHOLD
    return asdict(RatioSummary(ratio, nan, nan, nan, nan, THRESHOLD, reached, nan, 1))


def _of_classes(values: Array) -> bool:
    return bool(values.shape[1] > 1 and np.isfinite(values).all())


def _agreement(
    first: Array, second: Array, labels: NDArray[Any]
) -> dict[str, float | None]:
    """Return measures of agreement; empty for regression or non-finite outputs."""
    if not (_of_classes(first) and _of_classes(second)):
        return {}
    measures: dict[str, float | None] = {"agreement": agreement(first, second)}
    for name, measure in (
        ("kappa", lambda: kappa(first, second)),
        (
            "kendall",
            lambda: margin_correlation(first, second, labels, correct_class=True),
        ),
    ):
        try:
            measures[name] = measure()
        except UndefinedError:
            measures[name] = None
    return measures


def _interval(
    pairs: Sequence[tuple[Array, Array]], labels: NDArray[Any], metric: str
) -> Row | None:
    """Return the mean difference over seeds in points, with its bootstrap interval.

    All seeds predict the same test examples, so each resample of examples applies to
    all seeds. Every metric here is a function of means over examples, so all resamples
    are one matrix product.
    """
    if not pairs or metric not in _SCORES:
        return None
    ours, theirs = (
        _terms([values.argmax(axis=1) for values in by_seed], labels, metric)
        for by_seed in zip(*pairs, strict=True)
    )
    score_of, weights = _SCORES[metric], _resamples(len(labels))
    drawn = 100 * (score_of(weights @ ours) - score_of(weights @ theirs))
    observed = 100 * (score_of(ours.mean(axis=0)) - score_of(theirs.mean(axis=0)))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return asdict(Interval(float(observed), float(low), float(high), LEVEL, DRAWS))


@functools.cache
def _resamples(examples: int) -> Array:
    """Return the weight of each example in each resample, ``(DRAWS, n)``."""
    generator = np.random.default_rng(0)
    even = np.full(examples, 1 / examples)
    return generator.multinomial(examples, even, size=DRAWS) / examples


def _terms(
    predictions: Sequence[NDArray[np.intp]], labels: NDArray[Any], metric: str
) -> Array:
    """Return terms ``(n, k)``; the metric is a function of their means over n."""
    predicted, true = np.stack(predictions, axis=1), labels[:, None]
    if metric == "accuracy":
        return (predicted == true).mean(axis=1, keepdims=True)
    y, positive = ((values == 1).astype(np.float64) for values in (true, predicted))
    return np.concatenate([y, positive, positive * y], axis=1)


def _f1(means: Array) -> Array:
    y, positive, both = _rates(means)
    total = positive + y
    return (2 * both / np.where(total > 0, total, 1)).mean(axis=-1)


def _matthews(means: Array) -> Array:
    y, positive, both = _rates(means)
    scale = np.sqrt(positive * (1 - positive) * y * (1 - y))
    return ((both - positive * y) / np.where(scale > 0, scale, np.inf)).mean(axis=-1)


def _rates(means: Array) -> tuple[Array, Array, Array]:
    """Return the rates of positives and, by seed, predicted and true positives."""
    positive, both = np.split(means[..., 1:], 2, axis=-1)
    return means[..., :1], positive, both


_SCORES: dict[str, Callable[[Array], Array]] = {
    "accuracy": lambda means: means[..., 0],
    "f1": _f1,
    "matthews_correlation": _matthews,
}
"""Functions from the means of `_terms` to the mean over seeds of a metric."""
