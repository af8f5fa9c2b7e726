"""The options that the commands of studies share, and the splits that they ask for."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ntk.options import positive
from ntk.protocol import Protocol
from ntk.study import Cell
from rocoft.methods import parse_method
from rocoft.tasks import HUB, TaskError


def add_singular(parser: argparse.ArgumentParser, flag: str, of: str) -> None:
    """Add a second name of an option, for a command that is mostly given one value.

    Args:
        parser: Of a command, with the option or before it is added.
        flag: The second name, such as ``--task``.
        of: The option, such as ``--tasks``.
    """
    parser.add_argument(
        flag,
        dest=of.removeprefix("--"),
        nargs="+",
        default=argparse.SUPPRESS,
        metavar=flag.removeprefix("--").upper(),
        help=f"the same as {of}, which is its name in --config",
    )


def add_split_options(
    parser: argparse.ArgumentParser, seeds: Sequence[int], of: str = ""
) -> None:
    """Add the options that say which splits there are.

    Args:
        parser: Of a command.
        seeds: The default ones.
        of: Where these are from, for the help.
    """
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
        default=list(seeds),
        metavar="SEED",
        help="of the splits, new heads and fine-tuning (default: "
        f"{of}{' '.join(map(str, seeds))})",
    )
    add(
        "--test-size",
        type=positive,
        default=1000,
        metavar="N",
        help="most test examples, the same for all splits (default: %(default)s)",
    )


def add_fine_tuning_options(
    parser: argparse.ArgumentParser, *, choose_lr: bool
) -> None:
    """Add the options of fine-tuning.

    Args:
        parser: Of a command.
        choose_lr: Whether one seed may choose the learning rate for all; where it may
            not, each chooses its own.
    """
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
    if not choose_lr:
        parser.set_defaults(choose_lr="each")
        return
    add(
        "--choose-lr",
        choices=("each", "first"),
        default="each",
        help="whether each seed chooses its learning rate on its own dev examples, as "
        "its kernels choose their regularisation, or the first one for all seeds of a "
        "task and method, in less than half of the time (default: %(default)s)",
    )


def add_work_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of how a study is done and where it is put.

    Args:
        parser: Of a command.
        name: Of the study, unless another is given.
    """
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
    add("--name", default=name, help="of the study (default: %(default)s)")
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


def cells(options: argparse.Namespace, protocol: Protocol) -> list[Cell]:
    """Return the splits of a study, and see that each can be drawn.

    Args:
        options: Parsed options.
        protocol: Of the study.

    Returns:
        All tasks of a seed before the next: what there is when a study is stopped, is a
        smaller study.
    """
    tasks = {name: protocol.task(name) for name in options.tasks}
    found = [
        Cell(name, shots, seed)
        for shots in options.shots
        for seed in options.seeds
        for name in tasks
    ]
    for cell in found:
        protocol.draw(tasks[cell.task], cell)
    return found


def refuse_repeated(options: argparse.Namespace, **more: Sequence[object]) -> None:
    """Refuse what is asked for twice.

    Args:
        options: Parsed options, of which tasks, shots and seeds are looked at.
        **more: Values of other options, by name.

    Raises:
        TaskError: If an option holds a value more than once.
    """
    own = {name: getattr(options, name) for name in ("tasks", "shots", "seeds")}
    for option, values in {**own, **more}.items():
        repeated = sorted({str(v) for v in values if values.count(v) > 1})
        if repeated:
            raise TaskError(
                f"--{option.replace('_', '-')} holds {', '.join(repeated)} more than "
                "once. Give each once."
            )
