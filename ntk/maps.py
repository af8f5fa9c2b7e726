"""Linear maps of a weight's gradient: what a tangent space is, weight by weight.

============  ===================================  ==========================
map           features of a weight                 coordinates
============  ===================================  ==========================
`Whole`       G                                    d_out d_in
`Slices`      G[R, :] and G[not R, C]              r d_in + (d_out - r) c
`LowRank`     s G A^T                              d_out r
============  ===================================  ==========================

with ``G[n, c] = sum_t g[n, c, t] x[n, t]^T`` of shape (d_out, d_in), x the layer's
input and g the gradient with respect to its output. A map also says how coordinates
delta move the weight (`shift`), which is what the definition in `jacobian`
differentiates: features and coordinates are adjoint to each other.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rocoft.architecture import LinearWeight


@dataclass(frozen=True)
class Whole:
    """All entries of a parameter."""

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        return torch.Size(shape).numel()

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel, None for one."""
        return None

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        return weight + delta.view_as(weight)


@dataclass(frozen=True)
class Slices:
    """Some rows and columns of a linear weight, an entry in both counted once.

    Attributes:
        of: The weight.
        rows: Selected output features.
        columns: Selected input features.
        rescale: Weight each entry by the inverse of its probability of selection, so
            that with uniform random rows and columns the kernel of the whole weight
            is estimated without bias (Horvitz and Thompson 1952).
    """

    of: LinearWeight
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rescale: bool = False

    @cached_property
    def other_rows(self) -> tuple[int, ...]:
        """Output features whose selected columns are features of their own."""
        if not self.columns:
            return ()
        chosen = set(self.rows)
        return tuple(i for i in range(self.of.outputs) if i not in chosen)

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        rows = len(self.rows) * self.of.inputs
        return rows + len(self.other_rows) * len(self.columns)

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel, None for one."""
        if not self.rescale:
            return None
        row_odds = torch.zeros(self.of.outputs, dtype=torch.float64)
        chosen = set(self.rows)
        for part in self.of.parts:
            row_odds[list(part)] = sum(i in chosen for i in part) / len(part)
        column_odds = len(self.columns) / self.of.inputs
        odds = 1 - (1 - row_odds) * (1 - column_odds)
        by_row = (1 / odds)[list(self.rows)].repeat_interleave(self.of.inputs)
        by_column = (1 / odds)[list(self.other_rows)]
        return torch.cat([by_row, by_column.repeat_interleave(len(self.columns))])

    def features(self, g: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the features of a weight's gradient given in factors.

        Args:
            g: For each of c outputs, ``(n, t, outputs)`` gradients with respect to the
                layer's output.
            x: ``(n, t, inputs)`` the layer's input.

        Returns:
            ``(c, n, size)``.
        """
        pieces = []
        if self.rows:
            pieces.append(contract(_pick(g, self.rows), x))
        if self.other_rows:
            columns = contract(g, _pick([x], self.columns)[0])
            if self.rows:
                # Dropping rows of the small product, not of all gradients.
                by_row = columns.unflatten(2, (self.of.outputs, -1))
                kept = torch.tensor(self.other_rows, device=x.device)
                columns = by_row.index_select(2, kept).flatten(2)
            pieces.append(columns)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return the features ``(c, n, size)`` of ``(c, n, outputs, inputs)``."""
        rows = gradient[:, :, list(self.rows)].flatten(2)
        others = gradient[:, :, list(self.other_rows)][..., list(self.columns)]
        return torch.cat([rows, others.flatten(2)], dim=2)

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        moved = oriented(weight, self.of)
        cut = len(self.rows) * self.of.inputs
        device = weight.device
        if self.rows:
            rows = torch.tensor(self.rows, device=device)
            moved = moved.index_add(0, rows, delta[:cut].view(-1, self.of.inputs))
        if self.other_rows:
            rows = torch.tensor(self.other_rows, device=device)[:, None]
            columns = torch.tensor(self.columns, device=device)[None, :]
            part = delta[cut:].view(len(self.other_rows), len(self.columns))
            moved = moved.index_put((rows, columns), part, accumulate=True)
        return oriented(moved, self.of)


@dataclass(frozen=True)
class LowRank:
    """The B of a LoRA pair at initialisation: ``W + s B A`` with B = 0.

    A is drawn as peft draws it, uniform in ``+-1 / sqrt(inputs)``. Its own gradient is
    zero at B = 0, so it adds no coordinates (Hu et al. 2022; Malladi et al. 2023,
    theorem 7.2 on the kernel's concentration).

    Attributes:
        of: The weight.
        rank: Rows of A.
        seed: Of A; each weight draws from its own stream.
        scaling: s, alpha / rank.
        rescale: Make the kernel an unbiased estimate of the whole weight's.
    """

    of: LinearWeight
    rank: int
    seed: int
    scaling: float
    rescale: bool = False

    @cached_property
    def down(self) -> Tensor:
        """A, ``(rank, inputs)`` in float64."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + zlib.crc32(self.of.name.encode()))
        uniform = torch.rand(self.rank, self.of.inputs, generator=generator)
        return (2 * uniform.double() - 1) / self.of.inputs**0.5

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        return self.of.outputs * self.rank

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel, None for one.

        E[A^T A] is rank / (3 inputs) times the identity.
        """
        if not self.rescale:
            return None
        factor = 3 * self.of.inputs / (self.rank * self.scaling**2)
        return torch.full((1,), factor, dtype=torch.float64)

    def features(self, g: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the features of a weight's gradient given in factors.

        Args:
            g: For each of c outputs, ``(n, t, outputs)`` gradients with respect to the
                layer's output.
            x: ``(n, t, inputs)`` the layer's input.

        Returns:
            ``(c, n, size)``.
        """
        return project(g, x, self.scaling * self.down)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return the features ``(c, n, size)`` of ``(c, n, outputs, inputs)``."""
        down = self.scaling * self.down.to(gradient)
        return (down @ gradient.transpose(2, 3)).flatten(2)

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        up = delta.view(self.rank, self.of.outputs).T
        low_rank = up @ (self.scaling * self.down.to(delta))
        return oriented(oriented(weight, self.of) + low_rank, self.of)


@dataclass(frozen=True)
class Stack:
    """LoRA pairs of one weight side by side: their features, one after the other.

    Attributes:
        members: The pairs.
    """

    members: tuple[LowRank, ...]

    @property
    def of(self) -> LinearWeight:
        """The weight."""
        return self.members[0].of

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        return sum(each.size(shape) for each in self.members)

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel, None for one."""
        if not any(each.rescale for each in self.members):
            return None
        one = torch.ones(1, dtype=torch.float64)
        return torch.cat(
            [
                (one if (own := each.weights()) is None else own).expand(each.size(()))
                for each in self.members
            ]
        )

    def features(self, g: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the features ``(c, n, size)``, see `LowRank.features`."""
        down = torch.cat([each.scaling * each.down for each in self.members])
        return project(g, x, down)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return the features ``(c, n, size)`` of ``(c, n, outputs, inputs)``."""
        return torch.cat([each.of_gradient(gradient) for each in self.members], dim=2)

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        sizes = [each.size(weight.shape) for each in self.members]
        for each, own in zip(self.members, delta.split(sizes), strict=True):
            weight = each.shift(weight, own)
        return weight

    def split(self, features: Tensor) -> list[Tensor]:
        """Return the members' features."""
        return list(features.split([each.size(()) for each in self.members], dim=2))


Map = Whole | Slices | LowRank | Stack
Maps = dict[str, tuple[Map, ...]]


def contract(g: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return ``sum_t g[c][n, t] x[n, t]^T`` for every output c and example n.

    Args:
        g: For each of c outputs, ``(n, t, o)``.
        x: ``(n, t, i)``.

    Returns:
        ``(c, n, o * i)``.
    """
    n, _, i = x.shape
    products = x.new_empty(len(g), n, g[0].shape[2], i)
    for k, each in enumerate(g):
        torch.bmm(each.transpose(1, 2), x, out=products[k])
    return products.flatten(2)


def project(g: Sequence[Tensor], x: Tensor, down: Tensor) -> Tensor:
    """Return ``sum_t (down x[n, t]) g[c][n, t]^T``, the features of LoRA's B.

    Args:
        g: For each of c outputs, ``(n, t, o)``.
        x: ``(n, t, i)``.
        down: ``(r, i)``.

    Returns:
        ``(c, n, r * o)``.
    """
    low = (x @ down.to(x).T).transpose(1, 2)
    products = x.new_empty(len(g), len(x), len(down), g[0].shape[2])
    for k, each in enumerate(g):
        torch.bmm(low, each, out=products[k])
    return products.flatten(2)


def _pick(values: Sequence[Tensor], indices: tuple[int, ...]) -> list[Tensor]:
    """Return some features of each tensor; a run of them without a copy."""
    if indices[-1] - indices[0] == len(indices) - 1:
        return [v[..., indices[0] : indices[-1] + 1] for v in values]
    chosen = torch.tensor(indices, device=values[0].device)
    return [v.index_select(-1, chosen) for v in values]


def oriented(weight: Tensor, of: LinearWeight) -> Tensor:
    """Turn a stored weight into (outputs, inputs), or such a matrix back."""
    return weight if of.output_dim == 0 else weight.T
