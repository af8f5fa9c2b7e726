"""Is the kernel over a few rows or columns close to the full one?

    python -m ntk.compare
    python -m ntk.compare --rows 1 3 --columns 1 3 --lora 8 --bias --layers 0 5
    python -m ntk.compare --model roberta-base --rows 3 --task sst2

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
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ntk.engine import Progress
from ntk.kernel import IMPLEMENTATIONS, KINDS
from ntk.notation import parse_space
from ntk.spaces import Bias, Columns, Embeddings, LoRA, Norm, Rows, Space
from ntk.storage import StorageError
from rocoft.selection import STRATEGIES
from rocoft.tasks import HUB, TaskError

USAGE_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.compare",
        description="Compare the NTK of a pretrained transformer over a few rows, "
        "columns, LoRA matrices, biases or layers with the NTK over all parameters, "
        "and train kernel classifiers on each. Without options it uses the embedded "
        "MiniLM-L6 and the embedded task 'reviews', with rows 1 3 and columns 1 3.",
        epilog="A SPEC reads rows:3@query,value/layers=0,11+bias: a name (full, rows, "
        "columns, lora, bias, head, norm, embeddings), a count, modules after @, "
        "options after / (layers=, strategy=, seed=, indices=, alpha=, rescale), and + "
        "for sums. Exit codes: 0 done, 2 bad input, 130 interrupted.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="ID",
        help="hub id or local folder (default: the embedded MiniLM)",
    )
    add(
        "--readout",
        choices=("head", "masked", "causal"),
        help="outputs: logits of a "
        "classification head, or of label words at the mask or after the prompt "
        "(default: label words for language models whose task has a prompt, else head)",
    )
    add(
        "--head-init",
        choices=("probe", "random"),
        default="probe",
        help="how a head "
        "that the checkpoint lacks is made: fitted to the training examples by logistic "
        "regression, or seeded random (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "float64"),
        default="float32",
        help="precision of the model (default: %(default)s)",
    )
    add(
        "--device",
        default="cpu",
        help="where to compute, such as cuda (default: %(default)s)",
    )
    add(
        "--max-length",
        type=_positive,
        default=128,
        metavar="TOKENS",
        help="longer examples are cut, and the report says how many (default: %(default)s)",
    )
    add = parser.add_argument_group("task").add_argument
    add(
        "--task",
        default="reviews",
        help=f"reviews (embedded), {', '.join(HUB)} from the "
        "Hub, or any folder of --data-dir (default: %(default)s)",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help="own examples: .jsonl, .csv or .tsv with "
        "columns text (or text_a, text_b) and label",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with TASK/train.jsonl and TASK/test.jsonl, instead of the Hub",
    )
    add(
        "--template",
        metavar="TEXT",
        help="prompt with {a}, {b} for pairs and {mask}, "
        "such as '{a} It was {mask}.' (default: the task's)",
    )
    add(
        "--label-words",
        nargs="+",
        metavar="WORD",
        help="one word a label, in label order",
    )
    add(
        "--shots",
        type=_positive,
        default=16,
        metavar="K",
        help="training examples of each label (default: %(default)s)",
    )
    add(
        "--test-size",
        type=_positive,
        default=200,
        metavar="N",
        help="most test examples (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the split and of a new head (default: %(default)s)",
    )
    add = parser.add_argument_group(
        "spaces to compare with the full kernel"
    ).add_argument
    add(
        "--rows",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="R rows (output features) of every linear weight in the blocks",
    )
    add(
        "--columns",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="R columns (input features) of every linear weight in the blocks",
    )
    add(
        "--lora",
        type=int,
        nargs="+",
        default=[],
        metavar="R",
        help="LoRA of rank R at initialisation on the same weights",
    )
    add(
        "--bias", action="store_true", help="all biases (always shown as a control too)"
    )
    add("--norm", action="store_true", help="normalisation layers")
    add("--embeddings", action="store_true", help="embedding tables")
    add(
        "--space",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="any other choice, see below",
    )
    add(
        "--head",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether a head that was made here is part of every space, as fine-tuning "
        "trains it (default: yes; a language-model head never is)",
    )
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="I",
        help="restrict the spaces to these blocks, from 0, negative from the end",
    )
    add(
        "--modules",
        nargs="+",
        metavar="PATTERN",
        help="restrict the spaces to parameters "
        "whose names hold these components or match these globs, such as query value",
    )
    add(
        "--strategy",
        choices=STRATEGIES,
        default="first",
        help="which rows and columns: "
        "first, last, random, by norm max, min or mixed, by activation or gradient on the "
        "training examples (default: %(default)s)",
    )
    add(
        "--rescale",
        action="store_true",
        help="weight entries by their inverse odds of "
        "selection: unbiased for random rows and columns",
    )
    add = parser.add_argument_group("kernel").add_argument
    add(
        "--kind",
        choices=tuple(KINDS),
        default="sgd",
        help="<g, g'>, <sign g, sign g'> or <g, sign g'> (default: %(default)s)",
    )
    add(
        "--implementation",
        choices=tuple(IMPLEMENTATIONS),
        default="factors",
        help="factors, or the torch.func definition, much slower (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=_positive,
        default=32,
        metavar="N",
        help="examples in one pass; changes time and memory only (default: %(default)s)",
    )
    add(
        "--offset",
        action="store_true",
        help="classifiers start from the model's own outputs instead of zero",
    )
    add = parser.add_argument_group("output").add_argument
    add("--name", help="of the run (default: model, task and time)")
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="results go to DIR/NAME (default: %(default)s)",
    )
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML with the same names as these options; flags win",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print the record alone, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        options = _parse(parser, given)
        _run(options, given)
    except (ValueError, OSError) as error:
        # Every error of ours is one of these and says its way out in its text.
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _parse(parser: argparse.ArgumentParser, given: list[str]) -> argparse.Namespace:
    """Parse flags over the values of a configuration file."""
    first = parser.parse_args(given)
    if first.config is None:
        return first
    try:
        values = yaml.safe_load(first.config.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(
            f"--config {str(first.config)!r} cannot be read: {error}"
        ) from None
    if not isinstance(values, dict):
        raise TaskError(f"--config {str(first.config)!r} must map options to values.")
    arguments: list[str] = []
    known = {a.dest: a for a in parser._actions}
    for key, value in values.items():
        action = known.get(str(key).replace("-", "_"))
        if action is None or action.dest in {"help", "config"}:
            raise TaskError(
                f"--config {str(first.config)!r}: {key!r} is no option. See --help."
            )
        arguments += _as_flags(action, value)
    return parser.parse_args([*arguments, *given])


def _as_flags(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(value, bool):
        if isinstance(action, argparse.BooleanOptionalAction):
            return [flag if value else action.option_strings[1]]
        return [flag] if value else []
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [flag, *map(str, values)]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _run(options: argparse.Namespace, given: list[str]) -> None:
    quiet = options.quiet or options.json
    spaces = requested_spaces(options)
    folder = _folder(options)
    with _quiet_libraries():
        # Imported here: --help and mistyped options answer at once.
        import torch

        from ntk.evaluation import evaluate
        from rocoft.backbone import load_backbone

        start = time.perf_counter()
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
            device=options.device,
            dtype=getattr(torch, options.dtype),
        )
        if not quiet:
            for line in _opening(split, backbone):
                print(line)  # noqa: T201
        loaded = time.perf_counter() - start
        with _progress_bar(quiet) as progress:
            evaluation = evaluate(
                backbone,
                split,
                spaces,
                with_head=options.head,
                kind=options.kind,
                implementation=options.implementation,
                batch_size=options.batch_size,
                offset=options.offset,
                progress=progress,
            )
        record = {
            "version": importlib.metadata.version("rocoft-ntk"),
            "command": shlex.join(["python", "-m", "ntk.compare", *given]),
            "created": datetime.datetime.now(datetime.UTC).isoformat(
                timespec="seconds"
            ),
            "versions": _versions(),
            **evaluation.record,
        }
        record["timing"] = {"load": loaded, **record["timing"]}
        _write(record, evaluation.kernels, folder)
    _show(record, folder, options)


def requested_spaces(options: argparse.Namespace) -> list[Space]:
    """Return the spaces that the options ask for, rows 1 3 and columns 1 3 if none.

    Args:
        options: Parsed options.

    Returns:
        The spaces, without the full one and without the head.
    """
    rows, columns = options.rows, options.columns
    flags = (
        options.lora,
        options.bias,
        options.norm,
        options.embeddings,
        options.space,
    )
    if not rows and not columns and not any(flags):
        rows = columns = [1, 3]
    choice = {
        "strategy": options.strategy,
        "seed": options.seed,
        "rescale": options.rescale,
    }
    found: list[Space] = [Rows(r, **choice) for r in rows]
    found += [Columns(r, **choice) for r in columns]
    found += [LoRA(r, seed=options.seed, rescale=options.rescale) for r in options.lora]
    found += [Norm()] * options.norm + [Embeddings()] * options.embeddings
    found += [Bias()] * options.bias
    found += [parse_space(text) for text in options.space]
    if options.modules:
        found = [space.at(*options.modules) for space in found]
    if options.layers:
        found = [space.layers(*options.layers) for space in found]
    return found


def _split(options: argparse.Namespace) -> Any:
    from dataclasses import replace

    from rocoft.tasks import Prompt, few_shot, load_file, load_task

    if options.data is not None:
        task = load_file(options.data)
    else:
        task = load_task(options.task, options.data_dir)
    if options.template or options.label_words:
        old = task.prompt
        template = options.template or (old.template if old else None)
        words = tuple(options.label_words or (old.words if old else ()))
        if template is None or len(words) != len(task.labels):
            raise TaskError(
                f"a prompt needs --template and one of --label-words for each of the "
                f"labels {', '.join(task.labels)}; got {template!r} and {words}."
            )
        causal = template.partition("{mask}")[0].rstrip()
        task = replace(task, prompt=Prompt(template, words, causal))
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
            f"{str(folder)!r} cannot be written to. Choose another folder with --output."
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

    from ntk.report import summary_lines, table, to_json

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


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "numpy", "scikit-learn")
    return {name: importlib.metadata.version(name) for name in names}


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """Show stages with the time left, on standard error."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:>20}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep loading bars and advice of other libraries out of the output."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
