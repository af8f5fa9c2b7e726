"""transformers' Trainer as searches use it, and that of modules that return logits."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import SchedulerType, Trainer

from rocoft.models import logits
from rocoft.training.meter import TrainLoss

Loss = Literal["cross_entropy", "squared"]
_WITHOUT_WARMUP = {SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU}


def readout_loss(
    outputs: Tensor,
    labels: Tensor,
    loss: Loss = "cross_entropy",
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the mean loss over examples, in float32 or better.

    Args:
        outputs: ``(n, labels)``; for scores the first output is the prediction.
        labels: ``(n,)``, integer class labels, or real scores.
        loss: For classes, cross-entropy or the squared distance to one-hot targets,
            summed over outputs. Scores always have the squared error.
        smoothing: Share of each target that is spread over all labels.

    Returns:
        A scalar.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if labels.is_floating_point():
        return F.mse_loss(outputs[:, 0], labels.to(outputs))
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, labels, label_smoothing=smoothing)
    count = outputs.shape[1]
    one_hot = F.one_hot(labels, count).to(outputs)
    targets = (1 - smoothing) * one_hot + smoothing / count
    return (outputs - targets).square().sum(dim=1).mean()


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


class ReadoutTrainer(OrderedTrainer):
    """A Trainer of modules that return logits, or an object with ``.logits``.

    Attributes:
        loss: The loss for classes, see `readout_loss`.
        dropout: Whether to train in training mode, not in evaluation mode.
    """

    loss: Loss = "cross_entropy"
    dropout = True

    # The loss is the batch's part of the mean over all examples of an optimizer step.
    loss_is_scaled_for_ga = True

    @classmethod
    def of(cls, loss: Loss, *, dropout: bool) -> type["ReadoutTrainer"]:
        """Return a subclass with these attributes.

        Args:
            loss: The loss for classes.
            dropout: Whether to train in training mode.
        """
        subclass: Any = type(cls.__name__, (cls,), {"loss": loss, "dropout": dropout})
        return subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Examples are counted below: the Trainer would count labels by their values.
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of one optimizer step, and the number of their examples.

        Args:
            epoch_iterator: The batches of the epoch.
            num_batches: Number of batches to take, at most.
            device: Device of the training.

        Returns:
            The batches, and the number of examples over all processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["labels"]) for batch in batches)
        if self.accelerator.num_processes == 1:
            return batches, count
        counts: Any = self.accelerator.gather(torch.tensor([count], device=device))
        return batches, int(counts.sum())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the outputs on request.

        Args:
            model: The model.
            inputs: A batch with ``labels``, ``(n,)``.
            return_outputs: Whether to return ``{"logits": (n, labels)}`` as well.
            num_items_in_batch: Number of examples in the optimizer step, over all its
                batches and processes; None means those of this batch.

        Returns:
            The batch's part of the mean over these examples, or it and outputs.
        """
        if not self.dropout:
            model.eval()
        labels = inputs.pop("labels")
        outputs = logits(model(**inputs))
        smoothing = self.args.label_smoothing_factor
        loss = readout_loss(outputs, labels, self.loss, smoothing=smoothing)
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, but examples counted over all.
            share = len(labels) / int(num_items_in_batch)
            loss = loss * (share * self.accelerator.num_processes)
        return (loss, {"logits": outputs}) if return_outputs else loss
