"""Does it matter which rows or columns a kernel is made of, and how many?

    python -m ntk.ablate
    python -m ntk.ablate --tasks sst2 trec --data-dir DATA --counts 1 3 16 all --jobs 2
    python -m ntk.ablate --axes rows --finetune-points rows:3 rows:3/strategy=gradient

Kernels over rows and columns chosen in every way, against the full kernel and against
random choice. Stopped at any moment, the same command goes on with what is missing.
"""

from ntk.studies.ablation.options import AblateOptions
from rocoft.commands import Command

main = Command(
    module="ntk.ablate",
    options=AblateOptions,
    run="ntk.studies.ablation.run",
    description="Does it matter which rows or columns a kernel is made of, and how "
    "many? For every task and seed: kernels of all selections, their distance to the "
    "full kernel, what classifiers on them reach, the error of random selections "
    "beside its expectation, and which modules and layers the full kernel comes from. "
    "What is done is kept: the same command goes on where it was stopped, and more of "
    "everything can be added.",
    epilog="A METHOD is that of ntk train. Exit codes: 0 done, 1 some records failed, "
    "2 bad input, 130 interrupted.",
    interrupted="the same command goes on with what is missing",
)

if __name__ == "__main__":
    raise SystemExit(main())
