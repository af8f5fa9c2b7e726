"""What kernels cost on this machine: the floor, spaces, contractions and their growth.

    python -m ntk.bench
    python -m ntk.bench --model ./my-checkpoint --examples 16 32 64 --spaces full rows:3
    python -m ntk.bench --tokens 16 64 128 --labels 2 4 8 --precisions bf16 bf16x3
    python -m ntk.bench --device cuda --dtype bfloat16

Times kernels of growing numbers of examples, tokens and outputs, and of further models,
and sets them against the floor: one forward and c backward passes with no gradient of a
parameter. The full kernel is also set against its bound: the floor and its
multiply-adds at the rate of a matrix product. Of the weights of every shape both ways
to contract them are timed, and how far the faster one was missed.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntk.notation import parse_space
from ntk.options import add_model_options, positive
from ntk.precision import PRECISIONS
from rocoft.console import progress_bar, quiet_libraries
from rocoft.tasks import HUB

if TYPE_CHECKING:
    from rich.table import Table

USAGE_ERROR = 2
SPACES = ("full", "rows:1", "rows:3", "columns:3", "lora:8", "bias")
Record = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m ntk.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    add = parser.add_argument_group("work").add_argument
    add(
        "--task",
        default="reviews",
        metavar="TASK",
        help=f"whose examples: reviews (embedded), {', '.join(HUB)} from the Hub, or a "
        "folder of --data-dir (default: %(default)s)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with TASK/train.jsonl and TASK/test.jsonl, instead of the Hub",
    )
    add(
        "--examples",
        type=positive,
        nargs="+",
        default=[8, 16, 32],
        metavar="N",
        help="numbers of examples whose kernel is timed (default: 8 16 32)",
    )
    add(
        "--spaces",
        nargs="+",
        default=list(SPACES),
        metavar="SPACE",
        help="as ntk.compare --space takes them, each alone and all together (default: "
        f"{' '.join(SPACES)})",
    )
    add(
        "--tokens",
        type=positive,
        nargs="+",
        default=[],
        metavar="T",
        help="as well with the fewest --examples cut or repeated to T tokens each "
        "(default: only as long as they are)",
    )
    add(
        "--labels",
        type=positive,
        nargs="+",
        default=[],
        metavar="C",
        help="as well with the fewest --examples and a new head of C outputs (default: "
        "only as many as the task has)",
    )
    add(
        "--more-models",
        nargs="+",
        default=[],
        metavar="ID",
        help="as well with the fewest --examples on these models",
    )
    add(
        "--precisions",
        nargs="+",
        choices=[each for each in PRECISIONS if each != "float32"],
        default=[],
        help="as well with the products of the first of --spaces in these, and their "
        "error (default: only in float32)",
    )
    add(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="examples in one pass (default: %(default)s)",
    )
    add(
        "--rounds",
        type=positive,
        default=5,
        metavar="N",
        help="how often each is timed, after once that does not count; medians are "
        "shown (default: %(default)s)",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="bench.json, bench.svg and bench.png go to DIR/NAME (default: "
        "%(default)s)",
    )
    add(
        "--name",
        default="bench",
        help="of the folder; an earlier result there is replaced (default: bench)",
    )
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print the record instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None means those of the process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(given)
    try:
        _run(options, given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _run(options: argparse.Namespace, given: list[str]) -> None:
    quiet = options.quiet or options.json
    spaces = {text: parse_space(text) for text in options.spaces}
    folder = options.output / options.name
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_libraries():
        # Imported here: mistyped options need not wait for what draws.
        import torch

        from ntk.bench_cases import Cases
        from ntk.cost_plots import draw_growth
        from ntk.drawing import to_png, to_svg
        from ntk.storage import write_bytes, write_text
        from rocoft.trainer import versions

        with progress_bar(quiet) as progress:
            cases = Cases(options, spaces, progress)
            backbone, costs = cases.backbone, cases.by_examples()
            growth = cases.growth()
            contractions = cases.contractions()
        device = next(backbone.module.parameters()).device
    record: Record = {
        "version": importlib.metadata.version("rocoft-ntk"),
        "command": shlex.join(["python", "-m", "ntk.bench", *given]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {
            "device": _device_name(device),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "model": {
            "name": backbone.name,
            "parameters": sum(p.numel() for p in backbone.module.parameters()),
            "dtype": options.dtype,
            "readout": backbone.readout,
        },
        "task": options.task,
        "rounds": options.rounds,
        "costs": [asdict(cost) for cost in costs],
        "growth": {
            axis: [{"at": at, **asdict(cost)} for at, cost in some.items()]
            for axis, some in growth.items()
        },
        "contractions": [{**asdict(one), "loss": one.loss} for one in contractions],
    }
    text = json.dumps(record, indent=1) + "\n"
    figure = draw_growth(record)
    write_text(folder / "bench.json", text)
    write_text(folder / "bench.svg", to_svg(figure))
    write_bytes(folder / "bench.png", to_png(figure))
    if options.json:
        print(text, end="")  # noqa: T201
    elif not quiet:
        _show(record, folder)


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(device.type)


def _show(record: Record, folder: Path) -> None:
    from rich.console import Console

    costs = record["costs"]
    model = record["model"]
    console = Console(width=None if sys.stdout.isatty() else 110)
    heads = [
        f"n = {cost['examples']}\n{cost['positions'] / cost['examples']:.0f} tokens"
        for cost in costs
    ]
    title = (
        f"Kernels of {model['name']} on {record['machine']['device']}, "
        f"{model['dtype']}: time over the floor"
    )
    console.print(_table(title, heads, costs))
    for axis, some in record["growth"].items():
        title = f"{axis}, n = {some[0]['examples']}: time over the floor"
        console.print(_table(title, [str(one["at"]) for one in some], some))
    if record["contractions"]:
        console.print(_contractions(record["contractions"]))
    for name, error in costs[-1]["errors"].items():
        console.print(f"{name}: relative error {error:.1e}", highlight=False)
    for line in (
        "floor: one forward and c backward passes, no gradient of a parameter; bound: "
        "the floor and the full kernel's multiply-adds at the rate of a matrix product "
        f"({costs[-1]['multiply_adds_per_second']:.2g} a second).",
        f"figures and record: {folder}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _table(title: str, heads: Sequence[str], costs: Sequence[Record]) -> "Table":
    """Return the table of some costs, a column each."""
    from rich.table import Table

    table = Table(title=title)
    table.add_column("kernel")
    for head in heads:
        table.add_column(head, justify="right")
    table.add_row("floor (s)", *(f"{cost['seconds']['floor']:.3g}" for cost in costs))
    for name in costs[0]["over_floor"]:
        table.add_row(name, *(f"{cost['over_floor'][name]:.2f}" for cost in costs))
    if costs[0]["over_bound"] is not None:
        table.add_row(
            "full over its bound", *(f"{cost['over_bound']:.2f}" for cost in costs)
        )
    return table


def _contractions(found: Sequence[Record]) -> "Table":
    """Return the table of both routes of contracting a weight, a row for each shape."""
    from rich.table import Table

    n = found[0]["examples"]
    table = Table(title=f"contraction of a weight, n = {n}: milliseconds by either way")
    for head in ("shape", "weights", "positions", "blocks", "taken", "over the faster"):
        table.add_column(head, justify="left" if head == "taken" else "right")
    for one in found:
        table.add_row(
            "{} x {}".format(*one["shape"]),
            str(one["weights"]),
            *(f"{1e3 * one['seconds'][way]:.3g}" for way in ("positions", "blocks")),
            one["taken"],
            f"{one['loss']:.2f}",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
