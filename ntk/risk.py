"""Predict from a Gram matrix how well ridge regression with its kernel will do.

Kernel ridge regression of targets Y ``(k, t)`` with a Gram matrix K ``(k, k)`` and a
ridge s > 0 minimises ||f - Y||^2 + s ||f||_H^2, the squares summed over k rows and t
columns. With G = (K + s I)^-1, l_i and u_i the eigenvalues and eigenvectors of K,

    outputs K G Y,    hat matrix H = K G,    residual s G Y,    minimum s tr Y'G Y,

and in the eigenbasis every one of them is a sum over i: one decomposition serves all
ridges. A loss that is the mean of the squares over k rows has a ridge of k s instead.

Y is what the kernel is to explain. The function that it adds to is not fitted: pass
the residual Y - f_0 of a pretrained model, or centred targets, not the labels. A kernel
with axes (n, m, c, d) is flattened to ``(n c, m d)`` first (`ntk.kernel`), and its
targets ``(n, c)`` to ``(n c,)``; then c rows are one example.

Risks are means over the k t entries, in squared units of the targets. Errors are those
of `ntk.spectrum`; `Raises` lists only what is particular.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from ntk.spectrum import (
    PSD_TOLERANCE,
    Array,
    as_targets,
    effective_dimension,
    eigensystem,
)

__all__ = [
    "RidgeRegression",
    "RidgeRisks",
    "check_ridge",
    "left_out_residuals",
    "ridge_path",
]


@dataclass(frozen=True)
class RidgeRisks:
    """Ridge regression with one kernel and one ridge in numbers.

    They are described at the methods of `RidgeRegression`. `log_evidence` is that of
    the kernel as it is, `best_log_evidence` that of the best multiple of K + s I.
    """

    ridge: float
    degrees_of_freedom: float
    training_risk: float
    optimum: float
    gcv: float
    leave_one_out: float
    log_evidence: float
    best_log_evidence: float


@dataclass(frozen=True, eq=False)
class RidgeRegression:
    """Kernel ridge regression at any ridge, from one eigendecomposition.

    Attributes:
        eigenvalues: ``(k,)`` of K, descending, none negative.
        eigenvectors: ``(k, k)``, as columns.
        targets: Y, ``(k, t)``.
        outputs: Consecutive rows that are one example.
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
            outputs: c, the consecutive rows that are one example.
            tolerance: As in `ntk.spectrum.eigenvalues`.

        Returns:
            The regression, not yet at any ridge.

        Raises:
            ValueError: If the rows are not n * outputs.
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

        It is sum_i (s / (s + l_i))^2 ||u_i'Y||^2 / (k t): the spectrum weighted by the
        targets, of which `ntk.bounds.risk_bracket` keeps only l_1 and l_k. With more
        kernel it need not fall, unlike the `optimum`.
        """
        return float(self._kept(ridge) ** 2 @ self._energy / self.targets.size)

    def optimum(self, ridge: float) -> float:
        """Return the smallest regularised risk, s tr Y'G Y / (k t).

        The minimum of (||f - Y||^2 + s ||f||_H^2) / (k t), between 0 and the mean
        square of the targets. It never rises when a positive semi-definite matrix is
        added to K.
        """
        return float(self._kept(ridge) @ self._energy / self.targets.size)

    def gcv(self, ridge: float) -> float:
        """Return generalised cross-validation, an estimate of the test risk.

            GCV = (||(I - H) Y||^2 / (k t)) / (tr(I - H) / k)^2

        Golub, Heath and Wahba (1979); for empirical NTKs Wei, Hu and Steinhardt (2022).
        It takes the rows for single examples, so of a flattened kernel it estimates the
        risk at an output whose example's other outputs were seen.
        """
        check_ridge(ridge)
        # Over the largest of them, or the squares of small ones would vanish.
        kept = (ridge + self.eigenvalues[-1]) / (ridge + self.eigenvalues)
        return float(kept**2 @ self._energy / self.targets.size / kept.mean() ** 2)

    def left_out_residuals(self, ridge: float) -> Array:
        """Return the residual of every example when it alone is left out, ``(k, t)``.

        Example i with its c rows has G[i, i]^-1 (G Y)[i] exactly, with no refit; the
        ridge is kept. Rasmussen and Williams (2006), equation 5.12 for c = 1.
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

        Rasmussen and Williams (2006), equation 2.30. It depends on the units of K,
        which for an NTK nothing fixes: with the best a only on their ratio to s.

        Args:
            ridge: s.
            scale: a, above 0. None takes `evidence_scale`, which maximises it.

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

    def risks(self, ridge: float) -> RidgeRisks:
        """Return every number at one ridge."""
        return RidgeRisks(
            ridge=float(ridge),
            degrees_of_freedom=self.degrees_of_freedom(ridge),
            training_risk=self.training_risk(ridge),
            optimum=self.optimum(ridge),
            gcv=self.gcv(ridge),
            leave_one_out=self.leave_one_out(ridge),
            log_evidence=self.log_evidence(ridge),
            best_log_evidence=self.log_evidence(ridge, scale=None),
        )

    @cached_property
    def _projected(self) -> Array:
        """U'Y, ``(k, t)``."""
        return self.eigenvectors.T @ self.targets

    @cached_property
    def _energy(self) -> Array:
        """||u_i'Y||^2, ``(k,)``."""
        return np.asarray((self._projected**2).sum(axis=1))

    def _kept(self, ridge: float) -> Array:
        """Return s / (s + l_i), what is left of each direction, ascending ``(k,)``."""
        check_ridge(ridge)
        return ridge / (ridge + self.eigenvalues)


def ridge_path(
    gram: ArrayLike,
    targets: ArrayLike,
    ridges: Iterable[float],
    *,
    outputs: int = 1,
    tolerance: float = PSD_TOLERANCE,
) -> list[RidgeRisks]:
    """Return the risks at several ridges, from one eigendecomposition.

    Args:
        gram: K, ``(k, k)``, symmetric positive semi-definite.
        targets: Y, ``(k,)`` or ``(k, t)``, not all zero.
        ridges: Each above 0; see `ntk.spectrum.relative_ridge`.
        outputs: As in `RidgeRegression.of`.
        tolerance: As in `ntk.spectrum.eigenvalues`.

    Returns:
        For each ridge its numbers, in the order given.
    """
    regression = RidgeRegression.of(gram, targets, outputs=outputs, tolerance=tolerance)
    return [regression.risks(ridge) for ridge in ridges]


def left_out_residuals(solved_vectors: Array, vectors: Array, dual: Array) -> Array:
    """Return the residual of every example when it is left out of a regression.

    For n examples of b rows, with G the inverse of the regularised Gram matrix and
    a = G Y the dual coefficients, it is G[i, i]^-1 a[i].

    Args:
        solved_vectors: G U, ``(n, b, r)``.
        vectors: U, ``(n, b, r)``, with U U' = I.
        dual: a, ``(n, b, t)``. Where the targets change with the example that is left
            out, a[i] is that of the targets without i.

    Returns:
        ``(n, b, t)``.
    """
    diagonal = solved_vectors @ vectors.transpose(0, 2, 1)
    return np.asarray(np.linalg.solve(diagonal, dual))


def check_ridge(ridge: float) -> None:
    """Refuse a ridge that is not a finite number above 0.

    Args:
        ridge: s.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < ridge < np.inf:
        raise ValueError(
            f"`ridge={ridge!r}`; expected a finite number above 0: see "
            "`ntk.spectrum.relative_ridge`."
        )
