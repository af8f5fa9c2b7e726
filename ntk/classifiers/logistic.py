"""Penalised multinomial logistic regression by SciPy's trust-region Newton method."""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning

from ntk.classifiers.base import Array, Labels


def log_probabilities(outputs: Array) -> Array:
    """Return ``(m, c)`` log class probabilities.

    Args:
        outputs: ``(m, c)`` logits; a single output is the log-odds.
    """
    reference = np.zeros((len(outputs), int(outputs.shape[1] == 1)))
    return np.asarray(log_softmax(np.hstack([reference, outputs]), axis=1))


def logistic_path(
    P: Array, labels: Labels, prior: Array, Cs: Sequence[float]
) -> Iterator[Array]:
    """Yield the weights that minimise the penalised log-loss, for each C.

    The loss is ``sum_i CE(y[i], prior[i] + P[i] w) + |w|^2 / (2 C)``, divided by n for
    the solver. Each solution initialises the next.

    Args:
        P: ``(n, b, r)`` features; outputs are coupled if b > 1.
        labels: ``(n,)`` class indices.
        prior: ``(n, o)`` offset of the outputs.
        Cs: Values of C, ascending.

    Yields:
        ``(r, o / b)``.
    """
    (n, b, r), o = P.shape, prior.shape[1]
    flat, Y = P.reshape(n * b, r), np.eye(max(o, 2))[labels][:, -o:]

    forward = lambda w: (flat @ w.reshape(r, -1)).reshape(n, o)
    backward = lambda df: (flat.T @ df.reshape(n * b, -1)).ravel()

    def objective(w: Array, C: float) -> tuple[float, Array]:
        log_p = log_probabilities(prior + forward(w))
        loss = w @ w / (2 * C) - log_p[range(n), labels].sum()
        return loss / n, (backward(np.exp(log_p)[:, -o:] - Y) + w / C) / n

    def hessian_product(w: Array, v: Array, C: float) -> Array:
        p, df = np.exp(log_probabilities(prior + forward(w)))[:, -o:], forward(v)
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
