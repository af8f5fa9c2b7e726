"""The Trainer of modules that return logits, with a choice of loss and dropout."""

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rocoft.models import logits
from rocoft.training.search import OrderedTrainer

Loss = Literal["cross_entropy", "squared"]


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


class ReadoutTrainer(OrderedTrainer):
    """A Trainer of modules that return logits, or an object with ``.logits``.

    Attributes:
        loss: The loss for classes, see `readout_loss`.
        dropout: Whether to train in training mode, not in evaluation mode.
    """

    loss: Loss = "cross_entropy"
    dropout = True

    # The loss is the mean over a batch.
    loss_is_scaled_for_ga = False

    @classmethod
    def of(cls, loss: Loss, *, dropout: bool) -> type["ReadoutTrainer"]:
        """Return a subclass with these attributes.

        Args:
            loss: The loss for classes.
            dropout: Whether to train in training mode.
        """
        subclass: Any = type(cls.__name__, (cls,), {"loss": loss, "dropout": dropout})
        return subclass

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
            num_items_in_batch: Not used: losses are averaged batch by batch.

        Returns:
            The loss, or loss and outputs.
        """
        if not self.dropout:
            model.eval()
        labels = inputs.pop("labels")
        outputs = logits(model(**inputs))
        smoothing = self.args.label_smoothing_factor
        loss = readout_loss(outputs, labels, self.loss, smoothing=smoothing)
        return (loss, {"logits": outputs}) if return_outputs else loss
