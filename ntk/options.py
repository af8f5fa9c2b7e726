"""The options of `python -m ntk.compare`, and the spaces that they ask for."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ntk.approximation import Estimator, Sketches
from ntk.importance import Samples
from ntk.kernel import IMPLEMENTATIONS, KINDS
from ntk.memory import parse_bytes
from ntk.notation import parse_space
from ntk.precision import PRECISIONS
from ntk.spaces import Bias, Columns, Embeddings, LoRA, Norm, Rows, Space
from rocoft.selection import STRATEGIES
from rocoft.tasks import HUB, TaskError


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
    add_model_options(parser)
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
        type=positive,
        default=16,
        metavar="K",
        help="training examples of each label (default: %(default)s)",
    )
    add(
        "--test-size",
        type=positive,
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
        "first, last, random, by norm max, min or mixed, by activation or gradient on "
        "the training examples (default: %(default)s)",
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
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the products that contract gradients; --dtype is the model's. bf16 "
        "rounds what is multiplied to bfloat16, bf16x3 what bfloat16 leaves over as "
        "well, tf32 is for GPUs; sums are in float32 at least, and the report says "
        "what it costs (default: %(default)s)",
    )
    add(
        "--implementation",
        choices=tuple(IMPLEMENTATIONS),
        default="factors",
        help="factors, or torch.func, the definition, slower (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="examples in one pass; changes time and memory (default: %(default)s)",
    )
    add(
        "--load-in",
        choices=("8bit", "4bit"),
        help="quantise the linear layers with bitsandbytes (4bit: NF4) and dequantise "
        "each as it is used: the kernels are those of the dequantised model, whose "
        "weights never exist together (default: as --dtype says)",
    )
    add(
        "--offload",
        action="store_true",
        help="leave the weights of linear layers in the host's memory and copy each to "
        "--device as it is used, forward and backward: for models larger than a GPU "
        "(default: the whole model is on --device)",
    )
    add(
        "--approximate",
        type=estimator,
        metavar="HOW",
        help="estimate the full kernel instead of computing it: sketch:S from random "
        "projections to S numbers of each large weight, example and output, rows:R or "
        "columns:R from R of each weight, drawn by the gradients of a few examples "
        "and weighted so that none is favoured (S, R: multiples of 8); the relative "
        "error is reported, and falls with the root of S or R (default: computed)",
    )
    add(
        "--memory",
        type=memory,
        metavar="SIZE",
        help="most that is held while kernels are computed from factors, such as "
        "4GiB, libraries and model included, by each process if there are several; "
        "what does not fit waits in a file, or is computed in more passes (default: "
        "what is held, and four fifths of what is free)",
    )
    add(
        "--spill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let what --memory has no room for wait in a file in DIR/.cache, if that "
        "is faster on this machine than more passes and the disk has room; the file "
        "goes when the kernels are done or the command ends, and several processes "
        "have none (default: yes)",
    )
    add(
        "--plan",
        action="store_true",
        help="print what would be computed in which pass, what it would hold and "
        "about how long it would take, and compute nothing",
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
        "--cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep kernels of factors in DIR/.cache while and after they are computed, "
        "by a digest of the model, the examples and the spaces: the same command goes "
        "on where it was stopped, and does not compute again (default: yes)",
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


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is used and how it is read out.

    Args:
        parser: Of a command.
    """
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
        "that the checkpoint lacks is made: fitted to the training examples by "
        "logistic regression, or seeded random (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="precision of the model and of what its passes leave; products are in "
        "float32 at least, sums in float64, and the report says what half precision "
        "costs (default: %(default)s)",
    )
    add(
        "--device",
        default="cpu",
        help="where to compute, such as cuda (default: %(default)s)",
    )
    add(
        "--max-length",
        type=positive,
        default=128,
        metavar="TOKENS",
        help="longer examples are cut, the report says how many (default: %(default)s)",
    )


def parse_options(
    given: Sequence[str], parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse flags over the values of a configuration file.

    Args:
        given: Arguments of the command.
        parser: Of the command, with ``--config``; None means that of this module.

    Returns:
        The options.

    Raises:
        TaskError: If the configuration file cannot be read or names no option.
    """
    parser = parser or build_parser()
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


def positive(text: str) -> int:
    """Read a whole number of at least 1.

    Args:
        text: Of an option.

    Returns:
        The number.

    Raises:
        ArgumentTypeError: If it is less.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def memory(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: Of an option.

    Returns:
        Bytes.

    Raises:
        ArgumentTypeError: If it is none.
    """
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def estimator(text: str) -> Estimator:
    """Read how a kernel is estimated.

    Args:
        text: Of an option, such as ``sketch:4096``, ``rows:64`` or ``columns:64``.

    Returns:
        The way.

    Raises:
        ArgumentTypeError: If it is written otherwise.
    """
    name, _, size = text.partition(":")
    if name not in ("sketch", "rows", "columns") or not size.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} must read sketch:S, rows:R or columns:R, as sketch:4096"
        )
    try:
        if name == "sketch":
            return Sketches(int(size))
        return Samples(int(size), axis="rows" if name == "rows" else "columns")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
