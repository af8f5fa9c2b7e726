"""The engine that lets what passes leave wait in a file, to run them but once.

Where memory has no room for what all parameters leave, kernels are computed in parts,
each of some parameters. Without a file every part runs its passes over all examples
again. With one the first part runs them for all parts to come:

    part 1   passes -> file of (x, g) of all parameters -> contracts its own
    part k                                              -> contracts its own

What is contracted together is the same either way. Where a part of several is gone on
with, its first pass does what that of the first part did, so that bits are the same: a
pass that goes back less far may take other ways through the layers below.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ntk import passes
from ntk.accumulator import Accumulator
from ntk.coverage import Service, Verdicts
from ntk.engine import Counter, Engine, Store, parameters_of, stored_maps
from ntk.factor_file import FactorFile, Piece
from ntk.features import Features, Stored, stored_bytes
from ntk.function import Batch, batch_length, to_batches
from ntk.jacobian import Key
from ntk.jobs import jobs
from ntk.maps import Maps

__all__ = ["Spill", "Spilled", "SpillingEngine"]


class Spill:
    """What the passes of several parts of a computation leave, in a file.

    Args:
        file: Open as long as this is used.
        parts: For each part, for each of its spaces, the maps of its parameters.
        done: How many parts, from the first, have been contracted before.
        examples: Most examples in a pass.
    """

    def __init__(
        self,
        file: FactorFile,
        parts: Sequence[Mapping[str, Maps]],
        done: int,
        examples: int,
    ) -> None:
        self.file = file
        self.examples = examples
        self.jobs = {job.key: job for part in parts for job in jobs(part)}
        self.needed = {job.name for part in parts[done:] for job in jobs(part)}
        self.outputs = 0
        self.verdicts: Verdicts = {}
        self._pieces: dict[Key, list[list[Piece]]] = {}

    def keep(
        self,
        found: Mapping[tuple[Service, Key], list[Piece]],
        lengths: Sequence[int],
        verdicts: Verdicts,
    ) -> None:
        """Take what all passes left.

        Args:
            found: By service, parameter and map what each pass left.
            lengths: Of the batches.
            verdicts: How each parameter was served in the end.
        """
        self.verdicts = verdicts
        for key in self.jobs:
            service = verdicts[key[0]].service
            if (pieces := found.get((service, key))) is not None:
                step = 1 if service is Service.SINGLE else self.examples
                ends = list(accumulate(-(-n // step) for n in lengths))
                starts = [0, *ends[:-1]]
                self._pieces[key] = [
                    pieces[i:j] for i, j in zip(starts, ends, strict=True)
                ]

    def pieces(self, key: Key, batches: Sequence[int]) -> list[Piece]:
        """Return what some batches, by number, left of a parameter and map."""
        return [piece for i in batches for piece in self._pieces[key][i]]

    def __contains__(self, key: object) -> bool:
        return key in self._pieces


@dataclass(frozen=True)
class Spilled:
    """The file of a computation, and the order that a part has its batches in.

    Attributes:
        spill: What passes leave, or will when the first part has run them.
        order: For each left batch its number in the file.
    """

    spill: Spill
    order: Sequence[int]


class SpilledStore(MutableMapping[Key, Stored]):
    """What some batches left, read from a file whenever it is asked for.

    Args:
        spill: Where it is.
        keys: Of which parameters and maps.
        batches: Which, by number.
    """

    def __init__(
        self, spill: Spill, keys: Sequence[Key], batches: Sequence[int]
    ) -> None:
        self.spill = spill
        self.batches = batches
        self.memory: Store = {}
        self._keys = dict.fromkeys(key for key in keys if key in spill)

    def __getitem__(self, key: Key) -> Stored:
        if key in self.memory:
            return self.memory[key]
        if key not in self._keys:
            raise KeyError(key)
        return self.spill.file.read(self.spill.pieces(key, self.batches))

    def __setitem__(self, key: Key, value: Stored) -> None:
        self.memory[key] = value

    def __delitem__(self, key: Key) -> None:
        self.memory.pop(key, None)
        self._keys.pop(key, None)

    def __iter__(self) -> Iterator[Key]:
        return iter({**self._keys, **self.memory})

    def __len__(self) -> int:
        return len({**self._keys, **self.memory})

    @property
    def bytes(self) -> int:
        """What it would hold in memory."""
        sizes: dict[tuple[int, int], int] = {}
        for key in self._keys:
            for piece in self.spill.pieces(key, self.batches):
                sizes |= piece.sizes
        return stored_bytes(self.memory.values()) + sum(sizes.values())


class SpillingEngine(Engine):
    """Computes Gram matrices of one part from a file that its first part has filled.

    Args:
        spilled: Shared by all parts, but for the order.
        what: The arguments of `Engine`.
    """

    def __init__(self, spilled: Spilled, *what: Any) -> None:
        super().__init__(*what)
        self.spill = spilled.spill
        places = zip(spilled.order, self.left, strict=True)
        self._numbers = {id(batch): i for i, batch in places}

    def services(self, names: Sequence[str]) -> Verdicts:
        """Find out how parameters are served; the first part runs all passes.

        Args:
            names: The parameters.

        Returns:
            The verdicts.
        """
        if not self.spill.verdicts:
            self._fill(super().services(parameters_of(self.spill.jobs.values())))
        self.outputs = self.spill.outputs or self.outputs
        return {name: self.spill.verdicts[name] for name in names}

    def _fill(self, verdicts: Verdicts) -> None:
        """Run the passes of all parts over all batches."""
        file = self.spill.file
        found: dict[tuple[Service, Key], list[Piece]] = defaultdict(list)
        batches = sorted(self.left, key=lambda batch: self._numbers[id(batch)])
        device = next(iter(self.function.parameters.values())).device
        cut = to_batches(batches, device, self.spill.examples)
        lengths = list(map(batch_length, batches))
        unpassed = {Service.UNUSED, Service.DEFINITION}
        kinds = {v.service for v in verdicts.values()} - unpassed
        counter = Counter("passes", sum(lengths) * max(1, len(kinds)), self.progress)

        def collect(service: Service, names: set[str]) -> Features:
            maps = stored_maps(self.spill.jobs.values(), names & self.spill.needed)
            keep = lambda key, stored: found[service, key].append(file.write(stored))
            return Features(maps, self.function.parameters, 0, {}, keep)

        def count(examples: int) -> None:
            file.begin()
            counter(examples)

        self.spill.outputs = passes.run(self.function, cut, verdicts, collect, count)
        self.spill.keep(found, lengths, verdicts)

    def _store(
        self,
        side: list[Batch],
        verdicts: Verdicts,
        counter: Counter,
        sums: Accumulator | None = None,
    ) -> Store:
        """Return what some batches left in the file."""
        store = SpilledStore(
            self.spill, list(self.jobs), [self._numbers[id(batch)] for batch in side]
        )
        self._store_jacobian(store, side, verdicts, counter)
        return store

    def bytes(self, store: Store) -> int:
        """Return what a side would hold in memory."""
        return store.bytes if isinstance(store, SpilledStore) else super().bytes(store)
