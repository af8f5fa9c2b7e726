"""How each parameter's gradient can be computed, checked on the first examples.

Rules on calls can fail silently: a model may share a tensor between the examples of a
batch, change a layer's output in place, or use a weight where no rule looks. So before
any kernel is computed, the gradient rebuilt from the factors is compared with
autograd's, parameter by parameter. `ntk.gradients.passes` handles later batches that
use a parameter differently.
"""

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ntk.gradients.capture import complete, record
from ntk.gradients.factors import Factor, dense
from ntk.gradients.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    check_finite,
    take,
)


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


@dataclass(frozen=True)
class Verdict:
    """How a parameter is served.

    Attributes:
        service: How its gradient is obtained.
        layouts: Layout of the examples in each of its uses in the comparison.
    """

    service: Service
    layouts: tuple[str, ...] = ()


Verdicts = dict[str, Verdict]
_known: WeakKeyDictionary[nn.Module, dict[object, Verdicts]] = WeakKeyDictionary()


def services(
    function: NetworkFunction, batch: Batch, wanted: Collection[str]
) -> Verdicts:
    """Return how each wanted parameter is served.

    The verdicts of a model are cached as long as its modules and parameters are the
    same objects and its inputs have the same names.

    Args:
        function: The model and its readout, in evaluation mode.
        batch: Examples; the first `EXAMPLES` are used.
        wanted: Names of parameters.

    Returns:
        The verdict on each.
    """
    compared = take(batch, slice(0, EXAMPLES))
    signature = _signature(function, compared)
    if signature not in _known.get(function.model, {}):
        check_alone(function, compared)
        _known[function.model] = {signature: {}}
    known = _known[function.model][signature]
    missing = [name for name in wanted if name not in known]
    if missing:
        known.update(_measure(function, compared, missing))
    return {name: known[name] for name in wanted}


def _signature(function: NetworkFunction, batch: Batch) -> object:
    model = function.model
    config = getattr(model, "config", None)
    return (
        tuple(sorted(batch)) if isinstance(batch, Mapping) else (),
        batch_length(batch),
        _held(function.outputs),
        getattr(config, "_attn_implementation", None),
        tuple((id(p), p.dtype) for p in function.parameters.values()),
        tuple(
            (type(m), _held(getattr(m.forward, "__func__", m.forward)))
            for m in model.modules()
        ),
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
        rebuilt, layouts = _rebuilt(function, groups, remaining)
        errors, norms = _compare(function, batch, remaining, rebuilt)
        scale = max(norms.values())
        for name in sorted(remaining):
            if name not in layouts and norms[name] == 0:
                verdicts[name] = Verdict(Service.UNUSED)
            elif _agree(
                function.parameters[name].dtype, errors[name], norms[name], scale
            ):
                verdicts[name] = Verdict(service, layouts.get(name, ()))
        remaining -= verdicts.keys()
    return {**dict.fromkeys(remaining, Verdict(Service.DEFINITION)), **verdicts}


Rebuilt = Callable[[str, int], Tensor | None]
"""Function of a parameter's name and an example's index: the gradient, if any."""


def _rebuilt(
    function: NetworkFunction, groups: Sequence[Batch], wanted: Collection[str]
) -> tuple[Rebuilt, dict[str, tuple[str, ...]]]:
    """Record groups of examples; return their gradients and all parameters' layouts."""
    # If the model fails or gives other outputs with a batch's shared tensors expanded,
    # no parameter can be served this way.
    by_example: list[tuple[dict[str, list[Factor]], int]] = []
    unserved: set[str] = set()
    used: dict[str, tuple[str, ...]] = {}
    nothing: Rebuilt = lambda name, i: None
    everything: dict[str, tuple[str, ...]] = dict.fromkeys(wanted, ())
    for group in groups:
        try:
            outputs, recorder = record(function, group, wanted)
        except FunctionError:
            raise
        except (RuntimeError, IndexError, ValueError):
            return nothing, everything
        plain = function(group).detach()
        error = float((outputs.detach() - plain).norm())
        if error > _tolerance(plain.dtype) * float(plain.norm()):
            return nothing, everything
        mixed = (outputs @ _mixture(outputs))[:, None]
        layouts = recorder.layouts()
        factors = complete(mixed, recorder)
        unserved |= recorder.unserved.keys()
        used |= layouts | dict.fromkeys(recorder.unserved, ())
        by_example += [(factors, i) for i in range(batch_length(group))]

    def gradient(name: str, i: int) -> Tensor | None:
        factors, number = by_example[i]
        if name in unserved or name not in used:
            return None
        shape = function.parameters[name].shape
        if name not in factors:
            return torch.zeros(shape.numel())
        uses = [factor.example(number) for factor in factors[name]]
        return dense(uses, shape).flatten()

    return gradient, used


def _compare(
    function: NetworkFunction, batch: Batch, wanted: Collection[str], rebuilt: Rebuilt
) -> tuple[dict[str, float], dict[str, float]]:
    """Return, by parameter, the norms of the error and of autograd's gradient."""
    # Compare and free each gradient as it arrives: only one is in memory at a time.
    errors, norms = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0.0)
    leaves = {
        name: p.detach().requires_grad_(name in wanted)
        for name, p in function.parameters.items()
    }
    outputs = function(batch, leaves)
    mixed = outputs @ _mixture(outputs)
    count = len(mixed)

    def compare(name: str, i: int, expected: Tensor | None) -> None:
        actual = rebuilt(name, i)
        if actual is None:
            errors[name] = float("inf")
        elif expected is None:
            errors[name] += float(actual.norm())
        else:
            errors[name] += float((actual.to(expected) - expected.flatten()).norm())
        norms[name] += 0.0 if expected is None else float(expected.norm())

    for i in range(count):
        seen: set[str] = set()

        def arrived(leaf: Tensor, *, name: str, i: int, seen: set[str]) -> None:
            seen.add(name)
            compare(name, i, leaf.grad)
            leaf.grad = None

        hooks = [
            leaves[name].register_post_accumulate_grad_hook(
                lambda leaf, name=name, i=i, seen=seen: arrived(
                    leaf, name=name, i=i, seen=seen
                )
            )
            for name in wanted
        ]
        if mixed.requires_grad:
            # Only these leaves: the caller's inputs may require gradients too.
            wanted_leaves = [leaves[name] for name in wanted]
            mixed[i].backward(inputs=wanted_leaves, retain_graph=i + 1 < count)
        for hook in hooks:
            hook.remove()
        for name in set(wanted) - seen:
            compare(name, i, None)
    return errors, norms


def _mixture(outputs: Tensor) -> Tensor:
    """Return weights ``(c,)`` of the outputs, distinct so that no two cancel."""
    c = outputs.shape[1]
    return torch.linspace(1.0, 1.7, c, dtype=outputs.dtype, device=outputs.device)


def _agree(dtype: torch.dtype, error: float, norm: float, scale: float) -> bool:
    """Whether two gradients agree up to rounding."""
    # A gradient that is zero in exact arithmetic (a key's bias) is pure rounding, so
    # differences far below the model's largest gradient count as agreement.
    return error <= _tolerance(dtype) * max(norm, 1e-3 * scale)


def _tolerance(dtype: torch.dtype) -> float:
    """Return sqrt(eps), half of the digits: far above rounding, coarse for 16 bits."""
    return torch.finfo(dtype).eps ** 0.5


def check_alone(function: NetworkFunction, batch: Batch) -> None:
    """Refuse a model whose output for an example depends on its batch.

    Args:
        function: The model and its readout, in evaluation mode.
        batch: Examples; the first `EXAMPLES` are used.

    Raises:
        BatchDependenceError: If the first example alone gives other outputs.
    """
    compared = take(batch, slice(0, EXAMPLES))
    with torch.no_grad():
        together = function(compared)
        check_finite(function.model, together)
        alone = function(take(compared, slice(0, 1)))
    error = float((together[:1] - alone).norm())
    if error > _tolerance(together.dtype) * max(float(together.norm()), 1e-6):
        raise BatchDependenceError(
            "the outputs for an example change with the other examples of its batch "
            f"(by {error:.1e}, outputs of norm {float(together.norm()):.1e}), so it "
            "has no kernel of its own. Batch statistics or dropout are the usual "
            "causes."
        )
