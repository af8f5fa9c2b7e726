"""Closed-form training of the linearised model, from its kernel.

The model is f(x) = f0(x) + J(x) delta (`ntk.linearization.model`). Its objectives for n
examples with c outputs are

    squared   rho sum_i ||f(x_i) - y_i||^2 + (lambda / 2) ||delta||^2,
    logistic  rho sum_i CE(f(x_i), y_i)    + (lambda / 2) ||delta||^2,

where rho is 1 / n for the reduction "mean", the default, and 1 for "sum".
`rocoft.training.trainer` minimises the mean with an `rocoft.training.anchor.Anchor` of
strength lambda: the cross-entropy of classes, or the squared error of scores (one
output). Equations 1 and 3 of Rahimi Afzal et al. (2025) use the sum.

The minimiser of the squared objective is kernel ridge regression of r = Y - f0 with the
ridge s = lambda / (2 rho):

    delta = J' (K + s I)^-1 r          prediction  f0(x) + K(x, X) (K + s I)^-1 r
    residual s (K + s I)^-1 r          optimum     (lambda / 2) r' (K + s I)^-1 r
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ntk.classifiers import logistic_path
from ntk.gradients import Batch, Inputs, to_batches
from ntk.kernels import empirical_ntk
from ntk.linearization.model import LinearizedModel
from ntk.measures import Array, eigensystem, gram_matrix, numerical_rank

__all__ = ["Averaging", "ClosedForm", "Solution", "loss_scale"]

Averaging = Literal["mean", "sum"]
Way = Literal["jvp", "kernel"]


def loss_scale(reduction: Averaging, n: int) -> float:
    """Return rho, the factor of the summed loss (1/n for a mean).

    Args:
        reduction: ``"mean"`` or ``"sum"``.
        n: Number of examples.

    Returns:
        1 / n or 1.

    Raises:
        ValueError: If the reduction is unknown.
    """
    _check_choice("reduction", reduction, Averaging)
    return 1 / n if reduction == "mean" else 1.0


@dataclass(frozen=True, eq=False)
class Solution:
    """The linearised model after training, to the end or for some time.

    Tensors are in float64.

    Attributes:
        linear: The linearised model.
        batches: The training examples.
        dual: ``(n, c)`` coefficients: delta = J' dual, f(x) = f0(x) + K(x, X) dual.
        outputs: ``(n, c)`` on the training examples.
        residuals: ``(n, c)``, targets minus outputs, or minus class probabilities.
        movement: ||delta|| = (dual' K dual)^1/2.
        loss: The objective without its penalty.
        objective: The objective.
    """

    linear: LinearizedModel
    batches: list[Batch]
    dual: Tensor
    outputs: Tensor
    residuals: Tensor
    movement: float
    loss: float
    objective: float

    @cached_property
    def delta(self) -> Tensor:
        """The coordinates ``(p,)``, computed by one backward pass over the examples."""
        return self.linear.vjp(self.batches, self.dual)

    def predict(
        self, inputs: Inputs, *, by: Way = "jvp", batch_size: int | None = None
    ) -> Tensor:
        """Return the outputs on any inputs.

        Args:
            inputs: m examples.
            by: ``"jvp"`` computes f0(x) + J(x) delta, ``"kernel"`` the same function as
                f0(x) + K(x, X) dual.
            batch_size: Maximum number of examples in one pass.

        Returns:
            ``(m, c)``.

        Raises:
            ValueError: If ``by`` is neither.
        """
        _check_choice("by", by, Way)
        linear = self.linear
        if by == "jvp":
            return linear.predict(inputs, self.delta, batch_size=batch_size)
        kernel = empirical_ntk(
            linear.base,
            inputs,
            self.batches,
            space=linear.space,
            outputs=linear.readout,
            batch_size=batch_size,
        )
        change = torch.einsum("mncd,nd->mc", kernel, self.dual)
        return linear.start(inputs, batch_size=batch_size) + change


class ClosedForm:
    """Solutions on one training set, from one kernel and its eigenvectors.

    The kernel, ``(n c, n c)`` in memory, is computed and decomposed once for all
    targets, strengths and times.

    Args:
        linear: The linearised model; its ``delta`` is not used.
        inputs: n training examples.
        batch_size: Maximum number of examples in one pass; None takes batches whole.

    Attributes:
        start: f0, ``(n, c)``.
        eigenvalues: Eigenvalues of the Gram matrix, ``(n c,)``, descending.

    Raises:
        ValueError: If the kernel is zero.
    """

    def __init__(
        self,
        linear: LinearizedModel,
        inputs: Inputs,
        *,
        batch_size: int | None = None,
    ) -> None:
        self.linear = linear
        self.batches = to_batches(inputs, linear.delta.device, batch_size)
        kernel = empirical_ntk(
            linear.base, self.batches, space=linear.space, outputs=linear.readout
        )
        self.start: Array = linear.start(self.batches).double().cpu().numpy()
        gram = gram_matrix(kernel).cpu().numpy()
        self.eigenvalues, self._vectors = eigensystem(gram, name="kernel")
        eps = torch.finfo(linear.delta.dtype).eps
        self._rank = numerical_rank(self.eigenvalues, eps=eps)
        if not self._rank:
            raise ValueError(
                f"the kernel of space {linear.space.name!r} is zero. Check that the "
                "space holds parameters that the outputs depend on."
            )

    def ridge(
        self,
        targets: ArrayLike | Tensor,
        strength: float,
        *,
        reduction: Averaging = "mean",
    ) -> Solution:
        """Return the minimiser of the squared objective.

        Args:
            targets: ``(n, c)``, or ``(n,)`` for one output.
            strength: lambda, at least 0; 0 gives the least-squares solution nearest to
                the start, the limit of small strengths.
            reduction: Reduction of the loss over the examples, ``"mean"`` or ``"sum"``.

        Returns:
            The solution.

        Raises:
            ValueError: If a shape does not fit or a number is out of its range.
        """
        return self.flow(targets, math.inf, strength, reduction=reduction)

    def flow(
        self,
        targets: ArrayLike | Tensor,
        time: float,
        strength: float = 0.0,
        *,
        reduction: Averaging = "mean",
    ) -> Solution:
        """Return the state of gradient flow of the squared objective at a time.

        d delta / dt is the negative gradient of the objective, and delta = 0 at t = 0.
        Along an eigenvector of K with eigenvalue l the dual coefficient is that of the
        minimiser times 1 - exp(-2 rho (l + s) t).

        Args:
            targets: ``(n, c)``, or ``(n,)`` for one output.
            time: t, at least 0; for gradient descent with small steps, their number
                times the learning rate.
            strength: lambda, at least 0.
            reduction: Reduction of the loss over the examples, ``"mean"`` or ``"sum"``.

        Returns:
            The solution at that time.

        Raises:
            ValueError: If a shape does not fit or a number is out of its range.
        """
        _check_range("strength", strength, 0 <= strength < math.inf)
        _check_range("time", time, time >= 0)
        rho = loss_scale(reduction, len(self.start))
        r = self._vectors.T @ (self._targets(targets) - self.start).ravel()
        l, ridge = self.eigenvalues, strength / (2 * rho)
        # Without a ridge nothing is learnt where K is zero up to rounding.
        learnt = (np.arange(len(l)) < self._rank) | (ridge > 0)
        total = np.where(learnt, l + ridge, 1.0)
        rate = -2 * rho * total
        dual = np.where(learnt, -np.expm1(rate * time) / total * r, 0.0)
        shrinkage = np.where(learnt, (ridge + l * np.exp(rate * time)) / total, 1.0)
        residual = shrinkage * r
        loss = rho * float(residual @ residual)
        return self._solution(dual, residual, loss, strength)

    def logistic(
        self,
        labels: ArrayLike | Tensor,
        strength: float,
        *,
        reduction: Averaging = "mean",
    ) -> Solution:
        """Return the minimiser of the logistic objective, by Newton's method.

        SciPy's trust-region Newton method in the coordinates of the kernel's
        eigenvectors, as in `ntk.classifiers.estimators.KernelLogisticRegression`. It
        stops at a gradient of 1e-10 per example and warns if it cannot reach 1e-6.

        Args:
            labels: ``(n,)`` output indices; 0 or 1 for one output, the log-odds of 1.
            strength: lambda, above 0: without a penalty separable classes have no
                minimiser.
            reduction: Reduction of the loss over the examples, ``"mean"`` or ``"sum"``.

        Returns:
            The solution.

        Raises:
            ValueError: If a label is no output index, or a number is out of range.
        """
        _check_range("strength", strength, 0 < strength < math.inf, "above 0")
        rho, (n, c) = loss_scale(reduction, len(self.start)), self.start.shape
        classes = max(c, 2)
        y = self._labels(labels, classes)
        root = np.sqrt(self.eigenvalues[: self._rank])
        features = (self._vectors[:, : self._rank] * root).reshape(n, c, -1)
        (weights,) = logistic_path(features, y, self.start, [rho / strength])
        dual = np.zeros(n * c)
        dual[: self._rank] = weights[:, 0] / root
        log_odds = np.zeros((n, classes))
        log_odds[:, -c:] = self.start + features @ weights[:, 0]
        log_p = torch.from_numpy(log_odds).log_softmax(dim=1).numpy()
        residual = (np.eye(classes)[y] - np.exp(log_p))[:, -c:].ravel()
        loss = -rho * float(log_p[range(n), y].sum())
        return self._solution(dual, self._vectors.T @ residual, loss, strength)

    def _solution(
        self, dual: Array, residual: Array, loss: float, strength: float
    ) -> Solution:
        """Return the solution from its coefficients along the eigenvectors."""
        square = float(self.eigenvalues @ dual**2)
        change = self._vectors @ (self.eigenvalues * dual)
        shaped = lambda part: torch.from_numpy(part.reshape(self.start.shape)).to(
            self.linear.delta.device
        )
        return Solution(
            linear=self.linear,
            batches=self.batches,
            dual=shaped(self._vectors @ dual),
            outputs=shaped(self.start.ravel() + change),
            residuals=shaped(self._vectors @ residual),
            movement=math.sqrt(square),
            loss=loss,
            objective=loss + strength / 2 * square,
        )

    def _targets(self, targets: ArrayLike | Tensor) -> Array:
        values, shape = _numpy(targets).astype(np.float64), self.start.shape
        if values.shape == shape[:1] and shape[1] == 1:
            values = values[:, None]
        if values.shape != shape or not np.isfinite(values).all():
            raise ValueError(
                f"targets has shape {values.shape}; expected {shape}, a finite number "
                "per example and output."
            )
        return values

    def _labels(self, labels: ArrayLike | Tensor, classes: int) -> NDArray[np.intp]:
        y = _numpy(labels)
        if y.shape != self.start.shape[:1] or not np.isin(y, range(classes)).all():
            raise ValueError(
                f"labels has shape {y.shape} and values {np.unique(y)[:5].tolist()}; "
                f"expected ({len(self.start)},) whole numbers from 0 to {classes - 1}, "
                "the output indices."
            )
        return y.astype(np.intp)


def _numpy(values: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def _check_range(
    name: str, value: float, within: bool, expected: str = "of at least 0"
) -> None:
    if not within:
        raise ValueError(f"{name}={value!r} must be a number {expected}.")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(
            f"{name}={value!r} must be one of {', '.join(get_args(choices))}."
        )
