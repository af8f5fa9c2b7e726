"""Kernels of training examples under heads that were fitted without some of them.

What is measured with labels, on a head that has seen them, is measured here out of
fold: `ntk.classifiers.crossfit` has the equation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk.classifiers import Fold
from ntk.studies.encoding import EncodedSplit, own_outputs
from rocoft.data import Split, stratified_folds
from rocoft.models import Backbone, heads_without

Array = NDArray[np.float64]


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
    data: EncodedSplit,
    compute: Callable[[EncodedSplit], Mapping[str, Tensor]],
    *,
    count: int = 2,
) -> list[HeldOut]:
    """Compute kernels under heads that were fitted without a fold, for every fold.

    Args:
        backbone: The model.
        split: The split.
        data: Its examples.
        compute: Computes the kernels of training examples, in the order of the
            batches, with the head that the model then has.
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
