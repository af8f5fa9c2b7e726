"""What kernels cost: ratios to the floor, the bound of the full kernel, peak memory.

    python -m tests.benchmarks.cost --peers        # about 20 minutes on two cores
    python -m tests.benchmarks.cost                # 7; keeps the peers' figures there
    python -m tests.benchmarks.cost --quick        # does it run?
    python -m tests.benchmarks.cost --draw         # the figure again, from the JSON

All cases of one size are measured in rounds: every round runs each once, in an order
shuffled anew, after one run of each that is not counted. A ratio is taken within a
round and its median over the rounds reported, so that a slow phase of the machine falls
on numerator and denominator alike. `busy_cores_elsewhere` is the load of others, which
should be below 0.15. Floor, rate and counted operations: see `setting`.

What must hold at every size, by medians:

- a kernel of rows, columns, LoRA or biases within `LEAN_LIMIT` of the floor;
- the full kernel within `FULL_LIMIT` (floor + counted operations / rate);
- thirty spaces, the full one among them, within `THIRTY_LIMIT` of the full kernel;
- the kernels of all layers of a space within `LAYERS_LIMIT` of its whole kernel;
- at n = `MEMORY_SIZE`, less than `MEMORY_LIMIT` GiB held at any time, model and Python
  included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ntk.kernels import empirical as kernel
from ntk.kernels.layerwise import layer_kernels
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import (
    Bias,
    Columns,
    Embeddings,
    Full,
    Head,
    LoRA,
    Norm,
    Rows,
    Space,
)
from ntk.studies.bench.cost import in_rounds
from tests.benchmarks import peers as others
from tests.benchmarks import setting
from tests.benchmarks.setting import Batch
from tests.benchmarks.table import (
    failed,
    print_memory,
    print_peers,
    print_size,
    rounded,
    write,
)

LEAN_LIMIT = 1.15
FULL_LIMIT = 1.3
THIRTY_LIMIT = 1.3
LAYERS_LIMIT = 1.2
MEMORY_LIMIT = 1.5
MEMORY_SIZE = 32
PEER_SECONDS = 60.0
"""A peer is not run where one run would take longer."""
PEER_GROWTH = 1.5
"""Exponent in n by which the time of a peer's next size is guessed."""

LEAN: dict[str, Space] = {
    "rows 1": Rows(1),
    "rows 3": Rows(3),
    "columns 3": Columns(3),
    "rows 3 + columns 3": Rows(3) + Columns(3),
    "LoRA 8": LoRA(8),
    "biases": Bias(),
}
FULL: dict[str, Space] = {"full": Full()}
THIRTY: dict[str, Space] = {
    **FULL,
    **LEAN,
    "rows 8": Rows(8),
    "columns 1": Columns(1),
    "columns 8": Columns(8),
    **{f"random rows, seed {i}": Rows(3, strategy="random", seed=i) for i in range(5)},
    **{
        f"random columns, seed {i}": Columns(3, strategy="random", seed=i)
        for i in range(5)
    },
    "LoRA 4": LoRA(4),
    "LoRA 16": LoRA(16),
    "norms": Norm(),
    "head": Head(),
    "embeddings": Embeddings(),
    "biases + head": Bias() + Head(),
    "full, query": Full().at("query"),
    "full, last layer": Full().layers(-1),
    "rows 3, query and value": Rows(3).at("query", "value"),
    "LoRA 8, query and value": LoRA(8).at("query", "value"),
}
LAYERED = ("full", "rows 3", "LoRA 8")
"""Spaces whose kernels are parted by layer."""
assert len(THIRTY) == 30
"""What a user might compare in one call."""

Case = Callable[[], object]


def ours(
    model: nn.Module, batch: Batch, spaces: Mapping[str, Space], reduce: str = "full"
) -> Tensor:
    """Return the kernel of the first of several spaces."""
    result = kernel.compute(
        model, batch, spaces=spaces, options=KernelOptions(reduce=reduce)
    )
    return next(iter(result.kernels.values()))


def summary(values: list[float], limit: float | None = None) -> dict[str, object]:
    """Return minimum, median and maximum, and whether the median keeps a limit."""
    found: dict[str, object] = {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }
    if limit is not None:
        found |= {"limit": limit, "holds": statistics.median(values) <= limit}
    return found


def ratio(above: list[float], below: list[float], limit: float | None = None) -> dict:
    """Return the summary of the ratio round by round."""
    return summary([a / b for a, b in zip(above, below, strict=True)], limit)


def measure(model: nn.Module, n: int, rounds: int) -> dict:
    """Return our figures at one size."""
    batch = setting.sentences(n)
    cases: dict[str, Case] = {
        "floor": lambda: setting.floor(model, batch),
        "matrix products": setting.matrix_product(),
        **{
            name: lambda space=space: ours(model, batch, {"": space})
            for name, space in (LEAN | FULL).items()
        },
        "thirty": lambda: ours(model, batch, THIRTY),
        **{
            f"layers, {name}": lambda name=name: layer_kernels(
                model, batch, space=THIRTY[name]
            )
            for name in LAYERED
        },
    }
    first = {name: setting.seconds(case) for name, case in cases.items()}
    busy = setting.BusyElsewhere()
    times = in_rounds(cases, rounds)
    elsewhere = busy.cores()
    products = times.pop("matrix products")
    operations = setting.full_operations(model, batch)
    bounds = [
        floor + sum(operations.values()) / setting.product_rate(product)
        for floor, product in zip(times["floor"], products, strict=True)
    ]
    rates = [2e-9 * setting.product_rate(product) for product in products]
    return {
        "n": n,
        "rounds": rounds,
        "busy_cores_elsewhere": elsewhere,
        "floor_seconds": summary(times["floor"]),
        "gflops_of_matrix_product": summary(rates),
        "full_multiply_adds": operations,
        "seconds": times,
        "first_seconds": first,
        "ratio_to_floor": {
            name: ratio(t, times["floor"], LEAN_LIMIT if name in LEAN else None)
            for name, t in times.items()
            if name != "floor"
        },
        "bound_to_floor": ratio([FULL_LIMIT * b for b in bounds], times["floor"]),
        "full_to_floor_and_operations": ratio(times["full"], bounds, FULL_LIMIT),
        "thirty_to_full": ratio(times["thirty"], times["full"], THIRTY_LIMIT),
        "layers_to_whole": {
            name: ratio(times[f"layers, {name}"], times[name], LAYERS_LIMIT)
            for name in LAYERED
        },
    }


class Skipped(Exception):
    """A measurement that is left out, and why."""


class PeerRuns:
    """Runs the peers at growing sizes as long as they keep to time and memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = sum(p.numel() for p in model.parameters())
        self.peers: dict[str, others.Peer] = {}
        self.refused: dict[str, str] = {}
        self.last: dict[str, tuple[int, float]] = {}
        for name, make in others.peers(model).items():
            try:
                self.peers[name] = make()
            except Exception as error:  # Any tool may fail in any way.
                self.refused[name] = _named(error)

    def measure(self, n: int, rounds: int) -> dict:
        """Return the peers' figures at one size, and ours beside them."""
        batch = setting.sentences(n)
        kernels = {how: ours(self.model, batch, FULL, how) for how in ("full", "trace")}
        rows: dict[str, dict] = {
            name: {"skipped": why} for name, why in self.refused.items()
        }
        cases: dict[str, Case] = {
            "floor": lambda: setting.floor(self.model, batch),
            "ours": lambda: ours(self.model, batch, FULL),
            "ours, trace": lambda: ours(self.model, batch, FULL, "trace"),
        }
        cases["floor"]()
        first: dict[str, float] = {}
        for name, peer in self.peers.items():
            rows[name] = {"reduce": peer.reduce, "note": peer.note}
            try:
                self._check_size(name, peer, n)
                start = time.perf_counter()
                found = peer.run(batch)
                first[name] = time.perf_counter() - start
            except Exception as error:  # Any tool may fail in any way.
                rows[name]["skipped"] = _named(error)
                continue
            expected = kernels[peer.reduce]
            rows[name]["relative_error"] = float(
                (found - expected).norm() / expected.norm()
            )
            del found
            cases[name] = lambda peer=peer: peer.run(batch)
        busy = setting.BusyElsewhere()
        times = in_rounds(cases, rounds)
        elsewhere = busy.cores()
        for name, t in times.items():
            row = rows.setdefault(name, {})
            row["seconds"] = t
            row["ratio_to_floor"] = ratio(t, times["floor"])
            if name in self.peers:
                same = "ours" if row["reduce"] == "full" else "ours, trace"
                row["first_seconds"] = first[name]
                row["ratio_to_ours"] = ratio(t, times[same])
                self.last[name] = n, statistics.median(t)
        return {
            "n": n,
            "rounds": rounds,
            "busy_cores_elsewhere": elsewhere,
            "tools": rows,
        }

    def _check_size(self, name: str, peer: others.Peer, n: int) -> None:
        if peer.largest is not None and n > peer.largest:
            raise Skipped(f"run up to n = {peer.largest} only")
        known, took = self.last.get(name, (n, 0.0))
        expected = took * (n / known) ** PEER_GROWTH
        if expected > PEER_SECONDS:
            raise Skipped(
                f"about {expected:.0f} s a run, from {took:.1f} s at n = {known}"
            )
        needed = peer.jacobians * 4 * setting.OUTPUTS * n * self.parameters / 2**30
        free = setting.available_memory()
        if needed > free:
            raise Skipped(f"needs about {needed:.0f} GiB, {free:.0f} GiB available")


def _named(error: Exception) -> str:
    return (
        str(error) if isinstance(error, Skipped) else f"{type(error).__name__}: {error}"
    )


def hold(name: str, n: int) -> dict[str, float]:
    """Run one case alone in this process; return the memory it held (GiB)."""
    model = setting.load_model()
    batch = setting.sentences(n)
    cases: dict[str, Case] = {
        "floor": lambda: setting.floor(model, batch),
        "full": lambda: ours(model, batch, FULL),
        "thirty": lambda: ours(model, batch, THIRTY),
    }
    if name not in cases:
        peer = others.peers(model)[name]()
        cases[name] = lambda: peer.run(batch)
    loaded = setting.peak_memory()
    for _ in range(3 if name in ("floor", "full", "thirty") else 1):
        cases[name]()
    return {"after_loading": loaded, "peak": setting.peak_memory()}


def memory(n: int, tools: list[str]) -> dict[str, dict]:
    """Return the peak memory of cases, each in a process of its own."""
    table: dict[str, dict] = {}
    for name in ("floor", "full", "thirty", *tools):
        command = [sys.executable, "-m", "tests.benchmarks.cost", "--sizes", str(n)]
        done = subprocess.run(
            [*command, "--hold", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            table[name] = {"skipped": done.stderr.strip().rpartition("\n")[2]}
            continue
        table[name] = json.loads(done.stdout)
        if name in ("full", "thirty"):
            table[name]["limit"] = MEMORY_LIMIT
            table[name]["holds"] = table[name]["peak"] < MEMORY_LIMIT
    return table


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", help="default: 8 16 32 64")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5")
    parser.add_argument("--peers", action="store_true", help="other tools as well")
    parser.add_argument("--quick", action="store_true", help="n = 8, writes no file")
    parser.add_argument("--output", type=Path, default=Path("figures/cost.json"))
    parser.add_argument("--draw", action="store_true", help="draw, measure nothing")
    parser.add_argument("--hold", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    sizes = args.sizes or ([8] if args.quick else [8, 16, 32, 64])
    rounds, peer_rounds = (2, 1) if args.quick else (args.repeats, 3)
    if rounds < 5 and not args.quick:
        parser.error(f"--repeats {args.repeats} must be at least 5")
    if args.hold:
        print(json.dumps(hold(args.hold, *sizes)))
        return
    if not args.draw:
        record = run(sizes, rounds, peer_rounds if args.peers else 0, quick=args.quick)
        if args.quick:
            return
        if not args.peers and args.output.is_file():
            keep_peers(record, json.loads(args.output.read_text()))
        write(args.output, json.dumps(rounded(record), indent=1) + "\n")
    from tests.benchmarks.figure import draw

    write(args.output.with_suffix(".svg"), draw(json.loads(args.output.read_text())))


def keep_peers(record: dict, earlier: Mapping) -> None:
    """Keep other tools' figures, which take long, of an earlier run in the record.

    Ratios are of that run's own floor, so they stand for themselves; memory is that of
    a process of its own.
    """
    if not earlier["peers"]:
        return
    record["peers"] = earlier["peers"]
    record["peers_measured"] = earlier.get("peers_measured") or {
        "command": earlier["command"],
        "date": earlier["environment"]["date"],
    }
    of_tools = earlier["memory"]["gib"]
    record["memory"]["gib"] = {**of_tools, **record["memory"]["gib"]}


def run(sizes: list[int], rounds: int, peer_rounds: int, *, quick: bool) -> dict:
    """Return the record of all measurements, printing them as they come."""
    n = sizes[0] if quick else MEMORY_SIZE
    model = setting.load_model()
    record: dict = {
        "command": "python -m tests.benchmarks.cost " + " ".join(sys.argv[1:]),
        "environment": setting.environment(),
        "thirty_spaces": {name: space.name for name, space in THIRTY.items()},
        "sizes": [],
        "peers": [],
    }
    for size in sorted(sizes):
        record["sizes"].append(measure(model, size, rounds))
        print_size(record["sizes"][-1])
    tools: list[str] = []
    if peer_rounds:
        runs = PeerRuns(model)
        for size in sorted(sizes):
            record["peers"].append(runs.measure(size, peer_rounds))
            print_peers(record["peers"][-1])
        tools = [
            name
            for name, peer in runs.peers.items()
            if peer.largest is None or n <= peer.largest
        ]
        del runs
    record["memory"] = {"n": n, "gib": memory(n, tools)}
    print_memory(n, record["memory"]["gib"])
    record["failed"] = list(failed(record, ""))
    print("\nfailed: " + ("; ".join(record["failed"]) or "none"))
    return record


if __name__ == "__main__":
    main()
