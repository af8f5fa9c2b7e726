"""Penalised multinomial logistic regression by SciPy's trust-region Newton method."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning

from ntk.classifiers.base import Array, Labels
from ntk.classifiers.outputs import MARGIN, Outputs


def logistic_path(
    P: Array,
    labels: Labels,
    prior: Array,
    Cs: Sequence[float],
    outputs: Outputs | None = None,
) -> Iterator[Array]:
    """Yield the weights that minimise the penalised log-loss, for each C.

    The loss is ``sum_i CE(y[i], f[i]) + |w|^2 / (2 C)``, divided by n for the solver,
    with f the logits of the functions ``prior + P w``. Each solution initialises the
    next.

    Args:
        P: ``(n, b, r)`` features; outputs are coupled if b > 1.
        labels: ``(n,)`` class indices.
        prior: ``(n, o)`` offset of the functions.
        Cs: Values of C, ascending.
        outputs: What the o functions are; None means the logits of o
            classes, or the log-odds of two.

    Yields:
        ``(r, o / b)``.
    """
    (n, b, r), o = P.shape, prior.shape[1]
    to_logits = outputs or Outputs(np.eye(o) if o > 1 else MARGIN)
    decoder, start = to_logits.decoder, to_logits.decoded(prior)
    flat, Y = P.reshape(n * b, r), np.eye(decoder.shape[1])[labels]

    forward = lambda w: (flat @ w.reshape(r, -1)).reshape(n, o) @ decoder
    backward = lambda df: (flat.T @ (df @ decoder.T).reshape(n * b, -1)).ravel()

    def objective(w: Array, C: float) -> tuple[float, Array]:
        log_p = log_softmax(start + forward(w), axis=1)
        loss = w @ w / (2 * C) - log_p[range(n), labels].sum()
        return loss / n, (backward(np.exp(log_p) - Y) + w / C) / n

    def hessian_product(w: Array, v: Array, C: float) -> Array:
        p, df = np.exp(log_softmax(start + forward(w), axis=1)), forward(v)
        dp = p * (df - (p * df).sum(axis=1, keepdims=True))
        return (backward(dp) + v / C) / n

    newton = {"method": "trust-ncg", "jac": True, "hessp": hessian_product}
    options, w = {"gtol": 1e-10, "maxiter": 1000}, np.zeros(r * (o // b))
    for C in Cs:
        solution = minimize(objective, w, args=(C,), options=options, **newton)
        w, gradient = solution.x, float(np.linalg.norm(solution.jac))
        if gradient > 1e-6:
            message = (
                f"C={C:g}: gradient norm {gradient:.1e} after {solution.nit} steps"
            )
            warnings.warn(
                f"{message}; expected 1e-6.", ConvergenceWarning, stacklevel=2
            )
        yield w.reshape(r, -1)
