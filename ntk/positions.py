"""Gram matrices of a linear weight, position against position; no gradient is formed.

With ``G[k, i] = sum_t g[k, i, t] x[i, t]^T`` the positions of an example,

    <G[k, i], G[l, j]> = sum_{t, s} (g[k, i, t] . g[l, j, s]) (x[i, t] . x[j, s]).

All positions of all examples lie in a row here, sorted by example, and those where
every g is zero (padding) are left out. The products are made in panels of whole
examples that stay near the processor; of a symmetric Gram matrix only the half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.factors import Matrix, examples
from ntk.precision import Precision, product

PANEL_ROWS = 512
"""Rows of a panel of products, outputs times positions, or one example's."""
PANEL_COLUMNS = 1024
"""Columns of a panel of products, outputs times positions, or one example's."""


@dataclass(frozen=True)
class Positions:
    """Positions of n examples, sorted by example.

    Attributes:
        x: ``(p, d_in)`` inputs of the weight.
        g: ``(c, p, d_out)`` gradients with respect to its outputs.
        owner: ``(p,)`` the number of each position's example.
        starts: The n + 1 places at which the examples start and the last one ends.
    """

    x: Tensor
    g: Tensor
    owner: Tensor
    starts: list[int]

    @classmethod
    def of(
        cls, uses: Sequence[Sequence[Matrix]], *, coupled: bool, first: int
    ) -> "Positions":
        """Collect the positions with a gradient of the first so many examples.

        Args:
            uses: For each batch, the factors of every use of the weight.
            coupled: Keep the outputs apart. Else they lie side by side in one vector,
                ``g`` is ``(1, p, c d_out)``, whose products sum over them.
            first: Number of examples.

        Returns:
            Their positions.
        """
        xs, gs, owners, n = [], [], [], 0
        for batch in uses:
            count = examples([batch])
            for factor in batch:
                # A NaN is not zero: it stays.
                largest = torch.stack([g.abs().amax(dim=2) for g in factor.g])
                held = (largest != 0).any(dim=0)
                held[max(0, first - n) :] = False
                places = held.flatten().nonzero()[:, 0]
                x = factor.x.flatten(0, 1)
                whole = len(places) == len(x)
                xs.append(x if whole else x.index_select(0, places))
                gs.append(_picked(factor.g, places, whole=whole, coupled=coupled))
                owners.append(places // held.shape[1] + n)
            n += count
        x, g, owner = (
            _side_by_side(xs, 0),
            _side_by_side(gs, 1),
            _side_by_side(owners, 0),
        )
        if len(owners) > len(uses):
            order = owner.argsort(stable=True)
            x, g, owner = x[order], g[:, order], owner[order]
        counts = torch.bincount(owner, minlength=first)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()
        return cls(x, g, owner, starts)

    def panels(self, most: int, stop: int | None = None) -> list[tuple[int, int]]:
        """Cut examples into runs of at most so many positions, or one example.

        Args:
            most: Positions.
            stop: Number of examples, None for all.

        Returns:
            The first example of each run and the one after its last.
        """
        stop = len(self.starts) - 1 if stop is None else stop
        cuts = [0]
        for i in range(1, stop):
            if self.starts[i + 1] - self.starts[cuts[-1]] > most:
                cuts.append(i)
        return list(zip(cuts, [*cuts[1:], stop], strict=True))

    def part(self, panel: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, g and ``(examples, positions)`` one-hot owners of a panel."""
        first, last = panel
        places = slice(self.starts[first], self.starts[last])
        numbers = torch.arange(first, last, device=self.owner.device)
        owns = (numbers[:, None] == self.owner[places]).to(self.x.dtype)
        return self.x[places], self.g[:, places], owns


def position_gram(
    left: Sequence[Sequence[Matrix]],
    right: Sequence[Sequence[Matrix]] | int,
    *,
    coupled: bool,
    precision: Precision = "float32",
) -> Tensor:
    """Return the Gram matrix of a weight's gradients.

    Args:
        left: For each batch, the factors of every use of the weight, all in the same
            orientation.
        right: The same of the right examples, or their number if they are the first of
            the left ones.
        coupled: Keep all pairs of outputs, else sum over equal outputs.
        precision: Of the products of positions.

    Returns:
        ``(c n, c m)`` in float64, or ``(n, m)`` if not coupled.
    """
    n = examples(left)
    m = right if isinstance(right, int) else examples(right)
    ours = Positions.of(left, coupled=coupled, first=n)
    if not isinstance(right, int):
        theirs = Positions.of(right, coupled=coupled, first=m)
    elif m < n:
        theirs = Positions.of(left, coupled=coupled, first=m)
    else:
        theirs = ours
    c = len(ours.g)
    total = ours.x.new_zeros(c, n, c, m, dtype=torch.float64)
    for rows in ours.panels(PANEL_ROWS // c):
        part = ours.part(rows)
        stop = rows[1] if ours is theirs else m
        for first, last in theirs.panels(PANEL_COLUMNS // c, stop):
            block = total[:, rows[0] : rows[1], :, first:last]
            block.copy_(_panel(part, theirs.part((first, last)), precision))
    if ours is theirs:
        above = torch.ones(n, n, dtype=torch.bool, device=total.device).triu(1)
        mirrored = total.permute(2, 3, 0, 1)
        total = torch.where(above[:, None, :], mirrored, total)
    return total.reshape(c * n, c * m)


def _picked(
    g: Sequence[Tensor], places: Tensor, *, whole: bool, coupled: bool
) -> Tensor:
    """Return some or all positions of each output's ``(n, t, d)``.

    See `Positions.of`.
    """
    flat = [each.flatten(0, 1) for each in g]
    if not coupled:
        picked = flat if whole else [each.index_select(0, places) for each in flat]
        return torch.cat(picked, dim=1)[None]
    if whole:
        return torch.stack(flat)
    chosen = g[0].new_empty(len(g), len(places), g[0].shape[2])
    for each, out in zip(flat, chosen, strict=True):
        torch.index_select(each, 0, places, out=out)
    return chosen


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Join parts; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _panel(
    left: tuple[Tensor, Tensor, Tensor],
    right: tuple[Tensor, Tensor, Tensor],
    precision: Precision,
) -> Tensor:
    """Return the entries ``(c, n, c, m)`` of two panels' examples."""
    (x, g, owns), (y, h, others) = left, right
    c, p, q = len(g), len(x), len(y)
    products = product(g.flatten(0, 1), h.flatten(0, 1).T, precision).view(c, p, c, q)
    products *= product(x, y.T, precision)[:, None]
    by_example = owns @ products.view(c, p, c * q)
    return by_example.view(c, len(owns), c, q) @ others.T
