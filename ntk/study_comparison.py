"""Kernel classifiers against fine-tuned models of the same splits.

Both learnt from the same training examples with hyperparameters chosen on the same dev
examples, and predict the same test examples, so that they can be compared seed by seed
and example by example.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk.agreement import (
    Interval,
    RatioSummary,
    agreement,
    kappa,
    margin_correlation,
    mean_ratio,
)
from ntk.distance import UndefinedError
from ntk.study import Record
from ntk.study_scores import Array, Row, outputs, points, score, spread, spreads

THRESHOLD = 0.9
"""Of fine-tuning's score, with which a kernel solves a task (Malladi et al. 2023)."""
LEVEL = 0.95
DRAWS = 2000
"""Of the bootstrap intervals."""
AGREEMENTS = ("agreement", "kappa", "kendall")


def compare(kernels: Mapping[int, Record], tuned: Mapping[int, Record]) -> Row:
    """Compare kernels over one space with fine-tuning by one method.

    The interval is a paired bootstrap over test examples, of the mean difference over
    seeds. It does not cover the choice of training examples, which the deviation over
    seeds shows. Kendall's tau is that of
    the margins of the correct class, for any number of classes.

    Args:
        kernels: Records by seed.
        tuned: Those of fine-tuning; at least one seed in common.

    Returns:
        ``seeds`` in common, and over these ``kernel`` and ``tuned``, the mean scores,
        ``ratio`` (`agreement.RatioSummary`; None where a score of fine-tuning is not
        above 0), the spread ``points`` and its ``interval`` (`agreement.Interval`),
        means and deviations ``agreement``, ``kappa`` and ``kendall``. Without classes
        there is no agreement and no interval.
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
        "ratio": _ratio(scores),
        "points": spread(points(*pair) for pair in scores),
        "interval": _interval(known, labels, metric),
        **spreads(agreements, AGREEMENTS),
    }


def agreement_of_seeds(records: Iterable[Record]) -> float | None:
    """Return how often two seeds of one method agree on a test example, on average.

    Args:
        records: One for each seed.
    """
    known = [o for o in map(outputs, records) if _of_classes(o)]
    found = [agreement(first, second) for first, second in combinations(known, 2)]
    return float(np.mean(found)) if found else None


def _ratio(scores: Iterable[tuple[float | None, float | None]]) -> Row | None:
    known = [(a, b) for a, b in scores if a is not None and b is not None]
    if not known or any(b <= 0 for _, b in known):
        return None
    if len(known) > 1:
        ours, theirs = zip(*known, strict=True)
        return asdict(mean_ratio(ours, theirs, threshold=THRESHOLD))
    ((first, second),) = known
    one, nothing = first / second, math.nan
    reached = one >= THRESHOLD
    spread_of_one = (nothing, nothing, nothing, nothing)
    return asdict(RatioSummary(one, *spread_of_one, THRESHOLD, reached, nothing, 1))


def _of_classes(found: Array) -> bool:
    return bool(found.shape[1] > 1 and np.isfinite(found).all())


def _agreement(
    first: Array, second: Array, labels: NDArray[Any]
) -> dict[str, float | None]:
    """Return how two classifiers agree, nothing of a regression or without numbers."""
    if not (_of_classes(first) and _of_classes(second)):
        return {}
    found: dict[str, float | None] = {"agreement": agreement(first, second)}
    for name, measure in (
        ("kappa", lambda: kappa(first, second)),
        (
            "kendall",
            lambda: margin_correlation(first, second, labels, correct_class=True),
        ),
    ):
        try:
            found[name] = measure()
        except UndefinedError:
            found[name] = None
    return found


def _interval(
    pairs: Sequence[tuple[Array, Array]], labels: NDArray[Any], metric: str
) -> Row | None:
    """Return the mean difference over seeds in points, with its bootstrap interval.

    `agreement.bootstrap_difference` resamples the examples of one pair of classifiers.
    Those of several seeds predict the same examples, so that these must be resampled
    for all of them at once; and as every metric here is a function of means over
    examples, all resamples of these are one product of matrices.
    """
    if not pairs or metric not in _SCORES:
        return None
    ours, theirs = (
        _terms([found.argmax(axis=1) for found in several], labels, metric)
        for several in zip(*pairs, strict=True)
    )
    of_means, weights = _SCORES[metric], _resamples(len(labels))
    drawn = 100 * (of_means(weights @ ours) - of_means(weights @ theirs))
    whole = 100 * (of_means(ours.mean(axis=0)) - of_means(theirs.mean(axis=0)))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return asdict(Interval(float(whole), float(low), float(high), LEVEL, DRAWS))


@functools.cache
def _resamples(examples: int) -> Array:
    """Return ``(DRAWS, n)``, the share of each example in each resample."""
    generator = np.random.default_rng(0)
    even = np.full(examples, 1 / examples)
    return generator.multinomial(examples, even, size=DRAWS) / examples


def _terms(
    predictions: Sequence[NDArray[np.intp]], labels: NDArray[Any], metric: str
) -> Array:
    """Return ``(n, terms)``, whose means over examples a metric is a function of."""
    predicted, true = np.stack(predictions, axis=1), labels[:, None]
    if metric == "accuracy":
        return (predicted == true).mean(axis=1, keepdims=True)
    y, positive = ((values == 1).astype(np.float64) for values in (true, predicted))
    return np.concatenate([y, positive, positive * y], axis=1)


def _f1(means: Array) -> Array:
    y, positive, both = _parted(means)
    total = positive + y
    return (2 * both / np.where(total > 0, total, 1)).mean(axis=-1)


def _matthews(means: Array) -> Array:
    y, positive, both = _parted(means)
    scale = np.sqrt(positive * (1 - positive) * y * (1 - y))
    return ((both - positive * y) / np.where(scale > 0, scale, np.inf)).mean(axis=-1)


def _parted(means: Array) -> tuple[Array, Array, Array]:
    """Return shares of label 1, and for each seed of its predictions and right ones."""
    positive, both = np.split(means[..., 1:], 2, axis=-1)
    return means[..., :1], positive, both


_SCORES: dict[str, Callable[[Array], Array]] = {
    "accuracy": lambda means: means[..., 0],
    "f1": _f1,
    "matthews_correlation": _matthews,
}
"""From the means of `_terms` to the mean over seeds of a metric of classes."""
