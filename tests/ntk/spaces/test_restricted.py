"""Spaces with their choice fixed."""

import copy

import numpy as np
import pytest
import torch
from cases import BY_NAME
from dense import assert_close
from hypothesis import strategies as st

from ntk.kernels.empirical import empirical_ntk
from ntk.spaces.kinds import Bias, Columns, Rows
from ntk.spaces.restricted import Pinned
from rocoft.models.architecture import SelectionError

seeds = st.integers(0, 2**32 - 1)
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
METHODS = ("full", "rows:2", "columns:2", "rows:1+columns:1", "rows:2+bias", "lora:2")
METHODS += ("dora:2", "bitfit", "head", "probe", "masked rows:2")


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def pinned(space, model):
    """Return a space with the rows and columns that it has on a model."""
    return Pinned(space, space.maps(model))


def shuffled(model):
    """Return a copy with other weights, so that other rows are the largest."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(
                parameter.flatten()[torch.randperm(parameter.numel())].view_as(
                    parameter
                )
            )
    return changed


def test_pinned_rows_stay_when_the_weights_change(bert):
    space = Rows(2, strategy="max") + Columns(1, strategy="min") + Bias()
    fixed, changed = pinned(space, bert), shuffled(bert)
    inputs = BY_NAME["bert"].inputs()
    assert torch.equal(*(empirical_ntk(bert, inputs, space=s) for s in (space, fixed)))
    rows, columns = (explicit(part, bert) for part in space.parts[:2])
    by_hand = Rows(indices=rows) + Columns(indices=columns) + Bias()
    found, expected, moved = (
        empirical_ntk(changed, inputs, space=s) for s in (fixed, by_hand, space)
    )
    assert_close(found, expected, 1e-12)
    assert (found - moved).abs().max() > 1e-3 * found.abs().max()


def explicit(space, model):
    """Return by weight what a space takes, by hand: the rows of the largest norm."""
    found = {}
    for name, parameter in model.named_parameters():
        inside = ".layer." in name and parameter.ndim == 2
        if inside and isinstance(space, Rows):
            order = parameter.norm(dim=1).argsort(descending=True)
        elif inside:
            order = parameter.norm(dim=0).argsort()
        if inside:
            found[name] = tuple(sorted(order[: space.count].tolist()))
    return found


def test_pinned_spaces_are_restricted_and_added_like_others(bert):
    space, inputs = Rows(2, strategy="max"), BY_NAME["bert"].inputs()
    fixed = pinned(space, bert)
    assert isinstance(fixed, Pinned)
    assert fixed.name == "rows:2/strategy=max"
    for made in (
        lambda s: s.at("query"),
        lambda s: s.layers(1),
        lambda s: s.at("value").layers(-1) + Bias(),
    ):
        found, expected = (
            empirical_ntk(bert, inputs, space=made(s)) for s in (fixed, space)
        )
        assert torch.equal(found, expected)
    with pytest.raises(SelectionError, match="matches none"):
        fixed.at("nowhere").maps(bert)


def test_pinned_spaces_are_refused_by_other_models(bert):
    fixed = pinned(Rows(2, strategy="max"), bert)
    with pytest.raises(
        SelectionError, match="was pinned on a model with 'bert.enc.*GPT2"
    ):
        empirical_ntk(BY_NAME["gpt2"].build(), BY_NAME["gpt2"].inputs(), space=fixed)
