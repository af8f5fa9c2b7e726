"""Empirical neural tangent kernels of any tangent space.

Axes
----
A kernel between n and m examples with c outputs has shape ``(n, m, c, d)``, d being
the second copy of c: ``K[i, j]`` is the block of two examples, ``K[train][:, test]``
slices examples. `gram_matrix` turns it into ``(n c, m d)``, the Gram matrix of the rows
of the Jacobian in example-major order. Reductions by name:

- ``"full"`` keeps c and d;
- ``"trace"`` sums over c = d to ``(n, m)``;
- ``"margin"`` is the kernel of ``f[1] - f[0]``, for two outputs, ``(n, m)``.

A kernel is a sum over parameters. Each (parameter, map) pair is contracted once and
added to every space that holds it, in float64, so many spaces cost about one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ntk import coverage
from ntk.capture import complete, record
from ntk.coverage import Service
from ntk.factors import Contraction, Factor, Matrix, Vector, gram
from ntk.function import (
    Batch,
    FunctionError,
    Inputs,
    NetworkFunction,
    Readout,
    batch_length,
    check_parameters,
    evaluating,
    logits,
    take,
    to_batches,
)
from ntk.jacobian import Key, jacobian, products_kernel
from ntk.maps import Map, Maps, Whole
from ntk.spaces import Full, Space

Reduction = Literal["full", "trace", "margin"]
Kind = Literal["sgd", "signgd", "asymmetric_signgd"]
Implementation = Literal["factors", "jacobian", "jvp"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all."""

KINDS: dict[str, tuple[Callable[[Tensor], Tensor] | None, ...]] = {
    "sgd": (None, None),
    "signgd": (torch.sign, torch.sign),
    "asymmetric_signgd": (None, torch.sign),
}
REDUCTIONS = ("full", "trace", "margin")
IMPLEMENTATIONS = {
    "factors": "one forward and c backward passes a batch; time and memory of those",
    "jacobian": "torch.func: vmap of jacrev; memory n c p",
    "jvp": "torch.func: a vjp, then jvps; time n m c, memory of one gradient",
}


@dataclass
class KernelResult:
    """Kernels of several spaces and what is known about how they were made.

    Attributes:
        kernels: For each space, the kernel.
        traces: For each space, the trace that each parameter contributes on the
            diagonal of examples both sides share; the shares of the kernel.
        sizes: For each space, its number of parameters.
        services: How each parameter was served.
    """

    kernels: dict[str, Tensor]
    traces: dict[str, dict[str, float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)


@overload
def empirical_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space = ...,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    implementation: Implementation = "factors",
    batch_size: int | None = None,
) -> Tensor: ...
@overload
def empirical_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Mapping[str, Space],
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    implementation: Implementation = "factors",
    batch_size: int | None = None,
) -> dict[str, Tensor]: ...
def empirical_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space | Mapping[str, Space] | None = None,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    implementation: Implementation = "factors",
    batch_size: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Return the empirical NTK between examples over chosen parameters.

    ``K[i, j, c, d] = <grad f_c(x_i), grad f_d(x_j)>``, the gradients taken with respect
    to the coordinates of the tangent space at the model's present weights.

    Args:
        model: Any module; used in evaluation mode and left as it was.
        inputs: n examples: what a tokenizer returns (a mapping of tensors), a tensor,
            or a list of such batches.
        other: m examples; None means the inputs themselves.
        space: Which parameters, or a mapping of names to several choices, all of them
            computed in one pass. `Full()` if not given.
        outputs: From the model's output to ``(n, c)``; by default its `.logits`, or
            the tensor itself.
        reduce: ``"full"``, ``"trace"`` or ``"margin"``, see the module's axes.
        kind: ``"sgd"`` <g, g'>, ``"signgd"`` <sign g, sign g'> or
            ``"asymmetric_signgd"`` <g, sign g'> (Malladi et al. 2023, section 3).
        implementation: ``"factors"``, ``"jacobian"`` or ``"jvp"``: the same numbers at
            different costs, see `IMPLEMENTATIONS`.
        batch_size: Most examples in one pass; None takes batches as given.

    Returns:
        ``(n, m, c, d)``, or ``(n, m)`` if reduced, in float64 on the model's device;
        for a mapping of spaces a dictionary of them.

    Raises:
        ValueError: If an argument has a value that is not listed above.
    """
    named = space if isinstance(space, Mapping) else {"": space or Full()}
    result = compute(
        model,
        inputs,
        other,
        spaces=named,
        outputs=outputs,
        reduce=reduce,
        kind=kind,
        implementation=implementation,
        batch_size=batch_size,
    )
    if isinstance(space, Mapping):
        return result.kernels
    return result.kernels[""]


def compute(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | int | None = None,
    *,
    spaces: Mapping[str, Space],
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    kind: Kind = "sgd",
    implementation: Implementation = "factors",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute kernels as `empirical_ntk` does and say how.

    Args:
        model: As in `empirical_ntk`.
        inputs: As in `empirical_ntk`.
        other: As in `empirical_ntk`; a number means the first so many batches of
            ``inputs`` (a list), which are then not run again.
        spaces: Tangent spaces by name.
        outputs: As in `empirical_ntk`.
        reduce: As in `empirical_ntk`.
        kind: As in `empirical_ntk`.
        implementation: As in `empirical_ntk`.
        batch_size: As in `empirical_ntk`.
        progress: Called as the work goes on.

    Returns:
        The kernels and their provenance.

    Raises:
        ValueError: If an argument has a value that is not one of its choices.
    """
    _check_choices(spaces, reduce, kind, implementation)
    check_parameters(model)
    device = next(model.parameters()).device
    maps = {name: space.maps(model) for name, space in spaces.items()}
    left = to_batches(inputs, device, batch_size)
    if other is None:
        right = left
    elif isinstance(other, int):
        right = left[: len(to_batches(_first(inputs, other), device, batch_size))]
    else:
        right = to_batches(other, device, batch_size)
    function = NetworkFunction(model, _reader(outputs, reduce))
    before, after = KINDS[kind]
    how = Contraction(before, after, coupled=reduce == "full")
    with evaluating(model):
        if implementation == "jvp":
            result = _by_products(function, left, right, maps, how, progress)
        else:
            engine = _Engine(function, left, right, maps, how, progress)
            result = engine.run(by_factors=implementation == "factors")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    result.sizes = {name: parameter_count(m, shapes) for name, m in maps.items()}
    n = sum(map(batch_length, left))
    m = sum(map(batch_length, right))
    result.kernels = {
        name: _example_major(k, n, m) if reduce == "full" else k
        for name, k in result.kernels.items()
    }
    return result


def gram_matrix(kernel: Tensor) -> Tensor:
    """Return the Gram matrix of the rows of the Jacobian, example-major.

    Args:
        kernel: ``(n, m, c, d)`` or ``(n, m)``.

    Returns:
        ``(n c, m d)``, or the kernel itself if it has no output axes.
    """
    if kernel.ndim == 2:
        return kernel
    n, m, c, d = kernel.shape
    return kernel.transpose(1, 2).reshape(n * c, m * d)


def reduced(kernel: Tensor, how: Reduction) -> Tensor:
    """Reduce a full kernel.

    Args:
        kernel: ``(n, m, c, d)``.
        how: ``"full"``, ``"trace"`` or ``"margin"``.

    Returns:
        ``(n, m, c, d)`` or ``(n, m)``.

    Raises:
        ValueError: If a margin is asked of other than two outputs.
    """
    if how == "full":
        return kernel
    if how == "trace":
        return torch.einsum("nmcc->nm", kernel)
    if kernel.shape[2] != 2:
        raise ValueError(
            f"reduce='margin' needs two outputs, but the kernel has {kernel.shape[2]}."
        )
    sign = torch.tensor([-1.0, 1.0], dtype=kernel.dtype, device=kernel.device)
    return torch.einsum("nmcd,c,d->nm", kernel, sign, sign)


def _example_major(gram: Tensor, n: int, m: int) -> Tensor:
    """Return the kernel ``(n, m, c, d)`` of an output-major Gram ``(c n, d m)``."""
    c, d = gram.shape[0] // n, gram.shape[1] // m
    return gram.view(c, n, d, m).permute(1, 3, 0, 2).contiguous()


def parameter_count(maps: Maps, shapes: Mapping[str, torch.Size]) -> int:
    """Return the number of coordinates of a resolved space."""
    return sum(m.size(shapes[name]) for name, several in maps.items() for m in several)


def _check_choices(
    spaces: Mapping[str, Space], reduce: str, kind: str, implementation: str
) -> None:
    for argument, value, choices in (
        ("reduce", reduce, REDUCTIONS),
        ("kind", kind, tuple(KINDS)),
        ("implementation", implementation, tuple(IMPLEMENTATIONS)),
    ):
        if value not in choices:
            raise ValueError(f"{argument}={value!r} must be one of {', '.join(choices)}.")
    if not spaces:
        raise ValueError("space={} names no tangent space. Pass at least one.")
    if implementation == "jvp" and kind == "signgd":
        raise ValueError(
            "kind='signgd' needs every gradient itself, which implementation='jvp' "
            "never forms. Use 'factors' or 'jacobian'."
        )


def _first(inputs: Inputs, count: int) -> Inputs:
    if isinstance(inputs, Mapping | Tensor):
        raise ValueError(f"other={count} needs inputs as a list of batches.")
    return inputs[:count]


def _reader(outputs: Readout | None, reduce: str) -> Readout | None:
    if reduce != "margin":
        return outputs
    return _Margin(outputs or logits)


@dataclass(frozen=True)
class _Margin:
    """Reads out f[1] - f[0]; equal to itself for the same readout."""

    read: Readout

    def __call__(self, output: object) -> Tensor:
        values = self.read(output)
        if values.ndim != 2 or values.shape[1] != 2:
            raise ValueError(
                "reduce='margin' needs two outputs, but the model has shape "
                f"{tuple(values.shape)}."
            )
        return values[:, 1:] - values[:, :1]


def _by_products(
    function: NetworkFunction,
    left: Sequence[Batch],
    right: Sequence[Batch],
    maps: Mapping[str, Maps],
    how: Contraction,
    progress: Progress | None,
) -> KernelResult:
    total = len(maps) * sum(map(batch_length, right))
    counter = _Counter("NTK-vector products", total, progress)
    return KernelResult(
        {
            name: products_kernel(function, left, right, space, how, counter)
            for name, space in maps.items()
        }
    )


@dataclass
class _Counter:
    """Adds up steps and reports them."""

    what: str
    total: int
    progress: Progress | None
    done: int = 0

    def __call__(self, steps: int) -> None:
        self.done += steps
        if self.progress is not None:
            self.progress(self.what, self.done, self.total)


Stored = Tensor | list[list[Factor]]
"""Features ``(c, n, p)``, or the factors of every batch."""


class _Engine:
    """Passes that store features and factors, then contractions that add them up."""

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
        self.prefix = all(a is b for a, b in zip(left, right))
        self.maps = maps
        self.how = how
        self.progress = progress
        self.outputs = 1
        self.keys: dict[Key, list[str]] = {}
        for space, resolved in maps.items():
            for name, several in resolved.items():
                for each in several:
                    self.keys.setdefault((name, each), []).append(space)
        self.shapes = {n: p.shape for n, p in function.model.named_parameters()}

    def run(self, *, by_factors: bool) -> KernelResult:
        """Compute every space's Gram matrix."""
        names = list(dict.fromkeys(name for name, _ in self.keys))
        if by_factors:
            verdicts = coverage.services(self.function, self.left[0], names)
        else:
            verdicts = dict.fromkeys(names, Service.DEFINITION)
        stored, others = self._store(verdicts)
        return self._contract(stored, others, verdicts)

    def _store(
        self, verdicts: dict[str, Service]
    ) -> tuple[dict[Key, Stored], dict[Key, Stored]]:
        """Run all passes over both sides; the same store if they share examples."""
        sides = [self.left] if self.prefix else [self.left, self.right]
        count = sum(map(batch_length, (b for side in sides for b in side)))
        passes = set(verdicts.values()) - {Service.UNUSED}
        counter = _Counter("passes", count * len(passes), self.progress)
        stores = []
        for side in sides:
            store: dict[Key, Stored] = {}
            late = self._factor_passes(side, Service.BATCH, verdicts, store, counter)
            # What no pass had seen until now is exact one example at a time.
            for name in late:
                verdicts[name] = Service.SINGLE
            if Service.SINGLE in verdicts.values():
                self._factor_passes(side, Service.SINGLE, verdicts, store, counter)
            wanted = self._keys_of(Service.DEFINITION, verdicts)
            if wanted:
                rows = jacobian(self.function, side, wanted, counter)
                self.outputs = len(next(iter(rows.values())))
                store.update(rows)
            stores.append(store)
        return stores[0], stores[-1]

    def _keys_of(self, service: Service, verdicts: Mapping[str, Service]) -> Maps:
        chosen: dict[str, tuple[Map, ...]] = {}
        for name, each in self.keys:
            if verdicts[name] is service:
                chosen[name] = (*chosen.get(name, ()), each)
        return chosen

    def _factor_passes(
        self,
        side: list[Batch],
        service: Service,
        verdicts: Mapping[str, Service],
        store: dict[Key, Stored],
        counter: _Counter,
    ) -> set[str]:
        """Store what one kind of pass serves; return unused ones that were used."""
        served = self._keys_of(service, verdicts)
        watched = {n for n, v in verdicts.items() if v is Service.UNUSED}
        if not served:
            return set()
        parts: dict[Key, list[Tensor]] = {}
        factors: dict[Key, list[list[Factor]]] = {}
        late: set[str] = set()
        for batch in side:
            for group in _groups(batch, single=service is Service.SINGLE):
                outputs, recorder = record(self.function, group, {*served, *watched})
                lost = served.keys() & recorder.unserved.keys()
                if lost:
                    raise FunctionError(
                        f"parameter {min(lost)!r} enters the computation differently "
                        f"from the first examples ({recorder.unserved[min(lost)]}). "
                        "Use implementation='jacobian'."
                    )
                seen = {use.name for use in recorder.uses} | recorder.unserved.keys()
                late |= watched & seen
                recorder.uses = [u for u in recorder.uses if u.name in served]
                found = complete(outputs, recorder)
                self.outputs = outputs.shape[1]
                for name, several in served.items():
                    uses = found.get(name) or [self._nothing(name, group, outputs)]
                    for each in several:
                        if isinstance(each, Whole) and not isinstance(uses[0], Vector):
                            factors.setdefault((name, each), []).append(uses)
                        else:
                            parts.setdefault((name, each), []).append(
                                _features(each, uses)
                            )
                counter(batch_length(group))
        store.update(factors)
        store.update({key: torch.cat(p, dim=1) for key, p in parts.items()})
        return late

    def _nothing(self, name: str, group: Batch, outputs: Tensor) -> Factor:
        """Return the factor of a parameter that a batch did not use."""
        shape, n, c = self.shapes[name], batch_length(group), outputs.shape[1]
        if len(shape) != 2:
            return Vector(outputs.new_zeros(c, n, shape.numel()))
        g = tuple(outputs.new_zeros(n, 0, shape[0]) for _ in range(c))
        return Matrix(outputs.new_zeros(n, 0, shape[1]), g)

    def _contract(
        self,
        stored: dict[Key, Stored],
        others: dict[Key, Stored],
        verdicts: dict[str, Service],
    ) -> KernelResult:
        n = sum(map(batch_length, self.left))
        m = sum(map(batch_length, self.right))
        device = next(self.function.model.parameters()).device
        grams: dict[str, Tensor] = {}
        traces: dict[str, dict[str, float]] = {space: {} for space in self.maps}
        counter = _Counter("contractions", len(self.keys), self.progress)
        with torch.no_grad():
            for (name, each), spaces in self.keys.items():
                left = stored.pop((name, each), None)
                if left is None:
                    counter(1)
                    continue
                right = left if self.prefix else others.pop((name, each))
                block = self._gram(name, each, left, right, m)
                trace = float(block.diagonal().sum())
                for space in spaces:
                    known = traces[space].get(name, 0.0)
                    traces[space][name] = known + trace
                    if space in grams:
                        grams[space] += block
                    else:
                        grams[space] = block.to(torch.float64, copy=True)
                counter(1)
        c = self.outputs if self.how.coupled else 1
        for space in self.maps:
            if space not in grams:
                shape = (n * c, m * c)
                grams[space] = torch.zeros(shape, dtype=torch.float64, device=device)
        return KernelResult(grams, traces, services=verdicts)

    def _gram(
        self, name: str, each: Map, left: Stored, right: Stored, m: int
    ) -> Tensor:
        if isinstance(left, Tensor):
            assert isinstance(right, Tensor)
            return self.how.gram(left, right[:, :m], each.weights())
        assert not isinstance(right, Tensor)
        single = len(left) != len(self.left)
        count = m if single else len(self.right)
        return gram(left, right[:count], self.shapes[name], self.how)


def _groups(batch: Batch, *, single: bool) -> list[Batch]:
    if not single:
        return [batch]
    return [take(batch, slice(i, i + 1)) for i in range(batch_length(batch))]


def _features(each: Map, uses: list[Factor]) -> Tensor:
    """Return the features ``(c, n, p)`` that all uses of a parameter add up to."""
    total: Tensor | None = None
    for factor in uses:
        if isinstance(factor, Vector):
            part = factor.v
        else:
            assert isinstance(factor, Matrix)
            assert not isinstance(each, Whole)
            part = each.features(factor.all_rows(each.of.outputs), factor.x)
        total = part if total is None else total + part
    assert total is not None
    return total
