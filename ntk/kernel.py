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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from ntk.contraction import Contraction
from ntk.engine import LEFT_BYTES, Engine, KernelResult
from ntk.function import (
    Batch,
    Inputs,
    NetworkFunction,
    Readout,
    batch_length,
    check_model,
    evaluating,
    logits,
    to_batches,
)
from ntk.maps import Maps, Sketch
from ntk.precision import Precision, check_precision
from ntk.processes import Processes
from ntk.resolution import resolve
from ntk.sharding import ShardedEngine
from ntk.spaces import Full, Space
from ntk.spilling import Spilled, SpillingEngine
from rocoft.console import Progress

Reduction = Literal["full", "trace", "margin"]
Kind = Literal["sgd", "signgd", "asymmetric_signgd"]
Implementation = Literal["factors", "jacobian", "jvp"]


def _sign(gradient: Tensor) -> Tensor:
    """Return the sign; of no number it is no number, where torch's is 0."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


KINDS: dict[str, tuple[Callable[[Tensor], Tensor] | None, ...]] = {
    "sgd": (None, None),
    "signgd": (_sign, _sign),
    "asymmetric_signgd": (None, _sign),
}
REDUCTIONS = ("full", "trace", "margin")
IMPLEMENTATIONS = {
    "factors": "one forward and c backward passes a batch; time and memory of those",
    "jacobian": "torch.func: vmap of jacrev; memory n c p",
    "jvp": "torch.func: a vjp, then jvps; time n m c, memory of one gradient",
}


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
    precision: Precision = "float32",
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
    precision: Precision = "float32",
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
    precision: Precision = "float32",
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
        precision: Of the products that contract float32 gradients: ``"float32"``,
            ``"tf32"`` (GPUs), ``"bf16"`` or ``"bf16x3"``, see `ntk.precision`. The
            model itself is evaluated as it is.

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
        precision=precision,
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
    precision: Precision = "float32",
    left_bytes: int = LEFT_BYTES,
    processes: Processes | None = None,
    spilled: Spilled | None = None,
    sample: Batch | None = None,
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
        precision: As in `empirical_ntk`.
        left_bytes: What features and factors of left examples may take at a time,
            besides those of the right ones, which all stay.
        processes: Those that call this with the same arguments and share the work; all
            get the whole kernels. None means that this one is alone.
        spilled: A file that what passes leave is read from, and that is filled by
            them if it has not been; of one process and ``"factors"``. None means that
            it is kept in memory.
        sample: Examples by which it is found out how parameters are served; None means
            the first batch of several.
        progress: Called as the work goes on.

    Returns:
        The kernels and their provenance.

    Raises:
        ValueError: If an argument has a value that is not one of its choices.
    """
    _check_choices(spaces, reduce, kind, implementation)
    check_model(model)
    device = next(model.parameters()).device
    maps = resolve(spaces, model)
    if kind != "sgd" and any(_is_sketched(each) for each in maps.values()):
        raise ValueError(
            f"kind={kind!r} needs every gradient entry's sign, which a sketch does not "
            "keep. Use kind='sgd', or the space itself."
        )
    left = to_batches(inputs, device, batch_size)
    if other is None:
        right = left
    elif isinstance(other, int):
        right = left[: len(to_batches(_first(inputs, other), device, batch_size))]
    else:
        right = to_batches(other, device, batch_size)
    function = NetworkFunction(model, reader(outputs, reduce))
    before, after = KINDS[kind]
    check_precision(precision, next(model.parameters()))
    if precision != "float32" and implementation == "jvp":
        raise ValueError(
            f"precision={precision!r} is for products of gradients, which "
            "implementation='jvp' never forms. Use 'factors' or 'jacobian'."
        )
    how = Contraction(before, after, reduce == "full", precision)
    if processes is not None and implementation == "jvp":
        raise ValueError(
            "implementation='jvp' is not shared among processes. Use 'factors' or "
            "'jacobian', or one process."
        )
    with evaluating(model):
        if sample is not None:
            (sample,) = to_batches(sample, device)
        what = (function, left, right, maps, how, progress, left_bytes, sample)
        if processes is not None:
            engine: Engine = ShardedEngine(processes, *what)
        elif spilled is not None:
            engine = SpillingEngine(spilled, *what)
        else:
            engine = Engine(*what)
        if implementation == "jvp":
            result = engine.run_products()
        else:
            result = engine.run(by_factors=implementation == "factors")
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


def _check_choices(
    spaces: Mapping[str, Space], reduce: str, kind: str, implementation: str
) -> None:
    for argument, value, choices in (
        ("reduce", reduce, REDUCTIONS),
        ("kind", kind, tuple(KINDS)),
        ("implementation", implementation, tuple(IMPLEMENTATIONS)),
    ):
        if value not in choices:
            raise ValueError(
                f"{argument}={value!r} must be one of {', '.join(choices)}."
            )
    if not spaces:
        raise ValueError("space={} names no tangent space. Pass at least one.")
    if implementation == "jvp" and kind == "signgd":
        raise ValueError(
            "kind='signgd' needs every gradient itself, which implementation='jvp' "
            "never forms. Use 'factors' or 'jacobian'."
        )


def _is_sketched(maps: Maps) -> bool:
    return any(
        isinstance(each, Sketch) for several in maps.values() for each in several
    )


def _first(inputs: Inputs, count: int) -> Inputs:
    if isinstance(inputs, Mapping | Tensor) or not 1 <= count <= len(inputs):
        raise ValueError(
            f"other={count} needs inputs as a list of at least as many batches, and at "
            "least 1."
        )
    return inputs[:count]


def reader(outputs: Readout | None, reduce: str) -> Readout | None:
    """Return the readout whose kernel, summed over outputs, is the reduced one.

    Args:
        outputs: The readout of all outputs; None means the default one.
        reduce: As in `empirical_ntk`.
    """
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
