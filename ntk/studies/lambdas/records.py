"""Records of a lambda study: regularised fine-tuning and its linearised twin.

Both start at the same weights and take the same steps on the same examples with the
same optimizer, learning rate and lambda, without dropout; they are compared at the end
of training. The objective is the *mean* loss over training examples plus
(lambda / 2) ||theta - theta0||^2. Rahimi Afzal et al. (2025) use the sum, so their
lambda is n times ours. With several learning rates, fine-tuning chooses one on dev and
the twin uses it too.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ntk.gradients import Batch
from ntk.linearization import (
    Bound,
    LinearizedModel,
    evaluated,
    exact_lipschitz,
    flow_bounds,
    loss_scale,
    minimiser_bounds,
    taylor_remainder,
)
from ntk.linearization.closeness import closeness
from ntk.linearization.tabulated import tabulated
from ntk.studies.folder import Cell, Record
from ntk.studies.protocol import Protocol
from rocoft.data import Example
from rocoft.training import (
    LEARNING_RATES,
    Anchor,
    Loss,
    fine_tune,
    parse_method,
    readout_loss,
)

Optimizer = Literal["adamw", "sgd"]

OPTIMIZERS: dict[Optimizer, dict[str, Any]] = {
    "adamw": {},
    "sgd": {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    },
}
"""Arguments of the Trainer. AdamW is that of `rocoft.training.search.PROTOCOL`, with
warm-up and decay; SGD has a constant step size and no clipping."""

FRACTIONS = (0.5, 1.0)
"""Fractions of theta - theta0 at which Lipschitz constants are measured."""

PATH = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the steps of gradient descent after which they are measured too."""

SAME_END = 1e-2
"""Relative distance of two ends of the same descent, at most: training is in single
precision."""


SELECTIVE = "a selective pull is the gradient of no objective"


class Bounded(NamedTuple):
    """The quantity that a bound bounds.

    Attributes:
        title: Title of the bound.
        of: Name of the quantity, measured on the training examples.
        measure: Dotted path of the quantity in a record; None for the distance to the
            linear twin trained with lambda = 0.
    """

    title: str
    of: str
    measure: str | None


_GAP = "train.output_distance"
_TO_FREE = "gap to the linear twin with lambda = 0"
BOUNDED = {
    "movement": Bounded("movement under flow", "movement", "train.movement"),
    "descent": Bounded("movement at the minimiser", "movement", "train.movement"),
    "published": Bounded("published", _TO_FREE, None),
    "published_simplified": Bounded("published (simplified)", _TO_FREE, None),
    "flow": Bounded("corrected, under flow", "gap", _GAP),
    "minimiser": Bounded("corrected, at the minimisers", "gap", _GAP),
    "parameters": Bounded(
        "corrected, of parameters", "parameter distance", "train.parameter_distance"
    ),
}
"""Bounded quantities by name of the bound."""


@dataclass(frozen=True)
class Training:
    """The settings that fine-tuning and its linear twin share.

    Attributes:
        method: Method in the notation of `rocoft.training.methods.parse_method`.
        strength: lambda.
        loss: The loss.
        optimizer: Name in `OPTIMIZERS`.
        selective: Whether the penalty applies only where it agrees with the descent.
    """

    method: str
    strength: float
    loss: Loss = "cross_entropy"
    optimizer: Optimizer = "adamw"
    selective: bool = False

    @property
    def name(self) -> str:
        """The subject of a record; the loss is its kind."""
        more = " selective" if self.selective else ""
        other = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        return f"{self.method} lambda={self.strength:g}{more}{other}"

    @property
    def anchor(self) -> Anchor:
        """The penalty that keeps both near their start."""
        return Anchor(self.strength, self.selective)


def learning_rates(method: str, protocol: Protocol) -> Sequence[float]:
    """Return the learning rates that fine-tuning chooses from.

    Args:
        method: Method in the notation of `rocoft.training.methods.parse_method`.
        protocol: Settings of the study.

    Returns:
        The given rates, or the middle one of the method's default rates.
    """
    defaults = LEARNING_RATES[parse_method(method).kind]
    return protocol.rates.get(method) or defaults[len(defaults) // 2 :][:1]


def linearization_records(
    protocol: Protocol, cell: Cell, training: Training, subjects: Sequence[str]
) -> list[Record]:
    """Fine-tune, train the linear twin, and compare them.

    Args:
        protocol: Settings of the study.
        cell: The split.
        training: The settings that both share.
        subjects: The name of the training.

    Returns:
        A record for each subject.
    """
    return [_record(protocol, cell, training) for _ in subjects]


def _record(protocol: Protocol, cell: Cell, training: Training) -> Record:
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    # Test examples are predicted below in batches, which is faster.
    without_test = replace(split, test=split.dev)
    method = training.method

    def trained(rates: Sequence[float], **more: Any) -> tuple[Any, Record]:
        result = fine_tune(
            backbone,
            without_test,
            method,
            lrs=rates,
            arguments={**protocol.arguments, **OPTIMIZERS[training.optimizer]},
            seed=cell.seed,
            loss=training.loss,
            dropout=False,
            keep="last",
            anchor=training.anchor,
            # Both models have the same rate, so that it need not be the best one, and
            # plain gradient descent is stable at the given ones.
            extensions=0,
            **more,
        )
        return result.model, result.record

    tuned, of_tuned = trained(learning_rates(method, protocol))
    rate = of_tuned["learning_rate"]
    linear, of_linear = trained([rate], wrap=tabulated)
    assert of_linear["steps"] == of_tuned["steps"]
    (train, of_train), (test, of_test) = (
        _examples(backbone, part, protocol) for part in (split.train, split.test)
    )
    close = closeness(linear, tuned, train, labels=of_train)
    delta = linear.coordinates(tuned)
    if not delta.any():
        raise ValueError(
            f"fine-tuning by {method} did not move in {of_tuned['steps']} steps, so "
            "there is nothing to compare. Give more --num-train-epochs, or other --lrs."
        )
    states = _states(training, linear, tuned, delta, train, of_train)
    record = {
        "model": backbone.name,
        "metric": "accuracy",
        "notes": [*split.notes, *backbone.notes],
        **asdict(training),
        "learning_rate": rate,
        "steps": of_tuned["steps"],
        "batch": protocol.arguments["per_device_train_batch_size"],
        "examples": [len(split.train), len(split.dev), len(split.test)],
        "parameters": of_tuned["parameters"]["trainable"],
        "grid": {
            f"{run['learning_rate']:g}": run["dev"]
            for run in of_tuned["learning_rates"]
        },
        "test": asdict(closeness(linear, tuned, test, labels=of_test)),
        "train": asdict(close),
        "taylor": asdict(taylor_remainder(linear, delta, train)),
        "states": states,
        "outputs": {
            "tuned": evaluated(tuned, train).tolist(),
            "linear": linear.predict(train).tolist(),
        },
    }
    if training.loss == "squared":
        record["bounds"] = bounds(record, linear, delta, train, of_train)
    return {**record, "seconds": time.perf_counter() - start}


def bounds(
    record: Record,
    linear: LinearizedModel,
    delta: Tensor,
    batches: Sequence[Batch],
    labels: Tensor,
) -> Record:
    """Return the bounds for squared loss, with measured constants.

    The constants are maxima over theta0 and `FRACTIONS` of the line to the fine-tuned
    weights. Those of the bounds under flow are maxima over the same fractions of the
    lines to the points of the descent after `PATH` of its steps. The bound at the
    minimisers accounts for incomplete convergence by the norms of both final gradients.

    Args:
        record: Record of the two trainings, without bounds.
        linear: The linearised model.
        delta: ``(p,)`` fine-tuned minus initial parameters.
        batches: The training examples.
        labels: ``(n,)`` labels in the order of the batches.

    Returns:
        ``"constants"``, ``"path_constants"`` (None if training follows no gradient
        flow), ``"critical_strength"`` (lambda_0), ``"time"`` of the gradient flow that
        steps of gradient descent follow, and the bounds of `BOUNDED`.
    """
    targets = _one_hot(labels, linear.start(batches))
    residual = float((linear.start(batches).double() - targets).norm())
    left = float((targets.new_tensor(record["outputs"]["tuned"]) - targets).norm())
    strength, scale = record["strength"], loss_scale("mean", len(labels))
    constants = exact_lipschitz(linear, batches, _on_lines_to([delta]))
    reason, of_path = _no_flow(record, constants.outputs, scale), None
    if not reason:
        path = _descent(record, linear, batches, labels)
        apart = float((path[-1] - delta).norm())
        if apart <= SAME_END * float(delta.norm()):
            of_path = exact_lipschitz(linear, batches, _on_lines_to(path))
            reason = _no_flow(record, of_path.outputs, scale)
    flows = record["optimizer"] == "sgd"
    span = record["learning_rate"] * record["steps"] if flows else None
    flow = flow_bounds(
        of_path or constants,
        residual,
        strength,
        time=0.0 if span is None else span,
        scale=scale,
        along_path=of_path is not None,
    )
    ends = record["states"]
    minimiser = minimiser_bounds(
        constants,
        residual,
        strength,
        movement=record["train"]["movement"],
        final_residual=left,
        # The twin's objective is lambda-strongly convex, so the twin is at most
        # |g| / lambda away from the minimiser.
        gradient=ends["tuned"]["gradient"] + ends["linear"]["gradient"],
        scale=scale,
    )
    from_start = minimiser_bounds(constants, residual, strength, scale=scale)
    bounds_by_name = {
        "movement": flow.movement,
        "published": flow.published,
        "published_simplified": flow.published_simplified,
        "flow": flow.outputs,
    }
    if reason:
        # Where there is no flow, it does not matter which ball it would stay in.
        bounds_by_name = {
            name: replace(bound, value=None, note=f"vacuous: {reason}")
            for name, bound in bounds_by_name.items()
        }
    bounds_by_name["descent"] = from_start.movement
    if ends["tuned"]["objective"] > ends["start"]["objective"]:
        higher = "the objective is above that of the start"
        bounds_by_name["descent"] = _vacuous(from_start.movement, higher)
    bounds_by_name["minimiser"] = minimiser.outputs
    bounds_by_name["parameters"] = minimiser.parameters
    if record["selective"]:
        for name in ("descent", "minimiser", "parameters"):
            bounds_by_name[name] = _vacuous(bounds_by_name[name], SELECTIVE)
    return {
        "constants": asdict(constants),
        "path_constants": of_path and asdict(of_path),
        "critical_strength": flow.critical_strength,
        "time": span,
        **{name: asdict(bound) for name, bound in bounds_by_name.items()},
    }


def _on_lines_to(ends: Sequence[Tensor]) -> list[Tensor]:
    """Return points on the lines from theta0 to each end."""
    return [fraction * end for end in ends for fraction in FRACTIONS]


def _descent(
    record: Record, linear: LinearizedModel, batches: Sequence[Batch], labels: Tensor
) -> list[Tensor]:
    """Repeat a training by gradient descent, of which only the end was kept.

    All examples are in every step and nothing is random: start, step size and lambda
    decide the path.

    Returns:
        The coordinates ``(p,)`` after each part `PATH` of the steps.
    """
    steps, places = record["steps"], []
    at = {max(1, round(fraction * steps)) for fraction in PATH}
    delta = torch.zeros_like(linear.delta, dtype=torch.float64)
    for step in range(1, steps + 1):
        model = linear.at(delta.to(linear.delta))
        *_, gradient = _objective(
            *(model, model.start(batches), delta, batches, labels),
            *(record["loss"], record["strength"]),
        )
        delta = delta - record["learning_rate"] * gradient
        if step in at:
            places.append(delta.to(linear.delta))
    return places


def _no_flow(record: Record, largest: float, scale: float) -> str:
    """Return why training does not follow gradient flow; empty if it does."""
    if record["selective"]:
        return SELECTIVE
    if record["optimizer"] != "sgd":
        return "AdamW follows no gradient flow"
    if record["batch"] < record["examples"][0]:
        return (
            f"steps on {record['batch']} of {record['examples'][0]} examples follow no "
            "gradient flow"
        )
    curvature = record["strength"] + 2 * scale * largest**2
    if record["learning_rate"] * curvature > 1:
        return (
            f"steps of {record['learning_rate']:g} at a curvature of up to "
            f"{curvature:.3g} are too long to follow a gradient flow"
        )
    return ""


def _vacuous(bound: Bound, reason: str) -> Bound:
    reasons = "; ".join(filter(None, [bound.note.removeprefix("vacuous: "), reason]))
    return replace(bound, value=None, note=f"vacuous: {reasons}")


def _states(
    training: Training,
    linear: LinearizedModel,
    tuned: nn.Module,
    delta: Tensor,
    batches: Sequence[Batch],
    labels: Tensor,
) -> Record:
    """Return loss, objective and gradient norm at the start and at both ends."""
    places = {
        "start": (linear, linear.start(batches), torch.zeros_like(delta)),
        "tuned": (linear.at(delta), evaluated(tuned, batches), delta),
        "linear": (linear, linear.predict(batches), linear.delta.detach()),
    }
    states = {}
    for name, (model, outputs, shift) in places.items():
        loss, objective, gradient = _objective(
            *(model, outputs, shift, batches, labels),
            *(training.loss, training.strength),
        )
        states[name] = {
            "loss": loss,
            "objective": objective,
            "gradient": float(gradient.norm()),
        }
    return states


def _objective(
    model: LinearizedModel,
    outputs: Tensor,
    shift: Tensor,
    batches: Sequence[Batch],
    labels: Tensor,
    loss: Loss,
    strength: float,
) -> tuple[float, float, Tensor]:
    """Return loss, objective and its gradient ``(p,)`` at a shift of the parameters.

    The model is linearised there, or is the twin, whose Jacobian is the same
    everywhere.
    """
    values = outputs.detach().double().requires_grad_()
    value = readout_loss(values, labels, loss)
    (cotangent,) = torch.autograd.grad(value, values)
    gradient = model.vjp(batches, cotangent).double() + strength * shift
    penalty = strength / 2 * float(shift.double().square().sum())
    return value.item(), value.item() + penalty, gradient


def _one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, outputs.shape[1]).to(outputs.double())


def _examples(
    backbone: Any, examples: Sequence[Example], protocol: Protocol
) -> tuple[list[Batch], Tensor]:
    """Return batches on the device and the labels in the order of the batches."""
    batches, order = backbone.encode(examples, protocol.batch_size)
    placed: list[Batch] = [
        {name: tensor.to(protocol.device) for name, tensor in batch.items()}
        for batch in batches
    ]
    labels = torch.tensor([examples[i].label for i in order], device=protocol.device)
    return placed, labels
