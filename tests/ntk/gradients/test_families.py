"""Every implementation against every other on every family of models.

`dense` is the judge of the whole kernel, `implementation="jacobian"` of every space
and of every single parameter.
"""

from fnmatch import fnmatchcase

import dense
import pytest
import torch
from cases import FAMILIES, TRANSFORMERS
from dense import assert_close
from torch import nn
from transformers.pytorch_utils import Conv1D

from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows

SPACES = {
    "full": Full(),
    "rows": Rows(2),
    "last rows": Rows(1, strategy="last"),
    "columns": Columns(2),
    "random rows": Rows(2, strategy="random", seed=1, rescale=True),
    "random columns": Columns(2, strategy="random", seed=1, rescale=True),
    "rows+columns": Rows(1, strategy="random") + Columns(2, strategy="max"),
    "rows+columns+rescaled": (
        Rows(2, strategy="random", rescale=True) + Columns(1, rescale=True)
    ),
    "lora": LoRA(2),
    "rescaled lora": LoRA(2, seed=3, alpha=4, rescale=True),
    "two+lora": LoRA(1) + LoRA(2, seed=1),
    "rows+lora": Rows(1) + LoRA(2),
    "bias": Bias(),
    "columns+bias": Columns(1) + Bias(),
    "norm": Norm(),
    "embeddings": Embeddings(),
    "head": Head(),
    "norm+embeddings+head": Norm() + Embeddings() + Head(),
}


class Computed:
    """A family, built, and its kernels by factors and by the definition."""

    def __init__(self, family):
        self.family = family
        self.model = family.build()
        self.inputs = family.inputs()
        self.spaces = {
            name: space
            for name, space in SPACES.items()
            if not any(word in name.split("+") for word in family.without)
        }
        self.trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        single = {name: Full().at(name) for name in self.trained}
        self.factors = self.compute(self.spaces | single)
        self.jacobian = self.compute(self.spaces | single, implementation="jacobian")
        self.gradients = dense.gradients(self.model, self.inputs, family.outputs)

    def compute(self, spaces, other=None, **options):
        return compute(
            self.model,
            self.inputs,
            other,
            spaces=spaces,
            options=KernelOptions(outputs=self.family.outputs, **options),
        )


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def computed(request):
    return Computed(request.param)


def test_every_space_agrees_with_the_definition(computed):
    for name in computed.spaces:
        expected = computed.jacobian.kernels[name]
        assert expected.norm() > 0, name
        assert_close(computed.factors.kernels[name], expected, of=name)


def test_every_parameter_agrees_with_the_definition(computed):
    whole = float(computed.jacobian.kernels["full"].norm())
    for name in computed.trained:
        expected = computed.jacobian.kernels[name]
        # A gradient that is zero in exact arithmetic (a key's bias) is rounding.
        rounding = float(expected.norm()) < 1e-12 * whole
        floor = 1e-12 * whole if rounding else 0.0
        assert_close(computed.factors.kernels[name], expected, floor=floor, of=name)


def test_full_kernel_agrees_with_plain_autograd(computed):
    trained = [computed.gradients[name] for name in computed.trained]
    assert_close(computed.factors.kernels["full"], dense.kernel(trained))


@pytest.mark.parametrize("c", [2, 3, 5])
def test_contrasts_agree_with_plain_autograd(computed, c):
    """c outputs are mixed from the family's own: their gradients are mixed alike."""
    generator = torch.Generator().manual_seed(c)
    own = computed.gradients[computed.trained[0]].shape[1]
    mix = torch.randn(own, c, dtype=torch.float64, generator=generator)
    read = computed.family.outputs or dense.logits
    trained = [
        torch.einsum("nk...,kc->nc...", computed.gradients[name], mix)
        for name in computed.trained
    ]
    outputs = lambda answer: read(answer) @ mix.to(read(answer))
    for kind, sign in (("sgd", lambda g: g), ("signgd", torch.sign)):
        options = KernelOptions(outputs=outputs, reduce="contrast", kind=kind)
        result = compute(
            computed.model, computed.inputs, spaces={"": Full()}, options=options
        )
        if kind == "sgd" or c == 2:
            seen = [dense.contrasted(g) for g in trained]
        else:
            seen = [g - g.mean(dim=1, keepdim=True) for g in trained]
        if kind == "signgd":
            # Signs of gradients that are zero in exact arithmetic are rounding.
            largest = max(float(g.abs().max()) for g in seen)
            small = [(g != 0) & (g.abs() < 1e-9 * largest) for g in seen]
            if any(bool(entries.any()) for entries in small):
                continue
        expected = dense.kernel(seen, left_of=sign, right_of=sign)
        assert_close(result.kernels[""], expected, of=kind)


def test_bias_kernel_agrees_with_plain_autograd(computed):
    if "bias" not in computed.spaces:
        pytest.skip("has no biases")
    biases = [
        gradient
        for name, gradient in computed.gradients.items()
        if name.split(".")[-1].endswith("bias") and gradient.ndim == 3
    ]
    assert_close(computed.factors.kernels["bias"], dense.kernel(biases))


def test_rows_and_columns_agree_with_plain_autograd(computed):
    if computed.family not in TRANSFORMERS or computed.family.fused:
        pytest.skip("is tested in test_spaces")
    rows, columns = [], []
    owners = dict(computed.model.named_modules())
    for name, g in computed.gradients.items():
        path, _, kind = name.rpartition(".")
        in_block = any(part.isdigit() for part in path.split("."))
        if kind != "weight" or not in_block:
            continue
        if isinstance(owners[path], nn.Linear):
            rows.append(g[..., :2, :])
            columns.append(g[..., :2])
        elif isinstance(owners[path], Conv1D):
            rows.append(g[..., :2])
            columns.append(g[..., :2, :])
    assert_close(computed.factors.kernels["rows"], dense.kernel(rows))
    assert_close(computed.factors.kernels["columns"], dense.kernel(columns))


def test_parameters_are_counted(computed):
    parameters = dict(computed.model.named_parameters())
    sizes = computed.factors.sizes
    assert sizes["full"] == sum(parameters[n].numel() for n in computed.trained)
    for name in computed.trained:
        assert sizes[name] == parameters[name].numel(), name
    for name, space in computed.spaces.items():
        maps = space.maps(computed.model)
        shapes = {n: parameters[n].shape for n in maps}
        coordinates = sum(m.size(shapes[n]) for n, ms in maps.items() for m in ms)
        assert sizes[name] == coordinates, name


def test_traces_by_parameter_add_up_to_the_kernel(computed):
    for name in computed.spaces:
        total = sum(computed.factors.traces[name].values())
        kernel = computed.factors.kernels[name]
        trace = torch.einsum("nncc->", kernel)
        assert_close(torch.tensor(total, dtype=trace.dtype), trace, of=name)


def test_kernels_add_over_parameters(computed):
    parts = [computed.factors.kernels[name] for name in computed.trained]
    assert_close(sum(parts), computed.factors.kernels["full"])


def test_parameters_are_served_as_expected(computed):
    """Catch a silent fallback to a slow implementation."""
    slow = computed.family.slow
    for name, service in computed.factors.services.items():
        ways = {way for glob, way in slow.items() if fnmatchcase(name, glob)}
        assert {service.value} == (ways or {"batch"}), name
    names = list(computed.factors.services)
    for glob in slow:
        assert any(fnmatchcase(name, glob) for name in names), glob


PRODUCTS = ("full", "rows+columns+rescaled", "lora", "embeddings")
# An encoder, fused and stored by inputs, an encoder with a decoder, a decoder without
# biases, shared layers, convolutions. The others take two thirds of this file's time.
ALWAYS = {"bert", "gpt2", "t5", "llama", "albert", "cnn"}


@pytest.mark.parametrize(
    "computed",
    [
        pytest.param(f, marks=() if f.name in ALWAYS else pytest.mark.slow)
        for f in FAMILIES
    ],
    indirect=True,
    ids=str,
)
def test_jacobian_vector_products_agree(computed):
    spaces = {n: s for n, s in computed.spaces.items() if n in PRODUCTS}
    # A few parameters, spread over the model.
    spaces |= {n: Full().at(n) for n in computed.trained[:: len(computed.trained) // 2]}
    second = dense.singles(computed.inputs)[1]
    result = computed.compute(spaces, other=second, implementation="jvp")
    whole = float(computed.jacobian.kernels["full"].norm())
    for name in spaces:
        expected = computed.jacobian.kernels[name]
        rounding = float(expected.norm()) < 1e-12 * whole
        floor = 1e-12 * whole if rounding else 0.0
        assert_close(result.kernels[name], expected[:, 1:2], floor=floor, of=name)
