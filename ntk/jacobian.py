"""The definition: Jacobians and kernels by automatic differentiation alone.

A tangent space is a set of coordinates delta with f(delta) = f(theta + S delta), S
linear; its Jacobian is that of f at delta = 0. Nothing here knows layers, factors or
positions, which makes it slow and makes it the judge of everything that is fast.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.contraction import Contraction
from ntk.function import Batch, NetworkFunction, batch_length, take
from ntk.maps import Map, Maps

Key = tuple[str, Map]
Coordinates = dict[str, Tensor]
Progress = Callable[[int], None]

VMAP_EXAMPLES = 8
"""Examples differentiated at a time by `torch.func.vmap`."""


def jacobian(
    function: NetworkFunction,
    batches: Sequence[Batch],
    maps: Maps,
    progress: Progress | None = None,
) -> dict[Key, Tensor]:
    """Return the Jacobian with respect to the coordinates of every map.

    `vmap` of `jacrev`; where a model cannot be mapped over (its code branches on
    data, as transformers' mask code does), the same derivatives example by example.

    Args:
        function: The model and its readout.
        batches: The examples.
        maps: What is differentiated.
        progress: Called with the number of examples done since the last call.

    Returns:
        For each parameter and map ``(c, n, p)``.
    """
    keys = [(name, each) for name, several in maps.items() for each in several]
    tangent = TangentFunction(function, keys)
    parts: dict[Key, list[Tensor]] = {key: [] for key in keys}
    mapped = True
    for batch in batches:
        for start in range(0, batch_length(batch), VMAP_EXAMPLES):
            some = take(batch, slice(start, start + VMAP_EXAMPLES))
            rows = _mapped(tangent, some) if mapped else None
            if rows is None:
                mapped = False
                rows = _looped(tangent, some)
            for i, key in enumerate(keys):
                parts[key].append(rows[str(i)])
            if progress is not None:
                progress(batch_length(some))
    return {key: torch.cat(p).transpose(0, 1) for key, p in parts.items()}


def products_kernel(
    function: NetworkFunction,
    left: Sequence[Batch],
    right: Sequence[Batch],
    maps: Maps,
    how: Contraction,
    progress: Progress | None = None,
) -> Tensor:
    """Return a kernel by NTK-vector products: K e = J (J'^T e), a vjp, then jvps.

    Memory of one gradient; the time grows with the product of n and m.

    Args:
        function: The model and its readout.
        left: n examples.
        right: m examples.
        maps: The tangent space.
        how: The contraction; its left transform must be None.
        progress: Called with the number of right examples done.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    keys = [(name, each) for name, several in maps.items() for each in several]
    tangent = TangentFunction(function, keys)
    zero = tangent.zero()
    blocks = []
    for batch in right:
        for i in range(batch_length(batch)):
            one = take(batch, slice(i, i + 1))
            blocks.append(_kernel_columns(tangent, zero, left, one, how))
            if progress is not None:
                progress(1)
    kernel = torch.stack(blocks, dim=3).double()  # (n, c, d, m)
    if not how.coupled:
        return torch.einsum("nccm->nm", kernel)
    return kernel.transpose(0, 1).flatten(2).flatten(0, 1)


def _kernel_columns(
    tangent: "TangentFunction",
    zero: Coordinates,
    left: Sequence[Batch],
    one: Batch,
    how: Contraction,
) -> Tensor:
    """Return the kernel of all left examples with one right example, ``(n, c, d)``."""
    # The fused kernels of scaled_dot_product_attention have no forward-mode
    # derivative; its plain form, the same function, has.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = _looped(tangent, one)
        columns = []
        for k in range(len(next(iter(gradients.values()))[0])):
            direction = {key: rows[0, k] for key, rows in gradients.items()}
            direction = tangent.weighted(direction, how)
            pushed = [_pushed(tangent, zero, direction, batch) for batch in left]
            columns.append(torch.cat(pushed))
    return torch.stack(columns, dim=2)


class TangentFunction:
    """The function of the coordinates, f(theta + S delta).

    Args:
        function: The model and its readout.
        keys: Parameters and maps whose coordinates delta holds, in its order.
    """

    def __init__(self, function: NetworkFunction, keys: Sequence[Key]) -> None:
        self.function = function
        self.keys = keys
        self.parameters = {
            name: parameter.detach() for name, parameter in function.parameters.items()
        }

    def zero(self) -> Coordinates:
        """Return the coordinates of theta itself."""
        return {
            str(i): self.parameters[name].new_zeros(
                each.size(self.parameters[name].shape)
            )
            for i, (name, each) in enumerate(self.keys)
        }

    def __call__(self, delta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the outputs ``(n, c)`` of a batch at some coordinates."""
        moved = dict(self.parameters)
        for i, (name, each) in enumerate(self.keys):
            moved[name] = each.shift(moved[name], delta[str(i)])
        return self.function(batch, moved)

    def weighted(self, direction: Coordinates, how: Contraction) -> Coordinates:
        """Return coordinates after the right transform, times their weights.

        Args:
            direction: Coordinates.
            how: Of which the right transform is taken.
        """
        result = {}
        for i, (_, each) in enumerate(self.keys):
            value = direction[str(i)]
            value = value if how.right is None else how.right(value)
            weights = each.weights()
            result[str(i)] = value if weights is None else value * weights.to(value)
        return result


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
        # The fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(jacrev(one), in_dims=(None, 0))(tangent.zero(), tensors)
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def _looped(tangent: TangentFunction, batch: Batch) -> Coordinates:
    """Return Jacobians ``(n, c, p)`` with one backward pass an example and output."""
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
    return {key: torch.stack(several) for key, several in rows.items()}


def differentiated_twice(
    tangent: TangentFunction, zero: Coordinates, direction: Coordinates, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return f0 and J direction where a function has no forward-mode derivative.

    J' v is linear in v: its derivative in v, along the direction, is J direction.

    Args:
        tangent: The function of the coordinates.
        zero: The coordinates of theta itself.
        direction: Coordinates; gradients with respect to them can be taken.
        batch: n examples.

    Returns:
        Twice ``(n, c)``.
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


def _pushed(
    tangent: TangentFunction, zero: Coordinates, direction: Coordinates, batch: Batch
) -> Tensor:
    """Return J direction, ``(n, c)``.

    By forward mode, which custom functions may not have (as Bloom's GELU).
    """
    try:
        return jvp(lambda delta: tangent(delta, batch), (zero,), (direction,))[1]
    except (RuntimeError, NotImplementedError):
        return differentiated_twice(tangent, zero, direction, batch)[1].detach()
