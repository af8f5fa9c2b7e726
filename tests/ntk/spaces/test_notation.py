"""Spaces as text: round trips, and errors for invalid text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk.spaces.kinds import (
    Bias,
    Columns,
    Embeddings,
    Full,
    Head,
    LoRA,
    Norm,
    Rows,
    Sum,
)
from ntk.spaces.notation import SPACES, parse_space
from rocoft.commands.choices import STRATEGIES
from rocoft.models.architecture import SelectionError

names = st.text("abcxyz_.*?0189", min_size=1, max_size=10)
patterns = st.lists(names, max_size=3).map(tuple)
blocks = st.lists(st.integers(-12, 30), max_size=3).map(tuple)
where = {"patterns": patterns, "blocks": blocks}
seeds = st.integers(-5, 10**6)
options = {
    "strategy": st.sampled_from(STRATEGIES),
    "seed": seeds,
    "rescale": st.booleans(),
}
counts = st.integers(1, 4096)
indices = st.lists(st.integers(0, 4096), min_size=1, max_size=4).map(tuple)
sliced = [
    st.builds(family, **{field: values}, **options, **where)
    for family in (Rows, Columns)
    for field, values in (("count", counts), ("indices", indices))
]
lora = st.builds(
    LoRA,
    st.none() | st.integers(1, 256),
    seed=seeds,
    alpha=st.none() | st.integers(1, 999).map(lambda n: n / 8),
    rescale=st.booleans(),
    **where,
)
whole = [st.builds(kind, **where) for kind in (Full, Bias, Head, Norm, Embeddings)]
single = st.one_of(*sliced, lora, *whole)
spaces = single | st.lists(single, min_size=2, max_size=3).map(
    lambda parts: Sum(tuple(parts))
)


@given(spaces)
def test_what_is_written_is_read_back(space):
    assert parse_space(str(space)) == space


@pytest.mark.parametrize("alpha", [1 / 3, 1e6, 1234567.0])
def test_alpha_is_written_exactly(alpha):
    space = LoRA(8, alpha=alpha) + Bias()
    assert parse_space(str(space)) == space


@pytest.mark.parametrize(
    ("text", "space"),
    [
        (
            "rows:3@query,value/layers=0,11+bias",
            Rows(3).at("query", "value").layers(0, 11) + Bias(),
        ),
        (" rows:1 + columns:2 ", Rows(1) + Columns(2)),
        ("lora:8/alpha=16", LoRA(8, alpha=16)),
        ("lora:8/alpha=2e-07", LoRA(8, alpha=2e-7)),
        ("lora", LoRA()),
        ("columns/indices=0,5", Columns(indices=(0, 5))),
        ("rows:4/rescale/strategy=random", Rows(4, strategy="random", rescale=True)),
        ("full@*.LayerNorm.*", Full().at("*.LayerNorm.*")),
    ],
)
def test_what_a_person_writes(text, space):
    assert parse_space(text) == space


def test_every_name_is_of_its_space():
    for name, kind in SPACES.items():
        arguments = "/indices=1" if name in {"rows", "columns"} else ""
        assert type(parse_space(name + arguments)) is kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is none of full, rows"),
        ("rowz:3", "'rowz' is none of full, rows"),
        ("rows:3+", "'' is none of"),
        ("Rows:3", "'Rows' is none of"),
        ("rows", "needs either a count"),
        ("rows:2/indices=1", "not both"),
        ("rows:x", "number cannot be 'x'"),
        ("rows:", "number cannot be ''"),
        ("rows:1.5", "number cannot be '1.5'"),
        ("bias:3", "'bias' takes no number"),
        ("rows:3/layers=", "layers cannot be ''"),
        ("rows:3/layers=0;1", "layers cannot be '0;1'"),
        ("rows:3/layer=0", "option 'layer=0' is none of layers=..."),
        ("rows:3/rescale=1", "option 'rescale=1'"),
        ("rows:3/alpha=2", "'rows' does not take alpha"),
        ("lora:8/strategy=random", "'lora' does not take .*strategy"),
        ("bias/seed=1", "'bias' does not take seed"),
        ("lora:0", "rank=0 must be at least 1"),
        ("lora:8/alpha=big", "alpha cannot be 'big'"),
    ],
)
def test_refused(text, message):
    with pytest.raises(SelectionError, match=message):
        parse_space(text)
