"""Passes that store features and factors, then contractions that add them up.

What is stored for a parameter, and what is contracted together, is a `jobs.Job`; every
Gram matrix is added to all spaces that hold its map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ntk import coverage, passes
from ntk.accumulator import Accumulator
from ntk.contraction import Contraction, gram
from ntk.coverage import Service, Verdict
from ntk.factors import Factor, Vector
from ntk.features import Features, Stored
from ntk.function import Batch, NetworkFunction, batch_length
from ntk.jacobian import Key, jacobian, products_kernel
from ntk.jobs import Job, jobs
from ntk.maps import Map, Maps
from rocoft.console import Progress


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
    """

    def __init__(
        self,
        function: NetworkFunction,
        left: list[Batch],
        right: list[Batch],
        maps: Mapping[str, Maps],
        how: Contraction,
        progress: Progress | None,
    ) -> None:
        self.function = function
        self.left, self.right = left, right
        self.prefix = len(right) <= len(left) and all(
            a is b for a, b in zip(left, right, strict=False)
        )
        self.maps = maps
        self.how = how
        self.progress = progress
        self.outputs = 1
        self.jobs = {job.key: job for job in jobs(maps)}
        n, m = (sum(map(batch_length, side)) for side in (left, right))
        self.sums = Accumulator(list(maps), n, m, traced=self.prefix)
        self.shapes = {n: p.shape for n, p in function.parameters.items()}

    def run(self, *, by_factors: bool) -> KernelResult:
        """Compute every space's Gram matrix ``(c n, c m)`` or ``(n, m)``.

        Args:
            by_factors: Whether to use factors where they are exact, or the
                definition's Jacobians for all.

        Returns:
            The Gram matrices as kernels, and how they were made.
        """
        names = list(dict.fromkeys(job.name for job in self.jobs.values()))
        sample = passes.sample(self.left, self.right)
        if by_factors:
            verdicts = coverage.services(self.function, sample, names)
        else:
            coverage.check_alone(self.function, sample)
            verdicts = dict.fromkeys(names, Verdict(Service.DEFINITION))
        stored, others = self._store(verdicts)
        self._contract(stored, others)
        served = {name: verdict.service for name, verdict in verdicts.items()}
        like = next(iter(self.function.parameters.values()))
        grams = self.sums.grams(self.outputs if self.how.coupled else 1, like)
        return KernelResult(grams, self.sums.traces(), self._sizes(), served)

    def run_products(self) -> KernelResult:
        """Compute every space's Gram matrix by NTK-vector products.

        Returns:
            The Gram matrices as kernels.
        """
        coverage.check_alone(self.function, passes.sample(self.left, self.right))
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

    def _store(
        self, verdicts: coverage.Verdicts
    ) -> tuple[dict[Key, Stored], dict[Key, Stored]]:
        """Run all passes over both sides; the same store if they share examples."""
        sides = [self.left] if self.prefix else [self.left, self.right]
        count = sum(map(batch_length, (b for side in sides for b in side)))
        kinds = {v.service for v in verdicts.values()} - {Service.UNUSED}
        counter = Counter("passes", count * max(1, len(kinds)), self.progress)
        stores = []
        for side in sides:
            store: dict[Key, Stored] = {}
            collect = partial(self._collector, side, store)
            c = passes.run(self.function, side, verdicts, collect, counter)
            self.outputs = c or self.outputs
            names = {n for n, v in verdicts.items() if v.service is Service.DEFINITION}
            if names:
                rows = jacobian(self.function, side, self._maps_of(names), counter)
                self.outputs = len(next(iter(rows.values())))
                store.update(rows)
            stores.append(store)
        return stores[0], stores[-1]

    def _collector(
        self,
        side: list[Batch],
        store: dict[Key, Stored],
        service: Service,
        names: set[str],
    ) -> Features:
        # With one batch nothing has to wait for the others' gradients.
        alone = self.prefix and len(side) == len(self.right) == 1
        contract = lambda key, value: self._add(key, value, value)
        return Features(
            self._maps_of(names),
            self.function.parameters,
            sum(map(batch_length, side)),
            store,
            contract if alone and service is Service.BATCH else None,
        )

    def _maps_of(self, names: set[str]) -> Maps:
        chosen: Maps = {}
        for job in self.jobs.values():
            if job.name in names:
                chosen[job.name] = (*chosen.get(job.name, ()), job.stored)
        return chosen

    def _contract(self, stored: dict[Key, Stored], others: dict[Key, Stored]) -> None:
        """Contract what is stored."""
        counter = Counter("contractions", len(self.jobs), self.progress)
        with torch.no_grad():
            for key in self.jobs:
                left = stored.pop(key, None)
                right = left if self.prefix else others.pop(key, None)
                if left is not None and right is not None:
                    self._add(key, left, right)
                counter(1)

    def _add(self, key: Key, left: Stored, right: Stored) -> None:
        """Add the Gram matrices of one job to the spaces that hold its maps."""
        job = self.jobs[key]
        maps, grams = self._grams(job, left, right)
        self.sums.add(job.name, [job.members[each] for each in maps], grams)

    def _grams(
        self, job: Job, left: Stored, right: Stored
    ) -> tuple[Sequence[Map], Tensor]:
        """Return the Gram matrix of every map that the job serves."""
        m = self.sums.m
        if isinstance(left, Tensor) != isinstance(right, Tensor):
            # One side never used the parameter and does not know that it is small.
            left, right = _as_factors(left), _as_factors(right)
        if not isinstance(left, Tensor):
            assert not isinstance(right, Tensor)
            if self.prefix:
                right = right[: len(self.right) if len(left) == len(self.left) else m]
            whole = gram(left, right, self.shapes[job.name], self.how)
            return list(job.members), whole.expand(len(job.members), -1, -1)
        assert isinstance(right, Tensor)
        right = right if right.shape[1] == m else right[:, :m]
        return job.grams(left, right, self.how)


def _as_factors(stored: Stored) -> list[list[Factor]]:
    return [[Vector(stored)]] if isinstance(stored, Tensor) else stored
