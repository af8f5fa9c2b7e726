"""Rules that choose layers against plain loops, exhaustive search and autograd."""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import BY_NAME
from hypothesis import given
from hypothesis import strategies as st

from ntk.kernels.layerwise import LayerKernel, combined, layer_kernels
from ntk.layer_selection.rules import (
    Budget,
    first_layers,
    gradient_norm,
    kernel_alignment,
    last_layers,
    least_growth,
    random_layers,
    starting_residual,
    target_aware,
)
from ntk.measures.distance import alignment
from ntk.measures.gram import gram_matrix
from ntk.measures.risk import RidgeRegression
from ntk.measures.spectrum import NotPSDError
from ntk.spaces.kinds import LoRA
from rocoft.models.architecture import SelectionError

seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def layers_of(*grams, parameters=None):
    """Return layers "0", "1", ..., by default with one parameter each."""
    sizes = parameters or [1] * len(grams)
    return {
        str(i): LayerKernel(torch.as_tensor(np.asarray(gram, float)), size)
        for i, (gram, size) in enumerate(zip(grams, sizes, strict=True))
    }


def problem(count, k, seed, rank=2):
    """Return layers of different scale and size, and targets."""
    rng = np.random.default_rng(seed)
    grams = []
    for _ in range(count):
        x = rng.normal(size=(k, rank)) * 10 ** rng.uniform(-1, 1)
        grams.append(x @ x.T)
    sizes = rng.integers(1, 9, size=count).tolist()
    return layers_of(*grams, parameters=sizes), rng.normal(size=k)


def unexplained(layers, chosen, r, epsilon=1e-3):
    """Return r'(K_S + s I)^-1 r by an inverse."""
    grams = {name: each.kernel.numpy() for name, each in layers.items()}
    k = len(r)
    s = epsilon * np.trace(sum(grams.values())) / k
    K = sum((grams[name] for name in chosen), np.zeros((k, k)))
    return r @ np.linalg.inv(K + s * np.eye(k)) @ r


# The target-aware rule


def filled(layers, chosen, among, r, room):
    """Add layers greedily by the largest drop per parameter; return them and scores."""
    chosen, scores = list(chosen), []
    cost = lambda names: sum(layers[name].parameters for name in names)
    while True:
        now = unexplained(layers, chosen, r)
        drops = {
            name: (now - unexplained(layers, [*chosen, name], r))
            / layers[name].parameters
            for name in among
            if name not in chosen and cost([*chosen, name]) <= room
        }
        if not drops:
            return chosen, scores
        best = max(drops, key=drops.get)
        chosen.append(best)
        scores.append(drops[best] / unexplained(layers, [], r))


@given(st.integers(1, 5), st.integers(2, 8), seeds)
def test_target_aware_is_a_plain_loop(count, k, seed):
    layers, r = problem(count, k, seed)
    cost = lambda names: sum(layers[name].parameters for name in names)
    chosen, _ = filled(layers, [], layers, r, 12)
    while True:
        for count in (1, 2):
            swaps = [
                names
                for names in combinations(layers, len(chosen))
                if len(set(names) - set(chosen)) == count and cost(names) <= 12
            ]
            best = min(swaps, key=lambda s: unexplained(layers, s, r), default=chosen)
            if unexplained(layers, best, r) < unexplained(layers, chosen, r):
                break
        else:
            break
        chosen, _ = filled(layers, best, layers, r, 12)
    order, scores = filled(layers, [], chosen, r, 12)
    result = target_aware(layers, r, budget=Budget(parameters=12))
    assert (result.rule, result.layers) == ("target-aware", tuple(order))
    assert result.parameters == cost(order)
    close(result.scores, scores)


@given(st.integers(1, 5), seeds)
def test_scores_add_up_to_what_the_regression_explains(count, seed):
    layers, r = problem(count, 6, seed)
    result = target_aware(layers, r, epsilon=1e-2)
    assert set(result.layers) == set(layers)
    K = combined(layers).numpy()
    ridge = 1e-2 * np.trace(K) / 6
    left = RidgeRegression.of(K, r).optimum(ridge) / (r**2).mean()
    drops = np.array(result.scores) * [layers[n].parameters for n in result.layers]
    close(drops.sum(), 1 - left)
    assert np.all(drops >= -1e-12)


def exhaustive(layers, count, r):
    """Return the minimum unexplained over all sets of `count` layers."""
    return min(unexplained(layers, each, r) for each in combinations(layers, count))


@given(st.integers(2, 5), seeds)
def test_greedy_is_the_best_of_all_subsets_where_layers_do_not_overlap(count, seed):
    """Each layer explains different examples, so that drops add up."""
    rng = np.random.default_rng(seed)
    k = 2 * count
    grams = []
    for i in range(count):
        x = np.zeros((k, 3))
        x[2 * i : 2 * i + 2] = rng.normal(size=(2, 3))
        grams.append(x @ x.T)
    layers, r = layers_of(*grams), rng.normal(size=k)
    for size in range(1, count + 1):
        result = target_aware(layers, r, budget=Budget(layers=size))
        assert len(result.layers) == size
        close(unexplained(layers, result.layers, r), exhaustive(layers, size, r))


def test_exchange_finds_the_best_of_all_subsets_that_greedy_misses():
    missed = {"greedy": [], "exchange": []}
    for seed in range(30):
        layers, r = problem(6, 10, seed)
        layers = {n: LayerKernel(each.kernel, 1) for n, each in layers.items()}
        whole = unexplained(layers, [], r)
        for size in (1, 2, 3, 4):
            best = exhaustive(layers, size, r)
            chosen = {
                "greedy": filled(layers, [], layers, r, size)[0],
                "exchange": target_aware(layers, r, budget=Budget(layers=size)).layers,
            }
            left = {rule: unexplained(layers, c, r) for rule, c in chosen.items()}
            assert best * (1 - 1e-9) <= left["exchange"] <= left["greedy"] * (1 + 1e-9)
            for rule, loss in left.items():
                missed[rule].append((loss - best) / (whole - best))
            if size == 1:
                assert missed["exchange"][-1] < 1e-9
    assert max(missed["greedy"]) > 0.1
    assert max(missed["exchange"]) < 1e-9


def test_a_layer_can_be_of_use_only_beside_another():
    """Alone it moves the already correct example; the other one mixes both."""
    layers, r = layers_of(np.diag([0.0, 1.0]), np.ones((2, 2))), np.array([1.0, 0.0])
    result = target_aware(layers, r, epsilon=1e-6)
    assert result.layers == ("1", "0")
    assert min(result.scores) > 0.4
    alone = target_aware({"0": layers["0"]}, r, epsilon=1e-6)
    assert alone.scores[0] < 1e-9


def test_the_drop_counts_per_parameter():
    grams = np.diag([1.0, 0.0, 0.0]), np.diag([0.0, 1.0, 1.0])
    r = np.ones(3)
    cheap = target_aware(layers_of(*grams, parameters=[2, 5]), r)
    assert cheap.layers == ("0", "1")
    cheap = target_aware(layers_of(*grams, parameters=[2, 3]), r)
    assert cheap.layers == ("1", "0")


def test_what_the_base_explains_is_not_learnt_again():
    same, other = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    layers, r = layers_of(same, other), np.array([2.0, 1.0])
    assert target_aware(layers, r).layers == ("0", "1")
    result = target_aware(layers, r, base=same)
    assert result.layers == ("1", "0")
    assert result.scores[0] > 0.9
    assert target_aware(layers, r, base=torch.tensor(same)) == result


@given(seeds, st.floats(1e-3, 1e3))
def test_the_scale_of_kernels_and_targets_does_not_matter(seed, scale):
    layers, r = problem(4, 6, seed)
    more = {n: LayerKernel(scale * e.kernel, e.parameters) for n, e in layers.items()}
    one, other = target_aware(layers, r), target_aware(more, 3 * r)
    assert one.layers == other.layers
    close(one.scores, other.scores, 1e-6)


# The published rule


@given(st.integers(1, 5), seeds)
def test_least_growth_is_a_plain_loop(count, seed):
    layers, _ = problem(count, 6, seed)
    base = np.diag(np.arange(6.0))
    whole = combined(layers).numpy() + base
    ridge = 1e-3 * np.trace(whole) / 6
    top = lambda K: np.linalg.eigvalsh(K)[-1] + ridge
    now, left, order, scores = base, list(layers), [], []
    while left:
        growth = {n: top(now + layers[n].kernel.numpy()) / top(base) for n in left}
        best = min(growth, key=growth.get)
        now = now + layers[best].kernel.numpy()
        left.remove(best)
        order.append(best)
        scores.append(growth[best])
    result = least_growth(layers, base=base)
    assert result.layers == tuple(order)
    close(result.scores, scores)
    # r_C is at least 1 and grows with C: without a budget it prefers no layer.
    assert np.all(np.diff([1, *result.scores]) >= -1e-12)
    # The ridge does not matter to the choice.
    assert least_growth(layers, base=base, epsilon=10.0).layers == result.layers


def test_least_growth_takes_the_weakest_gradients():
    """The chosen layer explains nothing; the target-aware rule chooses the other."""
    strong, weak = np.diag([4.0, 0.0]), np.diag([0.0, 1e-6])
    layers, r = layers_of(strong, weak), np.array([1.0, 0.1])
    budget = Budget(layers=1)
    assert least_growth(layers, budget=budget).layers == ("1",)
    assert target_aware(layers, r, budget=budget).layers == ("0",)


# Baselines


def test_gradient_norm_is_that_of_autograd():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs()
    labels = torch.tensor([1, 0, 1])
    layers = layer_kernels(model, inputs)
    with torch.no_grad():
        f0 = model(**inputs).logits
    r = starting_residual(labels, f0)
    result = gradient_norm(layers, r)
    loss = F.cross_entropy(model(**inputs).logits, labels, reduction="sum")
    loss.backward()
    for name, part in (("0", ".layer.0."), ("1", ".layer.1."), ("other", "pooler.")):
        gradients = [p.grad for n, p in model.named_parameters() if part in n]
        expected = float(torch.cat([g.flatten() for g in gradients]).norm())
        close(dict(zip(result.layers, result.scores, strict=True))[name], expected)
    assert list(result.scores) == sorted(result.scores, reverse=True)


def test_alignment_is_that_of_the_kernels():
    layers, r = problem(4, 6, 0)
    layers["nothing"] = LayerKernel(torch.zeros(6, 6).double(), 1)
    result = kernel_alignment(layers, r)
    assert result.layers[-1] == "nothing"
    assert result.scores[-1] == 0
    for name, score in zip(result.layers[:-1], result.scores[:-1], strict=True):
        close(score, alignment(layers[name].kernel, r))
    assert list(result.scores) == sorted(result.scores, reverse=True)


def test_orders_without_kernels():
    layers = layers_of(*[np.eye(2)] * 12)
    names = tuple(layers)
    assert first_layers(layers).layers == names
    assert last_layers(layers).layers == names[::-1]
    assert first_layers(layers, budget=Budget(layers=3)).layers == ("0", "1", "2")
    assert last_layers(layers, budget=Budget(layers=2)).scores == (12, 11)
    one, same, other = (random_layers(layers, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.layers != other.layers
    assert set(one.layers) == set(names)
    assert one.layers != names
    assert list(one.scores) == sorted(one.scores, reverse=True)
    part = random_layers(layers, seed=1, budget=Budget(layers=4))
    assert part.layers == one.layers[:4]


def test_every_layer_comes_first_equally_often():
    layers = layers_of(*[np.eye(1)] * 4)
    draws = [random_layers(layers, seed=seed).layers[0] for seed in range(400)]
    counts = [draws.count(name) for name in layers]
    assert min(counts) > 70  # 100 expected, 3.5 deviations


# Budgets and ties


def test_a_budget_skips_what_does_not_fit():
    layers = layers_of(*[np.eye(2)] * 4, parameters=[5, 3, 2, 1])
    assert first_layers(layers, budget=Budget(parameters=7)).layers == ("0", "2")
    result = first_layers(layers, budget=Budget(parameters=9, layers=2))
    assert (result.layers, result.parameters) == (("0", "1"), 8)
    assert first_layers(layers, budget=Budget(parameters=4)).layers == ("1", "3")
    assert first_layers(layers).parameters == 11


@pytest.mark.parametrize("seed", range(3))
def test_ties_go_to_the_first(seed):
    """Copies of a layer with different rounding."""
    layers, r = problem(1, 5, seed)
    gram, rng = layers["0"].kernel.numpy(), np.random.default_rng(seed)
    noise = 1 + 1e-14 * rng.normal(size=(6, 5, 5))
    layers = layers_of(*(gram * (n + n.T) / 2 for n in noise))
    names = tuple(layers)
    assert least_growth(layers).layers == names
    assert gradient_norm(layers, r).layers == names
    assert kernel_alignment(layers, r).layers == names
    assert target_aware(layers, r).layers[0] == "0"


# Targets


def test_residual_is_the_negative_gradient_of_the_loss():
    labels = torch.tensor([2, 0, 1, 2])
    f0 = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(f0, labels, reduction="sum").backward()
    close(starting_residual(labels, f0.detach()), -f0.grad)
    margin = torch.randn(4, dtype=torch.float64, requires_grad=True)
    two = torch.stack([torch.zeros_like(margin), margin], dim=1)
    F.cross_entropy(two, labels.clamp(max=1), reduction="sum").backward()
    result = starting_residual(labels.clamp(max=1), two.detach())
    close(result[:, 1], -margin.grad)


def test_centred_labels_have_no_mean():
    result = starting_residual([0, 1, 1, 2])
    close(result.sum(axis=0), np.zeros(3))
    close(result[0], [0.75, -0.5, -0.25])


def test_targets_are_laid_beside_the_outputs():
    rng = np.random.default_rng(0)
    J = rng.normal(size=(2, 4, 3, 5))
    full = {
        str(i): LayerKernel(torch.tensor(np.einsum("ncp,mdp->nmcd", j, j)), 1)
        for i, j in enumerate(J)
    }
    r = rng.normal(size=(4, 3))
    flat = {n: LayerKernel(gram_matrix(e.kernel), 1) for n, e in full.items()}
    assert target_aware(full, r) == target_aware(flat, r.ravel())
    assert gradient_norm(full, r) == gradient_norm(full, r.ravel())
    expected = [np.linalg.norm(np.einsum("ncp,nc->p", j, r)) for j in J]
    close(sorted(gradient_norm(full, r).scores), sorted(expected))
    trace = torch.einsum("nmcc->nm", full["0"].kernel)
    columns = gradient_norm({"0": LayerKernel(trace, 1)}, r)
    close(columns.scores[0] ** 2, np.trace(r.T @ trace.numpy() @ r))


def test_a_model_is_taken_from_its_examples_to_its_layers():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs(6)
    layers = layer_kernels(model, inputs, space=LoRA(2), by="module")
    with torch.no_grad():
        r = starting_residual([0, 1, 1, 0, 1, 0], model(**inputs).logits)
    size = layers["0.attention.self.query"].parameters
    budget = Budget(parameters=3 * size)
    result = target_aware(layers, r, budget=budget)
    assert 1 <= len(result.layers) <= 3
    assert result.parameters <= 3 * size
    K = gram_matrix(combined(layers)).numpy()
    ridge = 1e-3 * np.trace(K) / len(K)
    score = lambda names: RidgeRegression.of(
        gram_matrix(combined(layers, names)), r.ravel()
    ).optimum(ridge)
    for other in (
        random_layers(layers, seed=0, budget=Budget(layers=1)),
        least_growth(layers, budget=Budget(layers=1)),
    ):
        (name,) = other.layers
        per_parameter = (r**2).mean() - score([name])
        per_parameter /= layers[name].parameters * (r**2).mean()
        assert per_parameter <= result.scores[0] * (1 + 1e-9)


# What is refused


def test_what_cannot_be_chosen_is_refused():
    layers, r = problem(3, 4, 0)
    for name in ("parameters", "layers"):
        with pytest.raises(SelectionError, match=f"{name}=0 must be at least 1"):
            Budget(**{name: 0})
    big = layers_of(np.eye(2), parameters=[10])
    with pytest.raises(SelectionError, match="room for none of 1 layers; .* has 10"):
        first_layers(big, budget=Budget(parameters=9))
    with pytest.raises(ValueError, match=r"`targets` has shape \(3,\)"):
        target_aware(layers, r[:3])
    with pytest.raises(ValueError, match=r"`base` has a Gram matrix of shape \(2, 2\)"):
        target_aware(layers, r, base=np.eye(2))
    with pytest.raises(ValueError, match="`epsilon=0` gives the ridge 0.0"):
        least_growth(layers, epsilon=0)
    with pytest.raises(NotPSDError):
        target_aware(layers_of(np.diag([1.0, -1.0])), [1.0, 2.0])
    almost = np.diag([1.0, -5e-7])
    with pytest.raises(NotPSDError, match="raise `epsilon`"):
        target_aware(layers_of(almost), [1.0, 2.0], epsilon=1e-7)


@pytest.mark.parametrize(
    ("labels", "outputs", "problem"),
    [
        ([0.0, 1.0], None, "`labels` has dtype float64"),
        ([[0, 1]], None, r"shape \(1, 2\); expected \(n,\) whole numbers"),
        ([0, 2], np.zeros((2, 2)), "`labels` go from 0 to 2; expected 0 to 1"),
        ([-1, 1], None, "`labels` go from -1 to 1"),
        ([0, 1], np.zeros((3, 2)), r"`outputs` has shape \(3, 2\); expected \(2, 2\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, outputs, problem):
    with pytest.raises(ValueError, match=problem):
        starting_residual(labels, outputs)
