"""Jacobians by torch.func: the second implementation, independent of layers.

A tangent space is a set of coordinates delta with f(delta) = f(theta + S delta), S
linear; its Jacobian is that of f at delta = 0. The parameters are replaced by functions
of delta, which cannot reach every use of a parameter, and some functions have a wrong
rule under `vmap`; `ntk.gradients.judge` decides whether the result is right.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.gradients.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    take,
)
from ntk.gradients.judge import Key, Progress, coordinate_rows, map_keys
from ntk.spaces import Map, Maps

Coordinates = dict[str, Tensor]

ROUNDINGS = 100
"""Units in the last place of the largest gradient that count as rounding."""
VMAP_EXAMPLES = 8
"""Number of examples per call of `torch.func.vmap`."""


def jacobian(
    function: NetworkFunction,
    batches: Sequence[Batch],
    maps: Maps,
    progress: Progress | None = None,
) -> dict[Key, Tensor]:
    """Return the Jacobian with respect to the coordinates of every map.

    By `vmap` of `jacrev`, or example by example if vmap fails because the model's code
    branches on data, as the mask code of transformers does, or gives something else
    than plain autograd on the first example.

    Args:
        function: The model and its readout.
        batches: The examples.
        maps: The maps whose coordinates are differentiated.
        progress: Called with the number of examples done since the last call.

    Returns:
        For each parameter and map ``(c, n, p)``.

    Raises:
        FunctionError: If a parameter is used where it cannot be replaced.
    """
    keys = map_keys(maps)
    tangent = TangentFunction(function, keys)
    tangent.check_reach(take(batches[0], slice(0, 1)))
    parts: dict[Key, list[Tensor]] = {key: [] for key in keys}
    mapped = True
    for number, batch in enumerate(batches):
        for start in range(0, batch_length(batch), VMAP_EXAMPLES):
            part = take(batch, slice(start, start + VMAP_EXAMPLES))
            rows = _mapped(tangent, part) if mapped else None
            if rows is not None and not (number or start):
                one = looped(tangent, take(part, slice(0, 1)))
                if differing([rows[key][:1] for key in one], list(one.values())):
                    rows = None
            if rows is None:
                mapped = False
                rows = looped(tangent, part)
            for i, key in enumerate(keys):
                parts[key].append(rows[str(i)])
            if progress is not None:
                progress(batch_length(part))
    return {key: torch.cat(p).transpose(0, 1) for key, p in parts.items()}


class TangentFunction:
    """The model as a function of the coordinates, f(theta + S delta).

    Args:
        function: The model and its readout.
        keys: Parameters and maps, in the order of the coordinates delta.
    """

    def __init__(self, function: NetworkFunction, keys: Sequence[Key]) -> None:
        self.function = function
        self.keys = keys
        self.parameters = {
            name: parameter.detach() for name, parameter in function.parameters.items()
        }

    def zero(self) -> Coordinates:
        """Return zero coordinates, those of theta."""
        return {
            str(i): self.parameters[name].new_zeros(
                each.size(self.parameters[name].shape)
            )
            for i, (name, each) in enumerate(self.keys)
        }

    def __call__(self, delta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the outputs ``(n, c)`` of a batch at coordinates delta."""
        moved = dict(self.parameters)
        for i, (name, each) in enumerate(self.keys):
            moved[name] = each.shift(moved[name], delta[str(i)])
        return self.function(batch, moved)

    def check_reach(self, example: Batch) -> None:
        """Check that replacing parameters reaches all their uses.

        Args:
            example: A batch of one example.

        Raises:
            FunctionError: If the gradient of a parameter is not that of plain autograd.
        """
        maps: dict[str, tuple[Map, ...]] = {}
        for name, each in self.keys:
            maps[name] = (*maps.get(name, ()), each)
        ours = [rows[0] for rows in looped(self, example).values()]
        judged = coordinate_rows(self.function, example, maps)
        expected = [torch.stack([row[key] for row in judged]) for key in self.keys]
        wrong = differing(ours, expected)
        missed = list(dict.fromkeys(self.keys[i][0] for i in wrong))
        if missed:
            raise FunctionError(
                f"torch.func cannot replace {', '.join(map(repr, missed[:3]))}"
                f"{' and others' if missed[3:] else ''} everywhere: the model uses a "
                "parameter that a closure, a list or a cache holds. Register it in "
                "the module that uses it, or take implementation='factors' or "
                "'autograd'."
            )

    def weighted(
        self, direction: Coordinates, transform: Callable[[Tensor], Tensor] | None
    ) -> Coordinates:
        """Return coordinates after a transform, times their weights.

        Args:
            direction: Coordinates.
            transform: Applied to every entry, such as the sign; None for none.
        """
        result = {}
        for i, (_, each) in enumerate(self.keys):
            value = direction[str(i)]
            value = value if transform is None else transform(value)
            weights = each.weights()
            result[str(i)] = value if weights is None else value * weights.to(value)
        return result


def differing(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[int]:
    """Return the indices of gradients that differ by more than half of their digits.

    Args:
        actual: Gradients of several parameters.
        expected: What they should be. Differences that are rounding of the largest of
            them do not count: a gradient that is zero in exact arithmetic, such as that
            of a key's bias, is rounding altogether.
    """
    largest = max((float(each.norm()) for each in expected), default=0.0)
    wrong = []
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        eps = torch.finfo(theirs.dtype).eps
        allowed = max(eps**0.5 * float(theirs.norm()), ROUNDINGS * eps * largest)
        if not float((ours - theirs).norm()) <= allowed:
            wrong.append(i)
    return wrong


def _mapped(tangent: TangentFunction, batch: Batch) -> Coordinates | None:
    """Return Jacobians ``(n, c, p)`` by vmap, None if the model cannot be mapped."""
    tensors: dict[str, Tensor] | Tensor
    if isinstance(batch, Tensor):
        tensors, rest = batch, {}
    else:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        rest = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}

    def one(delta: Coordinates, example: dict[str, Tensor] | Tensor) -> Tensor:
        if isinstance(example, Tensor):
            return tangent(delta, example[None])[0]
        single = {key: value[None] for key, value in example.items()}
        return tangent(delta, {**single, **rest})[0]

    try:
        # Fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(jacrev(one), in_dims=(None, 0))(tangent.zero(), tensors)
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def looped(tangent: TangentFunction, batch: Batch) -> Coordinates:
    """Return Jacobians ``(n, c, p)``, one backward pass per example and output."""
    rows: dict[str, list[Tensor]] = {}
    for i in range(batch_length(batch)):
        delta = {key: zero.requires_grad_() for key, zero in tangent.zero().items()}
        outputs = tangent(delta, take(batch, slice(i, i + 1)))[0]
        for key, value in delta.items():
            rows.setdefault(key, []).append(value.new_zeros(len(outputs), len(value)))
        if not outputs.requires_grad:
            continue
        for k in range(len(outputs)):
            gradients = torch.autograd.grad(
                outputs[k], list(delta.values()), retain_graph=True, allow_unused=True
            )
            for key, gradient in zip(delta, gradients, strict=True):
                if gradient is not None:
                    rows[key][-1][k] = gradient
    return {key: torch.stack(parts) for key, parts in rows.items()}


def differentiated_twice(
    tangent: TangentFunction, zero: Coordinates, direction: Coordinates, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return f0 and J direction for a function without a forward-mode derivative.

    J' v is linear in v: the gradient of <J' v, direction> in v is J direction.

    Args:
        tangent: The function of the coordinates.
        zero: Zero coordinates.
        direction: Coordinates; the result is differentiable in them.
        batch: n examples.

    Returns:
        f0 and J direction, ``(n, c)`` each.
    """
    with torch.enable_grad():
        at = {key: value.clone().requires_grad_() for key, value in zero.items()}
        outputs = tangent(at, batch)
        v = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, list(at.values()), v, create_graph=True, materialize_grads=True
        )
        products = [
            (p * direction[key]).sum() for key, p in zip(at, pulled, strict=True)
        ]
        product = torch.stack(products).sum()
        (pushed,) = torch.autograd.grad(product, v, create_graph=True)
    return outputs.detach(), pushed


def pushed(
    tangent: TangentFunction, zero: Coordinates, direction: Coordinates, batch: Batch
) -> Tensor:
    """Return J direction, ``(n, c)``.

    By forward mode, unless a custom function such as Bloom's GELU lacks it.
    """
    try:
        return jvp(lambda delta: tangent(delta, batch), (zero,), (direction,))[1]
    except (RuntimeError, NotImplementedError):
        return differentiated_twice(tangent, zero, direction, batch)[1].detach()
