"""Gradients of one parameter in factored form.

A pass over a batch of n examples with c outputs yields a factor for every use of a
parameter. G[k, i] below is the gradient of output k of example i:

=============  ================================================  ====================
factor         holds                                             G[k, i]
=============  ================================================  ====================
`Matrix`       x (n, t, d_in), g one (n, t, d_out) per output    sum_t g_t x_t^T
`Table`        tokens (n, t), g one (n, t, d) per output         g_t in row token_t
`Vector`       v (c, n, p)                                       v
=============  ================================================  ====================

Gradients are output-major here, ``(c, n, p)``, so that the products of each output can
be written in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A weight used as a linear map.

    Attributes:
        x: ``(n, t, d_in)`` input of the map.
        g: For each model output, ``(n, t, d_out)`` gradients with respect to the map's
            output.
        output_dim: Dimension of the stored weight that holds the output features.
        rows: Indices of the rows of the stored weight that were used; None for all.
    """

    x: Tensor
    g: tuple[Tensor, ...]
    output_dim: int = 0
    rows: Tensor | None = None

    def add_block(self, start: int, stop: int, out: Tensor, *, first: bool) -> None:
        """Add rows start to stop of the stored gradient to ``(c, n, rows, d)``."""
        if self.rows is not None:
            self._scatter(start, stop, out, first=first)
            return
        beta = 0 if first else 1
        for k, g in enumerate(self.g):
            left, right = (g, self.x) if self.output_dim == 0 else (self.x, g)
            part = left[..., start:stop].transpose(1, 2)
            torch.baddbmm(out[k], part, right, beta=beta, out=out[k])

    def _scatter(self, start: int, stop: int, out: Tensor, *, first: bool) -> None:
        assert self.rows is not None
        if first:
            out.zero_()
        inside = (self.rows >= start) & (self.rows < stop)
        if not bool(inside.any()):
            return
        for k, g in enumerate(self.g):
            part = torch.bmm(g[..., inside].transpose(1, 2), self.x)
            out[k].index_add_(1, self.rows[inside] - start, part)

    def example(self, i: int) -> "Matrix":
        """Return the factor of one example."""
        g = tuple(h[i : i + 1] for h in self.g)
        return Matrix(self.x[i : i + 1], g, self.output_dim, self.rows)

    def magnitude(self) -> "Matrix":
        """Return the factor whose G sums the magnitudes of the terms of this one's."""
        return replace(self, x=self.x.abs(), g=tuple(h.abs() for h in self.g))

    def projected(self, u: Tensor, v: Tensor) -> tuple[float, float]:
        """Return u' G v summed over examples, and the sum of its terms' magnitudes.

        Args:
            u: One number for each row of the stored parameter.
            v: One number for each entry of a row.
        """
        rows, entries = (
            (self.g[0], self.x) if self.output_dim == 0 else (self.x, self.g[0])
        )
        u = u if self.rows is None else u[self.rows]
        return _sums((rows.to(u) @ u) * (entries.to(v) @ v))

    def positions(self) -> int:
        """Return the total number of positions of all examples."""
        return self.x.shape[0] * self.x.shape[1]


@dataclass(frozen=True)
class Table:
    """An embedding table looked up by tokens.

    Attributes:
        tokens: ``(n, t)``.
        g: For each model output, ``(n, t, d)`` gradients of the looked-up rows.
    """

    tokens: Tensor
    g: tuple[Tensor, ...]

    def add_block(self, start: int, stop: int, out: Tensor, *, first: bool) -> None:
        """Add rows start to stop of the gradient to ``(c, n, rows, d)``."""
        if first:
            out.zero_()
        inside = (self.tokens >= start) & (self.tokens < stop)
        example, position = inside.nonzero(as_tuple=True)
        row = self.tokens[example, position] - start
        for k, g in enumerate(self.g):
            out[k].index_put_((example, row), g[example, position], accumulate=True)

    def example(self, i: int) -> "Table":
        """Return the factor of one example."""
        return Table(self.tokens[i : i + 1], tuple(h[i : i + 1] for h in self.g))

    def magnitude(self) -> "Table":
        """Return the factor whose G sums magnitudes, see `Matrix.magnitude`."""
        return replace(self, g=tuple(h.abs() for h in self.g))

    def projected(self, u: Tensor, v: Tensor) -> tuple[float, float]:
        """Return u' G v and the sum of magnitudes, see `Matrix.projected`."""
        return _sums(u[self.tokens] * (self.g[0].to(v) @ v))


@dataclass(frozen=True)
class Vector:
    """The gradient of a small parameter itself.

    Attributes:
        v: ``(c, n, p)``.
        terms: Returns the sum of the magnitudes of the terms of v, ``(c, n, p)``; None
            if v has one term.
    """

    v: Tensor
    terms: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    def add_block(self, start: int, stop: int, out: Tensor, *, first: bool) -> None:
        """Add entries of the gradient to ``(c, n, rows, d)``, d entries a row."""
        width = out.shape[3]
        part = self.v[..., start * width : stop * width].view_as(out)
        if first:
            out.copy_(part)
        else:
            out += part

    def example(self, i: int) -> "Vector":
        """Return the factor of one example."""
        some, terms = slice(i, i + 1), self.terms
        return Vector(self.v[:, some], (lambda: terms()[:, some]) if terms else None)

    def magnitude(self) -> "Vector":
        """Return the factor whose G sums magnitudes, see `Matrix.magnitude`."""
        return Vector(self.v.abs() if self.terms is None else self.terms())

    def projected(self, u: Tensor, v: Tensor) -> tuple[float, float]:
        """Return u' G v and the sum of magnitudes, see `Matrix.projected`."""
        weights = u[:, None] * v
        value = self.v[0].to(u).view(-1, len(u), len(v)) * weights
        size = self.magnitude().v[0].to(u).view_as(value) * weights.abs()
        return float(value.sum()), float(size.sum())


def _sums(terms: Tensor) -> tuple[float, float]:
    return float(terms.sum()), float(terms.abs().sum())


Factor = Matrix | Table | Vector
Uses = Sequence[Sequence[Factor]]
"""For each batch, the factors of every use of one parameter."""


def joined(parts: Sequence[Factor]) -> Factor:
    """Concatenate factors of one use, one per output."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Vector):
        return Vector(torch.cat([p.v for p in parts if isinstance(p, Vector)]))
    g = tuple(h for p in parts if not isinstance(p, Vector) for h in p.g)
    return replace(first, g=g)


def raised(factor: Factor) -> Factor:
    """Return a factor in float32 or better, for contraction."""
    if isinstance(factor, Vector):
        return Vector(at_least_float32(factor.v))
    g = tuple(map(at_least_float32, factor.g))
    if isinstance(factor, Table):
        return Table(factor.tokens, g)
    return replace(factor, x=at_least_float32(factor.x), g=g)


def at_least_float32(values: Tensor) -> Tensor:
    """Return values in float32 if their precision is lower, else unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def dense(factors: Sequence[Factor], shape: torch.Size) -> Tensor:
    """Return whole gradients.

    Args:
        factors: Factors of all uses of the parameter in one batch.
        shape: Shape of the stored parameter.

    Returns:
        ``(c, n, p)``.
    """
    rows = shape[0] if len(shape) else 1
    return block([factors], 0, rows, shape.numel() // rows)


def block(
    uses: Uses, start: int, stop: int, width: int, space: Tensor | None = None
) -> Tensor:
    """Return rows start to stop of all gradients, ``(c, n, rows * width)``."""
    c, n = outputs(uses), examples(uses)
    if space is None:
        space = workspace(uses, c, (stop - start) * width)
    out = space[: c * n * (stop - start) * width].view(c, n, stop - start, width)
    i = 0
    for batch in uses:
        count = examples([batch])
        for number, factor in enumerate(batch):
            factor.add_block(start, stop, out[:, i : i + count], first=number == 0)
        i += count
    return out.flatten(2)


def workspace(uses: Uses, c: int, entries: int) -> Tensor:
    """Allocate a buffer for a number of entries of every gradient of c outputs."""
    return like(uses[0][0]).new_empty(c * examples(uses) * entries)


def is_prefix(left: Uses, right: Uses) -> bool:
    """Whether the right examples are the first batches of the left ones."""
    return len(right) <= len(left) and all(
        a is b for a, b in zip(left, right, strict=False)
    )


def like(factor: Factor) -> Tensor:
    """Return a tensor with the dtype and device of a factor."""
    return factor.v if isinstance(factor, Vector) else factor.g[0]


def examples(uses: Uses) -> int:
    """Return the number of examples."""
    return sum(
        b[0].v.shape[1] if isinstance(b[0], Vector) else len(b[0].g[0]) for b in uses
    )


def outputs(uses: Uses) -> int:
    """Return the number of outputs."""
    factor = uses[0][0]
    return len(factor.v) if isinstance(factor, Vector) else len(factor.g)
