"""Does it matter which rows or columns a kernel is made of, and how many?

    python -m ntk.ablate
    python -m ntk.ablate --tasks sst2 trec --data-dir DATA --counts 1 3 16 all --jobs 2
    python -m ntk.ablate --axes rows --finetune-points rows:3 rows:3/strategy=gradient

Kernels over rows and columns chosen in every way, against the full kernel and against
random choice. Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.ablation_options import build_ablation_parser, units
from ntk.ablation_plots import draw_figures
from ntk.ablation_report import report_page, tables
from ntk.ablation_summary import collect
from ntk.study_command import StudyCommand

main = StudyCommand(
    module="ntk.ablate",
    parser=build_ablation_parser,
    units=units,
    collect=collect,
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "ablation"},
)

if __name__ == "__main__":
    raise SystemExit(main())
