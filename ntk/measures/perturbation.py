"""Bound how the spectrum of a kernel changes when a layer's kernel is added.

K is the kernel without the layer and S the layer's own: Gram matrices ``(k, k)`` of the
same examples, symmetric positive semi-definite, with eigenvalues l_1 >= ... >= l_k.
Rahimi Afzal et al. (2025, "Linearization Explains Fine-Tuning in Large Language
Models", arXiv 2602.08239), theorem 6:

    (1 - eta) l_i(K) <= l_i(K + S) <= (1 + eta) l_i(K),    eta = ||K^-1/2 S K^-1/2||

This needs a positive definite K. Unless eta < 1, the lower bound says nothing, and
theorem 7 of the paper, on the training risk, need not hold. With a ridge s > 0,

    K + s I <= K + S + s I <= (1 + eta_s) (K + s I)

in the order of positive semi-definite matrices, for every K and S, where
eta_s = ||(K + s I)^-1/2 S (K + s I)^-1/2||. Bounds of the eigenvalues, the condition
number and the effective dimension of K + S follow.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ntk.measures.risk import check_ridge
from ntk.measures.spectrum import (
    PSD_TOLERANCE,
    Array,
    condition_number,
    effective_dimension,
    eigensystem,
    eigenvalues,
)

__all__ = ["Bracket", "brackets"]


class Bracket(NamedTuple):
    """Lower and upper bound of a quantity, and its measured values.

    Attributes:
        lower: The lower bound.
        measured: ``(m,)``, all between the bounds where the conditions hold.
        upper: The upper bound.
        conditions: What the bounds assume, and whether it holds; empty if nothing.
    """

    lower: float
    measured: Array
    upper: float
    conditions: dict[str, bool]


def brackets(gram: ArrayLike, added: ArrayLike, ridge: float) -> dict[str, Bracket]:
    """Bound the spectrum of K + S by that of K, and measure it.

    Args:
        gram: K, ``(k, k)``, not zero.
        added: S, ``(k, k)``.
        ridge: s, above 0.

    Returns:
        Four brackets by name: the growth l_i(K + S) / l_i(K) of every eigenvalue above
        0 by theorem 6; the growth (l_i(K + S) + s) / (l_i(K) + s); the condition number
        (l_1 + s) / (l_k + s) of K + S; and its effective dimension.

    Raises:
        ValueError: If the matrices differ in size, or the ridge is not above 0.
        NumericalError: If a matrix has an entry that is NaN or Inf.
        NotSymmetricError: If a matrix is not symmetric.
        NotPSDError: If a matrix is not positive semi-definite.
    """
    check_ridge(ridge)
    before, vectors = eigensystem(gram)
    layer, layer_vectors = eigensystem(added, name="added")
    if before.size != layer.size:
        raise ValueError(
            f"`added` has {layer.size} rows; expected {before.size} as `gram`. "
            "Compute both kernels on the same examples."
        )
    after = eigenvalues(np.asarray(gram, float) + np.asarray(added, float))
    # ||A^-1/2 S^1/2||^2 keeps digits that ||A^-1/2 S A^-1/2|| loses to rounding in S.
    root = vectors.T @ layer_vectors * np.sqrt(layer)
    norm = lambda s: np.linalg.norm(root / np.sqrt(before + s)[:, None], 2) ** 2
    eta = float(norm(0.0)) if before[-1] > 0 else np.inf
    factor = float(1 + norm(ridge))
    positive = before > 0
    condition = condition_number(before, ridge)
    dimension = effective_dimension(before, ridge)
    return {
        "eigenvalue growth, theorem 6": Bracket(
            1 - eta,
            after[positive] / before[positive],
            1 + eta,
            {
                "K definite": bool(before[-1] > PSD_TOLERANCE * before[0]),
                "η < 1": eta < 1,
            },
        ),
        "eigenvalue growth, ridge": Bracket(
            1.0, (after + ridge) / (before + ridge), factor, {}
        ),
        "condition number": Bracket(
            max(condition / factor, 1.0),
            np.array([condition_number(after, ridge)]),
            condition * factor,
            {},
        ),
        # Of k - tr K (K + s I)^-1 = s tr (K + s I)^-1 at least 1 / factor is left.
        "effective dimension": Bracket(
            dimension,
            np.array([effective_dimension(after, ridge)]),
            before.size - (before.size - dimension) / factor,
            {},
        ),
    }
