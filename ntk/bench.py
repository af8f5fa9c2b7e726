"""What kernels cost on this machine: the floor, spaces, and their growth.

    python -m ntk.bench
    python -m ntk.bench --model ./my-checkpoint --examples 16 32 64 --spaces full rows:3
    python -m ntk.bench --tokens 16 64 128 --labels 2 4 8 --precisions bf16 bf16x3
    python -m ntk.bench --device cuda --dtype bfloat16

Kernels are set against the floor, passes with no gradient of a parameter.
"""

from ntk.studies.bench.options import BenchOptions
from rocoft.commands import Command

main = Command(
    module="ntk.bench",
    options=BenchOptions,
    run="ntk.studies.bench.run",
    description="What do kernels cost on this machine? Times kernels of growing "
    "numbers of examples, tokens and outputs, and of further models, and sets them "
    "against the floor: one forward and c backward passes with no gradient of a "
    "parameter. The full kernel is also set against its bound: the floor and its "
    "multiply-adds at the throughput of a matrix product.",
    epilog="A SPEC is that of ntk compare. Exit codes: 0 done, 2 bad input, 130 "
    "interrupted.",
    interrupted="nothing was written",
)

if __name__ == "__main__":
    raise SystemExit(main())
