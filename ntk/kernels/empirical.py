"""Empirical neural tangent kernels of any tangent space.

The axes of a kernel and its reductions are described in `ntk.measures.gram`.

A kernel is a sum over parameters. Each (parameter, map) pair is contracted once and
added in float64 to every space that holds it, so many spaces cost little more than one.
"""

from collections.abc import Callable, Mapping
from typing import overload

import torch
from torch import Tensor, nn

from ntk.gradients import (
    Batch,
    ContrastReadout,
    Inputs,
    MarginReadout,
    NetworkFunction,
    Readout,
    autograd_rows,
    batch_length,
    check_model,
    evaluating,
    jacobian,
    to_batches,
)
from ntk.kernels.contraction import Contraction, Transform
from ntk.kernels.engine import LEFT_BYTES, Engine, EngineInput, KernelResult
from ntk.kernels.magnitude import check_magnitude
from ntk.kernels.options import (
    Implementation,
    KernelOptions,
    Kind,
    Precision,
)
from ntk.kernels.precision import check_precision
from ntk.measures import Reduction
from ntk.spaces import Full, Maps, Sketch, Space, resolve
from rocoft.commands import Progress


def _sign(gradient: Tensor) -> Tensor:
    """Return the sign; NaN stays NaN, where torch's sign returns 0."""
    return torch.where(gradient.isnan(), gradient, gradient.sign())


TRANSFORMS: dict[Kind, tuple[Transform | None, Transform | None]] = {
    "sgd": (None, None),
    "signgd": (_sign, _sign),
    "asymmetric_signgd": (None, _sign),
}
"""Transforms of the left and the right gradient for each kind of kernel."""


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
    to the coordinates of the tangent space at the model's current weights.

    Args:
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples: a tokenizer's output (a mapping of tensors), a tensor, or a
            list of such batches.
        other: m examples; None means ``inputs``.
        space: A tangent space, or several by name, all computed in one pass; None means
            `Full()`.
        outputs: Maps the model's output to ``(n, c)``; None takes its `.logits`, or
            the tensor itself.
        reduce: ``"full"``, ``"trace"``, ``"margin"``, ``"contrast"`` (what a
            classifier's softmax sees) or ``"contrast_trace"``, see `ntk.measures.gram`.
        kind: ``"sgd"`` <g, g'>, ``"signgd"`` <sign g, sign g'> or
            ``"asymmetric_signgd"`` <g, sign g'> (Malladi et al. 2023, section 3).
        implementation: ``"factors"``, ``"autograd"`` (the definition), ``"jacobian"``
            or ``"jvp"``: the same kernel at different costs, see `KernelOptions`.
        batch_size: Largest number of examples in one pass; None keeps batches as given.
        precision: Precision of the products that contract float32 gradients:
            ``"float32"``, ``"tf32"`` (GPUs), ``"bf16"`` or ``"bf16x3"``, see
            `ntk.kernels.precision`. The model is evaluated in its own dtype.

    Returns:
        ``(n, m, c, d)``, or ``(n, m)`` if reduced, in float64 on the model's device;
        for a mapping of spaces, a dictionary of kernels.

    Raises:
        ValueError: If an argument has a value that is not listed above.
    """
    options = KernelOptions(
        kind, reduce, precision, implementation, outputs, batch_size
    )
    named = space if isinstance(space, Mapping) else {"": space or Full()}
    result = compute(model, inputs, other, spaces=named, options=options)
    if isinstance(space, Mapping):
        return result.kernels
    return result.kernels[""]


@torch.inference_mode(False)  # Tensors made in that mode have no gradients.
def compute(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | int | None = None,
    *,
    spaces: Mapping[str, Space],
    options: KernelOptions = KernelOptions(),
    engine: Callable[[EngineInput], Engine] = Engine,
    left_bytes: int = LEFT_BYTES,
    sample: Batch | None = None,
    progress: Progress | None = None,
) -> KernelResult:
    """Compute the kernels of several spaces, see `empirical_ntk`.

    Args:
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples.
        other: m examples; None means ``inputs``. A number k means the first k batches
            of ``inputs`` (a list), which are then not run twice.
        spaces: Tangent spaces by name.
        options: How kernels are computed.
        engine: Constructor of the engine that computes them.
        left_bytes: Memory for the features and factors of a group of left examples, in
            bytes; those of the right ones stay in memory besides.
        sample: Examples on which it is determined how parameters are served; None means
            the first batch of at least two.
        progress: Called as the work goes on.

    Returns:
        The kernels, with traces, sizes and services.

    Raises:
        ValueError: If no space is given, or the spaces or the model do not fit the
            options.
    """
    if not spaces:
        raise ValueError("space={} names no tangent space. Pass at least one.")
    check_model(model)
    first = next(model.parameters())
    check_precision(options.precision, first)
    maps = resolve(spaces, model)
    if options.kind != "sgd" and any(map(_is_sketched, maps.values())):
        raise ValueError(
            f"kind={options.kind!r} needs every gradient entry's sign, which a sketch "
            "does not keep. Use kind='sgd', or the space itself."
        )
    left = to_batches(inputs, first.device, options.batch_size)
    if other is None:
        right = left
    elif isinstance(other, int):
        shared = to_batches(_first(inputs, other), first.device, options.batch_size)
        right = left[: len(shared)]
    else:
        right = to_batches(other, first.device, options.batch_size)
    if sample is not None:
        (sample,) = to_batches(sample, first.device)
    contraction = Contraction(
        *TRANSFORMS[options.kind], options.coupled, options.precision
    )
    by_torch_func = options.implementation == "jacobian"
    function = NetworkFunction(model, reader(options))
    with evaluating(model):
        prepared = engine(
            EngineInput(
                function=function,
                left=left,
                right=right,
                maps=maps,
                contraction=contraction,
                left_bytes=left_bytes,
                sample=sample,
                progress=progress,
                rows=jacobian if by_torch_func else autograd_rows,
            )
        )
        if options.implementation == "jvp":
            result = prepared.run_products()
        else:
            result = prepared.run(by_factors=options.implementation == "factors")
        check_magnitude(result.kernels, maps, function, left)
    if options.coupled:
        n, m = (sum(map(batch_length, side)) for side in (left, right))
        result.kernels = {
            name: _example_major(k, n, m) for name, k in result.kernels.items()
        }
    return result


def _example_major(gram: Tensor, n: int, m: int) -> Tensor:
    """Return the kernel ``(n, m, c, d)`` of an output-major Gram ``(c n, d m)``."""
    c, d = gram.shape[0] // n, gram.shape[1] // m
    return gram.view(c, n, d, m).permute(1, 3, 0, 2).contiguous()


def _is_sketched(maps: Maps) -> bool:
    return any(isinstance(map_, Sketch) for held in maps.values() for map_ in held)


def _first(inputs: Inputs, count: int) -> Inputs:
    if isinstance(inputs, Mapping | Tensor) or not 1 <= count <= len(inputs):
        raise ValueError(
            f"other={count} needs inputs as a list of at least as many batches, and at "
            "least 1."
        )
    return inputs[:count]


def reader(options: KernelOptions) -> Readout | None:
    """Return the readout whose kernel, coupled or summed, is the reduced kernel.

    The contrasts of c outputs are c - 1 functions, so that one backward pass less is
    made. The basis of contrasts is arbitrary, and signs of gradients depend on it for
    more than two outputs. Kernels of signs therefore take the signs of the gradients
    of the c outputs less their mean, which treats all classes alike; for two outputs,
    of the one contrast, that is of the margin, as Malladi et al. (2023) do.

    Args:
        options: The options of the kernel.

    Returns:
        The readout; None means the default.
    """
    if options.reduce == "margin":
        return MarginReadout(options.outputs)
    if options.reduce in {"contrast", "contrast_trace"}:
        return ContrastReadout(options.outputs, centred=options.kind != "sgd")
    return options.outputs
