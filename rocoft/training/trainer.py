"""Fine-tuning a backbone on a task by any method, under one protocol.

transformers' Trainer trains a copy of the backbone once with each learning rate of a
grid, the best or the last checkpoint is taken, and the test examples are predicted
once.
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

from rocoft.commands import Progress
from rocoft.data import Example, Split, metric_names, scores
from rocoft.models import DATA_STRATEGIES, Architecture, Backbone, fit_probe, logits
from rocoft.training.anchor import Anchor, anchored
from rocoft.training.checkpoints import search_folder
from rocoft.training.grid import EXTENSIONS
from rocoft.training.methods import (
    LEARNING_RATES,
    Method,
    apply_method,
    left_out,
    parse_method,
    trained_parameters,
)
from rocoft.training.readout_trainer import (
    Loss,
    ReadoutTrainer,
    TrainingError,
    readout_loss,
)
from rocoft.training.search import (
    Keep,
    SearchResult,
    TrainingJob,
    search,
    seeded_generators,
)

T = TypeVar("T")

CALIBRATION = 64
"""Number of training examples for selections by activation or gradient."""


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model with its test predictions and its record.

    Attributes:
        model: The model in evaluation mode; with RoCoFT, LoRA and DoRA a `PeftModel`,
            or a `Prompted` around one.
        method: The fine-tuning method.
        logits: ``(n, labels)``, outputs of the test examples in the split's order.
        labels: ``(n,)``, the true labels or scores.
        record: Settings, scores and costs, as JSON values.
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
    keep: Keep = "best",
    anchor: Anchor | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    extensions: int = EXTENSIONS,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuned:
    """Fine-tune a copy of a backbone's model; the backbone itself is left untouched.

    Classes are learnt by cross-entropy of the logits (of the label words, with a
    prompt) or by ``loss``, scores by mean squared error.

    Args:
        backbone: The model, ready for the task.
        split: The examples: ``train`` to learn, ``dev`` to choose learning rate and
            checkpoint by, ``test`` to predict once at the end.
        method: The method, or its text as in `rocoft.training.methods`.
        lrs: Peak learning rates; None means those of `methods.LEARNING_RATES`. Of
            several, the best may be at an end: then rates beyond it are tried too.
        arguments: Arguments of transformers' `TrainingArguments` by name, over those of
            `search.PROTOCOL`.
        patience: Evaluations without a new best on dev after which training stops;
            None trains to the end. The best checkpoint is taken in either case.
        seed: Seed of LoRA's initialisation, the order of examples and dropout. Global
            generators are restored afterwards.
        metrics: Names from `rocoft.data.metrics`, the first to choose by; None means
            the task's metrics.
        loss: The loss for classes, see `readout_trainer.readout_loss`; None means
            ``"cross_entropy"``.
        dropout: Whether to train in training mode. In evaluation mode the model is the
            function that its linearisation expands.
        keep: ``"best"`` for the best checkpoint on dev, ``"last"`` for the weights at
            the end of training.
        anchor: Penalty on the distance to the start; None means no penalty.
        wrap: Maps the model, prepared for the method, to the module that is trained in
            its place, such as its linearisation. The record names it by ``__name__``.
        extensions: Rates that are tried beyond each end of the grid, at most; 0 tries
            the given ones only. A single rate is never extended.
        folder: Folder for checkpoints, empty or of an earlier search; None means a
            temporary one.
        resume: Continue the search in ``folder``. The weights are equal bit for bit to
            those of an uninterrupted training.
        progress: Called at every step.

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
            f"loss='cross_entropy' is for classes; the labels of task "
            f"{split.task.name!r} are scores. Leave it out, or give 'squared'."
        )
    objective: Loss = loss or ("squared" if regression else "cross_entropy")
    names = tuple(metrics or metric_names(split.task.name, regression=regression))
    settings = {
        "method": str(method),
        "seed": seed,
        "split_seed": split.seed,
        "task": split.task.name,
        "labels": list(split.task.labels),
        "source": split.task.source,
        "model": backbone.name,
        "readout": backbone.readout,
        "examples": {p: len(getattr(split, p)) for p in ("train", "dev", "test")},
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
                "method 'probe' takes no steps, so it accepts no anchor=, wrap=, "
                "loss=, dropout= or keep=. Leave them out, or use 'head'."
            )
        return _probe(backbone, split, method, names, settings)
    given = dict(arguments or {})
    check_weight_decay(method, given)
    # Set in `_prepared`: the Trainer does it only for transformers' models.
    checkpointing = bool(given.pop("gradient_checkpointing", False))
    counts: dict[str, int] = {}

    def build() -> nn.Module:
        model = _prepared(backbone, split, method, checkpointing)
        counts.update(count_parameters(model, backbone.module))
        return model if wrap is None else wrap(model)

    if checkpointing and not dropout:
        raise TrainingError(
            "gradient_checkpointing works in training mode only. Leave it out, or "
            "train with dropout=True."
        )
    trainer: type[Trainer] = ReadoutTrainer.of(objective, dropout=dropout)
    if anchor is not None:
        trainer = anchored(trainer, anchor)
    with seeded_generators(seed), search_folder(folder) as used_folder:
        result = search(
            TrainingJob(
                name=f"{method!s}, {split.task.name}, {backbone.name}",
                build=build,
                train=_encoded(backbone, split.train),
                dev=_encoded(backbone, split.dev),
                collate=DataCollatorWithPadding(backbone.tokenizer),
                compute_metrics=lambda p: scores(p.predictions, p.label_ids, names),
                primary_metric=names[0],
                device=_device(backbone.module),
                trainer=(trainer, TrainingArguments),
                details={
                    "loss": objective,
                    "dropout": dropout,
                    "anchor": settings["anchor"],
                    "wrapped": settings["wrapped"],
                    "split_seed": split.seed,
                    "readout": backbone.readout,
                    "label_words": list(backbone.words) or None,
                },
            ),
            LEARNING_RATES[method.kind] if lrs is None else lrs,
            arguments=given,
            patience=patience,
            keep=keep,
            extensions=extensions,
            seed=seed,
            folder=used_folder,
            resume=resume,
            progress=progress,
        )
        outputs = _predicted(result.trainer, _encoded(backbone, split.test))
    labels = _labels(split.test)
    record = {
        **settings,
        "test": scores(outputs, labels, names),
        "parameters": counts,
        **search_record(result),
    }
    record["arguments"]["gradient_checkpointing"] = checkpointing
    record["warnings"] += left_out(backbone.module, method)
    return FineTuned(result.model, method, outputs, labels, record)


def check_weight_decay(method: Method, arguments: Mapping[str, Any]) -> None:
    """Refuse weight decay where it would change weights that are not selected.

    Args:
        method: The method.
        arguments: Arguments of the Trainer.

    Raises:
        TrainingError: If the method is masked and the weight decay is not 0.
    """
    decay = arguments.get("weight_decay") or 0.0
    if method.kind == "masked" and decay:
        raise TrainingError(
            f"weight_decay={decay} would shrink whole weights, but method "
            f"{str(method)!r} trains only a part of them. Leave it at 0, or train "
            f"{str(replace(method, kind='rocoft'))!r}, which decays that part only."
        )


def calibration_examples(examples: Sequence[T]) -> list[T]:
    """Return a random sample of the training examples, the same for every seed."""
    chosen = np.random.default_rng(0).permutation(len(examples))[:CALIBRATION]
    return [examples[int(i)] for i in chosen]


def search_record(result: SearchResult) -> dict[str, Any]:
    """Return the fields of a record that describe a search.

    Args:
        result: The result of the search.
    """
    keys = (
        *("learning_rate", "dev", "steps", "epochs", "seconds_per_step"),
        *("peak_memory_bytes", "peak_memory_is_of_this_training"),
    )
    return {
        **{key: result.best[key] for key in keys},
        "learning_rates": result.runs,
        "rate_at_end": result.end,
        "distance_from_start": result.distance,
        "warnings": result.warnings,
        "arguments": result.trainer.args.to_dict(),
        "device": str(result.trainer.args.device),
        "versions": versions(),
    }


def count_parameters(model: nn.Module, start: nn.Module) -> dict[str, int]:
    """Count trained parameters.

    Args:
        model: A model that a method was applied to.
        start: The same model before that.

    Returns:
        ``"trainable"``, its parts ``"head"`` and ``"without_head"``, and ``"total"``,
        the number of all parameters of ``start``.
    """
    head = set(Architecture(start).head)
    trained = {_original(n): p.numel() for n, p in trained_parameters(model).items()}
    total = sum(trained.values())
    head_total = sum(count for name, count in trained.items() if name in head)
    return {
        "trainable": total,
        "head": head_total,
        "without_head": total - head_total,
        "total": sum(p.numel() for p in start.parameters()),
    }


def versions(*others: str) -> dict[str, str]:
    """Return the versions of the libraries that results depend on, and of others."""
    names = ("rocoft-ntk", "torch", "transformers", "peft", "accelerate", *others)
    return {name: importlib.metadata.version(name) for name in names}


def _prepared(
    backbone: Backbone, split: Split, method: Method, checkpointing: bool
) -> nn.Module:
    """Return a copy of the backbone's model, prepared for the method."""
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
        loss=lambda _, example: _example_loss(module, example),
    )


def _calibration(
    backbone: Backbone, examples: Sequence[Example], method: Method
) -> list[dict[str, Tensor]]:
    """Return batches, with the labels and positions that `_example_loss` needs."""
    batches, order = backbone.encode(examples, 16)
    labels = _labels([examples[i] for i in order]).split(16)
    for batch, batch_labels in zip(batches, labels, strict=True):
        if method.strategy == "gradient":
            batch["labels"] = batch_labels
        else:
            batch.pop("position", None)
    return batches


def _example_loss(module: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of one example, by the whole module with its readout."""
    inputs = {key: value for key, value in example.items() if key != "labels"}
    return readout_loss(logits(module(**inputs)), example["labels"])


def _encoded(backbone: Backbone, examples: Sequence[Example]) -> Any:
    """Return the token lists, without padding, and the label of each example."""
    batches = [backbone.encode([example], 1)[0][0] for example in examples]
    return [
        {**{key: value[0].tolist() for key, value in batch.items()}, "label": e.label}
        for batch, e in zip(batches, examples, strict=True)
    ]


def _predicted(trainer: Trainer, examples: Any) -> Tensor:
    """Return the outputs in the examples' order, computed in order of length.

    Batches of similar lengths have little padding: half the time for sentences.
    """
    order = np.argsort([len(e["input_ids"]) for e in examples], kind="stable")
    by_length: Any = [examples[i] for i in order]
    predictions = trainer.predict(by_length).predictions
    return torch.as_tensor(predictions)[np.argsort(order)]


def _probe(
    backbone: Backbone,
    split: Split,
    method: Method,
    names: Sequence[str],
    settings: dict[str, Any],
) -> FineTuned:
    """Fit the last layer of the head to frozen features by logistic regression."""
    if split.task.regression or backbone.readout != "head":
        raise TrainingError(
            f"method 'probe' fits a classification head by logistic regression; task "
            f"{split.task.name!r} read out by {backbone.readout!r} has none. Use "
            "'head'."
        )
    model = copy.deepcopy(backbone.module)
    probed = replace(backbone, module=model)
    fit_probe(probed, split.task, split.train)
    dev, test = _outputs(probed, split.dev), _outputs(probed, split.test)
    record = {
        **settings,
        "dev": scores(dev, _labels(split.dev), names),
        "test": scores(test, _labels(split.test), names),
        "parameters": count_parameters(
            apply_method(model, method, train_head=True), backbone.module
        ),
        "learning_rate": None,
        "learning_rates": [],
        "rate_at_end": None,
        "warnings": [],
        "steps": 0,
        "versions": versions(),
    }
    return FineTuned(model, method, test, _labels(split.test), record)


@torch.no_grad()
def _outputs(backbone: Backbone, examples: Sequence[Example]) -> Tensor:
    """Return ``(n, labels)`` outputs in the order of the examples."""
    model, device = backbone.module, _device(backbone.module)
    batches, order = backbone.encode(examples, 64)
    outputs = [
        logits(model(**{k: v.to(device) for k, v in batch.items()})).cpu()
        for batch in batches
    ]
    return torch.cat(outputs)[np.argsort(order)]


def _labels(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.label for example in examples])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _original(name: str) -> str:
    """Return a parameter's name before peft wrapped its module."""
    # No removeprefix: in a `Prompted`, the wrapped model is a submodule.
    unwrapped = name.replace("base_model.model.", "", 1)
    return unwrapped.replace(".modules_to_save.default", "")
