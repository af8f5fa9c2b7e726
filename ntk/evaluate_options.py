"""The options of `python -m ntk.evaluate`, and the records that they ask for."""

import argparse
from dataclasses import replace

from ntk.fewshot import fine_tuning_records, kernel_records, repeated_records
from ntk.kernel import KINDS
from ntk.notation import parse_space
from ntk.options import add_model_options
from ntk.protocol import Protocol
from ntk.study import Key, Unit
from ntk.study_options import (
    add_fine_tuning_options,
    add_split_options,
    add_work_options,
    cells,
    refuse_repeated,
)
from rocoft.methods import parse_method
from rocoft.tasks import TaskError

SPACES = (
    *("full", "rows:1", "rows:3", "columns:1", "columns:3", "rows:3+columns:3"),
    *("lora:8", "bias", "head"),
)
METHODS = ("full", "rows:3", "columns:3", "lora:8", "bitfit", "head")
SEEDS = (13, 21, 42, 87, 100)
"""Of the published splits of LM-BFF."""


def build_evaluation_parser() -> argparse.ArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.evaluate",
        description="Do kernel classifiers match fine-tuning, and does the kernel over "
        "a few rows match the full one? For every task and seed: few-shot splits drawn "
        "as LM-BFF draws them, kernels of all spaces from one pass, classifiers and "
        "fine-tuning with hyperparameters chosen on the same dev examples. What is "
        "done is kept: the same command goes on where it was stopped, and further "
        "tasks, shots, seeds, spaces and methods can be added.",
        epilog="A SPEC is that of python -m ntk.compare, a METHOD that of python -m "
        "rocoft.train. Exit codes: 0 done, 1 some records failed, 2 bad input, 130 "
        "interrupted.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_split_options(parser, SEEDS, "those of LM-BFF, ")
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--spaces",
        nargs="*",
        default=list(SPACES),
        metavar="SPEC",
        help=f"kernels (default: {' '.join(SPACES)})",
    )
    add(
        "--kinds",
        nargs="+",
        choices=tuple(KINDS),
        default=["sgd"],
        help="of kernel: <g, g'>, <sign g, sign g'> or <g, sign g'> (default: sgd)",
    )
    add(
        "--finetune",
        nargs="*",
        default=list(METHODS),
        metavar="METHOD",
        help=f"ground truth; none if nothing follows (default: {' '.join(METHODS)})",
    )
    add(
        "--coupled",
        action="store_true",
        help="with more than two labels, contract all pairs of outputs instead of "
        "their sum; as many times slower as there are labels",
    )
    add_fine_tuning_options(parser, choose_lr=True)
    add_work_options(parser, "fewshot")
    return parser


def units(options: argparse.Namespace, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that each split can be drawn before any is done.

    Args:
        options: Parsed options.
        protocol: Of the study.

    Returns:
        Units, kernels first.

    Raises:
        TaskError: If something is asked for twice.
    """
    spaces = [parse_space(text).name for text in options.spaces]
    methods = [str(parse_method(text)) for text in options.finetune]
    refuse_repeated(options, spaces=spaces, finetune=methods, kinds=options.kinds)
    if not spaces and not methods:
        raise TaskError("--spaces and --finetune are both empty: nothing to measure.")
    splits = cells(options, protocol)
    found = [
        Unit(
            tuple(Key(cell, f"kernel-{kind}", space) for space in spaces),
            kernel_records,
            (protocol, cell, kind),
        )
        for cell in splits
        for kind in options.kinds
        if spaces
    ]
    for cell in splits:
        for method in methods:
            key = Key(cell, "finetune", method)
            if protocol.rate_seed in {None, cell.seed}:
                found.append(Unit((key,), fine_tuning_records, (protocol, cell)))
                continue
            after = replace(key, cell=replace(cell, seed=protocol.rate_seed))
            found.append(Unit((key,), repeated_records, (protocol, cell), after))
    return found
