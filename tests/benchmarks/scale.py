"""A model of RoBERTa-base's size within a memory budget: peaks, times, growth with n.

    python -m tests.benchmarks.scale               # about 15 minutes on two cores
    python -m tests.benchmarks.scale --sizes 8 16  # does it run?
    python -m tests.benchmarks.scale --draw figures/scale.json

Each measurement is a process of its own, whose peak resident memory the operating
system tells; the model has random weights (125M parameters, two outputs), the sentences
32 tokens. A full kernel and thirty spaces are planned for `--memory` and computed as
planned, with a file for what there is no room for where that is faster. Time is set
against the floor (all passes over the examples once) and counted multiply-adds at the
measured rate of a matrix product (see `ntk.scale.machine`), all of one process, so that
what must hold is, at the largest size,

- the peak within the budget,
- full and thirty spaces within `LIMIT` of floor + operations / rate.

Operations are counted as `setting.full_operations` does for the full kernel, all pairs
of gradients as if it were not symmetric; the record also has those that are done, where
half of the pairs are left out (`operations_done`). Of the thirty spaces those of making
and contracting the features of all selected rows, columns and LoRA pairs are added.
"""

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import torch
from torch import nn

from ntk.gradients.function import NetworkFunction
from ntk.kernels.shared import shared_features
from ntk.scale.estimate import routes
from ntk.scale.machine import multiply_adds_per_second, run_floor, seconds
from ntk.scale.planning import compute_as_planned, plan
from ntk.scale.resources import Resources
from ntk.scale.units import in_units, parse_bytes
from ntk.scale.work import Work
from ntk.spaces.kinds import Space
from ntk.spaces.maps import InputSide, Slices
from ntk.spaces.resolution import resolve
from rocoft.models.architecture import Architecture
from tests.benchmarks.cost import FULL, THIRTY
from tests.benchmarks.gpu import roberta
from tests.benchmarks.setting import (
    OUTPUTS,
    environment,
    full_operations,
    peak_memory,
)
from tests.benchmarks.table import rounded, write

SETS = {"full": FULL, "thirty": THIRTY}
LIMIT = 1.3
SPILL = Path("runs/.cache")
"""Where what there is no room for waits, as for the commands."""
GIB = 2**30


def selected_operations(
    model: nn.Module, spaces: Mapping[str, Space], n: int, positions: int
) -> float:
    """Return the multiply-adds of contracting selected rows, columns and LoRA pairs.

    Features of k slices with d entries each are made of all positions and outputs and
    contracted slice by slice; a pair's A is applied to all inputs first.
    """
    total, pairs = 0.0, (OUTPUTS * n) ** 2
    for each in shared_features(resolve(spaces, model)):
        match each.stored:
            case Slices(of=of, rows=rows):
                total += (OUTPUTS * positions + pairs) * len(rows) * of.inputs
            case InputSide(of=of, columns=columns, pairs=low_rank):
                ranks = sum(each.rank for each in low_rank)
                slices = len(columns) + ranks
                total += (OUTPUTS * positions + pairs) * slices * of.outputs
                total += positions * ranks * of.inputs
    return total


def measure(n: int, which: str, memory: int) -> dict[str, Any]:
    """Return what the kernels of n examples took and held, in this process."""
    case, device = roberta(n), torch.device("cpu")
    model, batches = case.model("cpu"), case.batches("cpu")
    work = Work(model, batches, len(batches), SETS[which])
    how = plan(work, Resources(memory=memory, spill=SPILL))
    counted = routes(Architecture(model), batches, how)
    floor = lambda: run_floor(NetworkFunction(model), batches)
    floors = [seconds(floor, device)]
    rates = [multiply_adds_per_second(device)]
    took = seconds(lambda: compute_as_planned(work, how), device)
    floors.append(seconds(floor, device))
    rates.append(multiply_adds_per_second(device))
    peak = peak_memory()
    whole = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    operations = sum(full_operations(model, whole).values())
    if which == "thirty":
        operations += selected_operations(model, THIRTY, n, whole["input_ids"].numel())
    bound = min(floors) + operations / max(rates)
    return {
        "n": n,
        "spaces": which,
        "passes": how.passes,
        "spilled_gib": 0 if how.spill is None else how.spill.bytes / GIB,
        "seconds": took,
        "floor": floors,
        "rate": rates,
        "operations": operations,
        "operations_done": sum(route.operations for route in counted),
        "over_bound": took / bound,
        "peak_gib": peak,
        "planned_gib": how.peak / GIB,
    }


def draw(record: Mapping[str, Any]) -> str:
    """Return the figure as SVG: growth of time and memory with n."""
    style = {"svg.hashsalt": "scale", "font.size": 9, "axes.spines.top": False}
    full = [one for one in record["cases"] if one["spaces"] == "full"]
    sizes = [one["n"] for one in full]
    with mpl.rc_context(style | {"axes.spines.right": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.6), layout="constrained"
        )
        floors = [min(one["floor"]) for one in full]
        counted = [one["operations"] / max(one["rate"]) for one in full]
        left.plot(sizes, [one["seconds"] for one in full], "s-", label="full kernel")
        left.plot(sizes, floors, "o-", label="floor: one forward, two backwards")
        left.plot(sizes, counted, "^-", label="counted operations / rate")
        bound = [f + o for f, o in zip(floors, counted, strict=True)]
        limit = [record["limit"] * each for each in bound]
        left.plot(sizes, limit, "k:", label=f"{record['limit']:g} (floor + operations)")
        for one in record["cases"]:
            if one["spaces"] == "thirty":
                left.plot(one["n"], one["seconds"], "DC3", label="thirty spaces")
        left.set(xscale="log", yscale="log", xlabel="examples n", ylabel="seconds")
        left.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        left.minorticks_off()
        left.legend(frameon=False, fontsize=8)
        right.plot(sizes, [one["peak_gib"] for one in full], "s-", label="full kernel")
        for one in record["cases"]:
            if one["spaces"] == "thirty":
                right.plot(one["n"], one["peak_gib"], "DC3", label="thirty spaces")
        right.axhline(
            parse_bytes(record["memory"]) / GIB,
            color="k",
            linestyle=":",
            label="budget",
        )
        right.set(
            xscale="log", xlabel="examples n", ylabel="peak resident memory (GiB)"
        )
        right.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        right.minorticks_off()
        right.set_ylim(bottom=0)
        right.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def main() -> int:
    """Run the benchmark; 1 if something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--memory", default="4GiB", help="budget of a process (default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="n")
    add("--output", type=Path, help="JSON file, such as figures/scale.json")
    add("--draw", type=Path, metavar="FILE", help="draw a record, measure nothing")
    add("--one", nargs=2, metavar=("N", "SET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw is not None:
        write(
            options.draw.with_suffix(".svg"), draw(json.loads(options.draw.read_text()))
        )
        return 0
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
            f"{one['spilled_gib']:.1f} GiB in a file, "
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
        write(options.output, json.dumps(rounded(record), indent=1) + "\n")
        write(options.output.with_suffix(".svg"), draw(record))
    largest = [one for one in found if one["n"] == max(options.sizes)]
    fits = all(one["peak_gib"] * GIB <= memory for one in largest)
    return 0 if fits and all(one["over_bound"] <= LIMIT for one in largest) else 1


if __name__ == "__main__":
    raise SystemExit(main())
