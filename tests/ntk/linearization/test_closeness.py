"""Measures of fine-tuned against linearised models, and their bounds."""

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from cases import BY_NAME
from dense import gradients
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn
from torch.func import hessian, jacrev, vmap

from ntk.linearization.bounds import critical_strength, flow_bounds, minimiser_bounds
from ntk.linearization.closed_form import ClosedForm
from ntk.linearization.closeness import (
    Lipschitz,
    closeness,
    lipschitz,
    taylor_remainder,
)
from ntk.linearization.model import linearize
from ntk.spaces.kinds import Full, Head
from rocoft.models.architecture import SelectionError
from rocoft.training.methods import apply_method, parse_method, trained_parameters

FLOAT = torch.float64
STRENGTHS = tuple(10.0 ** (i / 2) for i in range(7))


# Measures.


@pytest.fixture(scope="module")
def pair():
    """A linearised LoRA model, the same model after some steps, and examples."""
    family = BY_NAME["bert"]
    inputs = family.inputs(6)
    method = parse_method("lora:2")
    start = apply_method(family.build(), method, train_head=True).double()
    linear, tuned = linearize(start, Full()), copy.deepcopy(start)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    for module, parameters in (
        (linear, [linear.delta]),
        (tuned, list(trained_parameters(tuned).values())),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = module(**inputs)
            outputs = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
            nn.functional.cross_entropy(outputs, labels).backward()
            optimizer.step()
    return linear, start, tuned, inputs, labels


def test_measures_match_a_dumb_twin(pair):
    linear, start, tuned, inputs, labels = pair
    result = closeness(linear, tuned, inputs, labels=labels, batch_size=4)
    with torch.no_grad():
        f0, f, g = start(**inputs).logits, tuned(**inputs).logits, linear(**inputs)
    before, after = trained_parameters(start), trained_parameters(tuned)
    d = torch.cat([(after[n] - before[n]).detach().flatten() for n in before])
    delta = linear.delta.detach()
    norm = lambda x: sum(float(v) ** 2 for v in x.flatten()) ** 0.5
    assert result.examples == 6
    assert result.movement == pytest.approx(norm(d))
    assert result.linear_movement == pytest.approx(norm(delta))
    assert result.parameter_distance == pytest.approx(norm(d - delta))
    assert result.relative_parameter_distance == pytest.approx(
        norm(d - delta) / norm(d)
    )
    assert result.change == pytest.approx(norm(f - f0))
    assert result.output_distance == pytest.approx(norm(f - g))
    assert result.relative_output_distance == pytest.approx(norm(f - g) / norm(f - f0))
    rows = [norm(a - b) for a, b in zip(f, g, strict=True)]
    assert result.mean_logit_distance == pytest.approx(sum(rows) / 6)
    divergence = 0.0
    for a, b in zip(f.tolist(), g.tolist(), strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        divergence += sum(x * np.log(x / y) for x, y in zip(p, q, strict=True)) / 6
    assert result.kl_divergence == pytest.approx(divergence)
    right = [sum(map(bool, o.argmax(1) == labels)) / 6 for o in (f0, f, g)]
    assert [result.start_accuracy, result.accuracy, result.linear_accuracy] == right
    assert result.agreement == sum(map(bool, f.argmax(1) == g.argmax(1))) / 6
    expected = (right[2] - right[0]) / (right[1] - right[0])
    assert result.recovery == pytest.approx(expected)
    json.dumps(asdict(result), allow_nan=False)
    given_ = closeness(linear, tuned, inputs, delta=0.5 * delta)
    assert given_.parameter_distance == pytest.approx(norm(d - 0.5 * delta))
    assert given_.accuracy is given_.recovery is None


def test_what_is_undefined_is_none(pair):
    linear, start, _, inputs, labels = pair
    result = closeness(linear, start, inputs, labels=labels)
    assert result.movement == result.change == 0
    assert result.relative_parameter_distance is result.relative_output_distance is None
    assert result.recovery is None
    model, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=FLOAT)
    one = closeness(linearize(model, Full()), copy.deepcopy(model), x)
    assert one.kl_divergence is one.agreement is None
    with pytest.raises(ValueError, match="expected a label for each example and two"):
        closeness(linearize(model, Full()), model, x, labels=[0] * 4)
    with pytest.raises(SelectionError, match="moved by up to .* outside of the space"):
        closeness(linearize(start, Head()), pair[2], inputs)


def test_remainder_of_the_expansion_along_the_way(pair):
    linear, _, tuned, inputs, _ = pair
    d, fractions = linear.coordinates(tuned), (1e-3, 2e-3, 0.5, 1.0)
    result = taylor_remainder(linear, d, inputs, fractions=fractions)
    f0, slope = linear.start(inputs), linear.jvp(inputs, d)
    for s, change, remainder, ratio in zip(
        fractions, result.changes, result.remainders, result.ratios, strict=True
    ):
        f = linear.model_at(s * d)(**inputs).logits.detach()
        assert change == pytest.approx(float((f - f0).norm()), rel=1e-9)
        expected = float((f - f0 - s * slope).norm())
        assert remainder == pytest.approx(expected, rel=1e-9)
        assert ratio == pytest.approx(expected / change)
    # Second order: twice the distance, four times the remainder.
    assert result.remainders[1] / result.remainders[0] == pytest.approx(4, rel=0.02)
    end = closeness(linear, tuned, inputs, delta=d)
    assert end.output_distance == pytest.approx(result.remainders[-1])


def test_what_is_linear_has_no_remainder_and_no_curvature():
    family = BY_NAME["bert"]
    inputs = family.inputs()
    linear = linearize(family.build(), Head().at("classifier"))
    d = torch.randn_like(linear.delta)
    result = taylor_remainder(linear, d, inputs, fractions=(1.0, 100.0))
    assert max(r for r in result.ratios if r is not None) < 1e-12
    constants = lipschitz(linear, inputs, [d, 100 * d])
    assert constants.jacobian < 1e-12
    assert constants.outputs == pytest.approx(constants.start)


def test_constants_are_norms_of_jacobians():
    family = BY_NAME["mlp"]
    model, inputs = family.build(), family.inputs()
    linear = linearize(model, Full())
    d = torch.randn_like(linear.delta)
    d = d / d.norm()
    points = [0.1 * d, 0.5 * d]
    result = lipschitz(linear, inputs, points, tolerance=0.0)

    def dense(delta):
        rows = gradients(linear.model_at(delta).requires_grad_(True), inputs)
        return torch.cat([g.flatten(2) for g in rows.values()], dim=2).flatten(0, 1)

    J0, Js = dense(0 * d), [dense(point) for point in points]
    spectral = lambda J: float(torch.linalg.matrix_norm(J, 2))
    assert result.start == pytest.approx(spectral(J0), rel=1e-7)
    assert result.outputs == pytest.approx(max(map(spectral, [J0, *Js])), rel=1e-7)
    slopes = [spectral(J - J0) / s for J, s in zip(Js, (0.1, 0.5), strict=True)]
    assert result.jacobian == pytest.approx(max(slopes), rel=1e-6)
    assert result.radius == pytest.approx(0.5)
    rough = lipschitz(linear, inputs, points)
    assert rough.outputs <= result.outputs * (1 + 1e-9)
    assert rough.outputs == pytest.approx(result.outputs, rel=1e-2)


def test_constants_need_points():
    linear = linearize(BY_NAME["mlp"].build(), Full())
    with pytest.raises(ValueError, match="none of them zero"):
        lipschitz(linear, BY_NAME["mlp"].inputs(), [torch.zeros_like(linear.delta)])
    with pytest.raises(ValueError, match="expected at least one"):
        lipschitz(linear, BY_NAME["mlp"].inputs(), [])


# A network small enough to minimise its objective and to integrate its flow.


class Small:
    """tanh network of a flat theta, squared loss with a given scale."""

    def __init__(self, seed, examples=4, inputs=2, width=3, size=1.0, reach=1.0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=FLOAT)
        self.x, self.y = reach * draw(examples, inputs), draw(examples)
        self.width, self.inputs = width, inputs
        self.start = size * draw(width * (inputs + 1))

    def f(self, theta):
        cut = self.width * self.inputs
        first = theta[:cut].view(self.width, self.inputs)
        return torch.tanh(self.x @ first.T) @ theta[cut:]

    def jacobian(self, theta):
        return jacrev(self.f)(theta)

    def module(self):
        net = nn.Sequential(
            nn.Linear(self.inputs, self.width, bias=False),
            nn.Tanh(),
            nn.Linear(self.width, 1, bias=False),
        ).double()
        self.put(net, self.start)
        return net

    @staticmethod
    def put(net, theta):
        nn.utils.vector_to_parameters(theta, net.parameters())

    def minimiser(self, strength, scale):
        """Return the minimiser of the objective by damped Newton steps."""

        def objective(theta):
            loss = scale * (self.f(theta) - self.y).square().sum()
            return loss + strength / 2 * (theta - self.start).square().sum()

        theta, floor = self.start, 1e-14 * (1 + strength)
        for _ in range(50):
            slope, curvature = jacrev(objective)(theta), hessian(objective)(theta)
            if slope.norm() < floor:
                break
            values, vectors = torch.linalg.eigh(curvature)
            step = vectors @ (vectors.T @ slope / values.abs().clamp(min=strength / 2))
            size, before = 1.0, objective(theta)
            while size > 1e-3 and objective(theta - size * step) > before:
                size /= 2
            theta = theta - size * step
        return theta

    def constants(self, points):
        """Return L, B and ||J_0|| at points, by dense Jacobians."""
        J0 = self.jacobian(self.start)
        spectral = lambda J: torch.linalg.matrix_norm(J, 2)
        moved = torch.stack(list(points)) - self.start
        distances = moved.norm(dim=1)
        J = vmap(jacrev(self.f))(self.start + moved[distances > 1e-9])
        slopes = spectral(J - J0) / distances[distances > 1e-9]
        return Lipschitz(
            start=float(spectral(J0)),
            outputs=float(torch.cat([spectral(J), spectral(J0)[None]]).max()),
            jacobian=float(slopes.max()),
            radius=float(distances.max()),
        )


def slope(strengths, gaps):
    return float(np.polyfit(np.log(strengths), np.log(gaps), 1)[0])


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_the_gap_vanishes_as_lambda_squared_only_with_the_same_lambda(seed):
    """Strengths from 1 to 1000, trained to the minimiser."""
    # Weak features: the kernel is small compared to the smallest strength, so that all
    # strengths are in the asymptotic regime.
    small = Small(seed, examples=6, inputs=3, width=4, reach=0.01)
    net = small.module()
    linear, tuned = linearize(net, Full()), copy.deepcopy(net)
    form = ClosedForm(linear, small.x)
    free = form.ridge(small.y, 0.0, reduction="sum")
    same, other = [], []
    for strength in STRENGTHS:
        small.put(tuned, small.minimiser(strength, scale=1.0))
        twin = form.ridge(small.y, strength, reduction="sum")
        same.append(closeness(linear, tuned, small.x, delta=twin.delta))
        other.append(closeness(linear, tuned, small.x, delta=free.delta))
    gaps = [c.output_distance for c in same]
    assert slope(STRENGTHS, gaps) == pytest.approx(-2, abs=0.1)
    relative = [c.relative_output_distance for c in same]
    assert slope(STRENGTHS, relative) == pytest.approx(-1, abs=0.1)
    assert slope(STRENGTHS, [c.parameter_distance for c in same]) == pytest.approx(
        -2, abs=0.1
    )
    ratio = [c.relative_parameter_distance for c in same]
    assert slope(STRENGTHS, ratio) == pytest.approx(-1, abs=0.1)
    assert slope(STRENGTHS, [c.movement for c in same]) == pytest.approx(-1, abs=0.1)
    # Without the penalty on the linear side the limit is the fit, not zero.
    apart = [c.output_distance for c in other]
    assert apart == sorted(apart)
    fit = float((free.outputs - linear.start(small.x)).norm())
    assert apart[-1] == pytest.approx(fit, rel=0.01)
    assert apart[-1] > 1e4 * gaps[-1]


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.floats(0.1, 2.0),
    st.floats(-2, 2),
    st.sampled_from([0.5, 1.0, 0.2]),
)
def test_corrected_bounds_hold_at_the_minimisers(
    seed, examples, inputs, width, size, log_strength, scale
):
    small = Small(seed, examples, inputs, width, size)
    strength = 10.0**log_strength
    theta = small.minimiser(strength, scale)
    d = theta - small.start
    constants = small.constants([small.start + s * d for s in np.linspace(0.05, 1, 20)])
    J0, f0 = small.jacobian(small.start), small.f(small.start)
    r0, ridge = small.y - f0, strength / (2 * scale)
    system = J0 @ J0.T + ridge * torch.eye(examples, dtype=J0.dtype)
    linear = J0.T @ torch.linalg.solve(system, r0)
    for stop in (1.0, 0.3):
        # At the minimiser, and at a point with a nonzero gradient of the objective.
        e = stop * d
        f = small.f(small.start + e)
        gradient = strength * e + 2 * scale * small.jacobian(small.start + e).T @ (
            f - small.y
        )
        bounds = minimiser_bounds(
            constants,
            float(r0.norm()),
            strength,
            movement=float(e.norm()),
            final_residual=float((f - small.y).norm()),
            gradient=float(gradient.norm()),
            scale=scale,
        )
        measured = {
            "movement": e.norm(),
            "linear_movement": linear.norm(),
            "remainder": (f - f0 - J0 @ e).norm(),
            "parameters": (e - linear).norm(),
            "outputs": (f - f0 - J0 @ linear).norm(),
        }
        for name, value in measured.items():
            bound = getattr(bounds, name)
            assert bound.note == "", name
            assert float(value) <= bound.value * (1 + 1e-6) + 1e-12, name
    # Without measurements at the minimiser, from constants of a ball around it.
    wide = replace(constants, radius=1e9)
    ahead = minimiser_bounds(wide, float(r0.norm()), strength, scale=scale)
    f = small.f(theta)
    assert float((d - linear).norm()) <= ahead.parameters.value * (1 + 1e-6) + 1e-12
    gap = float((f - f0 - J0 @ linear).norm())
    assert gap <= ahead.outputs.value * (1 + 1e-6) + 1e-12


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 3),
    st.floats(0.1, 2.0),
    st.floats(0, 3),
    st.sampled_from([0.5, 1.0, 0.2]),
    st.floats(0.1, 1.99),
)
@example(3, 4, 3, 1.0, 2.0, 0.5, 1.95)
def test_bounds_without_the_movement_hold_where_the_gradient_is_not_zero(
    seed, examples, width, size, log_strength, scale, stop
):
    """Before and beyond the minimiser, at an objective below that of the start."""
    small, strength = Small(seed, examples, 2, width, size), 10.0**log_strength
    e = stop * (small.minimiser(strength, scale) - small.start)
    J0, f0 = small.jacobian(small.start), small.f(small.start)
    f, r0, ridge = small.f(small.start + e), small.y - f0, strength / (2 * scale)
    gradient = strength * e + 2 * scale * small.jacobian(small.start + e).T @ (
        f - small.y
    )
    assume((f - small.y).square().sum() + ridge * e.square().sum() <= r0 @ r0)
    on_line = [small.start + s * e for s in np.linspace(0.05, 1, 20)]
    system = J0 @ J0.T + ridge * torch.eye(examples, dtype=FLOAT)
    linear = J0.T @ torch.linalg.solve(system, r0)
    measured = {
        "movement": e.norm(),
        "remainder": (f - f0 - J0 @ e).norm(),
        "parameters": (e - linear).norm(),
        "outputs": (f - f0 - J0 @ linear).norm(),
    }
    for final in (None, float((f - small.y).norm())):
        bounds = minimiser_bounds(
            replace(small.constants(on_line), radius=1e9),
            float(r0.norm()),
            strength,
            final_residual=final,
            gradient=float(gradient.norm()),
            scale=scale,
        )
        for name, value in measured.items():
            bound = getattr(bounds, name).value
            assert float(value) <= bound * (1 + 1e-6) + 1e-12, name


@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0.2, 1.5),
    st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    st.sampled_from([0.25, 1.0]),
)
def test_corrected_bounds_hold_along_the_flow(
    seed, examples, width, size, strength, scale
):
    small = Small(seed, examples, 2, width, size)
    times = np.linspace(0, 1.0 if strength < 1 else 3.0 / strength, 7)

    def flow(t, theta):
        theta = torch.from_numpy(theta)
        pull = strength * (theta - small.start)
        J = small.jacobian(theta)
        return -(2 * scale * J.T @ (small.f(theta) - small.y) + pull).numpy()

    path = solve_ivp(
        flow, (0, times[-1]), small.start.numpy(), rtol=1e-8, atol=1e-11, t_eval=times
    )
    thetas = [torch.from_numpy(column) for column in path.y.T]
    between = [
        small.start + s * (theta - small.start)
        for theta in thetas
        for s in (0.25, 0.5, 0.75, 1.0)
    ]
    constants = small.constants(between)
    linear = linearize(small.module(), Full())
    form = ClosedForm(linear, small.x)
    residual = float((small.f(small.start) - small.y).norm())
    form_scale = scale * examples  # Of a mean over the examples.
    for t, theta in zip(times[1:], thetas[1:], strict=True):
        bounds = flow_bounds(
            constants, residual, strength, time=t, scale=scale, along_path=True
        )
        # rho = 1 / n and time in units of n: the same flow.
        twin, free = (
            form.flow(small.y, t * form_scale, weight / form_scale)
            for weight in (strength, 0.0)
        )
        f, slack = small.f(theta)[:, None], 1e-6
        moved = float((theta - small.start).norm())
        assert moved <= bounds.movement.value * (1 + slack)
        apart = float((theta - small.start - twin.delta).norm())
        assert apart <= bounds.parameters.value * (1 + slack) + 1e-9
        assert float((f - twin.outputs).norm()) <= bounds.outputs.value + 1e-9
        if strength:
            assert float((f - free.outputs).norm()) <= bounds.published.value + 1e-9
        else:
            assert bounds.published.value is None


def test_the_corrected_bound_falls_as_lambda_squared_and_the_published_does_not():
    constants = Lipschitz(start=1.0, outputs=1.2, jacobian=0.8, radius=5.0)
    strengths = np.array([1e2, 1e3, 1e4])
    bounds = [flow_bounds(constants, 2.0, s, time=1.0) for s in strengths]
    assert slope(strengths, [b.outputs.value for b in bounds]) == pytest.approx(
        -2, abs=0.05
    )
    published = [b.published.value for b in bounds]
    # 2 L^2 ||r0|| t is its limit.
    assert published[-1] == pytest.approx(2 * 1.2**2 * 2.0, rel=0.01)
    ends = [minimiser_bounds(constants, 2.0, s) for s in strengths]
    assert slope(strengths, [e.outputs.value for e in ends]) == pytest.approx(
        -2, abs=0.05
    )


def test_published_bounds_are_their_formulas():
    L, B, r, R, lam, t = 1.2, 0.8, 2.0, 5.0, 3.0, 0.7
    constants = Lipschitz(start=1.0, outputs=L, jacobian=B, radius=R)
    result = flow_bounds(constants, r, lam, time=t)
    assert result.critical_strength == pytest.approx(2 * r * L / R)
    assert critical_strength(constants, r, scale=0.1) == pytest.approx(0.2 * r * L / R)
    gone = 1 - np.exp(-lam * t)
    assert result.movement.value == pytest.approx(2 * L * r * gone / lam)
    b = 2 * L**2 * r * (4 / lam * B * r + 1)
    assert result.published.value == pytest.approx(b * (t - gone / lam))
    simplified = 2 * L * r * (2 * R * B + L) * t
    assert result.published_simplified.value == pytest.approx(simplified)
    D = 2 * L * r * gone / lam
    distance = gone / lam * (2 * B * D * r + L * B * D**2)
    assert result.parameters.value == pytest.approx(distance)
    assert result.outputs.value == pytest.approx(distance + B / 2 * D**2)
    always = flow_bounds(constants, r, lam)
    assert always.movement.value == pytest.approx(2 * L * r / lam)
    assert always.outputs.value > result.outputs.value
    # A mean over ten examples is the flow of the sum, ten times slower.
    slow = flow_bounds(constants, r, lam / 10, time=10 * t, scale=0.1)
    for name in ("movement", "published", "published_simplified", "outputs"):
        assert getattr(slow, name).value == pytest.approx(getattr(result, name).value)
    assert "lambda = 0" in result.published.conditions
    assert "same lambda" in result.outputs.conditions


def test_bounds_outside_of_their_conditions_are_vacuous():
    constants = Lipschitz(start=1.0, outputs=1.0, jacobian=1.0, radius=1.0)
    names = ("movement", "published", "published_simplified", "parameters", "outputs")

    def vacuous(bounds, of=names):
        for name in of:
            bound = getattr(bounds, name)
            assert (bound.value is None) == bound.note.startswith("vacuous: "), name
        return {name for name in of if getattr(bounds, name).value is None}

    # lambda_0 is 4.
    assert vacuous(flow_bounds(constants, 2.0, 5.0, time=1.0)) == set()
    assert vacuous(flow_bounds(constants, 2.0, 5.0)) == {*names[1:3]}
    below = flow_bounds(constants, 2.0, 3.0)
    assert vacuous(below) == set(names)
    assert "lambda = 3 is below lambda_0 = 4" in below.outputs.note
    # (1 / 3) ln(1 / (1 - 3 / 4)) = 0.462: before that time training is in the ball.
    early = flow_bounds(constants, 2.0, 3.0, time=0.46)
    assert vacuous(early) == {"published_simplified"}
    assert vacuous(flow_bounds(constants, 2.0, 3.0, time=0.47)) == set(names)
    path = flow_bounds(constants, 2.0, 3.0, time=9.0, along_path=True)
    assert vacuous(path) == {"published_simplified"}
    none = flow_bounds(constants, 2.0, 0.0, time=0.1)
    assert vacuous(none) == {"published", "published_simplified"}
    assert "it takes lambda > 0" in none.published.note
    assert none.movement.value == pytest.approx(0.4)
    assert vacuous(flow_bounds(constants, 2.0, 0.0)) == set(names)
    ends = ("movement", "linear_movement", "remainder", "parameters", "outputs")
    assert vacuous(minimiser_bounds(constants, 2.0, 0.0), ends) == set(ends)
    result = minimiser_bounds(constants, 2.0, 4.0, movement=2.0, scale=0.5)
    assert vacuous(result, ends) == {"remainder", "parameters", "outputs"}
    assert "theta* may be 2 from theta0, out of the ball of 1" in result.outputs.note
    assert vacuous(minimiser_bounds(constants, 0.5, 4.0, scale=0.5), ends) == set()
    for options in ({"strength": -1.0}, {"strength": 1.0, "time": -1.0}):
        with pytest.raises(ValueError, match=r"=-1.0 must be a number of at least 0"):
            flow_bounds(constants, 2.0, **options)
