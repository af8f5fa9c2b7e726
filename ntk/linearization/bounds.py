"""Bounds on the distance between fine-tuning and linearised training, squared loss.

The objective is rho ||f(X) - Y||^2 + (lambda / 2) ||theta - theta0||^2. Within a radius
of theta0, L bounds ||J_theta|| and B bounds ||J_theta - J_0|| / ||theta - theta0||. The
residual r0 is f0(X) - Y, and s is lambda / (2 rho). Rahimi Afzal et al. (2025) use
rho = 1.

Their theorems 3 and 4 compare regularised fine-tuning with a linearised model that is
trained *without* the penalty. That distance does not vanish for large lambda, nor do
its bounds. The corrected bounds use the same lambda for both. Under gradient flow, with
D_t = ||r0|| L (1 - e^(-lambda t)) / s,

    ||theta_t - theta_lin|| <= (1 - e^(-lambda t)) / s (B D_t ||r0|| + L B D_t^2 / 2),

and at the minimisers, with D = ||theta* - theta0|| and the residual r* there,

    ||theta* - theta_lin|| <= (B D ||r*|| + ||J_0|| B D^2 / 2) / s + ||g|| / lambda,

where g = 2 rho J*' r* + lambda (theta* - theta0) is the objective's remaining gradient
if training has not converged. The same equation, divided by lambda, bounds the
movement: theta* - theta0 = (g / (2 rho) - J*' r*) / s, so

    D <= (L ||r*|| + ||g|| / (2 rho)) / s.

It assumes nothing about the descent. An objective at theta* of at most that at theta0,
rho ||r*||^2 + (lambda / 2) D^2 <= rho ||r0||^2, gives D <= ||r0|| / sqrt(s) besides.
In both cases

    ||f - f_lin|| <= ||J_0|| ||theta - theta_lin|| + B D^2 / 2 = O(lambda^-2).

If the conditions of a bound are not met, its value is None and its note says "vacuous"
and why. `ntk.linearization.closeness.lipschitz` measures the constants at points; the
bounds are reliable if the points are dense enough.
"""

import math
from dataclasses import dataclass

from ntk.linearization.closeness import Lipschitz

__all__ = [
    "Bound",
    "FlowBounds",
    "MinimiserBounds",
    "critical_strength",
    "flow_bounds",
    "minimiser_bounds",
]

ROUNDING = 1e-9
"""Relative difference between two computations of the same distance."""

PAPER = "Rahimi Afzal et al. (2025), theorem"
FLOW = "squared loss; gradient flow; constants that hold wherever it goes"
NO_PENALTY = "it takes lambda > 0"


@dataclass(frozen=True)
class Bound:
    """An upper bound and its conditions.

    Attributes:
        value: The bound; None if a condition is not met.
        conditions: The conditions under which it holds.
        source: The theorem or paper it is from.
        note: "vacuous" and why, if there is no value.
    """

    value: float | None
    conditions: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class FlowBounds:
    """Bounds under gradient flow from theta0, at a time or for all times.

    Attributes:
        critical_strength: lambda_0, see the function `critical_strength`.
        movement: Bound on ||theta_t - theta0||.
        published: Bound on ||f(X) - f_lin(X)||, f_lin trained without the penalty.
        published_simplified: A simpler bound on the same.
        parameters: Bound on ||theta_t - theta_lin||, both with the penalty.
        outputs: Bound on ||f(X) - f_lin(X)||, both with the penalty.
    """

    critical_strength: float
    movement: Bound
    published: Bound
    published_simplified: Bound
    parameters: Bound
    outputs: Bound


@dataclass(frozen=True)
class MinimiserBounds:
    """Bounds at the minimisers of both objectives, the same lambda in both.

    Attributes:
        movement: Bound on ||theta* - theta0||.
        linear_movement: Bound on ||theta_lin - theta0||.
        remainder: Bound on ||f(X) - f0(X) - J_0 (theta* - theta0)||.
        parameters: Bound on ||theta* - theta_lin||.
        outputs: Bound on ||f(X) - f_lin(X)||.
    """

    movement: Bound
    linear_movement: Bound
    remainder: Bound
    parameters: Bound
    outputs: Bound


def critical_strength(
    constants: Lipschitz, residual: float, *, scale: float = 1.0
) -> float:
    """Return lambda_0 = 2 rho L ||r0|| / R, from which on training stays in the ball.

    Rahimi Afzal et al. (2025), theorem 4.

    Args:
        constants: L, and the radius R within which it holds.
        residual: ||r0|| = ||f0(X) - Y||.
        scale: rho, see `ntk.linearization.closed_form.loss_scale`.
    """
    _check("residual", residual, 0 <= residual < math.inf)
    _check("scale", scale, 0 < scale < math.inf)
    return 2 * scale * constants.outputs * residual / constants.radius


def flow_bounds(
    constants: Lipschitz,
    residual: float,
    strength: float,
    *,
    time: float = math.inf,
    scale: float = 1.0,
    along_path: bool = False,
) -> FlowBounds:
    """Return bounds under gradient flow of the squared objective.

    Args:
        constants: L, B and ||J_0||, which hold within their radius of theta0.
        residual: ||r0|| = ||f0(X) - Y||.
        strength: lambda, at least 0.
        time: t; infinite for bounds that hold at all times and in the limit.
        scale: rho, see `ntk.linearization.closed_form.loss_scale`; the paper uses 1.
        along_path: Whether the constants were measured along the fine-tuning itself and
            between its points and theta0; then it need not stay in the ball. Constants
            measured on the line to its end are not.

    Returns:
        The bounds.

    Raises:
        ValueError: If a number is out of its range.
    """
    _check("strength", strength, 0 <= strength < math.inf)
    _check("time", time, time >= 0)
    critical = critical_strength(constants, residual, scale=scale)
    L, B, radius = constants.outputs, constants.jacobian, constants.radius
    # In the units of the paper, rho = 1.
    t, strong = time * scale, strength / scale
    span = 2 * t if strong == 0 else -2 * math.expm1(-strong * t) / strong
    moved = span * L * residual
    distance = span * (B * moved * residual + L * B * moved**2 / 2)
    published = math.inf
    if strong:
        b = 2 * L**2 * residual * (4 * B * residual / strong + 1)
        published = b * (t - span / 2)
    below = f"lambda = {strength:g} is below lambda_0 = {critical:.3g}"
    leaves = f"training may leave the ball of radius {radius:.3g}, as {below}"
    inside = "" if along_path or _holds(moved, radius) else leaves
    bounded = "" if math.isfinite(moved) else "without a penalty it grows for ever"
    positive = "" if strength else NO_PENALTY
    finite = "" if math.isfinite(t) else "it grows with time for ever"
    same = f"{FLOW}; f_lin trained with the same lambda"
    other = f"{FLOW}; lambda > 0; finite time; f_lin trained with lambda = 0"
    return FlowBounds(
        critical_strength=critical,
        movement=_bound(moved, FLOW, f"{PAPER} 2", bounded, inside),
        published=_bound(published, other, f"{PAPER} 3", positive, finite, inside),
        published_simplified=_bound(
            2 * L * residual * (2 * radius * B + L) * t,
            f"{other}; lambda of at least lambda_0",
            f"{PAPER} 4",
            *(positive, finite, "" if strength >= critical else below),
        ),
        parameters=_bound(distance, same, "corrected", bounded, inside),
        outputs=_bound(
            constants.start * distance + B * moved**2 / 2,
            *(same, "corrected", bounded, inside),
        ),
    )


def minimiser_bounds(
    constants: Lipschitz,
    residual: float,
    strength: float,
    *,
    movement: float | None = None,
    final_residual: float | None = None,
    gradient: float = 0.0,
    scale: float = 1.0,
) -> MinimiserBounds:
    """Return bounds at the minimisers of the squared objectives.

    Without ``movement`` the objective at theta* must be at most that at theta0, and the
    constants must hold in the ball of radius ||r0|| / sqrt(s), s = lambda / (2 rho). By

        2 rho J*' r* + lambda (theta* - theta0) = g        (the gradient at theta*)
        ||theta* - theta0|| <= (L ||r*|| + ||g|| / (2 rho)) / s,

    and D is the smaller of the two.

    Args:
        constants: L, B and ||J_0||, which hold within their radius of theta0.
        residual: ||r0|| = ||f0(X) - Y||.
        strength: lambda, at least 0.
        movement: Measured ||theta* - theta0||; None means its bound.
        final_residual: ||r*|| = ||f(X) - Y|| at theta*; None means ||r0||, an upper
            bound if the objective is below its initial value.
        gradient: ||g||, norm of the objective's gradient at theta*, 0 at a stationary
            point.
        scale: rho, see `ntk.linearization.closed_form.loss_scale`; 1/2 for the loss
            ||f - Y||^2 / 2.

    Returns:
        The bounds.

    Raises:
        ValueError: If a number is out of its range.
    """
    _check("residual", residual, 0 <= residual < math.inf)
    _check("scale", scale, 0 < scale < math.inf)
    _check("strength", strength, 0 <= strength < math.inf)
    _check("gradient", gradient, 0 <= gradient < math.inf)
    ridge, positive = strength / (2 * scale), "" if strength else NO_PENALTY
    at_most = residual / math.sqrt(ridge) if ridge else math.inf
    farthest = at_most if movement is None else movement
    moved, radius, B = farthest, constants.radius, constants.jacobian
    last_residual = residual if final_residual is None else final_residual
    if movement is None and ridge:
        # Within the ball the gradient at theta* gives a second bound.
        pull = constants.outputs * last_residual + gradient / (2 * scale)
        moved = min(at_most, pull / ridge)
    remainder, distance = B * moved**2 / 2, math.inf
    if ridge:
        distance = (B * moved * last_residual + constants.start * remainder) / ridge
        distance += gradient / strength
    outside = (
        f"theta* may be {farthest:.3g} from theta0, out of the ball of {radius:.3g}"
    )
    inside = "" if _holds(farthest, radius) else outside
    between = "constants that hold between theta0 and theta*"
    penalised = "squared loss; lambda > 0"
    same = f"{penalised}, the same for f_lin; {between}"
    return MinimiserBounds(
        movement=_bound(
            at_most,
            f"{penalised}; an objective at theta* of at most that at theta0",
            *("descent", positive),
        ),
        linear_movement=_bound(at_most / 2, penalised, "ridge regression", positive),
        remainder=_bound(remainder, between, "Taylor's theorem", inside),
        parameters=_bound(distance, same, "corrected", positive, inside),
        outputs=_bound(
            constants.start * distance + remainder,
            *(same, "corrected", positive, inside),
        ),
    )


def _bound(value: float, conditions: str, source: str, *failures: str) -> Bound:
    reasons = "; ".join(filter(None, failures))
    if reasons:
        return Bound(None, conditions, source, f"vacuous: {reasons}")
    return Bound(value, conditions, source)


def _holds(distance: float, radius: float) -> bool:
    return distance <= radius * (1 + ROUNDING)


def _check(name: str, value: float, within: bool) -> None:
    if not within:
        raise ValueError(f"{name}={value!r} must be a number of at least 0.")
