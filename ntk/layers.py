"""Which layers of a transformer should be tuned?

    python -m ntk.layers --space lora:8 --budget 3
    python -m ntk.layers --task sst2 --data-dir DATA --space rows:3 --budget 40000p
    python -m ntk.layers --tasks sst2 cola --data-dir DATA --verify --subsets 18

Other tasks' data or another protocol are another study, with a --name of its own.

The kernels of all layers on the training examples, and what rules choose by them. With
--verify and --subsets layers are fine-tuned too, to see whether the ranking held.
Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.studies.layers.options import LayersOptions
from rocoft.commands import Command

main = Command(
    module="ntk.layers",
    options=LayersOptions,
    run="ntk.studies.layers.run",
    description="Which layers of a transformer to tune? Ranks them, before any "
    "training, by their kernels on the training examples: by how much of what is to be "
    "learnt they explain, by the published rule, and by simpler ones. With --verify "
    "the chosen layers are fine-tuned, and with --subsets others of all sizes too, to "
    "see which measure tells the accuracy. What is done is kept: the same command goes "
    "on where it was stopped, and more can be added.",
    epilog="A SPACE is that of ntk compare, such as lora:8, rows:3, rows:3@query,value "
    "or full. Exit codes: 0 done, 1 some records failed, 2 bad input, 130 interrupted.",
    interrupted="the same command goes on with what is missing",
)

if __name__ == "__main__":
    raise SystemExit(main())
