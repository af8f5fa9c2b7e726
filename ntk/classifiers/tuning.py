"""Choose a kernel classifier's hyperparameters on a dev split, as fine-tuning does.

Every point of a grid of regularisations and scales of f0 is fitted on the training
examples and scored on the dev examples; the test examples are only predicted.

One kernel covers all examples: rows are the training, dev and test examples in this
order, columns the n training examples. `ntk.classifiers.outputs` lists its forms with
the o functions that are fitted on each, `ntk.classifiers.estimators` the units of
regularisation. Outputs are returned as logits ``(m, c)``.

Ridge predicts, with G the Gram matrix ``(k, k)`` of the training examples, k = n or
n c, and targets Y ``(n, o)``, flattened to the rows of G in the coupled forms,

    f(x) = start(x) + P[Y - start](x),    P[T](x) = K(x, train) (G + ridge I)^-1 T,

where start is s f0 for s > 0 and the mean of Y for s = 0, the default offset of
`ntk.classifiers.estimators`. P is linear: P[Y], P[f0] and P[mean] give the predictions
for every s, and one eigendecomposition G = U L U' gives these for every ridge. An
asymmetric G has no orthogonal eigenvectors and is solved for each ridge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from ntk.classifiers.asymmetric import ridge_solution
from ntk.classifiers.base import TIE, Array, Maybe
from ntk.classifiers.estimators import ALPHAS, CS, KernelLogisticRegression, KernelSVC
from ntk.classifiers.outputs import MARGIN, Outputs
from ntk.measures import as_array, eigensystem, gram_matrix

__all__ = ["OFFSETS", "REGULARISATIONS", "Tuned", "tune"]

Method = Literal["ridge", "asymmetric", "logistic", "svm"]
Judge = Callable[[Array, NDArray[Any]], float]

REGULARISATIONS: dict[str, tuple[float, ...]] = {
    "ridge": ALPHAS,
    "asymmetric": ALPHAS,
    "logistic": CS[1::2],
    "svm": CS,
}
"""Default grid of each method: alpha for ridge, C for the others."""

RIDGES = ("ridge", "asymmetric")

OFFSETS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
"""Scales of f0: those of Malladi et al. (2023), who write 1 / scale, and 1."""


@dataclass(frozen=True)
class Tuned:
    """The grid point with the best dev score, and its predictions.

    Attributes:
        dev: ``(d, c)`` outputs on the dev examples.
        test: ``(m, c)`` outputs on the test examples.
        regularisation: alpha for ridge, C for the others.
        offset_scale: s of the start s f0; 0 means no f0.
        dev_score: The judge's score on dev.
        grid: Every point, by regularisation and then offset scale: these three numbers
            and "dev_loss", the mean dev loss of the kind that the method minimises,
            None for "svm".
    """

    dev: Array
    test: Array
    regularisation: float
    offset_scale: float
    dev_score: float
    grid: list[dict[str, float | None]]


@dataclass(frozen=True)
class _Data:
    """The kernel cut after the training examples, labels and f0.

    Attributes:
        train: ``(n, n, ...)``.
        rest: ``(m, n, ...)``, the dev examples first.
        labels: ``(n,)`` training labels.
        dev_labels: ``(d,)``.
        f0: ``(n + m, c)``, or None.
        c: Number of classes; 1 for regression.
        outputs: The functions that are fitted.
    """

    train: Array
    rest: Array
    labels: NDArray[Any]
    dev_labels: NDArray[Any]
    f0: Array | None
    c: int
    outputs: Outputs

    def targets(self, labels: NDArray[Any]) -> Array:
        """Return the targets of ridge regression, ``(len(labels), o)``."""
        if self.c == 1:
            return labels[:, None]
        return self.outputs.encoded(np.eye(self.c)[labels])


@dataclass(frozen=True)
class Point:
    """A fitted grid point.

    Attributes:
        regularisation: alpha for ridge, C for the others.
        offset_scale: s of the start s f0; 0 means no f0.
        outputs: ``(m, c)`` outputs on the dev and the other examples.
        loss: Mean dev loss of the kind that the method minimises; None for "svm".
    """

    regularisation: float
    offset_scale: float
    outputs: Array
    loss: float | None


def tune(
    kernel: ArrayLike,
    labels_train: ArrayLike,
    labels_dev: ArrayLike,
    *,
    judge: Judge,
    method: Method = "ridge",
    f0: Maybe = None,
    regularisations: Sequence[float] | None = None,
    offsets: Sequence[float] | None = None,
    regression: bool = False,
) -> Tuned:
    """Fit every point of a grid on train and return the best on dev.

    Ties are common on small dev splits. Scores equal up to rounding are ranked by the
    dev loss that the method minimises on train: squared error for ridge, log-loss for
    logistic regression, none for "svm", which votes between more than two classes. Then
    the strongest regularisation wins, then the smallest offset scale, so that the order
    of the grid does not matter.

    Args:
        kernel: ``(rows, n)``, ``(rows, n, c, c)`` or ``(rows, n, c - 1, c - 1)``: rows
            are the n training examples, the dev examples and any others, columns the
            training examples.
        labels_train: ``(n,)`` class indices from 0, each at least once, or real numbers
            for regression.
        labels_dev: ``(d,)``, at least one.
        judge: Function of ``(d, c)`` outputs and `labels_dev` that returns a score;
            higher is better.
        method: "ridge", "logistic" or "svm" (`ntk.classifiers.estimators`), or
            "asymmetric" (`ntk.classifiers.asymmetric.AsymmetricRidgeClassifier`).
        f0: ``(rows, c)``, the model's own outputs; not for "svm".
        regularisations: Grid of alpha or C; by default `REGULARISATIONS`.
        offsets: Grid of scales of `f0`; by default `OFFSETS`, without `f0` only 0.
        regression: Whether labels are real numbers, c = 1: kernel ridge regression on
            a scalar kernel, from `f0` or the mean label.

    Returns:
        The best point, its outputs, and all points.

    Raises:
        ValueError: If an argument is not as described, the training block is not
            symmetric positive semi-definite (except for "asymmetric"), or a score is
            not finite.
    """
    points = fitted_points(
        kernel,
        labels_train,
        labels_dev,
        method=method,
        f0=f0,
        regularisations=regularisations,
        offsets=offsets,
        regression=regression,
    )
    dev_labels = np.asarray(labels_dev)
    d = len(dev_labels)
    best, scores = best_point(points, dev_labels, judge, method)
    point = points[best]
    return Tuned(
        dev=point.outputs[:d],
        test=point.outputs[d:],
        regularisation=point.regularisation,
        offset_scale=point.offset_scale,
        dev_score=scores[best],
        grid=[
            {
                "regularisation": p.regularisation,
                "offset_scale": p.offset_scale,
                "dev_score": score,
                "dev_loss": p.loss,
            }
            for p, score in zip(points, scores, strict=True)
        ],
    )


def fitted_points(
    kernel: ArrayLike,
    labels_train: ArrayLike,
    labels_dev: ArrayLike,
    *,
    method: Method,
    f0: Maybe = None,
    regularisations: Sequence[float] | None = None,
    offsets: Sequence[float] | None = None,
    regression: bool = False,
) -> list[Point]:
    """Fit every point of a grid on train; arguments and errors are those of `tune`.

    Returns:
        The points, by ascending regularisation parameter and then offset scale.
    """
    _check_method(method, regression, f0)
    grid, scales = _grid(regularisations, method), _scales(offsets, f0)
    data = _data(kernel, labels_train, labels_dev, f0, regression)
    fit = _fit_ridge if method in RIDGES else _fit_machines
    return list(fit(data, method, grid, scales))


def _fit_ridge(
    data: _Data, method: str, alphas: Sequence[float], scales: Sequence[float]
) -> Iterator[Point]:
    n, m, d = len(data.train), len(data.rest), len(data.dev_labels)
    Y, dev_Y = data.targets(data.labels), data.targets(data.dev_labels)
    f0 = np.zeros((n + m, data.c)) if data.f0 is None else data.f0
    f0 = data.outputs.encoded(f0)
    mean = np.broadcast_to(Y.mean(axis=0), Y.shape)
    gram, other = _gram(data.train), _gram(data.rest)
    scale = float(gram.trace() / len(gram))
    if not scale > 0:
        raise ValueError(
            f"`kernel` has mean diagonal {scale:.2e} between training examples; "
            "expected more than 0. Check that the tangent space holds parameters that "
            "the outputs depend on."
        )
    # Y, f0 and the mean side by side; the block form has one row per output.
    o, b = Y.shape[1], len(gram) // n
    columns = np.stack([Y, f0[:n], mean], axis=1).reshape(n, 3, b, o // b)
    solve = _solver(method, gram, columns.swapaxes(1, 2).reshape(n * b, -1))
    for alpha in alphas:
        P = (other @ solve(alpha * scale)).reshape(m, b, 3, o // b).swapaxes(1, 2)
        P_Y, P_f0, P_mean = P.reshape(m, 3, o).swapaxes(0, 1)
        for s in scales:
            f = P_Y + (s * (f0[n:] - P_f0) if s else mean[0] - P_mean)
            loss = float(((f[:d] - dev_Y) ** 2).mean())
            yield Point(alpha, s, data.outputs.decoded(f), loss)


def _solver(method: str, gram: Array, columns: Array) -> Callable[[float], Array]:
    """Return the function that maps a ridge to (G + ridge I)^-1 columns."""
    if method == "asymmetric":
        return lambda ridge: ridge_solution(gram, columns, ridge)
    values, U = eigensystem(gram, name="kernel")
    rotated = U.T @ columns
    return lambda ridge: U @ (rotated / (values + ridge)[:, None])


def _fit_machines(
    data: _Data, method: str, Cs: Sequence[float], scales: Sequence[float]
) -> Iterator[Point]:
    n, d = len(data.train), len(data.dev_labels)
    for C in Cs:
        for s in scales:
            train, rest = {}, {}
            if s and data.f0 is not None:
                train, rest = {"offset": s * data.f0[:n]}, {"offset": s * data.f0[n:]}
            machine = KernelSVC(C) if method == "svm" else KernelLogisticRegression(C)
            machine.fit(data.train, data.labels, **train)
            f = machine.decision_function(data.rest, **rest)
            if f.ndim == 1:
                f = Outputs(MARGIN).decoded(f[:, None])
            loss = None
            if method == "logistic":
                log_p = log_softmax(f[:d], axis=1)
                loss = -float(log_p[range(d), data.dev_labels].mean())
            yield Point(C, s, f, loss)


def _score(judge: Judge, point: Point, labels: NDArray[Any]) -> float:
    score = float(judge(point.outputs[: len(labels)], labels))
    if not np.isfinite(score):
        raise ValueError(
            f"`judge` returned {score} at regularisation={point.regularisation:g}, "
            f"offset_scale={point.offset_scale:g}; expected a finite number, for "
            "constant outputs too, as from `rocoft.data.metrics.scores`."
        )
    return score


def best_point(
    points: Sequence[Point], labels: NDArray[Any], judge: Judge, method: str
) -> tuple[int, list[float]]:
    """Score points; `tune` describes how ties are broken.

    Args:
        points: The points; their first outputs are those of the labels.
        labels: ``(d,)`` labels.
        judge: Function of ``(d, c)`` outputs and labels.
        method: The method, whose strong end of a grid is known.

    Returns:
        The index of the best point, and all scores.
    """
    scores = [_score(judge, point, labels) for point in points]
    top, rounding = max(scores), TIE - 1
    tied = [i for i in range(len(points)) if scores[i] >= top - rounding * abs(top)]
    losses = {i: loss for i in tied if (loss := points[i].loss) is not None}
    if losses:
        least = min(losses.values())
        tied = [i for i, loss in losses.items() if loss <= least * TIE]
    # A large alpha, but a small C, is a strong regularisation.
    sign = -1 if method in RIDGES else 1

    def rank(i: int) -> tuple[float, float]:
        return sign * points[i].regularisation, points[i].offset_scale

    return min(tied, key=rank), scores


def _gram(kernel: Array) -> Array:
    """Return ``(m, n)`` unchanged and ``(m, n, c, c)`` as ``(m c, n c)``."""
    # A copy: torch rejects read-only and reversed arrays.
    return gram_matrix(torch.from_numpy(np.array(kernel, order="C"))).numpy()


def _data(
    kernel: ArrayLike,
    labels_train: ArrayLike,
    labels_dev: ArrayLike,
    f0: Maybe,
    regression: bool,
) -> _Data:
    """Check the arguments of `tune` and cut them after the training examples."""
    K = as_array(kernel, "kernel")
    labels = _labels(labels_train, "labels_train", regression)
    dev = _labels(labels_dev, "labels_dev", regression)
    n, d, c = len(labels), len(dev), 1 if regression else int(labels.max()) + 1
    if not regression and (c < 2 or len(np.unique(labels)) < c):
        raise ValueError(
            f"`labels_train` holds the classes {np.unique(labels).tolist()}; expected "
            "two or more, numbered from 0, each at least once. Sample examples of "
            "each class."
        )
    if not regression and dev.max() >= c:
        raise ValueError(
            f"`labels_dev` holds class {dev.max()}; expected those of `labels_train`, "
            f"0 to {c - 1}. Sample training examples of every class."
        )
    outputs = Outputs.of(K.shape, c)
    if K.ndim < 2 or K.shape[1] != n or outputs is None or len(K) < n + d:
        at = f"{n + d}, {n}"
        block = f" or ({at}, {c}, {c}), or of contrasts ({at}, {c - 1}, {c - 1})" * (
            not regression
        )
        raise ValueError(
            f"`kernel` has shape {K.shape}; expected ({n + d}, {n}){block}, or more "
            f"rows: {n} training examples, {d} of dev, then any others as rows, the "
            "training examples as columns."
        )
    start = None if f0 is None else as_array(f0, "f0")
    if start is not None and start.shape != (len(K), c):
        raise ValueError(
            f"`f0` has shape {start.shape}; expected ({len(K)}, {c}), the model's own "
            "outputs for each row of `kernel`."
        )
    return _Data(K[:n], K[n:], labels, dev, start, c, outputs)


def _labels(values: ArrayLike, name: str, regression: bool) -> NDArray[Any]:
    labels = np.asarray(values)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(
            f"`{name}` has shape {labels.shape}; expected a label for each of one or "
            "more examples. Models are fitted on train, hyperparameters chosen on dev."
        )
    if regression:
        return as_array(labels, name)
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"`{name}` has dtype {labels.dtype} and holds {labels.min()!r}; expected "
            "class indices from 0, integers. Pass `regression=True` for real numbers."
        )
    return labels


def _check_method(method: str, regression: bool, f0: Maybe) -> None:
    if method not in REGULARISATIONS:
        raise ValueError(
            f"`method={method!r}` is unknown; expected one of "
            f"{', '.join(REGULARISATIONS)}."
        )
    if regression and method not in RIDGES:
        raise ValueError(
            f"`method={method!r}` classifies; expected one of {', '.join(RIDGES)} for "
            "`regression=True`."
        )
    if method == "svm" and f0 is not None:
        raise ValueError("`f0` is given; expected None. An SVM cannot use it.")


def _grid(values: Sequence[float] | None, method: str) -> list[float]:
    grid = sorted(set(REGULARISATIONS[method] if values is None else values))
    if not grid or not all(0 < value < np.inf for value in grid):
        raise ValueError(
            f"`regularisations={values!r}`; expected positive finite numbers, at least "
            "one, or None for the grid of the method."
        )
    return grid


def _scales(offsets: Sequence[float] | None, f0: Maybe) -> list[float]:
    if offsets is not None and f0 is None:
        raise ValueError(
            f"`offsets={offsets!r}` is given without `f0`; expected both or none. Pass "
            "the model's own outputs as `f0`."
        )
    if f0 is None:
        return [0.0]
    scales = sorted(set(OFFSETS if offsets is None else offsets))
    if not scales or not all(0 <= scale < np.inf for scale in scales):
        raise ValueError(
            f"`offsets={offsets!r}`; expected finite numbers of at least 0, one or "
            "more, or None for `OFFSETS`."
        )
    return scales
