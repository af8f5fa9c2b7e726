"""Kernels in several passes: the same values, within the limit of each pass."""

import pytest
import torch
from cases import BY_NAME
from dense import assert_close
from hypothesis import given
from hypothesis import strategies as st
from parts import in_chunks

from ntk.kernels.empirical import compute
from ntk.kernels.engine import Engine
from ntk.kernels.options import KernelOptions
from ntk.scale import parts as chunks
from ntk.scale.parts import PassSize, packed
from ntk.spaces.kinds import Bias, Columns, Full, LoRA, Rows
from ntk.spaces.resolution import resolve

SPACES = {
    "full": Full(),
    "rows": Rows(3),
    "other rows": Rows(2, strategy="max"),
    "columns": Columns(2, strategy="last"),
    "both": Rows(2) + Columns(2),
    "estimate": Rows(1, strategy="random", rescale=True),
    "sum": LoRA(2) + Rows(1) + Bias(),
}


def halves(family, n=4):
    """Return a model and its examples as two batches."""
    model = BY_NAME[family].build()
    whole = BY_NAME[family].inputs(n)
    return model, [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]


@pytest.mark.parametrize(
    ("family", "entries"),
    # T5 serves some weights by single examples, which is slow in many passes.
    [("bert", 3_000), ("bert", 10**9), ("gpt2", 3_000), ("t5", 20_000)],
)
@pytest.mark.parametrize("reduce", ["full", "trace", "margin"])
def test_passes_add_up(family, entries, reduce):
    model, batches = halves(family)
    whole = compute(
        model, batches, 1, spaces=SPACES, options=KernelOptions(reduce=reduce)
    )
    found = in_chunks(model, batches, 1, spaces=SPACES, entries=entries, reduce=reduce)
    for name in SPACES:
        assert_close(found.kernels[name], whole.kernels[name], 1e-12, of=name)
        assert found.traces[name] == pytest.approx(whole.traces[name], rel=1e-9)
    assert found.sizes == whole.sizes
    assert found.services == whole.services


@pytest.mark.parametrize("reduce", ["full", "margin"])
def test_no_pass_exceeds_its_limit(monkeypatch, reduce):
    model, batches = halves("bert")
    kept, store = [], Engine._store

    def storing(engine, side, *rest):
        stored = store(engine, side, *rest)
        # The right examples come first and stay beside the others.
        held = kept.pop() if side is not engine.right else 0
        kept.append(held + sum(numbers(value) for value in stored.values()))
        return stored

    monkeypatch.setattr(Engine, "_store", storing)
    for entries in (3_000, 6_000, 10**9):
        kept.clear()
        in_chunks(model, batches, 1, spaces=SPACES, entries=entries, reduce=reduce)
        if entries == 10**9:
            assert len(kept) == 1
            # The size known in advance is at least the size in the pass.
            size = PassSize.of(model, batches, KernelOptions(reduce=reduce))
            spaces = resolve(SPACES, model)
            known = chunks.Architecture(model)
            assert len(chunks.chunks(spaces, known, size, kept[0] - 1)) > 1
        else:
            assert len(kept) > 2
            assert max(kept) <= entries


def numbers(stored):
    """Count the numbers stored for one parameter."""
    if isinstance(stored, torch.Tensor):
        return stored.numel()
    factors = [factor for batch in stored for factor in batch]
    return sum(
        sum(g.numel() for g in factor.g) + getattr(factor, "x", torch.empty(0)).numel()
        for factor in factors
    )


def test_the_same_request_gives_the_same_bits():
    model, batches = halves("bert")
    model.float()
    one, other = (
        in_chunks(model, batches, 1, spaces=SPACES, entries=6_000) for _ in range(2)
    )
    for name in SPACES:
        assert torch.equal(one.kernels[name], other.kernels[name])


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_packed_keeps_the_order_and_the_limit(sizes, most):
    groups = packed(dict(enumerate(sizes)), most)
    assert [item for group in groups for item in group] == list(range(len(sizes)))
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        total = sum(sizes[i] for i in group)
        assert total <= most or len(group) == 1
        if following:
            assert total + sizes[following[0]] > most
