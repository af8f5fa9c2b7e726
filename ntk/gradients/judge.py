"""The judge: a plain loop of `torch.autograd.grad` over examples and outputs.

It differentiates the module's own parameters, with the readout inside, one example at
a time. Nothing is replaced, so no use of a parameter can be missed: modules registered
under two names, closures, lists, readouts that use the model's weights. It is slow, and
decides whether anything faster is right.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ntk.gradients.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    take,
)
from ntk.spaces import Map, Maps, Whole

Key = tuple[str, Map]
Progress = Callable[[int], None]
Gradients = dict[str, Tensor]
"""For each parameter that an output depends on, the gradient in the stored shape."""


@contextmanager
def requiring(
    parameters: Mapping[str, nn.Parameter], names: Collection[str]
) -> Iterator[None]:
    """Let some parameters require gradients, and no others, and restore all flags.

    Hooks on the parameters' gradients, which may change them or step an optimizer, are
    put aside meanwhile.

    Args:
        parameters: All parameters by name.
        names: Those that require gradients within the context.

    Yields:
        Nothing.
    """
    flags = {name: p.requires_grad for name, p in parameters.items()}
    hooks = {name: parameters[name]._backward_hooks for name in names}
    try:
        for name, parameter in parameters.items():
            if parameter.requires_grad != (name in names):
                parameter.requires_grad_(name in names)
            if hooks.get(name):
                parameter._backward_hooks = None
        yield
    finally:
        for name, parameter in parameters.items():
            if parameter.requires_grad != flags[name]:
                parameter.requires_grad_(flags[name])
            if hooks.get(name):
                parameter._backward_hooks = hooks[name]


def deliver_gradients(
    output: Tensor,
    parameters: Mapping[str, nn.Parameter],
    receive: Callable[[str, Tensor], None],
    *,
    retain: bool,
) -> set[str]:
    """Differentiate a number and deliver the gradients one by one, within `requiring`.

    Each gradient is freed after it was received: only one is in memory at a time.

    Args:
        output: A number.
        parameters: The parameters to differentiate.
        receive: Called with the name of a parameter and its gradient.
        retain: Whether the graph is used again.

    Returns:
        The parameters that the output depends on.
    """
    if not output.requires_grad or not parameters:
        return set()
    arrived: set[str] = set()

    def pass_on(gradient: Tensor, name: str) -> Tensor:
        arrived.add(name)
        receive(name, _checked(name, gradient))
        # Autograd keeps what the hook returns: a number instead of the gradient.
        if gradient.is_sparse:
            return gradient
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        return zero.expand(gradient.shape)

    handles = [
        parameter.register_hook(lambda g, name=name: pass_on(g, name))
        for name, parameter in parameters.items()
    ]
    try:
        _differentiated(output, list(parameters.values()), retain=retain)
    finally:
        for handle in handles:
            handle.remove()
    return arrived


def output_gradients(
    function: NetworkFunction, example: Batch, names: Collection[str]
) -> list[Gradients]:
    """Return the gradient of every output of one example.

    Args:
        function: The model and its readout, in evaluation mode.
        example: A batch of one example.
        names: The parameters to differentiate.

    Returns:
        For each output the gradients by parameter; one without a gradient is left out.
    """
    chosen = {name: function.parameters[name] for name in names}
    with requiring(function.parameters, names):
        (outputs,) = function(example)
        results: list[Gradients] = [{} for _ in outputs]
        if not outputs.requires_grad or not chosen:
            return results
        for k, output in enumerate(outputs):
            gradients = _differentiated(
                output, list(chosen.values()), retain=k + 1 < len(outputs)
            )
            for name, gradient in zip(chosen, gradients, strict=True):
                if gradient is not None:
                    results[k][name] = _checked(name, gradient)
    return results


def autograd_rows(
    function: NetworkFunction,
    batches: Sequence[Batch],
    maps: Maps,
    progress: Progress | None = None,
) -> dict[Key, Tensor]:
    """Return the Jacobian with respect to the coordinates of every map.

    Args:
        function: The model and its readout, in evaluation mode.
        batches: The examples.
        maps: The maps whose coordinates are differentiated.
        progress: Called with the number of examples done since the last call.

    Returns:
        For each parameter and map ``(c, n, p)``.
    """
    keys = map_keys(maps)
    parts: dict[Key, list[Tensor]] = {key: [] for key in keys}
    for batch in batches:
        for i in range(batch_length(batch)):
            rows = coordinate_rows(function, take(batch, slice(i, i + 1)), maps)
            for key in keys:
                parts[key].append(torch.stack([row[key] for row in rows]))
            if progress is not None:
                progress(1)
    return {key: torch.stack(each, dim=1) for key, each in parts.items()}


def coordinate_rows(
    function: NetworkFunction, example: Batch, maps: Maps
) -> list[dict[Key, Tensor]]:
    """Return the gradients of one example in the coordinates of every map.

    Args:
        function: The model and its readout, in evaluation mode.
        example: A batch of one example.
        maps: The maps by parameter.

    Returns:
        For each output ``(p,)`` by parameter and map.
    """
    results = []
    for gradients in output_gradients(function, example, maps):
        row: dict[Key, Tensor] = {}
        for name, each in map_keys(maps):
            weight = function.parameters[name].detach()
            if name in gradients:
                row[name, each] = _pulled_back(each, weight, gradients[name])
            else:
                row[name, each] = weight.new_zeros(each.size(weight.shape))
        results.append(row)
    return results


def map_keys(maps: Maps) -> list[Key]:
    """Return every parameter and map, in order."""
    return [(name, each) for name, group in maps.items() for each in group]


def _checked(name: str, gradient: Tensor) -> Tensor:
    """Return a gradient as a dense tensor of numbers."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    bad = int((~torch.isfinite(gradient)).sum())
    if bad:
        raise FunctionError(
            f"the gradient of parameter {name!r} has {bad} NaN or infinite entries of "
            f"{gradient.numel()}, though outputs and weights have none. The model "
            "divides by zero or leaves the range of its dtype in the backward pass."
        )
    return gradient


def _pulled_back(each: Map, weight: Tensor, gradient: Tensor) -> Tensor:
    """Return S' g: the gradient in delta of the parameter moved by S delta."""
    if isinstance(each, Whole):
        return gradient.flatten()
    with torch.enable_grad():
        delta = weight.new_zeros(each.size(weight.shape), requires_grad=True)
        moved = each.shift(weight, delta)
        return torch.autograd.grad(moved, delta, gradient.to(moved))[0]


def _differentiated(
    output: Tensor, parameters: Sequence[Tensor], *, retain: bool
) -> tuple[Tensor | None, ...]:
    """Return gradients of a number; None for what it does not depend on."""
    try:
        return torch.autograd.grad(
            output, parameters, retain_graph=retain, allow_unused=True
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise FunctionError(
            "the model checkpoints activations with use_reentrant=True, through which "
            "gradients of chosen parameters cannot be taken. Switch checkpointing off, "
            "or pass use_reentrant=False."
        ) from error
