"""The fused linear map and its layer, against dense matrices."""

from copy import deepcopy
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.functional import Index, Slices, linear_with_slices
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.adapter.slices import Selected
from rocoft.models.architecture import Architecture, SelectionError

SELECTIONS = {
    "consecutive rows": ((1, 2, 3), ()),
    "rows": ((0, 4, 7), ()),
    "last row": ((9,), ()),
    "consecutive columns": ((), (0, 1)),
    "columns": ((), (2, 5)),
    "rows and columns": ((1, 2), (0, 3)),
    "scattered rows and columns": ((0, 2, 8), (5, 6)),
    "all rows": (tuple(range(10)), (1,)),
    "all columns": ((), tuple(range(7))),
}
KINDS = {"linear": (True, False), "no bias": (False, False), "conv1d": (True, True)}


def base_layer(bias=True, transposed=False, dtype=torch.float64, integers=False):
    layer = Conv1D(10, 7) if transposed else nn.Linear(7, 10, bias=bias)
    layer = layer.to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            if integers:
                parameter.copy_(torch.randint(-4, 5, parameter.shape))
            else:
                parameter.normal_()
    return layer.requires_grad_(False)


def layer_of(base, rows, columns, adapter="default"):
    weight = next(iter(Architecture(nn.Sequential(base)).linear_weights.values()))
    return RoCoFTLinear(base, adapter, Selected(weight, rows, columns))


def fill(layer, adapter="default", integers=False):
    with torch.no_grad():
        for side in (layer.rocoft_rows, layer.rocoft_columns):
            if adapter in side:
                values = torch.randn_like(side[adapter])
                side[adapter].copy_((4 * values).round() if integers else values)
    return layer


def dense(layer, rows, columns, adapter="default"):
    """The twin: the whole matrix in the orientation (outputs, inputs), by loops."""
    weight = layer.base_layer.weight.detach()
    weight = (weight.t() if isinstance(layer.base_layer, Conv1D) else weight).clone()
    unselected = [i for i in range(10) if i not in rows]
    for k, row in enumerate(rows):
        weight[row] += layer.rocoft_rows[adapter][k].detach()
    for k, column in enumerate(columns):
        for j, row in enumerate(unselected):
            weight[row, column] += layer.rocoft_columns[adapter][j, k].detach()
    return weight


def slice_gradients(layer, whole, rows, columns):
    """Pick from a gradient (outputs, inputs) what belongs to the slices."""
    unselected = [i for i in range(10) if i not in rows]
    found = {}
    if rows:
        found["rows"] = whole[list(rows)]
    if columns:
        found["columns"] = whole[unselected][:, list(columns)]
    return found


def own_gradients(layer, adapter="default"):
    sides = {"rows": layer.rocoft_rows, "columns": layer.rocoft_columns}
    return {k: side[adapter].grad for k, side in sides.items() if adapter in side}


def own_parameters(layer):
    return [p for n, p in layer.named_parameters() if "rocoft" in n]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_output_is_that_of_the_dense_weight(selection, kind):
    rows, columns = SELECTIONS[selection]
    layer = fill(layer_of(base_layer(*KINDS[kind]), rows, columns))
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    bias = layer.base_layer.bias
    expected = F.linear(x, dense(layer, rows, columns), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_untrained_output_is_bit_equal(selection):
    layer = layer_of(base_layer(), *SELECTIONS[selection])
    x = torch.randn(5, 7, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_are_slices_of_the_full_gradient(selection, kind):
    # Small whole numbers: every sum is exact, so every difference is a mistake.
    rows, columns = SELECTIONS[selection]
    layer = layer_of(base_layer(*KINDS[kind], integers=True), rows, columns)
    fill(layer, integers=True)
    x = torch.randint(-5, 6, (2, 3, 7)).double().requires_grad_()
    g = torch.randint(-5, 6, (2, 3, 10)).double()
    layer(x).backward(g)
    weight = dense(layer, rows, columns).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, weight, layer.base_layer.bias).backward(g)
    assert torch.equal(x.grad, twin.grad)
    expected = slice_gradients(layer, weight.grad, rows, columns)
    found = own_gradients(layer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert layer.base_layer.weight.grad is None


@given(st.data())
def test_gradients_agree_on_any_sizes(data):
    outputs, inputs, n = (data.draw(st.integers(1, 9)) for _ in range(3))
    sides = [
        tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=size))))
        for size in (outputs, inputs)
    ]
    rows, columns = sides
    if not rows and not columns:
        return
    base = nn.Linear(inputs, outputs).double().requires_grad_(False)
    layer = fill(layer_of(base, rows, columns))
    x = torch.randn(n, inputs, dtype=torch.float64)
    g = torch.randn(n, outputs, dtype=torch.float64)
    layer(x).backward(g)
    full = g.t() @ x
    rest = [i for i in range(outputs) if i not in rows]
    if rows:
        found = layer.rocoft_rows["default"].grad
        torch.testing.assert_close(found, full[list(rows)], rtol=1e-9, atol=1e-9)
    if columns:
        found = layer.rocoft_columns["default"].grad
        expected = full[rest][:, list(columns)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("selection", ["rows", "columns", "rows and columns"])
def test_first_and_second_derivatives_by_finite_differences(selection):
    layer = layer_of(base_layer(), *SELECTIONS[selection])
    names = [n for n, _ in layer.named_parameters() if "rocoft" in n]
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)

    def outputs(x, *values):
        return torch.tanh(
            functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        )

    values = [torch.randn_like(p).requires_grad_() for p in own_parameters(layer)]
    assert torch.autograd.gradcheck(outputs, (x, *values))
    assert torch.autograd.gradgradcheck(outputs, (x, *values))


def test_saves_x_by_reference_for_rows_and_only_its_columns_for_columns():
    x = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    base = base_layer()
    owned = {x.data_ptr(), base.weight.data_ptr()}
    sizes = {}
    for name in ("rows", "consecutive columns", "columns"):
        layer = layer_of(base, *SELECTIONS[name])
        parameters = {p.data_ptr() for p in layer.parameters()}
        saved = []

        def keep(t, saved=saved, known=owned | parameters):
            if t.data_ptr() not in known and t.is_floating_point():
                saved.append(t.untyped_storage().nbytes())
            if t.data_ptr() == x.data_ptr():
                saved.append("x")
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x)
        sizes[name] = saved
    assert sizes["rows"] == ["x"]
    assert sizes["consecutive columns"] == sizes["columns"] == [50 * 2 * 8]


def test_computes_no_gradient_that_nobody_needs():
    layer = layer_of(base_layer(), (0, 2), (1,))
    layer.rocoft_columns["default"].requires_grad_(False)
    x = torch.randn(4, 7, dtype=torch.float64)
    layer(x).sum().backward()
    assert layer.rocoft_rows["default"].grad is not None
    assert layer.rocoft_columns["default"].grad is None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("selection", ["rows", "columns", "rows and columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_type_and_keeps_gradients_in_theirs(selection, dtype):
    rows, columns = SELECTIONS[selection]
    layer = fill(layer_of(base_layer(dtype=dtype), rows, columns))
    for side in (layer.rocoft_rows, layer.rocoft_columns):
        for name in list(side):
            side[name] = side[name].float()
    exact = fill(deepcopy(layer)).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(6, 7, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        loss = y.float().square().sum()
    loss.backward()
    exact(twin).square().sum().backward()
    assert x.grad.dtype == torch.float32
    pairs = [(x.grad, twin.grad)]
    pairs += [(own_gradients(layer)[k], g) for k, g in own_gradients(exact).items()]
    for found, expected in pairs:
        assert found.dtype == torch.float32
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "selection", ["rows", "consecutive columns", "rows and columns"]
)
def test_compiles_to_one_graph(selection, kind):
    torch.compiler.reset()
    layer = fill(layer_of(base_layer(*KINDS[kind]), *SELECTIONS[selection]))
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.autograd.grad(y.tanh().sum(), [x, *own_parameters(layer)])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    found = torch.autograd.grad(out.tanh().sum(), [x, *own_parameters(layer)])
    assert torch.equal(out, y)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_compiled_layer_follows_loaded_indices():
    torch.compiler.reset()
    layer = fill(layer_of(base_layer(), (0, 1), ()))
    other = fill(layer_of(deepcopy(layer.base_layer), (3, 7), ()))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 7, dtype=torch.float64)
    compiled(x)
    layer.load_state_dict(other.state_dict())
    expected = F.linear(x, dense(other, (3, 7), ()), layer.base_layer.bias)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("selection", ["rows", "columns", "rows and columns"])
def test_functorch_transforms(selection):
    layer = fill(layer_of(base_layer(), *SELECTIONS[selection]))
    slices = {n: p.detach() for n, p in layer.named_parameters() if "rocoft" in n}
    x = torch.randn(4, 3, 7, dtype=torch.float64)

    def loss(slices, x):
        return torch.tanh(functional_call(layer, slices, (x,))).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(slices, x)
    for i in range(4):
        layer.zero_grad()
        torch.tanh(layer(x[i])).square().sum().backward()
        for name, parameter in layer.named_parameters():
            if name in slices:
                torch.testing.assert_close(per_sample[name][i], parameter.grad)
    # Ensembles batch the slices and not the inputs.
    many = {n: torch.stack([p, 2 * p]) for n, p in slices.items()}
    two = vmap(lambda s: functional_call(layer, s, (x,)))(many)
    torch.testing.assert_close(two[0], layer(x))
    forward, reverse = (f(loss)(slices, x[0]) for f in (jacfwd, jacrev))
    for name in slices:
        torch.testing.assert_close(forward[name], reverse[name])
    curvature = hessian(loss)(slices, x[0])
    tangent = {n: torch.randn_like(p) for n, p in slices.items()}
    _, change = jvp(lambda s: grad(loss)(s, x[0]), (slices,), (tangent,))
    for name in slices:
        product = sum(
            curvature[name][o].flatten(slices[name].ndim) @ tangent[o].flatten()
            for o in slices
        )
        torch.testing.assert_close(product, change[name])


def test_hooks_of_the_base_layer_are_called():
    layer = fill(layer_of(base_layer(), (1, 2), (0,)))
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = layer(x)
    seen = []
    layer.base_layer.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == 1


def test_replaced_forward_of_the_base_layer_is_called():
    layer = fill(layer_of(base_layer(), (1, 2), ()))
    x = torch.randn(3, 7, dtype=torch.float64)
    plain = layer.base_layer.forward
    expected = layer(x) + 1
    layer.base_layer.forward = lambda x: plain(x) + 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_unfrozen_base_weight_gets_its_gradient():
    layer = fill(layer_of(base_layer(), (1, 2), ()))
    layer.base_layer.weight.requires_grad_()
    x = torch.randn(3, 7, dtype=torch.float64)
    layer(x).sum().backward()
    expected = torch.ones(3, 10, dtype=torch.float64).t() @ x
    torch.testing.assert_close(layer.base_layer.weight.grad, expected)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (1, 7), (2, 0, 7), (2, 3, 4, 7)])
def test_any_number_of_positions(shape):
    layer = fill(layer_of(base_layer(), (1, 2), (0, 4)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 10)
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(g is not None for g in own_gradients(layer).values())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_not_contiguous(kind):
    layer = fill(layer_of(base_layer(*KINDS[kind]), (1, 2), (0, 4)))
    x = torch.randn(7, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    expected = F.linear(x, dense(layer, (1, 2), (0, 4)), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(10, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    layer(x).backward(g)
    expected = torch.einsum("ato,ati->oi", g, x)[[1, 2]]
    torch.testing.assert_close(layer.rocoft_rows["default"].grad, expected)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("selection", "kind", "dtype"),
    [
        *product(("rows", "columns", "rows and columns"), ("linear",), DTYPES),
        *zip(SELECTIONS, cycle(KINDS), cycle(DTYPES[1:]), strict=False),
    ],
)
def test_unmerging_is_bit_exact_after_fifty_cycles(selection, kind, dtype):
    rows, columns = SELECTIONS[selection]
    layer = fill(layer_of(base_layer(*KINDS[kind], dtype=dtype), rows, columns))
    before = layer.base_layer.weight.clone()
    delta = layer.get_delta_weight("default")
    for _ in range(50):
        layer.merge()
        merged = layer.base_layer.weight.clone()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    # Rounded once, from float32.
    expected = (before.float() + delta.float()).to(dtype)
    assert torch.equal(merged, expected)
    assert not torch.equal(merged, before)


def test_delta_is_the_difference_of_the_dense_weight():
    for rows, columns in SELECTIONS.values():
        for bias, transposed in KINDS.values():
            layer = fill(layer_of(base_layer(bias, transposed), rows, columns))
            delta = layer.get_delta_weight("default")
            assert delta.shape == layer.base_layer.weight.shape
            whole = delta.t() if transposed else delta
            base = layer.base_layer.weight
            base = base.t() if transposed else base
            expected = dense(layer, rows, columns) - base
            torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)


def test_overlapping_adapters_do_not_merge():
    base = base_layer()
    layer = fill(layer_of(base, (1, 2), ()))
    weight = next(iter(Architecture(nn.Sequential(base)).linear_weights.values()))
    layer.update_layer("second", Selected(weight, (2, 5), ()))
    layer.update_layer("third", Selected(weight, (), (0, 3)))
    before = base.weight.clone()
    with pytest.raises(SelectionError, match=r"both train rows \[2\]"):
        layer.merge(adapter_names=["default", "second"])
    assert torch.equal(base.weight, before)
    assert not layer.merged
    # A row and a column cross in one number, to which both differences are added.
    fill(layer, "third")
    total = layer.get_delta_weight("default") + layer.get_delta_weight("third")
    layer.merge(adapter_names=["default", "third"])
    torch.testing.assert_close(base.weight, before + total, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_broken_adapter_is_not_merged_safely():
    layer = fill(layer_of(base_layer(), (1, 2), (3,)))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.rocoft_rows["default"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_function_takes_spans_and_indices_alike():
    base = base_layer()
    x = torch.randn(3, 7, dtype=torch.float64)
    rows = torch.randn(2, 7, dtype=torch.float64)
    columns = torch.randn(10, 3, dtype=torch.float64)
    found = []
    for spans in (True, False):
        row_index = Index(torch.tensor([4, 5]), (4, 2) if spans else None)
        column_index = Index(torch.tensor([1, 2, 3]), (1, 3) if spans else None)
        slices = Slices(rows, row_index, columns, column_index)
        found.append(linear_with_slices(x, base.weight, base.bias, slices))
    assert torch.equal(*found)
