"""The options of `python -m ntk.evaluate`, and the records that they ask for."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ntk.fewshot import (
    Protocol,
    fine_tuning_records,
    kernel_records,
    repeated_records,
)
from ntk.kernel import KINDS
from ntk.notation import parse_space
from ntk.options import add_model_options, positive
from ntk.study import Cell, Key, Unit
from rocoft.methods import parse_method
from rocoft.tasks import HUB, TaskError

SPACES = (
    *("full", "rows:1", "rows:3", "columns:1", "columns:3", "rows:3+columns:3"),
    *("lora:8", "bias", "head"),
)
METHODS = ("full", "rows:3", "columns:3", "lora:8", "bitfit", "head")
SEEDS = (13, 21, 42, 87, 100)
"""Of the published splits of LM-BFF."""


def build_study_parser() -> argparse.ArgumentParser:
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
    add = parser.add_argument_group("splits").add_argument
    add(
        "--tasks",
        nargs="+",
        default=["reviews"],
        metavar="TASK",
        help=f"reviews (embedded), {', '.join(HUB)} from the Hub, or folders of "
        "--data-dir (default: reviews)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with TASK/train.jsonl and TASK/test.jsonl, instead of the Hub",
    )
    add(
        "--shots",
        type=positive,
        nargs="+",
        default=[16],
        metavar="K",
        help="training examples of each label, and as many dev examples (default: 16)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=list(SEEDS),
        metavar="SEED",
        help="of the splits, new heads and fine-tuning (default: those of LM-BFF, "
        f"{' '.join(map(str, SEEDS))})",
    )
    add(
        "--test-size",
        type=positive,
        default=1000,
        metavar="N",
        help="most test examples, the same for all splits (default: %(default)s)",
    )
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
    add = parser.add_argument_group("fine-tuning").add_argument
    add(
        "--num-train-epochs",
        type=positive,
        default=10,
        metavar="N",
        help="passes over the training examples (default: %(default)s)",
    )
    add(
        "--evaluations",
        type=positive,
        default=5,
        metavar="N",
        help="on dev during a training; the best one's weights are taken (default: "
        "%(default)s)",
    )
    add(
        "--per-device-train-batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="training examples in a step (default: %(default)s)",
    )
    add(
        "--lrs",
        nargs="+",
        default=[],
        metavar="METHOD=LR,LR",
        help="learning rates of a method to choose from on dev, such as "
        "rows:3=1e-3,3e-3 (default: three of each method's own)",
    )
    add(
        "--choose-lr",
        choices=("each", "first"),
        default="each",
        help="whether each seed chooses its learning rate on its own dev examples, as "
        "its kernels choose their regularisation, or the first one for all seeds of a "
        "task and method, in less than half of the time (default: %(default)s)",
    )
    add = parser.add_argument_group("work and output").add_argument
    add(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="examples in one pass; changes time and memory (default: %(default)s)",
    )
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="records made at the same time, each by a process with its share of the "
        "cores (default: %(default)s)",
    )
    add(
        "--report-only",
        action="store_true",
        help="report on the records that are there and make none",
    )
    add("--name", default="fewshot", help="of the study (default: %(default)s)")
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
    return parser


def protocol(options: argparse.Namespace) -> Protocol:
    """Return what is the same for every record.

    Args:
        options: Parsed options.

    Returns:
        The protocol.

    Raises:
        TaskError: If learning rates cannot be read.
    """
    rates = {}
    for text in options.lrs:
        method, _, values = text.rpartition("=")
        try:
            rates[str(parse_method(method))] = [float(v) for v in values.split(",")]
        except ValueError as error:
            raise TaskError(
                f"--lrs {text!r} must read METHOD=LR,LR such as rows:3=1e-3,3e-3: "
                f"{error}"
            ) from None
    if options.evaluations < 2:
        raise TaskError(
            "--evaluations=1 leaves no checkpoint to choose. Give 2 or more."
        )
    return Protocol(
        model=options.model,
        data_dir=options.data_dir,
        readout=options.readout,
        head=options.head_init,
        max_length=options.max_length,
        test_size=options.test_size,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        coupled=options.coupled,
        rates=rates,
        rate_seed=options.seeds[0] if options.choose_lr == "first" else None,
        arguments={
            "num_train_epochs": options.num_train_epochs,
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "eval_strategy": "steps",
            "eval_steps": 1 / options.evaluations,
            # A training is done again as a whole.
            "save_only_model": True,
        },
    )


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
    for option, values in (
        ("tasks", options.tasks),
        ("shots", options.shots),
        ("seeds", options.seeds),
        ("spaces", spaces),
        ("finetune", methods),
        ("kinds", options.kinds),
    ):
        _refuse_repeated(option, values)
    if not spaces and not methods:
        raise TaskError("--spaces and --finetune are both empty: nothing to measure.")
    tasks = {name: protocol.task(name) for name in options.tasks}
    # All tasks of a seed before the next: what there is when a study is stopped, is
    # a smaller study.
    cells = [
        Cell(name, shots, seed)
        for shots in options.shots
        for seed in options.seeds
        for name in tasks
    ]
    for cell in cells:
        protocol.draw(tasks[cell.task], cell)
    found = [
        Unit(
            tuple(Key(cell, f"kernel-{kind}", space) for space in spaces),
            kernel_records,
            (protocol, cell, kind),
        )
        for cell in cells
        for kind in options.kinds
        if spaces
    ]
    for cell in cells:
        for method in methods:
            key = Key(cell, "finetune", method)
            if protocol.rate_seed in {None, cell.seed}:
                found.append(Unit((key,), fine_tuning_records, (protocol, cell)))
                continue
            after = replace(key, cell=replace(cell, seed=protocol.rate_seed))
            found.append(Unit((key,), repeated_records, (protocol, cell), after))
    return found


def _refuse_repeated(option: str, values: Sequence[object]) -> None:
    repeated = sorted({str(v) for v in values if values.count(v) > 1})
    if repeated:
        raise TaskError(
            f"--{option} holds {', '.join(repeated)} more than once. Give each once."
        )
