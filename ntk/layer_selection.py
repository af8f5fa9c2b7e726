"""Which layers to tune: rules that rank them by their kernels.

The rules take the layers' kernels on training examples (`ntk.layerwise`), n of them
with c outputs, and return a `LayerOrder`: the layers to tune within a `Budget`, each
the best by the rule of those that there is still room for. Where layers score alike up
to rounding, the first of them is taken. The target-aware rule also exchanges layers.

`targets` are r, what is to be learnt: see `starting_residual`. For kernels
``(n, n, c, c)`` they are ``(n, c)``, for reduced ones ``(n,)`` or ``(n, t)``. `base` is
the kernel of what is tuned anyway, a new head's for instance; nothing is, unless given.
Every rule raises `SelectionError` if the budget has room for no layer, and errors of
`ntk.spectrum` for what is no kernel; `Raises` lists only what is particular.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import scipy.linalg
import scipy.special
import torch
from numpy.typing import ArrayLike

from ntk.distance import alignment
from ntk.kernel import gram_matrix
from ntk.layer_budget import (
    UNLIMITED,
    Budget,
    LayerOrder,
    by_score,
    exchange,
    greedy,
)
from ntk.layerwise import LayerKernel, combined, gram_matrices
from ntk.spectrum import (
    PSD_TOLERANCE,
    Array,
    NotPSDError,
    as_array,
    as_symmetric,
    as_targets,
    eigenvalues,
    relative_ridge,
)
from rocoft.architecture import SelectionError

__all__ = [
    "Budget",
    "LayerOrder",
    "first_layers",
    "gradient_norm",
    "kernel_alignment",
    "last_layers",
    "least_growth",
    "random_layers",
    "rank_subsets",
    "starting_residual",
    "target_aware",
]


def starting_residual(labels: ArrayLike, outputs: ArrayLike | None = None) -> Array:
    """Return what is left to learn, one-hot labels less what is there already.

    With the model's outputs it is the negative gradient of the summed cross-entropy
    with respect to them, e_y - softmax(f_0), so that a layer's part of the gradient is
    J_l' r. Without them it is e_y less its mean: a model that knows the frequencies of
    the classes. For a margin kernel take column 1.

    Args:
        labels: ``(n,)`` numbers of the classes, from 0.
        outputs: f_0, ``(n, c)`` logits of the pretrained model.

    Returns:
        r, ``(n, c)``.

    Raises:
        ValueError: If the labels are no numbers of classes, or are not n.
    """
    numbers = np.asarray(labels)
    logits = None if outputs is None else as_array(outputs, "outputs")
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"`labels` has dtype {numbers.dtype} and shape {numbers.shape}; expected "
            "(n,) whole numbers, the classes' own."
        )
    count = int(numbers.max()) + 1 if logits is None else logits.shape[-1]
    if numbers.min() < 0 or numbers.max() >= count:
        raise ValueError(
            f"`labels` go from {numbers.min()} to {numbers.max()}; expected 0 to "
            f"{count - 1}, columns of `outputs`."
        )
    targets = np.eye(count)[numbers]
    if logits is None:
        return targets - targets.mean(axis=0)
    if logits.shape != targets.shape:
        raise ValueError(
            f"`outputs` has shape {logits.shape}; expected {targets.shape}, a row for "
            "each label."
        )
    return np.asarray(targets - scipy.special.softmax(logits, axis=1))


def target_aware(
    layers: Mapping[str, LayerKernel],
    targets: ArrayLike,
    *,
    budget: Budget = UNLIMITED,
    base: ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> LayerOrder:
    """Choose the layers that explain most of the targets.

    They leave the least of r'(K_S + s I)^-1 r, which is the smallest regularised risk
    of tuning the layers S (`ntk.risk`). The ridge is s = epsilon tr K / k, K being the
    kernel of all layers and the base. One after another the layer with the largest
    drop per parameter is taken. The drop of a layer can grow when another is chosen,
    so then one or two are given up for as many others as long as that lowers the whole
    (`ntk.layer_budget.exchange`). The best set may still be another one.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: What they may cost.
        base: Kernel of what is tuned anyway.
        epsilon: The ridge in units of the mean eigenvalue, above 0.

    Returns:
        The layers, one after another the one with the largest drop per parameter. That
        is its score, as a share of the expression for the base alone.
    """
    grams = gram_matrices(layers)
    start, ridge = _start(grams, base, epsilon)
    r = _targets(layers, targets)
    before = _unexplained(start, r, ridge)

    def left(names: Sequence[str]) -> float:
        return _unexplained(sum((grams[n] for n in names), start), r, ridge)

    def score(chosen: Sequence[str], candidates: Sequence[str]) -> Array:
        now = left(chosen)
        return np.array(
            [
                (now - left([*chosen, name])) / (before * layers[name].parameters)
                for name in candidates
            ]
        )

    rule = "target-aware"
    chosen = greedy(rule, layers, budget, score).layers
    while better := exchange(chosen, layers, budget, left):
        # A smaller layer in the place of a larger one may leave room for more.
        chosen = better + greedy(rule, layers, budget, score, begun=better).layers
    return greedy(rule, {n: layers[n] for n in layers if n in chosen}, budget, score)


def least_growth(
    layers: Mapping[str, LayerKernel],
    *,
    budget: Budget = UNLIMITED,
    base: ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> LayerOrder:
    """Choose, one after another, the layers that raise the largest eigenvalue least.

    It is algorithm 2 of Rahimi Afzal et al. (2025) with single layers as candidates,
    repeated until the budget is spent. A score is r_C = (l_1(K + S_C) + s) /
    (l_1(K) + s) of all layers C chosen up to then, K being the base; s changes the
    scores but not the choice. r_C is at least 1 and grows with every layer: without a
    budget the best choice would be none, and of single layers it is the one with the
    weakest gradients. See `rank_subsets` for the exact algorithm.

    Args:
        layers: Kernels by layer.
        budget: What they may cost.
        base: K, the kernel of what is tuned anyway.
        epsilon: The ridge s in units of the mean eigenvalue of everything, above 0.

    Returns:
        The order, by ascending growth.
    """
    grams = gram_matrices(layers)
    start, ridge = _start(grams, base, epsilon)
    before = _largest(start) + ridge

    def score(chosen: Sequence[str], candidates: Sequence[str]) -> Array:
        now = sum((grams[name] for name in chosen), start)
        tops = [_largest(now + grams[name]) for name in candidates]
        return (np.array(tops) + ridge) / before

    return greedy("least growth", layers, budget, score, least=True)


def rank_subsets(
    layers: Mapping[str, LayerKernel],
    candidates: Iterable[Collection[str]],
    *,
    base: ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> list[LayerOrder]:
    """Rank sets of layers by the growth of the largest eigenvalue, least first.

    Algorithm 2 of Rahimi Afzal et al. (2025), which takes the first. Sets of different
    size are refused: the smaller would win for being smaller.

    Args:
        layers: Kernels by layer.
        candidates: Sets C of names, all of as many layers, or of as many parameters.
        base: As in `least_growth`.
        epsilon: As in `least_growth`.

    Returns:
        The sets, each with its one score r_C.

    Raises:
        SelectionError: If there are none, or they are of different size.
    """
    grams = gram_matrices(layers)
    start, ridge = _start(grams, base, epsilon)
    before, ranked = _largest(start) + ridge, []
    for chosen in candidates:
        added = gram_matrix(combined(layers, chosen)).cpu().numpy()
        growth = (_largest(start + added) + ridge) / before
        parameters = sum(layers[name].parameters for name in chosen)
        ranked.append(LayerOrder("subset", tuple(chosen), (growth,), parameters))
    counts = sorted({len(each.layers) for each in ranked})
    sizes = sorted({each.parameters for each in ranked})
    if not ranked or (len(counts) > 1 and len(sizes) > 1):
        raise SelectionError(
            f"candidates have {counts} layers and {sizes} parameters; expected at "
            "least one set, and the same of one of both: every layer raises the "
            "largest eigenvalue, so the smallest set would be chosen."
        )
    return sorted(ranked, key=lambda each: each.scores)


def gradient_norm(
    layers: Mapping[str, LayerKernel],
    targets: ArrayLike,
    *,
    budget: Budget = UNLIMITED,
) -> LayerOrder:
    """Choose the layers with the largest gradient, a baseline.

    A score is ||J_l' r|| = (r' K_l r)^1/2, the norm of the layer's part of the gradient
    of the summed loss whose residual is r.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: What they may cost.

    Returns:
        The order, by descending norm.
    """
    r = _targets(layers, targets)
    squares = [np.vdot(r, gram @ r) for gram in gram_matrices(layers).values()]
    return by_score("gradient norm", layers, budget, np.sqrt(np.maximum(squares, 0)))


def kernel_alignment(
    layers: Mapping[str, LayerKernel],
    targets: ArrayLike,
    *,
    budget: Budget = UNLIMITED,
) -> LayerOrder:
    """Choose the layers whose kernels are best aligned with the targets, a baseline.

    A score is `ntk.distance.alignment`, 0 for a layer that does not reach the output.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: What they may cost.

    Returns:
        The order, by descending alignment.
    """
    r = _targets(layers, targets)
    scores = [
        alignment(g, r) if g.any() else 0.0 for g in gram_matrices(layers).values()
    ]
    return by_score("kernel alignment", layers, budget, scores)


def random_layers(
    layers: Mapping[str, LayerKernel], *, seed: int, budget: Budget = UNLIMITED
) -> LayerOrder:
    """Choose layers at random, a baseline; a score is a uniform draw."""
    draws = np.random.default_rng(seed).random(len(layers))
    return by_score(f"random {seed}", layers, budget, draws)


def first_layers(
    layers: Mapping[str, LayerKernel], *, budget: Budget = UNLIMITED
) -> LayerOrder:
    """Choose the layers in their order, a baseline; a score is the place from last."""
    return by_score("first", layers, budget, range(len(layers), 0, -1))


def last_layers(
    layers: Mapping[str, LayerKernel], *, budget: Budget = UNLIMITED
) -> LayerOrder:
    """Choose the layers from the last one, a baseline; a score is the place."""
    return by_score("last", layers, budget, range(1, len(layers) + 1))


def _start(
    grams: Mapping[str, Array], base: ArrayLike | None, epsilon: float
) -> tuple[Array, float]:
    """Return the base's Gram matrix and the ridge of the whole kernel."""
    whole = np.sum(list(grams.values()), axis=0)
    start = np.zeros_like(whole)
    if base is not None:
        kernel = gram_matrix(torch.as_tensor(base)).cpu()
        start = as_symmetric(kernel, "base", PSD_TOLERANCE)
    if start.shape != whole.shape:
        raise ValueError(
            f"`base` has a Gram matrix of shape {start.shape}; expected {whole.shape} "
            "as the layers. Compute it on the same examples and outputs."
        )
    ridge = relative_ridge(eigenvalues(start + whole), epsilon)
    if not ridge > 0:
        raise ValueError(
            f"`epsilon={epsilon!r}` gives the ridge {ridge}; expected a number above "
            "0, and kernels that are not all zero."
        )
    return start, ridge


def _targets(layers: Mapping[str, LayerKernel], targets: ArrayLike) -> Array:
    """Return the targets as columns beside the rows of the Gram matrices."""
    kernel = next(iter(layers.values())).kernel
    values = as_array(targets, "targets")
    if kernel.ndim == 4 and values.shape == (kernel.shape[0], kernel.shape[2]):
        values = values.reshape(-1)
    return as_targets(values, len(gram_matrix(kernel)))


def _unexplained(gram: Array, r: Array, ridge: float) -> float:
    """Return tr r'(K + s I)^-1 r."""
    try:
        factor = scipy.linalg.cho_factor(gram + ridge * np.eye(len(gram)))
    except scipy.linalg.LinAlgError as error:
        raise NotPSDError(
            f"a kernel with the ridge {ridge:.2e} is not positive definite: rounding "
            "exceeds the ridge. Compute the kernels in float64 or raise `epsilon`."
        ) from error
    return float(np.vdot(r, scipy.linalg.cho_solve(factor, r)))


def _largest(gram: Array) -> float:
    top = len(gram) - 1
    return float(scipy.linalg.eigvalsh(gram, subset_by_index=(top, top))[0])
