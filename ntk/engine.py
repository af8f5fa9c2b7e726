"""Passes that store features and factors, then contractions that add them up.

Every (parameter, map) pair is contracted once and added to all spaces that hold it.
Maps that select only rows, or only columns, of the same weight share more: the Gram
matrix of such a space is the sum of those of its slices, so the slices of all of them
are contracted once, one Gram matrix each, and every space is a weighted sum of those.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ntk import coverage
from ntk.capture import complete, record
from ntk.contraction import Contraction, gram
from ntk.coverage import Service, Verdict
from ntk.factors import Factor, Matrix, Vector, dense
from ntk.function import Batch, NetworkFunction, batch_length, take
from ntk.jacobian import Key, jacobian, products_kernel
from ntk.maps import LowRank, Map, Maps, Slices, Stack, Whole

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all."""

SLICE_ENTRIES = 2**25
"""Entries of the Gram matrices of slices held at a time."""


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


Stored = Tensor | list[list[Factor]]
"""Features ``(c, n, p)``, or the factors of every batch."""


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
        self.jobs = _jobs(maps)
        self.shapes = {n: p.shape for n, p in function.parameters.items()}

    def run(self, *, by_factors: bool) -> KernelResult:
        """Compute every space's Gram matrix ``(c n, c m)`` or ``(n, m)``.

        Args:
            by_factors: Whether to use factors where they are exact, or the
                definition's Jacobians for all.

        Returns:
            The Gram matrices as kernels, and how they were made.
        """
        names = list(dict.fromkeys(job.name for job in self.jobs))
        sample = self._sample()
        if by_factors:
            verdicts = coverage.services(self.function, sample, names)
        else:
            coverage.check_alone(self.function, sample)
            verdicts = dict.fromkeys(names, Verdict(Service.DEFINITION))
        stored, others = self._store(verdicts)
        grams, traces = self._contract(stored, others)
        served = {name: verdict.service for name, verdict in verdicts.items()}
        return KernelResult(grams, traces, self._sizes(), served)

    def _sample(self) -> Batch:
        """Return examples to compare on; one alone cannot show what batches share."""
        several = (b for b in (*self.left, *self.right) if batch_length(b) > 1)
        return next(several, self.left[0])

    def run_products(self) -> KernelResult:
        """Compute every space's Gram matrix by NTK-vector products.

        Returns:
            The Gram matrices as kernels.
        """
        coverage.check_alone(self.function, self._sample())
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
        # What a batch uses otherwise than the examples that were compared did is served
        # one example at a time, where everything belongs to that example, and what no
        # rule serves then by the definition.
        sides = [self.left] if self.prefix else [self.left, self.right]
        count = sum(map(batch_length, (b for side in sides for b in side)))
        passes = {v.service for v in verdicts.values()} - {Service.UNUSED}
        counter = Counter("passes", count * max(1, len(passes)), self.progress)
        stores = []
        for side in sides:
            store: dict[Key, Stored] = {}
            for service, instead in (
                (Service.BATCH, Service.SINGLE),
                (Service.SINGLE, Service.DEFINITION),
            ):
                late = self._factor_passes(side, service, verdicts, store, counter)
                verdicts.update(dict.fromkeys(late, Verdict(instead)))
            wanted = self._maps_of(Service.DEFINITION, verdicts)
            if wanted:
                rows = jacobian(self.function, side, wanted, counter)
                self.outputs = len(next(iter(rows.values())))
                store.update(rows)
            stores.append(store)
        return stores[0], stores[-1]

    def _maps_of(self, service: Service, verdicts: coverage.Verdicts) -> Maps:
        chosen: Maps = {}
        for job in self.jobs:
            if verdicts[job.name].service is service:
                chosen[job.name] = (*chosen.get(job.name, ()), job.stored)
        return chosen

    def _factor_passes(
        self,
        side: list[Batch],
        service: Service,
        verdicts: coverage.Verdicts,
        store: dict[Key, Stored],
        counter: Counter,
    ) -> set[str]:
        """Store what one kind of pass serves; return what it turned out not to."""
        single = service is Service.SINGLE
        served = self._maps_of(service, verdicts)
        watched = {n for n, v in verdicts.items() if v.service is Service.UNUSED}
        if not served and (single or not watched):
            return set()
        parts: dict[Key, list[Tensor]] = {}
        factors: dict[Key, list[list[Factor]]] = {}
        late: set[str] = set()
        for group in (g for batch in side for g in groups(batch, single=single)):
            outputs, recorder = record(self.function, group, {*served, *watched} - late)
            self.outputs = outputs.shape[1]
            layouts = recorder.layouts()
            recorder.uses = [u for u in recorder.uses if u.name in served]
            found = complete(outputs, recorder)
            late |= recorder.unserved.keys() & served.keys()
            late |= watched & (layouts.keys() | recorder.unserved.keys())
            if not single and batch_length(group) > 1:
                late |= {
                    name
                    for name in layouts.keys() & served.keys()
                    if layouts[name] != verdicts[name].layouts
                }
            for name in served.keys() - late:
                uses = found.get(name) or [self._nothing(name, group)]
                for each in served[name]:
                    key = (name, each)
                    if isinstance(each, Whole):
                        factors.setdefault(key, []).append(uses)
                    else:
                        shape = self.shapes[name]
                        parts.setdefault(key, []).append(_features(each, uses, shape))
            counter(batch_length(group))
        for key, several in factors.items():
            if key[0] not in late:
                store[key] = _small(several, self.shapes[key[0]])
        for key, rows in parts.items():
            if key[0] not in late:
                # A single batch is kept as it is: concatenating would copy it.
                store[key] = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return late

    def _nothing(self, name: str, group: Batch) -> Factor:
        """Return the factor of a parameter that a batch did not use."""
        shape, n, c = self.shapes[name], batch_length(group), self.outputs
        like = self.function.parameters[name]
        if len(shape) < 2:
            return Vector(like.new_zeros(c, n, shape.numel()))
        g = tuple(like.new_zeros(n, 0, shape[0]) for _ in range(c))
        return Matrix(like.new_zeros(n, 0, shape.numel() // shape[0]), g)

    def _contract(
        self, stored: dict[Key, Stored], others: dict[Key, Stored]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
        n = sum(map(batch_length, self.left))
        m = sum(map(batch_length, self.right))
        c = self.outputs if self.how.coupled else 1
        device = next(iter(self.function.parameters.values())).device
        grams = {
            space: torch.zeros(c * n, c * m, dtype=torch.float64, device=device)
            for space in self.maps
        }
        traces: dict[str, dict[str, float]] = {space: {} for space in self.maps}
        counter = Counter("contractions", len(self.jobs), self.progress)
        with torch.no_grad():
            for job in self.jobs:
                left = stored.pop(job.key, None)
                right = left if self.prefix else others.pop(job.key, None)
                if left is not None and right is not None:
                    for each, block in self._blocks(job, left, right, m):
                        trace = _trace(block, c, n, m) if self.prefix else None
                        for space in job.members[each]:
                            grams[space] += block
                            if trace is not None:
                                known = traces[space].get(job.name, 0.0)
                                traces[space][job.name] = known + trace
                counter(1)
        return grams, traces

    def _blocks(
        self, job: Job, left: Stored, right: Stored, m: int
    ) -> list[tuple[Map, Tensor]]:
        """Return the Gram matrix of every map that the job serves."""
        if isinstance(left, Tensor) != isinstance(right, Tensor):
            # One side never used the parameter and does not know that it is small.
            left, right = _as_factors(left), _as_factors(right)
        if not isinstance(left, Tensor):
            assert not isinstance(right, Tensor)
            if self.prefix:
                right = right[: len(self.right) if len(left) == len(self.left) else m]
            whole = gram(left, right, self.shapes[job.name], self.how)
            return [(each, whole) for each in job.members]
        assert isinstance(right, Tensor)
        right = right if right.shape[1] == m else right[:, :m]
        if len(job.members) == 1:
            (each,) = job.members
            return [(each, self.how.gram(left, right, each.weights()))]
        if isinstance(job.stored, Stack):
            parts = job.stored.split
            return [
                (each, self.how.gram(a, a if left is right else b, each.weights()))
                for each, a, b in zip(
                    job.stored.members, parts(left), parts(right), strict=True
                )
            ]
        assert isinstance(job.stored, Slices)
        members = [each for each in job.members if isinstance(each, Slices)]
        return list(
            zip(
                members,
                _slice_grams(job.stored, members, left, right, self.how),
                strict=True,
            )
        )


def _jobs(maps: Mapping[str, Maps]) -> list[Job]:
    """Collect equal maps, and those that are slices of one weight along one axis."""
    holders: dict[str, dict[Map, list[str]]] = {}
    for space, resolved in maps.items():
        for name, several in resolved.items():
            for each in several:
                holders.setdefault(name, {}).setdefault(each, []).append(space)
    jobs = []
    for name, members in holders.items():
        slices = [each for each in members if isinstance(each, Slices)]
        rows = [each for each in slices if not each.columns]
        columns = [each for each in slices if not each.rows]
        for alike in (rows, columns):
            if alike:
                chosen: dict[Map, list[str]] = {each: members[each] for each in alike}
                jobs.append(Job(name, _union(alike), chosen))
        pairs = [each for each in members if isinstance(each, LowRank)]
        if len(pairs) > 1:
            chosen = {each: members[each] for each in pairs}
            jobs.append(Job(name, Stack(tuple(pairs)), chosen))
        for other, spaces in members.items():
            if other in rows or other in columns or (len(pairs) > 1 and other in pairs):
                continue
            jobs.append(Job(name, other, {other: spaces}))
    return jobs


def _union(slices: Sequence[Slices]) -> Slices:
    if len(slices) == 1:
        return slices[0]
    rows = {i for each in slices for i in each.rows}
    columns = {j for each in slices for j in each.columns}
    return replace(
        slices[0],
        rows=tuple(sorted(rows)),
        columns=tuple(sorted(columns)),
        rescale=False,
    )


def _slice_grams(
    union: Slices,
    members: Sequence[Slices],
    left: Tensor,
    right: Tensor,
    how: Contraction,
) -> Tensor:
    """Return the Gram matrices of several selections from those of single slices.

    Args:
        union: All rows, or all columns, that any member selects.
        members: The selections.
        left: ``(c, n, p)`` features of the union.
        right: ``(c, m, p)`` features of the union.
        how: The contraction.

    Returns:
        ``(members, c n, c m)`` or ``(members, n, m)``.
    """
    by_row = bool(union.rows)
    slices = union.rows or union.columns
    selected = left.new_zeros(len(members), len(slices))
    for number, each in enumerate(members):
        own = each.rows or each.columns
        places = [slices.index(i) for i in own]
        weights = each.weights()
        if weights is None:
            selected[number, places] = 1
        elif by_row:
            selected[number, places] = weights[:: union.of.inputs].to(selected)
        else:
            selected[number, places] = weights[0].to(selected)
    a, b = (_slices_first(f, len(slices), by_row) for f in (left, right))
    rows = (left.shape[0] if how.coupled else 1) * left.shape[1]
    columns = (right.shape[0] if how.coupled else 1) * right.shape[1]
    total = left.new_zeros(len(members), rows * columns)
    step = max(1, SLICE_ENTRIES // (rows * columns))
    for start in range(0, len(slices), step):
        grams = _batched_gram(a[start : start + step], b[start : start + step], how)
        total.addmm_(selected[:, start : start + step], grams.flatten(1))
    return total.view(len(members), rows, columns)


def _slices_first(features: Tensor, count: int, by_row: bool) -> Tensor:
    """Return features ``(c, n, p)`` as ``(slices, c, n, p / slices)``."""
    if by_row:
        return features.unflatten(2, (count, -1)).permute(2, 0, 1, 3)
    return features.unflatten(2, (-1, count)).permute(3, 0, 1, 2)


def _batched_gram(left: Tensor, right: Tensor, how: Contraction) -> Tensor:
    left = left if how.left is None else how.left(left)
    right = right if how.right is None else how.right(right)
    if how.coupled:
        return torch.bmm(left.flatten(1, 2), right.flatten(1, 2).transpose(1, 2))
    return torch.matmul(left, right.transpose(2, 3)).sum(dim=1)


def _trace(block: Tensor, c: int, n: int, m: int) -> float:
    """Return the trace over the right examples, which lead the left ones."""
    by_output = block.view(c, n, c, m)[:, :m].diagonal(dim1=0, dim2=2)
    return float(by_output.diagonal(dim1=0, dim2=1).sum())


def groups(batch: Batch, *, single: bool) -> list[Batch]:
    """Return what one pass runs on: a batch, or each of its examples."""
    if not single:
        return [batch]
    return [take(batch, slice(i, i + 1)) for i in range(batch_length(batch))]


def _as_factors(stored: Stored) -> list[list[Factor]]:
    return [[Vector(stored)]] if isinstance(stored, Tensor) else stored


def _small(uses: list[list[Factor]], shape: torch.Size) -> Stored:
    """Turn factors that are gradients themselves into features."""
    if all(isinstance(factor, Vector) for batch in uses for factor in batch):
        return torch.cat([dense(batch, shape) for batch in uses], dim=1)
    return uses


def _features(
    each: Slices | LowRank | Stack, uses: Sequence[Factor], shape: torch.Size
) -> Tensor:
    """Return the features ``(c, n, p)`` that all uses of a parameter add up to."""
    total: Tensor | None = None
    for factor in uses:
        if (
            isinstance(factor, Matrix)
            and factor.rows is None
            and factor.output_dim == each.of.output_dim
        ):
            part = each.features(factor.g, factor.x)
        else:
            # Used otherwise than as the layer that owns it uses it.
            gradient = dense([factor], shape).unflatten(2, shape)
            turned = gradient if each.of.output_dim == 0 else gradient.transpose(2, 3)
            part = each.of_gradient(turned)
        total = part if total is None else total + part
    assert total is not None
    return total
