"""Runs the passes, stores features and factors, and contracts them into Gram matrices.

`SharedFeatures` say what is stored for a parameter and contracted together. Every Gram
matrix is added to all spaces that hold its map. The right examples stay in memory; left
examples are processed in groups that fit beside them.
"""

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntk.gradients import (
    Batch,
    Factor,
    Key,
    NetworkFunction,
    Service,
    SpotChecks,
    Vector,
    Verdict,
    at_least_float32,
    autograd_rows,
    batch_length,
    coverage,
    passes,
    raised,
)
from ntk.kernels.accumulator import Accumulator, joined
from ntk.kernels.contraction import Contraction, gram
from ntk.kernels.features import Features, Stored, stored_bytes
from ntk.kernels.products import products_kernel
from ntk.kernels.shared import SharedFeatures, shared_features
from ntk.spaces import Map, Maps
from rocoft.commands import Progress

LEFT_BYTES = 2**31
"""Default number of bytes for features and factors of left examples."""

Store = MutableMapping[Key, Stored]
Rows = Callable[
    [NetworkFunction, Sequence[Batch], Maps, Callable[[int], None] | None],
    dict[Key, Tensor],
]
"""Function that returns Jacobians ``(c, n, p)``, see `ntk.gradients.judge`."""


@dataclass
class KernelResult:
    """Kernels of several spaces, with what each parameter contributed.

    Attributes:
        kernels: The kernel of each space.
        traces: For each space, each parameter's share of the trace over the right
            examples; empty if these are not among the left ones.
        sizes: Number of parameters of each space.
        services: How the gradients of each parameter were computed.
    """

    kernels: dict[str, Tensor]
    traces: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)


@dataclass(frozen=True)
class Sums:
    """Gram matrices and traces summed over all parameters.

    Attributes:
        grams: For each space, ``(c n, c m)`` or ``(n, m)`` in float64.
        traces: For each space, each parameter's share of the trace.
    """

    grams: dict[str, Tensor]
    traces: dict[str, dict[str, float]]


@dataclass
class Counter:
    """Counts steps of one kind of work and reports them."""

    step: str
    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, steps: int) -> None:
        """Report that more steps are done."""
        self.done += steps
        if self.progress is not None:
            self.progress(self.step, self.done, self.total)


@dataclass(frozen=True)
class EngineInput:
    """What an engine computes, and within which memory.

    Attributes:
        function: The model and its readout, in evaluation mode.
        left: The left batches.
        right: The right batches. If these are the first left ones, the same objects.
        maps: The resolved spaces by name.
        contraction: How features are contracted.
        left_bytes: Memory for the features and factors of a group of left examples, in
            bytes; those of the right ones stay in memory besides.
        sample: Examples on which it is determined how parameters are served; None means
            the first batch of at least two.
        progress: Called as the work goes on.
        rows: Computes the Jacobians of parameters that factors do not serve.
    """

    function: NetworkFunction
    left: list[Batch]
    right: list[Batch]
    maps: Mapping[str, Maps]
    contraction: Contraction
    left_bytes: int = LEFT_BYTES
    sample: Batch | None = None
    progress: Progress | None = None
    rows: Rows = autograd_rows


class Engine:
    """Computes the Gram matrices of several spaces between two lists of batches.

    Args:
        given: What to compute.
    """

    def __init__(self, given: EngineInput) -> None:
        self.function = given.function
        self.left, self.right = given.left, given.right
        self.prefix = len(self.right) <= len(self.left) and all(
            a is b for a, b in zip(self.left, self.right, strict=False)
        )
        self.maps = given.maps
        self.contraction = given.contraction
        self.progress = given.progress
        self.left_bytes = given.left_bytes
        self.sample = (
            passes.sample(self.left, self.right)
            if given.sample is None
            else given.sample
        )
        self.rows = given.rows
        self.checks = SpotChecks(
            self.function,
            list({id(batch): batch for batch in (*self.left, *self.right)}.values()),
        )
        self.outputs = 1
        self.shared = {shared.key: shared for shared in shared_features(self.maps)}
        self.shapes = {n: p.shape for n, p in self.function.parameters.items()}

    def run(self, *, by_factors: bool) -> KernelResult:
        """Compute every space's Gram matrix ``(c n, c m)`` or ``(n, m)``.

        Args:
            by_factors: Use factors where they are exact; else Jacobians for all
                parameters.

        Returns:
            The Gram matrices as kernels, with traces, sizes and services.
        """
        names = parameters_of(self.shared.values())
        if by_factors:
            verdicts = self.services(names)
        else:
            coverage.check_alone(self.function, self.sample)
            verdicts = dict.fromkeys(names, Verdict(Service.DEFINITION))
        sums = self.accumulated(verdicts)
        served = {name: verdict.service for name, verdict in verdicts.items()}
        return KernelResult(sums.grams, sums.traces, self._sizes(), served)

    def services(self, names: Sequence[str]) -> coverage.Verdicts:
        """Determine how the gradients of parameters are computed.

        Args:
            names: The parameters.

        Returns:
            The verdicts.
        """
        return coverage.services(self.function, self.sample, names)

    def run_products(self) -> KernelResult:
        """Compute every space's Gram matrix by NTK-vector products.

        Returns:
            The Gram matrices as kernels.
        """
        coverage.check_alone(self.function, self.sample)
        self.checks.check_outputs()
        total = len(self.maps) * sum(map(batch_length, self.right))
        counter = Counter("NTK-vector products", total, self.progress)
        kernels = {
            name: products_kernel(
                self.function,
                self.left,
                self.right,
                maps,
                self.contraction,
                counter,
                self.checks.examples(),
            )
            for name, maps in self.maps.items()
        }
        return KernelResult(kernels, sizes=self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {
            space: sum(m.size(self.shapes[n]) for n, ms in maps.items() for m in ms)
            for space, maps in self.maps.items()
        }

    def accumulated(self, verdicts: coverage.Verdicts) -> Sums:
        """Run all passes and contractions, one group of left examples after another.

        Args:
            verdicts: How parameters are served; updated if a batch needs another way.

        Returns:
            The Gram matrices and traces.
        """
        examples = sum(map(batch_length, self.right))
        others = self.left[len(self.right) :] if self.prefix else self.left
        kinds = {v.service for v in verdicts.values()} - {Service.UNUSED}
        total = examples + sum(map(batch_length, others))
        passed = Counter("passes", total * max(1, len(kinds)), self.progress)
        spaces = list(self.maps)
        sums = []
        # One batch alone is contracted as its gradients arrive; nothing is stored.
        alone = self.prefix and not others and len(self.right) == 1
        while True:
            square = Accumulator(
                spaces, examples, examples, self.contraction, traced=True
            )
            try:
                right = self._store(
                    self.right, verdicts, passed, square if alone else None
                )
                break
            except passes.RetractedError:
                continue
        size = self.bytes(right) / examples
        parts = groups(others, size, self.left_bytes)
        steps = len(self.shared) * (len(parts) + self.prefix)
        contracted = Counter("contractions", steps, self.progress)
        if self.prefix:
            self._contract(square, right, right, contracted, last=not others)
            sums.append(square)
        for i, group in enumerate(parts):
            left = self._store(group, verdicts, passed)
            n = sum(map(batch_length, group))
            sums.append(
                Accumulator(spaces, n, examples, self.contraction, traced=False)
            )
            last = i == len(parts) - 1
            self._contract(sums[-1], left, right, contracted, last=last)
        like = next(iter(self.function.parameters.values()))
        outputs = self.outputs if self.contraction.coupled else 1
        return Sums(joined(sums, outputs, like), sums[0].traces())

    def _store(
        self,
        side: list[Batch],
        verdicts: coverage.Verdicts,
        counter: Counter,
        sums: Accumulator | None = None,
    ) -> Store:
        """Run all passes over some batches and store features and factors.

        Args:
            side: The batches.
            verdicts: How parameters are served; updated if a batch needs another way.
            counter: Called with the number of examples done.
            sums: If given, features and factors are contracted with themselves into
                these sums as they become complete, instead of being stored.

        Returns:
            The stored features and factors.
        """
        store: dict[Key, Stored] = {}

        def collect(service: Service, names: set[str]) -> Features:
            ready = None
            if sums is not None and service is Service.BATCH:
                ready = lambda key, value: self._add(sums, key, value, value)
            n = sum(map(batch_length, side))
            maps = stored_maps(self.shared.values(), names)
            return Features(maps, self.function.parameters, n, store, ready)

        c = passes.run(
            self.function,
            side,
            verdicts,
            collect,
            counter,
            self.checks,
            streamed=sums is not None,
        )
        self.outputs = c or self.outputs
        self._store_jacobian(store, side, verdicts, counter)
        return store

    def _store_jacobian(
        self,
        store: Store,
        side: list[Batch],
        verdicts: coverage.Verdicts,
        counter: Counter,
    ) -> None:
        """Add the features of parameters that only the definition can serve."""
        names = {n for n, v in verdicts.items() if v.service is Service.DEFINITION}
        if names and side:
            maps = stored_maps(self.shared.values(), names)
            rows = self.rows(self.function, side, maps, counter)
            self.outputs = len(next(iter(rows.values())))
            store.update({key: at_least_float32(row) for key, row in rows.items()})

    def bytes(self, store: Store) -> int:
        """Return the memory that a store holds, in bytes."""
        return stored_bytes(store.values())

    def _contract(
        self,
        sums: Accumulator,
        left: Store,
        right: Store,
        counter: Counter,
        *,
        last: bool,
    ) -> None:
        """Contract stored left examples with the right ones.

        Args:
            sums: Receives the Gram matrices.
            left: Store of left examples; emptied.
            right: Store of the right examples; may be the same object.
            counter: Called with the number of contractions done.
            last: Whether to empty the right store as well.
        """
        with torch.no_grad():
            for key in self.shared:
                theirs = right.pop(key, None) if last else right.get(key)
                ours = theirs if left is right else left.pop(key, None)
                if ours is not None and theirs is not None:
                    self._add(sums, key, ours, theirs)
                counter(1)
            sums.contract()

    def _add(self, sums: Accumulator, key: Key, left: Stored, right: Stored) -> None:
        """Add one parameter's Gram matrices to the spaces that hold its maps."""
        shared = self.shared[key]
        if shared.alone and isinstance(left, Tensor) and isinstance(right, Tensor):
            a = shared.contracted(left)
            b = a if left is right else shared.contracted(right)
            sums.add_features(shared.name, shared.members[shared.alone], a, b)
            return
        maps, grams = self._grams(shared, left, right)
        sums.add(shared.name, [shared.members[map_] for map_ in maps], grams)

    def _grams(
        self, shared: SharedFeatures, left: Stored, right: Stored
    ) -> tuple[Sequence[Map], Tensor]:
        """Return the maps and the Gram matrix of each."""
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return shared.grams(left, right, self.contraction)
        # A side that never used the parameter may hold features, the other factors.
        ours, theirs = _as_factors(left), _as_factors(right)
        if left is right:
            theirs = ours
        whole = gram(ours, theirs, self.shapes[shared.name], self.contraction)
        return list(shared.members), whole.expand(len(shared.members), -1, -1)


def parameters_of(shared: Iterable[SharedFeatures]) -> list[str]:
    """Return the distinct parameters of shared features, in order."""
    return list(dict.fromkeys(each.name for each in shared))


def stored_maps(shared: Iterable[SharedFeatures], names: Collection[str]) -> Maps:
    """Return the maps to store for some parameters.

    Args:
        shared: Shared features of any parameters.
        names: The parameters to include.
    """
    chosen: Maps = {}
    for each in shared:
        if each.name in names:
            chosen[each.name] = (*chosen.get(each.name, ()), each.stored)
    return chosen


def groups(batches: Sequence[Batch], size: float, room: int) -> list[list[Batch]]:
    """Split batches into groups that are stored together.

    Args:
        batches: The batches, in order.
        size: Memory of one example in bytes.
        room: Largest memory of a group in bytes; a single batch may exceed it.

    Returns:
        Groups of at least one batch.
    """
    split: list[list[Batch]] = []
    used = 0.0
    for batch in batches:
        needed = size * batch_length(batch)
        if not split or used + needed > room:
            split.append([])
            used = 0.0
        split[-1].append(batch)
        used += needed
    return split


def _as_factors(stored: Stored) -> list[list[Factor]]:
    """Return factors in the precision of the contraction."""
    if isinstance(stored, Tensor):
        return [[Vector(stored)]]
    return [[raised(factor) for factor in batch] for batch in stored]
