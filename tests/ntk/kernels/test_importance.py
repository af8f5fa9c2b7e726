"""Rows and columns drawn by importance: their odds, and estimates over seeds."""

import numpy as np
import pytest
import torch
from cases import BY_NAME, FLOAT
from covering import pairs
from dense import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ntk
from ntk.kernels.importance import (
    SampledSpace,
    inclusion_odds,
    sampled_ntk,
    systematic_sample,
)
from ntk.spaces.maps import Slices

AXES = ["rows", "columns"]


@pytest.fixture(scope="module")
def bert():
    family = BY_NAME["bert"]
    return family.build(), family.inputs()


@pytest.fixture(scope="module")
def net():
    """A net whose rows and columns differ much in size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh()),
            nn.Linear(24, 2),
        )
        for layer in (model[2], model[4]):
            layer.weight.data *= torch.logspace(-1, 1, layer.in_features)
        x = torch.randn(6, 24, dtype=FLOAT) * torch.logspace(-1, 0.5, 24, dtype=FLOAT)
        return model.to(FLOAT), x


def odds_of(model, axis, count, value=None):
    """Return equal odds for the rows or columns of all sampled weights."""
    sides = {
        name: of.outputs if axis == "rows" else of.inputs
        for name, of in ntk.spaces.kinds.Architecture(model).linear_weights.items()
    }
    return {name: (value or min(count, d) / d,) * d for name, d in sides.items()}


@given(
    scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_odds_add_up_to_the_count_and_keep_the_order_of_the_scores(scores, share):
    scores = np.array(scores)
    count = max(1, round(share * len(scores)))
    odds = inclusion_odds(scores, count)
    assert odds.sum() == pytest.approx(count)
    assert (odds > 0).all()
    assert (odds <= 1).all()
    order = np.argsort(scores)
    assert (np.diff(odds[order]) >= -1e-12).all()


def test_odds_by_hand():
    # Nine tenths by score, one tenth equal: 0.9 * (8, 1, 1, 0) / 10 + 0.1 / 4. The
    # first would exceed 1 and is clipped; one draw remains for the others.
    parts = np.array([0.745, 0.115, 0.115, 0.025])
    expected = np.array([1, *(parts[1:] / parts[1:].sum())])
    np.testing.assert_allclose(inclusion_odds(np.array([8.0, 1, 1, 0]), 2), expected)


def test_items_are_drawn_as_often_as_their_odds():
    odds = inclusion_odds(np.array([9.0, 4, 4, 1, 1, 1, 0, 0]), 3)
    generator = np.random.default_rng(0)
    draws = [systematic_sample(odds, generator) for _ in range(4000)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=len(odds)) / len(draws)
    error = np.sqrt(odds * (1 - odds) / len(draws))
    assert (np.abs(counts - odds) <= 4 * error).all()


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_the_number_of_draws_is_fixed(size, share, seed):
    generator = np.random.default_rng(seed)
    count = max(1, round(share * size))
    odds = inclusion_odds(generator.gamma(0.1, size=size), count)
    drawn = systematic_sample(odds, generator)
    assert len(drawn) == count
    assert len(set(drawn.tolist())) == count
    assert drawn.tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize(
    ("name", "axis", "kind"),
    pairs(["bert", "gpt2", "bloom", "t5", "mlp"], AXES, ["sgd", "signgd"]),
)
def test_draws_together_equal_each_by_the_definition(name, axis, kind):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    odds = {
        weight: tuple(inclusion_odds(np.linspace(0.2, 1.0, len(same)), 2).tolist())
        for weight, same in odds_of(model, axis, 2).items()
        if len(same) > 2
    }
    space = ntk.Rows(1) if kind == "signgd" else ntk.Full()
    draws = {
        f"draw {i}": SampledSpace(whole(space, model), 2, axis, odds, i)
        for i in range(3)
    }
    options = {"outputs": family.outputs, "kind": kind}
    together = ntk.empirical_ntk(model, inputs, space=draws, **options)
    for draw, one in draws.items():
        exact = ntk.empirical_ntk(
            model, inputs, space=one, implementation="jacobian", **options
        )
        assert_close(together[draw], exact, of=draw)
        assert_close(
            ntk.empirical_ntk(model, inputs, space=one, **options), exact, of=draw
        )


def whole(space, model):
    """Return the space; for signs without parameters whose gradient is rounding."""
    if isinstance(space, ntk.Full):
        return space
    names = ntk.spaces.kinds.Architecture(model).targets
    return ntk.Full().at(*names)


@pytest.mark.parametrize("axis", AXES)
def test_estimate_is_unbiased_over_seeds(net, axis):
    model, inputs = net
    for kind in ("sgd", "signgd"):
        exact = ntk.empirical_ntk(model, inputs, kind=kind)
        draws = torch.stack(
            [
                sampled_ntk(
                    *(model, inputs),
                    count=8,
                    axis=axis,
                    replicates=2,
                    seed=seed,
                    kind=kind,
                ).kernel
                for seed in range(200)
            ]
        )
        error = draws.std(dim=0) / len(draws) ** 0.5
        # Some entries are exact: all rows have equally many signs.
        away = (draws.mean(dim=0) - exact).abs() / (error + 1e-9 * exact.abs().max())
        # Entries of one draw are correlated: few are independent.
        assert float(away.max()) < 4


@pytest.mark.parametrize("axis", AXES)
def test_importance_has_smaller_errors_than_uniform_draws(net, axis):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs)
    other = ntk.Rows if axis == "rows" else ntk.Columns

    def error(kernels):
        return float(torch.stack([(k - exact).norm() for k in kernels]).square().mean())

    drawn = [
        sampled_ntk(model, inputs, count=8, axis=axis, replicates=2, seed=seed).kernel
        for seed in range(60)
    ]
    weights = [n for n, p in model.named_parameters() if p.ndim > 1 and n != "4.weight"]
    rest = ntk.Full().at(*(n for n, _ in model.named_parameters() if n not in weights))
    even = [
        ntk.empirical_ntk(
            model,
            inputs,
            space=other(8, strategy="random", seed=seed, rescale=True).at(*weights)
            + rest,
        )
        for seed in range(60)
    ]
    assert error(drawn) < 0.7 * error(even)


@pytest.mark.parametrize("axis", AXES)
def test_interval_covers_the_truth_as_often_as_it_says(net, axis):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs)
    inside = []
    for seed in range(200):
        estimate = sampled_ntk(
            model, inputs, count=96, axis=axis, replicates=8, seed=seed
        )
        low, high = estimate.interval()
        inside.append(((low <= exact) & (exact <= high)).double())
    assert float(torch.stack(inside).mean()) == pytest.approx(0.95, abs=0.03)


def test_weights_with_fewer_rows_than_draws_are_exact(bert):
    model, inputs = bert
    exact = ntk.empirical_ntk(model, inputs)
    found = sampled_ntk(model, inputs, count=8 * 1000)
    assert_close(found.kernel, exact)
    assert float(found.standard_error.abs().max()) < 1e-12 * float(exact.abs().max())


def test_head_and_tables_stay_exact(bert):
    model, _ = bert
    maps = SampledSpace(ntk.Full(), 2, "rows", odds_of(model, "rows", 2)).maps(model)
    drawn = {name for name, (each,) in maps.items() if isinstance(each, Slices)}
    assert drawn
    assert not any("classifier" in n or "embeddings" in n for n in drawn)


def test_margin_and_other_examples(bert):
    model, inputs = bert
    options = {"count": 8, "replicates": 2}
    whole_kernel = sampled_ntk(model, inputs, **options).kernel
    first = {key: value[:2] for key, value in inputs.items()}
    part = sampled_ntk(model, inputs, first, **options).kernel
    assert_close(part, whole_kernel[:, :2])
    trace = sampled_ntk(model, inputs, reduce="trace", **options).kernel
    assert_close(trace, torch.einsum("nmcc->nm", whole_kernel))


def test_odds_of_a_margin_use_its_gradients(net):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs, reduce="margin")
    found = sampled_ntk(model, inputs, reduce="margin", count=8 * 40)
    assert_close(found.kernel, exact)
    found = sampled_ntk(model, inputs, reduce="margin", count=64)
    assert 0 < found.relative_error() < 0.5


@pytest.mark.parametrize("restrict", [("at", "query"), ("layers", 0)])
def test_restricted_and_beside_others(bert, restrict):
    model, inputs = bert
    method, value = restrict
    odds = odds_of(model, "rows", 2)
    sampled = SampledSpace(ntk.Full(), 2, "rows", odds)
    inner = SampledSpace(getattr(ntk.Full(), method)(value), 2, "rows", odds)
    found = ntk.empirical_ntk(model, inputs, space=getattr(sampled, method)(value))
    part = ntk.empirical_ntk(model, inputs, space=inner)
    assert_close(found, part)
    beside = ntk.empirical_ntk(model, inputs, space=inner + ntk.Head())
    assert_close(beside, part + ntk.empirical_ntk(model, inputs, space=ntk.Head()))
    with pytest.raises(ntk.spaces.kinds.SelectionError, match="Estimate the whole sum"):
        ntk.empirical_ntk(model, inputs, space=inner + ntk.Rows(1))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        inclusion_odds(np.array([1.0, np.inf]), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": "diagonals"}, "'rows' or 'columns'"),
        ({"count": 12}, "rows=12 must be a multiple of replicates=8, such as 16"),
        ({"count": 12, "axis": "columns"}, "columns=12 must be a multiple"),
        ({"replicates": 1}, "at least 2"),
    ],
)
def test_bad_arguments_are_refused(bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampled_ntk(*bert, **arguments)
