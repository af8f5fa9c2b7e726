"""Do kernel classifiers match fine-tuning, and a few rows' kernel the full one?

    python -m ntk.evaluate
    python -m ntk.evaluate --tasks sst2 trec --data-dir DATA --shots 16 64 --jobs 2
    python -m ntk.evaluate --model roberta-base --tasks sst2 mnli --finetune full rows:3

The few-shot study of the kernel view of fine-tuning (Malladi et al. 2023) over any
parameters. Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.evaluate_options import build_evaluation_parser, units
from ntk.study_command import StudyCommand
from ntk.study_figures import draw_figures
from ntk.study_report import report_page, tables
from ntk.study_summary import collect

main = StudyCommand(
    module="ntk.evaluate",
    parser=build_evaluation_parser,
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
)

if __name__ == "__main__":
    raise SystemExit(main())
