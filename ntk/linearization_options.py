"""The options of `python -m ntk.linearize`, and the records that they ask for."""

import argparse
import math

from ntk.linearization import (
    OPTIMIZERS,
    Training,
    learning_rates,
    linearization_records,
)
from ntk.options import add_model_options, positive
from ntk.protocol import Protocol
from ntk.study import Key, Unit
from ntk.study_options import (
    add_singular,
    add_split_options,
    add_work_options,
    cells,
    refuse_repeated,
)
from rocoft.methods import parse_method
from rocoft.readout_trainer import Loss
from rocoft.tasks import TaskError

METHODS = ("lora:8",)
LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (13, 21, 42)
LOSSES: dict[str, Loss] = {"cross-entropy": "cross_entropy", "squared": "squared"}


def build_linearization_parser() -> argparse.ArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.linearize",
        description="When does the linearised model explain fine-tuning? For every "
        "task, seed, method and lambda: fine-tuning that is held at its start by "
        "(lambda / 2) ||theta - theta0||^2, beside its linearisation trained with the "
        "same lambda, learning rate, steps and order of examples, both without "
        "dropout and to the end; how far both move and how far they are apart. What is "
        "done is kept: the same command goes on where it was stopped, and more tasks, "
        "shots, seeds, lambdas and methods can be added; other settings, --lrs among "
        "them, need another --name.",
        epilog="A METHOD is that of python -m rocoft.train. Exit codes: 0 done, 1 some "
        "records failed, 2 bad input, 130 interrupted.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    add_split_options(parser, SEEDS)
    add_singular(parser, "--task", "--tasks")
    add_singular(parser, "--method", "--methods")
    _add_training_options(parser)
    add_work_options(parser, "linearization")
    # Both trainings are looked at where they end.
    parser.set_defaults(coupled=False, choose_lr="each", evaluations=2)
    return parser


def units(options: argparse.Namespace, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that it can be done before any is.

    Args:
        options: Parsed options.
        protocol: Of the study.

    Returns:
        A unit for each split, method and lambda.

    Raises:
        TaskError: If something is asked for twice, a split cannot be drawn, or a
            training cannot be done.
    """
    methods = [_method(text) for text in options.methods]
    refuse_repeated(options, methods=methods, lambdas=options.lambdas)
    for name in options.tasks:
        if protocol.task(name).regression:
            raise TaskError(
                f"--tasks {name} has scores for labels; the study compares classes. "
                "Leave it out."
            )
    splits = cells(options, protocol)
    trainings = [
        Training(
            method,
            strength,
            LOSSES[options.loss],
            options.optimizer,
            options.selective,
        )
        for method in methods
        for strength in options.lambdas
    ]
    if options.optimizer == "sgd":
        _check_steps(trainings, protocol)
    return [
        Unit(
            (Key(cell, each.loss, each.name),),
            linearization_records,
            (protocol, cell, each),
        )
        for cell in splits
        for each in trainings
    ]


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training, the same of both models").add_argument
    add(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help="what is trained, such as rows:3, full or head "
        f"(default: {' '.join(METHODS)})",
    )
    add(
        "--lambdas",
        type=_strength,
        nargs="+",
        default=list(LAMBDAS),
        metavar="LAMBDA",
        help="how strongly parameters are held at their start, in loss per squared "
        "distance: the objective is the mean loss over training examples + (LAMBDA / "
        "2) ||theta - theta0||^2, so a LAMBDA of an objective with the sum, as in "
        "Rahimi Afzal et al. (2025), is divided by the number of examples; 0 trains "
        f"freely (default: {' '.join(f'{each:g}' for each in LAMBDAS)})",
    )
    add(
        "--selective",
        action="store_true",
        help="pull only in steps where that agrees with the descent of the loss "
        "(default: in every step)",
    )
    add(
        "--loss",
        choices=tuple(LOSSES),
        default="cross-entropy",
        help="of the training examples; squared is the squared distance to one-hot "
        "labels, summed over labels, for which bounds are evaluated too, at about "
        "twice the time (default: %(default)s)",
    )
    add(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        default="adamw",
        help="adamw, warmed up and decaying, or sgd, plain gradient descent of one "
        "step size, which needs --lrs; bounds of gradient flow need sgd on all "
        "examples in a step (default: %(default)s)",
    )
    add(
        "--lrs",
        nargs="+",
        default=[],
        metavar="METHOD=LR,LR",
        help="learning rates of a method, such as rows:3=1e-3,3e-3; of several "
        "fine-tuning chooses on dev for each lambda, and its linear twin has the same "
        "(default: the middle one of each method's own)",
    )
    add(
        "--num-train-epochs",
        type=positive,
        default=10,
        metavar="N",
        help="passes over the training examples (default: %(default)s)",
    )
    add(
        "--per-device-train-batch-size",
        type=positive,
        default=8,
        metavar="N",
        help="training examples in a step (default: %(default)s)",
    )


def _method(text: str) -> str:
    method = parse_method(text)
    if method.kind in {"probe", "masked"}:
        raise TaskError(
            f"--methods {text} has no steps to linearise or trains parts of weights by "
            "masks. Give head for a probe, rows or columns for a mask."
        )
    return str(method)


def _check_steps(trainings: list[Training], protocol: Protocol) -> None:
    """See that gradient descent has step sizes, and that the pull alone converges."""
    for each in trainings:
        if each.method not in protocol.rates:
            raise TaskError(
                f"--optimizer sgd has no learning rates of its own. Give some with "
                f"--lrs {each.method}=0.1"
            )
        largest = max(learning_rates(each.method, protocol))
        if largest * each.strength >= 1:
            raise TaskError(
                f"--lambdas {each.strength:g} with a learning rate of {largest:g} "
                "overshoots the start in one step of gradient descent: their product "
                "must be below 1. Give smaller ones."
            )


def _strength(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number, at least 0")
    return value
