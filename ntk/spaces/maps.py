"""Linear maps of a weight's gradient, which a tangent space assigns to each weight.

============  ===================================  ==========================
map           features of a weight                 coordinates
============  ===================================  ==========================
`Whole`       G                                    d_out d_in
`Slices`      G[R, :] and G[not R, C]              r d_in + (d_out - r) c
`LowRank`     s G A^T                              d_out r
`InputSide`   all G[:, C] and s G A^T of a weight  d_out (sum of c and r)
`Sketch`      random signed sums of entries of G   as many as wanted
============  ===================================  ==========================

with ``G[n, c] = sum_t g[n, c, t] x[n, t]^T`` of shape (d_out, d_in), x the layer's
input and g the gradient with respect to its output. The adjoint of a map, `shift`,
moves the weight by coordinates delta; the definition in `ntk.gradients.jacobians`
differentiates it.

Features are computed from one output's gradients at a time: `prepare` reduces x and
`pick` reduces g to the part needed, `add` adds their contribution. If `picks_few`, the
part of g is small enough to buffer until the gradients of all outputs have arrived.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from rocoft.models import LinearWeight

TRANSFORM_ENTRIES = 2**23
"""Maximum entries of a sketch's Fourier transforms computed at a time."""


@dataclass(frozen=True)
class Whole:
    """All entries of a parameter."""

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        return torch.Size(shape).numel()

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel; None means 1."""
        return None

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        return weight + delta.view_as(weight)


class _HashedOnce:
    """A map with a cached hash: maps are dictionary keys at every gradient."""

    @cached_property
    def _hash(self) -> int:
        attributes = fields(self)  # type: ignore[arg-type]
        return hash(tuple(getattr(self, field.name) for field in attributes))

    def kept_hash(self) -> int:
        """Return the cached hash; subclasses assign it over that of `dataclass`."""
        return self._hash

    def __getstate__(self) -> dict[str, object]:
        """Drop the hash: hashes of strings differ between processes."""
        return {name: value for name, value in vars(self).items() if name != "_hash"}


@dataclass(frozen=True)
class Slices(_HashedOnce):
    """Some rows and columns of a linear weight, an entry in both counted once.

    Attributes:
        of: The weight.
        rows: Selected output features.
        columns: Selected input features.
        rescale: Whether to weight each entry by its inverse selection probability. With
            uniform random rows and columns that estimates the kernel of the whole
            weight without bias (Horvitz and Thompson 1952).
        odds: Selection probability of each row, or of each column if there are no rows;
            empty means uniform.
    """

    of: LinearWeight
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    rescale: bool = False
    odds: tuple[float, ...] = ()

    __hash__ = _HashedOnce.kept_hash

    @cached_property
    def row_places(self) -> slice | Tensor:
        """The rows as an index, a slice if they are consecutive."""
        return _places(self.rows)

    @cached_property
    def _column_places(self) -> slice | Tensor:
        return _places(self.columns)

    @cached_property
    def other_rows(self) -> tuple[int, ...]:
        """Rows that are not selected but cross selected columns."""
        if not self.columns:
            return ()
        chosen = set(self.rows)
        return tuple(i for i in range(self.of.outputs) if i not in chosen)

    @cached_property
    def _other_places(self) -> slice | Tensor:
        return _places(self.other_rows)

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        rows = len(self.rows) * self.of.inputs
        return rows + (self.of.outputs - len(self.rows)) * len(self.columns)

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel; None means 1."""
        if not self.rescale:
            return None
        if self.odds:
            each = 1 / torch.tensor(self.odds, dtype=torch.float64)
            if self.rows:
                return each.repeat_interleave(self.of.inputs)
            return each.repeat(self.of.outputs)
        row_odds = torch.zeros(self.of.outputs, dtype=torch.float64)
        chosen = set(self.rows)
        for part in self.of.parts:
            row_odds[list(part)] = sum(i in chosen for i in part) / len(part)
        column_odds = len(self.columns) / self.of.inputs
        odds = 1 - (1 - row_odds) * (1 - column_odds)
        by_row = (1 / odds)[list(self.rows)].repeat_interleave(self.of.inputs)
        by_column = (1 / odds)[list(self.other_rows)]
        return torch.cat([by_row, by_column.repeat_interleave(len(self.columns))])

    @property
    def picks_few(self) -> bool:
        """Whether `pick` returns only a small part of a gradient."""
        return not self.columns and 4 * len(self.rows) <= self.of.outputs

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the part of the layer's input ``(n, t, inputs)`` that `add` needs."""
        return (x, _pick(x, self._column_places)) if self.columns else (x,)

    def pick(self, g: Tensor) -> Tensor:
        """Return the part of one output's gradients ``(n, t, outputs)`` `add` needs.

        Few rows are copied so that the other gradients can be freed.
        """
        return _pick(g, self.row_places).contiguous() if self.picks_few else g

    def add(
        self, g: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, first: bool
    ) -> None:
        """Add the features of one output to ``out``, or write them there.

        Args:
            g: The result of `pick`.
            kept: The result of `prepare`.
            out: ``(n, size)``.
            first: Whether to overwrite ``out``.
        """
        cut = len(self.rows) * self.of.inputs
        if self.rows:
            by_row = out[:, :cut].view(len(g), len(self.rows), self.of.inputs)
            chosen = g if self.picks_few else _pick(g, self.row_places)
            _add_product(chosen.transpose(1, 2), kept[0], by_row, first)
        if self.columns:
            # Drop rows of the small product, not of all gradients. A product with few
            # rows is faster than one with few columns.
            product = torch.bmm(kept[1].transpose(1, 2), g)
            columns = _pick(product, self._other_places).transpose(1, 2)
            part = out[:, cut:].view(columns.shape)
            if first:
                part.copy_(columns)
            else:
                part += columns

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return features ``(c, n, size)`` of gradients ``(c, n, outputs, inputs)``."""
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
class LowRank(_HashedOnce):
    """The B of a LoRA pair at initialisation: ``W + s B A`` with B = 0.

    A is drawn like in peft, uniform in ``+-1 / sqrt(inputs)``. Its gradient is zero at
    B = 0, so it adds no coordinates (Hu et al. 2022; Malladi et al. 2023, theorem 7.2
    on the kernel's concentration).

    Attributes:
        of: The weight.
        rank: Number of rows of A.
        seed: Seed of A; each weight has its own stream.
        scaling: s, alpha / rank.
        rescale: Whether to make the kernel an unbiased estimate of the whole weight's.
    """

    of: LinearWeight
    rank: int
    seed: int
    scaling: float
    rescale: bool = False

    __hash__ = _HashedOnce.kept_hash

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
        """Return the weight of each coordinate in the kernel; None means 1.

        E[A^T A] is rank / (3 inputs) times the identity.
        """
        if not self.rescale:
            return None
        factor = 3 * self.of.inputs / (self.rank * self.scaling**2)
        return torch.full((1,), factor, dtype=torch.float64)

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        up = delta.view(self.rank, self.of.outputs).T
        low_rank = up @ (self.scaling * self.down.to(delta))
        return oriented(oriented(weight, self.of) + low_rank, self.of)


@dataclass(frozen=True)
class InputSide(_HashedOnce):
    """Columns and LoRA pairs of one weight, which use few features of x, side by side.

    Features are ``(q, outputs)``: those of the columns, then those of every pair.

    Attributes:
        of: The weight.
        columns: Selected input features.
        pairs: LoRA pairs.
    """

    of: LinearWeight
    columns: tuple[int, ...]
    pairs: tuple[LowRank, ...]

    __hash__ = _HashedOnce.kept_hash

    @cached_property
    def _column_places(self) -> slice | Tensor:
        return _places(self.columns)

    @cached_property
    def down(self) -> Tensor:
        """The scaled A of all pairs, ``(sum of ranks, inputs)`` in float64."""
        return torch.cat([each.scaling * each.down for each in self.pairs])

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """The slice of each pair among the q features."""
        ends = [len(self.columns)]
        for each in self.pairs:
            ends.append(ends[-1] + each.rank)
        return tuple(slice(a, b) for a, b in pairwise(ends))

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        ranks = sum(each.rank for each in self.pairs)
        return self.of.outputs * (len(self.columns) + ranks)

    def weights(self) -> Tensor | None:
        """Return None: the columns and pairs have their own weights."""
        return None

    picks_few = False

    def pick(self, g: Tensor) -> Tensor:
        """Return all gradients: `add` needs them."""
        return g

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        """Return the q features ``(n, q, t)`` of the input ``(n, t, inputs)``."""
        parts = [_pick(x, self._column_places)] if self.columns else []
        if self.pairs:
            parts.append(F.linear(x, self.down.to(x)))
        features = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return (features.transpose(1, 2),)

    def add(
        self, g: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, first: bool
    ) -> None:
        """Add the features of one output to ``out`` ``(n, size)``, see `Slices.add`."""
        by_feature = out.view(len(g), -1, self.of.outputs)
        _add_product(kept[0], g, by_feature, first)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return features ``(c, n, size)`` of gradients ``(c, n, outputs, inputs)``."""
        turned = gradient.transpose(2, 3)
        parts = [turned[:, :, list(self.columns)]] if self.columns else []
        if self.pairs:
            parts.append(self.down.to(gradient) @ turned)
        return torch.cat(parts, dim=2).flatten(2)

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        moved, by_feature = oriented(weight, self.of), delta.view(-1, self.of.outputs)
        cut = len(self.columns)
        if self.columns:
            columns = torch.tensor(self.columns, device=weight.device)
            moved = moved.index_add(1, columns, by_feature[:cut].T)
        if self.pairs:
            moved = moved + by_feature[cut:].T @ self.down.to(delta)
        return oriented(moved, self.of)


@dataclass(frozen=True)
class Sketch:
    """A random projection of a linear weight's gradient by TensorSketch, from factors.

    Entry (i, j) of G is added, with the sign ``a_i b_j``, to coordinate
    ``(h_i + k_j) mod size``; a, b, h and k are drawn once. That is the circular
    convolution of the count sketches of g_t and x_t, a product of their Fourier
    transforms, summed over positions. The inner product of two sketches is an unbiased
    estimate of that of the gradients, with a variance of at most ``11 / size`` times
    the product of their squared norms (Pham and Pagh 2013; Avron, Nguyen and Woodruff
    2014).

    Attributes:
        of: The weight.
        entries: Number of coordinates.
        seed: Seed of the draw; each weight has its own stream.
    """

    of: LinearWeight
    entries: int
    seed: int

    @cached_property
    def _drawn(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(h, a) of the output features and (k, b) of the input features."""
        generator = torch.Generator()
        generator.manual_seed(zlib.crc32(f"{self.seed} {self.of.name}".encode()))
        outputs, inputs = (
            (
                torch.randint(self.entries, (d,), generator=generator),
                2 * torch.randint(2, (d,), generator=generator) - 1,
            )
            for d in (self.of.outputs, self.of.inputs)
        )
        return outputs, inputs

    def size(self, shape: Sequence[int]) -> int:
        """Return the number of coordinates."""
        return self.entries

    def weights(self) -> Tensor | None:
        """Return the weight of each coordinate in the kernel; None means 1."""
        return None

    picks_few = False

    def pick(self, g: Tensor) -> Tensor:
        """Return all gradients: `add` needs them."""
        return g

    def prepare(self, x: Tensor) -> tuple[Tensor]:
        """Return the input itself: its transforms are larger and quick to compute."""
        return (x,)

    def add(
        self, g: Tensor, kept: tuple[Tensor, ...], out: Tensor, *, first: bool
    ) -> None:
        """Add the features of one output to ``out`` ``(n, size)``, see `Slices.add`."""
        step = max(1, TRANSFORM_ENTRIES // (g.shape[1] * self.entries))
        of_output, of_input = self._drawn
        for i in range(0, len(g), step):
            rows = slice(i, i + step)
            product = self._transform(g[rows], of_output)
            product *= self._transform(kept[0][rows], of_input)
            part = torch.fft.irfft(product.sum(dim=1), n=self.entries)
            if first:
                out[rows] = part
            else:
                out[rows] += part

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Return features ``(c, n, size)`` of gradients ``(c, n, outputs, inputs)``."""
        places, signs = self._of_entries(gradient)
        sums = gradient.new_zeros(*gradient.shape[:2], self.entries)
        return sums.index_add_(2, places.flatten(), (gradient * signs).flatten(2))

    def shift(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return the parameter moved by ``delta``, ``(size,)``."""
        places, signs = self._of_entries(weight)
        return oriented(oriented(weight, self.of) + delta[places] * signs, self.of)

    def _transform(self, values: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        """Return the Fourier transforms of count sketches of ``(n, t, d)``."""
        # torch.fft has no 16-bit transform.
        dtype = torch.promote_types(values.dtype, torch.float32)
        places, signs = (each.to(values.device) for each in drawn)
        sums = values.new_zeros(*values.shape[:2], self.entries, dtype=dtype)
        sums.index_add_(2, places, values.to(dtype) * signs)
        return torch.fft.rfft(sums)

    def _of_entries(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return coordinate and sign of each entry, ``(outputs, inputs)``."""
        (h, a), (k, b) = self._drawn
        places = (h[:, None] + k) % self.entries
        return places.to(like.device), (a[:, None] * b).to(like)


Map = Whole | Slices | LowRank | InputSide | Sketch
Maps = dict[str, tuple[Map, ...]]


def _add_product(a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
    """Write ``a @ b`` of every example to ``out``, or add it."""
    torch.baddbmm(out, a, b, beta=0 if first else 1, out=out)


def _pick(values: Tensor, chosen: slice | Tensor) -> Tensor:
    """Return some features of the last axis; consecutive ones without a copy."""
    if isinstance(chosen, slice):
        return values[..., chosen]
    return values.index_select(-1, chosen.to(values.device))


def _places(indices: tuple[int, ...]) -> slice | Tensor:
    if indices and indices[-1] - indices[0] == len(indices) - 1:
        return slice(indices[0], indices[-1] + 1)
    return torch.tensor(indices, dtype=torch.long)


def oriented(weight: Tensor, of: LinearWeight) -> Tensor:
    """Transpose a stored weight to (outputs, inputs) if needed, or back."""
    return weight if of.output_dim == 0 else weight.T
