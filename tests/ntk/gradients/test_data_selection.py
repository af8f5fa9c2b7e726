"""Rows and columns selected on data: scores against plain hooks and gradients."""

import dense
import pytest
import torch
from cases import BY_NAME
from torch import nn
from transformers.pytorch_utils import Conv1D

from ntk.gradients.data_selection import calibrate
from ntk.kernels.empirical import empirical_ntk
from ntk.spaces.kinds import Bias, Columns, LoRA, Rows
from ntk.spaces.maps import Slices
from rocoft.models.architecture import Architecture, SelectionError

MODELS = ["mlp", "bert", "gpt2", "twice"]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    family = BY_NAME[request.param]
    return family.build(), family.inputs()


def logical(values, weight):
    """Return a stored weight as ``(outputs, inputs)``."""
    return values if weight.output_dim == 0 else values.T


def energies(model, inputs):
    """Return the squared gradients of every parameter over examples and outputs."""
    gradients = dense.gradients(model, inputs)
    return {name: g.square().sum((0, 1)) for name, g in gradients.items()}


def activations(model, inputs):
    """Return by weight the norm of each input feature over examples and positions."""
    totals, hooks = {}, []

    def add(name):
        def hook(module, args):
            x = args[0].detach()
            power = x.reshape(-1, x.shape[-1]).square().sum(0)
            totals[name] = totals.get(name, 0) + power

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            hooks.append(module.register_forward_pre_hook(add(f"{path}.weight")))
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for hook in hooks:
        hook.remove()
    return {name: power.sqrt() for name, power in totals.items()}


def best(scores, parts, count):
    """Return the indices of the largest scores in each part."""
    chosen = []
    for part in parts:
        ranked = sorted(part, key=lambda i: -float(scores[i]))
        chosen += ranked[:count]
    return tuple(sorted(chosen))


def expected_choice(space, weight, scores):
    if isinstance(space, Rows):
        return best(scores.sum(1), weight.parts, space.count)
    return best(scores.sum(0), [range(weight.inputs)], space.count)


@pytest.mark.parametrize("family", [Rows, Columns])
def test_gradient_energy(case, family):
    model, inputs = case
    space = family(2, strategy="gradient")
    result = calibrate(space, model, inputs)
    weights = Architecture(model).targets
    energy = energies(model, inputs)
    assert set(result.indices) == set(weights)
    for name, weight in weights.items():
        expected = expected_choice(space, weight, logical(energy[name], weight))
        assert result.indices[name] == expected, name


@pytest.mark.parametrize("family", [Rows, Columns])
def test_activations(case, family):
    model, inputs = case
    space = family(2, strategy="activation")
    result = calibrate(space, model, inputs)
    norms = activations(model, inputs)
    for name, weight in Architecture(model).targets.items():
        values = logical(model.get_parameter(name).detach(), weight)
        expected = expected_choice(space, weight, values.abs() * norms[name])
        assert result.indices[name] == expected, name


def test_gradient_energy_sees_every_output_and_example():
    """A single output or example would select other rows."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    model = model.double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[1].weight.copy_(torch.tensor([[3.0, 2.2, 0], [0, 2.2, 2.9]]))
    x = torch.eye(3, dtype=torch.float64)
    # Energy of row k of the first weight: |V[:, k]|^2 sum |x|^2, 9, 9.68, 8.41 times 3.
    rows = calibrate(Rows(1, strategy="gradient").at("0"), model, x)
    assert rows.indices == {"0.weight": (1,)}
    x = torch.tensor([[0.0, 0, 3], [4, 0, 0], [0, 3.5, 3]], dtype=torch.float64)
    # Energy of column k: the sum of x[k]^2 over examples, times |V|^2: 16, 12.25, 18.
    columns = calibrate(Columns(1, strategy="gradient").at("0"), model, x)
    assert columns.indices == {"0.weight": (2,)}


@pytest.mark.parametrize("strategy", ["gradient", "activation"])
@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_batches_make_no_difference(name, strategy):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs(5)
    space = Rows(2, strategy=strategy)
    if name == "deberta":
        space = space.at("in_proj", "dense")
    whole = calibrate(space, model, inputs)
    assert calibrate(space, model, inputs, batch_size=1) == whole
    assert calibrate(space, model, inputs, batch_size=2) == whole


@pytest.mark.parametrize("name", ["mixture", "deberta-v2"])
def test_weights_that_factors_do_not_serve(name):
    """Energies are the same if served by single examples or by the definition."""
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    space = Rows(1, strategy="gradient")
    result = calibrate(space, model, inputs)
    energy = energies(model, inputs)
    for parameter, weight in Architecture(model).targets.items():
        expected = best(energy[parameter].sum(1), weight.parts, 1)
        assert result.indices[parameter] == expected, parameter


def test_the_kernel_is_that_of_the_chosen_rows():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs()
    space = calibrate(Rows(2, strategy="gradient"), model, inputs)
    gradients = dense.gradients(model, inputs)
    expected = dense.kernel(
        [gradients[name][:, :, list(rows)] for name, rows in space.indices.items()]
    )
    dense.assert_close(empirical_ntk(model, inputs, space=space), expected)


def test_spaces_without_such_strategies_are_untouched(bert):
    inputs = BY_NAME["bert"].inputs()
    for space in (
        Rows(2) + Bias(),
        Rows(2, strategy="random"),
        Columns(indices=(0,), strategy="gradient"),
    ):
        assert calibrate(space, bert, inputs) is space


def test_other_parts_of_a_sum_are_untouched(bert):
    inputs = BY_NAME["bert"].inputs()
    open_part = Columns(1, strategy="activation", rescale=True).at("query").layers(1)
    others = (Rows(2).layers(0), LoRA(2, seed=3), Bias())
    total = calibrate(others[0] + open_part + others[1] + others[2], bert, inputs)
    assert (total.parts[0], *total.parts[2:]) == others
    fixed = total.parts[1]
    assert list(fixed.indices) == ["bert.encoder.layer.1.attention.self.query.weight"]
    assert fixed.rescale
    assert not fixed.needs_examples
    for name, maps in fixed.maps(bert).items():
        assert isinstance(maps[0], Slices)
        assert maps[0].columns == fixed.indices[name]


def test_activations_are_those_of_the_layer_alone():
    """A tied weight is also used transposed."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.layer(x)) @ self.layer.weight)

    torch.manual_seed(5)
    model, x = Tied().double(), torch.randn(3, 4, dtype=torch.float64) * 0.1
    space = Columns(1, strategy="activation").at("layer")
    weight = model.layer.weight.detach()
    scores = (weight.abs() * x.norm(dim=0)).sum(0)
    other = (
        weight.abs() * (x.square() + (x @ weight.T).tanh().square()).sum(0).sqrt()
    ).sum(0)
    assert scores.argmax() != other.argmax()
    result = calibrate(space, model, x).indices["layer.weight"]
    assert result == (int(scores.argmax()),)


class Sometimes(nn.Module):
    """Two layers; the second sees only the marked examples, as one row."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        marked = (x[:, 0] > 0).nonzero()[:, 0]
        if len(marked):
            h = h.index_add(0, marked, torch.tanh(self.second(h[marked])))
        return self.head(h)


@pytest.mark.parametrize("strategy", ["gradient", "activation"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_layers_that_the_first_batch_does_not_use(size, strategy):
    torch.manual_seed(0)
    model, x = Sometimes().double(), torch.randn(4, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0, -2.0, 3.0, -1.0])
    space = Rows(2, strategy=strategy).at("second")
    result = calibrate(space, model, x, batch_size=size).indices["second.weight"]
    seen = torch.tanh(model.first(x[2])).detach()
    if strategy == "activation":
        scores = model.second.weight.detach().abs() * seen.abs()
    else:
        scores = energies(model, x)["second.weight"]
    assert result == best(scores.sum(1), [range(4)], 2)


def test_the_model_is_left_as_it_was():
    family = BY_NAME["bert"]
    model = family.build().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibrate(Rows(1, strategy="gradient"), model, family.inputs())
    assert model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


@pytest.mark.parametrize("strategy", ["gradient", "activation"])
def test_a_kernel_needs_the_choice_to_be_made(bert, strategy):
    inputs = BY_NAME["bert"].inputs()
    with pytest.raises(SelectionError, match=f"strategy='{strategy}' needs examples"):
        empirical_ntk(bert, inputs, space=Rows(2, strategy=strategy))


def test_that_error_names_the_way_out(bert):
    with pytest.raises(SelectionError, match="calibrate"):
        empirical_ntk(
            bert, BY_NAME["bert"].inputs(), space=Rows(2, strategy="gradient")
        )


def test_too_many_rows_are_refused(bert):
    with pytest.raises(SelectionError, match="rows=99 cannot be selected"):
        calibrate(Rows(99, strategy="gradient"), bert, BY_NAME["bert"].inputs())
