"""One forward and c backward passes that leave the factors of every parameter.

A `TorchFunctionMode` sees every call in which a parameter enters, whichever module
makes it: `F.linear` in a layer, `torch.addmm` in transformers' Conv1D, a weight
multiplied in an RMSNorm, a learned token expanded over the batch. Parameters take no
gradients meanwhile, so no weight gradient is ever computed, and no module is hooked or
changed. The outputs of those calls are watched: one backward pass for each of the
model's outputs completes the factors, each as its gradient arrives, so that whoever
receives it can reduce it while it is near the processor and let it go.

A call that no rule knows makes the parameter *unserved*; the definition serves it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntk.factors import Factor, joined
from ntk.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    check_finite,
)
from ntk.rules import RULES, Alias, NotByExampleError, Use, bind


@dataclass
class Recorder(TorchFunctionMode):
    """Records the uses of some parameters in one forward pass.

    Attributes:
        examples: Number of examples in the batch.
        wanted: Parameters to record.
        aliases: By identity, the tensors known to be parameters and what they are.
        uses: What was recorded.
        watched: The uses that each watched output completes.
        leaves: Where the graph of the watched outputs begins.
        arrived: Called with the number of a watched output and its gradient.
        unserved: Parameters no rule served, and why.
        lengths: Position counts seen with the examples on an axis of their own.
        routed: Whether positions have been picked by a condition on data, after which
            a first axis of any length need not be that of the examples.
    """

    examples: int
    wanted: Collection[str]
    aliases: dict[int, tuple[Tensor, Alias]]
    uses: list[Use] = field(default_factory=list)
    watched: list[list[Use]] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    arrived: Callable[[int, Tensor], None] | None = None
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
        found = self._found(args, kwargs)
        if not found:
            return func(*args, **kwargs)
        if name in LENDS and not (args and self.of(args[0])):
            # The parameter lends its dtype or device alone.
            return func(*args, **kwargs)
        plain_sum = name == "add" and not any(
            value.ndim for value in _tensors((args, kwargs)) if not self.of(value)
        )
        if name in SAME or name in VIEWS or plain_sum:
            output = func(*args, **kwargs)
            return self._follow(name, func, args, kwargs, output, found)
        if name == "detach":
            return func(*args, **kwargs)
        return self._use(name, func, args, kwargs, found)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Alias]:
        """Return the parameters among the arguments, fast: every call is looked at."""
        known = self.aliases
        found = [known[id(a)][1] for a in args if id(a) in known]
        found += [known[id(a)][1] for a in kwargs.values() if id(a) in known]
        for value in args:
            if isinstance(value, list | tuple):
                found += [alias for t in _tensors(value) if (alias := self.of(t))]
        return found

    def of(self, value: Any) -> Alias | None:
        """Return what parameter a value is, if any."""
        known = self.aliases.get(id(value))
        return known[1] if known is not None else None

    def by_example(self, value: Tensor) -> Tensor:
        """Give the examples the first axis.

        Args:
            value: ``(n, ...)``, or ``(n t, ...)`` where t positions of each example
                follow each other. With one example, anything.

        Returns:
            ``(n, ...)`` or ``(n, t, ...)``.

        Raises:
            NotByExampleError: If the first axis does not belong to the examples.
        """
        n = self.examples
        if n == 1:
            return value.unsqueeze(0)
        length = value.shape[0] if value.ndim else 0
        if self.routed and value.ndim <= 2:
            raise NotByExampleError("its positions are picked by a condition on data")
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
        found: list[Alias],
    ) -> Any:
        """Remember what the outputs of a view or a cast are of the parameter."""
        if not list(_tensors(output)):
            return output
        alias = found[0]
        if len(found) > 1:
            self._leave(found, f"it meets another parameter in {name}")
        elif name in SAME or name == "add":
            self._remember(output, alias)
        elif name in {"T", "t", "transpose", "permute", "mT"}:
            flipped = len(alias.shape) == 2 and alias.rows is None
            if flipped and tuple(output.shape) == tuple(
                alias.shape if alias.transposed else alias.shape[::-1]
            ):
                turned = Alias(alias.name, alias.shape, not alias.transposed)
                self._remember(output, turned)
            else:
                self._leave(found, f"of {name}")
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
        """Apply an indexing function to the row numbers to see which rows it takes."""
        if alias.transposed or alias.rows is not None:
            self._leave([alias], f"of {_name(func)}")
            return
        device = args[0].device
        numbers = torch.arange(alias.shape[0], device=device)
        try:
            rows = func(numbers, *args[1:], **kwargs)
        except (IndexError, RuntimeError, TypeError):
            self._leave([alias], f"of {_name(func)}")
            return
        outputs = [output] if isinstance(output, Tensor) else list(output)
        pieces = [rows] if isinstance(rows, Tensor) else list(rows)
        for piece, part in zip(outputs, pieces, strict=True):
            if part.ndim != 1 or piece.shape != (len(part), *alias.shape[1:]):
                self._leave([alias], f"of {_name(func)}")
                return
            self._remember(piece, Alias(alias.name, alias.shape, rows=part))

    def _use(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        found: list[Alias],
    ) -> Any:
        rule = RULES.get(name)
        call = bind(name, args, kwargs) if rule is not None else None
        served = {id(value) for value in (call or {}).values() if self.of(value)}
        given = {id(value) for value in _tensors((args, kwargs)) if self.of(value)}
        if rule is None or call is None or served != given:
            output = func(*args, **kwargs)
            if _tensors(output):
                self._leave(found, f"of {name}")
            return output
        output = func(*args, **kwargs)
        if not output.ndim:
            self._leave(found, "its result is a single number")
            return output
        if output.ndim > 2 and len(output) == self.examples:
            self.lengths.add(output.shape[1])
        layout = self._layout(output)
        if not any(alias.name in self.wanted for alias in found):
            return output
        if name == "embedding" and len(output) == 1 and self.examples > 1:
            # Position numbers of shape (1, t) serve all examples; give each its own
            # copy so that their gradients do not add up.
            output = output.expand(self.examples, *output.shape[1:])
        if output.requires_grad and not self.leaves:
            self._leave(found, "it follows a tensor that is trained, but no parameter")
            return output
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()
        elif output._is_view():
            # A change in place gives a view another node, without the hook.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        try:
            uses = [u for u in rule(self, call, output) if u.name in self.wanted]
        except NotByExampleError as error:
            self._leave(found, str(error))
            return output
        for use in uses:
            use.layout, use.routed = layout, self.routed
        self.uses += uses
        self._watch(output, uses)
        return output

    def _watch(self, output: Tensor, uses: list[Use]) -> None:
        """Have the gradient of an output, as it is now, reported to `arrived`."""
        number, recorder = len(self.watched), ref(self)
        self.watched.append(uses)

        # The graph must not keep the recorder, which keeps the inputs of the layers.
        def report(gradient: Tensor) -> None:
            if (alive := recorder()) is not None and alive.arrived is not None:
                alive.arrived(number, gradient)

        if output.requires_grad:
            output.register_hook(report)

    def release(self) -> None:
        """Let go of the graph, which what the uses keep would hold in a circle."""
        self.arrived = None
        self.uses, self.watched, self.leaves = [], [], []

    def layouts(self) -> dict[str, tuple[str, ...]]:
        """Return, by parameter, how the examples lay in the output of each use."""
        found: dict[str, tuple[str, ...]] = {}
        for use in self.uses:
            found[use.name] = (*found.get(use.name, ()), use.layout)
        return found

    def _layout(self, output: Tensor) -> str:
        if len(output) == self.examples:
            return "pooled" if output.ndim <= 2 else "positions"
        return "shared" if len(output) == 1 else "flattened"

    def _remember(self, value: Tensor, alias: Alias) -> None:
        self.aliases[id(value)] = (value, alias)

    def _leave(self, found: Sequence[Alias], why: str) -> None:
        for alias in found:
            self.unserved.setdefault(alias.name, why)


def record(
    function: NetworkFunction, batch: Batch, wanted: Collection[str]
) -> tuple[Tensor, Recorder]:
    """Run the model forward and record the uses of some parameters.

    Args:
        function: The model and its readout.
        batch: The examples.
        wanted: Names of parameters.

    Returns:
        The outputs ``(n, c)`` and the recorder.
    """
    parameters = function.parameters
    recorder = Recorder(
        batch_length(batch),
        set(wanted),
        {id(p): (p, Alias(name, p.shape)) for name, p in parameters.items()},
        lengths={
            t.shape[1]
            for t in _tensors(
                [*batch.values()] if isinstance(batch, Mapping) else batch
            )
            if t.ndim > 1
        },
    )
    # The flags are set before the recorder looks at every call.
    with _frozen(parameters.values()), recorder:
        outputs = function(batch)
    check_finite(function.model, outputs)
    for use in recorder.uses:
        if use.spoilt():
            recorder.unserved.setdefault(use.name, "its layer's input is overwritten")
    return outputs, recorder


Receiver = Callable[[Use, int, Factor], None]
"""Called with a use, the number of an output and the factor of that output."""


def backward(outputs: Tensor, recorder: Recorder, receive: Receiver) -> None:
    """Run one backward pass for each output and hand out the factors.

    The recorder is empty afterwards.

    Args:
        outputs: ``(n, c)`` as `record` returned them.
        recorder: The uses.
        receive: Called once for every use of a served parameter and every output.
    """
    waiting: set[int] = set()

    def deliver(number: int, k: int, gradient: Tensor | None) -> None:
        # In a hook autograd records nothing anyway.
        waiting.discard(number)
        for use in recorder.watched[number]:
            if use.name not in recorder.unserved:
                recorder.routed = use.routed
                h = use.zero() if gradient is None else gradient
                receive(use, k, use.factor(h))

    c = outputs.shape[1]
    try:
        for k in range(c):
            waiting.update(range(len(recorder.watched)))
            if outputs.requires_grad and recorder.leaves:
                recorder.arrived = lambda number, gradient, k=k: deliver(
                    number, k, gradient
                )
                # Examples do not mix, so the sum's gradient is each example's own.
                torch.autograd.grad(
                    outputs[:, k].sum(),
                    recorder.leaves,
                    retain_graph=k + 1 < c,
                    allow_unused=True,
                )
            with torch.no_grad():
                for number in sorted(waiting):
                    deliver(number, k, None)
    finally:
        recorder.release()


def complete(outputs: Tensor, recorder: Recorder) -> dict[str, list[Factor]]:
    """Run one backward pass for each output and collect the factors.

    Args:
        outputs: ``(n, c)`` as `record` returned them.
        recorder: The uses; empty afterwards.

    Returns:
        The factors of every use of every served parameter.
    """
    order = list(recorder.uses)
    parts: dict[int, list[Factor]] = {}
    backward(outputs, recorder, lambda u, k, f: parts.setdefault(id(u), []).append(f))
    factors: dict[str, list[Factor]] = {}
    for use in order:
        if id(use) in parts:
            factors.setdefault(use.name, []).append(joined(parts[id(use)]))
    return factors


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no parameter take a gradient, and give each its flag back."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


SAME = {"float", "double", "to", "type", "type_as", "contiguous"}
"""Functions whose result has slope one in the parameter and its shape."""
LENDS = {"to", "type_as", "expand_as", "view_as", "reshape_as", "new_zeros"}
"""Methods whose other arguments only say what the result looks like."""
VIEWS = {"T", "t", "transpose", "permute", "mT", "__getitem__", "chunk", "split"}
"""Functions whose result is a part or the transpose of the parameter."""
PICKING = {
    *("nonzero", "argwhere", "masked_select", "sort", "argsort", "msort", "topk"),
    *("unique", "bincount"),
}
"""Functions that reorder or pick positions as the data say."""


OPERATORS = {
    **{"__matmul__": "matmul", "__mul__": "mul", "__rmul__": "mul"},
    **{"multiply": "mul", "__add__": "add", "__radd__": "add", "__sub__": "sub"},
}
"""Functions that rules know by another name."""


@lru_cache(maxsize=512)
def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return OPERATORS.get(name, name)


def _picks(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call picks as many entries as the data say (a mixture's router)."""
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
