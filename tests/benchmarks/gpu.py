"""Kernels of large models on a GPU, or what they would cost.

    python -m tests.benchmarks.gpu                # on a GPU: writes figures/gpu.json
    python -m tests.benchmarks.gpu --small        # the same on a CPU, tiny models
    python -m tests.benchmarks.gpu --estimate     # operations of the large ones

Models have the shapes of well-known ones and random weights: times do not depend on the
values. Each kernel is timed against the floor (one forward and c backward passes, no
gradient of a parameter), the full kernel also against its bound (the floor, and its
multiply-adds at the rate of a float32 matrix product, see `ntk.scale.machine`). Goals:
rows, columns and LoRA within `LEAN_LIMIT` of the floor, the full kernel within
`FULL_LIMIT` of its bound.

An estimate counts multiply-adds from shapes alone: those of the passes, and those of
contracting the full kernel by the cheaper route of each weight. Their ratio says what
share of the work contraction will be on any machine.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, RobertaConfig

from ntk.kernels.contraction import Operations
from ntk.scale.machine import multiply_adds_per_second
from ntk.spaces.notation import parse_space
from ntk.studies.bench.cost import Cost, measure
from rocoft.models.architecture import Architecture

LEAN_LIMIT = 1.1
FULL_LIMIT = 1.5
OUTPUTS = 2
LEAN = ("rows:3", "columns:3", "lora:8")


@dataclass(frozen=True)
class Case:
    """A model and how many examples of what length its kernels are computed of."""

    config: PretrainedConfig
    dtype: str
    examples: int
    tokens: int
    batch_size: int
    spaces: tuple[str, ...]

    def model(self, device: str) -> nn.Module:
        """Return the model with random weights; on "meta" without any."""
        kind = transformers.AutoModelForSequenceClassification
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind.from_config(self.config, dtype=getattr(torch, self.dtype))
        return model.eval()

    def batches(self, device: str) -> list[dict[str, Tensor]]:
        """Return examples of random tokens, none padded."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.examples, self.tokens)
        high = self.config.vocab_size
        tokens = torch.randint(5, high, shape, generator=generator).to(device)
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part)}
            for part in tokens.split(self.batch_size)
        ]


def roberta(examples: int, **smaller: int) -> Case:
    """Return RoBERTa-base, or less of it, on sentences of 32 tokens."""
    shape = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    config = RobertaConfig(**shape, pad_token_id=1, num_labels=OUTPUTS, **smaller)
    return Case(config, "float32", examples, 32, 32, ("full", *LEAN))


def llama(examples: int, **smaller: int) -> Case:
    """Return LLaMA-2-7B, or less of it, on sentences of 64 tokens."""
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"intermediate_size": 11008, "vocab_size": 32000} | smaller
    config = LlamaConfig(**shape, pad_token_id=0, num_labels=OUTPUTS)
    return Case(config, "bfloat16", examples, 64, 16, ("full", *LEAN))


LARGE = {"RoBERTa-base": roberta(1024), "LLaMA-2-7B": llama(256)}
SMALL = {
    "RoBERTa, 2 layers of 128": roberta(
        16,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
    ),
    "LLaMA, 2 layers of 128": llama(
        8,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=344,
        vocab_size=1000,
    ),
}


@dataclass(frozen=True)
class Estimate:
    """Multiply-adds counted from shapes.

    Attributes:
        parameters: Of the model.
        passes: Of one forward and c backward passes through all linear layers.
        contraction: Of the full kernel's linear weights.
        by_positions: Of how many weights positions are compared, of all.
        share: Of contraction in both.
    """

    parameters: int
    passes: float
    contraction: float
    by_positions: tuple[int, int]
    share: float

    @classmethod
    def of(cls, case: Case) -> "Estimate":
        """Count the operations of a case."""
        architecture = Architecture(case.model("meta"))
        n, positions = case.examples, case.examples * case.tokens
        weights = [
            (of.outputs, of.inputs)
            for name, of in architecture.linear_weights.items()
            if name not in set(architecture.head)
        ]
        counted = [
            Operations.count(
                shape, OUTPUTS, (n, n), (positions, positions), symmetric=True
            )
            for shape in weights
        ]
        passes = (1 + OUTPUTS) * positions * sum(a * b for a, b in weights)
        contraction = sum(each.least for each in counted)
        by_positions = sum(each.positions_are_cheaper for each in counted)
        return cls(
            sum(p.numel() for p in architecture.parameters.values()),
            passes,
            contraction,
            (by_positions, len(weights)),
            contraction / (contraction + passes),
        )


def run(case: Case, device: str, rounds: int) -> Cost:
    """Time the kernels of a case."""
    spaces = {text: parse_space(text) for text in case.spaces}
    return measure(case.model(device), case.batches(device), spaces, rounds=rounds)


def record(name: str, case: Case, device: str, rounds: int) -> Mapping[str, Any]:
    """Return what a case costs, and what share of it are the passes."""
    cost = run(case, device, rounds)
    dtype = getattr(torch, case.dtype)
    rates = {
        "float32": cost.multiply_adds_per_second,
        case.dtype: multiply_adds_per_second(torch.device(device), dtype),
    }
    counted = Estimate.of(case)
    full = cost.seconds["full"]
    return {
        "model": name,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "cost": asdict(cost),
        "rates": rates,
        "counted": asdict(counted),
        "share_of_passes_in_full": cost.passes["full"] * cost.seconds["floor"] / full,
        "multiply_adds_per_second_of_full": (counted.passes + counted.contraction)
        / full,
    }


def show(found: Mapping[str, Any]) -> None:
    """Print one record."""
    cost = found["cost"]
    print(
        f"{found['model']}, {found['dtype']}: n = {cost['examples']}, "
        f"{found['tokens']} tokens; floor {cost['seconds']['floor']:.3g} s"
    )
    for name, ratio in cost["over_floor"].items():
        limit = f" (goal {LEAN_LIMIT})" if name in LEAN else ""
        passes = cost["passes"][name]
        print(f"  {name}: {ratio:.2f} x the floor, {passes} passes{limit}")
    print(f"  full: {cost['over_bound']:.2f} x its bound (goal {FULL_LIMIT})")
    rate = found["multiply_adds_per_second_of_full"] / found["rates"]["float32"]
    passes = found["share_of_passes_in_full"]
    print(
        f"  full: {100 * passes:.0f} % of the time in passes, {100 * rate:.0f} % of "
        "the rate of a float32 product"
    )


def show_estimate(name: str, case: Case, rate: float) -> None:
    """Print what a case would cost."""
    found = Estimate.of(case)
    some, of = found.by_positions
    print(
        f"ESTIMATE for {name} ({found.parameters / 1e9:.3g}e9 parameters), n = "
        f"{case.examples}, {case.tokens} tokens, c = {OUTPUTS}: passes "
        f"{found.passes:.2g} multiply-adds, contraction of the full kernel "
        f"{found.contraction:.2g} ({100 * found.share:.0f} % of both; {some} of {of} "
        f"weights by positions); at {rate:.2g} a second {found.passes / rate:.3g} s "
        f"and {found.contraction / rate:.3g} s"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--small", action="store_true", help="tiny models, on a CPU too")
    add("--estimate", action="store_true", help="count operations, run nothing")
    add("--rate", type=float, help="multiply-adds a second (default: measured here)")
    add("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    add("--output", type=Path, default=Path("figures/gpu.json"), help="of a GPU run")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.estimate:
        rate = options.rate or multiply_adds_per_second(torch.device(device))
        for name, case in LARGE.items():
            show_estimate(name, case, rate)
        return
    if device == "cpu" and not options.small:
        raise SystemExit("torch finds no GPU here. Use --small, or --estimate.")
    cases = SMALL if options.small else LARGE
    found = [record(name, case, device, options.rounds) for name, case in cases.items()]
    for each in found:
        show(each)
    if not options.small:
        name = torch.cuda.get_device_name()
        text = json.dumps({"device": name, "cases": found}, indent=1)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
