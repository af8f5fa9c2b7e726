"""The linearised model for few examples, with the Jacobian in memory.

It is the same function, but a training step multiplies by stored rows of the Jacobian
instead of differentiating the model. Norms of Jacobians are exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntk.gradients import Batch, batch_length, take
from ntk.linearization.closeness import Lipschitz, lipschitz
from ntk.linearization.model import LinearizedModel
from ntk.spaces import Full

ROOM = 2**30
"""Maximum bytes of stored rows; further examples are not stored."""


class TabulatedModel(LinearizedModel):
    """A linearised model that stores f0 and J of the examples it is trained on.

    Attributes:
        room: Maximum bytes of stored rows.
        table: By example, its outputs ``(c,)`` and rows ``(c, p)``.
    """

    room = ROOM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table: dict[Any, tuple[Tensor, Tensor]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``f0(x) + J(x) delta``, ``(n, c)``, as the linearised model does.

        Args:
            *args: The input, if the model takes a tensor.
            **kwargs: The inputs, if the model takes named ones. Only for these, and
                only in training, rows are stored.

        Returns:
            ``(n, c)``.
        """
        if args or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        keys = _keys(kwargs)
        for i, key in enumerate(keys):
            if key not in self.table and not self._keep(key, _one(kwargs, i)):
                return super().forward(**kwargs)
        outputs, rows = zip(*(self.table[key] for key in keys), strict=True)
        return torch.stack(outputs) + torch.stack([row @ self.delta for row in rows])

    def _keep(self, key: Any, example: Batch) -> bool:
        """Store an example's outputs and rows; return False if there is no room."""
        start = self.start(example)[0]
        size = start.numel() * self.delta.nbytes
        if size * (1 + len(self.table)) > self.room:
            return False
        self.table[key] = start, jacobian_rows(self, example)
        return True


def tabulated(model: nn.Module) -> TabulatedModel:
    """Linearise a model in all trained parameters, for `rocoft.training.trainer`.

    Args:
        model: The model, prepared for training by a method.

    Returns:
        The linearised model.
    """
    return TabulatedModel(model, Full())


def jacobian_rows(linear: LinearizedModel, batch: Batch) -> Tensor:
    """Return J, ``(n c, p)``, by one backward pass per row.

    Args:
        linear: The linearised model.
        batch: n examples.
    """
    rows = []
    for i in range(batch_length(batch)):
        example = _one(batch, i)
        units = torch.eye(linear.start(example).shape[1], device=linear.delta.device)
        rows += [linear.vjp(example, unit[None]) for unit in units]
    return torch.stack(rows)


def exact_lipschitz(
    linear: LinearizedModel, batches: Sequence[Batch], points: Sequence[Tensor]
) -> Lipschitz:
    """Measure the constants of `closeness.lipschitz` from Jacobians in memory.

    Args:
        linear: The linearised model.
        batches: n examples.
        points: Coordinates ``(p,)`` other than zero.

    Returns:
        The constants, by power iteration if there is no room for two Jacobians.
    """
    outputs = linear.start(batches)
    if 2 * outputs.numel() * linear.delta.nbytes > ROOM:
        return lipschitz(linear, batches, points)
    rows = lambda at: torch.cat([jacobian_rows(at, batch) for batch in batches])
    first = rows(linear)
    values, slopes = [_spectral_norm(first)], []
    for point in points:
        there = rows(linear.at(point))
        values.append(_spectral_norm(there))
        slopes.append(_spectral_norm(there - first) / float(point.double().norm()))
    radius = max(float(point.double().norm()) for point in points)
    return Lipschitz(values[0], max(values), max(slopes), radius)


def _spectral_norm(rows: Tensor) -> float:
    """Return the spectral norm of a wide matrix, from its small Gram matrix."""
    wide = rows.double()
    return float(torch.linalg.eigvalsh(wide @ wide.T)[-1].clamp(min=0).sqrt())


def _one(batch: Batch, i: int) -> Batch:
    return take(batch, slice(i, i + 1))


def _keys(batch: dict[str, Tensor]) -> list[Any]:
    """Return a hashable key of each example that does not depend on padding."""
    mask = batch.get("attention_mask")
    keys = []
    for i in range(len(next(iter(batch.values())))):
        parts = []
        for name, tensor in batch.items():
            row = tensor[i]
            if mask is not None and row.shape == mask[i].shape:
                row = row[mask[i].bool()]
            parts.append((name, tuple(row.flatten().tolist())))
        keys.append(tuple(parts))
    return keys
