"""Gram matrices of factored gradients against explicit gradients."""

import dense
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import Lambda
from covering import pairs
from dense import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from ntk.gradients import factors
from ntk.gradients.factors import Matrix, Table, Vector
from ntk.kernels import contraction
from ntk.kernels.contraction import Contraction
from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import Columns, Full, LoRA, Rows

HOWS = {
    "sgd": Contraction(),
    "trace": Contraction(coupled=False),
    "signgd": Contraction(torch.sign, torch.sign),
    "asymmetric": Contraction(None, torch.sign),
    "asymmetric trace": Contraction(None, torch.sign, coupled=False),
}
C = 2


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def matrix(n, t, outputs, inputs, output_dim=0, rows=None):
    width = outputs if rows is None else len(rows)
    g = tuple(noise(n, t, width) for _ in range(C))
    return Matrix(noise(n, t, inputs), g, output_dim, rows)


def padded(factor):
    """Zero the gradients of some positions and of the whole first example."""
    for g in factor.g:
        g[:, -1] = 0
        g[0] = 0
    return factor


def table(n, t, words, d):
    return Table(torch.randint(words, (n, t)), tuple(noise(n, t, d) for _ in range(C)))


def whole(factor, shape):
    """Form the stored gradients ``(n, c, *shape)`` position by position."""
    n = len(factor.v[0]) if isinstance(factor, Vector) else len(factor.g[0])
    total = torch.zeros(n, C, *shape, dtype=torch.float64)
    for i in range(n):
        for k in range(C):
            if isinstance(factor, Vector):
                total[i, k] = factor.v[k, i].view(shape)
            elif isinstance(factor, Table):
                for token, g in zip(factor.tokens[i], factor.g[k][i], strict=True):
                    total[i, k, token] += g
            else:
                outputs = range(shape[factor.output_dim])
                rows = outputs if factor.rows is None else factor.rows.tolist()
                for g, x in zip(factor.g[k][i], factor.x[i], strict=True):
                    for row, value in zip(rows, g, strict=True):
                        if factor.output_dim == 0:
                            total[i, k, row] += value * x
                        else:
                            total[i, k, :, row] += value * x
    return total


def expected_gram(left, right, shape, contraction):
    """Sum all uses of each batch, then contract."""
    sides = [
        torch.cat([sum(whole(f, shape) for f in batch) for batch in side])
        for side in (left, right)
    ]
    same = lambda g: g
    kernel = dense.kernel(
        sides[:1],
        sides[1:],
        left_of=contraction.left or same,
        right_of=contraction.right or same,
    )
    if not contraction.coupled:
        return torch.einsum("nmcc->nm", kernel)
    return kernel.permute(2, 0, 3, 1).flatten(2).flatten(0, 1)


SHAPE = (4, 3)
ROWS = torch.tensor([1, 3])
REPEATED = torch.tensor([0, 0, 2])
USES = {
    "one use": lambda n: [matrix(n, 5, 4, 3)],
    "one position": lambda n: [matrix(n, 1, 4, 3)],
    "no position": lambda n: [matrix(n, 0, 4, 3)],
    "two uses": lambda n: [matrix(n, 5, 4, 3), matrix(n, 2, 4, 3)],
    "stored by inputs": lambda n: [matrix(n, 5, 3, 4, output_dim=1)],
    "padded": lambda n: [padded(matrix(n, 5, 4, 3)), padded(matrix(n, 2, 4, 3))],
    "both ways": lambda n: [matrix(n, 5, 4, 3), matrix(n, 5, 3, 4, output_dim=1)],
    "some rows": lambda n: [matrix(n, 5, 4, 3, rows=ROWS)],
    "repeated rows": lambda n: [matrix(n, 5, 4, 3, rows=REPEATED)],
    "rows and all": lambda n: [matrix(n, 5, 4, 3, rows=ROWS), matrix(n, 5, 4, 3)],
    "two cuts": lambda n: [
        matrix(n, 5, 4, 3, rows=ROWS),
        matrix(n, 5, 4, 3, rows=REPEATED),
    ],
    "table": lambda n: [table(n, 6, 4, 3)],
    "one token": lambda n: [table(n, 1, 4, 3)],
    "table used twice": lambda n: [table(n, 6, 4, 3), table(n, 1, 4, 3)],
    "tied table": lambda n: [table(n, 6, 4, 3), matrix(n, 5, 4, 3)],
    "vector": lambda n: [Vector(noise(C, n, 12))],
    "vector and matrix": lambda n: [Vector(noise(C, n, 12)), matrix(n, 2, 4, 3)],
}
ENTRIES = (1, 100, 2**20)
BLOCKS = pytest.mark.parametrize("entries", ENTRIES)


@pytest.mark.parametrize(("name", "how", "entries"), pairs(USES, HOWS, ENTRIES))
def test_gram_agrees_with_whole_gradients(name, how, entries, monkeypatch):
    monkeypatch.setattr(contraction, "BLOCK_ENTRIES", entries)
    shape, rule = torch.Size(SHAPE), HOWS[how]
    left = [USES[name](2), USES[name](3)]
    right = [USES[name](1), USES[name](2)]
    for other in (left, left[:1], right):
        result = contraction.gram(left, other, shape, rule)
        assert_close(result, expected_gram(left, other, shape, rule), of=how)


@pytest.mark.parametrize("how", ["sgd", "trace"])
@pytest.mark.parametrize(
    "name",
    ["one use", "no position", "two uses", "stored by inputs", "both ways", "padded"],
)
def test_positions_and_blocks_are_two_ways_to_the_same(name, how, monkeypatch):
    shape, rule = torch.Size(SHAPE), HOWS[how]
    left, right = [USES[name](2), USES[name](3)], [USES[name](2)]
    for other in (left, left[:1], right):
        expected = expected_gram(left, other, shape, rule)
        for cheaper in (True, False):
            answer = lambda *_, cheaper=cheaper: cheaper
            monkeypatch.setattr(contraction, "_positions_are_cheaper", answer)
            assert_close(contraction.gram(left, other, shape, rule), expected)


@pytest.mark.parametrize("name", USES)
def test_dense_gradients(name):
    uses = USES[name](3)
    expected = sum(whole(f, SHAPE) for f in uses).transpose(0, 1).flatten(2)
    assert_close(factors.dense(uses, torch.Size(SHAPE)), expected)


@pytest.mark.parametrize("name", USES)
def test_factor_of_one_example(name):
    for factor in USES[name](3):
        result = whole(factor.example(1), SHAPE)
        assert_close(result, whole(factor, SHAPE)[1:2], 0)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 200, 601])
def test_product_with_itself(rows):
    features = noise(1, rows, 7)
    result = Contraction().gram(features, features)
    assert_close(result, features[0] @ features[0].T)


def test_weights_of_coordinates():
    left, right, weights = noise(C, 3, 5), noise(C, 4, 5), noise(5).abs()
    expected = torch.einsum("cnp,dmp,p->cndm", left, right, weights)
    result = Contraction().gram(left, right, weights)
    assert_close(result, expected.flatten(2).flatten(0, 1))


@given(
    n=st.integers(1, 3),
    t=st.integers(0, 4),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    output_dim=st.sampled_from([0, 1]),
    entries=st.sampled_from([1, 7, 2**20]),
)
def test_gram_of_any_sizes(n, t, outputs, inputs, output_dim, entries):
    shape = torch.Size((outputs, inputs)[:: -1 if output_dim else 1])
    uses = [[matrix(n, t, outputs, inputs, output_dim)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contraction, "BLOCK_ENTRIES", entries)
        result = contraction.gram(uses, uses, shape, Contraction())
    expected = expected_gram(uses, uses, shape, Contraction())
    assert_close(result, expected, floor=1e-300)


# Layers that use their weight differently.

SPACES = {
    "full": Full(),
    "rows": Rows(2).at("layer"),
    "columns": Columns(2).at("layer"),
    "both": Rows(1, strategy="last").at("layer") + Columns(2).at("layer"),
    "lora": LoRA(2, rescale=True).at("layer"),
}


class MaskedLinear(nn.Linear):
    """A pruned layer."""

    def forward(self, x):
        kept = (torch.arange(self.weight.numel()) % 3 > 0).view_as(self.weight)
        return F.linear(x, self.weight * kept, self.bias)


def with_layer(outputs, inputs, features, run):
    return Lambda(
        lambda m, x: m.head(torch.tanh(run(m, x))),
        layer=nn.Linear(inputs, outputs),
        head=nn.Linear(features, 2),
    )


def autoencoder(hidden):
    def run(m, x):
        return F.linear(torch.tanh(m.layer(x)), m.layer.weight.T)

    return with_layer(hidden, 6, 6, run)


def pruned():
    return Lambda(
        lambda m, x: m.head(torch.tanh(m.layer(x))),
        layer=MaskedLinear(6, 4),
        head=nn.Linear(4, 2),
    )


def rows_of(rows):
    return lambda m, x: F.linear(x, m.layer.weight[rows])


MODELS = {
    "tied autoencoder": lambda: autoencoder(6),
    "tied narrow autoencoder": lambda: autoencoder(5),
    "pruned": pruned,
    "slice": lambda: with_layer(4, 6, 2, rows_of(slice(1, 3))),
    "repeated rows": lambda: with_layer(4, 6, 6, rows_of([0, 0, 1, 2, 3, 3])),
    "chunks": lambda: with_layer(
        4,
        6,
        2,
        lambda m, x: (
            F.linear(x, m.layer.weight.chunk(2)[0])
            * F.linear(x, m.layer.weight.split([2, 2])[1])
        ),
    ),
    "columns": lambda: with_layer(
        4, 6, 4, lambda m, x: F.linear(x[:, :3], m.layer.weight[:, ::2])
    ),
    "matmul": lambda: with_layer(6, 4, 4, lambda m, x: x @ m.layer.weight),
    "transposed": lambda: with_layer(
        4, 6, 4, lambda m, x: x @ m.layer.weight.t() + m.layer.bias
    ),
    "pruned conv1d": lambda: Lambda(
        lambda m, x: m.head(torch.tanh(x @ (m.layer.weight * (m.layer.weight > 0)))),
        layer=Conv1D(4, 6),
        head=nn.Linear(4, 2),
    ),
    "conv1d and its transpose": lambda: Lambda(
        lambda m, x: m.head(torch.tanh(m.layer(x)) @ m.layer.weight.T),
        layer=Conv1D(4, 6),
        head=nn.Linear(6, 2),
    ),
    "also a table": lambda: with_layer(
        6,
        6,
        6,
        lambda m, x: m.layer(x) + F.embedding((x[:, 0] > 0).long(), m.layer.weight),
    ),
}


@pytest.mark.parametrize("reduce", ["full", "trace"])
@pytest.mark.parametrize("name", MODELS)
def test_spaces_of_weights_used_in_other_ways(name, reduce):
    model = MODELS[name]().double()
    x = noise(4, 6)
    result = compute(model, x, spaces=SPACES, options=KernelOptions(reduce=reduce))
    expected = compute(
        model,
        x,
        spaces=SPACES,
        options=KernelOptions(reduce=reduce, implementation="jacobian"),
    )
    for space in SPACES:
        assert_close(result.kernels[space], expected.kernels[space], of=space)
    full = dense.kernel(list(dense.gradients(model, x).values()))
    if reduce == "full":
        assert_close(result.kernels["full"], full)
