"""What `python -m ntk.bench` times: one task's examples, more of them, longer, wider.

Every case but those with more examples is of the fewest examples that are asked for, so
that only one thing grows at a time.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import AutoConfig

from ntk.cost import Cost, measure
from ntk.precision import Precision
from ntk.route_cost import RouteCost, measure_routes
from ntk.spaces import Full, Space
from rocoft.backbone import Backbone, length_limit, load_backbone
from rocoft.console import Progress
from rocoft.pretrained import load_pretrained
from rocoft.splits import Split, few_shot
from rocoft.tasks import load_task

__all__ = ["Cases", "resized"]

Batches = list[dict[str, Tensor]]


class Cases:
    """Models and examples to time, and what they took.

    Args:
        options: Of the command.
        spaces: Tangent spaces by name.
        progress: Called as the work goes on.

    Raises:
        ValueError: If the task has too few examples, or a case cannot be made.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        spaces: Mapping[str, Space],
        progress: Progress | None,
    ) -> None:
        self.options = options
        self.spaces = spaces
        self.progress = progress
        self.sizes = sorted(set(options.examples))
        task = load_task(options.task, options.data_dir)
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
        return self._load(self.options.model, self.split, self.options.head_init)

    def by_examples(self) -> list[Cost]:
        """Return what each number of examples took."""
        return [
            self._measure(
                self.backbone, self._encoded(self.backbone, n), self.options.precisions
            )
            for n in self.sizes
        ]

    def growth(self) -> dict[str, dict[int | str, Cost]]:
        """Return what growing lengths, outputs and models took, as far as asked for."""
        n, found = self.sizes[0], {}
        if self.options.tokens:
            batches = self._encoded(self.backbone, n)
            found["tokens"] = {
                t: self._measure(self.backbone, [resized(b, t) for b in batches])
                for t in sorted(set(self.options.tokens))
            }
        if self.options.labels:
            found["outputs"] = {
                c: self._measure(wide, self._encoded(wide, n))
                for c in sorted(set(self.options.labels))
                for wide in [self._with_outputs(c)]
            }
        if self.options.more_models:
            found["models"] = {
                name: self._measure(other, self._encoded(other, n))
                for name in self.options.more_models
                for other in [
                    self._load(name, self.split, self.options.head_init),
                ]
            }
        return found

    def contractions(self) -> list[RouteCost]:
        """Return what either route of contracting whole weights takes, if any are."""
        if not any(isinstance(space, Full) for space in self.spaces.values()):
            return []
        # The longest examples are in the last batch.
        batch = self._encoded(self.backbone, self.sizes[-1])[-1]
        return measure_routes(self.backbone.module, batch, self.options.rounds)

    def _check(self) -> None:
        """See before anything is timed what can be known of every case."""
        for name in self.options.more_models:
            load_pretrained(AutoConfig, name, name)
        if self.options.labels and self.backbone.readout != "head":
            raise ValueError(
                "--labels needs a classification head, but the model is read out at "
                f"its label words ({self.backbone.readout}). Add --readout head."
            )
        config = getattr(self.backbone.module, "config", None)
        limit = length_limit(config, self.backbone.tokenizer)
        longest = max(self.options.tokens, default=0)
        if longest > limit:
            raise ValueError(
                f"--tokens {longest} is more than the {limit} positions that "
                f"{self.backbone.name!r} has."
            )

    def _load(self, model: str | None, split: Split, head: str) -> Backbone:
        options = self.options
        return load_backbone(
            model,
            split,
            readout=options.readout,
            head="random" if head == "random" else "probe",
            max_length=options.max_length,
            device=options.device,
            dtype=getattr(torch, options.dtype),
        )

    def _with_outputs(self, count: int) -> Backbone:
        """Return the model with a new head of so many outputs."""
        labels = tuple(f"label {i}" for i in range(count))
        split = replace(self.split, task=replace(self.split.task, labels=labels))
        return self._load(self.options.model, split, "random")

    def _encoded(self, backbone: Backbone, n: int) -> Batches:
        device = next(backbone.module.parameters()).device
        batches, _ = backbone.encode(self.split.train[:n], self.options.batch_size)
        return [{k: v.to(device) for k, v in batch.items()} for batch in batches]

    def _measure(
        self, backbone: Backbone, batches: Batches, precisions: Sequence[Precision] = ()
    ) -> Cost:
        return measure(
            backbone.module,
            batches,
            self.spaces,
            precisions=precisions,
            rounds=self.options.rounds,
            progress=self.progress,
        )


def resized(batch: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Return a batch of the same examples cut or repeated to so many tokens each.

    Args:
        batch: Of a tokenizer: ``(n, t)`` tensors, and ``(n,)`` numbers of positions.
        tokens: t of the result; none is padding.

    Returns:
        Tensors of the same names.
    """
    found = {}
    for name, value in batch.items():
        if value.ndim < 2:
            found[name] = value.clamp(max=tokens - 1)
            continue
        places = torch.arange(tokens, device=value.device) % value.shape[1]
        found[name] = value[:, places]
        if name == "attention_mask":
            found[name] = torch.ones_like(found[name])
    return found
