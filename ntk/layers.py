"""Which layers of a transformer should be tuned?

    python -m ntk.layers --space lora:8 --budget 3
    python -m ntk.layers --task sst2 --data-dir DATA --space rows:3 --budget 40000p
    python -m ntk.layers --tasks sst2 cola --data-dir DATA --verify --subsets 18

Other tasks' data or another protocol are another study, with a --name of its own.

The kernels of all layers on the training examples, and what rules choose by them. With
--verify and --subsets layers are fine-tuned too, to see whether the ranking held.
Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.layers_options import build_layers_parser, choice, fine_tuning_units, units
from ntk.layers_plots import draw_figures
from ntk.layers_report import report_page, tables
from ntk.layers_summary import collect
from ntk.study_command import StudyCommand

main = StudyCommand(
    module="ntk.layers",
    parser=build_layers_parser,
    units=units,
    then=fine_tuning_units,
    collect=collect,
    report=lambda options: {"choice": choice(options)},
    tables=tables,
    page=report_page,
    figures=draw_figures,
    settings={"study": "layers"},
)

if __name__ == "__main__":
    raise SystemExit(main())
