"""Running a study as a command: its records, its report, and what is said of both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ntk.reporting import Page, write_page
from ntk.scale import launched_size
from ntk.studies.folder import (
    RECORDS,
    SEALED,
    SETTINGS,
    Key,
    Record,
    Study,
    Unit,
)
from ntk.studies.protocol import Protocol, protocol_of
from rocoft.commands import (
    FolderKind,
    OptionError,
    Place,
    claimed,
    is_taken,
    progress_bar,
    show_json,
    show_lines,
    show_tables,
)
from rocoft.models import locate

REPORT = ("report.json", "report.md", "report.html", "figures")
NAMES = (SETTINGS, RECORDS, *REPORT)
"""What a study's folder holds."""

Records = Sequence[tuple[Key, Record | None]]
Summary = dict[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """The work of a command that makes the records of a study and reports on them.

    Attributes:
        command: The command's module, which its folders say.
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

    command: str
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
        if output.report_only:
            # Beside one that goes on, which a lock would refuse.
            study.begin(settings)
            if self.then is not None:
                work += self.then(options, same, study)
            self._report(study, work, options, command, settings)
            return []
        kind = FolderKind(self.command, "study", NAMES)
        with claimed(
            output.output, study.folder.name, kind, overwrite=output.overwrite
        ) as place:
            _begin(study, settings, place)
            try:
                failed = _done(study, work, options)
                if self.then is not None:
                    more = self.then(options, same, study)
                    failed += _done(study, more, options)
                    work += more
            except BaseException:
                if not study.has_records:
                    place.abandon()
                raise
            if place.replaces and not study.has_records:
                place.abandon()
                return [*failed, "no record was made, so the earlier study stays."]
            self._report(study, work, options, command, settings)
            place.finish()
        return failed

    def _report(
        self,
        study: Study,
        work: Sequence[Unit],
        options: Any,
        command: str,
        settings: Mapping[str, Any],
    ) -> None:
        """Report on the records that are there."""
        output = options.output
        records = [(key, study.read(key)) for unit in work for key in unit.keys]
        for file in study.damaged:
            # Told also where nothing else is: a number may have changed.
            what = "is still" if output.report_only else "was"
            again = "left out" if output.report_only else "made again"
            line = f"record {file} {what} not whole: {again}"
            show_lines([line], error=True)
        summary = self.collect(records, command, settings, **self.report(options))
        page = self.page(summary)
        files = write_page(page, summary, self.figures(summary), study.folder)
        if output.json:
            show_json(files["json"].read_text(encoding="utf-8"))
        elif not output.quiet:
            show_tables(self.tables(summary), page.lines)
            show_lines([f"report: {files['html']}"])


def _begin(study: Study, settings: Mapping[str, Any], place: Place) -> None:
    """Begin a study in its place, or check that it goes on with the same settings."""
    if place.overwrite or not is_taken(study.folder):
        with place.begun(**{SEALED: True}) as new:
            Study(new).begin(settings)
    else:
        study.begin(settings)
    study.remove_parts()


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
            show_lines([f"note: {note}"])


def _done(study: Study, work: list[Unit], options: Any) -> list[str]:
    """Do some work, unless only a report is wanted; return what failed."""
    output = options.output
    if output.report_only or not work:
        return []
    with progress_bar(output.silent) as progress:
        return study.run(work, output.jobs, progress)
