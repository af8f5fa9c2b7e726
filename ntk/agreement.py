"""How closely two classifiers agree on the same test examples, beyond accuracy.

`first` and `second` are the outputs of two classifiers for the same n examples in the
same order: ``(n, c)`` with a column for each class, or ``(n,)`` margins f[1] - f[0] of
two classes. `labels` are ``(n,)`` numbers of the classes, 0 to c - 1. The predicted
class is the first of the largest outputs.

Every function raises `NumericalError` where an output is NaN or Inf and `ValueError`
where a shape does not fit or a number is out of its range; `Raises` lists only what is
particular.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import cohen_kappa_score

from ntk.distance import UndefinedError
from ntk.spectrum import Array, as_array

__all__ = [
    "AgreementSummary",
    "Coefficient",
    "Interval",
    "RatioSummary",
    "agreement",
    "bootstrap_difference",
    "kappa",
    "margin_correlation",
    "margins",
    "mcnemar",
    "mean_ratio",
    "predictions",
    "summary",
]

Labels = NDArray[np.intp]
Metric = Callable[[Array, Labels], float]
"""From outputs ``(n, c)`` and labels ``(n,)`` to a score, more being better."""
Coefficient = Literal["kendall", "spearman"]

BLOCK = 10**7
"""Most entries of resampled examples in memory at once."""


@dataclass(frozen=True)
class Interval:
    """A difference of two scores, first minus second, and its bootstrap interval.

    `estimate` is that on the examples as they are; `level` is the interval's coverage,
    `draws` the number of resamples.
    """

    estimate: float
    low: float
    high: float
    level: float
    draws: int


@dataclass(frozen=True)
class AgreementSummary:
    """Two classifiers of n examples and c classes compared in numbers.

    They are described at their functions. `kendall` and `spearman` are those of the
    `margins`, with `_correct` of the correct class's for any c; they and `kappa` are
    NaN where their function raises `UndefinedError`. The counts say how many examples
    both, only the first, only the second and neither classify correctly.
    """

    examples: int
    classes: int
    agreement: float
    kappa: float
    kendall: float
    spearman: float
    kendall_correct: float
    spearman_correct: float
    first_accuracy: float
    second_accuracy: float
    both_right: int
    only_first_right: int
    only_second_right: int
    both_wrong: int
    mcnemar_p: float
    difference: Interval


@dataclass(frozen=True)
class RatioSummary:
    """Scores of a kernel in units of those of fine-tuning, over seeds.

    Attributes:
        mean: Mean ratio.
        standard_error: Of the mean, from the spread over seeds.
        low: Lower end of the t interval of the mean.
        high: Upper end.
        level: Coverage of the interval.
        threshold: What the mean is held against.
        reached: Whether the mean is at least that.
        p_value: Of the t-test that the true mean is no higher than the threshold:
            one-sided t intervals of coverage up to 1 - p_value lie above it.
        seeds: Number of pairs.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    level: float
    threshold: float
    reached: bool
    p_value: float
    seeds: int


def predictions(outputs: ArrayLike) -> Labels:
    """Return ``(n,)`` predicted classes of outputs ``(n, c)`` or margins ``(n,)``."""
    return _outputs(outputs, "outputs").argmax(axis=1)


def margins(
    outputs: ArrayLike, labels: ArrayLike, *, correct_class: bool = False
) -> Array:
    """Return how far each example is from the decision boundary, ``(n,)``.

    Of two classes f[1] - f[0]. Of several the margin of the correct class, its output
    less the largest other one, which is negative where the prediction is wrong.

    Args:
        outputs: ``(n, c)`` or ``(n,)``.
        labels: ``(n,)``; the margin f[1] - f[0] does not depend on them.
        correct_class: Whether to take the margin of the correct class of two, too.
    """
    values = _outputs(outputs, "outputs")
    y = _labels(labels, *values.shape)
    if values.shape[1] == 2 and not correct_class:
        return values[:, 1] - values[:, 0]
    own = y[:, None] == np.arange(values.shape[1])
    return values[own] - np.where(own, -np.inf, values).max(axis=1)


def agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Return the share of examples that both assign to the same class.

    Two good classifiers agree on most examples whatever they have in common: read it
    beside `kappa`, or beside the agreement of two seeds of the same classifier.
    """
    a, b = _pair(first, second)
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Return Cohen's kappa of the predictions, (p - q) / (1 - q).

    p is the `agreement`, and q what it would be if the predictions of the same
    frequencies were independent: 1 for equal predictions, about 0 for independent ones.
    Cohen (1960).

    Raises:
        UndefinedError: If both predict the same class for every example.
    """
    a, b = (values.argmax(axis=1) for values in _pair(first, second))
    if len(np.unique(np.concatenate([a, b]))) == 1:
        raise UndefinedError(
            f"`first` and `second` predict class {a[0]} for all {len(a)} examples; "
            "kappa needs predictions of two classes. Use `agreement`."
        )
    return float(cohen_kappa_score(a, b))


def margin_correlation(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    coefficient: Coefficient = "kendall",
    correct_class: bool = False,
) -> float:
    """Return the rank correlation of the `margins` of two classifiers.

    It compares how sure they are of each example, not only what they decide. Kendall's
    tau-b (corrected for ties) or Spearman's rho, in [-1, 1]. Engel et al. (2024) judge
    surrogate kernels by the tau of the correct class's softmax; for two classes that is
    the tau of the correct class's margin, of which the softmax is an increasing
    function. For several we take the margin, which needs no temperature: the outputs of
    a kernel machine are no logits. The margin f[1] - f[0] of two classes gives higher
    values than that of the correct class, since it also ranks the classes apart.

    Args:
        first: ``(n, c)`` or ``(n,)``.
        second: Likewise.
        labels: ``(n,)``.
        coefficient: Which.
        correct_class: As in `margins`.

    Raises:
        ValueError: If there is no such coefficient.
        UndefinedError: If the margins of a classifier are all equal.
    """
    correlate = {"kendall": scipy.stats.kendalltau, "spearman": scipy.stats.spearmanr}
    if coefficient not in correlate:
        raise ValueError(
            f"`coefficient={coefficient!r}`; expected one of {list(correlate)}."
        )
    pair = [
        margins(values, labels, correct_class=correct_class)
        for values in _pair(first, second)
    ]
    for values, name in zip(pair, ("first", "second"), strict=True):
        if np.ptp(values) == 0:
            raise UndefinedError(
                f"`{name}` has the margin {values[0]:.3g} for all {len(values)} "
                "examples, which have no ranks. Look whether it learnt anything."
            )
    return float(correlate[coefficient](*pair).statistic)


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    metric: Metric | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the difference of a metric, first minus second, with its interval.

    The paired bootstrap: examples are resampled with replacement, the same ones for
    both classifiers, and the percentiles of the differences are taken (Efron and
    Tibshirani 1993, Koehn 2004). It covers the choice of test examples, not that of
    the training examples, for which there are seeds.

    Args:
        first: ``(n, c)`` or ``(n,)``, n at least 2.
        second: Likewise.
        labels: ``(n,)``.
        metric: From outputs ``(n, c)`` and labels ``(n,)`` to a score; margins come as
            two columns, 0 and f[1] - f[0]. None means accuracy, which is fast.
        draws: Number of resamples.
        level: Coverage of the interval, in (0, 1).
        seed: Of the local random generator.

    Raises:
        ValueError: If there are fewer than two examples or one draw.
        UndefinedError: If the metric is NaN or infinite on a resample.
    """
    a, b = _pair(first, second)
    y = _labels(labels, *a.shape)
    _check_level(level)
    if len(y) < 2 or draws < 1:
        raise ValueError(
            f"`draws={draws}` of {len(y)} examples; expected at least one draw of at "
            "least two examples."
        )
    statistic: Callable[..., Any]
    sample: NDArray[Any]
    if metric is None:
        # The mean of these is the difference of the accuracies.
        sample = _right(a, y).astype(np.float64) - _right(b, y)
        statistic = np.mean
    else:
        score = _finite(metric)
        sample = np.arange(len(y))
        statistic = lambda i: score(a[i], y[i]) - score(b[i], y[i])
    found = scipy.stats.bootstrap(
        (sample,),
        statistic,
        vectorized=metric is None,
        n_resamples=draws,
        batch=max(1, BLOCK // len(y)),
        method="percentile",
        confidence_level=level,
        random_state=np.random.default_rng(seed),
    )
    low, high = map(float, found.confidence_interval)
    return Interval(float(statistic(sample)), low, high, level, draws)


def mcnemar(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> float:
    """Return the p-value of McNemar's exact test that both are equally accurate.

    Of the examples that one alone classifies correctly, each is as likely to be the
    first's as the second's: a two-sided binomial test of the counts (McNemar 1947;
    Dietterich 1998). 1 if there are none.

    Args:
        first: ``(n, c)`` or ``(n,)``.
        second: Likewise.
        labels: ``(n,)``.
    """
    _, ours, theirs, _ = _counts(first, second, labels)
    if ours + theirs == 0:
        return 1.0
    return float(scipy.stats.binomtest(ours, ours + theirs).pvalue)


def summary(
    first: ArrayLike,
    second: ArrayLike,
    labels: ArrayLike,
    *,
    metric: Metric | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> AgreementSummary:
    """Return all measures of how two classifiers agree; `asdict` makes it JSON.

    Args:
        first: ``(n, c)`` or ``(n,)``.
        second: Likewise.
        labels: ``(n,)``.
        metric: Of the difference, as in `bootstrap_difference`.
        draws: As in `bootstrap_difference`.
        level: As in `bootstrap_difference`.
        seed: As in `bootstrap_difference`.
    """
    a, b = _pair(first, second)
    counts = _counts(a, b, labels)
    both, ours, theirs, neither = counts
    correlations: dict[str, float] = {}
    for ending, correct in (("", False), ("_correct", True)):
        for name in ("kendall", "spearman"):
            correlations[name + ending] = _or_nan(
                margin_correlation,
                *(a, b, labels),
                coefficient=name,
                correct_class=correct,
            )
    return AgreementSummary(
        examples=len(a),
        classes=a.shape[1],
        agreement=agreement(a, b),
        kappa=_or_nan(kappa, a, b),
        **correlations,
        first_accuracy=(both + ours) / len(a),
        second_accuracy=(both + theirs) / len(a),
        both_right=both,
        only_first_right=ours,
        only_second_right=theirs,
        both_wrong=neither,
        mcnemar_p=mcnemar(a, b, labels),
        difference=bootstrap_difference(
            a, b, labels, metric=metric, draws=draws, level=level, seed=seed
        ),
    )


def mean_ratio(
    kernel: Sequence[float],
    tuned: Sequence[float],
    *,
    threshold: float = 0.9,
    level: float = 0.95,
) -> RatioSummary:
    """Return the mean over seeds of kernel score / fine-tuning score.

    A kernel "solves" a task if it reaches 90 % of what fine-tuning does (Malladi et
    al. 2023). Scores are paired by seed, since both learn from the same split. The
    interval is the t interval of the ratios themselves, with seeds - 1 degrees of
    freedom: a handful of seeds is too few to resample, and logarithms would exclude
    scores of zero and hardly differ for ratios near one.

    Args:
        kernel: A score for each seed, at least 2.
        tuned: Those of fine-tuning for the same seeds, above 0.
        threshold: Of the ratio.
        level: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the scores are not pairs, or those of fine-tuning not above 0.
    """
    ours, theirs = as_array(kernel, "kernel"), as_array(tuned, "tuned")
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(
            f"`kernel` has shape {ours.shape} and `tuned` {theirs.shape}; expected a "
            "score of each for the same seeds, at least two of them to have a spread."
        )
    if not (theirs > 0).all():
        raise ValueError(
            f"`tuned` has the score {theirs.min():.3g}; expected scores above 0, else "
            "a ratio says nothing. Compare differences instead."
        )
    _check_level(level)
    ratios = ours / theirs
    mean, error = float(ratios.mean()), float(scipy.stats.sem(ratios))
    if (ratios == ratios[0]).all():
        mean, error = float(ratios[0]), 0.0
    t = scipy.stats.t(len(ratios) - 1)
    half = float(t.ppf((1 + level) / 2)) * error
    # Seeds that all agree leave no doubt.
    p_value = t.sf((mean - threshold) / error) if error else mean <= threshold
    return RatioSummary(
        mean=mean,
        standard_error=error,
        low=mean - half,
        high=mean + half,
        level=level,
        threshold=threshold,
        reached=mean >= threshold,
        p_value=float(p_value),
        seeds=len(ratios),
    )


def _outputs(values: ArrayLike, name: str) -> Array:
    """Return outputs as ``(n, c)``, margins as columns 0 and f[1] - f[0]."""
    array = as_array(values, name)
    if array.ndim == 1:
        return np.stack([np.zeros_like(array), array], axis=1)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            f"`{name}` has shape {array.shape}; expected (n, c) with a column for each "
            "of at least two classes, or (n,) margins f[1] - f[0]."
        )
    return array


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    a, b = _outputs(first, "first"), _outputs(second, "second")
    if a.shape != b.shape:
        raise ValueError(
            f"`second` has {b.shape[1]} classes of {b.shape[0]} examples; expected "
            f"{a.shape[1]} of {a.shape[0]} as `first`. Classify the same examples."
        )
    return a, b


def _labels(labels: ArrayLike, examples: int, classes: int) -> Labels:
    raw = np.asarray(labels)
    if raw.dtype.kind not in "iu" or raw.shape != (examples,):
        raise ValueError(
            f"`labels` has dtype {raw.dtype} and shape {raw.shape}; expected whole "
            f"numbers ({examples},), one for each example."
        )
    if (outside := raw[(raw < 0) | (raw >= classes)]).size:
        raise ValueError(
            f"`labels` holds {outside[0]}; expected 0 to {classes - 1}, the columns of "
            "the outputs."
        )
    return raw.astype(np.intp)


def _right(outputs: Array, labels: Labels) -> NDArray[np.bool_]:
    return outputs.argmax(axis=1) == labels


def _counts(
    first: ArrayLike, second: ArrayLike, labels: ArrayLike
) -> tuple[int, int, int, int]:
    """Return how many both, only the first, only the second and neither gets right."""
    a, b = _pair(first, second)
    y = _labels(labels, *a.shape)
    ours, theirs = _right(a, y), _right(b, y)
    both, only, other = ours & theirs, ours & ~theirs, ~ours & theirs
    counts = [int(found.sum()) for found in (both, only, other)]
    return (counts[0], counts[1], counts[2], len(y) - sum(counts))


def _finite(metric: Metric) -> Metric:
    def score(outputs: Array, labels: Labels) -> float:
        value = float(metric(outputs, labels))
        if not np.isfinite(value):
            raise UndefinedError(
                f"`metric` is {value} on {len(labels)} of the examples, resampled; "
                "expected a number whichever they are, such as scikit-learn's with "
                "zero_division=0."
            )
        return value

    return score


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level={level}`; expected a coverage in (0, 1), like 0.95.")


def _or_nan(measure: Callable[..., float], *args: Any, **options: Any) -> float:
    try:
        return measure(*args, **options)
    except UndefinedError:
        return float("nan")
