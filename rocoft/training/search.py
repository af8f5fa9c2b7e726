"""Search over learning rates: one training for each, the best on dev is kept.

Where the best of several rates is at an end of their grid, the grid is extended, see
`rocoft.training.grid`.

All training is done by transformers' Trainer. Progress is on disk: a search that was
killed and is started again with the same settings continues at its last checkpoint and
ends with the same weights, bit for bit.
"""

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
)

from rocoft.commands import Progress, replacing, write_text
from rocoft.training.checkpoints import (
    has_ended,
    last_checkpoint,
    load_weights,
    only_trained_is_saved,
    restore_final_state,
)
from rocoft.training.grid import EXTENSIONS, End, best_rate, grid_end, next_rate
from rocoft.training.history import finite, history, metrics_at, train_loss, warnings
from rocoft.training.meter import (
    Meter,
    ShowProgress,
    TrainLoss,
    peak_memory,
    reset_peak_memory,
)
from rocoft.training.methods import trained_parameters
from rocoft.training.readout_trainer import TrainingError
from rocoft.training.search_folder import LOGS, begin_or_check

Keep = Literal["best", "last"]
"""Which weights of a training are kept: the best on dev, or those at its end."""

PROTOCOL: dict[str, Any] = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
    "eval_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "log_level": "error",
}
"""Default arguments of the Trainer, the same for every method."""

RESERVED = (
    "output_dir",
    "learning_rate",
    "seed",
    "data_seed",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "remove_unused_columns",
    "label_names",
    "use_cpu",
    "disable_tqdm",
    "restore_callback_states_from_checkpoint",
)
"""Trainer arguments that the search sets itself."""


@dataclass(frozen=True)
class TrainingJob:
    """What is trained, on which examples, and how it is scored.

    Attributes:
        name: Method, task and model, for the settings on disk.
        build: Returns a new model; its trained parameters require gradients.
        train: Sequence of encoded training examples.
        dev: Sequence of encoded examples to choose learning rate and checkpoint by.
        collate: Makes a batch of a list of encoded examples.
        compute_metrics: From predictions to metrics.
        primary_metric: The metric to choose by; more is better.
        device: Device to train on.
        trainer: Classes of the Trainer and of its arguments.
        details: Other settings that decide the result, as JSON values.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Any
    dev: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    primary_metric: str
    device: torch.device
    trainer: tuple[type[Trainer], type[TrainingArguments]]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        model: The chosen model, in evaluation mode.
        trainer: Its Trainer, which predicts without computing metrics.
        runs: One record for each learning rate, in the order given, then those that
            were added.
        best: The record of the chosen one.
        end: The end of the grid at which the chosen one is; None if it is inside.
        distance: Euclidean distance of the trained parameters to their start.
        warnings: What makes the scores say less than they seem to.
    """

    model: nn.Module
    trainer: Trainer
    runs: list[dict[str, Any]]
    best: dict[str, Any]
    end: End | None
    distance: float
    warnings: list[str]


def search(
    job: TrainingJob,
    rates: Sequence[float],
    *,
    arguments: Mapping[str, Any],
    patience: int | None,
    seed: int,
    folder: Path,
    resume: bool,
    keep: Keep = "best",
    extensions: int = EXTENSIONS,
    progress: Progress | None = None,
) -> SearchResult:
    """Train with each learning rate and take the best on dev.

    While the best rate of several is at an end of the grid (`grid.grid_end`), the next
    rate beyond it is trained too.

    Args:
        job: The training job.
        rates: Peak learning rates.
        arguments: Arguments of the Trainer, over those of `PROTOCOL`.
        patience: Evaluations without a new best after which training stops; None
            trains to the end.
        seed: Seed of initialisation, order of the examples and dropout.
        folder: Folder for checkpoints, records and logs. An earlier search in it is
            removed unless it is resumed.
        resume: Continue the search in the folder.
        keep: Which weights of a training are kept, and scored on dev.
        extensions: Rates that are added beyond each end, at most. A single rate is
            never extended.
        progress: Called at every step.

    Returns:
        The best model and the records of all trainings.

    Raises:
        TrainingError: If the Trainer refuses an argument, the settings differ from
            those in the folder, the folder holds other files, or every training
            diverged.
    """
    if not rates:
        raise TrainingError("no learning rate was given. Give one or more with --lr.")
    if keep == "last" and patience is not None:
        raise TrainingError(
            f"patience={patience} stops a training at its best weights, but "
            "keep='last' takes its last ones. Leave one of them out."
        )
    settings = {
        "name": job.name,
        "rates": list(rates),
        "extensions": extensions,
        "arguments": dict(arguments),
        "patience": patience,
        "keep": keep,
        "seed": seed,
        "metric": job.primary_metric,
        "examples": [len(job.train), len(job.dev)],
        "examples_sha256": _sha256([*job.train, *job.dev]),
        **job.details,
    }
    begin_or_check(folder, settings, resume)
    trainer_arguments = lambda rate: _arguments(
        job, rate, arguments, seed, folder / _file(rate), keep
    )
    runs: dict[float, dict[str, Any]] = {}
    scores: dict[float, float | None] = {}

    def train(rate: float) -> None:
        file = folder / f"{_file(rate)}.json"
        if not file.is_file():
            _train(job, trainer_arguments(rate), patience, file, progress)
        runs[rate] = json.loads(file.read_text())
        dev = runs[rate]["dev"]
        scores[rate] = None if dev is None else dev[job.primary_metric]

    for rate in rates:
        train(rate)
    left = {"lowest": extensions, "highest": extensions}
    while (end := grid_end(scores)) and left[end]:
        if (beyond := next_rate(scores, end)) is None:
            break
        left[end] -= 1
        train(beyond)
    best = best_rate(scores)
    if best is None:
        raise TrainingError(
            f"training diverged with every learning rate of {list(rates)}: the outputs "
            "were not finite. Give lower ones with --lr."
        )
    with seeded_generators(seed):
        model = job.build()
        trainer = _trainer(job, model, trainer_arguments(best))
    weights = load_file(folder / f"{_file(best)}.safetensors")
    distance = load_weights(model, weights)
    model.eval()
    trainer.compute_metrics = None
    return SearchResult(
        model,
        trainer,
        list(runs.values()),
        runs[best],
        grid_end(scores),
        distance,
        warnings(list(runs.values()), runs[best], job.primary_metric, distance),
    )


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch; restore them afterwards.

    Args:
        seed: The seed.

    Yields:
        None.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _file(rate: float) -> str:
    """Return the name of a rate's files, which no other rate has."""
    return f"lr-{float(rate)!r}"


def _sha256(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a checksum of encoded examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True).encode())
    return digest.hexdigest()


def _arguments(
    job: TrainingJob,
    rate: float,
    given: Mapping[str, Any],
    seed: int,
    folder: Path,
    keep: Keep,
) -> TrainingArguments:
    if reserved := sorted(set(given) & set(RESERVED)):
        raise TrainingError(
            f"arguments {', '.join(reserved)} are set by the search itself. Leave them "
            "out."
        )
    options = {**PROTOCOL, **given}
    options.setdefault("save_strategy", options["eval_strategy"])
    if "eval_steps" in options:
        options.setdefault("save_steps", options["eval_steps"])
    try:
        return job.trainer[1](
            **options,
            output_dir=str(folder),
            learning_rate=rate,
            seed=seed,
            load_best_model_at_end=keep == "best",
            metric_for_best_model=job.primary_metric,
            greater_is_better=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=job.device.type == "cpu",
            disable_tqdm=True,
            # A resumed training keeps its count of evaluations for patience.
            restore_callback_states_from_checkpoint=True,
        )
    except TypeError as error:
        raise TrainingError(f"the Trainer refuses an argument: {error}.") from None


def _trainer(
    job: TrainingJob,
    model: nn.Module,
    options: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    _check_trackers(options)
    trainer = job.trainer[0](
        model,
        options,
        data_collator=job.collate,
        train_dataset=job.train,
        eval_dataset=job.dev,
        compute_metrics=job.compute_metrics,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    folder = Path(str(options.output_dir))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # Logs in output_dir would be removed with the checkpoints.
            callback.logging_dir = str(folder.with_name(LOGS) / folder.name)
    return trainer


def _check_trackers(options: TrainingArguments) -> None:
    trackers: Any = options.report_to  # TrainingArguments has made it a list.
    for tracker in trackers:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"tracker {tracker!r} of report_to cannot be used: {error} Install "
                "it, choose another, or leave --report_to out."
            ) from error


def _train(
    job: TrainingJob,
    options: TrainingArguments,
    patience: int | None,
    record_file: Path,
    progress: Progress | None,
) -> None:
    """Train once; write its weights and its record beside its checkpoints."""
    meter = Meter()
    callbacks: list[TrainerCallback] = [meter, TrainLoss()]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    if progress is not None:
        callbacks.append(ShowProgress(f"lr {options.learning_rate!r}", progress))
    folder = Path(str(options.output_dir))
    checkpoint, best = last_checkpoint(folder), options.load_best_model_at_end
    with seeded_generators(options.seed):
        model = job.build()
        peak_was_reset = reset_peak_memory(job.device)
        with only_trained_is_saved(model):
            trainer = _trainer(job, model, options, callbacks)
            if checkpoint is not None and has_ended(checkpoint):
                restore_final_state(trainer, checkpoint, best=best)
            else:
                trainer.train(resume_from_checkpoint=checkpoint)
            if not best and not metrics_at(trainer, trainer.state.global_step):
                trainer.evaluate()
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in trained_parameters(model).items()
    }
    with replacing(record_file.with_suffix(".safetensors")) as part:
        save_file(weights, part)
    state = trainer.state
    dev = metrics_at(trainer, state.best_global_step if best else state.global_step)
    if dev is not None and dev[job.primary_metric] is None:
        dev = None  # The outputs were not finite.
    record = {
        "learning_rate": options.learning_rate,
        "dev": dev,
        "steps": state.global_step,
        "epochs": state.epoch,
        "train_loss": finite(train_loss(trainer)),
        "seconds_per_step": meter.seconds,
        "steps_timed": len(meter.times),
        # Without a step in this process, its memory is not that of the training.
        "peak_memory_bytes": peak_memory(job.device) if meter.times else None,
        "peak_memory_is_of_this_training": peak_was_reset,
        "history": history(trainer),
    }
    write_text(record_file, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
