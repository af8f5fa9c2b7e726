"""Fine-tuning with a penalty on the distance to the start.

The objective is loss + (lambda / 2) ||theta - theta0||^2 (Rahimi Afzal et al. 2025,
equation 1). theta are the trained parameters and theta0 their values before the first
step: zero for RoCoFT's differences, the drawn A and B = 0 for LoRA, the random
initialisation for a new head.

The penalty's gradient, lambda (theta - theta0), is added to the loss's once an
optimizer step: after the last accumulated batch and before clipping. So the clipped
gradient is that of the objective, and every optimizer, Adam and AdamW included, has the
objective's stationary points. A callback before the optimizer's step would come after
clipping: the loss's gradient would be bounded, the penalty's not, and a large lambda
would have another minimiser.

This is not weight decay, which pulls to zero. AdamW's decay also bypasses Adam's
scaling of each coordinate and so is the gradient of no penalty.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from rocoft.training.methods import trained_parameters


@dataclass(frozen=True)
class Anchor:
    """The penalty on the distance of the trained parameters to their start.

    Attributes:
        strength: lambda, in units of the loss over squared parameters: the objective is
            the Trainer's mean loss + (lambda / 2) ||theta - theta0||^2.
        selective: Apply the penalty only in steps where its descent does not raise the
            loss, <grad loss, theta - theta0> >= 0 over all trained parameters (Rahimi
            Afzal et al. 2025, equation 8). The loss then falls all along the gradient
            flow (theorem 1 there), which is the flow of no objective.
    """

    strength: float
    selective: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise ValueError(
                f"strength={self.strength!r} must be a finite number of at least 0; 0 "
                "means no penalty."
            )

    def pull(
        self, model: nn.Module, start: Mapping[str, Tensor], *, scale: float = 1.0
    ) -> bool:
        """Add the penalty's gradient to the gradients of the trained parameters.

        Args:
            model: The model, with the gradients of the loss.
            start: theta0 by name, from `starting_point`.
            scale: Factor of the loss's gradients (loss scaling against underflow).

        Returns:
            Whether the penalty was applied; with a strength above 0 always, unless it
            is selective.
        """
        if self.strength == 0:
            return False
        parameters = trained_parameters(model)
        with torch.no_grad():
            offsets = {name: p - start[name] for name, p in parameters.items()}
            if self.selective and not self._agrees(parameters, offsets):
                return False
            for name, parameter in parameters.items():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.add_(offsets[name], alpha=scale * self.strength)
        return True

    @staticmethod
    def _agrees(
        parameters: Mapping[str, nn.Parameter], offsets: Mapping[str, Tensor]
    ) -> bool:
        """Whether <grad loss, theta - theta0> is not negative."""
        products = [
            (parameter.grad.double() * offsets[name].double()).sum()
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
    """Return a subclass of a Trainer that applies the penalty.

    theta0 are the parameters when the Trainer is made. To resume a training, make the
    Trainer with the model as it was before training: it reads the checkpoint later.

    Args:
        kind: Any subclass of transformers' Trainer.
        anchor: The penalty.

    Returns:
        The subclass; it logs the loss without the penalty.
    """
    name = f"Anchored{kind.__name__}"
    subclass: Any = type(name, (_Anchored, kind), {"anchor": anchor})
    return subclass


class _Anchored(Trainer):
    """The first base class of an anchored Trainer."""

    anchor: Anchor
    start: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError(
                "model_init= makes another model at every training, whose start is "
                "unknown. Pass model= to an anchored Trainer."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "an anchored Trainer needs whole parameters and gradients; DeepSpeed "
                "and FSDP shard them. Train with data parallelism."
            )
        assert self.model is not None
        self.start = starting_point(self.model)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulate a batch's gradient, and after the last batch the penalty's.

        Args:
            model: The model.
            inputs: A batch.
            num_items_in_batch: Number of labels in the optimizer step, for the loss.

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
