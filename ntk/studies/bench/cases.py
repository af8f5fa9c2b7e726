"""The cases of `python -m ntk.bench`: varying examples, tokens, outputs and models.

Only one of these varies at a time; all but the first use the smallest number of
examples.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoConfig

from ntk.kernels import Precision
from ntk.spaces import Space
from ntk.studies.bench.cost import Cost, measure
from ntk.studies.bench.options import BenchOptions
from rocoft.commands import Head, Progress
from rocoft.data import Split, few_shot
from rocoft.models import (
    Backbone,
    length_limit,
    load_backbone,
    load_pretrained,
    locate,
    resolved_device,
)

__all__ = ["Cases", "resized"]

Batches = list[dict[str, Tensor]]


class Cases:
    """Models and examples to time.

    Args:
        options: Options of the command.
        spaces: Tangent spaces by name.
        progress: Called after every round.

    Raises:
        ValueError: If the task has too few examples, or a case is impossible.
    """

    def __init__(
        self,
        options: BenchOptions,
        spaces: Mapping[str, Space],
        progress: Progress | None,
    ) -> None:
        self.options = options
        self.spaces = spaces
        self.progress = progress
        self.sizes = sorted(set(options.timed.examples))
        task = options.task.load()
        fewest = min(Counter(example.label for example in task.train).values())
        shots = -(-self.sizes[-1] // len(task.labels))
        if shots > fewest:
            raise ValueError(
                f"--examples {self.sizes[-1]} is more than task {task.name!r} has in "
                f"equal parts of each label, {fewest * len(task.labels)}. Name a "
                "larger --task."
            )
        self.split = few_shot(task, shots, 1, 0)
        self._check()

    @cached_property
    def backbone(self) -> Backbone:
        """The model."""
        return self._load(
            self.options.model.model, self.split, self.options.model.head_init
        )

    def by_examples(self) -> list[Cost]:
        """Return the cost for each number of examples."""
        return [
            self._measure(
                self.backbone,
                self._encoded(self.backbone, n),
                self.options.timed.precisions,
            )
            for n in self.sizes
        ]

    def growth(self) -> dict[str, dict[int | str, Cost]]:
        """Return the costs for the requested lengths, outputs and models."""
        n = self.sizes[0]
        costs: dict[str, dict[int | str, Cost]] = {}
        if self.options.timed.tokens:
            batches = self._encoded(self.backbone, n)
            costs["tokens"] = {
                t: self._measure(self.backbone, [resized(b, t) for b in batches])
                for t in sorted(set(self.options.timed.tokens))
            }
        if self.options.timed.labels:
            costs["outputs"] = {
                c: self._measure(wide, self._encoded(wide, n))
                for c in sorted(set(self.options.timed.labels))
                for wide in [self._with_outputs(c)]
            }
        if self.options.timed.more_models:
            costs["models"] = {
                name: self._measure(other, self._encoded(other, n))
                for name in self.options.timed.more_models
                for other in [
                    self._load(name, self.split, self.options.model.head_init),
                ]
            }
        return costs

    def _check(self) -> None:
        """Check all cases before any is timed."""
        for name in self.options.timed.more_models:
            load_pretrained(AutoConfig, locate(name).path, name)
        if self.options.timed.labels and self.backbone.readout != "head":
            raise ValueError(
                "--labels needs a classification head, but the model is read out at "
                f"its label words ({self.backbone.readout}). Add --readout head."
            )
        config = getattr(self.backbone.module, "config", None)
        limit = length_limit(config, self.backbone.tokenizer)
        longest = max(self.options.timed.tokens, default=0)
        if longest > limit:
            raise ValueError(
                f"--tokens {longest} is more than the {limit} positions that "
                f"{self.backbone.name!r} has."
            )

    def _load(self, model: str | None, split: Split, head: Head) -> Backbone:
        given = self.options.model
        return load_backbone(
            model,
            split,
            readout=given.readout,
            head=head,
            max_length=given.max_length,
            device=resolved_device(given.device),
            dtype=getattr(torch, given.dtype),
            load_in=given.load_in,
            offload=given.offload,
        )

    def _with_outputs(self, count: int) -> Backbone:
        """Return the model with a new head of ``count`` outputs."""
        labels = tuple(f"label {i}" for i in range(count))
        split = replace(self.split, task=replace(self.split.task, labels=labels))
        return self._load(self.options.model.model, split, "random")

    def _encoded(self, backbone: Backbone, n: int) -> Batches:
        device = next(backbone.module.parameters()).device
        batches, _ = backbone.encode(
            self.split.train[:n], self.options.kernels.batch_size
        )
        return [{k: v.to(device) for k, v in batch.items()} for batch in batches]

    def _measure(
        self, backbone: Backbone, batches: Batches, precisions: Sequence[Precision] = ()
    ) -> Cost:
        return measure(
            backbone.module,
            batches,
            self.spaces,
            precisions=precisions,
            rounds=self.options.timed.rounds,
            memory=self.options.kernels.memory,
            progress=self.progress,
        )


def resized(batch: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Return a batch with each example cut or repeated to the same length.

    Args:
        batch: Tokenized batch: ``(n, t)`` tensors, and indices of positions.
        tokens: Length t of the result, without padding.

    Returns:
        Tensors by the same names.
    """
    resized_batch = {}
    for name, value in batch.items():
        if name == "position" or value.ndim < 2:
            resized_batch[name] = value.clamp(max=tokens - 1)
            continue
        places = torch.arange(tokens, device=value.device) % value.shape[1]
        resized_batch[name] = value[:, places]
        if name == "attention_mask":
            resized_batch[name] = torch.ones_like(resized_batch[name])
    return resized_batch
