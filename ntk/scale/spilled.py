"""An engine that writes features and factors to a file, so that passes run only once.

If the features and factors of all parameters do not fit into memory, kernels are
computed in parts, each of some parameters. Without a file, every part runs passes over
all examples. With one, the first part runs them for all parts:

    part 1   passes -> file of (x, g) of all parameters -> contracts its own
    part k                                              -> contracts its own

The contractions are the same either way. A resumed computation runs the same passes as
one from the start, also if few parameters are left: a pass that back-propagates less
far may use other routines in the layers below, which would change the last bits.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import accumulate

from ntk.gradients import (
    Batch,
    Key,
    Service,
    Verdicts,
    batch_length,
    passes,
    to_batches,
)
from ntk.kernels import (
    Accumulator,
    Counter,
    Engine,
    EngineInput,
    Features,
    Store,
    Stored,
    parameters_of,
    shared_features,
    stored_bytes,
    stored_maps,
)
from ntk.scale.factor_file import FactorFile, Piece
from ntk.spaces import Maps

__all__ = ["SpillFile", "SpillingEngine"]


class SpillFile:
    """Features and factors of all parts of a computation, in a file.

    Args:
        file: Open as long as this is used.
        parts: For each part, the maps of each of its spaces.
        done: Number of parts, from the first, that are already contracted.
        examples: Largest number of examples in a pass.
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
        shared = [shared_features(part) for part in parts]
        self.shared = {each.key: each for part in shared for each in part}
        self.needed = {each.name for part in shared[done:] for each in part}
        self.outputs = 0
        self.verdicts: Verdicts = {}
        self._pieces: dict[Key, list[list[Piece]]] = {}

    def keep(
        self,
        written: Mapping[tuple[Service, Key], list[Piece]],
        lengths: Sequence[int],
        verdicts: Verdicts,
    ) -> None:
        """Record the pieces that all passes have written.

        Args:
            written: By service, parameter and map, one piece per pass.
            lengths: Number of examples of each batch.
            verdicts: How each parameter was served in the end.
        """
        self.verdicts = verdicts
        for key in self.shared:
            service = verdicts[key[0]].service
            if (pieces := written.get((service, key))) is not None:
                step = 1 if service is Service.SINGLE else self.examples
                ends = list(accumulate(-(-n // step) for n in lengths))
                starts = [0, *ends[:-1]]
                self._pieces[key] = [
                    pieces[i:j] for i, j in zip(starts, ends, strict=True)
                ]

    def pieces(self, key: Key, batches: Sequence[int]) -> list[Piece]:
        """Return the pieces of a parameter and map for batches given by index."""
        return [piece for i in batches for piece in self._pieces[key][i]]

    def __contains__(self, key: object) -> bool:
        return key in self._pieces


class SpilledStore(MutableMapping[Key, Stored]):
    """Features and factors of some batches, read from the file at each access.

    Args:
        spill: The file.
        keys: The parameters and maps.
        batches: Indices of the batches.
    """

    def __init__(
        self, spill: SpillFile, keys: Sequence[Key], batches: Sequence[int]
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
        """The memory that its contents would take, in bytes."""
        sizes: dict[tuple[int, int], int] = {}
        for key in self._keys:
            for piece in self.spill.pieces(key, self.batches):
                sizes |= piece.sizes
        return stored_bytes(self.memory.values()) + sum(sizes.values())


class SpillingEngine(Engine):
    """Computes Gram matrices of one part; the first part fills the file for all.

    Args:
        given: What to compute.
        spill: The file, shared by all parts.
        order: For each left batch of this part, its index in the file.
    """

    def __init__(
        self, given: EngineInput, spill: SpillFile, order: Sequence[int]
    ) -> None:
        super().__init__(given)
        self.spill = spill
        indexed = zip(order, self.left, strict=True)
        self._indices = {id(batch): i for i, batch in indexed}

    def services(self, names: Sequence[str]) -> Verdicts:
        """Determine how parameters are served; the first part runs all passes.

        Args:
            names: The parameters.

        Returns:
            The verdicts.
        """
        if not self.spill.verdicts:
            self._fill(super().services(parameters_of(self.spill.shared.values())))
        self.outputs = self.spill.outputs or self.outputs
        return {name: self.spill.verdicts[name] for name in names}

    def _fill(self, verdicts: Verdicts) -> None:
        """Run the passes over all batches and write them to the file."""
        file = self.spill.file
        written: dict[tuple[Service, Key], list[Piece]] = defaultdict(list)
        batches = sorted(self.left, key=lambda batch: self._indices[id(batch)])
        device = next(iter(self.function.parameters.values())).device
        cut = to_batches(batches, device, self.spill.examples)
        lengths = list(map(batch_length, batches))
        kinds = {v.service for v in verdicts.values()}
        kinds -= {Service.UNUSED, Service.DEFINITION}
        counter = Counter("passes", sum(lengths) * max(1, len(kinds)), self.progress)

        def collect(service: Service, names: set[str]) -> Features:
            maps = stored_maps(self.spill.shared.values(), names & self.spill.needed)
            write = lambda key, value: written[service, key].append(file.write(value))
            return Features(maps, self.function.parameters, 0, {}, write)

        def count(examples: int) -> None:
            file.begin()
            counter(examples)

        self.spill.outputs = passes.run(self.function, cut, verdicts, collect, count)
        self.spill.keep(written, lengths, verdicts)

    def _store(
        self,
        side: list[Batch],
        verdicts: Verdicts,
        counter: Counter,
        sums: Accumulator | None = None,
    ) -> Store:
        """Return the features and factors of some batches, backed by the file."""
        store = SpilledStore(
            self.spill, list(self.shared), [self._indices[id(batch)] for batch in side]
        )
        self._store_jacobian(store, side, verdicts, counter)
        return store

    def bytes(self, store: Store) -> int:
        """Return the memory that a store would take, in bytes."""
        return store.bytes if isinstance(store, SpilledStore) else super().bytes(store)
