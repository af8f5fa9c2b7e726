"""Rules that choose which layers to tune, by the layers' kernels.

The rules take the layers' kernels on n training examples with c outputs
(`ntk.kernels.layerwise`) and return a `LayerOrder` within a `Budget`: each layer is the
best by the rule among those that still fit. Among scores equal up to rounding the first
layer wins. The target-aware rule also exchanges layers.

`targets` are r, the residual to learn, see `starting_residual`: ``(n, c)`` for kernels
``(n, n, c, c)``, ``(n,)`` or ``(n, t)`` for reduced ones. `base` is the kernel of
parameters that are tuned in any case, such as a new head; by default there are none.
Every rule raises `SelectionError` if no layer fits the budget, and the errors of
`ntk.measures.spectrum` for an invalid kernel; `Raises` lists only further errors.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.linalg
import scipy.special
import torch
from numpy.typing import ArrayLike

from ntk.kernels import LayerKernel, gram_matrices
from ntk.layer_selection.budget import (
    UNLIMITED,
    Budget,
    LayerOrder,
    by_score,
    exchange,
    greedy,
)
from ntk.measures import (
    PSD_TOLERANCE,
    Array,
    NotPSDError,
    alignment,
    as_array,
    as_symmetric,
    as_targets,
    eigenvalues,
    gram_matrix,
    relative_ridge,
)

__all__ = [
    "Budget",
    "LayerOrder",
    "first_layers",
    "gradient_norm",
    "kernel_alignment",
    "last_layers",
    "least_growth",
    "random_layers",
    "starting_residual",
    "target_aware",
]


def starting_residual(labels: ArrayLike, outputs: ArrayLike | None = None) -> Array:
    """Return the residual to learn, one-hot labels minus the initial prediction.

    With the model's outputs it is e_y - softmax(f_0), the negative gradient of the
    summed cross-entropy with respect to them, so that a layer's part of the parameter
    gradient is -J_l' r. Without them it is e_y minus its mean, as for a model that
    predicts the class frequencies. For a margin kernel use column 1.

    Args:
        labels: ``(n,)`` class indices, from 0.
        outputs: f_0, ``(n, c)`` logits of the pretrained model.

    Returns:
        r, ``(n, c)``.

    Raises:
        ValueError: If the labels are not ``(n,)`` class indices.
    """
    y = np.asarray(labels)
    logits = None if outputs is None else as_array(outputs, "outputs")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"`labels` has dtype {y.dtype} and shape {y.shape}; expected (n,) whole "
            "numbers, the class indices."
        )
    count = int(y.max()) + 1 if logits is None else logits.shape[-1]
    if y.min() < 0 or y.max() >= count:
        raise ValueError(
            f"`labels` go from {y.min()} to {y.max()}; expected 0 to {count - 1}, "
            "columns of `outputs`."
        )
    targets = np.eye(count)[y]
    if logits is None:
        return targets - targets.mean(axis=0)
    if logits.shape != targets.shape:
        raise ValueError(
            f"`outputs` has shape {logits.shape}; expected {targets.shape}, one row "
            "per label."
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

    The layers S minimise r'(K_S + s I)^-1 r, proportional to the smallest regularised
    risk of tuning them (`ntk.measures.risk`). The ridge is s = epsilon tr K / k, with K
    the kernel of all layers and the base. A greedy search adds the layer with the
    largest drop of this loss per parameter. A layer's drop can grow when others are
    chosen, so one or two layers are then exchanged for as many others while that lowers
    the loss (`ntk.layer_selection.budget.exchange`). The result need not be the best
    set.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: The most that the layers may cost.
        base: Kernel of the parameters tuned in any case.
        epsilon: The ridge in units of the mean eigenvalue, above 0.

    Returns:
        The layers in greedy order. A layer's score is its drop per parameter, as a
        share of the loss of the base alone.
    """
    grams = gram_matrices(layers)
    start, ridge = _start(grams, base, epsilon)
    r = _targets(layers, targets)
    before = _unexplained(start, r, ridge)

    def loss(names: Sequence[str]) -> float:
        return _unexplained(sum((grams[n] for n in names), start), r, ridge)

    def score(chosen: Sequence[str], candidates: Sequence[str]) -> Array:
        now = loss(chosen)
        return np.array(
            [
                (now - loss([*chosen, name])) / (before * layers[name].parameters)
                for name in candidates
            ]
        )

    rule = "target-aware"
    chosen = greedy(rule, layers, budget, score).layers
    while better := exchange(chosen, layers, budget, loss):
        # Replacing a large layer by a smaller one may leave room for another.
        chosen = better + greedy(rule, layers, budget, score, begun=better).layers
    return greedy(rule, {n: layers[n] for n in layers if n in chosen}, budget, score)


def least_growth(
    layers: Mapping[str, LayerKernel],
    *,
    budget: Budget = UNLIMITED,
    base: ArrayLike | None = None,
    epsilon: float = 1e-3,
) -> LayerOrder:
    """Choose greedily the layers that raise the largest eigenvalue least.

    Algorithm 2 of Rahimi Afzal et al. (2025) with single layers as candidates, repeated
    until the budget is spent. The score is r_C = (l_1(K + S_C) + s) / (l_1(K) + s) of
    the layers C chosen so far, K being the base; s changes the scores but not the
    choice. r_C is at least 1 and grows with every layer: without a budget the best
    choice would be no layer, and the best single layer has the weakest gradients.

    Args:
        layers: Kernels by layer.
        budget: The most that the layers may cost.
        base: K, the kernel of the parameters tuned in any case.
        epsilon: The ridge s in units of the mean eigenvalue of all layers and the base,
            above 0.

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


def gradient_norm(
    layers: Mapping[str, LayerKernel],
    targets: ArrayLike,
    *,
    budget: Budget = UNLIMITED,
) -> LayerOrder:
    """Choose the layers with the largest gradient, a baseline.

    The score is ||J_l' r|| = (r' K_l r)^1/2, the norm of the layer's part of the
    gradient of the summed loss with residual r.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: The most that the layers may cost.

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

    The score is `ntk.measures.distance.alignment`, 0 for a layer that the outputs do
    not depend on.

    Args:
        layers: Kernels by layer.
        targets: r.
        budget: The most that the layers may cost.

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
    """Choose layers at random, a baseline; the score is a uniform draw."""
    draws = np.random.default_rng(seed).random(len(layers))
    return by_score(f"random {seed}", layers, budget, draws)


def first_layers(
    layers: Mapping[str, LayerKernel], *, budget: Budget = UNLIMITED
) -> LayerOrder:
    """Choose the first layers, a baseline; the score counts down to 1 at the last."""
    return by_score("first", layers, budget, range(len(layers), 0, -1))


def last_layers(
    layers: Mapping[str, LayerKernel], *, budget: Budget = UNLIMITED
) -> LayerOrder:
    """Choose the last layers, a baseline; the score is the position from 1."""
    return by_score("last", layers, budget, range(1, len(layers) + 1))


def _start(
    grams: Mapping[str, Array], base: ArrayLike | None, epsilon: float
) -> tuple[Array, float]:
    """Return the base's Gram matrix, zero by default, and the ridge."""
    whole = np.sum(list(grams.values()), axis=0)
    start = np.zeros_like(whole)
    if base is not None:
        kernel = gram_matrix(torch.as_tensor(base)).cpu()
        start = as_symmetric(kernel, "base", PSD_TOLERANCE)
    if start.shape != whole.shape:
        raise ValueError(
            f"`base` has a Gram matrix of shape {start.shape}; expected {whole.shape} "
            "like the layers. Compute it on the same examples and outputs."
        )
    ridge = relative_ridge(eigenvalues(start + whole), epsilon)
    if not ridge > 0:
        raise ValueError(
            f"`epsilon={epsilon!r}` gives the ridge {ridge}; expected a number above "
            "0, and kernels that are not all zero."
        )
    return start, ridge


def _targets(layers: Mapping[str, LayerKernel], targets: ArrayLike) -> Array:
    """Return the targets as columns, one row per row of the Gram matrices."""
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
