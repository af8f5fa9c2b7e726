"""The expected error of random rows and columns, against every selection there is."""

import itertools
import math

import pytest
import torch
from cases import BY_NAME, FLOAT, Lambda
from dense import gradients
from torch import nn

from ntk.kernels.empirical import empirical_ntk
from ntk.spaces.kinds import Columns, Rows
from ntk.studies.ablation.variance import expected_error, extreme_share, scatters
from rocoft.models.architecture import Architecture, SelectionError

LARGE = 10**9
SPACES = {Rows: (5, 4), Columns: (4, 5)}
"""Slices of the two weights that `two_weights` selects from."""


@pytest.fixture
def two_weights():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    model.append(nn.Linear(4, 2))
    return model.to(FLOAT), torch.randn(4, 4, dtype=FLOAT)


def slice_kernels(model, inputs, name, axis, reduce="full", outputs=None):
    """Return by plain loops the kernel of every slice of a weight, ``(d, ...)``."""
    of = Architecture(model).linear_weights[name]
    gradient = gradients(model, inputs, outputs)[name]
    if of.output_dim:
        gradient = gradient.transpose(2, 3)
    if reduce == "margin":
        gradient = gradient[:, 1:] - gradient[:, :1]
    found = []
    for i in range(gradient.shape[2 if axis is Rows else 3]):
        own = gradient[:, :, i] if axis is Rows else gradient[:, :, :, i]
        kernel = torch.einsum("ncp,mdp->nmcd", own, own)
        if reduce == "full":
            found.append(kernel)
        else:
            found.append(torch.einsum("nmcc->nm", kernel))
    return torch.stack(found)


def mean_error(kernels, count):
    """Return the mean squared error over all selections of each weight's slices."""
    whole = sum(own.sum(dim=0) for own in kernels)
    errors = []
    subsets = [itertools.combinations(range(len(own)), count) for own in kernels]
    for chosen in itertools.product(*map(list, subsets)):
        estimate = sum(
            len(own) / count * own[list(some)].sum(dim=0)
            for own, some in zip(kernels, chosen, strict=True)
        )
        errors.append(float((estimate - whole).square().sum()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("axis", [Rows, Columns])
@pytest.mark.parametrize("reduce", ["full", "trace", "margin"])
@pytest.mark.parametrize("entries", [1, LARGE])
def test_expected_error_is_the_mean_over_all_selections(
    two_weights, axis, reduce, entries
):
    model, x = two_weights
    kernels = [
        slice_kernels(model, x, n, axis, reduce) for n in ("0.weight", "2.weight")
    ]
    found = scatters(model, [x], axis(1), entries=entries, reduce=reduce)
    assert [each.slices for each in found] == list(SPACES[axis])
    for count in (1, 2, 3, 4):
        expected = mean_error(kernels, count)
        assert expected_error(found, count) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("axis", [Rows, Columns])
def test_the_estimate_is_the_rescaled_space(two_weights, axis):
    """Over all selections its mean is the whole kernel, its error the expected one."""
    model, x = two_weights
    names, sizes = ("0.weight", "2.weight"), SPACES[axis]
    everything = axis(indices=dict(zip(names, map(range, sizes), strict=True)))
    whole = empirical_ntk(model, x, space=everything)
    subsets = [list(itertools.combinations(range(size), 2)) for size in sizes]
    kernels = []
    for chosen in itertools.product(*subsets):
        space = axis(indices=dict(zip(names, chosen, strict=True)), rescale=True)
        kernels.append(empirical_ntk(model, x, space=space))
    kernels = torch.stack(kernels)
    torch.testing.assert_close(kernels.mean(dim=0), whole, rtol=1e-10, atol=1e-12)
    error = float((kernels - whole).square().flatten(1).sum(dim=1).mean())
    found = scatters(model, [x], axis(1), entries=LARGE)
    assert expected_error(found, 2) == pytest.approx(error, rel=1e-9)


def test_each_matrix_of_a_fused_weight_draws_for_itself():
    family = BY_NAME["gpt2"]
    model, inputs = family.build(), family.inputs(2)
    name = "transformer.h.1.attn.c_attn.weight"
    found = scatters(model, [inputs], Rows(1).at(name), entries=LARGE, reduce="margin")
    assert [(each.name, each.slices) for each in found] == [(name, 16)] * 3
    rows = slice_kernels(model, inputs, name, Rows, "margin")
    parts = [rows[i : i + 16] for i in (0, 16, 32)]
    expected = mean_error(parts, 1)
    assert expected_error(found, 1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", ["attention", "deberta", "twice", "mixture"])
def test_weights_that_no_batch_factor_serves(family):
    family = BY_NAME[family]
    model, inputs = family.build(), family.inputs(3)
    batches = [inputs]
    for axis in (Rows, Columns):
        found = scatters(model, batches, axis(1), entries=LARGE)
        names = list(dict.fromkeys(each.name for each in found))
        assert names == list(Architecture(model).targets)
        for name in names:
            own = [each for each in found if each.name == name]
            kernels = slice_kernels(model, inputs, name, axis)
            parts = Architecture(model).targets[name].parts
            if axis is Columns:
                parts = [range(len(kernels))]
            expected = sum(
                len(part) ** 2
                * (1 / 2 - 1 / len(part))
                * float(kernels[list(part)].var(dim=0).sum())
                for part in parts
            )
            assert expected_error(own, 2) == pytest.approx(
                expected, rel=1e-8, abs=1e-20
            )


def test_a_weight_that_the_outputs_do_not_use_has_no_error():
    model = Lambda(
        lambda m, x: m.head(torch.tanh(m.used(x))),
        used=nn.Linear(3, 4),
        unused=nn.Linear(3, 2),
        head=nn.Linear(4, 2),
    ).to(FLOAT)
    found = scatters(model, [torch.randn(3, 3, dtype=FLOAT)], Rows(1), entries=LARGE)
    by_name = {each.name: each for each in found}
    assert by_name["unused.weight"].variance == 0
    assert by_name["used.weight"].variance > 0


def test_batches_and_precision_do_not_matter(two_weights):
    model, x = two_weights
    one = scatters(model, [x], Rows(1), entries=LARGE)
    several = scatters(model, [x[:1], x[1:]], Rows(1), entries=LARGE)
    single = scatters(model.float(), [x.float()], Rows(1), entries=LARGE)
    for each, other, rounded in zip(one, several, single, strict=True):
        assert other.variance == pytest.approx(each.variance, rel=1e-12)
        assert rounded.variance == pytest.approx(each.variance, rel=1e-4)


def test_whole_weights_have_no_error(two_weights):
    model, x = two_weights
    (first, _) = scatters(model, [x], Rows(1), entries=LARGE)
    assert expected_error([first], 5) == 0
    assert first.error(5) == 0


@pytest.mark.parametrize("count", [0, 5])
def test_more_slices_than_there_are(two_weights, count):
    model, x = two_weights
    found = scatters(model, [x], Rows(1), entries=LARGE)
    with pytest.raises(SelectionError, match=r"count=\d slices cannot.*the 4 of '2.we"):
        expected_error(found, count)


def test_the_share_of_extreme_slices(two_weights):
    """One column that carries all: every other selection errs alike, and less."""
    model, x = two_weights
    x = x * torch.tensor([1.0, 0, 0, 0], dtype=FLOAT)
    first, second = scatters(model, [x], Columns(1), entries=LARGE)
    # Of slices k, 0, 0, 0 the first lies 3/4 k from their mean, the others 1/4 k.
    assert first.extreme == pytest.approx(9 / 12)
    share = extreme_share([first, second], 2)
    errors = first.error(2), second.error(2)
    expected = (first.extreme * errors[0] + second.extreme * errors[1]) / sum(errors)
    assert share == pytest.approx(expected)
    assert 0 < second.extreme < 1
    assert math.isclose(extreme_share([first], 3), 9 / 12)
