"""Running a study as a command: its records, its report, and what is said of both."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ntk.reporting import Page, write_page
from ntk.scale import launched_size
from ntk.studies.folder import Key, Record, Study, Unit
from ntk.studies.protocol import Protocol, protocol_of
from rocoft.commands import OptionError, progress_bar
from rocoft.models import locate
from rocoft.training import is_taken

SETTINGS = "settings.json"


Records = Sequence[tuple[Key, Record | None]]
Summary = dict[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """The work of a command that makes the records of a study and reports on them.

    Attributes:
        units: From the options and the protocol to the work.
        collect: From the records, the command line, the settings and what `report`
            returns to the summary.
        tables: From the summary to tables for a terminal.
        page: From the summary to the content of the report.
        figures: From the summary to figures by name.
        protocol: From the options to the protocol.
        settings: What the study's folder holds beside the protocol's settings.
        then: From the options, the protocol and the study with its first records to the
            work that depends on these.
        report: From the options to keywords of ``collect``, which decide the report and
            no record.
    """

    units: Callable[[Any, Protocol], list[Unit]]
    collect: Callable[..., Summary]
    tables: Callable[[Summary], list[Table]]
    page: Callable[[Summary], Page]
    figures: Callable[[Summary], dict[str, Figure]]
    protocol: Callable[[Any], Protocol] = protocol_of
    settings: Mapping[str, Any] = field(default_factory=dict)
    then: Callable[[Any, Protocol, Study], list[Unit]] | None = None
    report: Callable[[Any], Mapping[str, Any]] = lambda options: {}

    def __call__(self, options: Any, command: str) -> list[str]:
        """Make the records that are missing, and report on all.

        Args:
            options: The command's options.
            command: The command line, for the report.

        Returns:
            What failed, in sentences.

        Raises:
            OptionError: If a launcher has started several processes.
            ValueError: If the study cannot be done as asked.
        """
        if (size := launched_size()) > 1:
            # Trainings of different records would be taken for shares of one.
            raise OptionError(
                f"a launcher has started {size} processes, but a study shares its "
                "records among --jobs. Start the command once, with --jobs."
            )
        output = options.output
        same = self.protocol(options)
        work = self.units(options, same)
        if not output.report_only:
            say_origin(options)
        settings = {**self.settings, **same.settings()}
        study = Study(output.output / output.name)
        if output.overwrite:
            _remove(study.folder)
        study.begin(settings)
        failed = _done(study, work, options)
        if self.then is not None:
            more = self.then(options, same, study)
            failed += _done(study, more, options)
            work += more
        records = [(key, study.read(key)) for unit in work for key in unit.keys]
        for file in study.damaged:
            # Told also where nothing else is: a number may have changed.
            what = "is still" if output.report_only else "was"
            again = "left out" if output.report_only else "made again"
            print(  # noqa: T201
                f"record {file} {what} not whole: {again}", file=sys.stderr
            )
        summary = self.collect(records, command, settings, **self.report(options))
        page = self.page(summary)
        files = write_page(page, summary, self.figures(summary), study.folder)
        if output.json:
            print(files["json"].read_text(encoding="utf-8"), end="")  # noqa: T201
        elif not output.quiet:
            _show(self.tables(summary), page, files["html"])
        return failed


def say_origin(options: Any) -> None:
    """Say where a model that is no folder and no Hub id comes from.

    A GGUF file becomes a folder here, before jobs need it at the same time, and one
    that cannot be read ends the command, not each of its parts.

    Args:
        options: The command's options.

    Raises:
        BackboneError: If the model is not where it should be.
    """
    for note in locate(options.model.model).notes:
        if not options.output.silent:
            print(f"note: {note}")  # noqa: T201


def _remove(folder: Path) -> None:
    """Remove a study, and nothing else."""
    if not is_taken(folder):
        return
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    # Other programs, too, have files of this name.
    if not isinstance(settings, dict) or "versions" not in settings:
        raise OptionError(
            f"{str(folder)!r} exists and is no earlier study. Choose another --name."
        )
    shutil.rmtree(folder)


def _done(study: Study, work: list[Unit], options: Any) -> list[str]:
    """Do some work, unless only a report is wanted; return what failed."""
    output = options.output
    if output.report_only or not work:
        return []
    with progress_bar(output.silent) as progress:
        return study.run(work, output.jobs, progress)


def _show(tables: Sequence[Table], page: Page, report: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables:
        console.print(table)
    for line in page.lines:
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)
