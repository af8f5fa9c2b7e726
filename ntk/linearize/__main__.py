"""When does the linearised model explain fine-tuning?

    python -m ntk.linearize
    python -m ntk.linearize --tasks cola sst2 --data-dir DATA --jobs 2 --name tasks
    python -m ntk.linearize --methods rows:3 full --lambdas 0 0.1 1 10

Fine-tuning held near its start by lambda, against the linearised model trained with the
same lambda. Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.linearization_options import build_linearization_parser, units
from ntk.linearization_plots import draw_figures
from ntk.linearization_report import report_page, tables
from ntk.linearization_summary import collect
from ntk.study_command import StudyCommand

main = StudyCommand(
    module="ntk.linearize",
    parser=build_linearization_parser,
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "linearization"},
)

if __name__ == "__main__":
    raise SystemExit(main())
