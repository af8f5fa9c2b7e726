"""Solutions of the linearised model, against the Jacobian and against training."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import BY_NAME, Lambda, text
from dense import assert_close, gradients
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import nn

from ntk.linearization.closed_form import ClosedForm, loss_scale
from ntk.linearization.model import linearize
from ntk.spaces.kinds import Full, Head, LoRA, Rows

MLP = BY_NAME["mlp"]


def targets(n, c, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, generator=generator, dtype=torch.float64)


def dense(model, inputs):
    """Return J ``(n c, p)``, concatenated over parameters, by plain backward passes."""
    rows = [g.flatten(2) for g in gradients(model, inputs).values()]
    return torch.cat(rows, dim=2).flatten(0, 1)


def optimised(linear, inputs, loss, strength):
    """Return delta after L-BFGS on loss + penalty; the module itself is trained."""
    optimizer = torch.optim.LBFGS(
        linear.parameters(),
        max_iter=400,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=60,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        outputs = (
            linear(inputs) if isinstance(inputs, torch.Tensor) else linear(**inputs)
        )
        value = loss(outputs) + strength / 2 * linear.delta.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return linear.delta.detach().clone(), closure().item()


# Squared loss.


@given(
    st.integers(1, 12),
    st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    st.sampled_from(["mean", "sum"]),
)
def test_ridge_solves_the_normal_equations(n, strength, reduction):
    model, x = MLP.build(), MLP.inputs(n)
    linear = linearize(model, Full())
    y = targets(n, 2)
    result = ClosedForm(linear, x).ridge(y, strength, reduction=reduction)
    J, f0 = dense(model, x), model(x).detach()
    r, rho = (y - f0).flatten(), 1 / n if reduction == "mean" else 1.0
    if strength:
        identity = torch.eye(J.shape[1], dtype=J.dtype)
        curvature = 2 * rho * J.T @ J + strength * identity
        delta = torch.linalg.solve(curvature, 2 * rho * J.T @ r)
    else:
        delta = torch.linalg.pinv(J, rtol=1e-12) @ r
    left = r - J @ delta
    assert_close(result.delta, delta, 1e-9)
    assert_close(result.outputs, y - left.view(n, 2), 1e-9)
    assert_close(result.residuals, left.view(n, 2), 1e-8, floor=1e-9)
    assert result.movement == pytest.approx(float(delta.norm()), rel=1e-9)
    loss = float(rho * left @ left)
    assert result.loss == pytest.approx(loss, rel=1e-6, abs=1e-14)
    penalty = strength / 2 * float(delta @ delta)
    assert result.objective == pytest.approx(loss + penalty, rel=1e-8, abs=1e-14)
    if strength:
        s = strength / (2 * rho)
        optimum = torch.linalg.solve(J @ J.T + s * torch.eye(2 * n, dtype=J.dtype), r)
        assert result.objective == pytest.approx(float(strength / 2 * r @ optimum))


@pytest.mark.parametrize(
    ("name", "space"),
    [("mlp", Full()), ("bert", Rows(1) + Head()), ("gpt2-lora", LoRA())],
)
def test_ridge_is_where_training_ends(name, space):
    family = BY_NAME[name]
    inputs = family.inputs(4)
    linear = linearize(family.build(), space)
    y = targets(4, 2)
    result = ClosedForm(linear, inputs).ridge(y, 0.05)
    loss = lambda f: (f - y).square().sum() / 4
    delta, value = optimised(linear, inputs, loss, 0.05)
    assert delta.norm() > 0.1
    assert_close(result.delta, delta, 1e-6)
    assert result.objective == pytest.approx(value, rel=1e-9)
    assert_close(result.predict(inputs), result.outputs, 1e-9)


def test_one_output_has_the_trainers_mean_squared_error():
    def forward(m, x):
        return m.head(torch.tanh(m.layer(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {"layer": nn.Linear(8, 3), "head": nn.Linear(3, 1)}
        model = Lambda(forward, **layers).double()
    x, y = MLP.inputs(6), targets(6, 1)[:, 0]
    linear = linearize(model, Full())
    result = ClosedForm(linear, x).ridge(y, 0.02)
    assert result.loss == pytest.approx(float(F.mse_loss(result.outputs[:, 0], y)))
    delta, value = optimised(linear, x, lambda f: F.mse_loss(f[:, 0], y), 0.02)
    assert_close(result.delta, delta, 1e-6)
    assert result.objective == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", ["mlp", "bert", "bloom"])
def test_predictions_by_kernel_and_by_jvp_agree(name):
    family = BY_NAME[name]
    if name == "mlp":
        train, test = family.inputs(9)[:4], family.inputs(9)[4:]
    else:
        train, test = text(4), text(3, length=5)
    linear = linearize(family.build(), Rows(2) + Head())
    form = ClosedForm(linear, train, batch_size=3)
    y = targets(4, 2)
    for result in (
        form.ridge(y, 0.1),
        form.flow(y, 2.0),
        form.logistic([0, 1, 1, 0], 0.1),
    ):
        by_kernel = result.predict(test, by="kernel", batch_size=2)
        assert_close(result.predict(test), by_kernel)
        assert (by_kernel - linear.start(test)).abs().max() > 1e-3
        assert_close(result.predict(train, by="kernel"), result.outputs)


# Gradient flow.


@pytest.mark.parametrize("strength", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_flow_is_the_solution_of_its_equation(strength, reduction):
    n = 5
    model, x = MLP.build(), MLP.inputs(n)
    form, y = ClosedForm(linearize(model, Full()), x), targets(n, 2)
    J = dense(model, x).numpy()
    r = (y - model(x).detach()).flatten().numpy()
    rho = 1 / n if reduction == "mean" else 1.0

    def slope(_, delta):
        return 2 * rho * J.T @ (r - J @ delta) - strength * delta

    times = [0.0, 0.01, 0.3, 2.0]
    path = solve_ivp(
        slope,
        (0, times[-1]),
        np.zeros(J.shape[1]),
        method="DOP853",
        t_eval=times,
        rtol=1e-11,
        atol=1e-13,
    )
    for t, expected in zip(times, path.y.T, strict=True):
        result = form.flow(y, t, strength, reduction=reduction)
        assert_close(result.delta, torch.from_numpy(expected), 1e-8, floor=1e-12)
        left = torch.from_numpy(r - J @ expected).view(n, 2)
        assert_close(result.residuals, left, 1e-8)
        value = rho * float(left.square().sum()) + strength / 2 * expected @ expected
        assert result.objective == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_gradient_flow_ends_at_the_minimiser(strength):
    form, y = ClosedForm(linearize(MLP.build(), Full()), MLP.inputs(4)), targets(4, 2)
    end, late = form.ridge(y, strength), form.flow(y, 1e12, strength)
    assert_close(late.delta, end.delta, 1e-9)
    values = [form.flow(y, t, strength).objective for t in (0, 0.1, 1, 10, math.inf)]
    assert values == sorted(values, reverse=True)


def test_steps_of_gradient_descent_follow_the_flow():
    form, y = ClosedForm(linearize(MLP.build(), Full()), MLP.inputs(4)), targets(4, 2)
    linear = form.linear
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = 0.15 * linear.delta.square().sum()
        ((linear(MLP.inputs(4)) - y).square().sum() / 4 + penalty).backward()
        optimizer.step()
    result = form.flow(y, 0.2, 0.3)
    error = (result.delta - linear.delta.detach()).norm() / result.movement
    assert 1e-6 < error < 1e-2


# Logistic loss.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("classes", "labels"),
    [(1, [0, 1, 1, 1, 0]), (2, [1, 1, 0, 1, 0]), (3, [0, 1, 2, 1, 1]), (3, [0, 2] * 2)],
)
def test_logistic_is_where_training_ends(classes, labels, reduction):
    def forward(m, x):
        return m.head(torch.tanh(m.layer(x)))

    layers = {"layer": nn.Linear(8, 4), "head": nn.Linear(4, classes)}
    model = Lambda(forward, **layers).double()
    n, y = len(labels), torch.tensor(labels)
    x, linear = MLP.inputs(n), linearize(model, Full())
    result = ClosedForm(linear, x).logistic(y, 0.1, reduction=reduction)

    def loss(f):
        if classes == 1:
            return F.binary_cross_entropy_with_logits(
                f[:, 0], y.double(), reduction=reduction
            )
        return F.cross_entropy(f, y, reduction=reduction)

    delta, value = optimised(linear, x, loss, 0.1)
    assert delta.norm() > 0.1
    assert_close(result.delta, delta, 1e-6)
    assert_close(result.outputs, linear.predict(x), 1e-6)
    assert result.objective == pytest.approx(value, rel=1e-9)
    assert result.movement == pytest.approx(float(delta.norm()), rel=1e-6)
    assert result.loss == pytest.approx(float(loss(result.outputs)), rel=1e-9)
    # The condition of the optimum: lambda dual = rho residuals.
    rho = loss_scale(reduction, n)
    assert_close(0.1 * result.dual, rho * result.residuals, 1e-5)


# What is refused.


def test_refused():
    form = ClosedForm(linearize(MLP.build(), Full()), MLP.inputs(3))
    y = targets(3, 2)
    with pytest.raises(ValueError, match="strength=-1 must be a number of at least 0"):
        form.ridge(y, -1)
    with pytest.raises(ValueError, match=r"strength=0 must be a number above 0"):
        form.logistic([0, 1, 1], 0)
    with pytest.raises(ValueError, match="time=nan must be a number"):
        form.flow(y, math.nan)
    with pytest.raises(
        ValueError, match=r"targets has shape \(3,\); expected \(3, 2\)"
    ):
        form.ridge([1.0, 2.0, 3.0], 1)
    with pytest.raises(ValueError, match=r"from 0 to 1, the output indices"):
        form.logistic([0, 1, 2], 1)
    with pytest.raises(ValueError, match="reduction='none' must be one of mean, sum"):
        form.ridge(y, 1, reduction="none")
    with pytest.raises(ValueError, match="by='J' must be one of jvp, kernel"):
        form.ridge(y, 1).predict(MLP.inputs(3), by="J")
    idle = Lambda(lambda m, x: m.head(x), head=nn.Linear(8, 2), idle=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the kernel of space 'full@idle' is zero"):
        ClosedForm(linearize(idle.double(), Full().at("idle")), MLP.inputs(3))
