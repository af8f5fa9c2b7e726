"""Fine-tuning that is held near its start: loss + (lambda / 2) ||theta - theta0||^2.

theta are the trained parameters alone and theta0 what they were before the first step:
of RoCoFT the differences, which start at zero, of LoRA the drawn A and B = 0, of a new
head its random start. Rahimi Afzal et al. (2025), equation 1.

The gradient of the penalty, lambda (theta - theta0), is added to that of the loss once
an optimizer step, when the last batch of the step has been accumulated and before
gradients are clipped. So whatever the accumulation, what is clipped and handed to the
optimizer is the gradient of the objective itself, and every optimizer has the
objective's stationary points for its own, Adam and AdamW included. Neither holds for a
callback before the optimizer's step: it comes after clipping, which then bounds the
pull that the loss can withstand, and a large lambda has another minimiser.

It is no weight decay. That pulls to zero, and AdamW does it past the moments of the
gradient, where Adam's scaling of each coordinate does not apply, so that it is the
penalty of no objective.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from rocoft.methods import trained_parameters


@dataclass(frozen=True)
class Anchor:
    """How strongly trained parameters are held at their start.

    Attributes:
        strength: lambda, in units of the loss over squared parameters: the objective is
            the trainer's mean loss + (lambda / 2) ||theta - theta0||^2.
        selective: Pull only in steps where that agrees with the descent of the loss,
            <grad loss, theta - theta0> >= 0 over all trained parameters (Rahimi Afzal
            et al. 2025, equation 8). Theorem 1 there: the loss then falls at every
            moment of the gradient flow, but the flow is that of no objective.
    """

    strength: float
    selective: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength={self.strength!r} must be a finite number of at least 0; 0 "
                "does not pull."
            )

    def pull(
        self, model: nn.Module, start: Mapping[str, Tensor], *, scale: float = 1.0
    ) -> bool:
        """Add the penalty's gradient to the gradients of the trained parameters.

        Args:
            model: The model, its gradients those of the loss.
            start: theta0 by name, as `starting_point` returns it.
            scale: Of the gradients, that of a loss that was scaled against underflow.

        Returns:
            Whether it pulled; always if it is not selective and above 0.
        """
        if self.strength == 0:
            return False
        parameters = trained_parameters(model)
        with torch.no_grad():
            moved = {name: p - start[name] for name, p in parameters.items()}
            if self.selective and not self._agrees(parameters, moved):
                return False
            for name, parameter in parameters.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(moved[name], alpha=scale * self.strength)
        return True

    @staticmethod
    def _agrees(
        parameters: Mapping[str, nn.Parameter], moved: Mapping[str, Tensor]
    ) -> bool:
        products = [
            (parameter.grad.double() * moved[name].double()).sum()
            for name, parameter in parameters.items()
            if parameter.grad is not None
        ]
        return bool(sum(products) >= 0)


def starting_point(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trained parameters, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trained_parameters(model).items()
    }


def anchored(kind: type[Trainer], anchor: Anchor) -> type[Trainer]:
    """Return a kind of Trainer that holds the trained parameters at their start.

    The start is what they are when the Trainer is made. So a training that is resumed
    goes on as if it had not been interrupted if the Trainer is made as before, of the
    model before it was trained: the checkpoint is read later.

    Args:
        kind: Any subclass of transformers' Trainer.
        anchor: How strongly.

    Returns:
        The subclass; it logs the loss without the penalty.
    """
    made: Any = type(f"Anchored{kind.__name__}", (_Anchored, kind), {"anchor": anchor})
    return made


class _Anchored(Trainer):
    """What `anchored` puts before a Trainer."""

    anchor: Anchor
    start: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError(
                "model_init= makes another model at every training, whose start is not "
                "known. Pass model= to an anchored Trainer."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "an anchored Trainer needs whole parameters and gradients; DeepSpeed "
                "and FSDP cut them. Train with data parallelism."
            )
        assert self.model is not None
        self.start = starting_point(self.model)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulate the gradient of a batch, and after the last one the penalty's.

        Args:
            model: The model.
            inputs: A batch.
            num_items_in_batch: As for the Trainer.

        Returns:
            The loss of the batch, without the penalty.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            assert self.model is not None
            self.anchor.pull(self.model, self.start, scale=scale)
        return loss
