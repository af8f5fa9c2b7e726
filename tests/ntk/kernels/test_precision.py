"""Products in lower precision than float32, against exact ones."""

import json
from functools import partial

import pytest
import torch
from cases import BY_NAME
from checkpoints import checkpoint
from commands import exit_code
from parts import as_planned, plan_of
from torch import nn

from ntk import compare
from ntk.kernels import precision
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.kernels.precision import product
from ntk.spaces.kinds import Columns, Full, LoRA, Rows

SPACES = {"full": Full(), "rows": Rows(3), "columns": Columns(3), "lora": LoRA(2)}
ROUNDING = {"bf16": 2**-9, "bf16x3": 2**-16}
SHAPES = [
    ((70, 300), (300, 90)),
    ((3, 40, 64), (3, 64, 50)),
    ((2, 3, 9, 5), (2, 3, 5, 8)),
]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def has_bfloat16_units():
    with precision._inner("medium"):
        a = noise(256, 256)
        return relative_error(a @ a, a.double() @ a.double()) > 1e-4


@pytest.mark.parametrize("parts", [2**23, 500])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("setting", ROUNDING)
def test_products_have_the_error_of_their_rounding(setting, shapes, parts, monkeypatch):
    monkeypatch.setattr(precision, "PART_ENTRIES", parts)
    a, b = (noise(*shape) for shape in shapes)
    found = product(a, b, setting)
    assert found.dtype is torch.float32
    assert relative_error(found, a.double() @ b.double()) < 2 * ROUNDING[setting]


@pytest.mark.skipif(not has_bfloat16_units(), reason="no bfloat16 units")
def test_only_the_product_of_the_low_parts_is_left_out():
    a, b = noise(300, 500), noise(500, 200)
    exact = a.double() @ b.double()
    errors = {
        setting: relative_error(product(a, b, setting), exact) for setting in ROUNDING
    }
    for setting, error in errors.items():
        assert error > ROUNDING[setting] / 4, setting


def test_float32_and_other_dtypes_are_multiplied_as_they_are():
    a, b = noise(20, 30), noise(30, 40)
    assert torch.equal(product(a, b), a @ b)
    for setting in precision.PRECISIONS:
        assert torch.equal(
            product(a.double(), b.double(), setting), a.double() @ b.double()
        )
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(scope="module")
def wide():
    """A model large enough for every kind of product, and examples of sequences."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(5 * 64, 2))
    return model, noise(80, 5, 64)


@pytest.mark.parametrize("reduce", ["full", "trace", "margin"])
@pytest.mark.parametrize("setting", ROUNDING)
def test_kernels_have_the_error_of_their_products(wide, setting, reduce):
    model, x = wide
    exact = empirical_ntk(model, x, space=SPACES, reduce=reduce)
    for implementation in ("factors", "jacobian"):
        options = {"implementation": implementation, "precision": setting}
        found = empirical_ntk(model, x, space=SPACES, reduce=reduce, **options)
        for name in SPACES:
            assert relative_error(found[name], exact[name]) < 2 * ROUNDING[setting]


def test_planned_passes_use_the_precision(wide):
    model, x = wide
    batches = [x[:40], x[40:]]
    plan = plan_of(model, batches, 2, spaces=SPACES)
    found = as_planned(model, batches, plan, spaces=SPACES, precision="bf16")
    whole = compute(
        model, batches, spaces=SPACES, options=KernelOptions(precision="bf16")
    )
    exact = compute(model, batches, spaces=SPACES)
    for name in SPACES:
        assert torch.equal(found.kernels[name], whole.kernels[name])
        # Without such units products may still be summed in another order.
        error = relative_error(found.kernels[name], exact.kernels[name])
        assert (error > 1e-5) is has_bfloat16_units()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "must be one of"),
        ({"precision": "tf32"}, "GPUs"),
        ({"precision": "bf16", "implementation": "jvp"}, "never forms"),
    ],
)
def test_precisions_without_effect_are_refused(wide, options, message):
    model, x = wide
    with pytest.raises(ValueError, match=message):
        compute(model, x, spaces=SPACES, options=KernelOptions(**options))


def test_a_model_in_float64_is_refused():
    case = BY_NAME["bert"]
    model, inputs = case.build().double(), case.inputs()
    with pytest.raises(ValueError, match="float64"):
        compute(model, inputs, spaces=SPACES, options=KernelOptions(precision="bf16"))


def test_the_command_reports_the_error(tmp_path, capsys):
    model = checkpoint(tmp_path / "tiny")[0]
    size = ("--model", model, "--shots", 4, "--test-size", 8, "--rows", 1)
    run = partial(exit_code, compare.main, *size, "--quiet")
    folder = tmp_path / "out"
    assert run("--precision", "bf16x3", "--output", folder) == 0
    (record,) = (json.loads(f.read_text()) for f in folder.glob("*/report.json"))
    assert record["kernel"]["precision"] == "bf16x3"
    assert run("--precision", "tf32", "--output", folder) == 2
    assert "GPUs" in capsys.readouterr().err
