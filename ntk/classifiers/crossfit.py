"""Choose a kernel classifier's hyperparameters by examples that the head has not seen.

A head that was fitted to the training examples has seen their labels, so leave-one-out
on the kernel under it is no estimate of the error on new examples. Here each fold of
the training examples is predicted under a head that was fitted without it:

    f(x_i) = f0_j(x_i) + K_j(x_i, R_j) a,    i in fold j, R_j the examples outside it,

with K_j and f0_j the kernel and the outputs under the j-th head, and a fitted on R_j.
Every example is predicted once, by classifiers that never saw its label. The best of a
grid of scores is too good, because it is partly luck: the score that is reported takes
each fold at the grid point that is best on the other folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntk.classifiers.base import Array
from ntk.classifiers.tuning import Judge, Method, Point, best_point, fitted_points

__all__ = ["CrossFitted", "Fold", "cross_fit"]


@dataclass(frozen=True, eq=False)
class Fold:
    """Kernel and outputs under a head that was fitted without some examples.

    Attributes:
        held: Indices of the examples that the head has not seen.
        kernel: ``(n, n, ...)`` between all training examples.
        f0: ``(n, c)``, the model's own outputs.
    """

    held: Sequence[int]
    kernel: Array
    f0: Array

    def seen(self) -> NDArray[np.intp]:
        """Return the indices of the examples that the head was fitted to."""
        return np.delete(np.arange(len(self.kernel)), list(self.held))


@dataclass(frozen=True, eq=False)
class CrossFitted:
    """The grid point with the best out-of-fold score, and what choosing so is worth.

    Attributes:
        regularisation: alpha for ridge, C for the others.
        offset_scale: s of the start s f0; 0 means no f0.
        score: The judge's score on `outputs`.
        outputs: ``(n, c)`` out-of-fold outputs, of each fold at the grid point that is
            best on the other folds.
    """

    regularisation: float
    offset_scale: float
    score: float
    outputs: Array


def cross_fit(
    folds: Sequence[Fold],
    labels: ArrayLike,
    *,
    judge: Judge,
    method: Method = "ridge",
    offset: bool = False,
    regularisations: Sequence[float] | None = None,
) -> CrossFitted:
    """Score every regularisation out of fold and return the best.

    Args:
        folds: Kernels under heads that were fitted without a fold; every training
            example is held out of one.
        labels: ``(n,)`` class indices from 0.
        judge: Function of ``(n, c)`` outputs and labels that returns a score; higher is
            better. Ties are broken as `ntk.classifiers.tuning.tune` does, by the
            out-of-fold loss and then by the strongest regularisation.
        method: As for `tune`.
        offset: Whether classifiers start from the model's own outputs.
        regularisations: Grid of alpha or C; by default that of `tune`.

    Returns:
        The best point with its out-of-fold outputs.

    Raises:
        ValueError: If the folds do not hold each example once, or `tune` refuses an
            argument.
    """
    y = np.asarray(labels)
    held = np.concatenate([np.asarray(fold.held, dtype=int) for fold in folds])
    if not np.array_equal(np.sort(held), np.arange(len(y))):
        raise ValueError(
            f"`folds` hold out {len(held)} examples, {len(set(held.tolist()))} of them "
            f"distinct; expected each of the {len(y)} once."
        )
    by_fold = []
    for fold in folds:
        rest = fold.seen()
        order = np.concatenate([rest, fold.held])
        by_fold.append(
            fitted_points(
                fold.kernel[np.ix_(order, rest)],
                y[rest],
                y[list(fold.held)],
                method=method,
                f0=fold.f0[order] if offset else None,
                offsets=(1.0,) if offset else None,
                regularisations=regularisations,
            )
        )
    everywhere = range(len(folds))
    point = by_fold[0][_best(by_fold, folds, y, everywhere, judge, method)]
    outputs = np.empty((len(y), by_fold[0][0].outputs.shape[1]))
    for j, fold in enumerate(folds):
        others = [i for i in everywhere if i != j] or [j]
        chosen = by_fold[j][_best(by_fold, folds, y, others, judge, method)]
        outputs[list(fold.held)] = chosen.outputs
    return CrossFitted(
        point.regularisation, point.offset_scale, float(judge(outputs, y)), outputs
    )


def _best(
    by_fold: Sequence[Sequence[Point]],
    folds: Sequence[Fold],
    labels: NDArray[Any],
    among: Sequence[int],
    judge: Judge,
    method: str,
) -> int:
    """Return the index of the grid point that is best on some of the folds."""
    sizes = [len(folds[i].held) for i in among]
    held = np.concatenate([np.asarray(folds[i].held, dtype=int) for i in among])
    points = []
    for parts in zip(*(by_fold[i] for i in among), strict=True):
        outputs = np.concatenate([part.outputs for part in parts])
        losses = [part.loss for part in parts if part.loss is not None]
        loss = float(np.average(losses, weights=sizes)) if losses else None
        first = parts[0]
        points.append(Point(first.regularisation, first.offset_scale, outputs, loss))
    return best_point(points, labels[held], judge, method)[0]
