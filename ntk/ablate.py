"""Does it matter which rows or columns a kernel is made of, and how many?

    python -m ntk.ablate
    python -m ntk.ablate --tasks sst2 trec --data-dir DATA --counts 1 3 16 all --jobs 2
    python -m ntk.ablate --axes rows --finetune-points rows:3 rows:3/strategy=gradient

Kernels over rows and columns chosen in every way, against the full kernel and against
random choice. Stopped at any moment, the same command goes on with what is missing.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from ntk.ablation_options import build_ablation_parser, units
from ntk.ablation_report import collect, summary_lines, tables, write_ablation
from ntk.options import parse_options
from ntk.study import Study
from ntk.study_options import protocol
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
        failed = _run(parse_options(given, build_ablation_parser()), given)
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
    settings = {"study": "ablation", **same.settings()}
    with quiet_libraries():
        work = units(options, same)
        study = Study(options.output / options.name)
        study.begin(settings)
        failed: list[str] = []
        if not options.report_only:
            with progress_bar(options.quiet) as progress:
                failed = study.run(work, options.jobs, progress)
    keys = [key for unit in work for key in unit.keys]
    records = [(key, study.read(key)) for key in keys]
    for file in study.damaged:
        # Told also where nothing else is: a number may have changed.
        what = "is still" if options.report_only else "was"
        again = "left out" if options.report_only else "made again"
        print(  # noqa: T201
            f"record {file} {what} not whole: {again}", file=sys.stderr
        )
    command = shlex.join(["python", "-m", "ntk.ablate", *given])
    summary = collect(records, command, settings)
    files = write_ablation(summary, study.folder)
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
