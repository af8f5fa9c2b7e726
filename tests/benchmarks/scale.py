"""A model of RoBERTa-base's size within a memory budget: peaks, times, growth with n.

    python -m tests.benchmarks.scale               # about 12 minutes on two cores
    python -m tests.benchmarks.scale --sizes 8 16  # does it run?

Each measurement is a process of its own, whose peak resident memory the operating
system tells; the model has random weights (125M parameters, two outputs), the sentences
32 tokens. A full kernel and thirty spaces are planned for `--memory` and computed as
planned. Time is set against the floor and the counted multiply-adds of the full kernel
at the measured rate of a matrix product (see `ntk.yardsticks`), all of one process, so
that what must hold is, at every size,

- the peak within the budget,
- full and thirty spaces within `LIMIT` of floor + operations / rate.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ntk.estimate import routes
from ntk.function import NetworkFunction
from ntk.memory import compute_as_planned, in_units, parse_bytes, plan
from ntk.yardsticks import multiply_adds_per_second, run_floor, seconds
from rocoft.architecture import Architecture
from tests.benchmarks.cost import FULL, THIRTY
from tests.benchmarks.gpu import roberta
from tests.benchmarks.setting import environment, peak_memory

SETS = {"full": FULL, "thirty": THIRTY}
LIMIT = 1.3
GIB = 2**30


def measure(n: int, which: str, memory: int) -> dict[str, Any]:
    """Return what the kernels of n examples took and held, in this process."""
    case, device = roberta(n), torch.device("cpu")
    model, batches = case.model("cpu"), case.batches("cpu")
    how = plan(model, batches, len(batches), spaces=SETS[which], memory=memory)
    counted = routes(Architecture(model), batches, how)
    floor = lambda: run_floor(NetworkFunction(model), batches)
    floors = [seconds(floor, device)]
    rates = [multiply_adds_per_second(device)]
    took = seconds(
        lambda: compute_as_planned(model, batches, how, spaces=SETS[which]), device
    )
    floors.append(seconds(floor, device))
    rates.append(multiply_adds_per_second(device))
    operations = sum(route.operations for route in counted)
    bound = min(floors) + operations / max(rates)
    return {
        "n": n,
        "spaces": which,
        "passes": how.passes,
        "seconds": took,
        "floor": floors,
        "rate": rates,
        "operations": operations,
        "over_bound": took / bound,
        "peak_gib": peak_memory(),
        "planned_gib": how.peak / GIB,
    }


def main() -> int:
    """Run the benchmark; 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--memory", default="4GiB", help="budget of a process (default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="n")
    add("--output", type=Path, help="JSON file, such as figures/scale.json")
    add("--one", nargs=2, metavar=("N", "SET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory = parse_bytes(options.memory)
    if options.one:
        print(json.dumps(measure(int(options.one[0]), options.one[1], memory)))
        return 0
    cases = [(n, "full") for n in options.sizes] + [(max(options.sizes), "thirty")]
    found = []
    for n, which in cases:
        command = [sys.executable, "-m", "tests.benchmarks.scale"]
        command += ["--memory", options.memory, "--one", str(n), which]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = json.loads(done.stdout)
        found.append(one)
        print(
            f"n = {n}, {which}: {one['seconds']:.1f} s in {one['passes']} passes, "
            f"{one['over_bound']:.2f} x the bound (limit {LIMIT}); peak "
            f"{one['peak_gib']:.2f} GiB of {in_units(memory)}",
            flush=True,
        )
    if options.output is not None:
        record = {
            "environment": {**environment(), "model": "RoBERTa-base, random weights"},
            "memory": options.memory,
            "limit": LIMIT,
            "cases": found,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    fits = all(one["peak_gib"] * GIB <= memory for one in found)
    return 0 if fits and all(one["over_bound"] <= LIMIT for one in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
