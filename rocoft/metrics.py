"""How good predictions are: the metrics of GLUE, and those of generated text.

All lie in [0, 1] or, for correlations, in [-1, 1], and more is better. Where the
predictions are constant no correlation is defined; it counts as 0, as scikit-learn's
Matthews correlation does.
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
"""Metrics of tasks that GLUE does not judge by accuracy alone, the first one chief."""

CLASSIFICATION = ("accuracy",)
REGRESSION = ("pearson", "spearman")
TEXT = ("exact_match", "token_f1")


def metric_names(task: str, *, regression: bool) -> tuple[str, ...]:
    """Return the metrics of a task, the one to choose by first.

    Args:
        task: Its name.
        regression: Whether its labels are scores.
    """
    return REGRESSION if regression else GLUE.get(task, CLASSIFICATION)


def scores(
    outputs: ArrayLike, labels: ArrayLike, names: Sequence[str]
) -> dict[str, float]:
    """Compare a model's outputs with the labels.

    Args:
        outputs: ``(n, labels)`` logits, or ``(n, 1)`` predictions of a regression.
        labels: ``(n,)``, numbers of the labels, or scores.
        names: Metrics, of `GLUE`, `CLASSIFICATION` or `REGRESSION`.

    Returns:
        Each metric; minus infinity if an output is not finite, so that a training that
        diverged is never chosen. F1 is that of label 1.

    Raises:
        ValueError: If a name is unknown.
    """
    outputs, labels = np.asarray(outputs, dtype=np.float64), np.asarray(labels)
    if unknown := sorted(set(names) - _METRICS.keys()):
        raise ValueError(
            f"metrics {', '.join(unknown)} are unknown. Choose of "
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
    """Compare generated texts with the expected ones, as SQuAD does.

    Case, punctuation, English articles and repeated spaces do not count.

    Args:
        predictions: The texts.
        references: What each should be.

    Returns:
        ``"exact_match"``, the share of equal texts, and ``"token_f1"``, the mean F1 of
        their words (Rajpurkar et al. 2016).
    """
    pairs = [
        (_words(prediction), _words(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {
        "exact_match": float(np.mean([found == wanted for found, wanted in pairs])),
        "token_f1": float(np.mean([_overlap(*pair) for pair in pairs])),
    }


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _correlation(kind: str, labels: np.ndarray, predictions: np.ndarray) -> float:
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return getattr(stats, kind)(labels, predictions).statistic


_METRICS = {
    # A study asks for it at every point of a grid: scikit-learn's takes far longer.
    "accuracy": lambda y, p: np.mean(y == p),
    "f1": lambda y, p: metrics.f1_score(y, p, zero_division=0.0),
    "matthews_correlation": metrics.matthews_corrcoef,
    "pearson": lambda y, p: _correlation("pearsonr", y, p),
    "spearman": lambda y, p: _correlation("spearmanr", y, p),
}
