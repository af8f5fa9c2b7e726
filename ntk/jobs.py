"""What is stored and contracted together for one parameter, for all spaces at once.

Every (parameter, map) pair is contracted once, whatever number of spaces hold it. Maps
that select only rows of the same weight share more: the Gram matrix of such a space is
the sum of those of its slices, so the slices of all of them are contracted once, one
Gram matrix each, and every space is a weighted sum of those. So do columns, which lie
beside the LoRA pairs of their weight: one product makes the features of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

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

    @cached_property
    def alone(self) -> Map | None:
        """The member if it is one whose coordinates all weigh one, else None."""
        (each, *others) = self.members
        return None if others or each.weights() is not None else each

    @property
    def _weighs_inputs(self) -> bool:
        """Whether a member's weights are in another order than the stored features."""
        return isinstance(self.stored, InputSide) and any(
            isinstance(each, Slices) and each.rescale for each in self.members
        )

    @cached_property
    def _held_by_rows(self) -> slice | Tensor | None:
        """The rows of a lone member that is columns less what its rows hold."""
        (each, *others) = self.members
        if others or not isinstance(self.stored, InputSide):
            return None
        return each.row_places if isinstance(each, Slices) and each.rows else None

    def contracted(self, features: Tensor) -> Tensor:
        """Return stored features of a lone member as they are contracted.

        Args:
            features: ``(c, n, p)``.
        """
        if self._held_by_rows is None:
            return features
        assert isinstance(self.stored, InputSide)
        # In place: no other member reads them, and what is zero stays zero.
        by_input = features.unflatten(2, (-1, self.stored.of.outputs))
        by_input[..., self._held_by_rows] = 0
        return features

    @cached_property
    def _selected(self) -> Tensor:
        """The weight of every stored slice in every member, in float64."""
        members = list(self.members)
        if isinstance(self.stored, Slices):
            selected = _rows_of(self.stored, members)
        else:
            assert isinstance(self.stored, InputSide)
            selected = _inputs_of(self.stored, members)
        return torch.tensor(selected, dtype=torch.float64)

    def grams(
        self, left: Tensor, right: Tensor, how: Contraction
    ) -> tuple[Sequence[Map], Tensor]:
        """Return every member's Gram matrix.

        Args:
            left: ``(c, n, p)`` features of the stored map.
            right: ``(c, m, p)``; the same object if they are the same.
            how: The contraction.

        Returns:
            The members and as many ``(c n, c m)``, or ``(n, m)`` if not coupled.
        """
        if len(self.members) == 1 and not self._weighs_inputs:
            (each,) = self.members
            return [each], how.gram(left, right, each.weights())[None]
        assert isinstance(self.stored, Slices | InputSide)
        members = list(self.members)
        rows = isinstance(self.stored, Slices)
        width = self.stored.of.inputs if rows else self.stored.of.outputs
        a, b = (f.unflatten(2, (-1, width)) for f in (left, right))
        grams = _slice_grams(self._selected.to(left), a, b, how)
        if isinstance(self.stored, InputSide):
            for each, block in zip(members, grams, strict=True):
                if isinstance(each, Slices) and each.rows:
                    block -= _overlap(each, self.stored, a, b, how)
        return members, grams


def jobs(maps: Mapping[str, Maps]) -> list[Job]:
    """Return the jobs that serve some spaces.

    Those of the last spaces are kept: making them takes as long as a pass over a few
    sentences, and most callers come again with the same ones.

    Args:
        maps: The resolved spaces by name.

    Returns:
        Jobs whose members are all maps of all spaces, not to be changed.
    """
    return _jobs(tuple((space, tuple(each.items())) for space, each in maps.items()))


@lru_cache(maxsize=16)
def _jobs(
    maps: tuple[tuple[str, tuple[tuple[str, tuple[Map, ...]], ...]], ...],
) -> list[Job]:
    holders: dict[str, dict[Map, list[str]]] = {}
    for space, resolved in maps:
        for name, several in resolved:
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


def _rows_of(stored: Slices, members: Sequence[Map]) -> list[list[float]]:
    """Return the weight of every stored row in every member."""
    selected = []
    for each in members:
        assert isinstance(each, Slices)
        weights = each.weights()
        step = each.of.inputs
        values = [1.0] * len(each.rows) if weights is None else weights[::step].tolist()
        own = dict(zip(each.rows, values, strict=True))
        selected.append([own.get(row, 0.0) for row in stored.rows])
    return selected


def _inputs_of(stored: InputSide, members: Sequence[Map]) -> list[list[float]]:
    """Return the weight of every column and every row of an A in every member."""
    selected = []
    place = {column: i for i, column in enumerate(stored.columns)}
    ranks = dict(zip(stored.pairs, stored.places, strict=True))
    count = len(place) + sum(pair.rank for pair in stored.pairs)
    for each in members:
        weights = each.weights()
        own = [0.0] * count
        if isinstance(each, LowRank):
            weight = 1.0 if weights is None else float(weights[0])
            own[ranks[each]] = [weight] * each.rank
        else:
            assert isinstance(each, Slices)
            columns = len(each.columns)
            values = [1.0] * columns if weights is None else weights[:columns].tolist()
            for column, weight in zip(each.columns, values, strict=True):
                own[place[column]] = weight
        selected.append(own)
    return selected


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
        grams = how.grams(a[start : start + step], b[start : start + step])
        total.addmm_(selected[:, start : start + step], grams.flatten(1))
    return total.view(len(selected), rows, columns)
