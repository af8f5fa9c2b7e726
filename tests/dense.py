"""The kernel by its definition, and how tensors are compared.

One plain backward pass for every example and output. Nothing here knows the package,
but for the context that keeps float64 models in float64 (`reading_in_float64`).
"""

from collections.abc import Mapping

import torch

from ntk.gradients.function import Float64Throughout


def gradients(model, inputs, outputs=None):
    """Return the gradient of every parameter, ``(n, c, *shape)`` by name."""
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    model.requires_grad_(True)
    examples = []
    for one in singles(inputs):
        with Float64Throughout():
            answer = model(**one) if isinstance(one, Mapping) else model(one)
            values = (outputs or logits)(answer)[0]
        rows = [
            torch.autograd.grad(
                value,
                list(parameters.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for value in values
        ]
        examples.append([torch.stack(several) for several in zip(*rows, strict=True)])
    for name, parameter in parameters.items():
        parameter.requires_grad_(flags[name])
    stacked = [torch.stack(several) for several in zip(*examples, strict=True)]
    return dict(zip(parameters, stacked, strict=True))


def logits(answer):
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def singles(inputs):
    """Return every example as a batch of its own."""
    if isinstance(inputs, torch.Tensor):
        return list(inputs.split(1))
    if isinstance(inputs, Mapping):
        n = len(next(iter(inputs.values())))
        return [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(n)]
    return [one for batch in inputs for one in singles(batch)]


def kernel(left, right=None, *, left_of=lambda g: g, right_of=lambda g: g):
    """Return ``(n, m, c, d)`` from lists of gradients ``(n, c, ...)``."""
    right = left if right is None else right
    return sum(
        torch.einsum("ncp,mdp->nmcd", left_of(a.flatten(2)), right_of(b.flatten(2)))
        for a, b in zip(left, right, strict=True)
    )


def contrasted(gradient):
    """Return the gradients ``(n, c - 1, ...)`` of orthonormal contrasts, one by one.

    Each contrast is an output less the mean of those before it, at length 1.
    """
    rows = []
    for k in range(1, gradient.shape[1]):
        difference = gradient[:, k] - gradient[:, :k].mean(dim=1)
        rows.append(difference / (1 + 1 / k) ** 0.5)
    return torch.stack(rows, dim=1)


def assert_close(actual, expected, tolerance=1e-9, floor=0.0, of=""):
    """Compare entries with the largest expected one; say which is worst."""
    assert actual.shape == expected.shape, f"{of} {actual.shape} != {expected.shape}"
    error = (actual - expected).abs()
    allowed = tolerance * float(expected.abs().max()) + floor
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert bool((error <= allowed).all()), (
        f"{of} entry {worst} is {float(actual[worst]):.12e}, but should be "
        f"{float(expected[worst]):.12e}: error {float(error.max()):.1e} is more than "
        f"{allowed:.1e}, in {int((~(error <= allowed)).sum())} of {error.numel()} "
        "entries"
    )
