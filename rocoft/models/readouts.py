"""Modules that turn a transformer's hidden states into the outputs of a task.

Language models never compute logits of the whole vocabulary: `LabelWords` replaces the
output layer by the label words' rows of it, which share its parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel


def logits(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its `.logits`."""
    return output if isinstance(output, Tensor) else output.logits


class LabelWords(nn.Module):
    """An output layer of a language model with the label words' logits only.

    Args:
        output: The original output layer; its parameters stay shared.
        words: Token of each label word, in the order of the labels.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    words: Tensor

    def __init__(self, output: nn.Module, words: Sequence[int]) -> None:
        super().__init__()
        self.register_parameter("weight", output.get_parameter("weight"))
        self.register_parameter("bias", getattr(output, "bias", None))
        self.register_buffer("words", torch.tensor(words), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(n, t, labels)`` logits of hidden states ``(n, t, d)``."""
        bias = None if self.bias is None else self.bias[self.words]
        return F.linear(hidden, self.weight[self.words], bias)


class MeanPooled(nn.Module):
    """A sentence encoder with a linear head on the mean of its hidden states.

    Sentence encoders are trained with mean pooling. The first token's state, which
    transformers' classification heads read, is untrained.

    Args:
        body: The encoder.
        labels: Number of outputs.
    """

    def __init__(self, body: PreTrainedModel, labels: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(body.config.hidden_size, labels)
        self.config = body.config

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Return ``(n, labels)`` logits."""
        output = self.body(attention_mask=attention_mask, **inputs)
        weights = attention_mask[..., None].to(output.last_hidden_state.dtype)
        total = (output.last_hidden_state * weights).sum(dim=1)
        return self.classifier(total / weights.sum(dim=1))


class Prompted(nn.Module):
    """A language model whose outputs are the label words' logits at one position.

    Args:
        model: The model, its output layer replaced by `LabelWords`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, position: Tensor, **inputs: Tensor) -> Tensor:
        """Return ``(n, labels)`` logits at ``position``, ``(n,)``."""
        logits = self.model(**inputs).logits
        return logits[torch.arange(len(logits), device=logits.device), position]
