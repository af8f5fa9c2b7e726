"""Compare a Gram matrix with another one, or with targets.

A is the argument `reference` and B is `other`, of the same shape: numpy arrays, CPU
tensors or lists. Functions compute in float64 and modify nothing in place. Flatten a
kernel with axes (n, m, c, d) to ``(n c, m d)`` first (`ntk.kernels.empirical`).

Norms, `best_scale`, `cosine` and `kernel_distance` take any ``(k, m)``; the others need
``(k, k)``, all but `trace_ratio` a symmetric one. Every function raises
`NumericalError` for NaN or Inf and `ValueError` for a shape or a number that does not
fit, or a zero matrix; `Raises` lists only further errors.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntk.measures.spectrum import (
    FLOAT64_EPS,
    PSD_TOLERANCE,
    Array,
    as_matrix,
    as_symmetric,
    as_targets,
    eigensystem,
    numerical_rank,
)

__all__ = [
    "DistanceSummary",
    "Norm",
    "PermutationNull",
    "UndefinedError",
    "alignment",
    "best_scale",
    "cka",
    "cosine",
    "kernel_distance",
    "permutation_alignment",
    "relative_difference",
    "subspace_overlap",
    "summary",
    "trace_ratio",
]

Norm = Literal["entrywise1", "frobenius", "spectral", "nuclear"]
"""Sum of |entries|; root of the sum of squares; largest singular value; their sum."""


class UndefinedError(ValueError):
    """The measure is not defined for this valid kernel."""


@dataclass(frozen=True)
class PermutationNull:
    """The alignment of a kernel with its targets and with shuffled ones.

    Attributes:
        observed: Alignment with the targets.
        mean: Mean over the shuffles.
        std: Standard deviation over the shuffles, divisor draws - 1.
        p_value: (1 + number of draws at least as aligned as observed) / (1 + draws).
        draws: Number of shuffles.
    """

    observed: float
    mean: float
    std: float
    p_value: float
    draws: int


@dataclass(frozen=True)
class DistanceSummary:
    """The measures of two Gram matrices; see the functions of the same names.

    The norms are those of `relative_difference`, `_rescaled` with ``rescale=True``.
    `cka` (unbiased) and `overlap` (`subspace_overlap`) are NaN if undefined.
    """

    entrywise1: float
    frobenius: float
    spectral: float
    nuclear: float
    entrywise1_rescaled: float
    frobenius_rescaled: float
    spectral_rescaled: float
    nuclear_rescaled: float
    best_scale: float
    cosine: float
    cka: float
    trace_ratio: float
    overlap: float


def relative_difference(
    reference: ArrayLike, other: ArrayLike, norm: Norm, *, rescale: bool = False
) -> float:
    """Return ||B - A|| / ||A||, or ||a B - A|| / ||A|| at the best scale a.

    Args:
        reference: A, ``(k, m)``.
        other: B, ``(k, m)``.
        norm: The norm, see `Norm`.
        rescale: Whether to multiply B by `best_scale` first. It minimises the Frobenius
            norm only, but is used for every norm.

    Raises:
        ValueError: If the norm is unknown.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"`norm={norm!r}`; expected one of {list(get_args(Norm))}.")
    A, B = _pair(reference, other)
    _check_nonzero(A, "reference")
    scale = best_scale(A, B) if rescale else 1.0
    return _norm(scale * B - A, norm) / _norm(A, norm)


def best_scale(reference: ArrayLike, other: ArrayLike) -> float:
    """Return a = <A, B>_F / <B, B>_F, which minimises ||a B - A||_F; B not zero."""
    A, B = _pair(reference, other)
    _check_nonzero(B, "other")
    return float(np.vdot(A, B) / np.vdot(B, B))


def cosine(reference: ArrayLike, other: ArrayLike) -> float:
    """Return the Frobenius cosine <A, B>_F / (||A||_F ||B||_F).

    Between 0 and 1 for positive semi-definite matrices, whatever their scales.
    """
    return float(np.vdot(*_unit_pair(reference, other)))


def kernel_distance(reference: ArrayLike, other: ArrayLike) -> float:
    """Return the kernel distance 1 - `cosine`.

    Fort et al. (2020). It ignores scale: report `trace_ratio` too.
    """
    a, b = _unit_pair(reference, other)
    # 1 - cos = ||a - b||^2 / 2 for unit a and b, without the cancellation for kernels
    # that hardly differ, as between two training steps.
    return float(((a - b) ** 2).sum() / 2)


def trace_ratio(reference: ArrayLike, other: ArrayLike) -> float:
    """Return tr B / tr A of ``(k, k)`` matrices, tr A above 0."""
    A, B = _pair(reference, other, square=True)
    return float(np.trace(B)) / _positive_trace(A, "reference")


def cka(reference: ArrayLike, other: ArrayLike, *, unbiased: bool = True) -> float:
    """Return the centred kernel alignment HSIC(A, B) / sqrt(HSIC(A, A) HSIC(B, B)).

    The unbiased HSIC is the U-statistic of Song et al. (2012), as in Nguyen et al.
    (2021): with A~, B~ the matrices with their diagonals set to zero,

        [tr(A~ B~) + (1'A~1)(1'B~1) / ((k-1)(k-2)) - 2 (1'A~B~1) / (k-2)] / (k (k-3)).

    The biased HSIC is <H A H, H B H>_F up to a factor, with H = I - 11'/k (Cortes et
    al. 2012, Kornblith et al. 2019). For unrelated kernels and small k the biased CKA
    is above 0; the unbiased one is about 0 and may be negative. Rows count as k
    independent examples: with several outputs reduce the kernel to (n, n) first, or
    take the number as a description of the matrix.

    Args:
        reference: A, ``(k, k)``, symmetric.
        other: B, ``(k, k)``, symmetric.
        unbiased: Whether to use the U-statistic, which needs k >= 4.

    Raises:
        UndefinedError: If k < 4 and unbiased, or if a kernel is zero after centring: a
            constant one or, unbiased, a diagonal one.
    """
    A, B = _symmetric_pair(reference, other, PSD_TOLERANCE)
    if unbiased:
        if (k := A.shape[0]) < 4:
            raise UndefinedError(
                f"`reference` has {k} rows; the unbiased CKA needs at least 4. Use "
                "more examples or `unbiased=False`."
            )
        A, B = _without_diagonal(A), _without_diagonal(B)
    centred = (
        _surviving(_double_centred(matrix, unbiased=unbiased), matrix, name)
        for matrix, name in ((A, "reference"), (B, "other"))
    )
    return cosine(*centred)


def alignment(gram: ArrayLike, targets: ArrayLike, *, centred: bool = False) -> float:
    """Return the kernel-target alignment <K, Y Y'>_F / (||K||_F ||Y Y'||_F).

    Evaluate it on data that the kernel was not trained on. `centred` replaces K by
    H K H and Y by H Y, H = I - 11'/k: the biased CKA of K and Y Y' (Cortes et al.
    2012), which ignores class proportions.

    Args:
        gram: K, ``(k, k)``, symmetric.
        targets: Y, ``(k,)`` or ``(k, t)``.
        centred: Whether to centre kernel and targets.
    """
    K, Y = _kernel_and_targets(gram, targets, centred=centred)
    return float(np.vdot(Y, K @ Y)) / (_norm2(K) * _norm2(Y.T @ Y))


def permutation_alignment(
    gram: ArrayLike,
    targets: ArrayLike,
    *,
    seed: int,
    draws: int,
    centred: bool = False,
    outputs: int = 1,
) -> PermutationNull:
    """Return the distribution of `alignment` under targets with shuffled rows.

    Args:
        gram: K, ``(k, k)``, symmetric, k = n c example-major.
        targets: Y, ``(k,)`` or ``(k, t)``.
        seed: Seed of the local random generator.
        draws: Number of shuffles, at least 2.
        centred: Whether to centre kernel and targets.
        outputs: c, the number of consecutive rows of one example, shuffled together.

    Raises:
        ValueError: If there are fewer than 2 draws, or the rows are not n * outputs.
    """
    K, Y = _kernel_and_targets(gram, targets, centred=centred)
    if draws < 2:
        raise ValueError(f"`draws={draws}`; expected at least 2 to have a spread.")
    if outputs < 1 or K.shape[0] % outputs:
        raise ValueError(f"`outputs={outputs}`; expected a divisor of {len(K)} rows.")
    generator = np.random.default_rng(seed)
    blocks = Y.reshape(-1, outputs, Y.shape[1])
    # Shuffling changes neither ||K||, nor ||Y Y'||, nor the column means.
    scale = _norm2(K) * _norm2(Y.T @ Y)
    observed, null = float(np.vdot(Y, K @ Y)) / scale, np.empty(draws)
    for draw in range(draws):
        shuffled = generator.permutation(blocks).reshape(Y.shape)
        null[draw] = np.vdot(shuffled, K @ shuffled) / scale
    # Within 1e-12 it is the same labelling, summed in another order.
    extreme = int((null >= observed - 1e-12).sum())
    return PermutationNull(
        observed=observed,
        mean=float(null.mean()),
        std=float(null.std(ddof=1)),
        p_value=(1 + extreme) / (1 + draws),
        draws=draws,
    )


def subspace_overlap(
    reference: ArrayLike,
    other: ArrayLike,
    rank: int,
    *,
    tolerance: float = PSD_TOLERANCE,
) -> float:
    """Return ||U_A' U_B||_F^2 / rank of the leading eigenvectors of A and B.

    The mean squared cosine of the principal angles: 1 for the same subspace, 0 for
    orthogonal ones, about rank / k for random ones. If the eigenvalue at `rank` equals
    the next one, the subspace and so the overlap are arbitrary.

    Args:
        reference: A, ``(k, k)``, symmetric positive semi-definite.
        other: B, ``(k, k)``, symmetric positive semi-definite.
        rank: Number of eigenvectors, 1..k.
        tolerance: Relative rounding error, see `ntk.measures.spectrum.eigenvalues`.

    Raises:
        ValueError: If the rank is not within 1..k.
        UndefinedError: If the numerical rank of a matrix is below `rank`: eigenvectors
            of zero eigenvalues are arbitrary.
    """
    A, B = _symmetric_pair(reference, other, tolerance)
    if not 1 <= rank <= A.shape[0]:
        raise ValueError(f"`rank={rank}`; expected 1..{A.shape[0]}, the matrix size.")
    leading = []
    for matrix, name in ((A, "reference"), (B, "other")):
        values, vectors = eigensystem(matrix, tolerance=tolerance, name=name)
        if (available := numerical_rank(values)) < rank:
            raise UndefinedError(
                f"`rank={rank}`; expected at most {available}, the rank of `{name}`."
            )
        leading.append(vectors[:, :rank])
    return float(((leading[0].T @ leading[1]) ** 2).sum()) / rank


def summary(
    reference: ArrayLike,
    other: ArrayLike,
    *,
    rank: int,
    tolerance: float = PSD_TOLERANCE,
) -> DistanceSummary:
    """Return all scalar measures of the difference of two kernels.

    Args:
        reference: A, ``(k, k)``, symmetric positive semi-definite, not zero.
        other: B, ``(k, k)``, symmetric positive semi-definite, not zero.
        rank: Number of leading eigenvectors compared by `subspace_overlap`.
        tolerance: Relative rounding error, see `ntk.measures.spectrum.eigenvalues`.
    """
    A, B = _symmetric_pair(reference, other, tolerance)
    _check_nonzero(A, "reference")
    scale = best_scale(A, B)
    size, before, after = _norms(A), _norms(B - A), _norms(scale * B - A)
    try:
        centred_alignment = cka(A, B)
    except UndefinedError:
        centred_alignment = float("nan")
    try:
        overlap = subspace_overlap(A, B, rank, tolerance=tolerance)
    except UndefinedError:
        overlap = float("nan")
    return DistanceSummary(
        **{norm: before[norm] / size[norm] for norm in size},
        **{f"{norm}_rescaled": after[norm] / size[norm] for norm in size},
        best_scale=scale,
        cosine=cosine(A, B),
        cka=centred_alignment,
        trace_ratio=trace_ratio(A, B),
        overlap=overlap,
    )


def _pair(
    reference: ArrayLike, other: ArrayLike, *, square: bool = False
) -> tuple[Array, Array]:
    A = as_matrix(reference, "reference", square=square)
    B = as_matrix(other, "other", square=square)
    if A.shape != B.shape:
        raise ValueError(
            f"`other` has shape {B.shape}; expected {A.shape} as `reference`. Compute "
            "both kernels on the same examples."
        )
    return A, B


def _symmetric_pair(
    reference: ArrayLike, other: ArrayLike, tolerance: float
) -> tuple[Array, Array]:
    A, B = _pair(reference, other)
    return as_symmetric(A, "reference", tolerance), as_symmetric(B, "other", tolerance)


def _unit_pair(reference: ArrayLike, other: ArrayLike) -> tuple[Array, Array]:
    A, B = _pair(reference, other)
    _check_nonzero(A, "reference")
    _check_nonzero(B, "other")
    return A / _norm2(A), B / _norm2(B)


def _kernel_and_targets(
    gram: ArrayLike, targets: ArrayLike, *, centred: bool
) -> tuple[Array, Array]:
    K = as_symmetric(gram, "gram", PSD_TOLERANCE)
    Y = as_targets(targets, K.shape[0])
    _check_nonzero(K, "gram")
    if not centred:
        return K, Y
    HKH, HY = _double_centred(K, unbiased=False), Y - Y.mean(axis=0)
    return _surviving(HKH, K, "gram"), _surviving(HY, Y, "targets")


def _check_nonzero(matrix: Array, name: str) -> None:
    if not matrix.any():
        raise ValueError(
            f"`{name}` is all zero; a relative measure needs a scale. Check that the "
            "tangent space holds parameters that the outputs depend on."
        )


def _positive_trace(matrix: Array, name: str) -> float:
    if not (trace := float(np.trace(matrix))) > 0:
        problem = f"`{name}` has trace {trace:.2e}"
        raise ValueError(f"{problem}; expected a nonzero Gram matrix.")
    return trace


def _without_diagonal(matrix: Array) -> Array:
    return matrix - np.diag(np.diag(matrix))


def _double_centred(matrix: Array, *, unbiased: bool) -> Array:
    """Return H K H, or its unbiased counterpart for a K with zero diagonal.

    The U-statistic HSIC(A, B) is, up to a factor, the inner product of the unbiasedly
    centred A~ and B~ (Szekely and Rizzo 2014). CKA as a cosine of centred matrices
    avoids the cancellation of large sums in the written formula.
    """
    k = matrix.shape[0]
    per_row, per_total = (k - 2, (k - 1) * (k - 2)) if unbiased else (k, k * k)
    rows = matrix.sum(axis=1) / per_row
    centred = matrix - rows[:, None] - rows[None, :] + matrix.sum() / per_total
    return _without_diagonal(centred) if unbiased else centred


def _surviving(centred: Array, before: Array, name: str) -> Array:
    if _norm2(centred) <= before.shape[0] * FLOAT64_EPS * _norm2(before):
        raise UndefinedError(
            f"`{name}` does not survive centring: norm {_norm2(before):.2e} before, "
            f"{_norm2(centred):.2e} after. Use `cosine` or uncentred `alignment`."
        )
    return centred


def _norm2(matrix: Array) -> float:
    return float(np.linalg.norm(matrix))


def _singular_values(matrix: Array) -> Array:
    # Several times faster than an SVD.
    if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, matrix.T):
        return np.abs(scipy.linalg.eigvalsh(matrix, check_finite=False))
    return np.asarray(scipy.linalg.svdvals(matrix, check_finite=False))


def _norm(matrix: Array, norm: Norm) -> float:
    if norm == "entrywise1":
        return float(np.abs(matrix).sum())
    if norm == "frobenius":
        return _norm2(matrix)
    values = _singular_values(matrix)
    return float(values.max() if norm == "spectral" else values.sum())


def _norms(matrix: Array) -> dict[Norm, float]:
    values = _singular_values(matrix)
    return {
        "entrywise1": _norm(matrix, "entrywise1"),
        "frobenius": _norm(matrix, "frobenius"),
        "spectral": float(values.max()),
        "nuclear": float(values.sum()),
    }
