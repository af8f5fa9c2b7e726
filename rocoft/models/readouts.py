"""Modules that turn a transformer's hidden states into the outputs of a task.

Label words of one token need no logits of the whole vocabulary: `LabelWords` replaces
the output layer by the words' rows of it, which share its parameters. The likelihood of
words of several tokens needs all logits, but only where a token of a word is predicted:
`AtPositions` computes no others.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel


def logits(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its `.logits`."""
    return output if isinstance(output, Tensor) else output.logits


class SharedOutput(nn.Module):
    """An output layer with another forward pass and the parameters of the original.

    Args:
        output: The original output layer; its parameters stay shared.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.register_parameter("weight", output.get_parameter("weight"))
        self.register_parameter("bias", getattr(output, "bias", None))


class LabelWords(SharedOutput):
    """An output layer of a language model with the label words' logits only.

    Args:
        output: The original output layer; its parameters stay shared.
        words: Token of each label word, in the order of the labels.
    """

    words: Tensor

    def __init__(self, output: nn.Module, words: Sequence[int]) -> None:
        super().__init__(output)
        self.register_buffer("words", torch.tensor(words), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(n, t, labels)`` logits of hidden states ``(n, t, d)``."""
        bias = None if self.bias is None else self.bias[self.words]
        return F.linear(hidden, self.weight[self.words], bias)


class AtPositions(SharedOutput):
    """An output layer of a language model at a few positions of each sequence.

    Attributes:
        positions: ``(n, k)``, set by `PromptedSequences` during its forward pass, as
            transformers' models pass nothing but hidden states to their output layer;
            None means all positions.
    """

    positions: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(n, k, vocabulary)`` logits of hidden states ``(n, t, d)``."""
        if self.positions is not None:
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            hidden = hidden[rows, self.positions]
        return F.linear(hidden, self.weight, self.bias)


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


class PromptedSequences(Prompted):
    """A causal model whose outputs are log-likelihoods of words after the prompt.

    Output c is the sum over the tokens of word c of log p(token | prompt, the word's
    earlier tokens), in nat. The model reads one sequence for each example and word, so
    a pass costs as much as one over as many examples as there are sequences.

    Args:
        model: The model, its output layer replaced by `AtPositions`.
        words: Tokens of each label word, in the order of the labels.
    """

    tokens: Tensor
    counted: Tensor

    def __init__(self, model: PreTrainedModel, words: Sequence[Sequence[int]]) -> None:
        super().__init__(model)
        longest = max(map(len, words))
        padded = [[*word, *[0] * (longest - len(word))] for word in words]
        counted = [[k < len(word) for k in range(longest)] for word in words]
        output: Any = model.get_output_embeddings()
        for name, values in (("tokens", padded), ("counted", counted)):
            buffer = torch.tensor(values, device=output.weight.device)
            self.register_buffer(name, buffer, persistent=False)
        self._numbered = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, position: Tensor, **inputs: Tensor) -> Tensor:
        """Return ``(n, labels)`` log-likelihoods.

        Args:
            position: ``(n, labels)`` index of the prompt's last token, the same for
                every label.
            **inputs: ``input_ids`` and ``attention_mask`` of the prompts, ``(n, t)``,
                padded on the right. Others are not used.
        """
        # That position has a column for each label lets `ntk.gradients` see that an
        # example has as many sequences.
        n, labels = position.shape
        longest = self.tokens.shape[1]
        steps = torch.arange(longest, device=position.device)
        at = position[..., None] + steps
        # A word's last token is predicted, never read.
        read = longest - 1
        ids = F.pad(inputs["input_ids"], (0, read))[:, None].repeat(1, labels, 1)
        mask = F.pad(inputs["attention_mask"], (0, read))[:, None].repeat(1, labels, 1)
        if read:
            words = self.tokens[:, :read].expand(n, labels, read)
            seen = self.counted[:, 1:].expand(n, labels, read).to(mask.dtype)
            ids = ids.scatter(2, at[..., 1:], words)
            mask = mask.scatter(2, at[..., 1:], seen)
        logits = self._logits(ids.flatten(0, 1), mask.flatten(0, 1), at.flatten(0, 1))
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = self.tokens.repeat(n, 1)[..., None]
        values = precise.log_softmax(-1).gather(2, chosen)[..., 0]
        return (values * self.counted.repeat(n, 1)).sum(1).view(n, labels)

    def _logits(self, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        """Return ``(sequences, k, vocabulary)`` logits at positions ``(., k)``."""
        numbers = {}
        if self._numbered:
            # Models number positions in one row for the whole batch, whose gradient
            # belongs to no example.
            steps = torch.arange(ids.shape[1], device=ids.device)
            numbers["position_ids"] = steps.expand(ids.shape)
        output: Any = self.model.get_output_embeddings()
        output.positions = at
        try:
            answer = self.model(input_ids=ids, attention_mask=mask, **numbers)
        finally:
            output.positions = None
        return answer.logits
