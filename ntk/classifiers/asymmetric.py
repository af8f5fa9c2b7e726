"""Classify with a kernel that is not symmetric, by ridge regression.

Such a kernel is K[i, j] = <phi(x_i), psi(x_j)> with two feature maps. For
Asymmetric-SignGD (Malladi et al., 2023), kind "asymmetric_signgd" of
`ntk.kernels.empirical`, phi is the gradient and psi its sign: a step of sign descent on
x_j moves f(x_i) by a multiple of K[i, j]. In training and in prediction rows are the
examples to evaluate and columns the examples to step on, so the steps reach functions

    f(x) = f0(x) + sum_j K(x, x_j) a_j.

Kernel forms, offset and units of regularisation are those of
`ntk.classifiers.estimators`, but K may be any square matrix. `scale_`, the mean
diagonal entry, must be positive; for Asymmetric-SignGD it is the mean 1-norm of the
gradients.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import scipy.linalg

from ntk.classifiers.base import Array
from ntk.classifiers.estimators import ALPHAS
from ntk.classifiers.ridge import RidgeClassifier, Solution

__all__ = [
    "AsymmetricRidgeClassifier",
    "SingularSystemError",
    "ridge_solution",
]


class SingularSystemError(ValueError):
    """A linear system is singular up to rounding."""


def ridge_solution(gram: Array, targets: Array, ridge: float) -> Array:
    """Return the solution a of (K + ridge I) a = targets.

    Args:
        gram: K, ``(k, k)``, symmetric or not.
        targets: ``(k, t)``.
        ridge: In the units of K.

    Returns:
        ``(k, t)``.

    Raises:
        SingularSystemError: If -ridge is an eigenvalue of K, which cannot happen for a
            positive semi-definite K.
    """
    # One LU factorisation per ridge: a Schur form, which serves all, costs forty.
    matrix = gram + ridge * np.eye(len(gram))
    with warnings.catch_warnings():
        warnings.simplefilter("error", scipy.linalg.LinAlgWarning)
        try:
            solution = scipy.linalg.solve(matrix, targets, assume_a="gen")
        except (scipy.linalg.LinAlgError, scipy.linalg.LinAlgWarning) as error:
            raise SingularSystemError(
                f"K + {ridge:.3e} I is singular, its condition number is "
                f"{np.linalg.cond(matrix):.1e}: an asymmetric kernel can have negative "
                "eigenvalues. Choose another regularisation."
            ) from error
    return np.asarray(solution)


class AsymmetricRidgeClassifier(RidgeClassifier):
    """Ridge regression on class indicators with an asymmetric kernel.

    Solves (K + alpha scale_ I) a = r and predicts K(x, train) a. Targets, r and
    leave-one-out are those of `ntk.classifiers.estimators.KernelRidgeClassifier`, and
    so is the solution if K is symmetric. (The code published with Malladi et al. (2023)
    solves with K and predicts with its transpose.)

    Attributes:
        alpha_: The alpha used.
        loo_error_: Mean squared leave-one-out residual over examples and outputs.
        loo_accuracy_: Leave-one-out accuracy.
        dual_coef_: ``(n, o)``.
        intercept_: ``(o,)``, the mean of the targets; 0 with an offset.
    """

    def __init__(
        self, alpha: float | None = None, *, alphas: Sequence[float] = ALPHAS
    ) -> None:
        """Store the parameters.

        Args:
            alpha: Ridge in units of `scale_`, above 0. None chooses the smallest
                leave-one-out error, the largest alpha among equals.
            alphas: Candidates for alpha.
        """
        self.alpha = alpha
        self.alphas = alphas

    def _checked(self, gram: Array) -> Array:
        return gram

    def _solutions(
        self, gram: Array, r: Array, ridges: Sequence[float]
    ) -> Iterator[Solution]:
        n, b = r.shape[:2]
        for ridge in ridges:
            inverse = ridge_solution(gram, np.eye(n * b), ridge)
            blocks = inverse.reshape(n, b, n, b)
            G_r = (inverse @ r.reshape(n * b, -1)).reshape(n, b, -1)
            G_ii = blocks[range(n), :, range(n)]
            yield G_r, blocks.sum(axis=2), partial(np.linalg.solve, G_ii)
