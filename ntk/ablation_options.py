"""The options of `python -m ntk.ablate`, and the records that they ask for."""

import argparse
from collections.abc import Sequence

from ntk.ablation import (
    ALL,
    AXES,
    FULL,
    check_counts,
    origin_records,
    selection_records,
    selections,
    variance_records,
)
from ntk.fewshot import fine_tuning_records
from ntk.options import add_model_options, positive
from ntk.protocol import Protocol
from ntk.study import Cell, Key, Unit
from ntk.study_options import (
    add_fine_tuning_options,
    add_split_options,
    add_work_options,
    cells,
    refuse_repeated,
)
from rocoft.methods import parse_method
from rocoft.selection import STRATEGIES

COUNTS = (1, 2, 3, 5, 8, 16, 64)
SEEDS = (13, 21, 42)
DRAWS = 5
GIB = {"float32": 2**28, "float64": 2**27}
"""Numbers in a GiB, by dtype."""


def build_ablation_parser() -> argparse.ArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.ablate",
        description="Does it matter which rows or columns a kernel is made of, and how "
        "many? For every task and seed: kernels of all selections, their distance to "
        "the full kernel, what classifiers on them reach, the error of random "
        "selections beside its expectation, and which modules and layers the full "
        "kernel comes from. What is done is kept: the same command goes on where it "
        "was stopped, and more of everything can be added.",
        epilog="A METHOD is that of python -m rocoft.train. Exit codes: 0 done, 1 some "
        "records failed, 2 bad input, 130 interrupted.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_split_options(parser, SEEDS)
    add_fine_tuning_options(parser, choose_lr=False)
    add_work_options(parser, "ablation")
    parser.set_defaults(coupled=False)
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--axes",
        nargs="+",
        choices=AXES,
        default=list(AXES),
        help="rows, columns, or as many of both (default: all three)",
    )
    add(
        "--counts",
        type=_count,
        nargs="+",
        default=[*COUNTS, ALL],
        metavar="R",
        help="rows or columns of each linear weight in the blocks; all stands for the "
        f"whole weights (default: {' '.join(map(str, COUNTS))} all)",
    )
    add(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        default=list(STRATEGIES),
        help="how they are chosen, see python -m ntk.compare (default: every way)",
    )
    add(
        "--random-seeds",
        type=positive,
        default=DRAWS,
        metavar="N",
        help="random selections of each size (default: %(default)s)",
    )
    add(
        "--finetune-points",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="fine-tune by these too, such as rows:3/strategy=max (default: none)",
    )
    add(
        "--memory",
        type=_memory,
        default=2.0,
        metavar="GIB",
        help="most that a pass over the examples keeps to contract; contracting takes "
        "about as much again, and less makes more passes (default: %(default)g)",
    )
    return parser


def units(options: argparse.Namespace, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that each split can be drawn before any is done.

    Args:
        options: Parsed options.
        protocol: Of the study.

    Returns:
        Units: for each split its kernels, their variance, their origin, fine-tuning.

    Raises:
        SelectionError: If a weight has too few rows or columns.
        TaskError: If something is asked for twice or a split cannot be drawn.
    """
    methods = [str(parse_method(text)) for text in options.finetune_points]
    refuse_repeated(
        options,
        axes=options.axes,
        counts=options.counts,
        strategies=options.strategies,
        finetune_points=methods,
    )
    splits = cells(options, protocol)
    counts = [count for count in options.counts if count != ALL]
    if counts and not options.report_only:
        check_counts(protocol, splits[0], counts)
    chosen = selections(options.axes, counts, options.strategies, options.random_seeds)
    references = [FULL, ALL] if ALL in options.counts else [FULL]
    names = (*references, *(each.name for each in chosen))
    estimates = tuple(each.estimate for each in chosen if each.is_estimate)
    entries = int(options.memory * GIB[options.dtype])
    found = []
    for cell in splits:
        found.append(
            Unit(
                _keys(cell, "selection", names),
                selection_records,
                (protocol, cell, entries, names),
            )
        )
        if estimates:
            found.append(
                Unit(
                    _keys(cell, "variance", estimates),
                    variance_records,
                    (protocol, cell, entries, estimates),
                )
            )
        found.append(
            Unit(_keys(cell, "origin", [FULL]), origin_records, (protocol, cell))
        )
        found += [
            Unit(_keys(cell, "finetune", [m]), fine_tuning_records, (protocol, cell))
            for m in methods
        ]
    return found


def _keys(cell: Cell, kind: str, subjects: Sequence[str]) -> tuple[Key, ...]:
    return tuple(Key(cell, kind, subject) for subject in subjects)


def _count(text: str) -> int | str:
    return text if text == ALL else positive(text)


def _memory(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return value
