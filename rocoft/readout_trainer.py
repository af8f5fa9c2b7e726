"""The Trainer of modules that return logits: its losses, and whether dropout is on."""

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rocoft.readouts import logits
from rocoft.search import OrderedTrainer

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
        outputs: ``(n, labels)``; of scores the first one counts.
        labels: ``(n,)`` numbers of the labels, or scores.
        loss: Of labels: cross-entropy, or the squared distance, summed over outputs,
            to one-hot targets. Scores have the squared error in either case.
        smoothing: Share of each target that is spread over all labels.

    Returns:
        A number.
    """
    found = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if labels.is_floating_point():
        return F.mse_loss(found[:, 0], labels.to(found))
    if loss == "cross_entropy":
        return F.cross_entropy(found, labels, label_smoothing=smoothing)
    count = found.shape[1]
    targets = (1 - smoothing) * F.one_hot(labels, count).to(found) + smoothing / count
    return (found - targets).square().sum(dim=1).mean()


class ReadoutTrainer(OrderedTrainer):
    """A Trainer of modules that return logits, or an object that has them.

    One output and real labels make a regression.

    Attributes:
        loss: Of labels, see `readout_loss`.
        dropout: Whether training is in training mode; without it in evaluation mode.
    """

    loss: Loss = "cross_entropy"
    dropout = True

    # The loss is the mean over a batch.
    loss_is_scaled_for_ga = False

    @classmethod
    def of(cls, loss: Loss, *, dropout: bool) -> type["ReadoutTrainer"]:
        """Return the kind that trains with a loss, with dropout or without.

        Args:
            loss: Of labels.
            dropout: Whether in training mode.
        """
        made: Any = type(cls.__name__, (cls,), {"loss": loss, "dropout": dropout})
        return made

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the outputs if asked for.

        Args:
            model: The model.
            inputs: A batch with ``labels``, ``(n,)``.
            return_outputs: Whether to return ``{"logits": (n, labels)}`` as well.
            num_items_in_batch: Not used: losses are averaged batch by batch.

        Returns:
            The loss, or a pair.
        """
        if not self.dropout:
            model.eval()
        labels = inputs.pop("labels")
        found = logits(model(**inputs))
        smoothing = self.args.label_smoothing_factor
        loss = readout_loss(found, labels, self.loss, smoothing=smoothing)
        return (loss, {"logits": found}) if return_outputs else loss
