"""Errors for models and inputs without a kernel."""

import pytest
import torch
from cases import BY_NAME, Lambda
from torch import nn

from ntk.gradients.coverage import BatchDependenceError
from ntk.gradients.function import FunctionError
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.spaces.kinds import Full

D = 5


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


def refused(error, match, model, inputs, other=None, **options):
    with pytest.raises(error, match=match):
        empirical_ntk(model, inputs, other, **options)


def mlp():
    return BY_NAME["mlp"].build(), BY_NAME["mlp"].inputs()


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", ["factors", "jacobian", "jvp"]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(4, D), (4, D, 3)])
def test_batch_statistics_are_refused(shape, implementation):
    norm = nn.BatchNorm1d(D, track_running_stats=False)
    model = Lambda(
        lambda m, x: m.head(m.norm(x).flatten(2).flatten(1)[:, :D]),
        norm=norm,
        head=nn.Linear(D, 2),
    ).double()
    refused(
        FunctionError,
        "statistics of the batch.*track_running_stats",
        *(model, noise(*shape)),
        implementation=implementation,
    )


@IMPLEMENTATIONS
def test_outputs_that_depend_on_the_batch_are_refused(implementation):
    model = Lambda(lambda m, x: m.head(x) - m.head(x).mean(0), head=nn.Linear(D, 2))
    x = noise(4, D)
    message = "outputs for an example change with the other examples"
    options = {"implementation": implementation}
    refused(BatchDependenceError, message, model.double(), x, **options)
    refused(BatchDependenceError, message, model, [x[:1], x[1:]], **options)
    refused(BatchDependenceError, message, model, x[:1], x[1:], **options)


@IMPLEMENTATIONS
def test_weights_that_are_not_numbers_are_named(implementation):
    model, x = mlp()
    model[2].bias.data[1] = float("nan")
    message = r"'2\.bias' has 1 NaN or infinite entries of 5\. Check the checkpoint"
    refused(FunctionError, message, model, x, implementation=implementation)


def test_outputs_that_are_not_numbers_are_refused():
    model, x = mlp()
    x[0, 0] = float("inf")
    refused(FunctionError, "NaN or infinite entries though its parameters", model, x)


def test_quantised_weights_are_refused():
    model, x = mlp()
    whole = torch.ones(6, 8, dtype=torch.int8)
    model[0].weight = nn.Parameter(whole, requires_grad=False)
    refused(FunctionError, r"'0\.weight' is quantised \(torch\.int8\)", model, x)


@pytest.mark.parametrize(
    "outputs",
    [lambda y: y[:, 0], lambda y: y[:1], lambda y: y[..., None], lambda y: "text"],
)
def test_outputs_of_another_shape_are_refused(outputs):
    refused(
        FunctionError,
        r"shape \(n, c\) with n = \d examples, but got",
        *mlp(),
        outputs=outputs,
    )


def test_outputs_without_logits_are_refused():
    model = BY_NAME["bert"].build().bert
    refused(FunctionError, "no tensor and has no `.logits`", model, text())


def text():
    return BY_NAME["bert"].inputs()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "holds no examples"),
        ({}, "number of examples"),
        (torch.zeros(0, 8, dtype=torch.float64), "at least 1"),
        (torch.tensor(1.0), "at least 1"),
        ({"a": torch.zeros(2, 8), "b": torch.zeros(3, 8)}, "'a': 2, 'b': 3"),
        (["a sentence"], "inputs is a str"),
        ([{"names": ["a"]}], "number of examples"),
    ],
)
def test_inputs_that_are_no_examples_are_refused(inputs, message):
    refused(ValueError, message, mlp()[0], inputs)


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_below_one_is_refused(size):
    refused(ValueError, f"batch_size={size} must be", *mlp(), batch_size=size)


@pytest.mark.parametrize("argument", ["reduce", "kind", "implementation"])
def test_unknown_choices_are_refused(argument):
    options = {argument: "best"}
    refused(ValueError, f"{argument}='best' must be one of .*, ", *mlp(), **options)


def test_margin_of_three_outputs_is_refused():
    model, x = BY_NAME["cnn"].build(), BY_NAME["cnn"].inputs()
    refused(ValueError, "margin.* two outputs", model, x, reduce="margin")


def test_sign_kernel_by_products_is_refused():
    options = {"kind": "signgd", "implementation": "jvp"}
    refused(ValueError, "'signgd' needs every gradient.*'factors'", *mlp(), **options)


def test_no_spaces_are_refused():
    refused(ValueError, "names no tangent space", *mlp(), space={})


@pytest.mark.parametrize("count", [0, -1, 3])
def test_more_first_batches_than_there_are_is_refused(count):
    model, x = mlp()
    with pytest.raises(ValueError, match=f"other={count} needs inputs as a list"):
        compute(model, [x[:1], x[1:]], count, spaces={"": Full()})
    with pytest.raises(ValueError, match="other=1 needs inputs as a list"):
        compute(model, x, 1, spaces={"": Full()})
