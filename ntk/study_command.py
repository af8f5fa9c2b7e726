"""Running a study as a command: its records, its report, and what is said of both."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ntk.options import parse_options
from ntk.protocol import Protocol
from ntk.study import Key, Record, Study, Unit
from ntk.study_options import protocol
from ntk.study_pages import Page, write_page
from rocoft.console import progress_bar, quiet_libraries

FAILED = 1
USAGE_ERROR = 2

Records = Sequence[tuple[Key, Record | None]]
Summary = dict[str, Any]


@dataclass(frozen=True)
class StudyCommand:
    """A command that makes the records of a study and reports on them.

    Attributes:
        module: That is run.
        parser: Makes the parser of its options.
        units: From the options and the protocol to the work.
        collect: From the records, the command, the settings and what `report` returns
            to the summary.
        tables: Of a summary, for a terminal.
        page: Of a summary, what its report says.
        figures: Of a summary, by name.
        settings: What the study's folder holds beside the protocol's settings.
        then: From the options, the protocol and the study with its first records to the
            work that depends on these.
        report: From the options to keywords of ``collect``, which decide the report and
            no record.
    """

    module: str
    parser: Callable[[], argparse.ArgumentParser]
    units: Callable[[argparse.Namespace, Protocol], list[Unit]]
    collect: Callable[..., Summary]
    tables: Callable[[Summary], list[Table]]
    page: Callable[[Summary], Page]
    figures: Callable[[Summary], dict[str, Figure]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    then: Callable[[argparse.Namespace, Protocol, Study], list[Unit]] | None = None
    report: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda options: {}

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run the command.

        Args:
            argv: Arguments; None means those of the process.

        Returns:
            The exit code.
        """
        given = list(sys.argv[1:] if argv is None else argv)
        try:
            failed = self._run(parse_options(given, self.parser()), given)
        except (ValueError, OSError) as error:
            # Every error of ours is one of these and says its way out in its text.
            print(f"error: {error}", file=sys.stderr)  # noqa: T201
            return USAGE_ERROR
        except KeyboardInterrupt:
            text = "interrupted; the same command goes on with what is missing"
            print(text, file=sys.stderr)  # noqa: T201
            return 130
        for what in failed:
            print(f"failed: {what}", file=sys.stderr)  # noqa: T201
        return FAILED if failed else 0

    def _run(self, options: argparse.Namespace, given: list[str]) -> list[str]:
        same = protocol(options)
        settings = {**self.settings, **same.settings()}
        with quiet_libraries():
            work = self.units(options, same)
            study = Study(options.output / options.name)
            study.begin(settings)
            failed = self._done(study, work, options)
            if self.then is not None:
                more = self.then(options, same, study)
                failed += self._done(study, more, options)
                work += more
        records = [(key, study.read(key)) for unit in work for key in unit.keys]
        for file in study.damaged:
            # Told also where nothing else is: a number may have changed.
            what = "is still" if options.report_only else "was"
            again = "left out" if options.report_only else "made again"
            print(  # noqa: T201
                f"record {file} {what} not whole: {again}", file=sys.stderr
            )
        command = shlex.join(["python", "-m", self.module, *given])
        summary = self.collect(records, command, settings, **self.report(options))
        page = self.page(summary)
        files = write_page(page, summary, self.figures(summary), study.folder)
        if not options.quiet:
            self._show(summary, page, str(files["html"]))
        return failed

    @staticmethod
    def _done(study: Study, work: list[Unit], options: argparse.Namespace) -> list[str]:
        """Do some work, unless only a report is wanted; return what failed."""
        if options.report_only or not work:
            return []
        with progress_bar(options.quiet) as progress:
            return study.run(work, options.jobs, progress)

    def _show(self, summary: Summary, page: Page, report: str) -> None:
        console = Console(width=None if sys.stdout.isatty() else 110)
        for table in self.tables(summary):
            console.print(table)
        for line in page.lines:
            console.print(line, highlight=False, markup=False)
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
