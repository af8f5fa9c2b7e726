"""Predict the risk of kernel ridge regression from the Gram matrix and the targets.

Kernel ridge regression of targets Y ``(k, t)`` with a Gram matrix K ``(k, k)`` and a
ridge s > 0 minimises ||f - Y||^2 + s ||f||_H^2, the squares summed over k rows and t
columns. With G = (K + s I)^-1, l_i and u_i the eigenvalues and eigenvectors of K,

    outputs K G Y,    hat matrix H = K G,    residual s G Y,    minimum s tr Y'G Y,

and each is a sum over i in the eigenbasis: one decomposition serves all ridges. If the
loss is the mean of the squares over k rows, the ridge is k s.

No offset is fitted: for Y pass the residual Y - f_0 of a pretrained model, or centred
targets, not the labels. Flatten a kernel with axes (n, m, c, d) to ``(n c, m d)`` first
(`ntk.kernels.empirical`) and targets ``(n, c)`` to ``(n c,)``; then c rows are one
example.

Risks are means over the k t entries, in squared units of the targets. Errors are those
of `ntk.measures.spectrum`; `Raises` lists only further ones.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ntk.measures.spectrum import (
    PSD_TOLERANCE,
    Array,
    as_targets,
    effective_dimension,
    eigensystem,
)

__all__ = [
    "RidgeRegression",
    "check_ridge",
    "left_out_residuals",
]


@dataclass(frozen=True, eq=False)
class RidgeRegression:
    """Kernel ridge regression at any ridge, from one eigendecomposition.

    Attributes:
        eigenvalues: Eigenvalues of K, ``(k,)``, descending, non-negative.
        eigenvectors: Eigenvectors of K, ``(k, k)``, as columns.
        targets: Y, ``(k, t)``.
        outputs: c, the number of consecutive rows of one example.
    """

    eigenvalues: Array
    eigenvectors: Array
    targets: Array
    outputs: int = 1

    @classmethod
    def of(
        cls,
        gram: ArrayLike,
        targets: ArrayLike,
        *,
        outputs: int = 1,
        tolerance: float = PSD_TOLERANCE,
    ) -> "RidgeRegression":
        """Decompose a Gram matrix.

        Args:
            gram: K, ``(k, k)``, symmetric positive semi-definite.
            targets: Y, ``(k,)`` or ``(k, t)``, not all zero.
            outputs: c, the number of consecutive rows of one example.
            tolerance: Relative rounding error, see `ntk.measures.spectrum.eigenvalues`.

        Returns:
            The regression, ready for any ridge.

        Raises:
            ValueError: If the number of rows is not n * outputs.
        """
        values, vectors = eigensystem(gram, tolerance=tolerance)
        if outputs < 1 or values.size % outputs:
            raise ValueError(
                f"`outputs={outputs}`; expected a divisor of {values.size} rows: the "
                "outputs of the model for a flattened kernel, 1 for a reduced one."
            )
        return cls(values, vectors, as_targets(targets, values.size), outputs)

    def degrees_of_freedom(self, ridge: float) -> float:
        """Return tr H = sum_i l_i / (l_i + s), the effective dimension."""
        check_ridge(ridge)
        return effective_dimension(self.eigenvalues, ridge)

    def residuals(self, ridge: float) -> Array:
        """Return the training residual Y - H Y = s G Y, ``(k, t)``.

        It is sum_i s / (s + l_i) u_i u_i'Y.
        """
        return self.eigenvectors @ (self._kept(ridge)[:, None] * self._projected)

    def training_risk(self, ridge: float) -> float:
        """Return the exact training risk ||s G Y||^2 / (k t).

        It is sum_i (s / (s + l_i))^2 ||u_i'Y||^2 / (k t), the spectrum weighted by the
        targets. Unlike the `optimum`, it may rise when a positive semi-definite matrix
        is added to K.
        """
        return float(self._kept(ridge) ** 2 @ self._energy / self.targets.size)

    def optimum(self, ridge: float) -> float:
        """Return the smallest regularised risk, s tr Y'G Y / (k t).

        The minimum of (||f - Y||^2 + s ||f||_H^2) / (k t), between 0 and the mean
        square of the targets. Adding a positive semi-definite matrix to K never raises
        it.
        """
        return float(self._kept(ridge) @ self._energy / self.targets.size)

    def gcv(self, ridge: float) -> float:
        """Return generalised cross-validation, an estimate of the test risk.

            GCV = (||(I - H) Y||^2 / (k t)) / (tr(I - H) / k)^2

        Golub, Heath and Wahba (1979); for empirical NTKs Wei, Hu and Steinhardt (2022).
        Rows count as examples: for a flattened kernel it estimates the risk at one
        output given the other outputs of the same example.
        """
        check_ridge(ridge)
        # Relative to the largest: the squares of small values would underflow.
        kept = (ridge + self.eigenvalues[-1]) / (ridge + self.eigenvalues)
        return float(kept**2 @ self._energy / self.targets.size / kept.mean() ** 2)

    def left_out_residuals(self, ridge: float) -> Array:
        """Return the leave-one-out residual of every example, ``(k, t)``.

        For example i with its c rows it is exactly G[i, i]^-1 (G Y)[i], at the same
        ridge, without a refit. Rasmussen and Williams (2006), equation 5.12 for c = 1.
        """
        check_ridge(ridge)
        k, t = self.targets.shape
        shape = (k // self.outputs, self.outputs, -1)
        solved = self.eigenvectors / (self.eigenvalues + ridge)
        residuals = left_out_residuals(
            solved.reshape(shape),
            self.eigenvectors.reshape(shape),
            (solved @ self._projected).reshape(shape),
        )
        return residuals.reshape(k, t)

    def leave_one_out(self, ridge: float) -> float:
        """Return the mean square of the `left_out_residuals`."""
        return float((self.left_out_residuals(ridge) ** 2).mean())

    def log_evidence(self, ridge: float, *, scale: float | None = 1.0) -> float:
        """Return the log evidence of a Gaussian process, in nats.

        The log density of t independent columns from N(0, a (K + s I)): a prior of
        covariance a K and noise of variance a s,

            -tr Y'G Y / (2 a) - (t / 2) log det(K + s I) - (k t / 2) log(2 pi a).

        Rasmussen and Williams (2006), equation 2.30. It depends on the scale of K,
        which is arbitrary for an NTK; at the best a only on the ratio of K to s.

        Args:
            ridge: s.
            scale: a, above 0. None means `evidence_scale`, the maximiser.

        Raises:
            ValueError: If the scale is not above 0.
        """
        a = self.evidence_scale(ridge) if scale is None else scale
        if not 0 < a < np.inf:
            raise ValueError(
                f"`scale={scale!r}`; expected a finite number above 0, or None for the "
                "best."
            )
        k, t = self.targets.shape
        fit = k * t * self.evidence_scale(ridge) / a
        log_det = np.log(self.eigenvalues + ridge).sum()
        return float(-(fit + t * log_det + k * t * np.log(2 * np.pi * a)) / 2)

    def evidence_scale(self, ridge: float) -> float:
        """Return the a = tr Y'G Y / (k t) at which the log evidence is largest."""
        return self.optimum(ridge) / ridge

    @cached_property
    def _projected(self) -> Array:
        """U'Y, ``(k, t)``."""
        return self.eigenvectors.T @ self.targets

    @cached_property
    def _energy(self) -> Array:
        """||u_i'Y||^2, ``(k,)``."""
        return np.asarray((self._projected**2).sum(axis=1))

    def _kept(self, ridge: float) -> Array:
        """Return the shrinkage s / (s + l_i) of the residual, ascending ``(k,)``."""
        check_ridge(ridge)
        return ridge / (ridge + self.eigenvalues)


def left_out_residuals(solved_vectors: Array, vectors: Array, dual: Array) -> Array:
    """Return the leave-one-out residual of every example.

    It is G[i, i]^-1 a[i] for n examples of b rows, G being the inverse of the
    regularised Gram matrix and a = G Y the dual coefficients.

    Args:
        solved_vectors: G U, ``(n, b, r)``.
        vectors: U, ``(n, b, r)``, with U U' = I.
        dual: a, ``(n, b, t)``. If the targets depend on the example left out, a[i]
            belongs to the targets without i.

    Returns:
        ``(n, b, t)``.
    """
    diagonal = solved_vectors @ vectors.transpose(0, 2, 1)
    return np.asarray(np.linalg.solve(diagonal, dual))


def check_ridge(ridge: float) -> None:
    """Check that a ridge is a finite number above 0.

    Args:
        ridge: s.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < ridge < np.inf:
        raise ValueError(
            f"`ridge={ridge!r}`; expected a finite number above 0: see "
            "`ntk.measures.spectrum.relative_ridge`."
        )
