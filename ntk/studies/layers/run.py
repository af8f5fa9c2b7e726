"""The work of `python -m ntk.layers`."""

from collections.abc import Mapping

from ntk.layer_selection import Budget
from ntk.spaces import parse_space
from ntk.studies.command import StudyRun
from ntk.studies.folder import Key, Record, Study, Unit
from ntk.studies.layers.figures import draw_figures
from ntk.studies.layers.options import BUDGET, LayersOptions
from ntk.studies.layers.records import (
    HEAD,
    LAYERS,
    LayerKernels,
    check_layers,
    fine_tuning_records,
    layer_records,
)
from ntk.studies.layers.report import report_page, tables
from ntk.studies.layers.subsets import (
    Choice,
    check_method,
    method_of,
    spread_subsets,
    subset,
)
from ntk.studies.layers.summary import collect
from ntk.studies.order import FINE_TUNING
from ntk.studies.protocol import Protocol, cells
from rocoft.data import TaskError
from rocoft.models import SelectionError


def choice(options: LayersOptions) -> Choice:
    """Return what the rules choose by.

    Args:
        options: The study's options.
    """
    given = options.choice
    space = str(parse_space(given.space))
    return Choice(space, _budget(given.budget), given.epsilon, given.random_seeds)


def units(options: LayersOptions, protocol: Protocol) -> list[Unit]:
    """Return the kernels to compute, and see that the study can be done.

    Args:
        options: The study's options.
        protocol: The study's protocol.

    Returns:
        A unit for each split.

    Raises:
        SelectionError: If there are no such layers to choose from, or no room for any.
        TaskError: If a split cannot be drawn.
    """
    space = choice(options).space
    if options.choice.verify or options.choice.subsets:
        check_method(space)
    splits = cells(options, protocol)
    for name in options.splits.names:
        if protocol.task(name).regression:
            raise TaskError(
                f"task {name!r} has scores to predict; layers are ranked by what is "
                "left to learn of classes. Give another task."
            )
    if not options.output.report_only:
        _check_room(check_layers(protocol, splits[0], space), options)
    return [
        Unit((Key(cell, LAYERS, space),), layer_records, (protocol, cell))
        for cell in splits
    ]


def fine_tuning_units(
    options: LayersOptions, protocol: Protocol, study: Study
) -> list[Unit]:
    """Return the fine-tuning that is asked for: the kernels decide of which layers.

    Args:
        options: The study's options.
        protocol: The study's protocol.
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


def _methods(options: LayersOptions, rules: Choice, record: Record) -> list[str]:
    """Return what is fine-tuned on a split, each once."""
    split = LayerKernels.of(record)
    layers = tuple(split.layers)
    wanted: list[tuple[str, ...]] = []
    if options.choice.subsets:
        wanted += spread_subsets(layers, options.choice.subsets)
    if options.choice.verify:
        wanted += [layers, *map(subset, rules(split).values())]
    methods = [method_of(chosen, rules.space, layers) for chosen in wanted]
    if options.choice.verify and record["parameters"].get(HEAD):
        methods.append(HEAD)
    return list(dict.fromkeys(methods))


def _check_room(sizes: Mapping[str, int], options: LayersOptions) -> None:
    """Refuse a budget that no layer fits, and more sets than there are."""
    budget, smallest = _budget(options.choice.budget), min(sizes.values())
    if not budget.fits(smallest, 1):
        raise SelectionError(
            f"--budget {budget.parameters}p has room for none of the {len(sizes)} "
            f"layers of --space {options.choice.space}: the smallest has {smallest} "
            "parameters. Raise the budget, or choose a smaller space."
        )
    if options.choice.subsets:
        spread_subsets(tuple(sizes), options.choice.subsets)


def _budget(text: str) -> Budget:
    found = BUDGET.fullmatch(text)
    assert found is not None
    count = int(found[1])
    return Budget(parameters=count) if found[2] else Budget(layers=count)


run = StudyRun(
    command="ntk.layers",
    units=units,
    then=fine_tuning_units,
    collect=collect,
    report=lambda options: {"choice": choice(options)},
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "layers"},
)
