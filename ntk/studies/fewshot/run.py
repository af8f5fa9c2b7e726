"""The work of `python -m ntk.evaluate`."""

from dataclasses import replace

from ntk.spaces import parse_space
from ntk.studies.command import StudyRun
from ntk.studies.fewshot.figures import draw_figures
from ntk.studies.fewshot.options import EvaluateOptions
from ntk.studies.fewshot.records import kernel_records
from ntk.studies.fewshot.report import report_page, tables
from ntk.studies.fewshot.summary import collect
from ntk.studies.folder import Key, Unit
from ntk.studies.options import refuse_repeated
from ntk.studies.protocol import Protocol, cells, protocol_of
from ntk.studies.tuned import fine_tuning_records, repeated_records
from rocoft.training import parse_method


def protocol(options: EvaluateOptions) -> Protocol:
    """Return what is the same for every record.

    Args:
        options: The study's options.
    """
    first = options.fine_tuning.choose_lr == "first"
    return protocol_of(
        options,
        coupled=options.measured.coupled,
        rate_seed=options.splits.seeds[0] if first else None,
    )


def units(options: EvaluateOptions, protocol: Protocol) -> list[Unit]:
    """Return the work, and see that each split can be drawn before any is done.

    Args:
        options: The study's options.
        protocol: The study's protocol.

    Returns:
        Units, kernels first.

    Raises:
        OptionError: If something is asked for twice.
    """
    measured = options.measured
    spaces = tuple(parse_space(text).name for text in measured.spaces)
    methods = tuple(str(parse_method(text)) for text in measured.finetune)
    refuse_repeated(spaces=spaces, finetune=methods)
    splits = cells(options, protocol)
    found = [
        Unit(
            tuple(Key(cell, f"kernel-{kind}", space) for space in spaces),
            kernel_records,
            (protocol, cell, kind),
        )
        for cell in splits
        for kind in measured.kinds
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


run = StudyRun(
    command="ntk.evaluate",
    protocol=protocol,
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
)
