"""What kernels cost on this machine: the floor, spaces, and growth with n.

    python -m ntk.bench
    python -m ntk.bench --model ./my-checkpoint --examples 16 32 64 --spaces full rows:3
    python -m ntk.bench --device cuda --dtype bfloat16

Times kernels of growing numbers of examples and sets them against the floor: one
forward and c backward passes with no gradient of a parameter. The full kernel is also
set against its bound: the floor and its multiply-adds at the rate of a matrix product.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ntk.notation import parse_space
from ntk.options import add_model_options, positive
from rocoft.console import progress_bar, quiet_libraries
from rocoft.tasks import HUB

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

        from ntk.cost import measure
        from ntk.cost_plots import draw_growth
        from ntk.drawing import to_png, to_svg
        from ntk.storage import write_bytes, write_text
        from rocoft.backbone import load_backbone
        from rocoft.splits import few_shot
        from rocoft.tasks import load_task
        from rocoft.trainer import versions

        task = load_task(options.task, options.data_dir)
        most = max(options.examples)
        fewest = min(Counter(example.label for example in task.train).values())
        shots = -(-most // len(task.labels))
        if shots > fewest:
            raise ValueError(
                f"--examples {most} is more than task {task.name!r} has in equal parts "
                f"of each label, {fewest * len(task.labels)}. Name a larger --task."
            )
        split = few_shot(task, shots, 1, 0)
        backbone = load_backbone(
            options.model,
            split,
            readout=options.readout,
            head=options.head_init,
            max_length=options.max_length,
            device=options.device,
            dtype=getattr(torch, options.dtype),
        )
        device = next(backbone.module.parameters()).device
        costs = []
        with progress_bar(quiet) as progress:
            for n in sorted(set(options.examples)):
                batches, _ = backbone.encode(split.train[:n], options.batch_size)
                on_device = [
                    {k: v.to(device) for k, v in batch.items()} for batch in batches
                ]
                costs.append(
                    measure(
                        backbone.module,
                        on_device,
                        spaces,
                        rounds=options.rounds,
                        progress=progress,
                    )
                )
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
        "task": task.name,
        "rounds": options.rounds,
        "costs": [asdict(cost) for cost in costs],
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
    from rich.table import Table

    costs = record["costs"]
    model = record["model"]
    table = Table(
        title=f"Kernels of {model['name']} on {record['machine']['device']}, "
        f"{model['dtype']}: time over the floor"
    )
    table.add_column("kernel")
    for cost in costs:
        per = cost["positions"] / cost["examples"]
        table.add_column(f"n = {cost['examples']}\n{per:.0f} tokens", justify="right")
    table.add_row("floor (s)", *(f"{cost['seconds']['floor']:.3g}" for cost in costs))
    for name in costs[0]["over_floor"]:
        table.add_row(name, *(f"{cost['over_floor'][name]:.2f}" for cost in costs))
    if costs[0]["over_bound"] is not None:
        table.add_row(
            "full over its bound", *(f"{cost['over_bound']:.2f}" for cost in costs)
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for line in (
        "floor: one forward and c backward passes, no gradient of a parameter; bound: "
        "the floor and the full kernel's multiply-adds at the rate of a matrix product "
        f"({costs[-1]['multiply_adds_per_second']:.2g} a second).",
        f"figures and record: {folder}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
