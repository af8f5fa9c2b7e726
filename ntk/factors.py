"""Gradients of one parameter in factored form, and their Gram matrices.

A pass over a batch of n examples with c outputs leaves, for every use of a parameter,
what its gradient is made of. G[k, i] below is the gradient of output k of example i:

=============  ================================================  ====================
factor         holds                                             G[k, i]
=============  ================================================  ====================
`Matrix`       x (n, t, d_in), g one (n, t, d_out) per output    sum_t g_t x_t^T
`Table`        tokens (n, t), g one (n, t, d) per output         g_t in row token_t
`Vector`       v (c, n, p)                                       v
=============  ================================================  ====================

Gram matrices never need G as a whole: blocks of its rows are formed and contracted, or
tokens are compared with tokens, whichever takes fewer operations. Features here are
output-major, ``(c, n, p)``, so that each output's products are written in place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ENTRIES = 3 * 2**13
"""Entries of each gradient formed at a time: enough for products to run at full speed,
few enough that all examples' stay near the processor."""
PANEL_ROWS = 64
"""Rows of a symmetric product formed at a time: halves its operations when many."""
TOKEN_OVERHEAD = 16
"""Cost of one elementwise multiply-add in memory, in multiply-adds of a product."""


@dataclass(frozen=True)
class Matrix:
    """A weight used as a linear map.

    Attributes:
        x: ``(n, t, d_in)`` its input.
        g: For each output, ``(n, t, d_out)`` gradients with respect to its output.
        output_dim: Dimension of the stored weight that holds the output features.
        rows: If only some rows of the stored weight were used, which.
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

    def positions(self) -> int:
        """Return the number of positions of all examples."""
        return self.x.shape[0] * self.x.shape[1]


@dataclass(frozen=True)
class Table:
    """An embedding table looked up by tokens.

    Attributes:
        tokens: ``(n, t)``.
        g: For each output, ``(n, t, d)`` gradients with respect to the looked-up rows.
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


@dataclass(frozen=True)
class Vector:
    """The gradient of a small parameter itself.

    Attributes:
        v: ``(c, n, p)``.
    """

    v: Tensor

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
        return Vector(self.v[:, i : i + 1])


Factor = Matrix | Table | Vector
Uses = Sequence[Sequence[Factor]]
"""For each batch, the factors of every use of one parameter."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contraction:
    """What is summed into a kernel entry.

    Attributes:
        left: Applied to the left gradient's entries, such as the sign.
        right: Applied to the right gradient's entries.
        coupled: Keep all pairs of outputs, else sum over equal outputs.
    """

    left: Transform | None = None
    right: Transform | None = None
    coupled: bool = True

    @property
    def linear(self) -> bool:
        """Whether gradients are contracted as they are."""
        return self.left is None and self.right is None

    def gram(
        self, left: Tensor, right: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Contract features in their own dtype.

        Args:
            left: ``(c, n, p)``.
            right: ``(c, m, p)``.
            weights: ``(p,)`` or ``(1,)`` weight of each coordinate.

        Returns:
            ``(c n, c m)``, or ``(n, m)`` if not coupled.
        """
        if self.right is not None:
            right = self.right(right)
        if self.left is not None:
            left = self.left(left)
        if weights is not None:
            left = left * weights.to(left)
        if self.coupled:
            if self.linear and left is right:
                return _self_product(left.flatten(0, 1))
            return left.flatten(0, 1) @ right.flatten(0, 1).T
        return torch.stack([a @ b.T for a, b in zip(left, right, strict=True)]).sum(0)


def gram(left: Uses, right: Uses, shape: torch.Size, how: Contraction) -> Tensor:
    """Return the Gram matrix of whole gradients of one parameter.

    Args:
        left: Factors of the left examples.
        right: Factors of the right examples; the first batches of the left ones, the
            same objects, if they are the same examples.
        shape: Of the stored parameter.
        how: The contraction.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    factors = [factor for batch in (*left, *right) for factor in batch]
    if all(_sparse(factor) for factor in factors):
        return _table_gram(left, right, shape, how)
    if all(isinstance(f, Matrix) and f.rows is None for f in factors) and (
        how.linear and _tokens_are_cheaper(left, right, shape)
    ):
        return _token_gram(left, right, how)
    return _block_gram(left, right, shape, how)


def _self_product(a: Tensor) -> Tensor:
    """Return ``a a^T`` from panels of rows times the rows up to them."""
    if len(a) <= PANEL_ROWS:
        return a @ a.T
    product = a.new_empty(len(a), len(a))
    for start in range(0, len(a), PANEL_ROWS):
        stop = min(start + PANEL_ROWS, len(a))
        panel = a[start:stop] @ a[:stop].T
        product[start:stop, :stop] = panel
        product[:start, start:stop] = panel[:, :start].T
    return product


def dense(factors: Sequence[Factor], shape: torch.Size) -> Tensor:
    """Return whole gradients.

    Args:
        factors: All uses of the parameter in one batch.
        shape: Of the stored parameter.

    Returns:
        ``(c, n, p)``.
    """
    rows = shape[0] if len(shape) else 1
    return _block([factors], 0, rows, shape.numel() // rows)


def block_operations(left: Uses, right: Uses, shape: torch.Size) -> float:
    """Return the multiply-adds of forming blocks of G and contracting them."""
    sides = (left,) if _prefix(left, right) else (left, right)
    matrices = [f for s in sides for b in s for f in b if isinstance(f, Matrix)]
    c = _outputs(left)
    form = sum(f.positions() for f in matrices) * c
    return (form + c * c * _examples(left) * _examples(right)) * shape.numel()


def token_operations(left: Uses, right: Uses) -> float:
    """Return the multiply-adds of comparing every position with every other."""
    total = 0.0
    ours, theirs = ([f for b in side for f in b] for side in (left, right))
    for a in (f for f in ours if isinstance(f, Matrix)):
        for b in (f for f in theirs if isinstance(f, Matrix)):
            pairs = len(a.g) * len(b.g)
            each = a.x.shape[2] + pairs * (a.g[0].shape[2] + TOKEN_OVERHEAD)
            total += a.positions() * b.positions() * each
    return total


def _sparse(factor: Factor) -> bool:
    """Whether a factor touches few rows of the stored parameter, and says which."""
    return isinstance(factor, Table) or (
        isinstance(factor, Matrix) and factor.rows is not None
    )


def _tokens_are_cheaper(left: Uses, right: Uses, shape: torch.Size) -> bool:
    return token_operations(left, right) < block_operations(left, right, shape)


def _token_gram(left: Uses, right: Uses, how: Contraction) -> Tensor:
    """Sum (g_t . g'_s) (x_t . x'_s) over the positions t and s of two examples."""
    c = _outputs(left) if how.coupled else 1
    n, m = _examples(left), _examples(right)
    device = _like(left[0][0]).device
    total = torch.zeros(c, n, c, m, dtype=torch.float64, device=device)
    i = 0
    for uses in left:
        j = 0
        for others in right:
            a, b = _examples([uses]), _examples([others])
            for f in uses:
                for h in others:
                    assert isinstance(f, Matrix)
                    assert isinstance(h, Matrix)
                    total[:, i : i + a, :, j : j + b] += _token_pair(f, h, how)
            j += b
        i += a
    return total.view(c * n, c * m)


def _token_pair(a: Matrix, b: Matrix, how: Contraction) -> Tensor:
    (n, t, _), (m, s, _) = a.x.shape, b.x.shape
    x = a.x.flatten(0, 1) @ b.x.flatten(0, 1).T

    def entry(g: Tensor, h: Tensor) -> Tensor:
        products = (g.flatten(0, 1) @ h.flatten(0, 1).T).mul_(x)
        return products.view(n, t, m, s).sum(dim=3).sum(dim=1)

    if not how.coupled:
        pairs = [entry(g, h) for g, h in zip(a.g, b.g, strict=True)]
        return torch.stack(pairs).sum(0).view(1, n, 1, m)
    blocks: dict[tuple[int, int], Tensor] = {}
    for k, g in enumerate(a.g):
        for l, h in enumerate(b.g):
            mirrored = a is b and l < k
            blocks[k, l] = blocks[l, k].T if mirrored else entry(g, h)
    c = range(len(a.g))
    return torch.stack([torch.stack([blocks[k, l] for l in c], dim=1) for k in c])


def _block_gram(left: Uses, right: Uses, shape: torch.Size, how: Contraction) -> Tensor:
    """Form G in blocks of rows of the stored weight and contract each."""
    c, m = _outputs(left), _examples(right)
    rows = shape[0] if len(shape) else 1
    width = shape.numel() // rows
    prefix = _prefix(left, right)
    step = min(rows, max(1, BLOCK_ENTRIES // width))
    total: Tensor | None = None
    space = [
        _workspace(s, c, step * width) for s in ((left,) if prefix else (left, right))
    ]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        a = _block(left, start, stop, width, space[0])
        b = a if prefix else _block(right, start, stop, width, space[1])
        b = b if b.shape[1] == m else b[:, :m]
        part = how.gram(a, b)
        if total is None:
            total = part.double()
        else:
            total += part
    assert total is not None
    return total


def _workspace(uses: Uses, c: int, entries: int) -> Tensor:
    return _like(uses[0][0]).new_empty(c * _examples(uses) * entries)


def _block(
    uses: Uses, start: int, stop: int, width: int, space: Tensor | None = None
) -> Tensor:
    """Return rows start to stop of all gradients, ``(c, n, rows * width)``."""
    c, n = _outputs(uses), _examples(uses)
    if space is None:
        space = _workspace(uses, c, (stop - start) * width)
    out = space[: c * n * (stop - start) * width].view(c, n, stop - start, width)
    i = 0
    for batch in uses:
        count = _examples([batch])
        for number, factor in enumerate(batch):
            factor.add_block(start, stop, out[:, i : i + count], first=number == 0)
        i += count
    return out.flatten(2)


def _table_gram(left: Uses, right: Uses, shape: torch.Size, how: Contraction) -> Tensor:
    """Contract rows of a table one by one: only equal tokens meet."""
    n, m = _examples(left), _examples(right)
    example, token, values = _entries(left, shape[0])
    same = _prefix(left, right) and n == m
    other, other_token, other_values = (
        (example, token, values) if same else _entries(right, shape[0])
    )
    c = values.shape[0] if how.coupled else 1
    total = torch.zeros(n, m, c, c, dtype=torch.float64, device=values.device)
    singles: list[tuple[Tensor, Tensor]] = []
    for a, b in _shared_tokens(token, other_token):
        if len(a) == len(b) == 1:
            singles.append((a, b))
            continue
        part = how.gram(values[:, a], other_values[:, b]).double()
        part = part.view(c, len(a), c, len(b)).permute(1, 3, 0, 2)
        total[example[a][:, None], other[b][None, :]] += part
    if singles:
        # Most tokens occur once; all of those at a time.
        a, b = (torch.cat(side) for side in zip(*singles, strict=True))
        g, h = values[:, a], other_values[:, b]
        g, h = how.left(g) if how.left else g, how.right(h) if how.right else h
        if how.coupled:
            part = torch.einsum("cup,dup->ucd", g, h)
        else:
            part = torch.einsum("cup,cup->u", g, h)[:, None, None]
        total.index_put_((example[a], other[b]), part.double(), accumulate=True)
    return total.permute(2, 0, 3, 1).reshape(c * n, c * m)


def _entries(uses: Uses, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nonzero rows of every example: example, token, ``(c, rows, d)``.

    A row that an example holds several times is given once, the sum, which is what
    the sign of a gradient is taken of.
    """
    keys, values, offset = [], [], 0
    for batch in uses:
        n = _examples([batch])
        number = torch.arange(offset, offset + n, device=_like(batch[0]).device)
        for factor in batch:
            if isinstance(factor, Table):
                rows, gradients = factor.tokens, factor.g
            else:
                assert isinstance(factor, Matrix)
                assert factor.rows is not None
                rows = factor.rows
                gradients = tuple(
                    torch.bmm(g.transpose(1, 2), factor.x) for g in factor.g
                )
            keys.append((number[:, None] * vocabulary + rows).flatten())
            values.append(torch.stack([g.flatten(0, 1) for g in gradients]))
        offset += n
    unique, inverse = torch.cat(keys).unique(return_inverse=True)
    gathered = torch.cat(values, dim=1)
    summed = gathered.new_zeros(len(gathered), len(unique), gathered.shape[2])
    summed.index_add_(1, inverse, gathered)
    return unique // vocabulary, unique % vocabulary, summed


def _shared_tokens(left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each token on both sides, the entries that hold it."""
    order_left, order_right = left.argsort(), right.argsort()
    tokens, counts = left[order_left].unique_consecutive(return_counts=True)
    others, other_counts = right[order_right].unique_consecutive(return_counts=True)
    pieces = dict(
        zip(others.tolist(), order_right.split(other_counts.tolist()), strict=True)
    )
    for token, piece in zip(
        tokens.tolist(), order_left.split(counts.tolist()), strict=True
    ):
        if token in pieces:
            yield piece, pieces[token]


def _prefix(left: Uses, right: Uses) -> bool:
    """Whether the right examples are the first batches of the left ones."""
    return len(right) <= len(left) and all(
        a is b for a, b in zip(left, right, strict=False)
    )


def _like(factor: Factor) -> Tensor:
    return factor.v if isinstance(factor, Vector) else factor.g[0]


def _examples(uses: Uses) -> int:
    return sum(
        b[0].v.shape[1] if isinstance(b[0], Vector) else len(b[0].g[0]) for b in uses
    )


def _outputs(uses: Uses) -> int:
    factor = uses[0][0]
    return len(factor.v) if isinstance(factor, Vector) else len(factor.g)
