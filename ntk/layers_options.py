"""The options of `python -m ntk.layers`, and the records that they ask for."""

import argparse
import re
from collections.abc import Mapping

from ntk.layer_budget import Budget
from ntk.layers_records import (
    HEAD,
    LAYERS,
    Split,
    check_layers,
    fine_tuning_records,
    layer_records,
)
from ntk.layers_subsets import (
    Choice,
    check_method,
    method_of,
    spread_subsets,
    subset,
)
from ntk.notation import parse_space
from ntk.options import add_model_options, positive
from ntk.protocol import Protocol
from ntk.study import Key, Record, Study, Unit
from ntk.study_options import (
    add_fine_tuning_options,
    add_singular,
    add_split_options,
    add_work_options,
    cells,
    refuse_repeated,
)
from ntk.study_order import FINE_TUNING
from rocoft.architecture import SelectionError
from rocoft.tasks import TaskError

SEEDS = (13, 21, 42)


def build_layers_parser() -> argparse.ArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.layers",
        description="Which layers of a transformer to tune? Ranks them, before any "
        "training, by their kernels on the training examples: by how much of what is "
        "to be learnt they explain, by the published rule, and by simpler ones. With "
        "--verify the chosen layers are fine-tuned, and with --subsets others of all "
        "sizes too, to see which measure tells the accuracy. What is done is kept: the "
        "same command goes on where it was stopped, and more can be added.",
        epilog="A SPACE is that of python -m ntk.compare, such as lora:8, rows:3, "
        "rows:3@query,value or full. Exit codes: 0 done, 1 some records failed, 2 bad "
        "input, 130 interrupted.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_split_options(parser, SEEDS)
    # One task is what the command is for; several are a study.
    add_singular(parser, "--task", "--tasks")
    add_fine_tuning_options(parser, choose_lr=False)
    add_work_options(parser, LAYERS)
    parser.set_defaults(coupled=False)
    add = parser.add_argument_group("which layers").add_argument
    add(
        "--space",
        default="lora:8",
        help="what is tuned of a layer; a classification head is tuned in any case "
        "(default: %(default)s)",
    )
    add(
        "--budget",
        type=_budget,
        default=_budget("3"),
        metavar="N",
        help="most layers, such as 3, or most parameters with a p, such as 40000p; "
        "every rule has the same (default: 3)",
    )
    add(
        "--epsilon",
        type=_above_zero,
        default=1e-3,
        metavar="E",
        help="the ridge in units of the mean eigenvalue (default: %(default)g)",
    )
    add(
        "--random-seeds",
        type=positive,
        default=3,
        metavar="N",
        help="random choices of layers, a baseline (default: %(default)s)",
    )
    add(
        "--verify",
        action="store_true",
        help="fine-tune what the rules chose, all layers and the head alone, and say "
        "whether the ranking held",
    )
    add(
        "--subsets",
        type=positive,
        metavar="N",
        help="fine-tune N sets of layers too, single ones, first and last ones, random "
        "ones and all, the same on every split, and correlate what is known before "
        "training with their scores (default: none)",
    )
    return parser


def choice(options: argparse.Namespace) -> Choice:
    """Return what the rules choose by.

    Args:
        options: Parsed options.
    """
    space = str(parse_space(options.space))
    return Choice(space, options.budget, options.epsilon, options.random_seeds)


def units(options: argparse.Namespace, protocol: Protocol) -> list[Unit]:
    """Return the kernels to compute, and see that the study can be done.

    Args:
        options: Parsed options.
        protocol: Of the study.

    Returns:
        A unit for each split.

    Raises:
        SelectionError: If there are no such layers to choose from, or no room for any.
        TaskError: If something is asked for twice or a split cannot be drawn.
    """
    refuse_repeated(options)
    space = choice(options).space
    if options.verify or options.subsets:
        check_method(space)
    splits = cells(options, protocol)
    for name in options.tasks:
        if protocol.task(name).regression:
            raise TaskError(
                f"task {name!r} has scores to predict; layers are ranked by what is "
                "left to learn of classes. Give another task."
            )
    if not options.report_only:
        _check_room(check_layers(protocol, splits[0], space), options)
    return [
        Unit((Key(cell, LAYERS, space),), layer_records, (protocol, cell))
        for cell in splits
    ]


def fine_tuning_units(
    options: argparse.Namespace, protocol: Protocol, study: Study
) -> list[Unit]:
    """Return the fine-tuning that is asked for: the kernels decide of which layers.

    Args:
        options: Parsed options.
        protocol: Of the study.
        study: With the kernels; splits without are left out.

    Returns:
        A unit for each split and set of layers.
    """
    rules = choice(options)
    work = []
    for cell in cells(options, protocol):
        record = study.read(Key(cell, LAYERS, rules.space))
        if record is not None:
            work += [
                Unit(
                    (Key(cell, FINE_TUNING, method),),
                    fine_tuning_records,
                    (protocol, cell, rules.space),
                )
                for method in _methods(options, rules, record)
            ]
    return work


def _methods(options: argparse.Namespace, rules: Choice, record: Record) -> list[str]:
    """Return what is fine-tuned on a split, each once."""
    split = Split.of(record)
    layers = tuple(split.layers)
    wanted: list[tuple[str, ...]] = []
    if options.subsets:
        wanted += spread_subsets(layers, options.subsets)
    if options.verify:
        wanted += [layers, *map(subset, rules(split).values())]
    methods = [method_of(chosen, rules.space, layers) for chosen in wanted]
    if options.verify and record["parameters"].get(HEAD):
        methods.append(HEAD)
    return list(dict.fromkeys(methods))


def _check_room(sizes: Mapping[str, int], options: argparse.Namespace) -> None:
    """Refuse a budget that no layer fits, and more sets than there are."""
    budget, smallest = options.budget, min(sizes.values())
    if not budget.fits(smallest, 1):
        raise SelectionError(
            f"--budget {budget.parameters}p has room for none of the {len(sizes)} "
            f"layers of --space {options.space}: the smallest has {smallest} "
            "parameters. Raise the budget, or choose a smaller space."
        )
    if options.subsets:
        spread_subsets(tuple(sizes), options.subsets)


def _budget(text: str) -> Budget:
    found = re.fullmatch(r"(\d+)(p?)", text)
    if found is None or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} must read 3 for three layers or 40000p for so many parameters"
        )
    count = int(found[1])
    return Budget(parameters=count) if found[2] else Budget(layers=count)


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be more than 0")
    return value
