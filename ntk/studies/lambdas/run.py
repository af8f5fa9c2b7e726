"""The work of `python -m ntk.linearize`."""

from ntk.studies.command import StudyRun
from ntk.studies.folder import Key, Unit
from ntk.studies.lambdas.figures import draw_figures
from ntk.studies.lambdas.options import LinearizeOptions
from ntk.studies.lambdas.records import (
    Training,
    learning_rates,
    linearization_records,
)
from ntk.studies.lambdas.report import report_page, tables
from ntk.studies.lambdas.summary import collect
from ntk.studies.options import refuse_repeated
from ntk.studies.protocol import Protocol, cells
from rocoft.data import TaskError
from rocoft.training import Loss, parse_method

LOSSES: dict[str, Loss] = {"cross-entropy": "cross_entropy", "squared": "squared"}


def units(options: LinearizeOptions, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that it can be done before any is.

    Args:
        options: The study's options.
        protocol: The study's protocol.

    Returns:
        A unit for each split, method and lambda.

    Raises:
        OptionError: If something is asked for twice.
        TaskError: If a split cannot be drawn, or a training cannot be done.
    """
    trained = options.fine_tuning
    methods = tuple(_method(text) for text in trained.methods)
    refuse_repeated(methods=methods)
    for name in options.splits.names:
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
            LOSSES[trained.loss],
            trained.optimizer,
            trained.selective,
        )
        for method in methods
        for strength in trained.lambdas
    ]
    if trained.optimizer == "sgd":
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


run = StudyRun(
    command="ntk.linearize",
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "linearization"},
)
