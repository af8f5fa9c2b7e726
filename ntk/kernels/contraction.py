"""Gram matrices of gradients from their factors, without forming all gradients.

Three routes; a linear weight takes the first or the second, whichever needs fewer
operations:

- positions against positions (`positions`);
- blocks of rows of G, formed and contracted one after another;
- for embedding tables, the rows that two examples share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.gradients import (
    Factor,
    Matrix,
    Table,
    Uses,
    block,
    examples,
    is_prefix,
    like,
    outputs,
    workspace,
)
from ntk.kernels.positions import position_gram
from ntk.kernels.precision import Precision, product

BLOCK_ENTRIES = 2**16
"""Entries of each gradient formed at a time: enough for products to run at full speed,
few enough for the blocks of all examples to stay in the processor's cache."""
BLOCK_MEMORY = 2**26
"""Entries formed at a time, of the gradients of all examples and outputs together."""
PANEL_ROWS = 256
"""Largest number of rows of a symmetric product formed at a time, at most half of all.
Smaller panels would save more operations but run slower."""
LONG_SUM = 2**15
"""Products summed in the features' own precision if there are more than
`BLOCK_ENTRIES`: some processors lose a digit in sums of a hundred thousand."""
SMALL_PRODUCT = 128
"""Number of rows up to which a symmetric product is formed in one piece."""
POSITION_OVERHEAD = 16
"""Cost of one elementwise multiply-add in memory, in multiply-adds of a product."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contraction:
    """How two gradients are contracted into a kernel entry.

    Attributes:
        left: Elementwise transform of the left gradient, such as the sign.
        right: Elementwise transform of the right gradient.
        coupled: Keep all pairs of outputs, else sum over equal outputs.
        precision: Precision of products of float32 features.
    """

    left: Transform | None = None
    right: Transform | None = None
    coupled: bool = True
    precision: Precision = "float32"

    @property
    def linear(self) -> bool:
        """Whether neither gradient is transformed."""
        return self.left is None and self.right is None

    def transformed(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients' entries after their transforms."""
        if self.left is not None:
            left = self.left(left)
        return left, right if self.right is None else self.right(right)

    def gram(
        self, left: Tensor, right: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Contract features in their own dtype, long ones in parts summed in float64.

        Args:
            left: ``(c, n, p)``.
            right: ``(c, m, p)``.
            weights: ``(p,)`` or ``(1,)`` weight of each coordinate.

        Returns:
            ``(c n, c m)``, or ``(n, m)`` if not coupled.
        """
        same = left is right
        left, right = self.transformed(left, right)
        if weights is not None:
            left, same = left * weights.to(left), False
        if left.shape[2] <= BLOCK_ENTRIES:
            return self._sum(left, right)
        parts = left.split(LONG_SUM, dim=2)
        others = parts if same and self.linear else right.split(LONG_SUM, dim=2)
        total = self._sum(parts[0], others[0]).double()
        for a, b in zip(parts[1:], others[1:], strict=True):
            total += self._sum(a, b)
        return total

    def _sum(self, left: Tensor, right: Tensor) -> Tensor:
        if self.coupled:
            if self.linear and left is right:
                return _self_product(left.flatten(0, 1), self.precision)
            a, b = left.flatten(0, 1), right.flatten(0, 1)
            return product(a, b.T, self.precision)
        pairs = zip(left, right, strict=True)
        return torch.stack([product(a, b.T, self.precision) for a, b in pairs]).sum(0)

    def grams(self, left: Tensor, right: Tensor) -> Tensor:
        """Contract a stack of feature tensors; faster for small ones.

        Args:
            left: ``(k, c, n, p)``.
            right: ``(k, c, m, p)``.

        Returns:
            ``(k, c n, c m)``, or ``(k, n, m)`` if not coupled.
        """
        left, right = self.transformed(left, right)
        if self.coupled:
            a, b = left.flatten(1, 2), right.flatten(1, 2)
            return product(a, b.transpose(1, 2), self.precision)
        return product(left, right.transpose(2, 3), self.precision).sum(dim=1)


def gram(
    left: Uses, right: Uses, shape: torch.Size, contraction: Contraction
) -> Tensor:
    """Return the Gram matrix of whole gradients of one parameter.

    Args:
        left: Factors of the left examples.
        right: Factors of the right examples. If these are the first left batches, the
            same objects.
        shape: Shape of the stored parameter.
        contraction: The contraction.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    factors = [factor for batch in (*left, *right) for factor in batch]
    if all(_sparse(factor) for factor in factors):
        return _table_gram(left, right, shape, contraction)
    ours, theirs = _matrices(left), _matrices(right)
    same_way = ours and theirs and ours[0][0].output_dim == theirs[0][0].output_dim
    prefix = is_prefix(left, right)
    if contraction.linear and same_way and _positions_are_cheaper(ours, theirs, prefix):
        known = examples(right) if prefix else theirs
        return position_gram(
            ours, known, coupled=contraction.coupled, precision=contraction.precision
        )
    return block_gram(left, right, shape, contraction)


def _matrices(uses: Uses) -> list[list[Matrix]]:
    """Return the factors if all are matrices in one orientation, else an empty list."""
    matrices = [
        [f for f in batch if isinstance(f, Matrix) and f.rows is None] for batch in uses
    ]
    same = len({f.output_dim for batch in matrices for f in batch}) == 1
    whole = all(len(a) == len(b) for a, b in zip(matrices, uses, strict=True))
    return matrices if same and whole else []


def _self_product(a: Tensor, precision: Precision) -> Tensor:
    """Return ``a a^T``, computing only the lower triangle of panels of rows."""
    if len(a) <= SMALL_PRODUCT:
        return product(a, a.T, precision)
    square = a.new_empty(len(a), len(a))
    step = min(PANEL_ROWS, -(-len(a) // 2))
    for start in range(0, len(a), step):
        stop = min(start + step, len(a))
        panel = product(a[start:stop], a[:stop].T, precision)
        square[start:stop, :stop] = panel
        square[:start, start:stop] = panel[:, :start].T
    return square


def _sparse(factor: Factor) -> bool:
    """Whether a factor names the few rows of the stored parameter that it touches."""
    return isinstance(factor, Table) or (
        isinstance(factor, Matrix) and factor.rows is not None
    )


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of contracting one linear weight, by either route.

    Attributes:
        positions: By comparing positions.
        blocks: By forming G block by block and contracting the blocks.
    """

    positions: float
    blocks: float

    @classmethod
    def count(
        cls,
        shape: Sequence[int],
        c: int,
        examples: tuple[int, int],
        positions: tuple[int, int],
        *,
        symmetric: bool,
    ) -> "Operations":
        """Count the multiply-adds.

        Args:
            shape: ``(d_out, d_in)``.
            c: Number of outputs.
            examples: n and m.
            positions: Number of positions of the left and of the right examples.
            symmetric: Whether the right examples are the first left ones.

        Returns:
            The operations; an elementwise one counts as `POSITION_OVERHEAD`.
        """
        (n, m), (p, q), (d_out, d_in) = examples, positions, shape
        pairs = p * q * (0.5 if symmetric and p == q else 1)
        formed = c * (p if symmetric else p + q)
        return cls(
            pairs * (d_in + c * c * (d_out + POSITION_OVERHEAD)),
            (formed + c * c * n * m) * d_out * d_in,
        )

    @property
    def positions_are_cheaper(self) -> bool:
        """Whether positions are compared, rather than blocks formed."""
        return self.positions < self.blocks

    @property
    def least(self) -> float:
        """Multiply-adds of the cheaper route, which is taken."""
        return min(self.positions, self.blocks)


def _positions_are_cheaper(
    left: Sequence[Sequence[Matrix]], right: Sequence[Sequence[Matrix]], prefix: bool
) -> bool:
    """Compare the multiply-adds of both routes."""
    d_out, d_in = left[0][0].g[0].shape[2], left[0][0].x.shape[2]
    p, q = (sum(f.positions() for b in side for f in b) for side in (left, right))
    return Operations.count(
        (d_out, d_in),
        outputs(left),
        (examples(left), examples(right)),
        (p, q),
        symmetric=prefix,
    ).positions_are_cheaper


def block_entries(gradients: int) -> int:
    """Return how many entries of each gradient are formed at a time.

    Args:
        gradients: Number of gradients: outputs times examples of one side.
    """
    return min(BLOCK_ENTRIES, max(1, BLOCK_MEMORY // gradients))


def block_gram(
    left: Uses, right: Uses, shape: torch.Size, contraction: Contraction
) -> Tensor:
    """Return the Gram matrix from G, formed in blocks of rows of the stored weight.

    Args:
        left: Factors of the left examples.
        right: Factors of the right examples; see `gram`.
        shape: Shape of the stored parameter.
        contraction: The contraction.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    c, m = outputs(left), examples(right)
    rows = shape[0] if len(shape) else 1
    width = shape.numel() // rows
    prefix = is_prefix(left, right)
    formed = block_entries(c * max(examples(left), m))
    step = min(rows, max(1, formed // width))
    total: Tensor | None = None
    buffers = [
        workspace(s, c, step * width) for s in ((left,) if prefix else (left, right))
    ]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        a = block(left, start, stop, width, buffers[0])
        b = a if prefix else block(right, start, stop, width, buffers[1])
        b = b if b.shape[1] == m else b[:, :m]
        part = contraction.gram(a, b)
        if total is None:
            total = part.double()
        else:
            total += part
    assert total is not None
    return total


def _table_gram(
    left: Uses, right: Uses, shape: torch.Size, contraction: Contraction
) -> Tensor:
    """Contract a table row by row: only equal tokens contribute."""
    n, m = examples(left), examples(right)
    example, token, values = _entries(left, shape[0])
    same = is_prefix(left, right) and n == m
    other, other_token, other_values = (
        (example, token, values) if same else _entries(right, shape[0])
    )
    c = values.shape[0] if contraction.coupled else 1
    total = torch.zeros(n, m, c, c, dtype=torch.float64, device=values.device)
    singles: list[tuple[Tensor, Tensor]] = []
    for a, b in _shared_tokens(token, other_token):
        if len(a) == len(b) == 1:
            singles.append((a, b))
            continue
        part = contraction.gram(values[:, a], other_values[:, b]).double()
        part = part.view(c, len(a), c, len(b)).permute(1, 3, 0, 2)
        total[example[a][:, None], other[b][None, :]] += part
    if singles:
        # Most tokens occur once per side: contract all of those in one call.
        a, b = (torch.cat(side) for side in zip(*singles, strict=True))
        g, h = contraction.transformed(values[:, a], other_values[:, b])
        if contraction.coupled:
            part = torch.einsum("cup,dup->ucd", g, h)
        else:
            part = torch.einsum("cup,cup->u", g, h)[:, None, None]
        total.index_put_((example[a], other[b]), part.double(), accumulate=True)
    return total.permute(2, 0, 3, 1).reshape(c * n, c * m)


def _entries(uses: Uses, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nonzero rows of every example: example, token, ``(c, rows, d)``.

    Rows that occur several times in an example are summed first: transforms such as the
    sign apply to the sum.
    """
    keys, values, offset = [], [], 0
    for batch in uses:
        n = examples([batch])
        number = torch.arange(offset, offset + n, device=like(batch[0]).device)
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
    """Yield, for each token on both sides, the positions of its entries."""
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
