"""Measures of a set of layers before tuning that might predict the test score.

Every measure is one of K_S + H, the sum of the kernels of the layers S and of the head,
which is tuned with them. The ridge s is epsilon times the mean eigenvalue: that of the
kernel of all layers for the target-aware score and GCV, so that sets are comparable;
that of the set's own kernel for the effective dimension and the condition number, so
that they do not depend on scale.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ntk.kernels import combined
from ntk.measures import Array, RidgeRegression, distance, gram_matrix, spectrum
from ntk.studies.layers.records import LayerKernels


class Predictor(NamedTuple):
    """A measure that might predict which layers to tune.

    Attributes:
        sign: 1 if larger values should mean a better score, else -1.
        meaning: Definition in a sentence.
    """

    sign: int
    meaning: str


TARGET_AWARE = "target-aware"
SIZE = "parameters"
DEPTH = "mean layer"
STATIC = "other tasks"
PREDICTORS = {
    TARGET_AWARE: Predictor(
        1,
        "Relative decrease of r'(K + s I)^-1 r from the head alone to the layers and "
        "the head; r is one-hot labels minus the model's probabilities.",
    ),
    "target-aware, labels": Predictor(
        1, "The same with r the labels minus their mean, ignoring the model's outputs."
    ),
    "GCV": Predictor(
        -1, "Generalised cross-validation of ridge regression of r: expected test risk."
    ),
    "GCV, labels": Predictor(-1, "The same for the labels minus their mean."),
    "alignment": Predictor(1, "Kernel-target alignment with r."),
    "alignment, labels": Predictor(1, "The same with the labels minus their mean."),
    "gradient norm": Predictor(
        1, "Norm of the gradient of the loss whose residual is r, head included."
    ),
    "effective dimension": Predictor(
        1, "tr K (K + s I)^-1: number of directions that the ridge does not shrink."
    ),
    "condition number": Predictor(
        -1, "(l_1 + s) / (l_k + s): the published metric, with a relative ridge."
    ),
    "largest eigenvalue": Predictor(
        -1, "l_1 of the kernel: the published rule takes the smallest."
    ),
    "trace": Predictor(1, "Sum of the eigenvalues: squared norm of the Jacobian."),
    SIZE: Predictor(1, "Number of tuned parameters; needs no kernel."),
    DEPTH: Predictor(-1, "Mean index of the tuned layers, 0 first; needs no kernel."),
    STATIC: Predictor(
        1,
        "Sum of the effects of the tuned layers on the scores of the other tasks, each "
        "standardised, by least squares; needs no kernel, but tuned sets elsewhere.",
    ),
}
"""Predictors by name, in display order."""

CONTROLS = {"beyond_size": SIZE, "beyond_depth": DEPTH, "beyond_static": STATIC}
"""The predictors that need no kernel, by the name of the correlations beyond them."""


def predictors(
    kernels: LayerKernels, chosen: Collection[str], epsilon: float
) -> dict[str, float]:
    """Return all predictors of a set of layers.

    Args:
        kernels: The kernels of all layers.
        chosen: Names of the layers in the set; empty for the head alone.
        epsilon: The ridge in units of the mean eigenvalue.

    Returns:
        Values by the names of `PREDICTORS` but `STATIC`, which is not of one split.
    """
    gram = kernel_of(kernels, chosen)
    values = spectrum.eigenvalues(gram)
    own_ridge = spectrum.relative_ridge(values, epsilon)
    honest = kernels.honest
    unseen, r = kernel_of(honest, chosen), honest.residual
    measures = {
        "gradient norm": gradient_norm(unseen, r),
        "effective dimension": spectrum.effective_dimension(values, own_ridge),
        "condition number": spectrum.condition_number(values, own_ridge),
        "largest eigenvalue": float(values[0]),
        "trace": float(np.trace(gram)),
        SIZE: float(sum(kernels.layers[name].parameters for name in chosen)),
        DEPTH: sum(map(int, chosen)) / len(chosen) if chosen else math.nan,
    }
    for targets, end in ((r, ""), (honest.labels, ", labels")):
        fit = RidgeRegression.of(unseen, targets, outputs=kernels.outputs)
        measures[TARGET_AWARE + end] = _explained(honest, fit, epsilon)
        measures["GCV" + end] = fit.gcv(_ridge(honest, epsilon))
        measures["alignment" + end] = alignment(honest, unseen, targets)
    return {name: measures[name] for name in PREDICTORS if name != STATIC}


def explained(kernels: LayerKernels, chosen: Collection[str], epsilon: float) -> float:
    """Return the target-aware score of a set of layers.

    Args:
        kernels: The kernels of all layers.
        chosen: Names of the layers in the set; empty for the head alone, with score 0.
        epsilon: The ridge in units of the mean eigenvalue.

    Returns:
        The relative decrease of r'(K + s I)^-1 r against the head alone.
    """
    honest = kernels.honest
    gram = kernel_of(honest, chosen)
    return _explained(honest, RidgeRegression.of(gram, honest.residual), epsilon)


def alignment(kernels: LayerKernels, gram: Array, targets: Array) -> float:
    """Return the alignment of a kernel with targets, the mean over folds.

    Args:
        kernels: The kernels of all layers.
        gram: ``(k, k)`` kernel of some of them; a zero one has alignment 0.
        targets: ``(k, t)`` targets.
    """
    return float(
        np.mean(
            [
                distance.alignment(gram[np.ix_(rows, rows)], targets[rows])
                if gram[np.ix_(rows, rows)].any()
                else 0.0
                for rows in kernels.folds
            ]
        )
    )


def gradient_norm(gram: Array, residual: Array) -> float:
    """Return (r'K r)^1/2, the norm of the gradient of a loss whose residual is r.

    Args:
        gram: ``(k, k)`` kernel K.
        residual: ``(k, t)`` residual r.
    """
    return max(float(np.vdot(residual, gram @ residual)), 0.0) ** 0.5


def kernel_of(kernels: LayerKernels, chosen: Collection[str]) -> Array:
    """Return the kernel of some layers and the head.

    Args:
        kernels: The kernels of all layers.
        chosen: Names of the layers.

    Returns:
        The ``(k, k)`` kernel.
    """
    if not chosen:
        return kernels.base
    return kernels.base + gram_matrix(combined(kernels.layers, chosen)).numpy()


def _explained(kernels: LayerKernels, fit: RidgeRegression, epsilon: float) -> float:
    start = RidgeRegression.of(kernels.base, fit.targets)
    ridge = _ridge(kernels, epsilon)
    return 1 - fit.optimum(ridge) / start.optimum(ridge)


def _ridge(kernels: LayerKernels, epsilon: float) -> float:
    gram = kernel_of(kernels, kernels.layers)
    return epsilon * float(np.trace(gram)) / len(gram)
