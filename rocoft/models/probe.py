"""A classification head whose last layer is fitted to training examples.

Such a head has seen their labels: kernels and outputs under it fit them better than
those of new examples. What is measured with labels is therefore measured under heads
that were fitted without them, see `heads_without`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from rocoft.data import Example, Split, Task
from rocoft.models.architecture import Architecture
from rocoft.models.pretrained import BackboneError
from rocoft.models.readouts import logits


class Encoding(Protocol):
    """A model with its tokenizer, such as `rocoft.models.Backbone`."""

    module: nn.Module

    def encode(
        self, examples: Sequence[Example], batch_size: int
    ) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Tokenise examples into batches; return the examples' indices, too."""


def fit_probe(backbone: Encoding, task: Task, examples: Sequence[Example]) -> None:
    """Fit the head's last layer to examples.

    By logistic regression for classes, by ridge regression for scores.

    Args:
        backbone: The backbone; its module is changed.
        task: The task.
        examples: The examples, of every class.

    Raises:
        BackboneError: If the head has no linear layer to fit.
    """
    path, layer = _output_layer(backbone.module, len(task.labels))
    module = backbone.module
    batches, order = backbone.encode(examples, batch_size=32)
    # Without the layer, the model's outputs are the layer's inputs.
    module.set_submodule(path, nn.Identity())
    try:
        device = layer.weight.device
        with torch.no_grad():
            inputs = [
                logits(module(**{k: v.to(device) for k, v in b.items()}))
                for b in batches
            ]
    finally:
        module.set_submodule(path, layer)
    features = torch.cat(inputs).double().cpu().numpy()
    labels = np.array([examples[i].label for i in order])
    biased, regression = layer.bias is not None, task.regression
    probe = Ridge(fit_intercept=biased)
    if not regression:
        probe = LogisticRegression(max_iter=5000, fit_intercept=biased)
    probe.fit(features, labels)
    weight, bias = np.atleast_2d(probe.coef_), np.atleast_1d(probe.intercept_)
    if len(weight) == 1 and not regression:
        # Two classes have one log-odds function; the logits are plus and minus half.
        weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))


def heads_without(
    backbone: Encoding, split: Split, folds: Sequence[Sequence[int]]
) -> Iterator[Sequence[int]]:
    """Fit the head without each fold of the training examples in turn.

    Args:
        backbone: A backbone with a fitted head. While a fold is yielded, its head is
            the one fitted without it; afterwards it is as it was.
        split: The split.
        folds: Disjoint indices of training examples, see
            `rocoft.data.splits.stratified_folds`.

    Yields:
        Each fold.
    """
    for fold in folds:
        with _kept(backbone, split.task):
            left = [e for i, e in enumerate(split.train) if i not in set(fold)]
            fit_probe(backbone, split.task, left)
            yield fold


@contextmanager
def _kept(backbone: Encoding, task: Task) -> Iterator[None]:
    """Restore the head's last layer afterwards."""
    _, layer = _output_layer(backbone.module, len(task.labels))
    parameters = list(layer.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def _output_layer(module: nn.Module, labels: int) -> tuple[str, nn.Linear]:
    """Return the path and the head's last linear layer with an output for each label.

    Raises:
        BackboneError: If there is none.
    """
    last = Architecture(module).output_layer(labels)
    if last is None:
        raise BackboneError(
            f"the head of {type(module).__name__} has no linear output layer to fit. "
            "Use --head-init random."
        )
    return last
