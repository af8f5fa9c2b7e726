"""How closely two classifiers agree on the same test examples, beyond accuracy.

`first` and `second` are the outputs of two classifiers for the same n examples in the
same order: ``(n, c)``, one column per class, or ``(n,)`` margins f[1] - f[0] of two
classes. `labels` are ``(n,)`` class indices, 0 to c - 1. The predicted class is the
first of the largest outputs.

Every function raises `NumericalError` for NaN or Inf and `ValueError` for a shape or a
number that does not fit; `Raises` lists only further errors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import cohen_kappa_score

from ntk.measures import Array, UndefinedError, as_array

__all__ = [
    "Interval",
    "agreement",
    "bootstrap_difference",
    "kappa",
    "margin_correlation",
    "margins",
    "mcnemar",
    "paired_difference",
    "predictions",
]

Labels = NDArray[np.intp]
Metric = Callable[[Array, Labels], float]
"""From outputs ``(n, c)`` and labels ``(n,)`` to a score; higher is better."""

BLOCK = 10**7
"""Maximum number of resampled entries in memory at once."""


@dataclass(frozen=True)
class Interval:
    """A difference of two scores, first minus second, and its bootstrap interval.

    Attributes:
        estimate: Difference on the original examples.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Coverage of the interval.
        draws: Number of resamples.
    """

    estimate: float
    low: float
    high: float
    level: float
    draws: int


def predictions(outputs: ArrayLike) -> Labels:
    """Return ``(n,)`` predicted classes of outputs ``(n, c)`` or margins ``(n,)``."""
    return _outputs(outputs, "outputs").argmax(axis=1)


def margins(
    outputs: ArrayLike, labels: ArrayLike, *, correct_class: bool = False
) -> Array:
    """Return the margin of each example, ``(n,)``.

    For two classes f[1] - f[0]. For more the output of the correct class minus the
    largest other output, negative where the prediction is wrong.

    Args:
        outputs: ``(n, c)`` or ``(n,)``.
        labels: ``(n,)``; the margin f[1] - f[0] does not depend on them.
        correct_class: Whether to use the correct class's margin for two classes too.
    """
    values = _outputs(outputs, "outputs")
    y = _labels(labels, *values.shape)
    if values.shape[1] == 2 and not correct_class:
        return values[:, 1] - values[:, 0]
    correct = y[:, None] == np.arange(values.shape[1])
    return values[correct] - np.where(correct, -np.inf, values).max(axis=1)


def agreement(first: ArrayLike, second: ArrayLike) -> float:
    """Return the share of examples that both assign to the same class.

    Two accurate classifiers agree on most examples whatever they have in common:
    compare it with `kappa`, or with the agreement of two seeds of one classifier.
    """
    a, b = _pair(first, second)
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Return Cohen's kappa of the predictions, (p - q) / (1 - q).

    p is the `agreement`, q its expectation for independent predictions with the same
    class frequencies. 1 for equal predictions, about 0 for independent ones. Cohen
    (1960).

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
    correct_class: bool = False,
) -> float:
    """Return Kendall's tau-b of the `margins` of two classifiers, in [-1, 1].

    It compares how confident they are of each example, not only what they predict.
    Engel et al. (2024) evaluate surrogate kernels by the tau of the correct class's
    softmax. For two classes that equals the tau of the correct class's margin, of which
    the softmax is an increasing function. For more classes the margin needs no
    temperature, and the outputs of a kernel machine are not logits. The margin
    f[1] - f[0] gives higher values than the correct class's margin, because it also
    ranks the two classes apart.

    Args:
        first: ``(n, c)`` or ``(n,)``.
        second: Same shape as `first`.
        labels: ``(n,)``.
        correct_class: Whether to use the correct class's margin for two classes too.

    Raises:
        UndefinedError: If the margins of a classifier are all equal.
    """
    pair = [
        margins(values, labels, correct_class=correct_class)
        for values in _pair(first, second)
    ]
    for values, name in zip(pair, ("first", "second"), strict=True):
        if np.ptp(values) == 0:
            raise UndefinedError(
                f"`{name}` has the margin {values[0]:.3g} for all {len(values)} "
                "examples, which have no ranks. Check that it learnt anything."
            )
    return float(scipy.stats.kendalltau(*pair).statistic)


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

    The paired percentile bootstrap: examples are resampled with replacement, the same
    ones for both classifiers (Efron and Tibshirani 1993, Koehn 2004). It covers the
    choice of test examples, not of training examples; use seeds for these.

    Args:
        first: ``(n, c)`` or ``(n,)``, n at least 2.
        second: Same shape as `first`.
        labels: ``(n,)``.
        metric: Function of outputs ``(n, c)`` and labels ``(n,)``; margins are passed
            as two columns, 0 and f[1] - f[0]. None means accuracy, which is fast.
        draws: Number of resamples.
        level: Coverage of the interval, in (0, 1).
        seed: Seed of the local random generator.

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
        sample = _correct(a, y).astype(np.float64) - _correct(b, y)
        statistic = np.mean
    else:
        score = _finite(metric)
        sample = np.arange(len(y))
        statistic = lambda i: score(a[i], y[i]) - score(b[i], y[i])
    result = scipy.stats.bootstrap(
        (sample,),
        statistic,
        vectorized=metric is None,
        n_resamples=draws,
        batch=max(1, BLOCK // len(y)),
        method="percentile",
        confidence_level=level,
        random_state=np.random.default_rng(seed),
    )
    low, high = map(float, result.confidence_interval)
    return Interval(float(statistic(sample)), low, high, level, draws)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, crossed: bool = True
) -> tuple[float, float]:
    """Return a difference of accuracies, first minus second, and its standard error.

    Both classify the same examples, so the error is that of their differences. With
    several splits that share the test examples, the variance of the mean of a crossed
    table D ``(k, n)`` is estimated by

        var(row means) / k + var(column means) / n - var(residuals) / (k n),

    of splits and of examples (the residuals are in both). Otherwise it is that of the k
    means of the splits.

    Args:
        first: ``(k, n)`` 1 where an example is classified correctly, else 0, by split.
        second: The same of the other classifier.
        crossed: Whether the splits share the test examples.

    Returns:
        The difference and its standard error; NaN for a single example.

    Raises:
        ValueError: If the shapes differ.

    >>> paired_difference([[1, 1, 0, 1]], [[1, 0, 0, 1]])
    (0.25, 0.25)
    """
    a, b = (np.asarray(values, dtype=float) for values in (first, second))
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(
            f"`first` has shape {a.shape} and `second` {b.shape}; expected the same "
            "(k, n), k splits of n test examples."
        )
    D = a - b
    k, n = D.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = float(D.mean(axis=1).var(ddof=1) / k) if k > 1 else 0.0
        columns = float(D.mean(axis=0).var(ddof=1) / n) if n > 1 else float("nan")
    if k > 1 and not crossed:
        return float(D.mean()), float(np.sqrt(rows))
    variance = rows + columns
    if k > 1 and n > 1:
        residuals = D - D.mean(axis=1, keepdims=True) - D.mean(axis=0) + D.mean()
        variance -= float((residuals**2).sum() / ((k - 1) * (n - 1)) / (k * n))
    # The estimate may be below the larger of its parts by chance.
    return float(D.mean()), float(np.sqrt(np.nanmax([variance, rows, columns])))


def mcnemar(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> float:
    """Return the p-value of McNemar's exact test that both are equally accurate.

    A two-sided binomial test: an example that exactly one classifies correctly is as
    likely to be the first's as the second's (McNemar 1947; Dietterich 1998). 1 if there
    is no such example.

    Args:
        first: ``(n, c)`` or ``(n,)``.
        second: Same shape as `first`.
        labels: ``(n,)``.
    """
    a, b = _pair(first, second)
    y = _labels(labels, *a.shape)
    first_correct, second_correct = _correct(a, y), _correct(b, y)
    only_first = int((first_correct & ~second_correct).sum())
    discordant = int((first_correct != second_correct).sum())
    if discordant == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_first, discordant).pvalue)


def _outputs(values: ArrayLike, name: str) -> Array:
    """Return outputs as ``(n, c)``, margins as columns 0 and f[1] - f[0]."""
    array = as_array(values, name)
    if array.ndim == 1:
        return np.stack([np.zeros_like(array), array], axis=1)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            f"`{name}` has shape {array.shape}; expected (n, c), one column for each "
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
            f"`labels` has dtype {raw.dtype} and shape {raw.shape}; expected integers "
            f"({examples},), one for each example."
        )
    if (outside := raw[(raw < 0) | (raw >= classes)]).size:
        raise ValueError(
            f"`labels` holds {outside[0]}; expected 0 to {classes - 1}, the columns of "
            "the outputs."
        )
    return raw.astype(np.intp)


def _correct(outputs: Array, labels: Labels) -> NDArray[np.bool_]:
    return outputs.argmax(axis=1) == labels


def _finite(metric: Metric) -> Metric:
    def score(outputs: Array, labels: Labels) -> float:
        value = float(metric(outputs, labels))
        if not np.isfinite(value):
            raise UndefinedError(
                f"`metric` is {value} on {len(labels)} of the examples, resampled; "
                "expected a finite number on every resample, such as scikit-learn's "
                "with zero_division=0."
            )
        return value

    return score


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level={level}`; expected a coverage in (0, 1), like 0.95.")
