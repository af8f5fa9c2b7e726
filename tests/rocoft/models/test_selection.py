"""Strategies against twins that are obvious, and what every selection promises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rocoft.commands.choices import STRATEGIES
from rocoft.models.architecture import LinearWeight, SelectionError
from rocoft.models.selection import DATA_STRATEGIES, select

AXES = ("row", "column")


def plain(outputs, inputs, name="layer.weight"):
    return LinearWeight(name, "layer", outputs, inputs, 0, (tuple(range(outputs)),))


def fused(outputs, inputs):
    thirds = [tuple(range(k, outputs, 3)) for k in range(3)]
    return LinearWeight("qkv.weight", "qkv", outputs, inputs, 0, tuple(thirds))


def twin(values, axis, count, strategy, statistics=None):
    """Sort Python numbers; equal scores fall to the lower index."""
    matrix = values.tolist() if axis == "row" else values.T.tolist()
    if strategy == "first":
        return set(range(count))
    if strategy == "last":
        return set(range(len(matrix) - count, len(matrix)))
    if strategy == "gradient":
        scores = statistics.tolist()
    elif strategy == "activation":
        norms = statistics.tolist()
        scores = [
            sum(
                abs(entry) * norms[j if axis == "row" else i]
                for j, entry in enumerate(line)
            )
            for i, line in enumerate(matrix)
        ]
    else:
        scores = [sum(entry**2 for entry in line) for line in matrix]
    ranked = sorted(range(len(matrix)), key=lambda i: -scores[i])
    if strategy == "min":
        return set(ranked[len(ranked) - count :])
    if strategy == "mixed":
        small = count // 2
        return set(ranked[: count - small]) | set(ranked[len(ranked) - small :])
    return set(ranked[:count])


def statistics_of(strategy, axis, outputs, inputs):
    if strategy not in DATA_STRATEGIES:
        return None
    by_row = strategy == "gradient" and axis == "row"
    return torch.rand(outputs if by_row else inputs, dtype=torch.float64)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_strategy_agrees_with_its_twin(strategy, axis, count):
    values = torch.randn(7, 6, dtype=torch.float64)
    statistics = statistics_of(strategy, axis, 7, 6)
    chosen = select(plain(7, 6), values, axis, count, strategy, statistics=statistics)
    assert set(chosen) == twin(values, axis, count, strategy, statistics)


def test_equal_scores_fall_to_the_lower_index():
    values = torch.ones(6, 4)
    assert select(plain(6, 4), values, "row", 2, "max") == (0, 1)
    assert select(plain(6, 4), values, "row", 2, "min") == (4, 5)
    assert select(plain(6, 4), values, "row", 3, "mixed") == (0, 1, 5)
    # Sorts that are not stable keep the order of a few numbers alone.
    values = torch.ones(5000, 1)
    chosen = select(plain(5000, 1), values, "row", 50, "max")
    assert chosen == tuple(range(50))


def test_random_is_reproducible_and_its_own_for_every_weight():
    values = torch.zeros(100, 4)

    def rows(name="layer.weight", seed=0):
        return select(plain(100, 4, name), values, "row", 5, "random", seed=seed)

    torch.manual_seed(7)
    first = rows()
    torch.manual_seed(8)
    assert rows() == first
    assert rows(seed=1) != first
    assert rows(name="other.weight") != first


def test_random_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    select(plain(10, 4), torch.zeros(10, 4), "row", 5, "random")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_selects_every_row_equally_often():
    counts = torch.zeros(6)
    for seed in range(600):
        chosen = select(plain(6, 2), torch.zeros(6, 2), "row", 2, "random", seed=seed)
        counts[list(chosen)] += 1
    # 200 expected with a standard deviation of 11.5.
    assert (counts - 200).abs().max() < 50, counts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_selected_in_every_fused_part(strategy):
    weight = fused(12, 5)
    values = torch.randn(12, 5, dtype=torch.float64)
    statistics = statistics_of(strategy, "row", 12, 5)
    chosen = select(weight, values, "row", 2, strategy, statistics=statistics)
    for part in weight.parts:
        own = [i for i in chosen if i in part]
        assert len(own) == 2
        if strategy != "random":
            scores = None if strategy != "gradient" else statistics[list(part)]
            scores = statistics if strategy == "activation" else scores
            expected = twin(values[list(part)], "row", 2, strategy, scores)
            assert set(own) == {part[i] for i in expected}


@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    axis=st.sampled_from(AXES),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_indices_are_valid(outputs, inputs, axis, strategy, seed, data):
    available = outputs if axis == "row" else inputs
    count = data.draw(st.integers(1, available))
    values = torch.randint(-2, 3, (outputs, inputs)).double()
    chosen = select(
        plain(outputs, inputs),
        values,
        axis,
        count,
        strategy,
        seed=seed,
        statistics=statistics_of(strategy, axis, outputs, inputs),
    )
    assert len(set(chosen)) == len(chosen) == count
    assert list(chosen) == sorted(chosen)
    assert set(chosen) <= set(range(available))
    assert all(type(i) is int for i in chosen)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("count", [0, -1, 8])
def test_count_out_of_range_is_refused(axis, count):
    message = rf"{axis}s={count} cannot be selected from 'layer.weight', which has 7"
    with pytest.raises(SelectionError, match=message):
        select(plain(7, 7), torch.zeros(7, 7), axis, count)


def test_count_above_a_fused_part_is_refused():
    with pytest.raises(SelectionError, match="4 rows in each fused part"):
        select(fused(12, 20), torch.zeros(12, 20), "row", 5)


def test_unknown_strategy_is_refused():
    with pytest.raises(SelectionError, match="strategy='best' is unknown. Choose one"):
        select(plain(4, 4), torch.zeros(4, 4), "row", 1, "best")


@pytest.mark.parametrize("strategy", DATA_STRATEGIES)
def test_strategy_without_its_statistics_is_refused(strategy):
    with pytest.raises(SelectionError, match=f"{strategy}.* needs examples"):
        select(plain(4, 4), torch.zeros(4, 4), "row", 1, strategy)
