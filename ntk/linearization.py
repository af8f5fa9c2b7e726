"""One split of a lambda study: fine-tuning held near its start beside its linear twin.

Both begin at the same weights, take the same number of steps on the same examples in
the same order with the same optimizer, learning rate and lambda, without dropout, and
are looked at where their training ends. The objective is the *mean* loss over training
examples + (lambda / 2) ||theta - theta0||^2; that of Rahimi Afzal et al. (2025) has the
sum, so that their lambda is n times ours. Where a method has several learning rates
fine-tuning chooses among them on dev and its twin takes the same.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ntk.closed_form import loss_scale
from ntk.closeness import closeness, taylor_remainder
from ntk.closeness_bounds import Bound, flow_bounds, minimiser_bounds
from ntk.function import Batch
from ntk.linearization_training import exact_lipschitz, tabulated
from ntk.linearize import LinearizedModel, evaluated
from ntk.protocol import Protocol
from ntk.study import Cell, Record
from rocoft.anchor import Anchor
from rocoft.methods import LEARNING_RATES, parse_method
from rocoft.readout_trainer import Loss, readout_loss
from rocoft.tasks import Example
from rocoft.trainer import fine_tune

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
"""Arguments of the Trainer. AdamW is that of `rocoft.search.PROTOCOL`, warmed up and
decaying; SGD is gradient descent of one step size, without clipping."""

FRACTIONS = (0.5, 1.0)
"""Of the way to the fine-tuned model, where Lipschitz constants are measured."""


class Bounded(NamedTuple):
    """What a bound of a record bounds.

    Attributes:
        title: Of the bound.
        of: What it bounds, on the training examples, in words.
        measure: Where that lies in a record; None for the distance to the linear twin
            that was trained with lambda = 0.
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
"""By name of a bound."""


@dataclass(frozen=True)
class Training:
    """What fine-tuning and its linear twin have in common.

    Attributes:
        method: As `rocoft.methods.parse_method` reads it.
        strength: lambda.
        loss: Of labels.
        optimizer: Of `OPTIMIZERS`.
        selective: Whether lambda pulls only where that agrees with the descent.
    """

    method: str
    strength: float
    loss: Loss = "cross_entropy"
    optimizer: Optimizer = "adamw"
    selective: bool = False

    @property
    def name(self) -> str:
        """The subject of a record, without the loss, which is its kind."""
        more = " selective" if self.selective else ""
        other = "" if self.optimizer == "adamw" else f" {self.optimizer}"
        return f"{self.method} lambda={self.strength:g}{more}{other}"

    @property
    def anchor(self) -> Anchor:
        """What holds both at their start."""
        return Anchor(self.strength, self.selective)


def learning_rates(method: str, protocol: Protocol) -> Sequence[float]:
    """Return the learning rates that fine-tuning chooses among.

    Args:
        method: As `rocoft.methods.parse_method` reads it.
        protocol: Of the study.

    Returns:
        Those that were given, or the middle one of the method's own.
    """
    own = LEARNING_RATES[parse_method(method).kind]
    return protocol.rates.get(method) or own[len(own) // 2 :][:1]


def linearization_records(
    protocol: Protocol, cell: Cell, training: Training, subjects: Sequence[str]
) -> list[Record]:
    """Fine-tune, train the linear twin, and compare them.

    Args:
        protocol: Of the study.
        cell: The split.
        training: What both have in common.
        subjects: Its name.

    Returns:
        A record.
    """
    return [_record(protocol, cell, training) for _ in subjects]


def _record(protocol: Protocol, cell: Cell, training: Training) -> Record:
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    # Test examples are predicted below, at less cost than one by one.
    without_test = replace(split, test=split.dev)
    method = training.method

    def trained(rates: Sequence[float], **more: Any) -> tuple[Any, Record]:
        found = fine_tune(
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
            **more,
        )
        return found.model, found.record

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
    """Return the bounds of squared loss, with constants measured on the way.

    The constants are the largest at theta0 and at `FRACTIONS` of the straight way to
    the fine-tuned weights. At the minimisers a training that has not converged is
    accounted for by the gradients that both leave.

    Args:
        record: Of the two trainings, without bounds.
        linear: The linearised model.
        delta: ``(p,)``, where fine-tuning ended.
        batches: The training examples.
        labels: ``(n,)``.

    Returns:
        ``"constants"``, ``"critical_strength"`` (lambda_0), ``"time"`` of the gradient
        flow that steps of gradient descent follow, and the bounds of `BOUNDED`.
    """
    targets = _one_hot(labels, linear.start(batches))
    residual = float((linear.start(batches).double() - targets).norm())
    left = float((targets.new_tensor(record["outputs"]["tuned"]) - targets).norm())
    strength, scale = record["strength"], loss_scale("mean", len(labels))
    points = [fraction * delta for fraction in FRACTIONS]
    constants = exact_lipschitz(linear, batches, points)
    flows = record["optimizer"] == "sgd"
    span = record["learning_rate"] * record["steps"] if flows else None
    flow = flow_bounds(
        constants,
        residual,
        strength,
        time=0.0 if span is None else span,
        scale=scale,
        along_path=True,
    )
    ends = record["states"]
    minimiser = minimiser_bounds(
        constants,
        residual,
        strength,
        movement=record["train"]["movement"],
        final_residual=left,
        # The twin's objective is lambda-convex: it is |g| / lambda from its minimiser.
        gradient=ends["tuned"]["gradient"] + ends["linear"]["gradient"],
        scale=scale,
    )
    at_most = minimiser_bounds(constants, residual, strength, scale=scale)
    found = {
        "movement": flow.movement,
        "published": flow.published,
        "published_simplified": flow.published_simplified,
        "flow": flow.outputs,
    }
    reason = _no_flow(record, constants.outputs, scale)
    if reason:
        found = {name: _vacuous(bound, reason) for name, bound in found.items()}
    found["descent"] = at_most.movement
    if ends["tuned"]["objective"] > ends["start"]["objective"]:
        higher = "the objective is above that of the start"
        found["descent"] = _vacuous(at_most.movement, higher)
    found["minimiser"], found["parameters"] = minimiser.outputs, minimiser.parameters
    if record["selective"]:
        reason = "a selective pull is the gradient of no objective"
        found = {name: _vacuous(bound, reason) for name, bound in found.items()}
    return {
        "constants": asdict(constants),
        "critical_strength": flow.critical_strength,
        "time": span,
        **{name: asdict(bound) for name, bound in found.items()},
    }


def _no_flow(record: Record, largest: float, scale: float) -> str:
    """Return why training is no gradient flow, nothing if steps follow one."""
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
    """Return loss, objective and its gradient's norm, at the start and both ends."""
    places = {
        "start": (linear, linear.start(batches), torch.zeros_like(delta)),
        "tuned": (linear.at(delta), evaluated(tuned, batches), delta),
        "linear": (linear, linear.predict(batches), linear.delta.detach()),
    }
    found = {}
    for name, (there, outputs, place) in places.items():
        values = outputs.double().requires_grad_()
        loss = readout_loss(values, labels, training.loss)
        (pull,) = torch.autograd.grad(loss, values)
        gradient = there.vjp(batches, pull).double() + training.strength * place
        penalty = training.strength / 2 * float(place.double().square().sum())
        found[name] = {
            "loss": loss.item(),
            "objective": loss.item() + penalty,
            "gradient": float(gradient.norm()),
        }
    return found


def _one_hot(labels: Tensor, outputs: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, outputs.shape[1]).to(outputs.double())


def _examples(
    backbone: Any, examples: Sequence[Example], protocol: Protocol
) -> tuple[list[Batch], Tensor]:
    """Return batches on the device, and the labels in their order."""
    batches, order = backbone.encode(examples, protocol.batch_size)
    placed: list[Batch] = [
        {name: tensor.to(protocol.device) for name, tensor in batch.items()}
        for batch in batches
    ]
    labels = torch.tensor([examples[i].label for i in order], device=protocol.device)
    return placed, labels
