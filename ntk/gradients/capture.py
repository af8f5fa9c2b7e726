"""One forward and c backward passes that compute the factors of every parameter.

A `TorchFunctionMode` sees every call that takes a parameter, whichever module makes it:
`F.linear` in a layer, `torch.addmm` in transformers' Conv1D, a weight multiplied in an
RMSNorm, a learned token expanded over the batch. Parameters require no gradients during
the pass, so no weight gradient is computed; no module is hooked or changed. Hooks on
the outputs of those calls receive the gradients: one backward pass for each output of
the model completes the factors. Each factor is delivered as soon as its gradient
arrives, so that the receiver can reduce it while it is in cache and free it.

A call without a rule makes the parameter *unserved*; the definition serves it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntk.gradients.factors import Factor, joined
from ntk.gradients.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    check_finite,
)
from ntk.gradients.judge import requiring
from ntk.gradients.rules import RULES, Alias, NotByExampleError, Use, bind


@dataclass
class Recorder(TorchFunctionMode):
    """Records the uses of some parameters in one forward pass.

    Attributes:
        examples: Number of examples in the batch.
        wanted: Names of the parameters to record.
        aliases: By `id`, the tensors known to be parameters or aliases of one.
        uses: Recorded uses.
        watched: For each hooked output, the uses that its gradient completes.
        leaves: Leaves of the autograd graph of the hooked outputs.
        arrived: Called with the index of a hooked output and its gradient.
        live: Parameters that require gradients, see `record`.
        reached: Those of them that autograd has reached.
        silent: Parameters with a use whose gradient did not arrive.
        unserved: Parameters without a rule, and the reason.
        lengths: Numbers of positions of an example seen in tensors in which they
            lie behind its number, or behind it and that of its rows.
        routed: Whether positions have been selected by a condition on data. After that
            the first axis need not be the example axis, whatever its length.
    """

    examples: int
    wanted: Collection[str]
    aliases: dict[int, tuple[Tensor, Alias]]
    uses: list[Use] = field(default_factory=list)
    watched: list[list[Use]] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    arrived: Callable[[int, Tensor], None] | None = None
    live: dict[str, nn.Parameter] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    unserved: dict[str, str] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)
    routed: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name == "batch_norm":
            _refuse_batch_statistics(args, kwargs)
        self.routed = self.routed or _picks(name, args)
        aliases = self._aliases_among(args, kwargs)
        if not aliases:
            return func(*args, **kwargs)
        if name in LENDS and not (args and self.of(args[0])):
            # Only the parameter's dtype, device or shape is used.
            return func(*args, **kwargs)
        plain_sum = name == "add" and not any(
            value.ndim for value in _tensors((args, kwargs)) if not self.of(value)
        )
        if name in SAME or name in VIEWS or plain_sum:
            output = func(*args, **kwargs)
            return self._follow(name, func, args, kwargs, output, aliases)
        if name == "detach":
            return func(*args, **kwargs)
        return self._use(name, func, args, kwargs, aliases)

    def _aliases_among(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Alias]:
        """Return the parameters among the arguments; fast, as it runs at every call."""
        known = self.aliases
        aliases = [known[id(a)][1] for a in args if id(a) in known]
        aliases += [known[id(a)][1] for a in kwargs.values() if id(a) in known]
        for value in args:
            if isinstance(value, list | tuple):
                aliases += [alias for t in _tensors(value) if (alias := self.of(t))]
        return aliases

    def of(self, value: Any) -> Alias | None:
        """Return the parameter that a value is or aliases, None if it is none."""
        known = self.aliases.get(id(value))
        return known[1] if known is not None else None

    def by_example(self, value: Tensor) -> Tensor:
        """Return a tensor with the examples on the first axis.

        Args:
            value: ``(n, ...)``, or ``(n t, ...)`` with the t positions of an example
                consecutive. Any shape for one example.

        Returns:
            ``(n, ...)`` or ``(n, t, ...)``.

        Raises:
            NotByExampleError: If the first axis is not that of the examples.
        """
        n = self.examples
        if n == 1:
            return value.unsqueeze(0)
        length = value.shape[0] if value.ndim else 0
        if self.routed and value.ndim <= 2:
            raise NotByExampleError("its positions are selected by a condition on data")
        if length == n:
            return value
        if length % n == 0 and length // n in self.lengths:
            return value.unflatten(0, (n, length // n))
        raise NotByExampleError(
            f"its tensor {tuple(value.shape)} is shared by the examples of a batch"
        )

    def _follow(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        aliases: list[Alias],
    ) -> Any:
        """Track a view or cast as an alias of the parameter."""
        if not list(_tensors(output)):
            return output
        alias = aliases[0]
        if len(aliases) > 1:
            self._give_up(aliases, f"it meets another parameter in {name}")
        elif name in SAME or name == "add":
            self._track(output, alias)
        elif name in {"T", "t", "transpose", "permute", "mT"}:
            flipped = len(alias.shape) == 2 and alias.rows is None
            if flipped and tuple(output.shape) == tuple(
                alias.shape if alias.transposed else alias.shape[::-1]
            ):
                turned = Alias(alias.name, alias.shape, not alias.transposed)
                self._track(output, turned)
            else:
                self._give_up(aliases, f"of {name}")
        else:
            self._follow_rows(func, args, kwargs, output, alias)
        return output

    def _follow_rows(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        alias: Alias,
    ) -> None:
        """Track an indexed parameter: index the row numbers to find which rows."""
        if alias.transposed or alias.rows is not None:
            self._give_up([alias], f"of {_name(func)}")
            return
        device = args[0].device
        numbers = torch.arange(alias.shape[0], device=device)
        try:
            rows = func(numbers, *args[1:], **kwargs)
        except (IndexError, RuntimeError, TypeError):
            self._give_up([alias], f"of {_name(func)}")
            return
        outputs = [output] if isinstance(output, Tensor) else list(output)
        pieces = [rows] if isinstance(rows, Tensor) else list(rows)
        for piece, part in zip(outputs, pieces, strict=True):
            if part.ndim != 1 or piece.shape != (len(part), *alias.shape[1:]):
                self._give_up([alias], f"of {_name(func)}")
                return
            self._track(piece, Alias(alias.name, alias.shape, rows=part))

    def _use(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        aliases: list[Alias],
    ) -> Any:
        rule = RULES.get(name)
        call = bind(name, args, kwargs) if rule is not None else None
        served = {id(value) for value in (call or {}).values() if self.of(value)}
        given = {id(value) for value in _tensors((args, kwargs)) if self.of(value)}
        if rule is None or call is None or served != given:
            output = func(*args, **kwargs)
            if _tensors(output):
                self._give_up(aliases, f"of {name}")
            return output
        output = func(*args, **kwargs)
        if not output.ndim:
            self._give_up(aliases, "its result is a single number")
            return output
        if output.ndim > 2:
            # An example may have several rows, such as one sequence for each answer.
            rows, rest = divmod(len(output), self.examples)
            if not rest and (rows == 1 or rows in self.lengths):
                self.lengths.add(rows * output.shape[1])
        layout = self._layout(output)
        if not any(alias.name in self.wanted for alias in aliases):
            return output
        if name == "embedding" and len(output) == 1 and self.examples > 1:
            # Position ids of shape (1, t) are shared by all examples. Expand them so
            # that the examples' gradients are not summed.
            output = output.expand(self.examples, *output.shape[1:])
        if output.requires_grad and not self.leaves:
            self._give_up(aliases, "it follows a trained tensor that is no parameter")
            return output
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()
        elif output._is_view():
            # An in-place change gives a view a new autograd node, without the hook.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        try:
            uses = [u for u in rule(self, call, output) if u.name in self.wanted]
        except (NotByExampleError, *FAILURES) as error:
            self._give_up(aliases, str(error))
            return output
        for use in uses:
            use.layout, use.routed = layout, self.routed
        self.uses += uses
        self._watch(output, uses)
        return output

    def _watch(self, output: Tensor, uses: list[Use]) -> None:
        """Hook an output so that its gradient is passed to `arrived`."""
        number, recorder = len(self.watched), ref(self)
        self.watched.append(uses)

        # A weak reference: the graph must not keep the recorder with the layer inputs.
        def report(gradient: Tensor) -> None:
            if (alive := recorder()) is not None and alive.arrived is not None:
                alive.arrived(number, gradient)

        if output.requires_grad:
            output.register_hook(report)

    def release(self) -> None:
        """Release the graph: the recorded uses would form a reference cycle with it."""
        self.arrived = None
        self.uses, self.watched, self.leaves = [], [], []

    def layouts(self) -> dict[str, tuple[str, ...]]:
        """Return, by parameter, the example layout of the output of each use."""
        layouts: dict[str, tuple[str, ...]] = {}
        for use in self.uses:
            layouts[use.name] = (*layouts.get(use.name, ()), use.layout)
        return layouts

    def _layout(self, output: Tensor) -> str:
        if len(output) == self.examples:
            return "pooled" if output.ndim <= 2 else "positions"
        return "shared" if len(output) == 1 else "flattened"

    def _track(self, value: Tensor, alias: Alias) -> None:
        self.aliases[id(value)] = (value, alias)

    def _give_up(self, aliases: Sequence[Alias], why: str) -> None:
        for alias in aliases:
            self.unserved.setdefault(alias.name, why)


def record(
    function: NetworkFunction,
    batch: Batch,
    wanted: Collection[str],
    live: Collection[str] = (),
) -> tuple[Tensor, Recorder]:
    """Run the model forward and record the uses of some parameters.

    Args:
        function: The model and its readout.
        batch: The examples.
        wanted: Names of parameters.
        live: Parameters that no use is expected of. They alone require gradients, so
            that `backward` tells if autograd reaches one of them all the same.

    Returns:
        The outputs ``(n, c)`` and the recorder.
    """
    parameters = function.parameters
    recorder = Recorder(
        batch_length(batch),
        set(wanted),
        {id(p): (p, Alias(name, p.shape)) for name, p in parameters.items()},
        live={name: parameters[name] for name in live},
        lengths={
            t.shape[1]
            for t in _tensors(
                [*batch.values()] if isinstance(batch, Mapping) else batch
            )
            if t.ndim > 1
        },
    )
    # Freeze outside the recorder, which would see the calls.
    with requiring(parameters, live), recorder:
        outputs = function(batch)
    check_finite(function.model, outputs)
    for use in recorder.uses:
        if use.spoilt():
            recorder.unserved.setdefault(use.name, "its layer's input is overwritten")
    return outputs, recorder


Receiver = Callable[[Use, int, Factor], None]
"""Called with a use, the index of a model output and the factor of that output."""


def backward(outputs: Tensor, recorder: Recorder, receive: Receiver) -> None:
    """Run one backward pass per output and deliver the factors.

    Args:
        outputs: ``(n, c)``, from `record`.
        recorder: The recorder, from `record`; empty afterwards.
        receive: Called once per output for every use of a served parameter.
    """
    waiting: set[int] = set()

    def deliver(number: int, k: int, gradient: Tensor | None) -> None:
        # No torch.no_grad needed in a hook: autograd records nothing there.
        waiting.discard(number)
        for use in recorder.watched[number]:
            if use.name not in recorder.unserved:
                recorder.routed = use.routed
                h = use.zero() if gradient is None else gradient
                try:
                    factor = use.factor(h)
                except (NotByExampleError, *FAILURES) as error:
                    recorder.unserved[use.name] = str(error)
                else:
                    receive(use, k, factor)

    c = outputs.shape[1]
    try:
        for k in range(c):
            waiting.update(range(len(recorder.watched)))
            ends = [*recorder.leaves, *recorder.live.values()]
            if outputs.requires_grad and ends:
                recorder.arrived = lambda number, gradient, k=k: deliver(
                    number, k, gradient
                )
                # Examples do not mix: the gradient of the sum has one row per example.
                gradients = torch.autograd.grad(
                    outputs[:, k].sum(), ends, retain_graph=k + 1 < c, allow_unused=True
                )
                reached = gradients[len(recorder.leaves) :]
                recorder.reached |= {
                    name
                    for name, gradient in zip(recorder.live, reached, strict=True)
                    if gradient is not None
                }
            recorder.silent |= {
                use.name for number in waiting for use in recorder.watched[number]
            }
            with torch.no_grad():
                for number in sorted(waiting):
                    deliver(number, k, None)
    finally:
        recorder.release()


def complete(outputs: Tensor, recorder: Recorder) -> dict[str, list[Factor]]:
    """Run one backward pass per output and collect the factors.

    Args:
        outputs: ``(n, c)``, from `record`.
        recorder: The recorder, from `record`; empty afterwards.

    Returns:
        By served parameter, the factor of each use.
    """
    order = list(recorder.uses)
    parts: dict[int, list[Factor]] = {}
    backward(outputs, recorder, lambda u, k, f: parts.setdefault(id(u), []).append(f))
    factors: dict[str, list[Factor]] = {}
    for use in order:
        if id(use) in parts:
            factors.setdefault(use.name, []).append(joined(parts[id(use)]))
    return factors


FAILURES = (RuntimeError, IndexError, TypeError, ValueError)
"""What a rule raises for a call that it was not written for."""

SAME = {"float", "double", "to", "type", "type_as", "contiguous"}
"""Functions whose result has the parameter's shape and derivative one in it."""
LENDS = {"to", "type_as", "expand_as", "view_as", "reshape_as", "new_zeros"}
"""Methods that use only dtype, device or shape of their other arguments."""
VIEWS = {"T", "t", "transpose", "permute", "mT", "__getitem__", "chunk", "split"}
"""Functions that return a part or the transpose of the parameter."""
PICKING = {
    *("nonzero", "argwhere", "masked_select", "sort", "argsort", "msort", "topk"),
    *("unique", "bincount"),
}
"""Functions that reorder or select positions depending on the data."""

OPERATORS = {
    **{"__matmul__": "matmul", "__mul__": "mul", "__rmul__": "mul"},
    **{"multiply": "mul", "__add__": "add", "__radd__": "add", "__sub__": "sub"},
}
"""Functions under the names that the rules use."""


@lru_cache(maxsize=512)
def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return OPERATORS.get(name, name)


def _picks(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call selects positions by data, as the router of a mixture does."""
    if name in PICKING:
        return True
    if name == "where":
        return len(args) == 1
    if name != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype is torch.bool for i in index)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    return []


def _refuse_batch_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if bind("batch_norm", args, kwargs).get("training"):
        raise FunctionError(
            "a BatchNorm layer normalises with the statistics of the batch, so an "
            "example's output depends on the others and has no kernel of its own. Use "
            "running statistics (track_running_stats=True) or GroupNorm."
        )
