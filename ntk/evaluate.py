"""Do kernel classifiers match fine-tuning, and a few rows' kernel the full one?

    python -m ntk.evaluate
    python -m ntk.evaluate --tasks sst2 trec --data-dir DATA --shots 16 64 --jobs 2
    python -m ntk.evaluate --model roberta-base --tasks sst2 mnli --finetune full rows:3

The few-shot study of the kernel view of fine-tuning (Malladi et al. 2023) over any
parameters. Stopped at any moment, the same command goes on with what is missing.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from ntk.options import parse_options
from ntk.study import Study
from ntk.study_options import build_study_parser, protocol, units
from ntk.study_report import summary_lines, tables, write_study
from ntk.study_summary import collect
from rocoft.console import progress_bar, quiet_libraries

FAILED = 1
USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        failed = _run(parse_options(given, build_study_parser()), given)
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


def _run(options: argparse.Namespace, given: list[str]) -> list[str]:
    same = protocol(options)
    with quiet_libraries():
        work = units(options, same)
        study = Study(options.output / options.name)
        study.begin(same.settings())
        failed: list[str] = []
        if not options.report_only:
            with progress_bar(options.quiet) as progress:
                failed = study.run(work, options.jobs, progress)
    records = [(key, study.read(key)) for unit in work for key in unit.keys]
    for file in study.damaged:
        # Told also where nothing else is: a number may have changed.
        what = "is still" if options.report_only else "was"
        again = "left out" if options.report_only else "made again"
        print(  # noqa: T201
            f"record {file} {what} not whole: {again}", file=sys.stderr
        )
    command = shlex.join(["python", "-m", "ntk.evaluate", *given])
    summary = collect(records, command, same.settings())
    files = write_study(summary, study.folder)
    if not options.quiet:
        _show(summary, str(files["html"]))
    return failed


def _show(summary: dict, report: str) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110)
    for table in tables(summary):
        console.print(table)
    for line in summary_lines(summary):
        console.print(line, highlight=False, markup=False)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
