"""Rules that turn a call with a parameter into factors, one for each function.

A rule takes a call with a parameter among its arguments, and its output, and returns
the `Use`s: how the gradient with respect to that output completes a factor. Parameters
in a call without a rule are served by the definition.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ntk.gradients.factors import Factor, Matrix, Table, Vector


class NotByExampleError(ValueError):
    """A tensor whose entries cannot be assigned to the examples of the batch."""


@dataclass(frozen=True)
class Alias:
    """A tensor that is a parameter, or a view or cast of it.

    Attributes:
        name: The parameter's name.
        shape: The parameter's shape.
        transposed: Whether the tensor is the parameter's transpose.
        rows: Indices of the parameter's rows that the tensor holds; None for all.
    """

    name: str
    shape: torch.Size
    transposed: bool = False
    rows: Tensor | None = None


@dataclass
class Use:
    """One use of a parameter in the computation.

    Attributes:
        name: The parameter's name.
        output: The tensor whose gradient completes the factor; not stored, because its
            hook refers to this object.
        factor: Function from the gradient of one model output to that output's factor.
        inputs: The tensor that the factor keeps of the call, None if none.
        layout: Layout of the examples in the output.
        routed: Whether positions had been selected by a condition on data before.
    """

    name: str
    output: InitVar[Tensor]
    factor: Callable[[Tensor], Factor]
    inputs: Tensor | None = None
    layout: str = ""
    routed: bool = False

    def __post_init__(self, output: Tensor) -> None:
        self.shape, self.dtype, self.device = output.shape, output.dtype, output.device
        self.version = 0 if self.inputs is None else self.inputs._version

    def zero(self) -> Tensor:
        """Return the gradient of an output that does not depend on this use."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def spoilt(self) -> bool:
        """Whether the model has changed `inputs` in place since."""
        return self.inputs is not None and self.inputs._version != self.version


Call = Mapping[str, Any]


class Observer(Protocol):
    """The interface of the recorder that rules use.

    Attributes:
        examples: Number of examples in the batch.
        wanted: Names of the parameters to record.
    """

    examples: int
    wanted: Collection[str]

    def of(self, value: Any) -> Alias | None:
        """Return the parameter that a value is or aliases, None if it is none."""

    def by_example(self, value: Tensor) -> Tensor:
        """Return a tensor with the examples first, or raise `NotByExampleError`."""


Rule = Callable[[Observer, Call, Tensor], list[Use]]


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


def bind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call under the names that its rule uses."""
    bound = dict(zip(ARGUMENTS[name], args, strict=False))
    renamed = OPERANDS if ARGUMENTS[name][0] == "a" else KEYWORDS
    bound.update({renamed.get(key, key): value for key, value in kwargs.items()})
    return bound


def _positions(value: Tensor) -> Tensor:
    """Return ``(n, ..., d)`` as ``(n, t, d)``."""
    if value.ndim == 3:
        return value
    return value.reshape(len(value), -1, value.shape[-1])


def _matrix(observer: Observer, call: Call, output: Tensor, alias: Alias) -> Use:
    if len(alias.shape) != 2:
        raise NotByExampleError(f"it has {len(alias.shape)} dimensions")
    x = _positions(observer.by_example(call["input"].detach()))
    # Output features are the stored weight's first axis in x @ W.T, its last in x @ W.
    output_dim = call["output_dim"] if not alias.transposed else 1 - call["output_dim"]
    if alias.rows is not None and output_dim != 0:
        raise NotByExampleError("only some of its columns are used")

    def factor(gradient: Tensor) -> Matrix:
        # Autocasting gives the output another dtype than the input.
        g = _positions(observer.by_example(gradient)).to(x.dtype)
        return Matrix(x, (g,), output_dim, alias.rows)

    observer.by_example(output.detach())
    return Use(alias.name, output, factor, call["input"].detach())


def _vector(
    observer: Observer,
    alias: Alias,
    output: Tensor,
    factor: Tensor | None = None,
    channel: int | None = None,
) -> Use:
    """Return the use of an added or multiplied parameter: g * factor, summed."""
    length = len(alias.rows) if alias.rows is not None else None
    shape = alias.shape if length is None else torch.Size((length, *alias.shape[1:]))
    if alias.transposed:
        raise NotByExampleError("its transpose is added or multiplied")
    if observer.examples > 1 and len(shape) == output.ndim and shape[0] != 1:
        raise NotByExampleError("it has the shape of a batch")
    whole_shape = output.shape
    ndim = observer.by_example(output.detach()).ndim
    padded = (1,) * (ndim - len(shape)) + tuple(shape)
    axes = [i for i in range(1, ndim) if padded[i] == 1]

    def reduced(gradient: Tensor, *, magnitudes: bool = False) -> Tensor:
        product = gradient if factor is None else gradient * factor
        product = product.abs() if magnitudes else product
        if product.shape != whole_shape:
            product = product.expand(whole_shape)
        product = observer.by_example(product)
        if channel is not None:
            product = product.movedim(channel + (observer.examples == 1), -1)
        total = product.sum(dim=axes) if axes else product
        if total.ndim != 2:
            total = total.reshape(len(total), -1)
        if alias.rows is None:
            return total
        whole = total.new_zeros(
            len(total), alias.shape[0], total.shape[1] // len(alias.rows)
        )
        whole.index_add_(1, alias.rows, total.view(len(total), len(alias.rows), -1))
        return whole.flatten(1)

    kept = factor if factor is not None and factor.ndim else None
    sizes = lambda h: reduced(h, magnitudes=True)[None]
    return Use(
        alias.name,
        output,
        lambda h: Vector(reduced(h)[None], lambda: sizes(h)),
        kept,
    )


def _wanted(observer: Observer, value: Any) -> Alias | None:
    """Return the wanted parameter that a value is or aliases, None if it is none."""
    alias = observer.of(value)
    return alias if alias is not None and alias.name in observer.wanted else None


def _linear(observer: Observer, call: Call, output: Tensor) -> list[Use]:
    uses = []
    if observer.of(call["input"]):
        raise NotByExampleError("it is the input of a layer")
    if alias := _wanted(observer, call["weight"]):
        uses.append(_matrix(observer, {**call, "output_dim": 0}, output, alias))
    if alias := _wanted(observer, call.get("bias")):
        uses.append(_vector(observer, alias, output))
    return uses


def _matmul(observer: Observer, call: Call, output: Tensor) -> list[Use]:
    uses = []
    alias = observer.of(call["weight"])
    if alias is None or observer.of(call["input"]) or call.keys() & {"alpha", "beta"}:
        raise NotByExampleError("it is the left side of a product")
    if alias.name in observer.wanted:
        uses.append(_matrix(observer, {**call, "output_dim": 1}, output, alias))
    if alias := _wanted(observer, call.get("bias")):
        uses.append(_vector(observer, alias, output))
    return uses


def _embedding(observer: Observer, call: Call, output: Tensor) -> list[Use]:
    alias = observer.of(call["weight"])
    unusual = [call.get(k) for k in ("max_norm", "scale_grad_by_freq", "sparse")]
    if alias is None or alias.transposed or alias.rows is not None or any(unusual):
        raise NotByExampleError("it is an embedding with max_norm, sparse or scaled")
    tokens = call["input"]
    if not tokens.ndim:
        raise NotByExampleError("one token is looked up for all examples")
    if observer.examples > 1 and len(tokens) == 1:
        tokens = tokens.expand(observer.examples, *tokens.shape[1:])
    tokens = observer.by_example(tokens).flatten(1)
    padding = call.get("padding_idx")
    if padding is not None and padding < 0:
        padding += alias.shape[0]

    def factor(gradient: Tensor) -> Table:
        g = _positions(observer.by_example(gradient))
        if padding is not None:
            # Autograd gives the padding row a zero gradient.
            g = g.masked_fill((tokens == padding)[..., None], 0)
        return Table(tokens, (g,))

    observer.by_example(output.detach())
    return [Use(alias.name, output, factor, tokens)]


def _normalised(
    normalise: Callable[[Call], Tensor], channel: int | None = None
) -> Rule:
    """Return the rule of a normalisation with a scale and a bias."""

    def rule(observer: Observer, call: Call, output: Tensor) -> list[Use]:
        if observer.of(call["input"]):
            raise NotByExampleError("it is the input of a normalisation")
        uses = []
        weight, bias = call.get("weight"), call.get("bias")
        if alias := _wanted(observer, weight):
            with torch.no_grad():
                normal = normalise({**call, "input": call["input"].detach()})
            uses.append(_vector(observer, alias, output, normal, channel))
        if alias := _wanted(observer, bias):
            uses.append(_vector(observer, alias, output, None, channel))
        return uses

    return rule


def _elementwise(name: str) -> Rule:
    """Return the rule of an operation with a tensor that is no parameter."""

    def rule(observer: Observer, call: Call, output: Tensor) -> list[Use]:
        a, b = call["a"], call["b"]
        alias = observer.of(a) or observer.of(b)
        other = b if observer.of(a) else a
        plain = isinstance(other, Tensor) and call.keys() == {"a", "b"}
        if alias is None or observer.of(other) or not plain:
            raise NotByExampleError("it meets a number or another parameter")
        derivative = other.detach() if name == "mul" else None
        if name == "sub" and observer.of(b):
            derivative = output.new_tensor(-1.0)
        return [_vector(observer, alias, output, derivative)]

    return rule


def _expand(observer: Observer, call: Call, output: Tensor) -> list[Use]:
    alias = observer.of(call["a"])
    assert alias is not None
    return [_vector(observer, alias, output)]


def _conv(observer: Observer, call: Call, output: Tensor) -> list[Use]:
    uses = []
    if observer.of(call["input"]) or call.get("groups", 1) != 1:
        raise NotByExampleError("it is a grouped convolution or the input of one")
    if alias := observer.of(call["weight"]):
        if alias.transposed or alias.rows is not None:
            raise NotByExampleError("only a part of the filter is used")
        x = _positions(observer.by_example(_patches(call)))

        def factor(gradient: Tensor) -> Matrix:
            g = observer.by_example(gradient.flatten(2).transpose(1, 2))
            return Matrix(x, (_positions(g),))

        observer.by_example(output.detach())
        uses.append(Use(alias.name, output, factor))
    if alias := _wanted(observer, call.get("bias")):
        uses.append(_vector(observer, alias, output, None, channel=1))
    return uses


def _patches(call: Call) -> Tensor:
    """Return the input patches under the filter, ``(n, t, channels * filter)``."""
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
        # F.unfold needs images: treat a sequence as one of height one.
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
