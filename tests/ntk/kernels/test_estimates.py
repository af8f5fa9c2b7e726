"""Kernels of random projections: against the definition, and over seeds."""

import pytest
import torch
from cases import BY_NAME, FLOAT
from dense import assert_close
from torch import nn

import ntk
from ntk.kernels.estimates import SketchedSpace, sketched_ntk
from ntk.spaces.maps import Sketch


@pytest.fixture(scope="module")
def bert():
    family = BY_NAME["bert"]
    return family.build(), family.inputs()


@pytest.fixture(scope="module")
def net():
    """A net whose weights are all larger than their sketches here."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh()),
            nn.Linear(20, 3),
        )
        return model.to(FLOAT), torch.randn(6, 30, dtype=FLOAT)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bloom", "mlp"])
@pytest.mark.parametrize("entries", [5, 16])
def test_sketch_is_the_same_by_factors_and_by_the_definition(name, entries):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    space = SketchedSpace(ntk.Full(), entries, seed=3)
    arguments = {"space": space, "outputs": family.outputs}
    exact = ntk.empirical_ntk(model, inputs, **arguments, implementation="jacobian")
    for name in ("factors", "jvp"):
        found = ntk.empirical_ntk(model, inputs, **arguments, implementation=name)
        assert_close(found, exact, of=name)


def test_features_are_signed_sums_of_the_gradient_entries():
    """One layer, by hand: every entry is added to one coordinate with a sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 2)).to(FLOAT)
    space = SketchedSpace(ntk.Full().at("0"), 4)
    ((sketch,),) = space.maps(model).values()
    x = torch.randn(3, 7, dtype=FLOAT)
    (h, a), (k, b) = sketch._drawn
    features = torch.zeros(3, 2, 4, dtype=FLOAT)
    for n in range(3):
        for i in range(5):
            for j in range(7):
                gradient = model[1].weight[:, i].detach() * x[n, j]
                features[n, :, (h[i] + k[j]) % 4] += a[i] * b[j] * gradient
    expected = torch.einsum("ncp,mdp->nmcd", features, features)
    assert_close(ntk.empirical_ntk(model, x, space=space), expected)


def test_head_and_tables_stay_exact(bert):
    model, _ = bert
    maps = SketchedSpace(ntk.Full(), 4).maps(model)
    sketched = {name for name, (each,) in maps.items() if isinstance(each, Sketch)}
    assert sketched
    assert not any("classifier" in n or "embeddings" in n for n in sketched)


def test_estimate_is_unbiased_over_seeds(bert):
    model, inputs = bert
    exact = ntk.empirical_ntk(model, inputs)
    draws = torch.stack(
        [
            sketched_ntk(model, inputs, entries=32, replicates=2, seed=seed).kernel
            for seed in range(200)
        ]
    )
    error = draws.std(dim=0) / len(draws) ** 0.5
    away = ((draws.mean(dim=0) - exact) / error).abs()
    # Of 200 distinct entries hardly one is off by three standard errors, none by four.
    assert float((away > 3).double().mean()) < 0.03
    assert float(away.max()) < 4.5


def test_error_falls_with_the_square_root_of_the_entries(net):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs)

    def error(entries):
        squares = [
            (sketched_ntk(model, inputs, entries=entries, replicates=2, seed=s).kernel)
            .sub(exact)
            .square()
            .sum()
            for s in range(200)
        ]
        return float(torch.stack(squares).mean().sqrt())

    few, many = error(16), error(128)
    slope = torch.tensor(many / few).log() / torch.tensor(128 / 16).log()
    assert float(slope) == pytest.approx(-0.5, abs=0.08)


@pytest.mark.parametrize(
    ("replicates", "entries"),
    [
        (8, 64),
        pytest.param(4, 64, marks=pytest.mark.slow),
        pytest.param(16, 128, marks=pytest.mark.slow),
    ],
)
def test_interval_covers_the_truth_as_often_as_it_says(net, replicates, entries):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs)
    inside = []
    for seed in range(200):
        estimate = sketched_ntk(
            model, inputs, entries=entries, replicates=replicates, seed=seed
        )
        low, high = estimate.interval()
        inside.append(((low <= exact) & (exact <= high)).double())
    assert float(torch.stack(inside).mean()) == pytest.approx(0.95, abs=0.03)


def test_relative_error_matches_the_actual_one(net):
    model, inputs = net
    exact = ntk.empirical_ntk(model, inputs)
    said, made = [], []
    for seed in range(40):
        estimate = sketched_ntk(model, inputs, entries=256, seed=seed)
        said.append(estimate.relative_error())
        made.append(float((estimate.kernel - exact).norm() / exact.norm()))
    mean = lambda values: sum(v * v for v in values) ** 0.5
    assert mean(said) == pytest.approx(mean(made), rel=0.15)


def test_estimate_is_positive_semi_definite_and_consistent_in_blocks(bert):
    model, inputs = bert
    whole = sketched_ntk(model, inputs, entries=64).kernel
    gram = ntk.gram_matrix(whole)
    assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-9 * float(gram.diagonal().max())
    first = {key: value[:2] for key, value in inputs.items()}
    assert_close(sketched_ntk(model, first, inputs, entries=64).kernel, whole[:2])


def test_small_spaces_are_exact(bert):
    model, inputs = bert
    spaces = {"rows": ntk.Rows(1), "biases": ntk.Bias(), "tables": ntk.Embeddings()}
    exact = ntk.empirical_ntk(model, inputs, space=spaces)
    for name, found in sketched_ntk(model, inputs, space=spaces, entries=64).items():
        assert_close(found.kernel, exact[name], of=name)
        assert float(found.standard_error.abs().max()) < 1e-12 * float(
            exact[name].abs().max()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicates": 1}, "replicates=1 must be at least 2"),
        ({"entries": 100}, "such as 96"),
        ({"entries": 4}, "such as 8"),
    ],
)
def test_entries_that_cannot_be_divided_are_refused(bert, arguments, message):
    with pytest.raises(ValueError, match=message):
        sketched_ntk(*bert, **arguments)


def test_signs_of_gradients_are_refused(bert):
    model, inputs = bert
    with pytest.raises(ValueError, match="kind='signgd' needs every"):
        ntk.empirical_ntk(
            model, inputs, space=SketchedSpace(ntk.Full(), 8), kind="signgd"
        )


def test_level_of_an_interval_is_checked(bert):
    with pytest.raises(ValueError, match="level=1 must"):
        sketched_ntk(*bert, entries=16).interval(1)
