"""Classify with a kernel that is not symmetric: ridge and least-squares SVM.

Such a kernel is K[i, j] = <phi(x_i), psi(x_j)> with two feature maps. In that of
Asymmetric-SignGD (Malladi et al., 2023), kind "asymmetric_signgd" of `ntk.kernel`, phi
is the gradient and psi its sign: a step of sign descent on x_j moves f(x_i) by a
multiple of K[i, j]. Rows are the examples that are evaluated, columns those whose steps
they are, in training and in prediction alike, so that a function the steps can reach is

    f(x) = f0(x) + sum_j K(x, x_j) a_j.

The estimators have the forms of kernels, the offset and the units of regularisation of
`ntk.classifiers`, but K may be any square matrix. `scale_`, the mean diagonal entry,
must be positive; that of Asymmetric-SignGD is the mean 1-norm of the gradients.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score
from sklearn.utils import check_array

from ntk.classifiers import ALPHAS, CS
from ntk.kernel_classifier import (
    KERNEL,
    TIE,
    Array,
    KernelClassifier,
    Labels,
    Maybe,
    RidgeClassifier,
    Solution,
    decide,
    margin,
    regularisations,
)
from ntk.spectrum import FLOAT64_EPS

__all__ = [
    "AsymmetricLSSVC",
    "AsymmetricRidgeClassifier",
    "SingularSystemError",
    "ridge_solution",
]


class SingularSystemError(ValueError):
    """A system of linear equations is singular up to rounding."""


def ridge_solution(gram: Array, targets: Array, ridge: float) -> Array:
    """Return the solution a of (K + ridge I) a = targets.

    Args:
        gram: K, ``(k, k)``, symmetric or not.
        targets: ``(k, t)``.
        ridge: In the units of K.

    Returns:
        ``(k, t)``.

    Raises:
        SingularSystemError: If the ridge is minus an eigenvalue of K. It cannot be
            where K is positive semi-definite.
    """
    # An LU factorisation each: the Schur form, which serves every ridge, costs forty.
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


class _AsymmetricClassifier(KernelClassifier):
    """What the classifiers share: K need be neither symmetric nor semi-definite."""

    def _checked(self, gram: Array) -> Array:
        return gram


class AsymmetricRidgeClassifier(_AsymmetricClassifier, RidgeClassifier):
    """Ridge regression on class indicators with an asymmetric kernel.

    Solves (K + alpha scale_ I) a = r and predicts K(x, train) a, with targets, r and
    leave-one-out as in `ntk.classifiers.KernelRidgeClassifier`, whose solution it is
    where K is symmetric. (The code published with Malladi et al. (2023) solves with K
    and predicts with its transpose.)

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
            alphas: To choose from.
        """
        self.alpha = alpha
        self.alphas = alphas

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


class AsymmetricLSSVC(_AsymmetricClassifier):
    """Least-squares SVM with an asymmetric kernel, one-vs-rest for several classes.

    Two functions are learnt together, that of the source features phi and that of the
    target features psi. For labels y of +-1 and H_ij = y_i K_ij y_j,

        [[I / gamma, H], [H', I / gamma]] [alpha; beta] = 1 - y offset,
        source: f_s(x) = offset + sum_j K(x, x_j) y_j beta_j,
        target: f_t(x) = offset + sum_i K(x_i, x) y_i alpha_i,

    with I in units of `scale_`; they are mixed to weight f_s + (1 - weight) f_t. This
    is He et al. (2022), "Learning with Asymmetric Kernels: Least Squares and Feature
    Interpretation", without their biases, as Malladi et al. (2023) use it: no offset
    means 0 here. That an offset moves what each example still lacks is our addition.

    Labels cancel from the equations of a = y alpha and b = y beta, so one singular
    value decomposition of K serves every class, offset and gamma. The matrix has the
    eigenvalues 1 / gamma +- s_i, with s_i the singular values of K: it is indefinite
    where 1 / gamma < s_1, and singular at every s_i.

    The source is evaluated on K(test, train), the target on K(train, test), which is
    another kernel: `flipped`. Without it the source decides alone.

    Attributes:
        gamma_: The gamma used.
        loo_error_: Mean squared leave-one-out residual of the mixed function.
        loo_accuracy_: Leave-one-out accuracy of the mixed function.
        dual_coef_: ``(n, o)``, y beta, of the source.
        target_coef_: ``(n, o)``, y alpha, of the target.
        intercept_: ``(o,)``, zeros.
    """

    def __init__(
        self,
        gamma: float | None = None,
        *,
        gammas: Sequence[float] = CS,
        weight: float = 0.5,
    ) -> None:
        """Store the parameters.

        Args:
            gamma: Inverse regularisation in units of 1 / `scale_`, above 0. None
                chooses the smallest leave-one-out error, the smallest gamma among
                equals.
            gammas: To choose from.
            weight: Of the source, in [0, 1], where both functions are evaluated: by
                leave-one-out, and in predictions with `flipped`.
        """
        self.gamma = gamma
        self.gammas = gammas
        self.weight = weight

    def decision_function(
        self, K: ArrayLike, offset: Maybe = None, flipped: Maybe = None
    ) -> Array:
        """Return the outputs on test examples.

        Args:
            K: ``(m, n)``: rows are test examples, columns are the training examples
                in their order.
            offset: ``(m, c)`` if and only if `fit` had one.
            flipped: ``(n, m)``, the kernel of training with test examples, or None to
                let the source decide alone.

        Returns:
            ``(m,)`` margins f[1] - f[0] for two classes, else ``(m, c)``.
        """
        return margin(self._mixed(K, offset, flipped))

    def predict(
        self, K: ArrayLike, offset: Maybe = None, flipped: Maybe = None
    ) -> NDArray[np.generic]:
        """Return ``(m,)`` classes of the largest output, see `decision_function`."""
        index = decide(self._mixed(K, offset, flipped))
        return np.asarray(self.classes_[index])

    def score(
        self,
        K: ArrayLike,
        y: ArrayLike,
        sample_weight: Maybe = None,
        offset: Maybe = None,
        flipped: Maybe = None,
    ) -> float:
        """Return the accuracy on ``(m,)`` labels `y`, see `decision_function`."""
        predicted = self.predict(K, offset, flipped)
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        gammas, w, o = regularisations(self, "gamma"), self.weight, self.n_outputs_
        if self.kernel_ndim_ > 2:
            raise ValueError(
                f"`K` has {self.kernel_ndim_} axes; expected (n, n). Reduce a block "
                "kernel to its margin or its trace, see `ntk.kernel.reduced`."
            )
        if not 0 <= w <= 1:
            raise ValueError(
                f"`weight={w!r}`; expected a number from 0, the target alone, to 1, "
                "the source alone."
            )
        targets = _signs(labels, o)
        r = targets if f0 is None else targets - f0
        U, s, Vt = np.linalg.svd(gram)
        V = Vt.T
        U_r, V_r = U.T @ r, V.T @ r
        results = []
        for gamma in gammas:
            ridge = self.scale_ / gamma
            _check_regular(s, ridge, gamma)
            # The halves of the inverse on u_k + v_k and on u_k - v_k.
            plus, minus = 0.5 / (ridge + s), 0.5 / (ridge - s)
            even, odd = plus[:, None] * (U_r + V_r), minus[:, None] * (U_r - V_r)
            a, b = U @ (even + odd), V @ (even - odd)
            G_aa, G_bb = (U * U) @ (plus + minus), (V * V) @ (plus + minus)
            G_ab = (U * V) @ (plus - minus)
            G_ii = np.stack([G_aa, G_ab, G_ab, G_bb], axis=1).reshape(-1, 2, 2)
            residuals = np.linalg.solve(G_ii, np.stack([a, b], axis=1))
            results.append((w * residuals[:, 0] + (1 - w) * residuals[:, 1], a, b))
        errors = np.array([(residual**2).mean() for residual, *_ in results])
        best = int(np.argmax(errors <= errors.min() * TIE))
        residual, self.target_coef_, self.dual_coef_ = results[best]
        self.gamma_, self.loo_error_ = gammas[best], float(errors[best])
        self.loo_accuracy_ = float((decide(targets - residual) == labels).mean())
        self.intercept_ = np.zeros(o)

    def _mixed(self, K: ArrayLike, offset: Maybe, flipped: Maybe) -> Array:
        outputs = self._outputs(K, offset)
        if flipped is None:
            return outputs
        F = np.asarray(check_array(flipped, dtype=np.float64, input_name="flipped"))
        expected = (self.n_features_in_, len(outputs))
        if F.shape != expected:
            raise ValueError(
                f"`flipped` has shape {F.shape}; expected {expected}, the kernel of "
                "the training examples as rows with the test examples as columns."
            )
        source = self._evaluate(np.asarray(check_array(K, **KERNEL)))
        return outputs + (1 - self.weight) * (F.T @ self.target_coef_ - source)


def _signs(labels: Labels, outputs: int) -> Array:
    """Return ``(n, o)`` targets of +-1, one column for two classes."""
    own = np.eye(outputs)[labels] > 0 if outputs > 1 else labels[:, None] > 0
    return np.where(own, 1.0, -1.0)


def _check_regular(singular_values: Array, ridge: float, gamma: float) -> None:
    distances = np.abs(ridge - singular_values)
    nearest, largest = distances.argmin(), ridge + singular_values[0]
    if distances[nearest] <= len(distances) * FLOAT64_EPS * largest:
        raise SingularSystemError(
            f"`gamma={gamma:g}` makes the system singular: scale_ / gamma is "
            f"{ridge:.3e} and K has the singular value "
            f"{singular_values[nearest]:.3e}. Choose another gamma."
        )
