"""Bound what changes when a kernel gains, loses or exchanges layers.

A kernel is a sum over layers: K of those that are tuned, K' = K + S with others S added
to them. Rahimi Afzal et al. (2025, "Linearization Explains Fine-Tuning in Large
Language Models", arXiv 2602.08239) bound eigenvalues and the training risk of K' by
those of K. Their statements have conditions, some of them unwritten, which kernels of
real models rarely meet: an empirical NTK is close to singular. So each statement is a
`Bracket` with its conditions, and outside of them has no value but a reason. Beside
each `published_` one stands one that holds always, by a ridge s > 0:

    a (K + s I) <= K' + s I <= b (K + s I)

in the order of positive semi-definite matrices, with the best a and b (`factors`). If
layers are added, a >= 1 and b = 1 + eta_s, eta_s = ||(K+sI)^-1/2 S (K+sI)^-1/2||; if
they are removed, b <= 1; if they are exchanged, neither. Numbers that rise or fall in
this order follow: eigenvalues, condition number, effective dimension, the optimum of
ridge regression. Its training risk does not, for squares of matrices are not ordered as
the matrices are.

The arguments `gram` K, `other` K' and `added` S are Gram matrices ``(k, k)`` of the
same examples, symmetric positive semi-definite, with eigenvalues l_1 >= ... >= l_k;
`ridge` is s, above 0, the same for all kernels. Errors are those of `ntk.spectrum`;
`Raises` lists only what is particular. Brackets are exact but for rounding, of about
the condition number of K + s I in units of the machine's epsilon.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from ntk.risk import RidgeRegression, check_ridge
from ntk.spectrum import (
    PSD_TOLERANCE,
    Array,
    as_array,
    as_symmetric,
    condition_number,
    effective_dimension,
    eigensystem,
    eigenvalues,
    numerical_rank,
)

__all__ = [
    "Bracket",
    "condition_bracket",
    "dimension_bracket",
    "eigenvalue_bracket",
    "factors",
    "optimum_bracket",
    "published_candidate_bracket",
    "published_eigenvalue_bracket",
    "published_risk_bracket",
    "published_risk_ratio_bracket",
    "relative_perturbation",
    "risk_bracket",
    "risk_ratio_bracket",
    "weyl_bracket",
]

Bounds = TypeVar("Bounds", float, Array)
Status = Literal["holds", "vacuous"]

ETA = "K is positive definite; eta = ||K^-1/2 S K^-1/2|| < 1"


@dataclass(frozen=True, eq=False)
class Bracket(Generic[Bounds]):
    """Two bounds of some quantity, and when they hold.

    Attributes:
        value: The lower and the upper bound, numbers or ``(k,)``; None if a condition
            is not met.
        conditions: What they need; empty if nothing.
        source: Where they are from.
        status: "holds", or "vacuous" if a condition is not met.
        reason: Which condition, and by how far; None if all are met.
    """

    value: tuple[Bounds, Bounds] | None
    conditions: str
    source: str
    status: Status
    reason: str | None


def weyl_bracket(gram: ArrayLike, other: ArrayLike) -> Bracket[Array]:
    """Bound the eigenvalues of another kernel by Weyl's inequality.

        l_i(K) + l_k(K' - K) <= l_i(K') <= l_i(K) + l_1(K' - K)

    An absolute bound: it is tight at the top of the spectrum and says little of
    eigenvalues below l_1(K' - K). Horn and Johnson (2012), theorem 4.3.1.

    Returns:
        Bounds ``(k,)`` of the descending eigenvalues of K'.
    """
    values, _, _ = _aligned(gram, other)
    difference = np.asarray(other, float) - np.asarray(gram, float)
    change = scipy.linalg.eigvalsh((difference + difference.T) / 2)
    lower = np.maximum(values + change[0], 0)
    return _holds("Weyl", lower, values + change[-1])


def relative_perturbation(gram: ArrayLike, added: ArrayLike, ridge: float) -> float:
    """Return eta_s = ||(K + s I)^-1/2 S (K + s I)^-1/2||, the size of S beside K.

    Returns:
        eta_s, from 0 to l_1(S) / s.
    """
    check_ridge(ridge)
    ours, theirs, cosines = _aligned(gram, added, "added")
    return float(_ratios(ours + ridge, theirs, cosines)[0])


def factors(gram: ArrayLike, other: ArrayLike, ridge: float) -> tuple[float, float]:
    """Return the best a and b with a (K + s I) <= K' + s I <= b (K + s I).

    They are the extreme eigenvalues m of (K' + s I) v = m (K + s I) v.

    Returns:
        a and b, both above 0.
    """
    check_ridge(ridge)
    ours, theirs, cosines = _aligned(gram, other)
    ratios = _ratios(ours + ridge, theirs + ridge, cosines)
    return float(ratios[-1]), float(ratios[0])


def eigenvalue_bracket(
    gram: ArrayLike, other: ArrayLike, ridge: float
) -> Bracket[Array]:
    """Bound the eigenvalues of another kernel relative to those of this one.

        a (l_i(K) + s) <= l_i(K') + s <= b (l_i(K) + s)

    What theorem 6 of Rahimi Afzal et al. (2025) says without a ridge, valid for every
    K: if layers are added, l_i(K) <= l_i(K') <= l_i(K) + eta_s (l_i(K) + s).

    Args:
        gram: K, ``(k, k)``.
        other: K', ``(k, k)``.
        ridge: s, above 0: the size of eigenvalues below which the bounds are loose.

    Returns:
        Bounds ``(k,)`` of the descending eigenvalues of K', without the ridge.
    """
    a, b = factors(gram, other, ridge)
    regularised = eigenvalues(gram) + ridge
    lower = np.maximum(a * regularised - ridge, 0)
    return _holds("theorem 6, corrected", lower, b * regularised - ridge)


def condition_bracket(
    gram: ArrayLike, other: ArrayLike, ridge: float
) -> Bracket[float]:
    """Bound the condition number of another kernel, regularised.

    It changes by a factor from a / b to b / a; if layers are added, by one from
    1 / (1 + eta_s) to 1 + eta_s.

    Returns:
        Bounds of (l_1(K') + s) / (l_k(K') + s).
    """
    a, b = factors(gram, other, ridge)
    condition = condition_number(eigenvalues(gram), ridge)
    lower = max(condition * a / b, 1.0)
    return _holds("order of K + s I", lower, condition * b / a)


def dimension_bracket(
    gram: ArrayLike, other: ArrayLike, ridge: float
) -> Bracket[float]:
    """Bound the effective dimension of another kernel.

    The directions that ridge regression shrinks away, k - tr K (K + s I)^-1 =
    s tr (K + s I)^-1, change by a factor from 1 / b to 1 / a.

    Returns:
        Bounds of tr K' (K' + s I)^-1.
    """
    a, b = factors(gram, other, ridge)
    values = eigenvalues(gram)
    lost = values.size - effective_dimension(values, ridge)
    lower = max(values.size - lost / a, 0.0)
    return _holds("order of K + s I", lower, values.size - lost / b)


def optimum_bracket(
    gram: ArrayLike, other: ArrayLike, targets: ArrayLike, ridge: float
) -> Bracket[float]:
    """Bound the smallest regularised risk with another kernel.

    s tr Y'(K + s I)^-1 Y changes by a factor from 1 / b to 1 / a; if layers are added,
    by one from 1 / (1 + eta_s) to 1: it never rises.

    Args:
        gram: K, ``(k, k)``.
        other: K', ``(k, k)``.
        targets: Y, ``(k,)`` or ``(k, t)``, what is left of the targets at the start.
        ridge: s, above 0, the same for both.

    Returns:
        Bounds of `ntk.risk.RidgeRegression.optimum` of K'.
    """
    a, b = factors(gram, other, ridge)
    optimum = RidgeRegression.of(gram, targets).optimum(ridge)
    return _holds("order of K + s I", optimum / b, optimum / a)


def risk_bracket(gram: ArrayLike, targets: ArrayLike, ridge: float) -> Bracket[float]:
    """Bound the training risk of kernel ridge regression by l_1 and l_k alone.

        (s / (s + l_1))^2 q <= R <= (s / (s + l_k))^2 q,    q = ||Y||^2 / (k t)

    The two sides differ by the condition number squared, so it says how loose the
    bracket is and not how large R is: with l_k about 0 the upper side is q, which is
    there without a kernel, and a larger l_1 only *lowers* the lower side. R itself is
    `ntk.risk.RidgeRegression.training_risk`.

    Args:
        gram: K, ``(k, k)``.
        targets: Y, ``(k,)`` or ``(k, t)``: the residual at the start.
        ridge: s, above 0, of the summed squares.

    Returns:
        Bounds of the mean squared training residual.
    """
    lower, upper = _risk_bounds(gram, targets, ridge)
    return _holds("theorem 5, corrected", lower, upper)


def risk_ratio_bracket(
    gram: ArrayLike, other: ArrayLike, ridge: float
) -> Bracket[float]:
    """Bound how the training risk changes with the kernel, whatever the targets.

    The root of the ratio of the training risks, R with K and R' with K', lies between
    the extreme singular values of (K' + s I)^-1 (K + s I), and for some targets at
    either. With more layers it may exceed 1. It lies within the wider bounds
    1 / (b kappa^1/2) and kappa^1/2 / a, kappa the condition number of K + s I, which
    are in the terms of theorem 7 of Rahimi Afzal et al. (2025) and hold for every K.

    Returns:
        Bounds of (R' / R)^1/2.
    """
    check_ridge(ridge)
    ours, theirs, cosines = _aligned(gram, other)
    product = cosines * (1 / (theirs + ridge)) * (ours + ridge)[:, None]
    values = scipy.linalg.svdvals(product)
    return _holds("theorem 7, corrected", float(values[-1]), float(values[0]))


def published_risk_bracket(
    gram: ArrayLike,
    labels: ArrayLike,
    ridge: float,
    *,
    offset: ArrayLike | None = None,
    averaged: bool = False,
) -> Bracket[float]:
    """Return theorem 5 of Rahimi Afzal et al. (2025): the risk by l_1 and l_k.

        (s ||Y|| / (s + l_1))^2 <= R <= (s ||Y|| / (s + l_k))^2

    It is of the labels Y themselves, and takes the same s for a mean of squares as for
    their sum. `risk_bracket` of Y - f_0, with k s for a mean, needs neither condition.

    Args:
        gram: K, ``(k, k)``.
        labels: Y, ``(k,)`` or ``(k, t)``.
        ridge: s, above 0.
        offset: The outputs f_0 of the model before it is tuned, shaped as the labels;
            None if they are zero.
        averaged: Whether s is the coefficient of equation 14, beside the mean over k
            rows, and not beside the sum.

    Returns:
        Bounds of the mean squared training residual; those published are of the sum.

    Raises:
        ValueError: If the offset has another shape than the labels.
    """
    failed = []
    if offset is not None:
        start, end = as_array(offset, "offset"), as_array(labels, "labels")
        if start.shape != end.shape:
            raise ValueError(
                f"`offset` has shape {start.shape}; expected {end.shape} as `labels`, "
                "the model's outputs for the same rows."
            )
        if start.any():
            size = np.linalg.norm(start) / np.linalg.norm(end)
            failed.append(f"f_0 is not zero: ||f_0|| = {size:.2g} ||Y||")
    if averaged and (k := len(as_array(labels, "labels"))) > 1:
        failed.append(f"the ridge of a mean over {k} rows is {k} s, not s")
    return _published(
        "theorem 5",
        "f_0 = 0 on the training examples; s is the ridge of the summed squares",
        failed,
        lambda: _risk_bounds(gram, labels, ridge),
    )


def published_eigenvalue_bracket(gram: ArrayLike, added: ArrayLike) -> Bracket[Array]:
    """Return theorem 6 of Rahimi Afzal et al. (2025): eigenvalues of K + S by eta.

        (1 - eta) l_i(K) <= l_i(K + S) <= (1 + eta) l_i(K)

    With eta of 1 or more the lower side is below 0 and says nothing. Since S is
    positive semi-definite, l_i(K) itself is a lower bound: see `eigenvalue_bracket`.

    Returns:
        Bounds ``(k,)`` of the descending eigenvalues of K + S.
    """
    eta, failed = _published_eta(gram, added, "added")
    values = eigenvalues(gram)
    return _published(
        "theorem 6", ETA, failed, lambda: ((1 - eta) * values, (1 + eta) * values)
    )


def published_risk_ratio_bracket(
    gram: ArrayLike, added: ArrayLike, ridge: float
) -> Bracket[float]:
    """Return theorem 7 of Rahimi Afzal et al. (2025): the risk ratio by l_1.

        m / a <= (R' / R)^1/2 <= a m,    m = (l_1(K + S) + s) / (l_1(K) + s),

    a = c / (1 - eta)^2 and c the condition number of K + s I. Its proof divides by
    1 - eta, which is not among its assumptions. Without eta < 1 it is false: K = 1,
    S = 3 and s = 1 have the ratio 2 / 5 and a lower bound of 10. `risk_ratio_bracket`
    holds for every K.

    Returns:
        Bounds of (R' / R)^1/2, R with K and R' with K + S.
    """
    return _published_ratio("theorem 7", gram, {"added": added}, ridge)


def published_candidate_bracket(
    gram: ArrayLike, first: ArrayLike, second: ArrayLike, ridge: float
) -> Bracket[float]:
    """Return corollary 1 of Rahimi Afzal et al. (2025): two candidates compared.

    Theorem 7 for each candidate's layers gives

        m / b <= (R_1 / R_2)^1/2 <= b m,    m = (l_1(K + S_1) + s) / (l_1(K + S_2) + s)

    with b = a_1 a_2. Where it holds for two candidates b is at least the condition
    number squared, so only a ratio m beyond that would tell which risk is smaller.

    Args:
        gram: K, ``(k, k)``.
        first: S_1, ``(k, k)``.
        second: S_2, ``(k, k)``.
        ridge: s, above 0.

    Returns:
        Bounds of (R_1 / R_2)^1/2, R_i with K + S_i.
    """
    added = {"first": first, "second": second}
    return _published_ratio("corollary 1", gram, added, ridge)


def _published_ratio(
    statement: str, gram: ArrayLike, added: Mapping[str, ArrayLike], ridge: float
) -> Bracket[float]:
    """Return theorem 7 of one candidate, or corollary 1 of two."""
    check_ridge(ridge)
    K = as_symmetric(gram, "gram", PSD_TOLERANCE)
    values = eigenvalues(K)
    spread, failed, tops = 1.0, [], []
    for name, candidate in added.items():
        eta, problems = _published_eta(K, candidate, name)
        failed += [each for each in problems if each not in failed]
        if not problems:
            spread *= condition_number(values, ridge) / (1 - eta) ** 2
        more = eigenvalues(K + as_symmetric(candidate, name, PSD_TOLERANCE))
        tops.append(float(more[0] + ridge))
    below = tops[1] if len(tops) == 2 else float(values[0] + ridge)
    ratio = tops[0] / below
    bounds = lambda: (ratio / spread, ratio * spread)
    return _published(statement, ETA, failed, bounds)


def _published_eta(
    gram: ArrayLike, added: ArrayLike, name: str
) -> tuple[float, list[str]]:
    """Return eta, infinite if K is singular, and what is against its use."""
    ours, theirs, cosines = _aligned(gram, added, name)
    if (rank := numerical_rank(ours)) < ours.size:
        return np.inf, [f"K is singular: its numerical rank is {rank} of {ours.size}"]
    eta = float(_ratios(ours, theirs, cosines)[0])
    problem = f"eta is {eta:.3g} for `{name}`, expected below 1"
    return eta, [problem] if eta >= 1 else []


def _published(
    statement: str,
    conditions: str,
    failed: list[str],
    bounds: Callable[[], tuple[Bounds, Bounds]],
) -> Bracket[Bounds]:
    source = f"Rahimi Afzal et al. (2025), {statement}"
    if failed:
        return Bracket(None, conditions, source, "vacuous", "; ".join(failed))
    return Bracket(bounds(), conditions, source, "holds", None)


def _holds(source: str, lower: Bounds, upper: Bounds) -> Bracket[Bounds]:
    return Bracket((lower, upper), "", source, "holds", None)


def _risk_bounds(
    gram: ArrayLike, targets: ArrayLike, ridge: float
) -> tuple[float, float]:
    check_ridge(ridge)
    regression = RidgeRegression.of(gram, targets)
    largest, smallest = regression.eigenvalues[[0, -1]]
    square = float((regression.targets**2).mean())
    lower, upper = ((ridge / (ridge + l)) ** 2 * square for l in (largest, smallest))
    return float(lower), float(upper)


def _aligned(
    gram: ArrayLike, other: ArrayLike, name: str = "other"
) -> tuple[Array, Array, Array]:
    """Return both matrices' eigenvalues, and U'V of their eigenvectors."""
    values, vectors = eigensystem(gram)
    others, other_vectors = eigensystem(other, name=name)
    if values.size != others.size:
        raise ValueError(
            f"`{name}` has {others.size} rows; expected {values.size} as `gram`. "
            "Compute both kernels on the same examples."
        )
    return values, others, vectors.T @ other_vectors


def _ratios(ours: Array, theirs: Array, cosines: Array) -> Array:
    """Return the eigenvalues m of B v = m A v, descending, A definite.

    With the roots of both, they are squares of singular values: the smallest keeps
    digits that it would lose beside the largest.
    """
    roots = cosines * np.sqrt(theirs) / np.sqrt(ours)[:, None]
    return np.asarray(scipy.linalg.svdvals(roots) ** 2)
