"""What is stored and contracted together for one parameter, for all spaces at once.

Every (parameter, map) pair is contracted once, whatever number of spaces hold it. Maps
that select only rows of the same weight share more: the Gram matrix of such a space is
the sum of those of its slices, so the slices of all of them are contracted once, one
Gram matrix each, and every space is a weighted sum of those. So do columns, which lie
beside the LoRA pairs of their weight: one product makes the features of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntk.contraction import Contraction
from ntk.jacobian import Key
from ntk.maps import InputSide, LowRank, Map, Maps, Slices

SLICE_ENTRIES = 2**25
"""Entries of the Gram matrices of slices held at a time."""


@dataclass
class Job:
    """What is stored and contracted together for one parameter.

    Attributes:
        name: The parameter.
        stored: The map whose features are stored.
        members: The maps served from it, each with the spaces that hold it.
    """

    name: str
    stored: Map
    members: dict[Map, list[str]]

    @property
    def key(self) -> Key:
        """The parameter and the stored map."""
        return self.name, self.stored

    def _has_overlap(self) -> bool:
        """Whether a member is columns less what its rows hold."""
        return isinstance(self.stored, InputSide) and any(
            isinstance(each, Slices) and each.rows for each in self.members
        )

    def grams(
        self, left: Tensor, right: Tensor, how: Contraction
    ) -> list[tuple[Map, Tensor]]:
        """Return every member's Gram matrix.

        Args:
            left: ``(c, n, p)`` features of the stored map.
            right: ``(c, m, p)``; the same object if they are the same.
            how: The contraction.

        Returns:
            Each member and its ``(c n, c m)``, or ``(n, m)`` if not coupled.
        """
        if len(self.members) == 1 and not self._has_overlap():
            (each,) = self.members
            return [(each, how.gram(left, right, each.weights()))]
        assert isinstance(self.stored, Slices | InputSide)
        of = self.stored.of
        if isinstance(self.stored, Slices):
            slices, width = self.stored.rows, of.inputs
        else:
            slices, width = self.stored.columns, of.outputs
        a, b = (f.unflatten(2, (-1, width)) for f in (left, right))
        found: list[tuple[Map, Tensor]] = []
        if isinstance(self.stored, InputSide):
            for pair, place in zip(self.stored.pairs, self.stored.places, strict=True):
                own = a[:, :, place].flatten(2)
                other = own if left is right else b[:, :, place].flatten(2)
                found.append((pair, how.gram(own, other, pair.weights())))
        members = [each for each in self.members if isinstance(each, Slices)]
        if members:
            cut = len(slices)
            selected = _selected(slices, members).to(left)
            grams = _slice_grams(selected, a[:, :, :cut], b[:, :, :cut], how)
            for each, block in zip(members, grams, strict=True):
                if isinstance(self.stored, InputSide) and each.rows:
                    block -= _overlap(each, self.stored, a, b, how)
                found.append((each, block))
        return found


def jobs(maps: Mapping[str, Maps]) -> list[Job]:
    """Return the jobs that serve some spaces.

    Args:
        maps: The resolved spaces by name.

    Returns:
        Jobs whose members are all maps of all spaces.
    """
    holders: dict[str, dict[Map, list[str]]] = {}
    for space, resolved in maps.items():
        for name, several in resolved.items():
            for each in several:
                holders.setdefault(name, {}).setdefault(each, []).append(space)
    found = []
    for name, members in holders.items():
        slices = [each for each in members if isinstance(each, Slices)]
        # Rows and columns together are rows, and columns less what those rows hold;
        # their weights are not those of either if they are rescaled.
        mixed = [e for e in slices if e.rows and e.columns and not e.rescale]
        rows = [each for each in slices if not each.columns]
        by_row: dict[Map, list[str]] = {each: members[each] for each in rows}
        for each in mixed:
            alone = replace(each, columns=())
            by_row[alone] = [*by_row.get(alone, []), *members[each]]
            rows.append(alone)
        columns = [*(each for each in slices if not each.rows), *mixed]
        stored: Map
        pairs = [each for each in members if isinstance(each, LowRank)]
        if rows:
            chosen = tuple(sorted({i for each in rows for i in each.rows}))
            stored = Slices(rows[0].of, chosen, ())
            found.append(Job(name, stored, by_row))
        if columns or pairs:
            of = columns[0].of if columns else pairs[0].of
            chosen = tuple(sorted({j for each in columns for j in each.columns}))
            stored = InputSide(of, chosen, tuple(pairs))
            reading: list[Map] = [*columns, *pairs]
            found.append(Job(name, stored, {each: members[each] for each in reading}))
        grouped: set[Map] = {*rows, *columns, *pairs}
        for other, spaces in members.items():
            if other not in grouped:
                found.append(Job(name, other, {other: spaces}))
    return found


def _selected(slices: Sequence[int], members: Sequence[Slices]) -> Tensor:
    """Return the weight of every slice in every selection, ``(members, slices)``."""
    place = {index: i for i, index in enumerate(slices)}
    selected = []
    for each in members:
        weights = each.weights()
        values = [1.0] if weights is None else weights.tolist()
        # A row's entries have one weight, and so have all of a column selection.
        step = len(values) if each.columns else each.of.inputs
        own = [0.0] * len(slices)
        for number, index in enumerate(each.columns or each.rows):
            own[place[index]] = values[number * step % len(values)]
        selected.append(own)
    return torch.tensor(selected, dtype=torch.float64)


def _overlap(
    each: Slices, stored: InputSide, left: Tensor, right: Tensor, how: Contraction
) -> Tensor:
    """Return the Gram matrix of the entries in both its rows and its columns.

    ``left`` and ``right`` are features ``(c, n, q, outputs)``.
    """
    place = {index: i for i, index in enumerate(stored.columns)}
    columns = torch.tensor([place[j] for j in each.columns], device=left.device)
    rows = torch.tensor(each.rows, device=left.device)
    a, b = (f[:, :, columns[:, None], rows].flatten(2) for f in (left, right))
    return how.gram(a, b)


def _slice_grams(
    selected: Tensor, left: Tensor, right: Tensor, how: Contraction
) -> Tensor:
    """Return the Gram matrices of several selections from those of single slices.

    Args:
        selected: ``(members, slices)`` weight of every slice in every selection.
        left: ``(c, n, slices, p)`` features of single rows or columns.
        right: ``(c, m, slices, p)``.
        how: The contraction.

    Returns:
        ``(members, c n, c m)`` or ``(members, n, m)``.
    """
    rows = (left.shape[0] if how.coupled else 1) * left.shape[1]
    columns = (right.shape[0] if how.coupled else 1) * right.shape[1]
    a, b = (f.permute(2, 0, 1, 3) for f in (left, right))
    total = left.new_zeros(len(selected), rows * columns)
    step = max(1, SLICE_ENTRIES // (rows * columns))
    for start in range(0, len(a), step):
        grams = _batched_gram(a[start : start + step], b[start : start + step], how)
        total.addmm_(selected[:, start : start + step], grams.flatten(1))
    return total.view(len(selected), rows, columns)


def _batched_gram(left: Tensor, right: Tensor, how: Contraction) -> Tensor:
    left, right = how.transformed(left, right)
    if how.coupled:
        return torch.bmm(left.flatten(1, 2), right.flatten(1, 2).transpose(1, 2))
    return torch.matmul(left, right.transpose(2, 3)).sum(dim=1)
