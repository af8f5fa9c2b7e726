"""Fine-tuning a backbone on a task by any method, under one protocol.

The model starts where `rocoft.backbone` left it, transformers' Trainer trains it once
with each learning rate of a grid, the best checkpoint on dev is taken, or the last one,
and the test examples are looked at once.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from rocoft.anchor import Anchor, anchored
from rocoft.architecture import Architecture
from rocoft.backbone import Backbone, fit_probe
from rocoft.console import Progress
from rocoft.methods import (
    LEARNING_RATES,
    Method,
    apply_method,
    parse_method,
    trained_parameters,
)
from rocoft.metrics import metric_names, scores
from rocoft.readout_trainer import Loss, ReadoutTrainer, readout_loss
from rocoft.readouts import logits
from rocoft.search import (
    Found,
    Job,
    Kept,
    TrainingError,
    own_random_numbers,
    search,
    search_folder,
)
from rocoft.selection import DATA_STRATEGIES
from rocoft.splits import Split
from rocoft.tasks import Example

T = TypeVar("T")

CALIBRATION = 64
"""Training examples that selections by activation or gradient look at."""


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model, and how it came about.

    Attributes:
        model: In evaluation mode. With RoCoFT, LoRA and DoRA it is a `PeftModel`, or
            a `Prompted` around one.
        method: What was trained.
        logits: ``(n, labels)``, the test examples' outputs in the order of the split.
        labels: ``(n,)``, what they should be.
        record: Everything else, as JSON knows it.
    """

    model: nn.Module
    method: Method
    logits: Tensor
    labels: Tensor
    record: dict[str, Any]


def fine_tune(
    backbone: Backbone,
    split: Split,
    method: Method | str,
    *,
    lrs: Sequence[float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    patience: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    loss: Loss | None = None,
    dropout: bool = True,
    keep: Kept = "best",
    anchor: Anchor | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuned:
    """Fine-tune a copy of a backbone's model; the backbone itself is left untouched.

    Classes are learnt by cross-entropy of the logits, over the label words of a prompt
    if that is the readout, or by ``loss``; scores by mean squared error.

    Args:
        backbone: The model, ready for the task.
        split: Its ``train`` examples are learnt, its ``dev`` examples choose learning
            rate and checkpoint, its ``test`` examples are predicted once at the end.
        method: What is trained, as `rocoft.methods` describes.
        lrs: Peak learning rates; None means those of `methods.LEARNING_RATES`.
        arguments: More arguments of transformers' `TrainingArguments`, by name, over
            those of `search.PROTOCOL`.
        patience: Evaluations without a new best on dev after which training stops;
            None trains to the end. The best checkpoint is taken in either case.
        seed: Of LoRA's initialisation, the order of examples and dropout. Global
            generators are left as they were.
        metrics: Names of `rocoft.metrics`, the first to choose by; None means the
            task's.
        loss: Of classes, see `rocoft.readout_trainer.readout_loss`; None means
            ``"cross_entropy"``.
        dropout: Whether to train in training mode; False trains in evaluation mode,
            where a model is the function that its linearisation expands.
        keep: ``"best"`` for the best checkpoint on dev, ``"last"`` for the weights that
            training ends with, which dev then judges.
        anchor: Holds what is trained at its start; None means free training.
        wrap: From the model, ready to train by the method, to what is trained in its
            place, such as its linearisation. A record knows it by its ``__name__``.
        folder: For checkpoints, empty or of an earlier search; None means a temporary
            one.
        resume: Continue in ``folder``, with weights equal bit for bit to those of a
            training that was not interrupted.
        progress: Told of every step.

    Returns:
        The model with the best learning rate, its test predictions and the record.

    Raises:
        TrainingError: If the split has no dev examples, a setting is refused, or
            every training diverged.
        SelectionError: If the method selects nothing of the model.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if not split.dev:
        raise TrainingError(
            f"the split of task {split.task.name!r} has no dev examples to choose the "
            "learning rate by. Draw some: few_shot(..., dev_shots=16) or full_split."
        )
    regression = split.task.regression
    if loss == "cross_entropy" and regression:
        raise TrainingError(
            f"loss='cross_entropy' is of classes; the labels of task "
            f"{split.task.name!r} are scores. Leave it out, or give 'squared'."
        )
    objective: Loss = loss or ("squared" if regression else "cross_entropy")
    names = tuple(metrics or metric_names(split.task.name, regression=regression))
    start = {
        "method": str(method),
        "seed": seed,
        "split_seed": split.seed,
        "task": split.task.name,
        "labels": list(split.task.labels),
        "source": split.task.source,
        "model": backbone.name,
        "readout": backbone.readout,
        "examples": {
            "train": len(split.train),
            "dev": len(split.dev),
            "test": len(split.test),
        },
        "metric": names[0],
        "loss": objective,
        "dropout": dropout,
        "keep": keep,
        "anchor": anchor and asdict(anchor),
        "wrapped": None if wrap is None else getattr(wrap, "__name__", repr(wrap)),
    }
    if method.kind == "probe":
        if anchor or wrap or loss or not dropout or keep == "last":
            raise TrainingError(
                "method 'probe' takes no steps, so nothing can be anchored or wrapped, "
                "and no loss, dropout or checkpoint chosen. Use 'head', or leave "
                "anchor=, wrap=, loss=, dropout= and keep= out."
            )
        return _probe(backbone, split, method, names, start)
    given = dict(arguments or {})
    check_weight_decay(method, given)
    # The Trainer switches it on for the library's own models alone.
    checkpointing = bool(given.pop("gradient_checkpointing", False))
    counts: dict[str, int] = {}

    def build() -> nn.Module:
        model = _prepared(backbone, split, method, checkpointing)
        counts.update(count_parameters(model, backbone.module))
        return model if wrap is None else wrap(model)

    if checkpointing and not dropout:
        raise TrainingError(
            "gradient_checkpointing works in training mode alone. Leave it out, or "
            "train with dropout=True."
        )
    kind = ReadoutTrainer.of(objective, dropout=dropout)
    trainer = kind if anchor is None else anchored(kind, anchor)
    with own_random_numbers(seed), search_folder(folder) as place:
        found = search(
            Job(
                name=f"{method!s}, {split.task.name}, {backbone.name}",
                build=build,
                train=_encoded(backbone, split.train),
                dev=_encoded(backbone, split.dev),
                collate=DataCollatorWithPadding(backbone.tokenizer),
                judge=lambda p: scores(p.predictions, p.label_ids, names),
                chief=names[0],
                device=_device(backbone.module),
                trainer=(trainer, TrainingArguments),
                details={
                    **{k: start[k] for k in ("loss", "dropout", "anchor", "wrapped")},
                    "split_seed": split.seed,
                    "readout": backbone.readout,
                    "label_words": backbone.prompt and list(backbone.prompt.words),
                },
            ),
            LEARNING_RATES[method.kind] if lrs is None else lrs,
            arguments=given,
            patience=patience,
            keep=keep,
            seed=seed,
            folder=place,
            resume=resume,
            progress=progress,
        )
        outputs = _predicted(found.trainer, _encoded(backbone, split.test))
    labels = _labels(split.test)
    record = {
        **start,
        "test": scores(outputs, labels, names),
        "parameters": counts,
        **searched(found),
    }
    record["arguments"]["gradient_checkpointing"] = checkpointing
    return FineTuned(found.model, method, outputs, labels, record)


def check_weight_decay(method: Method, arguments: Mapping[str, Any]) -> None:
    """Refuse weight decay where it would move weights that are not selected.

    Args:
        method: What is trained.
        arguments: Of the Trainer.

    Raises:
        TrainingError: If a masked method is to decay.
    """
    decay = arguments.get("weight_decay") or 0.0
    if method.kind == "masked" and decay:
        raise TrainingError(
            f"weight_decay={decay} would shrink whole weights, of which method "
            f"{str(method)!r} trains a part. Leave it at 0, or train "
            f"{str(replace(method, kind='rocoft'))!r}, which decays that part alone."
        )


def calibration_examples(examples: Sequence[T]) -> list[T]:
    """Return some training examples, the same ones whatever the seed."""
    chosen = np.random.default_rng(0).permutation(len(examples))[:CALIBRATION]
    return [examples[int(i)] for i in chosen]


def searched(found: Found) -> dict[str, Any]:
    """Return what a record says of a search.

    Args:
        found: The search.
    """
    keys = ("learning_rate", "dev", "steps", "epochs", "seconds_per_step")
    memory = ("peak_memory_bytes", "peak_memory_is_of_this_training")
    return {
        **{key: found.best[key] for key in (*keys, *memory)},
        "learning_rates": found.runs,
        "arguments": found.trainer.args.to_dict(),
        "device": str(found.trainer.args.device),
        "versions": versions(),
    }


def count_parameters(model: nn.Module, start: nn.Module) -> dict[str, int]:
    """Count what is trained.

    Args:
        model: A model that a method was applied to.
        start: The same model before that.

    Returns:
        ``"trainable"``, of these ``"head"`` and ``"without_head"``, and ``"total"``,
        the parameters of ``start``.
    """
    head = set(Architecture(start).head)
    trained = {_original(n): p.numel() for n, p in trained_parameters(model).items()}
    of_head = sum(count for name, count in trained.items() if name in head)
    return {
        "trainable": sum(trained.values()),
        "head": of_head,
        "without_head": sum(trained.values()) - of_head,
        "total": sum(p.numel() for p in start.parameters()),
    }


def versions(*others: str) -> dict[str, str]:
    """Return the versions of the libraries that results depend on.

    Args:
        *others: Names of more libraries.
    """
    names = ("rocoft-ntk", "torch", "transformers", "peft", "accelerate", *others)
    return {name: importlib.metadata.version(name) for name in names}


def _prepared(
    backbone: Backbone, split: Split, method: Method, checkpointing: bool
) -> nn.Module:
    """Return a copy of the backbone's model that is ready to train."""
    batches: list[dict[str, Tensor]] = []
    if method.strategy in DATA_STRATEGIES:
        batches = _calibration(backbone, calibration_examples(split.train), method)
    module = copy.deepcopy(backbone.module)
    if checkpointing:
        inner = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    return apply_method(
        module,
        method,
        train_head=backbone.readout == "head",
        batches=batches,
        loss=_example_loss,
    )


def _calibration(
    backbone: Backbone, examples: Sequence[Example], method: Method
) -> list[dict[str, Tensor]]:
    """Return batches; those for gradients with all that `_example_loss` needs."""
    batches, order = backbone.encode(examples, 16)
    labels = _labels([examples[i] for i in order]).split(16)
    for batch, own in zip(batches, labels, strict=True):
        if method.strategy == "gradient":
            batch["labels"] = own
        else:
            batch.pop("position", None)
    return batches


def _example_loss(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of one example, of a `Prompted`'s model at its position."""
    inputs = {k: v for k, v in example.items() if k not in {"labels", "position"}}
    found = logits(model(**inputs))
    if "position" in example:
        found = found[torch.arange(len(found)), example["position"]]
    return readout_loss(found, example["labels"])


def _encoded(backbone: Backbone, examples: Sequence[Example]) -> Any:
    """Return each example as lists of numbers without padding, and its label."""
    batches = [backbone.encode([example], 1)[0][0] for example in examples]
    return [
        {**{key: value[0].tolist() for key, value in batch.items()}, "label": e.label}
        for batch, e in zip(batches, examples, strict=True)
    ]


def _predicted(trainer: Trainer, examples: Any) -> Tensor:
    """Return the outputs in the examples' order, computed in that of their lengths.

    Batches of like lengths hold little padding: half the time for single sentences.
    """
    order = np.argsort([len(e["input_ids"]) for e in examples], kind="stable")
    rows: Any = [examples[i] for i in order]
    found = trainer.predict(rows)
    return torch.as_tensor(found.predictions)[np.argsort(order)]


def _probe(
    backbone: Backbone,
    split: Split,
    method: Method,
    names: Sequence[str],
    start: dict[str, Any],
) -> FineTuned:
    """Fit the last layer of the head to frozen features, which takes no steps."""
    if split.task.regression or backbone.readout != "head":
        raise TrainingError(
            f"method 'probe' fits a classification head by logistic regression; task "
            f"{split.task.name!r} read out by {backbone.readout!r} has none. Use "
            "'head'."
        )
    model = copy.deepcopy(backbone.module)
    fit_probe(replace(backbone, module=model), split)
    dev, test = (_outputs(backbone, model, part) for part in (split.dev, split.test))
    record = {
        **start,
        "dev": scores(dev, _labels(split.dev), names),
        "test": scores(test, _labels(split.test), names),
        "parameters": count_parameters(
            apply_method(model, method, train_head=True), backbone.module
        ),
        "learning_rate": None,
        "learning_rates": [],
        "steps": 0,
        "versions": versions(),
    }
    return FineTuned(model, method, test, _labels(split.test), record)


def _outputs(
    backbone: Backbone, model: nn.Module, examples: Sequence[Example]
) -> Tensor:
    """Return ``(n, labels)`` outputs in the order of the examples."""
    batches, order = backbone.encode(examples, 64)
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for start, batch in enumerate(batches):
        with torch.no_grad():
            rows = logits(model(**{k: v.to(_device(model)) for k, v in batch.items()}))
        for place, row in zip(order[64 * start :], rows.cpu(), strict=False):
            found[place] = row
    return torch.stack(found)


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.label for example in examples])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _original(name: str) -> str:
    """Return the name that a parameter had before peft wrapped its module."""
    # In a `Prompted` it is a part of the module that is wrapped.
    unwrapped = name.replace("base_model.model.", "", 1)
    return unwrapped.replace(".modules_to_save.default", "")
