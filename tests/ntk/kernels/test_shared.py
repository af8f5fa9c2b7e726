"""Spaces that share features, against each space computed alone."""

import pickle
import subprocess
import sys

import pytest
import torch
from cases import BY_NAME
from covering import pairs
from dense import assert_close

from ntk.kernels import accumulator
from ntk.kernels.empirical import compute
from ntk.kernels.options import KINDS, KernelOptions
from ntk.kernels.shared import shared_features
from ntk.spaces.kinds import Columns, Full, LoRA, Rows
from ntk.spaces.maps import InputSide

SPACES = {
    "full": Full(),
    "rows": Rows(2),
    "other rows": Rows(3, strategy="random"),
    "rescaled rows": Rows(2, strategy="last", rescale=True),
    "columns": Columns(2),
    "other columns": Columns(3, strategy="random", seed=1),
    "rescaled columns": Columns(1, strategy="last", rescale=True),
    "both": Rows(2) + Columns(2),
    "both, elsewhere": Rows(1, strategy="last") + Columns(3, strategy="random"),
    "both, rescaled": Rows(2, rescale=True) + Columns(1, rescale=True),
    "pairs": LoRA(2),
    "other pairs": LoRA(3, seed=5, alpha=2),
    "rows and pairs": Rows(1) + LoRA(2),
}
FAMILIES = ["bert", "gpt2", "bloom", "albert"]


@pytest.mark.parametrize(
    ("family", "kind", "reduce"), pairs(FAMILIES, KINDS, ["full", "trace"])
)
def test_spaces_together_equal_each_alone(family, kind, reduce):
    model, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    options = {"kind": kind, "reduce": reduce}
    found = compute(model, inputs, spaces=SPACES, options=KernelOptions(**options))
    for name, space in SPACES.items():
        if (kind, name) == ("signgd", "full"):
            continue  # A key's bias has a gradient of rounding alone.
        alone = compute(
            model,
            inputs,
            spaces={name: space},
            options=KernelOptions(implementation="jacobian", **options),
        )
        assert_close(found.kernels[name], alone.kernels[name], of=name)
        for parameter, trace in alone.traces[name].items():
            assert found.traces[name][parameter] == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_several_batches_equal_one(size):
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs()
    whole = compute(model, inputs, spaces=SPACES)
    parts = compute(
        model, inputs, spaces=SPACES, options=KernelOptions(batch_size=size)
    )
    for name in SPACES:
        assert_close(parts.kernels[name], whole.kernels[name], of=name)


def test_two_sides_equal_slices_of_one():
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs()
    few = {key: value[1:] for key, value in inputs.items()}
    whole = compute(model, inputs, spaces=SPACES)
    sides = compute(model, inputs, few, spaces=SPACES)
    for name in SPACES:
        assert_close(sides.kernels[name], whole.kernels[name][:, 1:], of=name)


def test_maps_of_the_input_side_share_features():
    model = BY_NAME["bert"].build()
    chosen = ("columns", "other columns", "pairs", "other pairs")
    maps = {name: SPACES[name].maps(model) for name in chosen}
    found = shared_features(maps)
    assert len(found) == len(maps["columns"])
    for each in found:
        assert isinstance(each.stored, InputSide)
        assert len(each.stored.pairs) == 2
        assert len(each.members) == 4


@pytest.mark.parametrize(("small", "waiting"), [(0, 0), (2**17, 0), (2**40, 2**40)])
def test_buffering_changes_nothing(small, waiting, monkeypatch):
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs()
    first = {key: value[:2] for key, value in inputs.items()}
    spaces = {name: space for name, space in SPACES.items() if name != "full"}
    expected = {
        name: compute(model, inputs, first, spaces={name: space})
        for name, space in spaces.items()
    }
    traces = compute(
        model, inputs, spaces=spaces, options=KernelOptions(implementation="jacobian")
    ).traces
    monkeypatch.setattr(accumulator, "SMALL_FEATURES", small)
    monkeypatch.setattr(accumulator, "WAITING_FEATURES", waiting)
    for name, space in spaces.items():
        found = compute(
            model,
            inputs,
            first,
            spaces={name: space},
            left_bytes=1,
            options=KernelOptions(batch_size=2),
        )
        assert_close(found.kernels[name], expected[name].kernels[name], of=name)
        square = compute(model, inputs, spaces={name: space})
        assert_close(square.kernels[name][:, :2], found.kernels[name], of=name)
        for parameter, trace in traces[name].items():
            assert square.traces[name][parameter] == pytest.approx(trace, rel=1e-9)


def test_features_of_the_input_side_are_those_of_its_parts():
    of = next(iter(Columns(1).maps(BY_NAME["bert"].build()).values()))[0].of
    pairs = tuple(
        LoRA(r, seed=r, alpha=3).maps(BY_NAME["bert"].build())[of.name][0]
        for r in (2, 1)
    )
    stored = InputSide(of, (0, 3), pairs)
    g = torch.randn(2, 5, of.outputs, dtype=torch.float64)
    x = torch.randn(2, 5, of.inputs, dtype=torch.float64)
    out = torch.empty(2, stored.size(()), dtype=torch.float64)
    stored.add(g, stored.prepare(x), out, first=True)
    whole = torch.einsum("nto,nti->noi", g, x)
    parts = [whole[:, :, 0], whole[:, :, 3]]
    for pair in pairs:
        low = torch.einsum("noi,ri->nro", whole, pair.scaling * pair.down)
        parts += low.unbind(1)
    assert_close(out, torch.cat(parts, dim=1))
    stored.add(g, stored.prepare(x), out, first=False)
    assert_close(out, 2 * torch.cat(parts, dim=1))


def test_rescaled_spaces_together_are_exact_in_float64():
    # The weights d / r of rows and columns are not exact in float32.
    model, inputs = BY_NAME["bert"].build(), BY_NAME["bert"].inputs()
    spaces = {
        f"{family.__name__} {count}": family(count, rescale=True)
        for family in (Rows, Columns, LoRA)
        for count in (1, 3)
    }
    together = compute(model, inputs, spaces=spaces).kernels
    for name, space in spaces.items():
        alone = compute(model, inputs, spaces={name: space}).kernels[name]
        error = (together[name] - alone).norm() / alone.norm()
        assert error < 1e-13


@pytest.mark.slow
def test_maps_from_another_process_are_the_same():
    """Hashes of strings differ between processes, and plans are sent between them."""
    model = BY_NAME["bert"].build()
    mine = (Rows(2) + Columns(1) + LoRA(2)).maps(model)
    code = "import pickle, sys; maps = pickle.load(sys.stdin.buffer); "
    code += "hashed = {map_ for held in maps.values() for map_ in held}; "
    code += "sys.stdout.buffer.write(pickle.dumps(maps))"
    command = [sys.executable, "-c", code]
    there = subprocess.run(
        command, input=pickle.dumps(mine), stdout=subprocess.PIPE, check=True
    )
    theirs = pickle.loads(there.stdout)
    for name, maps in mine.items():
        assert set(theirs[name]) == set(maps), name
