"""Gram matrices of a linear weight, position against position, without gradients.

With ``G[k, i] = sum_t g[k, i, t] x[i, t]^T`` the positions of an example,

    <G[k, i], G[l, j]> = sum_{t, s} (g[k, i, t] . g[l, j, s]) (x[i, t] . x[j, s]).

Positions of all examples are concatenated, sorted by example; those where every g is
zero (padding) are dropped. Products are computed in panels of whole examples that fit
into the processor's cache; of a symmetric Gram matrix only one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.gradients import Matrix, examples
from ntk.kernels.precision import Precision, product

PANEL_ROWS = 512
"""Largest number of rows of a panel (outputs times positions) of several examples."""
PANEL_COLUMNS = 1024
"""Largest number of columns of a panel (outputs times positions) likewise."""


@dataclass(frozen=True)
class Positions:
    """Positions of n examples, sorted by example.

    Attributes:
        x: ``(p, d_in)`` inputs of the weight.
        g: ``(c, p, d_out)`` gradients with respect to its outputs.
        owner: ``(p,)`` index of each position's example.
        starts: Where each example starts, and where the last one ends; n + 1 entries.
    """

    x: Tensor
    g: Tensor
    owner: Tensor
    starts: list[int]

    @classmethod
    def of(
        cls, uses: Sequence[Sequence[Matrix]], *, coupled: bool, first: int
    ) -> "Positions":
        """Collect the positions with a nonzero gradient.

        Args:
            uses: For each batch, the factors of every use of the weight.
            coupled: Keep outputs separate. Else they are concatenated, ``g`` is
                ``(1, p, c d_out)``, and products sum over them.
            first: Number of examples to take, from the first.

        Returns:
            Their positions.
        """
        xs, gs, owners, n = [], [], [], 0
        for batch in uses:
            count = examples([batch])
            for factor in batch:
                # NaN != 0, so positions with NaN stay.
                largest = torch.stack([g.abs().amax(dim=2) for g in factor.g])
                nonzero = (largest != 0).any(dim=0)
                nonzero[max(0, first - n) :] = False
                places = nonzero.flatten().nonzero()[:, 0]
                x = factor.x.flatten(0, 1)
                whole = len(places) == len(x)
                xs.append(x if whole else x.index_select(0, places))
                gs.append(_picked(factor.g, places, whole=whole, coupled=coupled))
                owners.append(places // nonzero.shape[1] + n)
            n += count
        x, g, owner = (
            _concatenated(xs, 0),
            _concatenated(gs, 1),
            _concatenated(owners, 0),
        )
        if len(owners) > len(uses):
            order = owner.argsort(stable=True)
            x, g, owner = x[order], g[:, order], owner[order]
        counts = torch.bincount(owner, minlength=first)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).tolist()
        return cls(x, g, owner, starts)

    def panels(self, most: int, stop: int | None = None) -> list[tuple[int, int]]:
        """Split examples into runs of a limited number of positions.

        Args:
            most: Largest number of positions of a run of several examples.
            stop: Number of examples; None means all.

        Returns:
            For each run its first example and the one after its last.
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
        right: The same for the right examples, or their number if they are the first
            left ones.
        coupled: Keep all pairs of outputs, else sum over equal outputs.
        precision: Precision of the products of positions.

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
    """Select positions of each output's ``(n, t, d)``, see `Positions.of`."""
    flat = [by_output.flatten(0, 1) for by_output in g]
    if not coupled:
        picked = flat if whole else [f.index_select(0, places) for f in flat]
        return torch.cat(picked, dim=1)[None]
    if whole:
        return torch.stack(flat)
    chosen = g[0].new_empty(len(g), len(places), g[0].shape[2])
    for source, out in zip(flat, chosen, strict=True):
        torch.index_select(source, 0, places, out=out)
    return chosen


def _concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate parts; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _panel(
    left: tuple[Tensor, Tensor, Tensor],
    right: tuple[Tensor, Tensor, Tensor],
    precision: Precision,
) -> Tensor:
    """Return the kernel ``(c, n, c, m)`` of two panels' examples."""
    (x, g, owns), (y, h, others) = left, right
    c, p, q = len(g), len(x), len(y)
    products = product(g.flatten(0, 1), h.flatten(0, 1).T, precision).view(c, p, c, q)
    products *= product(x, y.T, precision)[:, None]
    by_example = owns @ products.view(c, p, c * q)
    return by_example.view(c, len(owns), c, q) @ others.T
