"""What the kernel of tuning some layers says of them before they are tuned.

Every measure is of K_S + H, the kernels of the layers S and of the head, which is tuned
with them. Ridges are relative: s is epsilon times the mean eigenvalue. The target-aware
score and GCV have the ridge of all layers together, so that sets can be compared; the
effective dimension and the condition number that of the set, so that scale cancels.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from ntk import distance, spectrum
from ntk.kernel import gram_matrix
from ntk.layers_records import Split
from ntk.layerwise import combined
from ntk.risk import RidgeRegression
from ntk.spectrum import Array


class Predictor(NamedTuple):
    """A measure that might tell which layers to tune.

    Attributes:
        sign: 1 if more of it should mean a better score, else -1.
        meaning: In a sentence.
    """

    sign: int
    meaning: str


TARGET_AWARE = "target-aware"
SIZE = "parameters"
PREDICTORS = {
    TARGET_AWARE: Predictor(
        1,
        "Share by which tuning the layers lowers r'(K + s I)^-1 r, beside the head "
        "alone; r is one-hot labels less the model's own probabilities.",
    ),
    "target-aware, labels": Predictor(
        1, "The same with r the labels less their mean, as if the model knew nothing."
    ),
    "GCV": Predictor(
        -1, "Generalised cross-validation of ridge regression of r: expected test risk."
    ),
    "GCV, labels": Predictor(-1, "The same of the labels less their mean."),
    "alignment": Predictor(1, "Kernel-target alignment with r."),
    "alignment, labels": Predictor(1, "The same with the labels less their mean."),
    "gradient norm": Predictor(
        1, "Norm of the gradient of the loss whose residual is r, head included."
    ),
    "effective dimension": Predictor(
        1, "tr K (K + s I)^-1: directions that the ridge does not shrink."
    ),
    "condition number": Predictor(
        -1, "(l_1 + s) / (l_k + s): the published metric, at a relative ridge."
    ),
    "largest eigenvalue": Predictor(
        -1, "l_1 of the kernel: the published rule takes the least."
    ),
    "trace": Predictor(1, "Sum of the eigenvalues: squared norm of the Jacobian."),
    SIZE: Predictor(1, "How many are tuned: what needs no kernel."),
}
"""By name, in the order of the tables."""


def predictors(
    split: Split, chosen: Collection[str], epsilon: float
) -> dict[str, float]:
    """Return every predictor of tuning some layers.

    Args:
        split: The layers.
        chosen: Their names; none stands for the head alone.
        epsilon: The ridge in units of the mean eigenvalue.

    Returns:
        Values by the names of `PREDICTORS`.
    """
    gram = kernel_of(split, chosen)
    values = spectrum.eigenvalues(gram)
    own = spectrum.relative_ridge(values, epsilon)
    r = split.residual
    found = {
        "gradient norm": gradient_norm(gram, r),
        "effective dimension": spectrum.effective_dimension(values, own),
        "condition number": spectrum.condition_number(values, own),
        "largest eigenvalue": float(values[0]),
        "trace": float(np.trace(gram)),
        SIZE: float(sum(split.layers[name].parameters for name in chosen)),
    }
    for targets, end in ((r, ""), (split.labels, ", labels")):
        fit = RidgeRegression.of(gram, targets, outputs=split.outputs)
        found[TARGET_AWARE + end] = _explained(split, fit, epsilon)
        found["GCV" + end] = fit.gcv(_ridge(split, epsilon))
        found["alignment" + end] = distance.alignment(gram, targets)
    return {name: found[name] for name in PREDICTORS}


def explained(split: Split, chosen: Collection[str], epsilon: float) -> float:
    """Return the target-aware score of some layers.

    Args:
        split: The layers.
        chosen: Their names; none stands for the head alone, whose score is 0.
        epsilon: The ridge in units of the mean eigenvalue.

    Returns:
        The share by which r'(K + s I)^-1 r is less than for the head alone.
    """
    gram = kernel_of(split, chosen)
    return _explained(split, RidgeRegression.of(gram, split.residual), epsilon)


def gradient_norm(gram: Array, residual: Array) -> float:
    """Return (r'K r)^1/2, the norm of the gradient of a loss whose residual is r.

    Args:
        gram: K, ``(k, k)``.
        residual: r, ``(k, t)``.
    """
    return max(float(np.vdot(residual, gram @ residual)), 0.0) ** 0.5


def kernel_of(split: Split, chosen: Collection[str]) -> Array:
    """Return the kernel of tuning some layers and the head.

    Args:
        split: The layers.
        chosen: Their names.

    Returns:
        ``(k, k)``.
    """
    if not chosen:
        return split.base
    return split.base + gram_matrix(combined(split.layers, chosen)).numpy()


def _explained(split: Split, fit: RidgeRegression, epsilon: float) -> float:
    start = RidgeRegression.of(split.base, fit.targets)
    ridge = _ridge(split, epsilon)
    return 1 - fit.optimum(ridge) / start.optimum(ridge)


def _ridge(split: Split, epsilon: float) -> float:
    whole = kernel_of(split, split.layers)
    return epsilon * float(np.trace(whole)) / len(whole)
