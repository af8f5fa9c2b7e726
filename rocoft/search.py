"""Training once for each learning rate, and keeping the one that does best on dev.

Everything here goes through transformers' Trainer. What is finished is on disk: a
search that was killed and is started again with the same settings continues at its last
checkpoint and ends with the same weights, bit for bit.
"""

import contextlib
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
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

from rocoft.checkpoints import (
    has_ended,
    last_checkpoint,
    only_trained_is_saved,
    take,
)
from rocoft.console import Progress
from rocoft.files import replacing, write_text
from rocoft.meter import Meter, peak_memory, reset_peak_memory
from rocoft.methods import trained_parameters

Kept = Literal["best", "last"]
"""Which weights of a training count: the best ones on dev, or those at its end."""

LOGS = "logs"
"""Folder of the trackers' files, in that of the search."""

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
"""Arguments of the Trainer where none are given; the same for every method."""

OWN = (
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
"""Arguments of the Trainer that the search sets itself."""


class TrainingError(ValueError):
    """A training that cannot be done as asked, or that came to nothing."""


class OrderedTrainer(Trainer):
    """A Trainer that predicts in the order of the examples.

    transformers' own predicts in the order of their lengths where training is sampled
    by length, and does not say which prediction is whose.
    """

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how it is judged.

    Attributes:
        name: Of the method, the task and the model.
        build: Makes the model anew, with what is to be trained requiring gradients.
        train: Training examples, a sequence of what ``collate`` takes.
        dev: Those to choose by.
        collate: Makes a batch of several.
        judge: From predictions to metrics.
        chief: The metric to choose by; more is better.
        device: Where to train.
        trainer: Kind of Trainer, and of its arguments.
        details: What else decides the result, as JSON knows it.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Any
    dev: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    judge: Callable[[EvalPrediction], dict[str, float]]
    chief: str
    device: torch.device
    trainer: tuple[type[Trainer], type[TrainingArguments]]
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The best of a search.

    Attributes:
        model: The model that was chosen, in evaluation mode.
        trainer: Its Trainer; it predicts without judging.
        runs: What each learning rate came to, in their order.
        best: One of them.
    """

    model: nn.Module
    trainer: Trainer
    runs: list[dict[str, Any]]
    best: dict[str, Any]


def search(
    job: Job,
    rates: Sequence[float],
    *,
    arguments: Mapping[str, Any],
    patience: int | None,
    seed: int,
    folder: Path,
    resume: bool,
    keep: Kept = "best",
    progress: Progress | None = None,
) -> Found:
    """Train with each learning rate and take the best on dev, the first of equals.

    Args:
        job: What is trained.
        rates: Peak learning rates.
        arguments: Of the Trainer, over those of `PROTOCOL`.
        patience: Evaluations without a new best after which training stops; None
            trains to the end.
        seed: Of initialisation, order of the examples and dropout.
        folder: For checkpoints, what is finished, and logs. An earlier search in it
            is removed unless it is resumed.
        resume: Continue what lies in the folder.
        keep: Which weights of a training count, and are judged on dev.
        progress: Told of every step.

    Returns:
        The best.

    Raises:
        TrainingError: If the settings are no Trainer's, differ from those that the
            folder was begun with, the folder holds something else, or every training
            diverged.
    """
    if not rates:
        raise TrainingError("no learning rate was given. Give one or more with --lr.")
    if keep == "last" and patience is not None:
        raise TrainingError(
            f"patience={patience} stops a training at its best weights, and "
            "keep='last' takes those at its end. Leave one of them out."
        )
    settings = {
        "name": job.name,
        "rates": list(rates),
        "arguments": dict(arguments),
        "patience": patience,
        "keep": keep,
        "seed": seed,
        "metric": job.chief,
        "examples": [len(job.train), len(job.dev)],
        "examples_sha256": _sha256([*job.train, *job.dev]),
        **job.details,
    }
    _agree(folder, settings, resume)
    prepared = lambda rate: _arguments(
        job, rate, arguments, seed, folder / f"lr-{rate:g}", keep
    )
    runs = []
    for rate in rates:
        done = folder / f"lr-{rate:g}.json"
        if not done.is_file():
            _train(job, prepared(rate), patience, done, progress)
        runs.append(json.loads(done.read_text()))
    finite = [run for run in runs if run["dev"] is not None]
    if not finite:
        raise TrainingError(
            f"training diverged with every learning rate of {list(rates)}: the outputs "
            "were not finite. Give lower ones with --lr."
        )
    best = max(finite, key=lambda run: run["dev"][job.chief])
    rate = best["learning_rate"]
    with own_random_numbers(seed):
        model = job.build()
        trainer = _trainer(job, model, prepared(rate))
    _put(model, load_file(folder / f"lr-{rate:g}.safetensors"))
    model.eval()
    trainer.compute_metrics = None
    return Found(model, trainer, runs, best)


@contextlib.contextmanager
def search_folder(folder: Path | None) -> Iterator[Path]:
    """Give a search a folder, a temporary one if there is none.

    Args:
        folder: The one that was asked for.

    Yields:
        Where to search.
    """
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rocoft-") as place:
        yield Path(place) / "search"


@contextlib.contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Seed every global generator, and leave them afterwards as they were.

    Args:
        seed: For Python, NumPy and torch.

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


class _Shown(TrainerCallback):
    """Tells of every step."""

    def __init__(self, what: str, progress: Progress) -> None:
        self.what, self.progress = what, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(self.what, state.global_step, state.max_steps)


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between settings, in words; nothing if they are the same."""
    return "; ".join(
        f"{key} {begun.get(key)} there, {now[key]} now"
        for key in now
        if begun.get(key) != now[key]
    )


def _agree(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Begin a folder, or see that it was begun with the same settings."""
    file = folder / "settings.json"
    text = json.dumps(settings, indent=1, default=str) + "\n"
    if resume and file.is_file():
        begun, given = json.loads(file.read_text()), json.loads(text)
        if differ := differences(begun, given):
            raise TrainingError(
                f"{str(folder)!r} was begun with other settings: {differ}. Start with "
                "the same ones, or elsewhere."
            )
        return
    if file.is_file():
        shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise TrainingError(
            f"folder={str(folder)!r} holds files but no earlier search: it has no "
            "settings.json. Give an empty folder or a new one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def _sha256(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a checksum of encoded examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example, sort_keys=True).encode())
    return digest.hexdigest()


def _arguments(
    job: Job,
    rate: float,
    given: Mapping[str, Any],
    seed: int,
    folder: Path,
    keep: Kept,
) -> TrainingArguments:
    if taken := sorted(set(given) & set(OWN)):
        raise TrainingError(
            f"arguments {', '.join(taken)} are set by the search itself. Leave them "
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
            metric_for_best_model=job.chief,
            greater_is_better=True,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=job.device.type == "cpu",
            disable_tqdm=True,
            # Patience counts on after a resumption.
            restore_callback_states_from_checkpoint=True,
        )
    except TypeError as error:
        raise TrainingError(f"the Trainer refuses an argument: {error}.") from None


def _trainer(
    job: Job,
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
        compute_metrics=job.judge,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    place = Path(str(options.output_dir))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # Beside the checkpoints it would be removed with them.
            callback.logging_dir = str(place.with_name(LOGS) / place.name)
    return trainer


def _check_trackers(options: TrainingArguments) -> None:
    trackers: Any = options.report_to  # A list by now.
    for tracker in trackers:
        try:
            for kind in get_reporting_integration_callbacks([tracker]):
                kind()
        except (ImportError, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"tracker {tracker!r} of report_to cannot be used: {error} Install "
                "it, choose another, or leave --report_to out."
            ) from error


def _train(
    job: Job,
    options: TrainingArguments,
    patience: int | None,
    done: Path,
    progress: Progress | None,
) -> None:
    """Train once; leave its weights and what it came to beside its checkpoints."""
    meter = Meter()
    callbacks: list[TrainerCallback] = [meter]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    if progress is not None:
        callbacks.append(_Shown(f"lr {options.learning_rate:g}", progress))
    folder = Path(str(options.output_dir))
    checkpoint, best = last_checkpoint(folder), options.load_best_model_at_end
    with own_random_numbers(options.seed):
        model = job.build()
        own_peak = reset_peak_memory(job.device)
        with only_trained_is_saved(model):
            trainer = _trainer(job, model, options, callbacks)
            if checkpoint is not None and has_ended(checkpoint):
                take(trainer, checkpoint, best=best)
                loss = float("nan")  # Of steps that were not taken here.
            else:
                result = trainer.train(resume_from_checkpoint=checkpoint)
                loss = result.training_loss
            if not best and not _judged_at(trainer, trainer.state.global_step):
                trainer.evaluate()
    weights = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in trained_parameters(model).items()
    }
    with replacing(done.with_suffix(".safetensors")) as part:
        save_file(weights, part)
    state = trainer.state
    dev = _judged_at(trainer, state.best_global_step if best else state.global_step)
    if dev is not None and dev[job.chief] is None:
        dev = None  # The outputs were not finite.
    record = {
        "learning_rate": options.learning_rate,
        "dev": dev,
        "steps": state.global_step,
        "epochs": state.epoch,
        "train_loss": _finite(loss),
        "seconds_per_step": meter.seconds,
        "steps_timed": len(meter.times),
        "peak_memory_bytes": peak_memory(job.device),
        "peak_memory_is_of_this_training": own_peak,
        "history": _history(trainer),
    }
    write_text(done, json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def _history(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the metrics of every evaluation, in their order."""
    log = trainer.state.log_history
    return [_judged(entry) for entry in log if "eval_loss" in entry]


def _judged_at(trainer: Trainer, step: int | None) -> dict[str, Any] | None:
    """Return the metrics of the evaluation at a step."""
    return next((e for e in _history(trainer) if e["step"] == step), None)


def _judged(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of one evaluation, and the step it was made at."""
    costs = ("runtime", "samples_per_second", "steps_per_second")
    found = {
        key.removeprefix("eval_"): _finite(value)
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(costs)
    }
    return {"step": entry["step"], **found}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put trained weights into a model that was prepared in the same way."""
    parameters = trained_parameters(model)
    if parameters.keys() != weights.keys():
        raise TrainingError(
            "the weights on disk are of other parameters than those that are trained "
            "now. Start elsewhere."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
