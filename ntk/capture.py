"""One forward and c backward passes that leave the factors of every parameter.

A `TorchFunctionMode` sees every call in which a parameter enters, whichever module
makes it: `F.linear` in a layer, `torch.addmm` in transformers' Conv1D, a weight
multiplied in an RMSNorm, a learned token expanded over the batch. The call is made
with the parameter detached, so no weight gradient is ever computed and nothing in the
model is hooked or changed, and its output is remembered. Gradients with respect to
those outputs, one backward pass for each of the model's outputs, complete the factors.

A call that no rule knows makes the parameter *unserved*; the definition serves it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from ntk.factors import Factor, Matrix, Table, Vector
from ntk.function import (
    Batch,
    FunctionError,
    NetworkFunction,
    batch_length,
    check_finite,
)


class NotByExampleError(ValueError):
    """A tensor whose entries cannot be assigned to the examples of the batch."""


@dataclass(frozen=True)
class Alias:
    """A tensor that is a parameter, seen through operations of slope one.

    Attributes:
        name: The parameter.
        shape: Its shape.
        transposed: Whether the tensor is its transpose.
        rows: If it holds only some rows of the parameter, which.
    """

    name: str
    shape: torch.Size
    transposed: bool = False
    rows: Tensor | None = None


@dataclass
class Use:
    """One entry of a parameter into the computation.

    Attributes:
        name: The parameter.
        output: The tensor whose gradients complete the factor.
        factor: From those gradients, one for each output of the model, to the factor.
        inputs: What the factor keeps of the call; None if nothing.
        layout: How the examples lie in the output.
    """

    name: str
    output: Tensor
    factor: Callable[[Sequence[Tensor]], Factor]
    inputs: Tensor | None = None
    layout: str = ""

    def __post_init__(self) -> None:
        # The gradient before any later change in place, as the parameter had it.
        self.edge = get_gradient_edge(self.output)
        self.shape, self.dtype = self.output.shape, self.output.dtype
        self.device = self.output.device
        self.version = 0 if self.inputs is None else self.inputs._version

    def zero(self) -> Tensor:
        """Return the gradient of an output that does not depend on this use."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def spoilt(self) -> bool:
        """Whether the model has changed in place what the factor keeps."""
        return self.inputs is not None and self.inputs._version != self.version


Call = Mapping[str, Any]
Rule = Callable[["Recorder", Call, Tensor], list[Use]]


@dataclass
class Recorder(TorchFunctionMode):
    """Records the uses of some parameters in one forward pass.

    Attributes:
        examples: Number of examples in the batch.
        wanted: Parameters to record.
        aliases: By identity, the tensors known to be parameters and what they are.
        uses: What was recorded.
        unserved: Parameters no rule served, and why.
        lengths: Position counts seen with the examples on an axis of their own.
        routed: Whether positions have been picked by a condition on data, after which
            a first axis of any length need not be that of the examples.
    """

    examples: int
    wanted: Collection[str]
    aliases: dict[int, tuple[Tensor, Alias]]
    uses: list[Use] = field(default_factory=list)
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
        found = [
            alias for value in _tensors((args, kwargs)) if (alias := self.of(value))
        ]
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
        length = len(value) if value.ndim else 0
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
        call = _bind(name, args, kwargs) if rule is not None else None
        served = {id(value) for value in (call or {}).values() if self.of(value)}
        given = {id(value) for value in _tensors((args, kwargs)) if self.of(value)}
        if rule is None or call is None or served != given:
            output = func(*args, **kwargs)
            if _tensors(output):
                self._leave(found, f"of {name}")
            return output
        output = func(*_detached(args, self), **_detached(kwargs, self))
        if output.ndim > 2 and len(output) == self.examples:
            self.lengths.add(output.shape[1])
        layout = self._layout(output)
        if not any(alias.name in self.wanted for alias in found):
            return output
        if name == "embedding" and len(output) == 1 and self.examples > 1:
            # Position numbers of shape (1, t) serve all examples; give each its own
            # copy so that their gradients do not add up.
            output = output.expand(self.examples, *output.shape[1:])
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            output = leaf.clone()
        try:
            for use in rule(self, call, output):
                if use.name in self.wanted:
                    use.layout = layout
                    self.uses.append(use)
        except NotByExampleError as error:
            self._leave(found, str(error))
        return output

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
    with recorder:
        outputs = function(batch)
    check_finite(function.model, outputs)
    return outputs, recorder


def complete(outputs: Tensor, recorder: Recorder) -> dict[str, list[Factor]]:
    """Run one backward pass for each output and complete the factors.

    Args:
        outputs: ``(n, c)`` as `record` returned them.
        recorder: The uses.

    Returns:
        The factors of every use of every served parameter.
    """
    for use in recorder.uses:
        if use.spoilt():
            recorder.unserved.setdefault(use.name, "its layer's input is overwritten")
    uses = [u for u in recorder.uses if u.name not in recorder.unserved]
    edges = list({u.edge: None for u in uses})
    if not edges:
        return {}
    gradients: list[tuple[Tensor | None, ...]] = []
    c = outputs.shape[1]
    for k in range(c):
        # Examples do not mix, so the sum's gradient is each example's own.
        gradients.append(
            torch.autograd.grad(
                outputs[:, k].sum(), edges, retain_graph=k + 1 < c, allow_unused=True
            )
        )
    place = {edge: i for i, edge in enumerate(edges)}
    factors: dict[str, list[Factor]] = {}
    with torch.no_grad():
        for use in uses:
            own = [several[place[use.edge]] for several in gradients]
            factor = use.factor([use.zero() if g is None else g for g in own])
            factors.setdefault(use.name, []).append(factor)
    return factors


SAME = {"float", "double", "to", "type", "type_as", "contiguous"}
"""Functions whose result has slope one in the parameter and its shape."""
LENDS = {"to", "type_as", "expand_as", "view_as", "reshape_as", "new_zeros"}
"""Methods whose other arguments only say what the result looks like."""
VIEWS = {"T", "t", "transpose", "permute", "mT", "__getitem__", "chunk", "split"}
"""Functions whose result is a part or the transpose of the parameter."""
ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "matmul": ("input", "weight"),
    "embedding": (
        *("input", "weight", "padding_idx", "max_norm", "norm_type"),
        *("scale_grad_by_freq", "sparse"),
    ),
    "layer_norm": ("input", "shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "shape", "weight", "eps"),
    "group_norm": ("input", "groups", "weight", "bias", "eps"),
    "batch_norm": (
        *("input", "mean", "variance", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "mul": ("a", "b"),
    "add": ("a", "b"),
    "sub": ("a", "b"),
    "expand": ("a",),
}
KEYWORDS = {"normalized_shape": "shape", "num_groups": "groups"}
OPERANDS = {"input": "a", "other": "b"}


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    plain = {
        "__matmul__": "matmul",
        "__mul__": "mul",
        "__rmul__": "mul",
        "multiply": "mul",
    }
    return {**plain, "__add__": "add", "__radd__": "add", "__sub__": "sub"}.get(
        name, name
    )


def _bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = dict(zip(ARGUMENTS[name], args, strict=False))
    renamed = OPERANDS if ARGUMENTS[name][0] == "a" else KEYWORDS
    bound.update({renamed.get(key, key): value for key, value in kwargs.items()})
    return bound


def _picks(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call picks as many entries as the data say (a mixture's router)."""
    if name in {"nonzero", "argwhere", "masked_select"}:
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


def _detached(value: Any, recorder: Recorder) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if recorder.of(value) else value
    if isinstance(value, tuple | list):
        return type(value)(_detached(item, recorder) for item in value)
    if isinstance(value, dict):
        return {key: _detached(item, recorder) for key, item in value.items()}
    return value


def _refuse_batch_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _bind("batch_norm", args, kwargs).get("training"):
        raise FunctionError(
            "a BatchNorm layer normalises with the statistics of the batch, so an "
            "example's output depends on the others and has no kernel of its own. Use "
            "running statistics (track_running_stats=True) or GroupNorm."
        )


def _positions(value: Tensor) -> Tensor:
    """Return ``(n, ..., d)`` as ``(n, t, d)``."""
    return value.reshape(len(value), -1, value.shape[-1])


def _matrix(recorder: Recorder, call: Call, output: Tensor, alias: Alias) -> Use:
    if len(alias.shape) != 2:
        raise NotByExampleError(f"it has {len(alias.shape)} dimensions")
    x = _positions(recorder.by_example(call["input"].detach()))
    # The stored weight holds the output features first in x @ W.T and last in x @ W.
    output_dim = call["output_dim"] if not alias.transposed else 1 - call["output_dim"]
    if alias.rows is not None and output_dim != 0:
        raise NotByExampleError("only some of its columns are used")

    def factor(gradients: Sequence[Tensor]) -> Matrix:
        g = tuple(_positions(recorder.by_example(h)) for h in gradients)
        return Matrix(x, g, output_dim, alias.rows)

    recorder.by_example(output.detach())
    return Use(alias.name, output, factor, call["input"].detach())


def _vector(
    recorder: Recorder,
    alias: Alias,
    output: Tensor,
    factor: Tensor | None = None,
    channel: int | None = None,
) -> Use:
    """Sum g * factor over all positions, down to the parameter's own shape."""
    length = len(alias.rows) if alias.rows is not None else None
    shape = alias.shape if length is None else torch.Size((length, *alias.shape[1:]))
    if alias.transposed:
        raise NotByExampleError("its transpose is added or multiplied")
    if recorder.examples > 1 and len(shape) == output.ndim and shape[0] != 1:
        raise NotByExampleError("it has the shape of a batch")
    recorder.by_example(output.detach())

    def reduced(gradient: Tensor) -> Tensor:
        product = gradient if factor is None else gradient * factor
        product = recorder.by_example(product.expand(output.shape))
        if channel is not None:
            product = product.movedim(channel + (recorder.examples == 1), -1)
        padded = (1,) * (product.ndim - len(shape)) + tuple(shape)
        axes = [i for i in range(1, product.ndim) if padded[i] == 1]
        total = (product.sum(dim=axes) if axes else product).reshape(len(product), -1)
        if alias.rows is None:
            return total
        whole = total.new_zeros(
            len(total), alias.shape[0], total.shape[1] // len(alias.rows)
        )
        whole.index_add_(1, alias.rows, total.view(len(total), len(alias.rows), -1))
        return whole.flatten(1)

    def complete_vector(gradients: Sequence[Tensor]) -> Vector:
        return Vector(torch.stack([reduced(h) for h in gradients]))

    kept = factor if factor is not None and factor.ndim else None
    return Use(alias.name, output, complete_vector, kept)


def _linear(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
    uses = []
    if recorder.of(call["input"]):
        raise NotByExampleError("it is the input of a layer")
    if alias := recorder.of(call["weight"]):
        uses.append(_matrix(recorder, {**call, "output_dim": 0}, output, alias))
    if alias := recorder.of(call.get("bias")):
        uses.append(_vector(recorder, alias, output))
    return uses


def _matmul(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
    uses = []
    alias = recorder.of(call["weight"])
    if alias is None or recorder.of(call["input"]) or call.keys() & {"alpha", "beta"}:
        raise NotByExampleError("it is the left side of a product")
    uses.append(_matrix(recorder, {**call, "output_dim": 1}, output, alias))
    if alias := recorder.of(call.get("bias")):
        uses.append(_vector(recorder, alias, output))
    return uses


def _embedding(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
    alias = recorder.of(call["weight"])
    unusual = [call.get(k) for k in ("max_norm", "scale_grad_by_freq", "sparse")]
    if alias is None or alias.transposed or alias.rows is not None or any(unusual):
        raise NotByExampleError("it is an embedding with max_norm, sparse or scaled")
    tokens = call["input"]
    if recorder.examples > 1 and len(tokens) == 1:
        tokens = tokens.expand(recorder.examples, *tokens.shape[1:])
    tokens = recorder.by_example(tokens).flatten(1)
    padding = call.get("padding_idx")
    if padding is not None and padding < 0:
        padding += alias.shape[0]

    def factor(gradients: Sequence[Tensor]) -> Table:
        g = [_positions(recorder.by_example(h)) for h in gradients]
        if padding is not None:
            # Autograd gives the padding row no gradient.
            g = [h.masked_fill((tokens == padding)[..., None], 0) for h in g]
        return Table(tokens, tuple(g))

    recorder.by_example(output.detach())
    return [Use(alias.name, output, factor, tokens)]


def _normalised(
    normalise: Callable[[Call], Tensor], channel: int | None = None
) -> Rule:
    """Return the rule of a normalisation with a scale and a bias."""

    def rule(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
        if recorder.of(call["input"]):
            raise NotByExampleError("it is the input of a normalisation")
        uses = []
        weight, bias = call.get("weight"), call.get("bias")
        if (alias := recorder.of(weight)) and alias.name in recorder.wanted:
            with torch.no_grad():
                normal = normalise({**call, "input": call["input"].detach()})
            uses.append(_vector(recorder, alias, output, normal, channel))
        if alias := recorder.of(bias):
            uses.append(_vector(recorder, alias, output, None, channel))
        return uses

    return rule


def _elementwise(name: str) -> Rule:
    """Return the rule of an operation with a tensor that is no parameter."""

    def rule(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
        a, b = call["a"], call["b"]
        alias = recorder.of(a) or recorder.of(b)
        other = b if recorder.of(a) else a
        plain = isinstance(other, Tensor) and call.keys() == {"a", "b"}
        if alias is None or recorder.of(other) or not plain:
            raise NotByExampleError("it meets a number or another parameter")
        slope = other.detach() if name == "mul" else None
        if name == "sub" and recorder.of(b):
            slope = output.new_tensor(-1.0)
        return [_vector(recorder, alias, output, slope)]

    return rule


def _expand(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
    alias = recorder.of(call["a"])
    assert alias is not None
    return [_vector(recorder, alias, output)]


def _conv(recorder: Recorder, call: Call, output: Tensor) -> list[Use]:
    uses = []
    if recorder.of(call["input"]) or call.get("groups", 1) != 1:
        raise NotByExampleError("it is a grouped convolution or the input of one")
    if alias := recorder.of(call["weight"]):
        if alias.transposed or alias.rows is not None:
            raise NotByExampleError("only a part of the filter is used")
        x = _positions(recorder.by_example(_patches(call)))

        def factor(gradients: Sequence[Tensor]) -> Matrix:
            g = tuple(
                recorder.by_example(h.flatten(2).transpose(1, 2)) for h in gradients
            )
            return Matrix(x, tuple(_positions(h) for h in g))

        recorder.by_example(output.detach())
        uses.append(Use(alias.name, output, factor))
    if alias := recorder.of(call.get("bias")):
        uses.append(_vector(recorder, alias, output, None, channel=1))
    return uses


def _patches(call: Call) -> Tensor:
    """Return the inputs under the filter, ``(n, t, channels * filter)``."""
    x, weight = call["input"].detach(), call["weight"]
    size = tuple(weight.shape[2:])
    options = {key: call.get(key, 0 if key == "padding" else 1) for key in _UNFOLD}
    if isinstance(options["padding"], str):
        raise NotByExampleError(
            f"it is a convolution with padding={options['padding']}"
        )
    pairs = {
        key: (value,) * len(size) if isinstance(value, int) else tuple(value)
        for key, value in options.items()
    }
    if len(size) == 1:
        # A sequence is an image of height one.
        x, size = x.unsqueeze(2), (1, *size)
        pairs = {k: ((0 if k == "padding" else 1), *v) for k, v in pairs.items()}
    return F.unfold(x, size, **pairs).transpose(1, 2)


_UNFOLD = ("stride", "padding", "dilation")

RULES: dict[str, Rule] = {
    "linear": _linear,
    "addmm": _matmul,
    "matmul": _matmul,
    "embedding": _embedding,
    "layer_norm": _normalised(
        lambda c: F.layer_norm(c["input"], c["shape"], None, None, c.get("eps", 1e-5))
    ),
    "rms_norm": _normalised(
        lambda c: F.rms_norm(c["input"], c["shape"], None, c.get("eps"))
    ),
    "group_norm": _normalised(
        lambda c: F.group_norm(c["input"], c["groups"], None, None, c.get("eps", 1e-5)),
        channel=1,
    ),
    "batch_norm": _normalised(
        lambda c: F.batch_norm(
            c["input"],
            c["mean"],
            c["variance"],
            None,
            None,
            False,
            0.0,
            c.get("eps", 1e-5),
        ),
        channel=1,
    ),
    "conv1d": _conv,
    "conv2d": _conv,
    "mul": _elementwise("mul"),
    "add": _elementwise("add"),
    "sub": _elementwise("sub"),
    "expand": _expand,
}
