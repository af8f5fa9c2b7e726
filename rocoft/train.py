"""Fine-tune a pretrained transformer by rows and columns, or by a rival method.

    python -m rocoft.train
    python -m rocoft.train --model roberta-base --task sst2 --rows 3
    python -m rocoft.train --method lora:8 --lr 1e-4 3e-4 1e-3 --shots 16

The learning rate is chosen on dev, the best checkpoint is tested once. A run that was
killed goes on with the same command and ``--resume``.
"""

import contextlib
import datetime
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rocoft.console import progress_bar, quiet_libraries
from rocoft.files import write_text
from rocoft.methods import parse_method
from rocoft.options import OptionError, Options, parse_options
from rocoft.results import RECORD
from rocoft.search import LOGS, differences
from rocoft.tasks import DEFAULT_TASK

USAGE_ERROR = 2
CONFIG = "config.yaml"
SEARCH = "search"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(parse_options(given), given)
    except (ValueError, OSError) as error:
        # Every error of ours is one of these and says its way out in its text.
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _run(options: Options, given: list[str]) -> None:
    start = time.perf_counter()
    quiet = options.output.quiet or options.output.json
    folder = _begin(options)
    if (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text())
        _show(record, folder, options, "this run is finished")
        return
    with quiet_libraries(), _nothing_left_of_a_false_start(folder):
        # Imported here: --help and mistyped options answer at once.
        from rocoft.results import write_results

        with progress_bar(quiet) as progress:
            tuned, tokenizer = _tuned(options, folder / SEARCH, progress, quiet)
        record = {
            "command": shlex.join(["python", "-m", "rocoft.train", *given]),
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
    _show(record, folder, options)


@contextlib.contextmanager
def _nothing_left_of_a_false_start(folder: Path) -> Iterator[None]:
    """Remove the folder of a run that fails before there is anything to resume."""
    try:
        yield
    except BaseException:
        if not any((folder / SEARCH).glob("lr-*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _begin(options: Options) -> Path:
    """Return the folder of the run, begun with its resolved options."""
    spec = options.spec()
    parse_method(spec)  # A mistyped one must cost no earlier run.
    given = options.output
    model = "minilm" if options.model.model is None else Path(options.model.model).name
    data = options.task.data
    task = Path(data).stem if data else options.task.task or DEFAULT_TASK
    parts = (model, task, spec, f"seed{options.task.seed}")
    name = given.name or re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))
    folder = Path(given.output_dir) / name
    resolved = yaml.safe_dump(options.resolved(), sort_keys=False)
    config = folder / CONFIG
    if folder.exists() and not config.is_file():
        raise OptionError(
            f"{str(folder)!r} exists and is no earlier run. Choose another --name."
        )
    if given.overwrite and folder.exists():
        shutil.rmtree(folder)
    if folder.exists():
        if not given.resume:
            raise OptionError(
                f"{str(folder)!r} holds an earlier run. Go on with --resume, choose "
                "another --name, or remove it with --overwrite."
            )
        _check_same(yaml.safe_load(config.read_text()), options.resolved(), folder)
        return folder
    try:
        folder.mkdir(parents=True)
        write_text(config, resolved)
    except OSError as error:
        raise OptionError(
            f"{str(folder)!r} cannot be written to: {error.strerror}. Choose another "
            "folder with --output_dir."
        ) from error
    return folder


def _check_same(begun: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    if differ := differences(begun, now):
        raise OptionError(
            f"{str(folder)!r} was begun with other options: {differ}. Resume with the "
            "same ones, or choose another --name."
        )


def _tuned(
    options: Options, folder: Path, progress: Any, quiet: bool
) -> tuple[Any, Any]:
    """Return the fine-tuned model and its tokenizer."""
    import torch

    from rocoft.backbone import load_backbone
    from rocoft.language import has_prompts
    from rocoft.trainer import fine_tune

    common: dict[str, Any] = {
        "lrs": options.training.lr or None,
        "arguments": options.training.arguments(),
        "patience": options.training.early_stopping_patience,
        "seed": options.task.seed,
        "folder": folder,
        "resume": True,
        "progress": progress,
    }
    if options.task.data is not None and has_prompts(Path(options.task.data)):
        return _tuned_language(options, common, quiet)
    task = _task(options)
    split = _split(options, task)
    if not quiet and options.model.model is None:
        print("model: embedded MiniLM-L6; name another with --model")  # noqa: T201
    given = options.model
    backbone = load_backbone(
        given.model,
        split,
        readout=given.readout,
        head="random" if task.regression else given.head_init,
        seed=options.task.seed,
        max_length=given.max_length,
        device=given.device,
        dtype=getattr(torch, given.dtype),
    )
    _check_prompt(options, split, backbone)
    if not quiet:
        for line in _opening(split, backbone, options):
            print(line)  # noqa: T201
    tuned = fine_tune(backbone, split, options.spec(), **common)
    return tuned, backbone.tokenizer


def _tuned_language(
    options: Options, common: dict[str, Any], quiet: bool
) -> tuple[Any, Any]:
    """Do the same with a language model and a file of prompts."""
    import torch

    from rocoft.language import split_completions
    from rocoft.sft import fine_tune_language, load_language_model

    given, task = options.model, options.task
    file = Path(str(task.data))
    refused = {
        "--task": task.task,
        "--data_dir": task.data_dir,
        "--head_init": None if given.head_init == "random" else given.head_init,
        "--shots": task.shots,
        "--template": task.template,
        "--label_words": task.label_words or None,
        "--readout": given.readout,
    }
    if odd := [name for name, value in refused.items() if value is not None]:
        raise OptionError(
            f"{task.data!r} holds prompts, which {', '.join(odd)} has no meaning for. "
            "Leave it out."
        )
    if given.model is None:
        raise OptionError(
            f"{task.data!r} holds prompts, which the embedded MiniLM cannot complete. "
            "Name a language model with --model."
        )
    data = split_completions(file, seed=task.seed, test_size=task.test_size)
    start = load_language_model(
        given.model,
        max_length=given.max_length,
        device=given.device,
        dtype=getattr(torch, given.dtype),
    )
    if not quiet:
        kind = "multiple choice" if data.multiple_choice else "completions"
        print(  # noqa: T201
            f"prompts: {data.source}, {kind}, {len(data.train)} training, "
            f"{len(data.dev)} dev and {len(data.test)} test examples\n"
            f"method: {options.spec()}"
        )
        examples = [*data.train, *data.dev, *data.test]
        if cut := start.truncated(examples):
            print(  # noqa: T201
                f"note: {cut} of {len(examples)} examples were cut to "
                f"{start.max_length} tokens"
            )
    tuned = fine_tune_language(start, data, options.spec(), **common)
    return tuned, start.tokenizer


def _task(options: Options) -> Any:
    from rocoft.tasks import load_file, load_task, with_prompt

    given = options.task
    others = {"--task": given.task, "--data_dir": given.data_dir}
    for name, value in others.items():
        if given.data is not None and value is not None:
            raise OptionError(
                f"--data {given.data!r} and {name} {value!r} both name examples. Give "
                "one of them."
            )
    if given.data is not None:
        task = load_file(Path(given.data), regression=True)
    else:
        folder = None if given.data_dir is None else Path(given.data_dir)
        task = load_task(given.task or DEFAULT_TASK, folder, regression=True)
    if given.template or given.label_words:
        task = with_prompt(
            task, given.template, given.label_words, option="--label_words"
        )
    return task


def _check_prompt(options: Options, split: Any, backbone: Any) -> None:
    """Refuse a template of which a causal model would not see the whole example."""
    if options.task.template is None or backbone.readout != "causal":
        return
    fields = ["{a}"] if split.train[0].b is None else ["{a}", "{b}"]
    if lost := [field for field in fields if field not in backbone.prompt.causal]:
        raise OptionError(
            f"--template {options.task.template!r} has no {' and '.join(lost)} before "
            "{mask}, and a causal model reads no further. Put {mask} at the end."
        )


def _split(options: Options, task: Any) -> Any:
    from rocoft.splits import few_shot, full_split

    shots, size, seed = options.task.shots, options.task.test_size, options.task.seed
    if shots is None:
        return full_split(task, seed=seed, test_size=size)
    size = size or len(task.test) or len(task.train)
    return few_shot(task, shots, size, seed, dev_shots=shots)


def _opening(split: Any, backbone: Any, options: Options) -> list[str]:
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
    """Return what a run came to, as lines of text.

    Args:
        record: As `results.json` holds it.
    """
    counts = record["parameters"]
    share = 100 * counts["trainable"] / counts["total"]
    lines = [
        f"trainable parameters: {counts['trainable']:,} with the head, "
        f"{counts['without_head']:,} without ({share:.3g} % of {counts['total']:,})"
    ]
    for run in record["learning_rates"]:
        dev = run["dev"]
        score = "diverged" if dev is None else f"{dev[record['metric']]:.4f}"
        chosen = run["learning_rate"] == record["learning_rate"]
        lines.append(
            f"learning rate {run['learning_rate']:g}: dev {record['metric']} {score}, "
            f"{run['steps']} steps{', chosen' if chosen else ''}"
        )
    if record.get("seconds_per_step") is not None:
        lines.append(f"time: {record['seconds_per_step']:.3f} s a step (median)")
    if record.get("peak_memory_bytes") is not None:
        memory = record["peak_memory_bytes"] / 2**20
        whole = "" if record["peak_memory_is_of_this_training"] else " since the start"
        lines.append(f"peak memory: {memory:,.0f} MiB{whole}")
    scores = ", ".join(f"{k} {v:.4f}" for k, v in record["test"].items())
    return [*lines, f"test ({record['examples']['test']} examples): {scores}"]


def _show(
    record: dict[str, Any], folder: Path, options: Options, note: str | None = None
) -> None:
    if options.output.json:
        print(json.dumps(record, indent=1))  # noqa: T201
    elif not options.output.quiet:
        for line in [*([note] if note else []), *summary(record)]:
            print(line)  # noqa: T201
        print(f"results: {folder}")  # noqa: T201


if __name__ == "__main__":
    raise SystemExit(main())
