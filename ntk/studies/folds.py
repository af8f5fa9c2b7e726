"""Kernels of training examples under heads that were fitted without some of them.

What is measured with labels, on a head that has seen them, is measured here out of
fold: `ntk.classifiers.crossfit` has the equation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk.classifiers import Fold
from ntk.measures import distance, gram_matrix
from ntk.studies.encoding import EncodedSplit, own_outputs
from ntk.studies.protocol import ScoredSplit
from rocoft.data import Split, stratified_folds
from rocoft.models import Backbone, heads_without

Array = NDArray[np.float64]
Encoded = TypeVar("Encoded", bound=EncodedSplit)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Kernels of the training examples under a head fitted without a fold of them.

    Attributes:
        held: Indices of the fold's examples in the split.
        kernels: ``(n, n, ...)`` by space, in the order of the split.
        f0: ``(n, c)`` outputs of the model, less their mean.
    """

    held: tuple[int, ...]
    kernels: Mapping[str, Tensor]
    f0: Array

    def unseen(self, name: str) -> Tensor:
        """Return a kernel between the examples that the head has not seen."""
        held = list(self.held)
        return self.kernels[name][held][:, held]

    def fold(self, kernel: Tensor) -> Fold:
        """Return the fold for classifiers.

        Args:
            kernel: One of the kernels, perhaps reduced.
        """
        return Fold(self.held, kernel.numpy(), self.f0)


def held_out(
    backbone: Backbone,
    split: Split,
    data: Encoded,
    compute: Callable[[Encoded], Mapping[str, Tensor]],
    *,
    count: int = 2,
) -> list[HeldOut]:
    """Compute kernels under heads that were fitted without a fold, for every fold.

    Args:
        backbone: The model.
        split: The split.
        data: Its examples.
        compute: Computes the kernels of the training examples, which it is given, in
            the order of the batches, with the head that the model then has.
        count: Number of folds.

    Returns:
        One entry for each fold; none if the head has not seen the labels.

    Raises:
        TaskError: If a label has fewer training examples than there are folds.
    """
    if not backbone.fitted_head or split.task.regression:
        return []
    train = data.training()
    return [
        HeldOut(
            tuple(fold),
            {name: train.in_split_order(k) for name, k in compute(train).items()},
            own_outputs(backbone, train),
        )
        for fold in heads_without(backbone, split, stratified_folds(split, count))
    ]


def block_diagonal(folds: Sequence[HeldOut], name: str) -> Tensor:
    """Return a kernel ``(n, n, ...)`` of the examples of each fold, else zero.

    Args:
        folds: The folds.
        name: Name of the space.
    """
    joined = torch.zeros_like(folds[0].kernels[name])
    for fold in folds:
        rows = torch.tensor(fold.held)
        joined[rows[:, None], rows] = fold.unseen(name)
    return joined


def outputs_out_of_fold(folds: Sequence[HeldOut]) -> Array:
    """Return ``(n, c)`` outputs, each under the head that has not seen the example.

    Args:
        folds: The folds.
    """
    joined = np.empty_like(folds[0].f0)
    for fold in folds:
        joined[list(fold.held)] = fold.f0[list(fold.held)]
    return joined


def mean_alignment(
    data: ScoredSplit, kernel: Tensor, unseen: Sequence[tuple[HeldOut, Tensor]] = ()
) -> float:
    """Return the alignment of a kernel with the training labels.

    Args:
        data: The examples.
        kernel: The kernel; its first rows are the training examples.
        unseen: Where the head has seen the labels, the folds with the kernel of the
            same space between the examples that it has not seen; the mean over them.
    """
    parts: list[tuple[Tensor, Sequence[int] | None]] = [(kernel[: data.train], None)]
    if unseen:
        parts = [(each, fold.held) for fold, each in unseen]
    grams = [(gram_matrix(each).numpy(), examples) for each, examples in parts]
    return float(
        np.mean(
            [
                distance.alignment(gram, data.targets_of(gram, examples))
                for gram, examples in grams
            ]
        )
    )
