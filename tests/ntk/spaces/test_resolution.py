"""Cached resolved spaces against newly resolved ones."""

import warnings

import pytest
import torch
from cases import BY_NAME
from torch import nn

from ntk.spaces.kinds import Bias, Columns, Full, Head, LoRA, Rows
from ntk.spaces.resolution import resolve
from rocoft.models.architecture import SelectionError

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_resolution_follows_changes_of_the_model():
    bert = BY_NAME["bert"].build()
    spaces = {"full": Full(), "rows": Rows(2, strategy="random"), "lora": LoRA(2)}
    fresh = lambda: {name: space.maps(bert) for name, space in spaces.items()}
    first = resolve(spaces, bert)
    again = resolve(spaces, bert)
    assert first == fresh()
    assert all(first[name] is again[name] for name in spaces)
    name, parameter = next(iter(bert.named_parameters()))
    parameter.requires_grad_(False)
    assert name not in resolve(spaces, bert)["full"]
    layer = bert.get_submodule(QUERY.removesuffix(".weight"))
    narrow = nn.Linear(layer.in_features, 3)
    bert.set_submodule(QUERY.removesuffix(".weight"), narrow)
    assert resolve(spaces, bert) == fresh()
    assert resolve(spaces, bert)["rows"][QUERY][0].of.outputs == 3


def test_resolution_follows_the_weights_where_selections_do():
    bert = BY_NAME["bert"].build()
    spaces = {"largest": Rows(1, strategy="max") + LoRA(2)}
    before = resolve(spaces, bert)["largest"][QUERY][0].rows
    row = (before[0] + 1) % 4
    bert.get_parameter(QUERY).data[row] = 100.0
    assert resolve(spaces, bert)["largest"][QUERY][0].rows == (row,)


def test_a_selection_that_leaves_out_experts_warns_with_the_share():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.ones(3, 4, 4))

    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), Experts()]), nn.Linear(4, 2))
    for space in (Rows(1), Columns(1) + Bias(), LoRA(2)):
        with pytest.warns(UserWarning, match=r"75 % .* such as '0\.1\.down_proj'"):
            resolve({"": space}, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve({"": Full(), "head": Head(), "named": Rows(1).at("0")}, model)


def test_a_narrow_weight_does_not_refuse_a_selection():
    model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)]))
    model.append(nn.Linear(1, 2))
    with pytest.warns(UserWarning, match="1 of 2 targeted weights have fewer rows"):
        maps = resolve({"": Rows(3)}, model)[""]
    assert [maps[f"0.{i}.weight"][0].rows for i in (0, 1)] == [(0, 1, 2), (0,)]
    with pytest.raises(SelectionError, match="Choose a number from 1 to 4"):
        resolve({"": Rows(5)}, model)
