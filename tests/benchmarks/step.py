"""What a training step costs by each method: seconds and saved activations.

    python -m tests.benchmarks.step            # a few minutes
    python -m tests.benchmarks.step --quick    # does it run?
    python -m tests.benchmarks.step --draw     # the figure again, from the JSON

A step is forward, loss, backward and AdamW (fused, as transformers' Trainer takes it by
default) on MiniLM-L6, dropout off. All methods are measured in one process in rounds:
each runs once in every round, in an order shuffled anew, after two runs that are not
counted. A ratio is taken within a round and its median over the rounds reported.

The *floor* is a step that trains nothing: forward, and backward to the inputs of every
layer, no gradient of a weight. Saved activations are the distinct storages that
autograd keeps between forward and backward, parameters and buffers excluded.

What must hold, by medians: rows, columns and their automatic choice within `LIMIT` of
the floor and below LoRA of rank 1; the activations of columns no more than the floor's.
"""

import argparse
import copy
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ntk.studies.bench.cost import in_rounds
from rocoft.models.architecture import Architecture
from rocoft.training.methods import apply_method, parse_method, trained_parameters
from tests.benchmarks import setting
from tests.benchmarks.cost import ratio, summary
from tests.benchmarks.setting import Batch
from tests.benchmarks.table import failed, rounded, write

LIMIT = 1.10
OURS = ("rows 3", "columns 3", "auto 3")
METHODS = {
    "full": "full",
    "rows 3": "rows:3",
    "columns 3": "columns:3",
    "auto 3": "auto:3",
    "LoRA 1": "lora:1",
    "LoRA 8": "lora:8",
    "BitFit": "bitfit",
    "masked gradients, rows 3": "masked rows:3",
}
CONCATENATED = "concatenated, rows 3"
ROWS = 3


class Concatenated(nn.Module):
    """A linear layer whose weight is put together of trained and frozen rows each time.

    As the paper's own code trains rows: the gradient is that of the whole weight, and
    autograd keeps the copy.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.trained = nn.Parameter(weight[:ROWS].clone())
        self.register_buffer("frozen", weight[ROWS:].clone())
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.trained, self.frozen]), self.bias)


def concatenated(model: nn.Module) -> nn.Module:
    """Replace the linear layers of the blocks; train those rows and the head."""
    architecture = Architecture(model)
    for name, parameter in architecture.parameters.items():
        parameter.requires_grad_(name in architecture.head)
    for weight in architecture.targets.values():
        model.set_submodule(
            weight.module, Concatenated(model.get_submodule(weight.module))
        )
    return model


def floor(model: nn.Module) -> nn.Module:
    """Freeze everything; gradients go back to the embeddings' output all the same."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_()
    )
    return model


def prepared(model: nn.Module) -> dict[str, nn.Module]:
    """Return a copy of the model for each method."""
    models = {"floor": floor(copy.deepcopy(model))}
    for name, spec in METHODS.items():
        method = parse_method(spec)
        models[name] = apply_method(copy.deepcopy(model), method, train_head=True)
    models[CONCATENATED] = concatenated(copy.deepcopy(model))
    return {name: made.eval() for name, made in models.items()}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.arange(len(batch["input_ids"])) % setting.OUTPUTS
    return F.cross_entropy(model(**batch).logits, labels)


def step(model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return one step of training."""
    trained = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def run() -> None:
        loss(model, batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Return the bytes that autograd keeps from forward to backward."""
    own = {
        t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
    }
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model, batch)
    # The tensors live until here, so no two of them had the same address.
    del value
    return sum(found.values())


def tokens(examples: int, length: int) -> Batch:
    """Return texts of random words without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 29000, (examples, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(examples: int, length: int, rounds: int) -> dict:
    """Return the record."""
    batch = tokens(examples, length)
    models = prepared(setting.load_model())
    saved = {name: saved_bytes(model, batch) for name, model in models.items()}
    cases = {name: step(model, batch) for name, model in models.items()}
    for case in [*cases.values()] * 2:
        case()
    busy = setting.BusyElsewhere()
    times = in_rounds(cases, rounds)
    elsewhere = busy.cores()
    base = times["floor"]
    return {
        "command": "python -m tests.benchmarks.step " + " ".join(sys.argv[1:]),
        "environment": {**setting.environment(), "width": length},
        "examples": examples,
        "rounds": rounds,
        "busy_cores_elsewhere": elsewhere,
        "methods": {
            name: {
                "trained_parameters": sum(
                    p.numel() for p in trained_parameters(models[name]).values()
                ),
                "saved_bytes": saved[name],
                "seconds": summary(t),
                "ratio_to_floor": ratio(t, base, LIMIT if name in OURS else None),
                "ratio_to_full": ratio(t, times["full"]),
                "ratio_to_lora_1": ratio(
                    t, times["LoRA 1"], 1.0 if name in OURS else None
                ),
                "all_seconds": t,
            }
            for name, t in times.items()
        },
        "saved_of_columns": {
            "to_floor": saved["columns 3"] / saved["floor"],
            "limit": 1.0,
            "holds": saved["columns 3"] <= saved["floor"],
        },
    }


def show(record: dict) -> None:
    """Print the table."""
    print(
        f"{record['examples']} x {record['environment']['width']} tokens, "
        f"{record['rounds']} rounds, {record['busy_cores_elsewhere']:.2f} cores busy "
        f"elsewhere\n{'':26}{'parameters':>12}{'saved MB':>10}{'s':>8}{'/ floor':>9}"
        f"{'/ full':>8}{'/ LoRA 1':>10}"
    )
    for name, row in record["methods"].items():
        ratios = (row[f"ratio_to_{k}"]["median"] for k in ("floor", "full", "lora_1"))
        print(
            f"{name:26}{row['trained_parameters']:12,}{row['saved_bytes'] / 1e6:10.1f}"
            f"{row['seconds']['median']:8.3f}"
            + "".join(f"{r:{w}.2f}" for r, w in zip(ratios, (9, 8, 10), strict=True))
        )
    print("failed: " + ("; ".join(failed(record, "")) or "none"))


def draw(record: Mapping) -> str:
    """Return the figure as SVG, the same text for the same record."""
    style = {"svg.hashsalt": "step", "font.size": 9, "axes.spines.top": False}
    rows = dict(
        sorted(
            record["methods"].items(),
            key=lambda item: -item[1]["ratio_to_floor"]["median"],
        )
    )
    with mpl.rc_context(style | {"axes.spines.right": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.6), layout="constrained", sharey=True
        )
        colours = ["tab:blue" if name in OURS else "0.7" for name in rows]
        ratios = [row["ratio_to_floor"] for row in rows.values()]
        middle = [r["median"] for r in ratios]
        spread = [
            [r["median"] - r["min"] for r in ratios],
            [r["max"] - r["median"] for r in ratios],
        ]
        left.barh(
            list(rows), middle, xerr=spread, color=colours, error_kw={"elinewidth": 0.8}
        )
        left.axvline(1, color="black", linewidth=0.8)
        left.set_xlabel("time of a step, in floors")
        megabytes = [row["saved_bytes"] / 1e6 for row in rows.values()]
        right.barh(list(rows), megabytes, color=colours)
        right.axvline(
            record["methods"]["floor"]["saved_bytes"] / 1e6,
            color="black",
            linewidth=0.8,
        )
        right.set_xlabel("saved activations (MB)")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="rounds, at least 5")
    parser.add_argument("--quick", action="store_true", help="small, writes no file")
    parser.add_argument("--output", type=Path, default=Path("figures/step.json"))
    parser.add_argument("--draw", action="store_true", help="draw, measure nothing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    if args.repeats < 5 and not args.quick:
        parser.error(f"--repeats {args.repeats} must be at least 5")
    if args.quick:
        record = measure(4, 32, 2)
        show(record)
        draw(record)
        return
    if not args.draw:
        record = measure(args.examples, args.tokens, args.repeats)
        show(record)
        write(args.output, json.dumps(rounded(record), indent=1) + "\n")
    write(args.output.with_suffix(".svg"), draw(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
