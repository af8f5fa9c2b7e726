"""Metrics of predictions: those of GLUE, and those of generated text.

All are in [0, 1] or, for correlations, in [-1, 1]; more is better. The correlation of
constant predictions is undefined and counts as 0, like scikit-learn's Matthews
correlation.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn import metrics

GLUE = {
    "cola": ("matthews_correlation", "accuracy"),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
}
"""Tasks for which GLUE uses more metrics than accuracy; the primary one is first."""

CLASSIFICATION = ("accuracy",)
REGRESSION = ("pearson", "spearman")
TEXT = ("exact_match", "token_f1")


def metric_names(task: str, *, regression: bool) -> tuple[str, ...]:
    """Return the metrics of a task, the primary one first.

    Args:
        task: Name of the task.
        regression: Whether its labels are scores.
    """
    return REGRESSION if regression else GLUE.get(task, CLASSIFICATION)


def scores(
    outputs: ArrayLike, labels: ArrayLike, names: Sequence[str]
) -> dict[str, float]:
    """Compare a model's outputs with the labels.

    Args:
        outputs: ``(n, labels)`` logits, or ``(n, 1)`` predicted scores.
        labels: ``(n,)``, integer class labels, or real scores.
        names: Names of metrics in `GLUE`, `CLASSIFICATION` or `REGRESSION`.

    Returns:
        Metrics by name; minus infinity if an output is not finite, so that a diverged
        training is never chosen. F1 is that of label 1.

    Raises:
        ValueError: If a name is unknown.
    """
    outputs, labels = np.asarray(outputs, dtype=np.float64), np.asarray(labels)
    if unknown := sorted(set(names) - _METRICS.keys()):
        raise ValueError(
            f"metrics {', '.join(unknown)} are unknown. Choose from "
            f"{', '.join(_METRICS)}."
        )
    if not np.isfinite(outputs).all():
        return dict.fromkeys(names, float("-inf"))
    if set(names) <= set(REGRESSION):
        predictions = outputs.reshape(len(labels))
    else:
        predictions = outputs.argmax(axis=1)
    return {name: float(_METRICS[name](labels, predictions)) for name in names}


def text_scores(
    predictions: Sequence[str], references: Sequence[str]
) -> dict[str, float]:
    """Compare generated texts with the expected ones by SQuAD's metrics.

    Case, punctuation, English articles and repeated spaces do not count.

    Args:
        predictions: The generated texts.
        references: The expected text of each.

    Returns:
        ``"exact_match"``, the share of equal texts, and ``"token_f1"``, the mean F1 of
        their words (Rajpurkar et al. 2016).
    """
    pairs = [
        (_words(prediction), _words(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {
        "exact_match": float(np.mean([words == expected for words, expected in pairs])),
        "token_f1": float(np.mean([_token_f1(*pair) for pair in pairs])),
    }


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _token_f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def _correlation(kind: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return getattr(stats, kind)(labels, predictions).statistic


_METRICS = {
    # Much faster than scikit-learn's; studies compute it at every point of a grid.
    "accuracy": lambda y, p: np.mean(y == p),
    "f1": lambda y, p: metrics.f1_score(y, p, zero_division=0.0),
    "matthews_correlation": metrics.matthews_corrcoef,
    "pearson": lambda y, p: _correlation("pearsonr", y, p),
    "spearman": lambda y, p: _correlation("spearmanr", y, p),
}
