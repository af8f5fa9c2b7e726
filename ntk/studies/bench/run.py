"""The work of `python -m ntk.bench`: costs, their record, its table and figure."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from ntk.reporting import to_png, to_svg
from ntk.scale import write_bytes, write_text
from ntk.spaces import parse_space
from ntk.studies.bench.cases import Cases
from ntk.studies.bench.figures import draw_growth
from ntk.studies.bench.options import BenchOptions
from ntk.studies.command import say_origin
from rocoft.commands import (
    FolderKind,
    Place,
    printable,
    progress_bar,
    show_json,
    show_lines,
    show_tables,
)
from rocoft.training import versions

RECORD = "bench.json"
FOLDER = FolderKind("ntk.bench", "result", (RECORD, "bench.svg", "bench.png"))
Record = dict[str, Any]


def run(options: BenchOptions, command: str) -> list[str]:
    """Time kernels, and write and print what they cost.

    Args:
        options: The command's options.
        command: The command line, for the record.

    Returns:
        Nothing that failed.

    Raises:
        ValueError: If a case cannot be timed.
    """
    with options.output.claimed("bench", FOLDER) as place:
        return _run(options, command, place)


def _run(options: BenchOptions, command: str, place: Place) -> list[str]:
    spaces = {text: parse_space(text) for text in options.timed.spaces}
    say_origin(options)
    with progress_bar(options.output.silent) as progress:
        cases = Cases(options, spaces, progress)
        backbone, costs = cases.backbone, cases.by_examples()
        growth = cases.growth()
    device = next(backbone.module.parameters()).device
    record: Record = {
        "version": importlib.metadata.version("rocoft-ntk"),
        "command": command,
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
            "dtype": options.model.dtype,
            "readout": backbone.readout,
        },
        "task": options.task.name,
        "rounds": options.timed.rounds,
        "costs": [asdict(cost) for cost in costs],
        "growth": {
            axis: [{"at": at, **asdict(cost)} for at, cost in some.items()]
            for axis, some in growth.items()
        },
    }
    text = json.dumps(record, indent=1) + "\n"
    figure = draw_growth(record)
    with place.filled() as part:
        write_text(part / RECORD, text)
        write_text(part / "bench.svg", to_svg(figure))
        write_bytes(part / "bench.png", to_png(figure))
    if options.output.json:
        show_json(text)
    elif not options.output.quiet:
        _show(record, place.folder)
    return []


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(device.type)


def _show(record: Record, folder: Path) -> None:
    costs = record["costs"]
    model = record["model"]
    heads = [
        f"n = {cost['examples']}\n{cost['positions'] / cost['examples']:.0f} tokens"
        for cost in costs
    ]
    title = (
        f"Kernels of {model['name']} on {record['machine']['device']}, "
        f"{model['dtype']}: time over the floor"
    )
    tables = [_table(title, heads, costs)]
    for axis, some in record["growth"].items():
        title = f"{axis}, n = {some[0]['examples']}: time over the floor"
        tables.append(_table(title, [str(one["at"]) for one in some], some))
    errors = costs[-1]["errors"]
    show_tables(
        tables, [f"{name}: relative error {e:.1e}" for name, e in errors.items()]
    )
    rate = costs[-1]["multiply_adds_per_second"]
    show_lines(
        [
            "floor: one forward and c backward passes, no gradient of a parameter; "
            "bound: the floor and the full kernel's multiply-adds at the rate of a "
            f"matrix product ({rate:.2g} a second).",
            f"figures and record: {folder}",
        ]
    )


def _table(title: str, heads: Sequence[str], costs: Sequence[Record]) -> Table:
    """Return the table of some costs, a column each."""
    table = Table(title=Text(printable(title)))
    table.add_column("kernel")
    for head in heads:
        table.add_column(Text(head), justify="right")
    table.add_row("floor (s)", *(f"{cost['seconds']['floor']:.3g}" for cost in costs))
    for name in costs[0]["over_floor"]:
        table.add_row(
            Text(printable(name)),
            *(f"{cost['over_floor'][name]:.2f}" for cost in costs),
        )
    if costs[0]["over_bound"] is not None:
        table.add_row(
            "full over its bound", *(f"{cost['over_bound']:.2f}" for cost in costs)
        )
    return table
