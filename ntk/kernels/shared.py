"""Features of one parameter that several maps share, stored and contracted once.

Every (parameter, map) pair is contracted once, however many spaces hold it. Maps that
select rows of the same weight share more. The Gram matrix of a selection is a weighted
sum of those of its rows, so each row that any map selects is contracted once. The same
holds for columns, which are stored together with the LoRA pairs of their weight: one
product computes the features of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ntk.gradients import Key
from ntk.kernels.contraction import Contraction
from ntk.spaces import InputSide, LowRank, Map, Maps, Slices

SLICE_ENTRIES = 2**25
"""Entries of the Gram matrices of slices that are in memory at a time."""


@dataclass
class SharedFeatures:
    """Features of a parameter that are stored once, and the maps that they serve.

    Attributes:
        name: The parameter.
        stored: The map whose features are stored.
        members: The maps served by these features, each with the spaces that hold it.
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
        """The only member if all its weights are one, else None."""
        (member, *others) = self.members
        return None if others or member.weights() is not None else member

    @property
    def _weighs_inputs(self) -> bool:
        """Whether a member orders its weights unlike the stored features."""
        return isinstance(self.stored, InputSide) and any(
            isinstance(member, Slices) and member.rescale for member in self.members
        )

    @cached_property
    def _held_by_rows(self) -> slice | Tensor | None:
        """The rows of a lone member that stands for columns without those rows."""
        (member, *others) = self.members
        if others or not isinstance(self.stored, InputSide):
            return None
        return member.row_places if isinstance(member, Slices) and member.rows else None

    def contracted(self, features: Tensor) -> Tensor:
        """Return a lone member's features, from the stored ones.

        Args:
            features: ``(c, n, p)``.
        """
        if self._held_by_rows is None:
            return features
        assert isinstance(self.stored, InputSide)
        # In place: no other member reads them, and repeating it changes nothing.
        by_input = features.unflatten(2, (-1, self.stored.of.outputs))
        by_input[..., self._held_by_rows] = 0
        return features

    @cached_property
    def _selected(self) -> Tensor:
        """``(members, slices)`` weight of every stored slice, in float64."""
        members = list(self.members)
        if isinstance(self.stored, Slices):
            selected = _rows_of(self.stored, members)
        else:
            assert isinstance(self.stored, InputSide)
            selected = _inputs_of(self.stored, members)
        return torch.tensor(selected, dtype=torch.float64)

    def grams(
        self, left: Tensor, right: Tensor, contraction: Contraction
    ) -> tuple[Sequence[Map], Tensor]:
        """Return every member's Gram matrix.

        Args:
            left: ``(c, n, p)`` features of the stored map.
            right: ``(c, m, p)``; may be the same object.
            contraction: The contraction.

        Returns:
            The members, and for each ``(c n, c m)``, or ``(n, m)`` if not coupled.
        """
        if len(self.members) == 1 and not self._weighs_inputs:
            (member,) = self.members
            return [member], contraction.gram(left, right, member.weights())[None]
        assert isinstance(self.stored, Slices | InputSide)
        members = list(self.members)
        rows = isinstance(self.stored, Slices)
        width = self.stored.of.inputs if rows else self.stored.of.outputs
        a, b = (f.unflatten(2, (-1, width)) for f in (left, right))
        grams = _slice_grams(self._selected.to(left), a, b, contraction)
        if isinstance(self.stored, InputSide):
            for member, block in zip(members, grams, strict=True):
                if isinstance(member, Slices) and member.rows:
                    block -= _overlap(member, self.stored, a, b, contraction)
        return members, grams


def shared_features(maps: Mapping[str, Maps]) -> list[SharedFeatures]:
    """Return the shared features that serve several spaces.

    Results are cached: computing them takes as long as a pass over a few sentences, and
    most callers ask for the same spaces again.

    Args:
        maps: The resolved spaces by name.

    Returns:
        Shared features that together serve all maps of all spaces. Do not modify them.
    """
    return _shared_features(
        tuple((space, tuple(held.items())) for space, held in maps.items())
    )


@lru_cache(maxsize=16)
def _shared_features(
    maps: tuple[tuple[str, tuple[tuple[str, tuple[Map, ...]], ...]], ...],
) -> list[SharedFeatures]:
    holders: dict[str, dict[Map, list[str]]] = {}
    for space, resolved in maps:
        for name, held in resolved:
            for map_ in held:
                holders.setdefault(name, {}).setdefault(map_, []).append(space)
    shared = []
    for name, members in holders.items():
        slices = [map_ for map_ in members if isinstance(map_, Slices)]
        # A map of rows and columns is served as rows, plus columns without those rows.
        # Not if it is rescaled: its weights then differ from those of either part.
        mixed = [s for s in slices if s.rows and s.columns and not s.rescale]
        rows = [s for s in slices if not s.columns]
        by_row: dict[Map, list[str]] = {s: members[s] for s in rows}
        for both in mixed:
            only_rows = replace(both, columns=())
            by_row[only_rows] = [*by_row.get(only_rows, []), *members[both]]
            rows.append(only_rows)
        columns = [*(s for s in slices if not s.rows), *mixed]
        stored: Map
        pairs = [map_ for map_ in members if isinstance(map_, LowRank)]
        if rows:
            chosen = tuple(sorted({i for s in rows for i in s.rows}))
            stored = Slices(rows[0].of, chosen, ())
            shared.append(SharedFeatures(name, stored, by_row))
        if columns or pairs:
            of = columns[0].of if columns else pairs[0].of
            chosen = tuple(sorted({j for s in columns for j in s.columns}))
            stored = InputSide(of, chosen, tuple(pairs))
            served: list[Map] = [*columns, *pairs]
            by_input = {map_: members[map_] for map_ in served}
            shared.append(SharedFeatures(name, stored, by_input))
        grouped: set[Map] = {*rows, *columns, *pairs}
        for map_, spaces in members.items():
            if map_ not in grouped:
                shared.append(SharedFeatures(name, map_, {map_: spaces}))
    return shared


def _rows_of(stored: Slices, members: Sequence[Map]) -> list[list[float]]:
    """Return the weight of every stored row in every member."""
    selected = []
    for member in members:
        assert isinstance(member, Slices)
        weights = member.weights()
        step = member.of.inputs
        values = (
            [1.0] * len(member.rows) if weights is None else weights[::step].tolist()
        )
        by_row = dict(zip(member.rows, values, strict=True))
        selected.append([by_row.get(row, 0.0) for row in stored.rows])
    return selected


def _inputs_of(stored: InputSide, members: Sequence[Map]) -> list[list[float]]:
    """Return the weight of every column, and every row of an A, in every member."""
    selected = []
    place = {column: i for i, column in enumerate(stored.columns)}
    ranks = dict(zip(stored.pairs, stored.places, strict=True))
    count = len(place) + sum(pair.rank for pair in stored.pairs)
    for member in members:
        weights = member.weights()
        row = [0.0] * count
        if isinstance(member, LowRank):
            weight = 1.0 if weights is None else float(weights[0])
            row[ranks[member]] = [weight] * member.rank
        else:
            assert isinstance(member, Slices)
            columns = len(member.columns)
            values = [1.0] * columns if weights is None else weights[:columns].tolist()
            for column, weight in zip(member.columns, values, strict=True):
                row[place[column]] = weight
        selected.append(row)
    return selected


def _overlap(
    member: Slices,
    stored: InputSide,
    left: Tensor,
    right: Tensor,
    contraction: Contraction,
) -> Tensor:
    """Return the Gram matrix of the entries in both the member's rows and columns.

    ``left`` and ``right`` are features ``(c, n, q, outputs)``.
    """
    place = {index: i for i, index in enumerate(stored.columns)}
    columns = torch.tensor([place[j] for j in member.columns], device=left.device)
    rows = torch.tensor(member.rows, device=left.device)
    a, b = (f[:, :, columns[:, None], rows].flatten(2) for f in (left, right))
    return contraction.gram(a, b)


def _slice_grams(
    selected: Tensor, left: Tensor, right: Tensor, contraction: Contraction
) -> Tensor:
    """Return the Gram matrices of selections of slices.

    Args:
        selected: ``(members, slices)`` weight of every slice in every selection.
        left: ``(c, n, slices, p)`` features of single rows or columns.
        right: ``(c, m, slices, p)``.
        contraction: The contraction.

    Returns:
        ``(members, c n, c m)`` or ``(members, n, m)``.
    """
    rows = (left.shape[0] if contraction.coupled else 1) * left.shape[1]
    columns = (right.shape[0] if contraction.coupled else 1) * right.shape[1]
    a, b = (f.permute(2, 0, 1, 3) for f in (left, right))
    total = left.new_zeros(len(selected), rows * columns)
    step = max(1, SLICE_ENTRIES // (rows * columns))
    for start in range(0, len(a), step):
        grams = contraction.grams(a[start : start + step], b[start : start + step])
        total.addmm_(selected[:, start : start + step], grams.flatten(1))
    return total.view(len(selected), rows, columns)
