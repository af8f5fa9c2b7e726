"""The work of `python -m ntk.ablate`."""

from collections.abc import Sequence

from ntk.studies.ablation.figures import draw_figures
from ntk.studies.ablation.options import AblateOptions
from ntk.studies.ablation.records import (
    ALL,
    FULL,
    check_counts,
    origin_records,
    selection_records,
    selections,
    variance_records,
)
from ntk.studies.ablation.report import report_page, tables
from ntk.studies.ablation.summary import collect
from ntk.studies.command import StudyRun
from ntk.studies.folder import Cell, Key, Unit
from ntk.studies.options import refuse_repeated
from ntk.studies.protocol import Protocol, cells
from ntk.studies.tuned import fine_tuning_records
from rocoft.training import parse_method


def units(options: AblateOptions, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that each split can be drawn before any is done.

    Args:
        options: The study's options.
        protocol: The study's protocol.

    Returns:
        Units: for each split its kernels, their variance, their origin, fine-tuning.

    Raises:
        SelectionError: If a weight has too few rows or columns.
        OptionError: If something is asked for twice.
        TaskError: If a split cannot be drawn.
    """
    measured = options.measured
    methods = tuple(str(parse_method(text)) for text in measured.finetune_points)
    refuse_repeated(finetune_points=methods)
    splits = cells(options, protocol)
    counts = [count for count in measured.counts if isinstance(count, int)]
    if counts and not options.output.report_only:
        check_counts(protocol, splits[0], counts)
    chosen = selections(
        measured.axes, counts, measured.strategies, measured.random_seeds
    )
    references = [FULL, ALL] if ALL in measured.counts else [FULL]
    names = (*references, *(each.name for each in chosen))
    estimates = tuple(each.estimate for each in chosen if each.is_estimate)
    found = []
    for cell in splits:
        found.append(
            Unit(
                _keys(cell, "selection", names),
                selection_records,
                (protocol, cell, names),
            )
        )
        if estimates:
            found.append(
                Unit(
                    _keys(cell, "variance", estimates),
                    variance_records,
                    (protocol, cell, estimates),
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


run = StudyRun(
    command="ntk.ablate",
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "ablation"},
)
