"""Gram matrices of factored gradients: what is summed, and by which route.

Whole gradients are never all formed. By the factors of a parameter, and for a linear
weight by what takes fewer operations, a Gram matrix is made

- of positions against positions (`positions`);
- of blocks of rows of G, formed and contracted one after another;
- of the rows of an embedding table that two examples share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.factors import (
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
from ntk.positions import position_gram
from ntk.precision import Precision, product

BLOCK_ENTRIES = 2**16
"""Entries of each gradient formed at a time: enough for products to run at full speed,
few enough that all examples' stay near the processor."""
BLOCK_MEMORY = 2**26
"""Entries of the gradients of all examples and outputs that are formed at a time."""
PANEL_ROWS = 256
"""Most rows of a symmetric product formed at a time, or half of them if that is less;
smaller panels would spare more operations than they cost in speed."""
LONG_SUM = 2**15
"""Most products that are summed in the features' own precision where there are more
than `BLOCK_ENTRIES`: some processors lose a digit over a hundred thousand."""
SMALL_PRODUCT = 128
"""Rows up to which a symmetric product is formed whole."""
POSITION_OVERHEAD = 16
"""Cost of one elementwise multiply-add in memory, in multiply-adds of a product."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contraction:
    """What is summed into a kernel entry.

    Attributes:
        left: Applied to the left gradient's entries, such as the sign.
        right: Applied to the right gradient's entries.
        coupled: Keep all pairs of outputs, else sum over equal outputs.
        precision: Of products of float32 features.
    """

    left: Transform | None = None
    right: Transform | None = None
    coupled: bool = True
    precision: Precision = "float32"

    @property
    def linear(self) -> bool:
        """Whether gradients are contracted as they are."""
        return self.left is None and self.right is None

    def transformed(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients' entries as they are contracted."""
        if self.left is not None:
            left = self.left(left)
        return left, right if self.right is None else self.right(right)

    def gram(
        self, left: Tensor, right: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Contract features in their own dtype, long ones in parts added in float64.

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
        """Contract several features at once, which small ones are quicker by.

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
    ours, theirs = _matrices(left), _matrices(right)
    same_way = ours and theirs and ours[0][0].output_dim == theirs[0][0].output_dim
    prefix = is_prefix(left, right)
    if how.linear and same_way and _positions_are_cheaper(ours, theirs, prefix):
        known = examples(right) if prefix else theirs
        return position_gram(ours, known, coupled=how.coupled, precision=how.precision)
    return block_gram(left, right, shape, how)


def _matrices(uses: Uses) -> list[list[Matrix]]:
    """Return the factors if all are linear maps in one orientation, else none."""
    matrices = [
        [f for f in batch if isinstance(f, Matrix) and f.rows is None] for batch in uses
    ]
    same = len({f.output_dim for batch in matrices for f in batch}) == 1
    whole = all(len(a) == len(b) for a, b in zip(matrices, uses, strict=True))
    return matrices if same and whole else []


def _self_product(a: Tensor, precision: Precision) -> Tensor:
    """Return ``a a^T`` from panels of rows times the rows up to them."""
    if len(a) <= SMALL_PRODUCT:
        return product(a, a.T, precision)
    found = a.new_empty(len(a), len(a))
    step = min(PANEL_ROWS, -(-len(a) // 2))
    for start in range(0, len(a), step):
        stop = min(start + step, len(a))
        panel = product(a[start:stop], a[:stop].T, precision)
        found[start:stop, :stop] = panel
        found[:start, start:stop] = panel[:, :start].T
    return found


def _sparse(factor: Factor) -> bool:
    """Whether a factor touches few rows of the stored parameter, and says which."""
    return isinstance(factor, Table) or (
        isinstance(factor, Matrix) and factor.rows is not None
    )


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of contracting one linear weight, by either route.

    Attributes:
        positions: Of comparing positions.
        blocks: Of forming G block by block and contracting those.
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
        """Count them.

        Args:
            shape: ``(d_out, d_in)``.
            c: Outputs.
            examples: n and m.
            positions: Of the left and of the right examples.
            symmetric: Whether the right examples are the first of the left ones.

        Returns:
            The operations; elementwise ones as `POSITION_OVERHEAD` says.
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
        """Which of the two is taken."""
        return self.positions < self.blocks

    @property
    def least(self) -> float:
        """Those of the route that is taken."""
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
    """Return how many entries of each of so many gradients are formed at a time.

    Args:
        gradients: Outputs times examples of one side.
    """
    return min(BLOCK_ENTRIES, max(1, BLOCK_MEMORY // gradients))


def block_gram(left: Uses, right: Uses, shape: torch.Size, how: Contraction) -> Tensor:
    """Return the Gram matrix from G, formed in blocks of rows of the stored weight.

    Args:
        left: As in `gram`.
        right: As in `gram`.
        shape: As in `gram`.
        how: As in `gram`.

    Returns:
        As `gram`.
    """
    c, m = outputs(left), examples(right)
    rows = shape[0] if len(shape) else 1
    width = shape.numel() // rows
    prefix = is_prefix(left, right)
    formed = block_entries(c * max(examples(left), m))
    step = min(rows, max(1, formed // width))
    total: Tensor | None = None
    space = [
        workspace(s, c, step * width) for s in ((left,) if prefix else (left, right))
    ]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        a = block(left, start, stop, width, space[0])
        b = a if prefix else block(right, start, stop, width, space[1])
        b = b if b.shape[1] == m else b[:, :m]
        part = how.gram(a, b)
        if total is None:
            total = part.double()
        else:
            total += part
    assert total is not None
    return total


def _table_gram(left: Uses, right: Uses, shape: torch.Size, how: Contraction) -> Tensor:
    """Contract rows of a table one by one: only equal tokens meet."""
    n, m = examples(left), examples(right)
    example, token, values = _entries(left, shape[0])
    same = is_prefix(left, right) and n == m
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
        g, h = how.transformed(values[:, a], other_values[:, b])
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
