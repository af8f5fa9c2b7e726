"""Models in half precision: errors of the size of their rounding, and reported."""

import copy
import json
from functools import partial

import pytest
import torch
from cases import BY_NAME
from checkpoints import STORIES, needs_stories
from commands import exit_code

from ntk import compare
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.kernels.spot_check import check_entries, reference_model
from ntk.spaces.kinds import Columns, Full, LoRA, Norm, Rows

SPACES = {
    "full": Full(),
    "rows": Rows(3),
    "columns": Columns(3),
    "lora": LoRA(2),
    "norm": Norm(),
}
CAUSAL = ["llama", "mistral", "bloom", "qwen2", "gemma", "gpt-neox"]
HALF = [torch.bfloat16, torch.float16]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=CAUSAL)
def model(request):
    case = BY_NAME[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return case.build(), case.inputs(6)


@pytest.mark.parametrize("dtype", HALF)
def test_errors_have_the_size_of_one_rounding(model, dtype):
    exact, inputs = model
    expected = empirical_ntk(exact, inputs, space=SPACES)
    found = empirical_ntk(copy.deepcopy(exact).to(dtype), inputs, space=SPACES)
    rounding = torch.finfo(dtype).eps / 2
    for name in SPACES:
        assert found[name].dtype is torch.float64
        error = relative_error(found[name], expected[name])
        assert rounding / 8 < error < 4 * rounding, (name, error / rounding)


class Summed(torch.nn.Module):
    """Adds up the outputs of a layer over positions."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        self.head = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.head.weight)

    def forward(self, x):
        return self.head(self.layer(x)).float().sum(dim=1)


def test_sums_are_in_float32():
    """A sum of two thousand ones would stop at 256 in bfloat16."""
    inputs = torch.ones(2, 2000, 2, dtype=torch.bfloat16)
    spaces = {"rows": Rows(1), "columns": Columns(1), "full": Full()}
    spaces = {name: space.at("layer") for name, space in spaces.items()}
    found = empirical_ntk(Summed().bfloat16(), inputs, space=spaces)
    assert found["rows"].flatten().tolist() == [2 * 2000.0**2] * 4
    assert found["full"].flatten().tolist() == [2 * 2000.0**2] * 4
    assert found["columns"].flatten().tolist() == [2000.0**2] * 4


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_the_spot_check_is_in_float32(dtype):
    case = BY_NAME["llama"]
    low, inputs = case.build().to(dtype), case.inputs(4)
    batches = [inputs]
    kernels = compute(low, batches, spaces=SPACES).kernels
    reference = reference_model(low)
    assert (reference is low) == (dtype is torch.float32)
    assert {p.dtype for p in reference.parameters()} == {torch.float32}
    found = check_entries(
        reference, batches, SPACES, kernels, options=KernelOptions(), seed=0
    )
    for entry in found.values():
        assert entry["precision"] == "float32"
        assert entry["relative_error"] < 8 * torch.finfo(dtype).eps
        if dtype is not torch.float32:
            assert entry["relative_error"] > torch.finfo(dtype).eps / 100
    assert reference_model(low, room=10) is low


@needs_stories
def test_a_causal_model_from_a_folder(tmp_path, capsys):
    run = partial(exit_code, compare.main)
    prompt = ["--template", "{a} She was {mask}", "--label-words", "big", "happy"]
    size = ["--shots", "2", "--test-size", "3", "--rows", "1", "--max-length", "32"]
    half = ["--dtype", "bfloat16", "--output", tmp_path, "--name", "half"]
    assert run("--model", STORIES, *prompt, *size, *half) == 0
    assert "in float32 (the model is in bfloat16)" in " ".join(
        capsys.readouterr().out.split()
    )
    record = json.loads((tmp_path / "half" / "report.json").read_text())
    assert record["model"]["dtype"] == "bfloat16"
    errors = [s["certificate"]["relative_error"] for s in record["spaces"]]
    assert 1e-4 < max(errors) < 0.05
