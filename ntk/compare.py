"""Is the kernel over a few rows or columns close to the full one?

    python -m ntk.compare
    python -m ntk.compare --rows 1 3 --columns 1 3 --lora 8 --bias --layers 0 5
    python -m ntk.compare --model roberta-base --rows 3 --task sst2
    accelerate launch --multi_gpu -m ntk.compare --device cuda --model roberta-base

Compares empirical neural tangent kernels of a pretrained transformer over chosen
parameters with the kernel over all of them, and trains kernel classifiers on each.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntk.options import parse_options, requested_spaces
from ntk.processes import Processes, launched_rank
from ntk.storage import StorageError
from rocoft.console import progress_bar, quiet_libraries

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with contextlib.ExitStack() as silence:
            if launched_rank():
                # One of several processes says what all of them find wrong.
                silence.enter_context(contextlib.redirect_stderr(None))
            options = parse_options(given)
        _run(options, given)
    except (ValueError, OSError) as error:
        # Every error of ours is one of these and says its way out in its text.
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; no report was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _run(options: argparse.Namespace, given: list[str]) -> None:
    spaces = requested_spaces(options)
    folder = None if options.plan else _folder(options)
    with quiet_libraries():
        # Imported here: mistyped options need not wait for what draws and evaluates.
        import torch

        from ntk.comparison import Comparison
        from ntk.computation import Computation
        from ntk.estimate import Estimate
        from ntk.evaluation import evaluate
        from rocoft.backbone import load_backbone
        from rocoft.trainer import versions

        start = time.perf_counter()
        processes = Processes.launched(options.device)
        helps = processes is not None and not processes.is_first
        quiet = options.quiet or options.json or helps
        split = _split(options)
        if not quiet and options.model is None:
            print("model: embedded MiniLM-L6; name another with --model")  # noqa: T201
        backbone = load_backbone(
            options.model,
            split,
            readout=options.readout,
            head=options.head_init,
            seed=options.seed,
            max_length=options.max_length,
            device=options.device if processes is None else str(processes.device),
            dtype=getattr(torch, options.dtype),
            load_in=options.load_in,
            offload=options.offload,
        )
        if not quiet:
            for line in _opening(split, backbone):
                print(line)  # noqa: T201
        loaded = time.perf_counter() - start
        compared = Comparison.of(
            backbone,
            split,
            spaces,
            with_head=options.head,
            batch_size=options.batch_size,
            approximate=options.approximate,
            kind=options.kind,
        )
        spill = options.output / ".cache" if options.spill else None
        if folder is None:
            how = compared.plan(options.memory, spill, processes)
            if helps:
                return
            found = Estimate.of(
                backbone.module,
                compared.data.batches,
                how,
                processes=1 if processes is None else processes.size,
            )
            print("\n".join(found.lines()))  # noqa: T201
            return
        with progress_bar(quiet) as progress:
            computation = Computation.of(
                compared,
                kind=options.kind,
                precision=options.precision,
                implementation=options.implementation,
                memory=options.memory,
                cache=options.output / ".cache" if options.cache else None,
                spill=spill,
                processes=processes,
                progress=progress,
            )
            if helps:
                return
            evaluation = evaluate(
                compared, computation, offset=options.offset, progress=progress
            )
        record = {
            "version": importlib.metadata.version("rocoft-ntk"),
            "command": shlex.join(["python", "-m", "ntk.compare", *given]),
            "created": datetime.datetime.now(datetime.UTC).isoformat(
                timespec="seconds"
            ),
            "versions": versions("numpy", "scikit-learn"),
            **evaluation.record,
        }
        record["timing"] = {"load": loaded, **record["timing"]}
        _write(record, evaluation.kernels, folder)
    _show(record, folder, options)


def _split(options: argparse.Namespace) -> Any:
    from rocoft.splits import few_shot
    from rocoft.tasks import load_file, load_task, with_prompt

    if options.data is not None:
        task = load_file(options.data)
    else:
        task = load_task(options.task, options.data_dir)
    if options.template or options.label_words:
        task = with_prompt(task, options.template, options.label_words or ())
    return few_shot(task, options.shots, options.test_size, options.seed)


def _folder(options: argparse.Namespace) -> Path:
    """Return where results will go, after making sure that they can."""
    model = "minilm" if options.model is None else Path(options.model).name
    task = options.task if options.data is None else options.data.stem
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = options.output / (options.name or f"{model}-{task}-{stamp}")
    if folder.exists() and not (folder / "report.json").is_file():
        raise StorageError(
            f"{str(folder)!r} exists and is no earlier result. Choose another --name."
        )
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StorageError(
            f"{str(folder)!r} cannot be written to. Choose another folder with "
            "--output."
        )
    return folder


def _write(record: dict[str, Any], kernels: dict[str, Any], folder: Path) -> None:
    """Write everything beside the folder, then put it in its place."""
    from ntk.report import write_report
    from ntk.storage import save_kernels

    header = {
        key: record[key] for key in ("version", "command", "model", "task", "kernel")
    }
    header["rows"] = "training then test examples; columns: training examples"
    header["spaces"] = {entry["label"]: entry["name"] for entry in record["spaces"]}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise StorageError(
            f"{str(folder.parent)!r} cannot be written to: {error.strerror}. Choose "
            "another folder with --output."
        ) from error
    try:
        write_report(record, part)
        save_kernels(part / "kernels.safetensors", kernels, header)
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _show(record: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    from rich.console import Console

    from ntk.findings import summary_lines
    from ntk.report import table, to_json

    if options.json:
        print(to_json(record))  # noqa: T201
        return
    if options.quiet:
        return
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table(record))
    for line in summary_lines(record):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _opening(split: Any, backbone: Any) -> list[str]:
    task = split.task
    lines = [
        f"task: {task.name} ({task.source}), {len(split.train)} training and "
        f"{len(split.test)} test examples, labels {', '.join(task.labels)}",
        f"readout: {backbone.readout}",
    ]
    return lines + [f"note: {note}" for note in backbone.notes]


if __name__ == "__main__":
    raise SystemExit(main())
