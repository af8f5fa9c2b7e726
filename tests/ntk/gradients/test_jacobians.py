"""The definition: Jacobians and kernels of functions with known answers."""

import warnings

import dense
import pytest
import torch
from cases import BY_NAME, Lambda
from dense import assert_close
from torch import Tensor, nn

from ntk.gradients.function import NetworkFunction, to_batches
from ntk.gradients.jacobians import jacobian
from ntk.kernels.contraction import Contraction
from ntk.kernels.empirical import empirical_ntk
from ntk.kernels.products import products_kernel
from ntk.spaces.kinds import Columns, Full, LoRA, Rows
from ntk.spaces.maps import InputSide, Slices
from rocoft.models.architecture import Architecture

CPU = torch.device("cpu")


def linear(inputs=3, outputs=2):
    return nn.Linear(inputs, outputs, bias=False).double()


def test_jacobian_of_a_linear_model_is_its_input():
    x = torch.randn(4, 3, dtype=torch.float64)
    model = linear()
    maps = Full().maps(model)
    rows = jacobian(NetworkFunction(model), [x], maps)
    expected = torch.einsum("ck,ni->cnki", torch.eye(2, dtype=x.dtype), x)
    assert_close(rows["weight", maps["weight"][0]], expected.flatten(2))


@pytest.mark.parametrize("name", ["bert", "vit", "mixture"])
def test_jacobian_agrees_with_plain_autograd(name):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    maps = Full().maps(model)
    rows = jacobian(NetworkFunction(model), [inputs], maps)
    for parameter, gradient in dense.gradients(model, inputs).items():
        result = rows[parameter, maps[parameter][0]].transpose(0, 1)
        assert_close(result, gradient.flatten(2), floor=1e-14, of=parameter)


def test_mapping_over_examples_warns_of_nothing():
    """Torch's warning about attention without a batching rule must not reach users."""
    family = BY_NAME["vit"]
    model = family.build()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            jacobian(NetworkFunction(model), [family.inputs()], Full().maps(model))
    finally:
        torch.set_warn_always(False)


def test_jacobian_of_many_examples_is_that_of_each():
    """More examples than one call of vmap takes."""
    family = BY_NAME["mlp"]
    model, x = family.build(), family.inputs(19)
    maps = Rows(2).maps(model)
    function = NetworkFunction(model)
    together = jacobian(function, [x], maps)
    apart = jacobian(function, to_batches(x, CPU, 1), maps)
    for key in together:
        assert together[key].shape[1] == 19
        assert_close(together[key], apart[key], of=str(key))


@pytest.mark.parametrize("implementation", ["jacobian", "jvp", "factors"])
def test_kernel_of_a_linear_model_is_its_gram_matrix(implementation):
    x = torch.randn(5, 3, dtype=torch.float64)
    kernel = empirical_ntk(linear(), x, implementation=implementation)
    expected = torch.einsum("nm,cd->nmcd", x @ x.T, torch.eye(2, dtype=x.dtype))
    assert_close(kernel, expected)


@pytest.mark.parametrize("implementation", ["jacobian", "jvp", "factors"])
def test_kernel_of_rows_and_columns_of_a_linear_model(implementation):
    model = nn.Sequential(linear(4, 3), linear(3, 2))
    second = model[1].weight.detach()
    x = torch.randn(5, 4, dtype=torch.float64)

    def kernel(space):
        return empirical_ntk(model, x, space=space, implementation=implementation)

    # f = V W x: the gradient of f_c with respect to W is V[c] x^T.
    chosen = second[:, [0, 2]]
    rows = torch.einsum("nm,cd->nmcd", x @ x.T, chosen @ chosen.T)
    assert_close(kernel(Rows(indices=(0, 2))), rows)
    part = x[:, [1, 3]]
    columns = torch.einsum("nm,cd->nmcd", part @ part.T, second @ second.T)
    assert_close(kernel(Columns(indices=(1, 3))), columns)


def test_a_shift_moves_the_outputs_along_the_jacobian():
    """f(theta + S delta) is linear in delta for a linear model."""
    x = torch.randn(5, 4, dtype=torch.float64)
    model = linear(4, 3)
    of = Architecture(model).linear_weights["weight"]
    pairs = tuple(
        LoRA(rank, alpha=3).at("weight").maps(model)["weight"][0] for rank in (2, 1)
    )
    for map_ in (
        Slices(of, (0, 2), (1,)),
        Slices(of, (), (0, 3)),
        InputSide(of, (), pairs[:1]),
        InputSide(of, (3, 0), pairs),
    ):
        delta = torch.randn(map_.size(model.weight.shape), dtype=x.dtype)
        moved = map_.shift(model.weight.detach(), delta)
        features = map_.of_gradient(
            torch.einsum("ck,ni->cnki", torch.eye(3, dtype=x.dtype), x)
        )
        expected = (features @ delta).T
        assert_close(x @ (moved - model.weight.detach()).T, expected, of=str(map_))


@pytest.mark.parametrize("name", ["mlp", "bloom", "cnn"])
def test_products_reduce_to_the_trace(name):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    function = NetworkFunction(model)
    batches = to_batches(inputs, CPU)
    maps = Full().maps(model)
    full = products_kernel(function, batches, batches, maps, Contraction())
    trace = products_kernel(
        function, batches, batches, maps, Contraction(coupled=False)
    )
    c = len(full) // 3
    expected = torch.einsum("cncm->nm", full.view(c, 3, c, 3))
    assert_close(trace, expected)


@pytest.mark.parametrize(
    "narrow",
    [
        Tensor.float,
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.float32),
        lambda x: x.type(torch.float32),
        lambda x: x.softmax(1, dtype=torch.float32).log(),
        lambda x: torch.tensor(x.tolist(), dtype=torch.float32),
    ],
)
def test_float64_models_are_evaluated_in_float64(narrow):
    def forward(m, x):
        return m.head(narrow(x).to(x.dtype))

    model = Lambda(forward, head=nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64).log_softmax(1)
    result = NetworkFunction(model)(x)
    assert_close(result.detach(), model.head(x).detach(), 1e-14)
    # A float32 model is not affected.
    assert NetworkFunction(model.float())(x.float()).dtype is torch.float32


def test_progress_counts_every_example():
    family = BY_NAME["mlp"]
    model, x = family.build(), family.inputs(19)
    steps = []
    jacobian(NetworkFunction(model), [x[:9], x[9:]], Full().maps(model), steps.append)
    assert sum(steps) == 19
