"""Products in less than float32 against exact ones."""

import json
from functools import partial

import pytest
import torch
from cases import BY_NAME
from commands import exit_code
from torch import nn

from ntk import compare, precision
from ntk.kernel import compute, empirical_ntk
from ntk.memory import compute_as_planned, plan
from ntk.precision import product
from ntk.spaces import Columns, Full, LoRA, Rows

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
@pytest.mark.parametrize("how", ROUNDING)
def test_products_are_off_by_their_rounding(how, shapes, parts, monkeypatch):
    monkeypatch.setattr(precision, "PART_ENTRIES", parts)
    a, b = (noise(*shape) for shape in shapes)
    found = product(a, b, how)
    assert found.dtype is torch.float32
    assert relative_error(found, a.double() @ b.double()) < 2 * ROUNDING[how]


@pytest.mark.skipif(not has_bfloat16_units(), reason="no bfloat16 units")
def test_only_the_product_of_what_is_rounded_off_is_left_out():
    a, b = noise(300, 500), noise(500, 200)
    exact = a.double() @ b.double()
    errors = {how: relative_error(product(a, b, how), exact) for how in ROUNDING}
    for how, error in errors.items():
        assert error > ROUNDING[how] / 4, how


def test_float32_and_other_dtypes_are_multiplied_as_they_are():
    a, b = noise(20, 30), noise(30, 40)
    assert torch.equal(product(a, b), a @ b)
    for how in precision.PRECISIONS:
        assert torch.equal(
            product(a.double(), b.double(), how), a.double() @ b.double()
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
@pytest.mark.parametrize("how", ROUNDING)
def test_kernels_are_off_by_the_rounding_of_their_products(wide, how, reduce):
    model, x = wide
    exact = empirical_ntk(model, x, space=SPACES, reduce=reduce)
    for implementation in ("factors", "jacobian"):
        options = {"implementation": implementation, "precision": how}
        found = empirical_ntk(model, x, space=SPACES, reduce=reduce, **options)
        for name in SPACES:
            assert relative_error(found[name], exact[name]) < 2 * ROUNDING[how]


def test_planned_passes_keep_to_the_precision(wide):
    model, x = wide
    batches = [x[:40], x[40:]]
    how = plan(model, batches, 2, spaces=SPACES)
    found = compute_as_planned(model, batches, how, spaces=SPACES, precision="bf16")
    whole = compute(model, batches, spaces=SPACES, precision="bf16")
    exact = compute(model, batches, spaces=SPACES)
    for name in SPACES:
        assert torch.equal(found.kernels[name], whole.kernels[name])
        # Without the units products may still be made in another order.
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
def test_what_would_not_be_heeded_is_refused(wide, options, message):
    model, x = wide
    with pytest.raises(ValueError, match=message):
        compute(model, x, spaces=SPACES, **options)


def test_a_model_in_float64_is_refused():
    case = BY_NAME["bert"]
    model, inputs = case.build().double(), case.inputs()
    with pytest.raises(ValueError, match="float64"):
        compute(model, inputs, spaces=SPACES, precision="bf16")


def test_the_command_says_what_it_costs(tmp_path, capsys):
    run = partial(exit_code, compare.main, "--shots", 8, "--test-size", 8, "--quiet")
    folder = tmp_path / "out"
    assert run("--precision", "bf16x3", "--output", folder) == 0
    (record,) = (json.loads(f.read_text()) for f in folder.glob("*/*.json"))
    assert record["kernel"]["precision"] == "bf16x3"
    assert run("--precision", "tf32", "--output", folder) == 2
    assert "GPUs" in capsys.readouterr().err
