"""Measure the spectrum of a Gram matrix: how many directions a kernel can learn.

Functions take a Gram matrix ``(k, k)`` or its eigenvalues ``(k,)``, as numpy arrays,
CPU tensors or lists, compute in float64 and modify nothing in place. Flatten a kernel
with axes (n, m, c, d) to ``(n c, m d)`` first (`ntk.kernels.empirical`).

Notation: K the Gram matrix, k its size, l_1 >= ... >= l_k its eigenvalues, u_i its
eigenvectors, s a ridge. An argument `eigenvalues` is ``(k,)``, in any order, without
negative values: only the function `eigenvalues` removes rounding.

Every function raises `NumericalError` for NaN or Inf and `ValueError` for a shape or a
number that does not fit, and for a zero matrix where the measure needs a scale;
`Raises` lists only further errors.
"""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "PSD_TOLERANCE",
    "DecayFit",
    "NotPSDError",
    "NotSymmetricError",
    "NumericalError",
    "SpectrumSummary",
    "condition_number",
    "cumulative_power",
    "decay_exponent",
    "effective_dimension",
    "eigensystem",
    "eigenvalues",
    "entropy_rank",
    "numerical_rank",
    "participation_ratio",
    "relative_ridge",
    "stable_rank",
    "summary",
    "target_power",
]

Array = NDArray[np.float64]

FLOAT64_EPS = float(np.finfo(np.float64).eps)

PSD_TOLERANCE = 1e-6
"""Rounding error of a kernel contracted in float32, relative to l_1."""


class NumericalError(ValueError):
    """An array holds NaN or Inf."""


class NotSymmetricError(ValueError):
    """A Gram matrix differs from its transpose by more than rounding."""


class NotPSDError(ValueError):
    """A Gram matrix has a negative eigenvalue beyond rounding."""


@dataclass(frozen=True)
class DecayFit:
    """A power law l_i ~ i^-exponent fitted on an index window.

    Attributes:
        exponent: NaN if the window holds fewer than three eigenvalues.
        r_squared: NaN if the exponent is, and for a flat spectrum, which has no
            variance to explain.
        first: First index of the window, from 1.
        last: Last index of the window, inclusive.
    """

    exponent: float
    r_squared: float
    first: int
    last: int


@dataclass(frozen=True)
class SpectrumSummary:
    """The scalar measures of one spectrum; see the functions of the same names.

    `ridge` is the s of `effective_dimension` and `condition_number`. The decay is
    fitted on the window from 1 to `numerical_rank`, and NaN if that is below three.
    """

    trace: float
    largest_eigenvalue: float
    ridge: float
    effective_dimension: float
    condition_number: float
    entropy_rank: float
    stable_rank: float
    participation_ratio: float
    numerical_rank: int
    decay_exponent: float
    decay_r_squared: float


def as_array(values: ArrayLike, name: str) -> Array:
    """Return finite real `values` in float64, possibly sharing their memory.

    Raises:
        ValueError: If the values are complex or empty.
        NumericalError: If an entry is NaN or Inf.
    """
    raw = np.asarray(values)
    if np.iscomplexobj(raw) or raw.size == 0:
        problem = f"has dtype {raw.dtype} and shape {raw.shape}"
        raise ValueError(f"`{name}` {problem}; expected real numbers, at least one.")
    array = raw.astype(np.float64, copy=False)
    if bad := int(array.size - np.isfinite(array).sum()):
        raise NumericalError(
            f"`{name}` has {bad} of {array.size} entries that are NaN or Inf. Look for "
            "an overflow in its computation: contract in float32 or better."
        )
    return array


def as_matrix(values: ArrayLike, name: str, *, square: bool = False) -> Array:
    """Return a finite real ``(k, m)`` in float64, with k = m where `square`.

    Raises:
        ValueError: If there are not two axes, or `square` and they differ.
    """
    matrix = as_array(values, name)
    if matrix.ndim != 2 or (square and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(
            f"`{name}` has shape {matrix.shape}; expected "
            f"(k, {'k' if square else 'm'}). Flatten a kernel with axes (n, m, c, d) "
            "to (n * c, m * d) first."
        )
    return matrix


def as_symmetric(values: ArrayLike, name: str, tolerance: float) -> Array:
    """Return the symmetric part of a ``(k, k)`` matrix, symmetric up to rounding.

    Raises:
        NotSymmetricError: If K - K' exceeds `tolerance` times the largest entry of K.
    """
    matrix = as_matrix(values, name, square=True)
    _check_range("tolerance", tolerance, 0 <= tolerance < 1, "in [0, 1).")
    difference, largest = np.abs(matrix - matrix.T).max(), np.abs(matrix).max()
    if difference > tolerance * largest:
        raise NotSymmetricError(
            f"`{name}` is not symmetric: it differs from its transpose by "
            f"{difference:.2e}, its largest entry is {largest:.2e}, "
            f"`tolerance={tolerance:.0e}`. Pass the same examples on both axes; for an "
            "asymmetric kernel pass its symmetric part (K + K.T) / 2."
        )
    return (matrix + matrix.T) / 2


def as_targets(targets: ArrayLike, rows: int) -> Array:
    """Return targets ``(k,)`` or ``(k, t)`` as columns ``(k, t)``, k being `rows`.

    Raises:
        ValueError: If the rows are not k, or all targets are zero.
    """
    array = as_array(targets, "targets")
    if array.ndim not in {1, 2} or array.shape[0] != rows:
        raise ValueError(
            f"`targets` has shape {array.shape}; expected ({rows},) or ({rows}, t), "
            "one row per row of the Gram matrix: flatten (n, c) example-major."
        )
    if not array.any():
        raise ValueError("`targets` is all zero; expected a direction to project on.")
    return array.reshape(rows, -1)


def eigenvalues(
    gram: ArrayLike, *, tolerance: float = PSD_TOLERANCE, name: str = "gram"
) -> Array:
    """Return the eigenvalues of a Gram matrix.

    Negative values within ``tolerance * l_1`` count as rounding and become exactly
    zero. Asymmetry within ``tolerance`` of the largest entry is averaged away. Beyond
    that `NotPSDError` or `NotSymmetricError` is raised.

    Args:
        gram: ``(k, k)``, symmetric positive semi-definite.
        tolerance: Relative rounding error. The default suits a kernel contracted in
            float32; 1e-12 suits float64.
        name: Name of the matrix in error messages.

    Returns:
        ``(k,)``, descending, non-negative.
    """
    matrix = as_symmetric(gram, name, tolerance)
    ascending = scipy.linalg.eigvalsh(matrix, check_finite=False)
    return _clip(ascending[::-1], tolerance, name)


def eigensystem(
    gram: ArrayLike, *, tolerance: float = PSD_TOLERANCE, name: str = "gram"
) -> tuple[Array, Array]:
    """Return the eigenvalues and eigenvectors of a Gram matrix.

    Checks and rounding are those of `eigenvalues`. The sign of an eigenvector and the
    basis of a repeated eigenvalue's space are arbitrary.

    Args:
        gram: ``(k, k)``, symmetric positive semi-definite.
        tolerance: Relative rounding error.
        name: Name of the matrix in error messages.

    Returns:
        ``(k,)`` descending eigenvalues and ``(k, k)`` eigenvectors as columns.
    """
    matrix = as_symmetric(gram, name, tolerance)
    ascending, vectors = scipy.linalg.eigh(matrix, check_finite=False)
    return _clip(ascending[::-1], tolerance, name), np.ascontiguousarray(
        vectors[:, ::-1]
    )


def relative_ridge(eigenvalues: ArrayLike, epsilon: float) -> float:
    """Return the ridge s = epsilon tr K / k, which scales with the kernel.

    Args:
        eigenvalues: ``(k,)``.
        epsilon: The ridge in units of the mean eigenvalue, at least 0.
    """
    _check_range("epsilon", epsilon, 0 <= epsilon < np.inf, "of at least 0.")
    return float(epsilon * _spectrum(eigenvalues).mean())


def effective_dimension(eigenvalues: ArrayLike, ridge: float) -> float:
    """Return the effective dimension tr K (K + s I)^-1 = sum_i l_i / (l_i + s).

    The number of directions that ridge regression does not shrink, between 0 and the
    rank. Holzmueller et al. (2023).

    Args:
        eigenvalues: ``(k,)``.
        ridge: s, above 0.
    """
    values = _spectrum(eigenvalues)
    _check_range("ridge", ridge, 0 < ridge < np.inf, "above 0: see `relative_ridge`.")
    return float((values / (values + ridge)).sum())


def condition_number(eigenvalues: ArrayLike, ridge: float) -> float:
    """Return the condition number (l_1 + s) / (l_k + s) of the regularised matrix.

    Args:
        eigenvalues: ``(k,)``.
        ridge: s, above 0; with `relative_ridge` the scale of the kernel cancels.
    """
    values = _spectrum(eigenvalues)
    _check_range("ridge", ridge, 0 < ridge < np.inf, "above 0: see `relative_ridge`.")
    return float((values[0] + ridge) / (values[-1] + ridge))


def entropy_rank(eigenvalues: ArrayLike) -> float:
    """Return the entropy rank exp(-sum_i p_i ln p_i), p_i = l_i / sum_j l_j.

    Also called effective rank. Between 1 (one direction) and k (flat spectrum).
    """
    return float(np.exp(scipy.special.entr(_shares(eigenvalues)).sum()))


def stable_rank(eigenvalues: ArrayLike) -> float:
    """Return the stable rank ||K||_F^2 / ||K||_2^2 = sum_i l_i^2 / l_1^2.

    Between 1 and k. It is the stable rank of the Gram matrix K; that of the Jacobian J
    with K = J J' is tr K / l_1.
    """
    # Squares of shares neither overflow nor underflow.
    shares = _shares(eigenvalues)
    return float(((shares / shares[0]) ** 2).sum())


def participation_ratio(eigenvalues: ArrayLike) -> float:
    """Return the participation ratio (sum_i l_i)^2 / sum_i l_i^2, between 1 and k."""
    return float(1 / (_shares(eigenvalues) ** 2).sum())


def numerical_rank(eigenvalues: ArrayLike, *, eps: float = FLOAT64_EPS) -> int:
    """Return the number of eigenvalues above the rounding floor k eps l_1.

    Args:
        eigenvalues: ``(k,)``.
        eps: Machine epsilon of the dtype the kernel was *computed* in, not of the one
            it is stored in; otherwise rounding counts as rank.
    """
    values = _spectrum(eigenvalues)
    _check_range("eps", eps, 0 < eps < 1, "like `np.finfo(np.float32).eps`.")
    return int((values > values.size * eps * values[0]).sum())


def decay_exponent(
    eigenvalues: ArrayLike, *, first: int = 1, last: int | None = None
) -> DecayFit:
    """Return the fit of l_i ~ i^-alpha: least squares of log l_i against log i.

    Wei, Hu and Steinhardt (2022). The exponent depends on the window, which is returned
    with it: real spectra have an outlier at the top and rounding at the bottom. Fewer
    than three eigenvalues give NaN.

    Args:
        eigenvalues: ``(k,)``.
        first: First index of the window, from 1.
        last: Last index of the window, inclusive; by default the numerical rank in
            float64.

    Raises:
        ValueError: If the window is empty or leaves the positive eigenvalues.
    """
    values = _spectrum(eigenvalues)
    positive = int((values > 0).sum())
    end = numerical_rank(values) if last is None else last
    if first < 1 or end > positive or (last is not None and last < first):
        raise ValueError(
            f"`first={first}, last={last}`; expected 1 <= first <= last <= {positive}, "
            f"the number of positive eigenvalues among {values.size}."
        )
    if end - first < 2:
        return DecayFit(float("nan"), float("nan"), first, end)
    x, y = np.log(np.arange(first, end + 1)), np.log(values[first - 1 : end])
    x, y = x - x.mean(), y - y.mean()
    slope = x @ y / (x @ x)
    flat = np.ptp(y) <= PSD_TOLERANCE
    r_squared = np.nan if flat else 1 - ((y - slope * x) ** 2).sum() / (y @ y)
    return DecayFit(-float(slope), float(r_squared), first, end)


def target_power(gram_eigenvectors: ArrayLike, targets: ArrayLike) -> Array:
    """Return the share of the targets along each eigenvector.

    sum_t (u_i' y_t)^2 / sum_t ||y_t||^2, over the target columns y_t. For a pretrained
    model consider the residual Y - f_0 as well as Y.

    Args:
        gram_eigenvectors: ``(k, m)``, orthonormal columns, as from `eigensystem`.
        targets: ``(k,)`` or ``(k, t)``.

    Returns:
        ``(m,)``, non-negative; sums to 1 if m = k.

    Raises:
        ValueError: If the columns are not orthonormal.
    """
    vectors = as_matrix(gram_eigenvectors, "gram_eigenvectors")
    y = as_targets(targets, vectors.shape[0])
    error = np.abs(vectors.T @ vectors - np.eye(vectors.shape[1])).max()
    if error > PSD_TOLERANCE:
        raise ValueError(
            "`gram_eigenvectors` has columns that are not orthonormal: U'U is off the "
            f"identity by {error:.2e}. Pass the second output of `eigensystem`."
        )
    # Rescale first: the squares of large targets would overflow.
    y = y / np.abs(y).max()
    return np.asarray(((vectors.T @ y) ** 2).sum(axis=1) / (y**2).sum())


def cumulative_power(gram_eigenvectors: ArrayLike, targets: ArrayLike) -> Array:
    """Return C(rho) = sum_{i <= rho} (u_i' y)^2 / ||y||^2 for rho = 1..m.

    It rises fast if the kernel suits the task. Canatar et al. (2021). Within a repeated
    eigenvalue the order of the eigenvectors, and so C, is arbitrary.

    Args:
        gram_eigenvectors: ``(k, m)``, by descending eigenvalue, as from `eigensystem`.
        targets: ``(k,)`` or ``(k, t)``.
    """
    return np.cumsum(target_power(gram_eigenvectors, targets))


def summary(
    gram: ArrayLike,
    *,
    epsilon: float = 1e-3,
    eps: float = FLOAT64_EPS,
    tolerance: float = PSD_TOLERANCE,
) -> SpectrumSummary:
    """Return all scalar measures of a spectrum from one eigendecomposition.

    Args:
        gram: ``(k, k)``, symmetric positive semi-definite, not zero.
        epsilon: The ridge in units of the mean eigenvalue, above 0.
        eps: Machine epsilon of the dtype the kernel was computed in, for the numerical
            rank and so for the window of the decay exponent.
        tolerance: Relative rounding error, see `eigenvalues`.
    """
    values = eigenvalues(gram, tolerance=tolerance)
    entropy = entropy_rank(values)  # First: its error names a zero kernel as the cause.
    ridge = relative_ridge(values, epsilon)
    rank = numerical_rank(values, eps=eps)
    decay = decay_exponent(values, last=max(rank, 1))
    return SpectrumSummary(
        trace=float(values.sum()),
        largest_eigenvalue=float(values[0]),
        ridge=ridge,
        effective_dimension=effective_dimension(values, ridge),
        condition_number=condition_number(values, ridge),
        entropy_rank=entropy,
        stable_rank=stable_rank(values),
        participation_ratio=participation_ratio(values),
        numerical_rank=rank,
        decay_exponent=decay.exponent,
        decay_r_squared=decay.r_squared,
    )


def _check_range(name: str, value: float, within: bool, expected: str) -> None:
    if not within:
        raise ValueError(f"`{name}={value!r}`; expected a finite number {expected}")


def _clip(descending: Array, tolerance: float, name: str) -> Array:
    largest, smallest = descending[0], descending[-1]
    if smallest < -tolerance * largest:
        raise NotPSDError(
            f"`{name}` is not positive semi-definite: its smallest eigenvalue is "
            f"{smallest:.2e}, its largest {largest:.2e}, `tolerance={tolerance:.0e}`. "
            "Compute the kernel in float64 or raise `tolerance`."
        )
    return np.maximum(descending, 0.0)


def _spectrum(values: ArrayLike) -> Array:
    array = as_array(values, "eigenvalues")
    if array.ndim != 1:
        raise ValueError(
            f"`eigenvalues` has shape {array.shape}; expected (k,). Pass "
            "`eigenvalues(gram)`, not the Gram matrix."
        )
    if (smallest := array.min()) < 0:
        raise NotPSDError(
            f"`eigenvalues` holds {smallest:.2e}, its largest is {array.max():.2e}; "
            "expected none below 0. `eigenvalues(gram)` removes rounding."
        )
    return np.sort(array)[::-1]


def _shares(eigenvalues: ArrayLike) -> Array:
    values = _spectrum(eigenvalues)
    if not (total := values.sum()) > 0:
        raise ValueError(
            "`eigenvalues` are all zero; a zero kernel has no rank. Check that the "
            "tangent space holds parameters that the outputs depend on."
        )
    return np.asarray(values / total)
