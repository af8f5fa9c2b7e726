"""Passes that store features and factors, then contractions that add them up.

What is stored for a parameter, and what is contracted together, is a `jobs.Job`; every
Gram matrix is added to all spaces that hold its map. The right examples stay stored; of
the left ones beside them only as many at a time as there is room for.
"""

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntk import coverage, passes
from ntk.accumulator import Accumulator, joined
from ntk.contraction import Contraction, gram
from ntk.coverage import Service, Verdict
from ntk.factors import Factor, Vector, at_least_float32, raised
from ntk.features import Features, Stored, stored_bytes
from ntk.function import Batch, NetworkFunction, batch_length
from ntk.jacobian import Key, jacobian, products_kernel
from ntk.jobs import Job, jobs
from ntk.maps import Map, Maps
from rocoft.console import Progress

LEFT_BYTES = 2**31
"""What features and factors of left examples may take unless told."""

Store = MutableMapping[Key, Stored]


@dataclass
class KernelResult:
    """Kernels of several spaces and what is known about how they were made.

    Attributes:
        kernels: For each space, the kernel.
        traces: For each space, what each parameter adds to the trace over the right
            examples; empty if the right examples are not among the left.
        sizes: For each space, its number of parameters.
        services: How each parameter was served.
    """

    kernels: dict[str, Tensor]
    traces: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)


@dataclass(frozen=True)
class Sums:
    """What all passes and contractions came to.

    Attributes:
        grams: For each space, ``(c n, c m)`` or ``(n, m)`` in float64.
        traces: As in `KernelResult`.
    """

    grams: dict[str, Tensor]
    traces: dict[str, dict[str, float]]


@dataclass
class Counter:
    """Adds up steps and reports them."""

    what: str
    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, steps: int) -> None:
        """Report some more steps as done."""
        self.done += steps
        if self.progress is not None:
            self.progress(self.what, self.done, self.total)


class Engine:
    """Computes the Gram matrices of several spaces between two lists of batches.

    Args:
        function: The model and its readout, in evaluation mode.
        left: Batches.
        right: Batches; the first of ``left``, the same objects, if they are the same.
        maps: The resolved spaces by name.
        how: The contraction.
        progress: Called as the work goes on.
        left_bytes: What is stored of left examples at a time.
        sample: Examples by which it is found out how parameters are served; None means
            the first batch of several.
    """

    def __init__(
        self,
        function: NetworkFunction,
        left: list[Batch],
        right: list[Batch],
        maps: Mapping[str, Maps],
        how: Contraction,
        progress: Progress | None,
        left_bytes: int = LEFT_BYTES,
        sample: Batch | None = None,
    ) -> None:
        self.function = function
        self.left, self.right = left, right
        self.prefix = len(right) <= len(left) and all(
            a is b for a, b in zip(left, right, strict=False)
        )
        self.maps = maps
        self.how = how
        self.progress = progress
        self.left_bytes = left_bytes
        self.sample = passes.sample(left, right) if sample is None else sample
        self.outputs = 1
        self.jobs = {job.key: job for job in jobs(maps)}
        self.shapes = {n: p.shape for n, p in function.parameters.items()}

    def run(self, *, by_factors: bool) -> KernelResult:
        """Compute every space's Gram matrix ``(c n, c m)`` or ``(n, m)``.

        Args:
            by_factors: Whether to use factors where they are exact, or the
                definition's Jacobians for all.

        Returns:
            The Gram matrices as kernels, and how they were made.
        """
        names = parameters_of(self.jobs.values())
        if by_factors:
            verdicts = self.services(names)
        else:
            coverage.check_alone(self.function, self.sample)
            verdicts = dict.fromkeys(names, Verdict(Service.DEFINITION))
        sums = self.accumulated(verdicts)
        served = {name: verdict.service for name, verdict in verdicts.items()}
        return KernelResult(sums.grams, sums.traces, self._sizes(), served)

    def services(self, names: Sequence[str]) -> coverage.Verdicts:
        """Find out how parameters are served.

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
        total = len(self.maps) * sum(map(batch_length, self.right))
        counter = Counter("NTK-vector products", total, self.progress)
        kernels = {
            name: products_kernel(
                self.function, self.left, self.right, maps, self.how, counter
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
            verdicts: How parameters are served; corrected where a batch asks for it.

        Returns:
            The Gram matrices and traces.
        """
        examples = sum(map(batch_length, self.right))
        further = self.left[len(self.right) :] if self.prefix else self.left
        kinds = {v.service for v in verdicts.values()} - {Service.UNUSED}
        total = examples + sum(map(batch_length, further))
        counter = Counter("passes", total * max(1, len(kinds)), self.progress)
        spaces = list(self.maps)
        sums = []
        square = Accumulator(spaces, examples, examples, self.how, traced=True)
        # With one batch nothing has to wait for the others' gradients.
        alone = self.prefix and not further and len(self.right) == 1
        right = self._store(self.right, verdicts, counter, square if alone else None)
        size = self.bytes(right) / examples
        parts = groups(further, size, self.left_bytes)
        steps = len(self.jobs) * (len(parts) + self.prefix)
        counted = Counter("contractions", steps, self.progress)
        if self.prefix:
            self._contract(square, right, right, counted, last=not further)
            sums.append(square)
        for i, group in enumerate(parts):
            left = self._store(group, verdicts, counter)
            n = sum(map(batch_length, group))
            sums.append(Accumulator(spaces, n, examples, self.how, traced=False))
            last = i == len(parts) - 1
            self._contract(sums[-1], left, right, counted, last=last)
        like = next(iter(self.function.parameters.values()))
        outputs = self.outputs if self.how.coupled else 1
        return Sums(joined(sums, outputs, like), sums[0].traces())

    def _store(
        self,
        side: list[Batch],
        verdicts: coverage.Verdicts,
        counter: Counter,
        sums: Accumulator | None = None,
    ) -> Store:
        """Run all passes over some batches; what can be contracted at once is not kept.

        Args:
            side: The batches.
            verdicts: How parameters are served; corrected where a batch asks for it.
            counter: Told of the examples.
            sums: Where what is complete is contracted with itself, if it is at once.

        Returns:
            What was kept.
        """
        store: dict[Key, Stored] = {}

        def collect(service: Service, names: set[str]) -> Features:
            ready = None
            if sums is not None and service is Service.BATCH:
                ready = lambda key, value: self._add(sums, key, value, value)
            n = sum(map(batch_length, side))
            maps = stored_maps(self.jobs.values(), names)
            return Features(maps, self.function.parameters, n, store, ready)

        c = passes.run(self.function, side, verdicts, collect, counter)
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
        """Add what only the definition serves to what was stored of some batches."""
        names = {n for n, v in verdicts.items() if v.service is Service.DEFINITION}
        if names and side:
            maps = stored_maps(self.jobs.values(), names)
            rows = jacobian(self.function, side, maps, counter)
            self.outputs = len(next(iter(rows.values())))
            store.update({key: at_least_float32(row) for key, row in rows.items()})

    def bytes(self, store: Store) -> int:
        """Return what is held of a side."""
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
        """Contract what is stored of some left examples and of the right ones.

        Args:
            sums: Where the Gram matrices go.
            left: Of the left examples; emptied.
            right: Of the right examples; the same object if they are the same.
            counter: Told of every job.
            last: Whether this empties the right store as well.
        """
        with torch.no_grad():
            for key in self.jobs:
                theirs = right.pop(key, None) if last else right.get(key)
                ours = theirs if left is right else left.pop(key, None)
                if ours is not None and theirs is not None:
                    self._add(sums, key, ours, theirs)
                counter(1)
            sums.contract()

    def _add(self, sums: Accumulator, key: Key, left: Stored, right: Stored) -> None:
        """Add the Gram matrices of one job to the spaces that hold its maps."""
        job = self.jobs[key]
        if job.alone and isinstance(left, Tensor) and isinstance(right, Tensor):
            a = job.contracted(left)
            b = a if left is right else job.contracted(right)
            sums.add_features(job.name, job.members[job.alone], a, b)
            return
        maps, grams = self._grams(job, left, right)
        sums.add(job.name, [job.members[each] for each in maps], grams)

    def _grams(
        self, job: Job, left: Stored, right: Stored
    ) -> tuple[Sequence[Map], Tensor]:
        """Return the Gram matrix of every map that the job serves."""
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return job.grams(left, right, self.how)
        # One side alone may never have used the parameter, or not know it as small.
        ours, theirs = _as_factors(left), _as_factors(right)
        if left is right:
            theirs = ours
        whole = gram(ours, theirs, self.shapes[job.name], self.how)
        return list(job.members), whole.expand(len(job.members), -1, -1)


def parameters_of(jobs: Iterable[Job]) -> list[str]:
    """Return the names of the parameters of some jobs, each once."""
    return list(dict.fromkeys(job.name for job in jobs))


def stored_maps(jobs: Iterable[Job], names: Collection[str]) -> Maps:
    """Return the maps that are stored of some parameters.

    Args:
        jobs: Of any parameters.
        names: Which ones.
    """
    chosen: Maps = {}
    for job in jobs:
        if job.name in names:
            chosen[job.name] = (*chosen.get(job.name, ()), job.stored)
    return chosen


def groups(batches: Sequence[Batch], size: float, room: int) -> list[list[Batch]]:
    """Part batches into groups that are stored together.

    Args:
        batches: In their order.
        size: Bytes that an example takes.
        room: Most bytes of a group.

    Returns:
        Groups of at least one batch.
    """
    found: list[list[Batch]] = []
    used = 0.0
    for batch in batches:
        own = size * batch_length(batch)
        if not found or used + own > room:
            found.append([])
            used = 0.0
        found[-1].append(batch)
        used += own
    return found


def _as_factors(stored: Stored) -> list[list[Factor]]:
    """Return factors in the precision that they are contracted in."""
    if isinstance(stored, Tensor):
        return [[Vector(stored)]]
    return [[raised(factor) for factor in batch] for batch in stored]
