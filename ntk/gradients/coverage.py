"""How each parameter's gradient can be computed, checked on a few examples.

Rules on calls can fail silently: a model may share a tensor between the examples of a
batch, change a layer's output in place, or use a weight where no rule looks. So before
any kernel is computed, the gradient rebuilt from the factors is compared with that of
`ntk.gradients.judge`, parameter by parameter. `ntk.gradients.passes` handles later
batches that use a parameter differently, and `ntk.gradients.spot_checks` looks for
later examples that do without it being seen.
"""

import enum
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ntk.gradients.capture import FAILURES, complete, record
from ntk.gradients.factors import Factor, dense
from ntk.gradients.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    check_finite,
    take,
)
from ntk.gradients.judge import deliver_gradients, requiring


class Service(enum.Enum):
    """How a parameter's gradient is obtained."""

    BATCH = "batch"
    """From the factors of batches of examples."""
    SINGLE = "single"
    """From the factors of one example at a time: its uses mix examples."""
    DEFINITION = "definition"
    """By automatic differentiation: no rule covers its uses."""
    UNUSED = "unused"
    """The outputs do not depend on it."""


class BatchDependenceError(FunctionError):
    """An example's outputs depend on the other examples of its batch."""


EXAMPLES = 2
"""Number of examples to compare; with one, sharing between examples is invisible."""
MOST_CHECKED = 4096
"""Number of spot-checked examples that are remembered."""


@dataclass(frozen=True)
class Verdict:
    """How a parameter is served.

    Attributes:
        service: How its gradient is obtained.
        layouts: Layout of the examples in each of its uses in the comparison.
        proven: Whether two examples with unequal gradients, neither of them zero, have
            been compared. Nothing else tells how examples lie in a tensor.
    """

    service: Service
    layouts: tuple[str, ...] = ()
    proven: bool = True


Verdicts = dict[str, Verdict]


@dataclass
class _Known:
    """What is known of a model in one state.

    Attributes:
        signature: The state.
        verdicts: Verdicts by parameter.
        checked: For each example that was spot-checked, by its digest, the parameters
            and services.
        versions: The state of the weights at the spot checks.
    """

    signature: object
    verdicts: Verdicts = field(default_factory=dict)
    checked: dict[bytes, set[tuple[str, Service]]] = field(default_factory=dict)
    versions: int = 0


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def services(
    function: NetworkFunction, batch: Batch, wanted: Collection[str]
) -> Verdicts:
    """Return how each wanted parameter is served.

    The verdicts of a model are cached as long as its modules, their settings, hooks and
    parameters are the same and its inputs have the same names.

    Args:
        function: The model and its readout, in evaluation mode.
        batch: Examples to compare, in pairs, see `ntk.gradients.passes.sample`.
        wanted: Names of parameters.

    Returns:
        The verdict on each.
    """
    pairs = [
        take(batch, slice(start, start + EXAMPLES))
        for start in range(0, batch_length(batch), EXAMPLES)
    ]
    signature = _signature(function, pairs[0])
    known = _known.get(function.model)
    if known is None or known.signature != signature:
        check_alone(function, pairs[0])
        known = _known[function.model] = _Known(signature)
    missing = {name for name in wanted if name not in known.verdicts}
    for pair in pairs:
        if not missing:
            break
        for name, verdict in _measure(function, pair, missing).items():
            before = known.verdicts.get(name)
            known.verdicts[name] = _worse(verdict, before) if before else verdict
        missing = {name for name in missing if not known.verdicts[name].proven}
    return {name: known.verdicts[name] for name in wanted}


ORDER = (Service.UNUSED, Service.BATCH, Service.SINGLE, Service.DEFINITION)


def _worse(one: Verdict, other: Verdict) -> Verdict:
    """Return the verdict that serves what both were measured on."""
    if one.service is other.service and one.layouts != other.layouts:
        return Verdict(Service.SINGLE if one.layouts else Service.DEFINITION)
    worse = max(one, other, key=lambda verdict: ORDER.index(verdict.service))
    return replace(worse, proven=one.proven or other.proven)


def revise(function: NetworkFunction, names: Collection[str], service: Service) -> None:
    """Correct the verdicts on parameters that a spot check has found wrong.

    Args:
        function: The model and its readout, after `services`.
        names: The parameters.
        service: How they are served from now on.
    """
    if (known := _known.get(function.model)) is not None:
        known.verdicts.update(dict.fromkeys(names, Verdict(service)))


def checked_before(
    function: NetworkFunction, digest: bytes
) -> set[tuple[str, Service]]:
    """Return the parameters and services checked on an example, to be added to.

    Args:
        function: The model and its readout, after `services`.
        digest: Digest of the example.

    Returns:
        The set that is kept, empty if the weights have changed since.
    """
    known = _known.get(function.model)
    if known is None:
        return set()
    versions = sum(p._version for p in function.parameters.values())
    if known.versions != versions or len(known.checked) > MOST_CHECKED:
        known.checked, known.versions = {}, versions
    return known.checked.setdefault(digest, set())


def _signature(function: NetworkFunction, batch: Batch) -> object:
    model = function.model
    return (
        tuple(sorted(batch)) if isinstance(batch, Mapping) else (),
        batch_length(batch),
        _held(function.outputs),
        _settings(getattr(model, "config", None)),
        tuple((id(p), p.dtype) for p in function.parameters.values()),
        tuple(
            (
                type(m),
                _held(getattr(m.forward, "__func__", m.forward)),
                _settings(m),
                tuple(m._forward_hooks),
                tuple(m._forward_pre_hooks),
            )
            for m in model.modules()
        ),
    )


def _settings(holder: object) -> tuple[tuple[str, object], ...]:
    """Return the attributes that are plain values: a flag may choose a branch."""
    return tuple(
        (name, value)
        for name, value in getattr(holder, "__dict__", {}).items()
        if value is None or isinstance(value, bool | int | float | str)
    )


def _held(function: Callable[..., object] | None) -> object:
    """Return a function, or a weak reference to it if it may hold the model."""
    bound = getattr(function, "__closure__", None) or isinstance(function, partial)
    return ref(function) if bound else function


def _measure(
    function: NetworkFunction, batch: Batch, wanted: Collection[str]
) -> Verdicts:
    n = batch_length(batch)
    singles = [take(batch, slice(i, i + 1)) for i in range(n)]
    attempts = [(Service.BATCH, [batch]), (Service.SINGLE, singles)]
    verdicts: Verdicts = {}
    remaining = set(wanted)
    for service, groups in attempts if n > 1 else attempts[:1]:
        if not remaining:
            break
        rebuilt = _Rebuilt(function, groups, remaining)
        errors, norms = _compare(function, batch, remaining, rebuilt)
        for name in sorted(remaining):
            proven = n == 1 or _unequal(function, norms[name])
            if name not in rebuilt.layouts and not any(norms[name]):
                verdicts[name] = Verdict(Service.UNUSED, proven=False)
            elif rebuilt.agrees(name, sum(errors[name]), sum(norms[name])):
                layouts = rebuilt.layouts.get(name, ())
                verdicts[name] = Verdict(service, layouts, proven)
        remaining -= verdicts.keys()
    return {**dict.fromkeys(remaining, Verdict(Service.DEFINITION)), **verdicts}


class _Rebuilt:
    """Gradients of some examples rebuilt from their factors.

    Args:
        function: The model and its readout.
        groups: Batches, recorded one after another.
        wanted: Names of parameters.

    Attributes:
        layouts: By parameter that is used, the layouts of its uses.
    """

    def __init__(
        self,
        function: NetworkFunction,
        groups: Sequence[Batch],
        wanted: Collection[str],
    ) -> None:
        self.function = function
        self.layouts: dict[str, tuple[str, ...]] = {}
        self._examples: list[tuple[dict[str, list[Factor]], int]] = []
        self._unserved: set[str] = set()
        try:
            served = all(self._record(group, wanted) for group in groups)
        except FunctionError:
            raise
        except FAILURES:
            served = False
        if not served:
            # The model fails or gives other outputs with a batch's shared tensors
            # expanded: no parameter can be served this way.
            self._unserved |= set(wanted)
            self.layouts = dict.fromkeys(wanted, ())

    def _record(self, group: Batch, wanted: Collection[str]) -> bool:
        """Record a batch; return whether its outputs are those of the plain model."""
        outputs, recorder = record(self.function, group, wanted)
        plain = self.function(group).detach()
        error = float((outputs.detach() - plain).norm())
        if error > tolerance(plain.dtype) * float(plain.norm()):
            return False
        mixed = (outputs @ mixture(outputs))[:, None]
        layouts = recorder.layouts()
        factors = complete(mixed, recorder)
        self._unserved |= recorder.unserved.keys()
        self.layouts |= layouts | dict.fromkeys(recorder.unserved, ())
        self._examples += [(factors, i) for i in range(batch_length(group))]
        return True

    def gradient(self, name: str, i: int) -> Tensor | None:
        """Return the flat gradient of example i; None if it cannot be rebuilt."""
        if name in self._unserved or name not in self.layouts:
            return None
        return self._sum(name, i, lambda factor: factor)

    def agrees(self, name: str, error: float, norm: float) -> bool:
        """Whether an error is rounding.

        Either half of the digits agree, or the error is small beside the terms that
        the gradient is a sum of: one that is zero in exact arithmetic (a key's bias)
        has no digits.

        Args:
            name: The parameter.
            error: Norm of the error, summed over examples.
            norm: Norm of the gradient, summed over examples.

        Returns:
            Whether it is.
        """
        dtype = self.function.parameters[name].dtype
        accuracy, eps = tolerance(dtype), torch.finfo(dtype).eps
        if error <= accuracy * norm:
            return True
        if name in self._unserved or name not in self.layouts:
            return False
        terms = sum(
            float(self._sum(name, i, lambda factor: factor.magnitude()).norm())
            for i in range(len(self._examples))
        )
        return error <= max(0.01 * accuracy, 4 * eps) * terms

    def _sum(self, name: str, i: int, part: Callable[[Factor], Factor]) -> Tensor:
        factors, number = self._examples[i]
        shape = self.function.parameters[name].shape
        if name not in factors:
            return torch.zeros(shape.numel())
        uses = [part(factor.example(number)) for factor in factors[name]]
        return dense(uses, shape).flatten()


CUT_OFF = "None of the inputs have requires_grad"
"""What `torch.utils.checkpoint` warns of when it drops gradients."""
Norms = dict[str, list[float]]
"""By parameter, a norm for each example."""


def _compare(
    function: NetworkFunction, batch: Batch, wanted: Collection[str], rebuilt: _Rebuilt
) -> tuple[Norms, Norms]:
    """Return, by parameter, the norms of the error and of the judge's gradient."""
    count = batch_length(batch)
    errors: Norms = {name: [0.0] * count for name in wanted}
    norms: Norms = {name: [0.0] * count for name in wanted}

    def compare(i: int, name: str, expected: Tensor | None) -> None:
        actual = rebuilt.gradient(name, i)
        if actual is None:
            errors[name][i] = float("inf")
        elif expected is None:
            errors[name][i] = float(actual.norm())
        else:
            flat = expected.flatten()
            errors[name][i] = float((actual.to(flat) - flat).norm())
        norms[name][i] = 0.0 if expected is None else float(expected.norm())

    chosen = {name: function.parameters[name] for name in wanted}
    with requiring(function.parameters, wanted):
        for i in range(count):
            outputs = function(take(batch, slice(i, i + 1)))
            mixed = (outputs @ mixture(outputs)).sum()
            receive = partial(compare, i)
            arrived = deliver_gradients(mixed, chosen, receive, retain=False)
            for name in chosen.keys() - arrived:
                compare(i, name, None)
    return errors, norms


def _unequal(function: NetworkFunction, norms: Sequence[float]) -> bool:
    """Whether norms tell that gradients differ and that none of them is zero."""
    least, most = min(norms), max(norms)
    dtype = next(iter(function.parameters.values())).dtype
    return least > 0 and most - least > tolerance(dtype) * most


def mixture(outputs: Tensor) -> Tensor:
    """Return weights ``(c,)`` of the outputs, distinct so that no two cancel."""
    c = outputs.shape[1]
    return torch.linspace(1.0, 1.7, c, dtype=outputs.dtype, device=outputs.device)


def tolerance(dtype: torch.dtype) -> float:
    """Return sqrt(eps), half of the digits: far above rounding, coarse for 16 bits."""
    return torch.finfo(dtype).eps ** 0.5


def check_alone(function: NetworkFunction, batch: Batch) -> None:
    """Refuse a model whose outputs depend on the batch, or on no parameter.

    Args:
        function: The model and its readout, in evaluation mode.
        batch: Examples; the first `EXAMPLES` are used.

    Raises:
        BatchDependenceError: If the first example alone gives other outputs.
        FunctionError: If the outputs have no gradient in any parameter.
    """
    compared = take(batch, slice(0, EXAMPLES))
    # Not torch.no_grad: a model may differentiate within its forward pass.
    with requiring(function.parameters, ()):
        together = function(compared).detach()
    check_finite(function.model, together)
    with (
        requiring(function.parameters, function.parameters),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        alone = function(take(compared, slice(0, 1)))
    cut = [
        w for w in caught if "None of the inputs have requires_grad" in str(w.message)
    ]
    if cut:
        raise FunctionError(
            "the model checkpoints its first layers with use_reentrant=True, which "
            "drops the gradients of their parameters. Switch checkpointing off, or "
            "pass use_reentrant=False."
        )
    if not alone.requires_grad:
        raise FunctionError(
            "the outputs have no gradient in any parameter: the model or outputs= "
            "detaches them (torch.no_grad, .detach(), .item(), numpy). Remove that."
        )
    check_same_outputs(together[:1], alone.detach())


def check_same_outputs(together: Tensor, alone: Tensor) -> None:
    """Check that an example's outputs do not depend on the others of its batch.

    Args:
        together: ``(1, c)`` outputs in a batch.
        alone: ``(1, c)`` outputs of the example alone.

    Raises:
        BatchDependenceError: If they differ by more than rounding.
    """
    error = float((together - alone).norm())
    norm = float(together.norm())
    if error > tolerance(together.dtype) * max(norm, 1e-6):
        raise BatchDependenceError(
            "the outputs for an example change with the other examples of its batch "
            f"(by {error:.1e}, outputs of norm {norm:.1e}), so it has no kernel of its "
            "own. Batch statistics or dropout are the usual causes."
        )
