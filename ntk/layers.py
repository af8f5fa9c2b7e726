"""Which layers of a transformer should be tuned?

    python -m ntk.layers --space lora:8 --budget 3
    python -m ntk.layers --task sst2 --data-dir DATA --space rows:3 --budget 40000p
    python -m ntk.layers --tasks sst2 cola --data-dir DATA --verify --subsets 18

The kernels of all layers on the training examples, and what rules choose by them. With
--verify and --subsets layers are fine-tuned too, to see whether the ranking held.
Stopped at any moment, the same command goes on with what is missing.
"""

from collections.abc import Sequence

from ntk.layers_options import LayersRun, build_layers_parser
from ntk.layers_report import summary_lines, tables, write_layers
from ntk.study_command import FAILED, StudyCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Rank the layers, then fine-tune some if that was asked for.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    run = LayersRun()
    command = StudyCommand(
        module="ntk.layers",
        parser=build_layers_parser,
        units=run.units,
        collect=run.collect,
        tables=tables,
        lines=summary_lines,
        write=write_layers,
        settings={"study": "layers"},
    )
    code = command(argv)
    # Which layers are fine-tuned is known only now.
    return command(argv) if code in (0, FAILED) and run.goes_on else code


if __name__ == "__main__":
    raise SystemExit(main())
