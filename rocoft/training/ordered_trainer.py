"""transformers' Trainer as the search uses it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import SchedulerType, Trainer

from rocoft.training.meter import TrainLoss

_WITHOUT_WARMUP = {SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU}


class TrainingError(ValueError):
    """A training that cannot be done as asked, or that diverged."""


class OrderedTrainer(Trainer):
    """A Trainer that predicts in the order of the examples, and warms up in part.

    With sampling by length, transformers' Trainer predicts in the order of lengths and
    does not return that order. Its share of steps for the warm-up is rounded up, to all
    steps of a short training, of which the first has the rate 0.
    """

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulate a batch's gradient, and count its loss.

        Args:
            model: The model.
            inputs: A batch.
            num_items_in_batch: Number of labels in the optimizer step, for the loss.

        Returns:
            The batch's part of the step's loss.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrainLoss):
                callback.add(loss)
        return loss

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make the schedule of the learning rate, which leaves steps at the full rate.

        Args:
            num_training_steps: Number of optimizer steps.
            optimizer: The optimizer; None means the Trainer's.

        Returns:
            The schedule.

        Raises:
            TrainingError: If a number of warm-up steps is given that is at least that
                of all steps.
        """
        given = self.args.warmup_steps
        if (
            self.args.get_warmup_steps(num_training_steps) < num_training_steps
            or self.args.lr_scheduler_type in _WITHOUT_WARMUP
        ):
            return super().create_scheduler(num_training_steps, optimizer)
        if given >= 1:
            raise TrainingError(
                f"warmup_steps={given:g} would take all {num_training_steps} steps of "
                "the training, which would never reach its learning rate. Give less: "
                "a share of the steps below 1, or 0."
            )
        self.args.warmup_steps = num_training_steps - 1
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.warmup_steps = given
