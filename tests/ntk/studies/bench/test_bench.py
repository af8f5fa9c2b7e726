"""The benchmark command: what it times, its table, its files, its errors."""

import json
from functools import partial

import pytest
import torch
from cases import BY_NAME
from checkpoints import checkpoint
from commands import exit_code

from ntk import bench
from ntk.gradients.function import NetworkFunction
from ntk.scale.machine import multiply_adds_per_second, run_floor, seconds
from ntk.spaces.kinds import Full, Rows
from ntk.studies.bench.cases import resized
from ntk.studies.bench.cost import FLOOR, TOGETHER, measure

run = partial(exit_code, bench.main)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("body"))[0]


def test_the_floor_goes_to_every_layer_and_no_parameter():
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs(3)
    model.train()
    reached, parameters = [], dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_full_backward_hook(
                lambda module, gradients, outputs, name=name: reached.append(name)
            )
    run_floor(NetworkFunction(model), [inputs, inputs])
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    outputs = model(**inputs).logits.shape[1]
    # The first layers' inputs need no gradient; all others' backward passes are run.
    assert set(layers) >= set(reached)
    assert len(reached) >= 2 * outputs * (len(layers) - 3)
    assert all(p.grad is None for p in parameters.values())
    assert {name: p.requires_grad for name, p in parameters.items()} == flags
    assert model.training


def test_a_cost():
    model, inputs = BY_NAME["llama"].build(), BY_NAME["llama"].inputs(4)
    told = []
    cost = measure(
        model,
        [inputs],
        {"full": Full(), "rows": Rows(1)},
        rounds=2,
        progress=lambda *what: told.append(what),
    )
    assert (cost.examples, cost.positions) == (4, inputs["input_ids"].numel())
    assert list(cost.seconds) == [FLOOR, "full", "rows", TOGETHER]
    assert set(cost.over_floor) == {"full", "rows", TOGETHER}
    assert min(cost.seconds.values()) > 0
    assert cost.operations > 0
    bound = cost.seconds[FLOOR] + cost.operations / cost.multiply_adds_per_second
    assert cost.over_bound == pytest.approx(cost.seconds["full"] / bound, rel=0.5)
    assert told == [("rounds", i, 3) for i in (1, 2, 3)]


def test_yardsticks_are_positive():
    assert seconds(lambda: sum(range(1000)), CPU) > 0
    assert multiply_adds_per_second(CPU) > 1e6


def test_the_command(folder, tmp_path, capsys):
    size = ["--examples", "3", "2", "--rounds", "1", "--spaces", "full", "rows:1"]
    assert run("--model", folder, *size, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "full over its bound" in printed
    assert {p.name for p in (tmp_path / "bench").iterdir()} == {
        *("bench.json", "bench.svg", "bench.png", ".written-by.json")
    }
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert [cost["examples"] for cost in record["costs"]] == [2, 3]
    assert record["command"].startswith("python -m ntk.bench --model")
    assert "rows:1" in (tmp_path / "bench" / "bench.svg").read_text()


def test_the_record_alone(folder, tmp_path, capsys):
    size = ["--examples", "2", "--rounds", "1", "--spaces", "rows:1"]
    assert run("--model", folder, *size, "--json", "--output", tmp_path) == 0
    (cost,) = json.loads(capsys.readouterr().out)["costs"]
    assert cost["over_bound"] is None
    assert set(cost["seconds"]) == {"floor", "rows:1"}


def test_an_earlier_result_is_replaced_if_asked(folder, tmp_path, capsys):
    size = ["--examples", "2", "--rounds", "1", "--spaces", "rows:1", "--quiet"]
    asked = ["--model", folder, *size, "--memory", "4GiB", "--output", tmp_path]
    assert run(*asked) == 0
    assert run(*asked) == 2
    assert "holds an earlier result" in capsys.readouterr().err
    assert run(*asked, "--overwrite") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").touch()
    assert run(*asked, "--overwrite", "--name", "mine") == 2
    assert "is no earlier result" in capsys.readouterr().err
    assert (tmp_path / "mine" / "text").exists()


@pytest.mark.slow
def test_what_else_grows(folder, tmp_path, capsys):
    size = ["--examples", "2", "4", "--rounds", "1", "--spaces", "full", "rows:1"]
    grown = ["--tokens", "9", "5", "--labels", "3", "--more-models", folder]
    more = [*grown, "--precisions", "bf16x3", "bf16", "--output", tmp_path]
    assert run("--model", folder, *size, *more) == 0
    printed = capsys.readouterr().out
    assert "tokens, n = 2" in printed
    assert "full, bf16x3: relative error" in printed
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    growth = record["growth"]
    assert [(one["at"], one["positions"]) for one in growth["tokens"]] == [
        (5, 10),
        (9, 18),
    ]
    assert [(one["at"], one["outputs"]) for one in growth["outputs"]] == [(3, 3)]
    assert [one["at"] for one in growth["models"]] == [str(folder)]
    for cost in record["costs"]:
        # A processor without bfloat16 units does not round to them.
        errors = [cost["errors"][f"full, {p}"] for p in ("bf16", "bf16x3")]
        assert 0 <= min(errors) <= max(errors) < 0.05
    text = (tmp_path / "bench" / "bench.svg").read_text()
    assert "tokens, 2 examples" in text
    assert "outputs, 2 examples" in text


@pytest.mark.parametrize("at", [[2, 1], [[2, 2], [1, 1]]])
def test_examples_are_cut_and_repeated(at):
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "position": torch.tensor(at),
    }
    longer, shorter = resized(batch, 5), resized(batch, 2)
    assert longer["input_ids"].tolist() == [[5, 6, 7, 5, 6], [8, 9, 0, 8, 9]]
    assert longer["position"].tolist() == at
    assert shorter["input_ids"].tolist() == [[5, 6], [8, 9]]
    assert (shorter["position"] == 1).all()
    assert shorter["position"].shape == batch["position"].shape
    for found in (longer, shorter):
        assert found["attention_mask"].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 100000", "positions that"),
        ("--more-models /nowhere", "could not be loaded"),
        ("--spaces rowz:3", "rowz"),
        ("--task nowhere --data-dir /nowhere", "nowhere"),
        ("--model /nowhere", "could not be loaded"),
        ("--examples 100000", "Name a larger --task"),
    ],
)
def test_errors_say_the_way_out(arguments, message, tmp_path, capsys):
    assert run(*arguments.split(), "--output", tmp_path) == 2
    assert message in capsys.readouterr().err
