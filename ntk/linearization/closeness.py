"""Measures of how close a fine-tuned model is to its linearisation.

Fine-tuning and linearised training of the same parameters are compared at the same
lambda, each with the penalty (lambda / 2) ||theta - theta0||^2. As lambda grows, the
distance of their outputs falls as lambda^-2, and relative to their movement as
lambda^-1. The distance to a linearised model without the penalty does not (see
`ntk.linearization.bounds`).

Points are coordinates ``(p,)`` of the linearised model, theta = theta0 + S delta. The
Jacobian ``(n c, p)`` at delta is J_delta, that at theta0 J_0. Their norms are spectral,
by Lanczos iteration on J J': one jvp and one vjp over the examples per iteration. No
Jacobian is formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ntk.classifiers import agreement
from ntk.gradients import Batch, Inputs, to_batches
from ntk.linearization.model import LinearizedModel, evaluated

__all__ = [
    "Closeness",
    "Lipschitz",
    "TaylorRemainder",
    "closeness",
    "lipschitz",
    "taylor_remainder",
]

BREAKDOWN = 1e-12
"""Relative norm below which a vector is pure rounding."""

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Fractions of the path to the fine-tuned model at which to measure the remainder."""


@dataclass(frozen=True)
class Closeness:
    """Distances of a fine-tuned model f and its linearised twin g, from one theta0.

    F, G and F0 are outputs ``(n, c)``, with Frobenius norms. Undefined values are None:
    ratios to zero, measures of classes for one output, accuracies without labels.

    Attributes:
        examples: n.
        movement: ||theta_f - theta0||.
        linear_movement: ||theta_g - theta0||.
        parameter_distance: ||theta_f - theta_g||.
        relative_parameter_distance: `parameter_distance` / `movement`.
        change: ||F - F0||.
        output_distance: ||F - G||.
        relative_output_distance: `output_distance` / `change`.
        mean_logit_distance: Mean over the examples of ||f(x) - g(x)||, as in Rahimi
            Afzal et al. (2025), table 1.
        kl_divergence: Mean over the examples of KL(softmax f || softmax g) (nat).
        agreement: Share of examples with the same largest output.
        start_accuracy: Accuracy of the model at theta0.
        accuracy: Accuracy of f.
        linear_accuracy: Accuracy of g.
        recovery: (linear_accuracy - start_accuracy) / (accuracy - start_accuracy);
            Malladi et al. (2023) call fine-tuning a kernel's where it is above 1/2.
    """

    examples: int
    movement: float
    linear_movement: float
    parameter_distance: float
    relative_parameter_distance: float | None
    change: float
    output_distance: float
    relative_output_distance: float | None
    mean_logit_distance: float
    kl_divergence: float | None
    agreement: float | None
    start_accuracy: float | None
    accuracy: float | None
    linear_accuracy: float | None
    recovery: float | None


@dataclass(frozen=True)
class TaylorRemainder:
    """The remainder of the first-order expansion along a direction d from theta0.

    Attributes:
        fractions: s.
        changes: ||f(theta0 + s d) - f0|| over all examples and outputs.
        remainders: ||f(theta0 + s d) - f0 - s J d||, proportional to s^2 for small s.
        ratios: Remainder / change; None if the outputs did not change.
    """

    fractions: tuple[float, ...]
    changes: tuple[float, ...]
    remainders: tuple[float, ...]
    ratios: tuple[float | None, ...]


@dataclass(frozen=True)
class Lipschitz:
    """Lipschitz constants in theta, measured at points.

    They are maxima over the points, so lower bounds for any ball that contains these.
    (A Lipschitz constant in the input is a different quantity.)

    Attributes:
        start: ||J_0||.
        outputs: L, the largest ||J||, including theta0.
        jacobian: B, the largest ||J_delta - J_0|| / ||delta||.
        radius: The largest ||delta||.
    """

    start: float
    outputs: float
    jacobian: float
    radius: float


def closeness(
    linear: LinearizedModel,
    tuned: nn.Module,
    inputs: Inputs,
    *,
    delta: Tensor | None = None,
    labels: ArrayLike | Tensor | None = None,
    batch_size: int | None = None,
) -> Closeness:
    """Compare a fine-tuned model with its linearised twin.

    Args:
        linear: The linearisation of the model before fine-tuning, in a space of all
            trained parameters.
        tuned: The fine-tuned model.
        inputs: n examples.
        delta: ``(p,)``, the end of the linearised training, such as
            `ntk.linearization.closed_form.Solution.delta`; None means ``linear.delta``.
        labels: ``(n,)`` indices of the correct outputs, for accuracies.
        batch_size: Maximum number of examples in one pass.

    Returns:
        The comparison; `asdict` makes it JSON.

    Raises:
        SelectionError: If the fine-tuned model is outside the space.
        ValueError: If a shape does not fit.
    """
    batches = to_batches(inputs, linear.delta.device, batch_size)
    reached = linear.coordinates(tuned).double()
    end = linear.delta.detach() if delta is None else delta
    start = linear.start(batches).double()
    ours = evaluated(tuned, batches, linear.readout).double()
    theirs = linear.predict(batches, end).double()
    movement, change = float(reached.norm()), float((ours - start).norm())
    distance = float((reached - end.to(reached)).norm())
    gap = float((ours - theirs).norm())
    has_classes = ours.shape[1] > 1
    same = agreement.agreement(ours.cpu(), theirs.cpu()) if has_classes else None
    accuracies = [_accuracy(f, labels) for f in (start, ours, theirs)]
    return Closeness(
        examples=len(ours),
        movement=movement,
        linear_movement=float(end.double().norm()),
        parameter_distance=distance,
        relative_parameter_distance=_ratio(distance, movement),
        change=change,
        output_distance=gap,
        relative_output_distance=_ratio(gap, change),
        mean_logit_distance=float((ours - theirs).norm(dim=1).mean()),
        kl_divergence=_kl_divergence(ours, theirs) if has_classes else None,
        agreement=same,
        start_accuracy=accuracies[0],
        accuracy=accuracies[1],
        linear_accuracy=accuracies[2],
        recovery=_recovery(*accuracies),
    )


def taylor_remainder(
    linear: LinearizedModel,
    delta: Tensor,
    inputs: Inputs,
    *,
    fractions: Sequence[float] = FRACTIONS,
    batch_size: int | None = None,
) -> TaylorRemainder:
    """Measure the remainder of the first-order expansion along a direction from theta0.

    Args:
        linear: The linearised model.
        delta: d ``(p,)``, such as the `LinearizedModel.coordinates` of a fine-tuned
            model.
        inputs: n examples.
        fractions: The fractions s of d.
        batch_size: Maximum number of examples in one pass.

    Returns:
        The remainder at each fraction.
    """
    batches = to_batches(inputs, linear.delta.device, batch_size)
    start, slope = linear.start(batches).double(), linear.jvp(batches, delta).double()
    changes, remainders = [], []
    for s in fractions:
        model = linear.model_at(s * delta)
        change = evaluated(model, batches, linear.readout).double() - start
        changes.append(float(change.norm()))
        remainders.append(float((change - s * slope).norm()))
    ratios = map(_ratio, remainders, changes)
    return TaylorRemainder(
        tuple(fractions), tuple(changes), tuple(remainders), tuple(ratios)
    )


def lipschitz(
    linear: LinearizedModel,
    inputs: Inputs,
    points: Sequence[Tensor],
    *,
    tolerance: float = 1e-3,
    iterations: int = 50,
    seed: int = 0,
    batch_size: int | None = None,
) -> Lipschitz:
    """Measure Lipschitz constants of the outputs and of the Jacobian in theta.

    Args:
        linear: The linearised model.
        inputs: n examples.
        points: Nonzero coordinates ``(p,)``, such as those of training checkpoints, or
            fractions of the final ones.
        tolerance: Iteration stops when the norm grows by less than this, relatively;
            the norm may then be slightly too small.
        iterations: Maximum number of iterations per norm.
        seed: Seed of the initial vector.
        batch_size: Maximum number of examples in one pass.

    Returns:
        The constants.

    Raises:
        ValueError: If there is no point, or one is zero.
    """
    distances = [float(point.double().norm()) for point in points]
    if not distances or min(distances) == 0:
        raise ValueError(
            f"points are {len(distances)} at distances {distances} from the start; "
            "expected at least one, none of them zero."
        )
    batches = to_batches(inputs, linear.delta.device, batch_size)
    vector = torch.randn(
        linear.start(batches).shape,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    ).to(linear.delta.device)
    krylov = _Krylov(batches, vector, tolerance, iterations)
    values, slopes = [krylov.norm(linear)], []
    for point, distance in zip(points, distances, strict=True):
        there = linear.at(point)
        values.append(krylov.norm(there))
        slopes.append(krylov.norm(there, linear) / distance)
    return Lipschitz(values[0], max(values), max(slopes), max(distances))


@dataclass(frozen=True)
class _Krylov:
    """Spectral norms of Jacobians, from the Krylov space of J J' and a vector."""

    batches: list[Batch]
    vector: Tensor
    tolerance: float
    iterations: int

    def norm(self, of: LinearizedModel, less: LinearizedModel | None = None) -> float:
        """Return the norm of a Jacobian, or of the difference of two."""
        basis = images = self.vector.new_empty(0, self.vector.numel())
        vector, norm = self.vector.flatten(), 0.0
        for _ in range(self.iterations):
            size = vector.norm()
            for _ in range(2):  # Once is not orthogonal up to rounding.
                vector = vector - basis.T @ (basis @ vector)
            if vector.norm() <= BREAKDOWN * size:
                break
            unit = vector / vector.norm()
            vector = self._applied(unit, of, less)
            basis, images = torch.vstack([basis, unit]), torch.vstack([images, vector])
            projected = basis @ images.T
            largest = torch.linalg.eigvalsh((projected + projected.T) / 2)[-1]
            last, norm = norm, math.sqrt(max(float(largest), 0.0))
            if norm <= last * (1 + self.tolerance):
                break
        return norm

    def _applied(
        self, unit: Tensor, of: LinearizedModel, less: LinearizedModel | None
    ) -> Tensor:
        """Return J J' unit, ``(n c,)``."""
        v = unit.view_as(self.vector)
        pulled = of.vjp(self.batches, v).double()
        if less is not None:
            pulled -= less.vjp(self.batches, v)
        pushed = of.jvp(self.batches, pulled).double()
        if less is not None:
            pushed -= less.jvp(self.batches, pulled)
        return pushed.flatten()


def _ratio(value: float, scale: float) -> float | None:
    return value / scale if scale else None


def _kl_divergence(ours: Tensor, theirs: Tensor) -> float:
    log_p, log_q = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
    return float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())


def _accuracy(outputs: Tensor, labels: ArrayLike | Tensor | None) -> float | None:
    if labels is None:
        return None
    y = torch.as_tensor(labels, device=outputs.device)
    if y.shape != outputs.shape[:1] or outputs.shape[1] < 2:
        raise ValueError(
            f"labels has shape {tuple(y.shape)}, the outputs {tuple(outputs.shape)}; "
            "expected a label for each example and two outputs or more."
        )
    return float((outputs.argmax(dim=1) == y).double().mean())


def _recovery(
    start: float | None, tuned: float | None, linear: float | None
) -> float | None:
    if start is None or tuned is None or linear is None or math.isclose(tuned, start):
        return None
    return (linear - start) / (tuned - start)
