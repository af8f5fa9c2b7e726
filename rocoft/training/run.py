"""A run of `python -m rocoft.train`: begun or resumed, fine-tuned, written, shown."""

import contextlib
import datetime
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rocoft.commands import (
    FolderKind,
    OptionError,
    Place,
    claimed,
    differences,
    is_taken,
    progress_bar,
    remove_parts,
    show_json,
    show_lines,
    write_text,
)
from rocoft.data import (
    Split,
    Task,
    few_shot,
    full_split,
    has_prompts,
    split_completions,
)
from rocoft.models import load_backbone, resolved_device
from rocoft.training.groups import plain
from rocoft.training.language import fine_tune_language, load_language_model
from rocoft.training.methods import parse_method
from rocoft.training.options import TrainOptions
from rocoft.training.results import RECORD, write_results
from rocoft.training.search_folder import LOGS, can_be_resumed
from rocoft.training.trainer import fine_tune

CONFIG = "config.yaml"
SEARCH = "search"
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading a record raises that someone has changed."""
FOLDER = FolderKind(
    "rocoft.train",
    "run",
    (CONFIG, SEARCH, LOGS, RECORD, "adapter", "model", "predictions.safetensors"),
)


def run(options: TrainOptions, command: str) -> list[str]:
    """Fine-tune, or continue, and write what came of it.

    Args:
        options: The command's options.
        command: The command line, for the record.

    Returns:
        Nothing that failed.

    Raises:
        ValueError: If the run cannot be done as asked.
    """
    spec = options.spec()
    parse_method(spec)  # A mistyped one must cost no earlier run.
    given = options.output
    parts = options.model.name, options.task.name, spec, f"seed{options.task.seed}"
    name = given.name or plain("-".join(parts))
    with claimed(given.output, name, FOLDER, overwrite=given.overwrite) as place:
        return _run(options, command, place)


def _run(options: TrainOptions, command: str, place: Place) -> list[str]:
    start = time.perf_counter()
    silent = options.output.silent
    device = resolved_device(options.model.device)
    _begin(options, device, place)
    folder = place.folder
    if (folder / RECORD).is_file():
        _show(_finished(folder), folder, options, "this run is finished")
        place.finish()
        return []
    remove_parts(folder)
    with _nothing_left_of_a_false_start(place):
        with progress_bar(silent) as progress:
            tuned, tokenizer = _tuned(options, device, folder / SEARCH, progress)
        record = {
            "command": command,
            "created": datetime.datetime.now(datetime.UTC).isoformat(
                timespec="seconds"
            ),
            "seconds": time.perf_counter() - start,
            **tuned.record,
        }
        write_results(folder, tuned, tokenizer, record)
    if (folder / SEARCH / LOGS).is_dir():
        shutil.copytree(folder / SEARCH / LOGS, folder / LOGS, dirs_exist_ok=True)
    shutil.rmtree(folder / SEARCH, ignore_errors=True)
    place.finish()
    _show(record, folder, options)
    return []


@contextlib.contextmanager
def _nothing_left_of_a_false_start(place: Place) -> Iterator[None]:
    """Remove the folder of a run that fails before there is anything to resume."""
    try:
        yield
    except BaseException:
        if not can_be_resumed(place.folder / SEARCH):
            place.abandon()
        raise


def _begin(options: TrainOptions, device: str, place: Place) -> None:
    """Begin the folder of a run with its resolved options, or check that it goes on."""
    given, folder = options.output, place.folder
    resolved = {**options.resolved(), "device": device}
    if is_taken(folder) and not given.overwrite:
        begun = _begun(folder)
        if begun is None:
            raise OptionError(
                f"{str(folder)!r} exists and is no earlier run. Choose another --name."
            )
        if not given.resume:
            raise OptionError(
                f"{str(folder)!r} holds an earlier run. Go on with --resume, choose "
                "another --name, or remove it with --overwrite."
            )
        if differ := differences(begun, resolved):
            raise OptionError(
                f"{str(folder)!r} was begun with other options: {differ}. Resume with "
                "the same ones, or choose another --name."
            )
        return
    try:
        with place.begun() as new:
            write_text(new / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
    except OSError as error:
        raise OptionError(
            f"{str(folder)!r} cannot be written to: {error.strerror}. Choose another "
            "folder with --output."
        ) from error


def _finished(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run, if it is one.

    Raises:
        OptionError: If someone has changed it so that it is none.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        summary(record)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise OptionError(
            f"{str(file)!r} is not as this command wrote it ({type(error).__name__}: "
            f"{error}). Restore it, choose another --name, or begin again with "
            "--overwrite."
        ) from error
    return dict(record)


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return the options with which a folder's run was begun; None if it has none."""
    try:
        begun = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    # Other programs, too, have files of this name.
    return begun if isinstance(begun, dict) and "num_train_epochs" in begun else None


def _tuned(
    options: TrainOptions, device: str, folder: Path, progress: Any
) -> tuple[Any, Any]:
    """Return the fine-tuned model and its tokenizer."""
    common: dict[str, Any] = {
        "lrs": list(options.training.lr) or None,
        "arguments": options.training.arguments(),
        "patience": options.training.early_stopping_patience,
        "seed": options.task.seed,
        "folder": folder,
        "resume": True,
        "progress": progress,
    }
    if options.task.data is not None and has_prompts(options.task.data):
        return _tuned_language(options, device, common)
    task = options.task.load(regression=True)
    split = _split(options, task)
    if not options.output.silent and options.model.model is None:
        show_lines(["model: embedded MiniLM-L6; name another with --model"])
    given = options.model
    backbone = load_backbone(
        given.model,
        split,
        readout=given.readout,
        head="random" if task.regression else given.head_init,
        seed=options.task.seed,
        max_length=given.max_length,
        device=device,
        dtype=getattr(torch, given.dtype),
    )
    _check_prompt(options, split, backbone)
    if not options.output.silent:
        show_lines(_opening(split, backbone, options))
    tuned = fine_tune(backbone, split, options.spec(), **common)
    return tuned, backbone.tokenizer


def _tuned_language(
    options: TrainOptions, device: str, common: dict[str, Any]
) -> tuple[Any, Any]:
    """Do the same with a language model and a file of prompts."""
    given, task = options.model, options.task
    assert task.data is not None
    data = str(task.data)
    refused = {
        "--head-init": None if given.head_init == "random" else given.head_init,
        "--shots": task.shots,
        "--template": task.template,
        "--label-words": task.label_words or None,
        "--readout": given.readout,
    }
    if odd := [name for name, value in refused.items() if value is not None]:
        raise OptionError(
            f"{data!r} holds prompts, which {', '.join(odd)} has no meaning for. "
            "Leave it out."
        )
    if given.model is None:
        raise OptionError(
            f"{data!r} holds prompts, which the embedded MiniLM cannot complete. "
            "Name a language model with --model, such as the embedded smollm2."
        )
    prompts = split_completions(task.data, seed=task.seed, test_size=task.test_size)
    start = load_language_model(
        given.model,
        max_length=given.max_length,
        device=device,
        dtype=getattr(torch, given.dtype),
    )
    if not options.output.silent:
        kind = "multiple choice" if prompts.multiple_choice else "completions"
        lines = [
            f"prompts: {prompts.source}, {kind}, {len(prompts.train)} training, "
            f"{len(prompts.dev)} dev and {len(prompts.test)} test examples",
            f"method: {options.spec()}",
            *(f"note: {note}" for note in start.notes),
        ]
        examples = [*prompts.train, *prompts.dev, *prompts.test]
        if cut := start.truncated(examples):
            lines.append(
                f"note: {cut} of {len(examples)} examples were cut to "
                f"{start.max_length} tokens"
            )
        show_lines(lines)
    tuned = fine_tune_language(start, prompts, options.spec(), **common)
    return tuned, start.tokenizer


def _check_prompt(options: TrainOptions, split: Any, backbone: Any) -> None:
    """Refuse a template of which a causal model would not see the whole example."""
    if options.task.template is None or backbone.readout != "causal":
        return
    fields = ["{a}"] if split.train[0].b is None else ["{a}", "{b}"]
    if lost := [field for field in fields if field not in backbone.prompt.causal]:
        raise OptionError(
            f"--template {options.task.template!r} has no {' and '.join(lost)} before "
            "{mask}, and a causal model reads no further. Put {mask} at the end."
        )


def _split(options: TrainOptions, task: Task) -> Split:
    shots, size, seed = options.task.shots, options.task.test_size, options.task.seed
    if shots is None:
        return full_split(task, seed=seed, test_size=size)
    size = size or len(task.test) or len(task.train)
    return few_shot(task, shots, size, seed, dev_shots=shots)


def _opening(split: Any, backbone: Any, options: TrainOptions) -> list[str]:
    task = split.task
    embedded = options.task.task is None and options.task.data is None
    lines = ["task: embedded reviews; name another with --task or --data"] * embedded
    lines += [
        f"task: {task.name} ({task.source}), {len(split.train)} training, "
        f"{len(split.dev)} dev and {len(split.test)} test examples, labels "
        f"{', '.join(task.labels)}",
        f"readout: {backbone.readout}",
        f"method: {options.spec()}",
    ]
    return lines + [f"note: {note}" for note in backbone.notes]


def summary(record: Mapping[str, Any]) -> list[str]:
    """Return what came of a run, as lines of text.

    Args:
        record: The content of `results.json`.
    """
    counts = record["parameters"]
    share = 100 * counts["trainable"] / counts["total"]
    lines = [f"warning: {text}" for text in record.get("warnings", ())]
    lines += [
        f"trainable parameters: {counts['trainable']:,} with the head, "
        f"{counts['without_head']:,} without ({share:.3g} % of {counts['total']:,})"
    ]
    for run in record["learning_rates"]:
        dev = run["dev"]
        score = (
            "diverged"
            if dev is None
            else _shown(record["metric"], dev[record["metric"]])
        )
        chosen = run["learning_rate"] == record["learning_rate"]
        lines.append(
            f"learning rate {run['learning_rate']!r}: dev {record['metric']} {score}, "
            f"{run['steps']} steps{', chosen' if chosen else ''}"
        )
    if end := record.get("rate_at_end"):
        lines.append(
            f"note: the chosen learning rate is the {end} of those tried; beyond it "
            "there may be a better one"
        )
    if record.get("seconds_per_step") is not None:
        lines.append(f"time: {record['seconds_per_step']:.3f} s a step (median)")
    if record.get("peak_memory_bytes") is not None:
        memory = record["peak_memory_bytes"] / 2**20
        whole = "" if record["peak_memory_is_of_this_training"] else " since the start"
        lines.append(f"peak memory: {memory:,.0f} MiB{whole}")
    scores = ", ".join(f"{k} {_shown(k, v)}" for k, v in record["test"].items())
    return [*lines, f"test ({record['examples']['test']} examples): {scores}"]


def _shown(metric: str, score: float) -> str:
    """Return a score as text, in percent unless it is a log-likelihood."""
    if metric == "log_likelihood":
        return f"{score:.4f}"
    return f"{100 * score:.1f} %"


def _show(
    record: dict[str, Any], folder: Path, options: TrainOptions, note: str | None = None
) -> None:
    if options.output.json:
        show_json(record)
    elif not options.output.quiet:
        show_lines([*([note] if note else []), *summary(record), f"results: {folder}"])
