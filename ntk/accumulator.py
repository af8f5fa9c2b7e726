"""Sums of Gram matrices: the kernels of spaces and what parameters add to traces.

A kernel is a sum over parameters, and the Gram matrix of one parameter and map belongs
to every space that holds it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntk.contraction import SMALL_PRODUCT, Contraction

WAITING = 2**20
"""Entries of small Gram matrices that wait to be added up together."""
SMALL_FEATURES = 2**17
"""Entries of features that wait to be contracted with others of their shape."""
WAITING_FEATURES = 2**22
"""Entries of all features that wait."""


class Accumulator:
    """Adds up the Gram matrices of several spaces in float64.

    Small ones wait for others, and so do small features: a sum or a product of theirs
    costs much more to call than to make.

    Args:
        spaces: Their names.
        n: Number of left examples.
        m: Number of right examples.
        how: The contraction of features.
        traced: Whether the right examples are the left ones, so that there is a trace.
    """

    def __init__(
        self, spaces: Sequence[str], n: int, m: int, how: Contraction, *, traced: bool
    ) -> None:
        self.spaces = spaces
        self.how = how
        self.n, self.m = n, m
        self.traced = traced
        self._sums: dict[str, Tensor] = {}
        self._features: dict[tuple[torch.Size, torch.Size], list[_Features]] = {}
        self._feature_entries = 0
        self._waiting: list[Tensor] = []
        self._holders: list[Sequence[str]] = []
        self._entries = 0
        self._added: list[tuple[str, Sequence[str]]] = []
        self._traces: list[Tensor] = []

    def add(self, name: str, holders: Sequence[Sequence[str]], grams: Tensor) -> None:
        """Add what one parameter contributes.

        Args:
            name: The parameter.
            holders: For each Gram matrix the spaces that it belongs to.
            grams: ``(k, c n, c m)``, or ``(k, n, m)`` if outputs are summed over.
        """
        self._take([name] * len(holders), holders, grams)

    def add_features(
        self, name: str, spaces: Sequence[str], left: Tensor, right: Tensor
    ) -> None:
        """Add the Gram matrix of one parameter's features, now or with others.

        Args:
            name: The parameter.
            spaces: Those that it belongs to.
            left: ``(c, n, p)``.
            right: ``(c, m, p)``; the same object if they are the same.
        """
        most = max(left[..., 0].numel(), right[..., 0].numel())
        entries = left.numel() + right.numel()
        if entries > SMALL_FEATURES or most > SMALL_PRODUCT:
            self.add(name, [spaces], self.how.gram(left, right)[None])
            return
        shapes = left.shape, right.shape
        self._features.setdefault(shapes, []).append((name, spaces, left, right))
        self._feature_entries += entries
        if self._feature_entries > WAITING_FEATURES:
            self.contract()

    def contract(self) -> None:
        """Contract the features that wait, and let go of them."""
        waiting, self._features = self._features, {}
        self._feature_entries = 0
        for several in waiting.values():
            names, holders, left, right = zip(*several, strict=True)
            a = torch.stack(left)
            same = all(x is y for x, y in zip(left, right, strict=True))
            b = a if same else torch.stack(right)
            self._take(names, holders, self.how.grams(a, b))

    def _take(
        self, names: Sequence[str], holders: Sequence[Sequence[str]], grams: Tensor
    ) -> None:
        """Take Gram matrices, each of a parameter and for some spaces."""
        self._waiting.append(grams)
        self._holders += holders
        self._entries += sum(map(len, holders)) * grams[0].numel()
        if self._entries > WAITING:
            self._add_up()
        if self.traced:
            self._added += zip(names, holders, strict=True)
            same = grams.diagonal(dim1=1, dim2=2)
            self._traces.append(same.sum(dim=1, dtype=torch.float64))

    def _add_up(self) -> None:
        """Add what waits to the sums."""
        waiting, holders = self._waiting, self._holders
        self._waiting, self._holders, self._entries = [], [], 0
        if len(waiting) < 2:
            # Large ones perhaps, of which no copies are made.
            for grams in waiting:
                for each, spaces in zip(grams, holders, strict=True):
                    for space in spaces:
                        self._add(space, each)
            return
        grams = torch.cat(waiting).double()
        numbers = {space: i for i, space in enumerate(self.spaces)}
        held = [(numbers[s], i) for i, spaces in enumerate(holders) for s in spaces]
        into, of = torch.tensor(held, device=grams.device).T
        totals = grams.new_zeros(len(numbers), *grams.shape[1:])
        totals.index_add_(0, into, grams[of])
        for space in dict.fromkeys(space for spaces in holders for space in spaces):
            self._add(space, totals[numbers[space]])

    def _add(self, space: str, gram: Tensor) -> None:
        if space in self._sums:
            self._sums[space] += gram
        else:
            self._sums[space] = gram.to(torch.float64, copy=True)

    def grams(self, outputs: int, like: Tensor) -> dict[str, Tensor]:
        """Return each space's Gram matrix; zero where nothing was added.

        Args:
            outputs: How often each example stands on an axis of a Gram matrix.
            like: A tensor on the device of the Gram matrices.

        Returns:
            For each space ``(c n, c m)`` or ``(n, m)`` in float64.
        """
        self.contract()
        self._add_up()
        shape = (outputs * self.n, outputs * self.m)
        for space in self.spaces:
            if space not in self._sums:
                self._sums[space] = like.new_zeros(shape, dtype=torch.float64)
        return self._sums

    def traces(self) -> dict[str, dict[str, float]]:
        """Return, for each space, what each parameter adds to the trace."""
        self.contract()
        found: dict[str, dict[str, float]] = {space: {} for space in self.spaces}
        values = torch.cat(self._traces).tolist() if self._traces else []
        for (name, spaces), value in zip(self._added, values, strict=True):
            for space in spaces:
                found[space][name] = found[space].get(name, 0.0) + value
        return found


_Features = tuple[str, Sequence[str], Tensor, Tensor]
"""A parameter, the spaces that it belongs to, its left and its right features."""


def joined(
    sums: Sequence[Accumulator], outputs: int, like: Tensor
) -> dict[str, Tensor]:
    """Return the Gram matrices of all left examples.

    Args:
        sums: Of groups of left examples, in their order.
        outputs: How often each example stands on an axis of a Gram matrix.
        like: A tensor on the device of the Gram matrices.

    Returns:
        For each space ``(c n, c m)`` or ``(n, m)`` in float64.
    """
    if len(sums) == 1:
        return sums[0].grams(outputs, like)
    groups = [each.grams(outputs, like) for each in sums]
    found = {}
    for space in sums[0].spaces:
        # An output's examples are together on the left axis.
        blocks = [group.pop(space).unflatten(0, (outputs, -1)) for group in groups]
        found[space] = torch.cat(blocks, dim=1).flatten(0, 1)
    return found
