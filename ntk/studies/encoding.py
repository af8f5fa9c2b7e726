"""The examples of a split as batches of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk.gradients import Batch, ContrastReadout, calibrate
from ntk.linearization import evaluated
from ntk.measures import contrasts
from ntk.spaces import Space
from rocoft.data import Split
from rocoft.models import Backbone


@dataclass(frozen=True)
class EncodedSplit:
    """Batches of training, dev and test examples, in this order.

    Attributes:
        batches: Batches, each of one part of the split and sorted by length.
        train_batches: Number of batches of training examples.
        order: Index in the split of each example, in the order of the batches.
        labels: ``(n,)`` labels in the order of the split.
        train: Number of training examples.
        held: Number of dev examples.
    """

    batches: list[dict[str, Tensor]]
    train_batches: int
    order: list[int]
    labels: NDArray[Any]
    train: int
    held: int

    @property
    def dev(self) -> slice:
        """The dev examples in the order of the split."""
        return slice(self.train, self.train + self.held)

    @property
    def test(self) -> slice:
        """The test examples in the order of the split."""
        return slice(self.train + self.held, None)

    def in_split_order(self, kernel: Tensor) -> Tensor:
        """Return a kernel with rows and columns in the order of the split.

        Args:
            kernel: Kernel of all batches and the training batches, ``(n, m, ...)``.

        Returns:
            The kernel on the CPU.
        """
        rows = torch.tensor(np.argsort(self.order))
        columns = torch.tensor(np.argsort(self.order[: self.train]))
        return kernel.cpu()[rows][:, columns]

    def training(self) -> Self:
        """Return the training examples alone."""
        return replace(
            self,
            batches=self.batches[: self.train_batches],
            train_batches=self.train_batches,
            order=self.order[: self.train],
            labels=self.labels[: self.train],
            train=self.train,
            held=0,
        )


def encode_split(
    backbone: Backbone, split: Split, batch_size: int, device: torch.device | str
) -> EncodedSplit:
    """Encode the examples of a split.

    Args:
        backbone: The model.
        split: The split; parts of it may be empty.
        batch_size: Maximal number of examples in a batch.
        device: Device of the batches.

    Returns:
        The encoded examples.
    """
    batches: list[dict[str, Tensor]] = []
    order: list[int] = []
    counts = []
    for part in (split.train, split.dev, split.test):
        encoded, indices = backbone.encode(part, batch_size)
        order += [len(order) + i for i in indices]
        batches += [{k: v.to(device) for k, v in batch.items()} for batch in encoded]
        counts.append(len(encoded))
    labels = [e.label for e in (*split.train, *split.dev, *split.test)]
    sizes = len(split.train), len(split.dev)
    return EncodedSplit(batches, counts[0], order, np.array(labels), *sizes)


def own_outputs(
    backbone: Backbone, data: EncodedSplit, *, regression: bool = False
) -> NDArray[np.float64]:
    """Run a model on the examples of a split.

    Args:
        backbone: The model.
        data: The examples.
        regression: Whether the outputs are scores and not logits of classes.

    Returns:
        ``(n, c)`` outputs in the order of the split; logits less their mean over the
        classes, which no softmax sees.
    """
    values = evaluated(backbone.module, data.batches)
    outputs = values.double().cpu().numpy()[np.argsort(data.order)]
    return np.asarray(
        outputs if regression else outputs - outputs.mean(axis=1, keepdims=True)
    )


def selected(
    space: Space,
    backbone: Backbone,
    batches: Sequence[Batch],
    *,
    regression: bool = False,
) -> Space:
    """Choose the rows and columns of a space that depend on training examples.

    Args:
        space: The space.
        backbone: The model.
        batches: The training examples.
        regression: Whether gradients are of the outputs, and not of their contrasts.

    Returns:
        The space; one that depends on no examples as it is.
    """
    outputs = None if regression else ContrastReadout()
    return calibrate(space, backbone.module, list(batches), outputs=outputs)


def by_row(targets: NDArray[Any], rows: int) -> NDArray[Any]:
    """Return targets of classes beside the rows of a Gram matrix.

    Args:
        targets: ``(n, c)``, one column for each class.
        rows: n, n (c - 1) for contrasts, or n c for outputs.

    Returns:
        ``(rows, t)``: t = c for n rows, else 1.
    """
    n, c = targets.shape
    if rows == n:
        return targets
    if rows == n * (c - 1):
        targets = targets @ contrasts(c).numpy()
    return targets.reshape(-1, 1)
