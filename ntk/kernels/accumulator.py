"""Sums of Gram matrices: the kernels of spaces, and each parameter's share of a trace.

A kernel is a sum over parameters. The Gram matrix of a parameter and map is added to
every space that holds the map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ntk.kernels.contraction import SMALL_PRODUCT, Contraction

WAITING = 2**20
"""Entries of Gram matrices that are buffered before they are added up together."""
SMALL_FEATURES = 2**17
"""Largest number of entries of features that are contracted in stacks."""
WAITING_FEATURES = 2**22
"""Entries of all features that are buffered."""


class Accumulator:
    """Adds up the Gram matrices of several spaces in float64.

    Gram matrices and small features are buffered and processed in stacks: for small
    ones the overhead of a call exceeds the arithmetic.

    Args:
        spaces: Names of the spaces.
        n: Number of left examples.
        m: Number of right examples.
        contraction: How features are contracted.
        traced: Whether left and right examples are the same, so that there is a trace.
    """

    def __init__(
        self,
        spaces: Sequence[str],
        n: int,
        m: int,
        contraction: Contraction,
        *,
        traced: bool,
    ) -> None:
        self.spaces = spaces
        self.contraction = contraction
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
        """Add the Gram matrices of one parameter.

        Args:
            name: The parameter.
            holders: For each Gram matrix the spaces that it is added to.
            grams: ``(k, c n, c m)``, or ``(k, n, m)`` if outputs are summed over.
        """
        self._take([name] * len(holders), holders, grams)

    def add_features(
        self, name: str, spaces: Sequence[str], left: Tensor, right: Tensor
    ) -> None:
        """Add the Gram matrix of one parameter's features, at once or in a stack.

        Args:
            name: The parameter.
            spaces: The spaces that it is added to.
            left: ``(c, n, p)``.
            right: ``(c, m, p)``; may be the same object.
        """
        most = max(left[..., 0].numel(), right[..., 0].numel())
        entries = left.numel() + right.numel()
        if entries > SMALL_FEATURES or most > SMALL_PRODUCT:
            self.add(name, [spaces], self.contraction.gram(left, right)[None])
            return
        shapes = left.shape, right.shape
        self._features.setdefault(shapes, []).append((name, spaces, left, right))
        self._feature_entries += entries
        if self._feature_entries > WAITING_FEATURES:
            self.contract()

    def contract(self) -> None:
        """Contract the buffered features and release them."""
        waiting, self._features = self._features, {}
        self._feature_entries = 0
        for features in waiting.values():
            names, holders, left, right = zip(*features, strict=True)
            a = torch.stack(left)
            same = all(x is y for x, y in zip(left, right, strict=True))
            b = a if same else torch.stack(right)
            self._take(names, holders, self.contraction.grams(a, b))

    def _take(
        self, names: Sequence[str], holders: Sequence[Sequence[str]], grams: Tensor
    ) -> None:
        """Buffer Gram matrices ``(k, ., .)`` with their parameters and spaces."""
        self._waiting.append(grams)
        self._holders += holders
        self._entries += sum(map(len, holders)) * grams[0].numel()
        if self._entries > WAITING:
            self._add_up()
        if self.traced:
            self._added += zip(names, holders, strict=True)
            diagonals = grams.diagonal(dim1=1, dim2=2)
            self._traces.append(diagonals.sum(dim=1, dtype=torch.float64))

    def _add_up(self) -> None:
        """Add the buffered Gram matrices to the sums."""
        waiting, holders = self._waiting, self._holders
        self._waiting, self._holders, self._entries = [], [], 0
        if len(waiting) < 2:
            # A lone stack may be large: add it without a copy.
            for grams in waiting:
                for gram, spaces in zip(grams, holders, strict=True):
                    for space in spaces:
                        self._add(space, gram)
            return
        grams = torch.cat(waiting).double()
        numbers = {space: i for i, space in enumerate(self.spaces)}
        pairs = [(numbers[s], i) for i, spaces in enumerate(holders) for s in spaces]
        into, of = torch.tensor(pairs, device=grams.device).T
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
            outputs: Outputs per example on an axis of a Gram matrix: c, or 1.
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
        """Return, for each space, each parameter's share of the trace."""
        self.contract()
        shares: dict[str, dict[str, float]] = {space: {} for space in self.spaces}
        values = torch.cat(self._traces).tolist() if self._traces else []
        for (name, spaces), value in zip(self._added, values, strict=True):
            for space in spaces:
                shares[space][name] = shares[space].get(name, 0.0) + value
        return shares


_Features = tuple[str, Sequence[str], Tensor, Tensor]
"""A parameter, the spaces that hold it, its left and its right features."""


def joined(
    sums: Sequence[Accumulator], outputs: int, like: Tensor
) -> dict[str, Tensor]:
    """Return the Gram matrices of all left examples.

    Args:
        sums: The sums of groups of left examples, in order.
        outputs: Outputs per example on an axis of a Gram matrix: c, or 1.
        like: A tensor on the device of the Gram matrices.

    Returns:
        For each space ``(c n, c m)`` or ``(n, m)`` in float64.
    """
    if len(sums) == 1:
        return sums[0].grams(outputs, like)
    groups = [group.grams(outputs, like) for group in sums]
    whole = {}
    for space in sums[0].spaces:
        # The left axis is output-major: concatenate within each output.
        blocks = [group.pop(space).unflatten(0, (outputs, -1)) for group in groups]
        whole[space] = torch.cat(blocks, dim=1).flatten(0, 1)
    return whole
