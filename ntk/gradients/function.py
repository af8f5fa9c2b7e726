"""The function whose tangent kernel is computed: a module, its inputs and its readout.

A batch is a mapping (the module's keyword arguments) or a tensor (its one positional
argument). Every tensor of a batch has the examples on its first axis.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

Batch = Mapping[str, Any] | Tensor
Inputs = Batch | Sequence[Batch]
Readout = Callable[[Any], Tensor]


class FunctionError(ValueError):
    """The model's per-example outputs are undefined, unreadable or not finite."""


def logits(output: Any) -> Tensor:
    """Return the model's output if it is a tensor, else its `.logits`.

    Args:
        output: The model's output.

    Returns:
        ``(n, c)`` for a classifier.

    Raises:
        FunctionError: If the output is no tensor and has no logits.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    raise FunctionError(
        f"the model returned {type(output).__name__}, which is no tensor and has no "
        "`.logits`. Pass outputs=, a callable from the model's output to (n, c)."
    )


class NetworkFunction:
    """A model with a readout as a function ``f(batch) -> (n, c)``.

    Where it is made under `torch.autocast`, the model is evaluated so.

    Args:
        model: Any module whose outputs for an example depend on that example alone.
        outputs: Function from the model's output to ``(n, c)``; by default `logits`.
    """

    def __init__(self, model: nn.Module, outputs: Readout | None = None) -> None:
        self.model = model
        self.outputs = outputs or logits
        self.parameters = dict(model.named_parameters())
        dtypes = {p.dtype for p in self.parameters.values()}
        self.in_float64 = dtypes == {torch.float64}
        self._autocast = _autocast_of(next(iter(self.parameters.values()), None))

    def __call__(
        self, batch: Batch, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Evaluate the function.

        Args:
            batch: The examples.
            parameters: Values that replace the model's parameters, by name.

        Returns:
            ``(n, c)``.

        Raises:
            FunctionError: If the result is not ``(n, c)``.
        """
        args: tuple[Any, ...] = () if isinstance(batch, Mapping) else (batch,)
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        with self._precision(), self._autocast(), self._replacing(parameters or {}):
            output = self.outputs(self.model(*args, **kwargs))
        n = batch_length(batch)
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != n:
            shape = tuple(output.shape) if isinstance(output, Tensor) else output
            raise FunctionError(
                f"outputs must have shape (n, c) with n = {n} examples, but got "
                f"{shape}. Pass outputs=, a callable from the model's output to (n, c)."
            )
        return output

    @contextmanager
    def _replacing(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters wherever they are registered, and restore them.

        `torch.func.functional_call` loses the parameters of a module that is registered
        under two names, and ends before the readout, which may use the model's weights.
        """
        if not parameters:
            yield
            return
        values = {id(self.parameters[name]): v for name, v in parameters.items()}
        replaced = [
            (module._parameters, key, parameter)
            for module in self.model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in values
        ]
        try:
            for registered, key, parameter in replaced:
                registered[key] = values[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for registered, key, parameter in replaced:
                registered[key] = parameter

    def _precision(self) -> AbstractContextManager[object]:
        return Float64Throughout() if self.in_float64 else nullcontext()


def _autocast_of(like: Tensor | None) -> Callable[[], AbstractContextManager[object]]:
    """Return the autocast context of the caller for the device of a tensor."""
    device = "cpu" if like is None else like.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext
    dtype = torch.get_autocast_dtype(device)
    # A kept cast would hide its parameter from the next pass.
    return lambda: torch.autocast(device, dtype=dtype, cache_enabled=False)


class Float64Throughout(TorchFunctionMode):
    """Evaluates a float64 model in float64 throughout.

    Many models cast to float32 internally (RMSNorm, softmax, rotary angles), whatever
    the dtype of their weights. That rounds derivatives to seven digits, differently in
    forward and in reverse mode. This context turns casts to float32 into float64.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            return Tensor.double(*args, **(kwargs or {}))
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {
            k: torch.float64 if v is torch.float32 else v
            for k, v in (kwargs or {}).items()
        }
        return func(*wide, **named)


COPIED_BUFFER = 2**26
"""Largest buffer of which a copy is kept, in bytes; larger ones hold weights."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and restore modes and buffers afterwards.

    Gradients are enabled, whatever the caller's mode. Autocasting is for the model
    alone, see `NetworkFunction`. Parametrised weights are computed at each use: one
    kept by `torch.nn.utils.parametrize.cached` hides its parameters.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    was_training = [module for module in model.modules() if module.training]
    buffers = _saved_buffers(model)
    kept = parametrize._cache_enabled, parametrize._cache
    for module in was_training:
        module.training = False
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = kept
        for module in was_training:
            module.training = True
        for registered, key, buffer, copy, version in buffers:
            registered[key] = buffer
            if buffer is not None and copy is not None and buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)


def _saved_buffers(
    model: nn.Module,
) -> list[tuple[dict[str, Tensor | None], str, Tensor | None, Tensor | None, int]]:
    """Return every buffer's place, itself, a copy and its version."""
    saved = []
    for module in model.modules():
        for key, buffer in module._buffers.items():
            copy, version = None, 0
            if buffer is not None and not buffer.is_inference():
                version = buffer._version
                if buffer.nbytes <= COPIED_BUFFER:
                    copy = buffer.detach().clone()
            saved.append((module._buffers, key, buffer, copy, version))
    return saved


def check_model(model: nn.Module) -> None:
    """Check that a model has gradients and per-example outputs.

    Args:
        model: The model.

    Raises:
        FunctionError: If it has no parameters, a parameter is quantised, or a layer
            normalises over the batch.
    """
    if next(model.parameters(), None) is None:
        raise FunctionError(f"model {type(model).__name__} has no parameters.")
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _check_parameter(f"{name}.{key}" if name else key, parameter)
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise FunctionError(
                f"{name!r} normalises with the statistics of the batch, so an "
                "example's output depends on the others and has no kernel of its own. "
                "Use running statistics (track_running_stats=True) or GroupNorm."
            )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise FunctionError(
            f"parameter {name!r} has no shape yet: its module is lazy. Call the model "
            "once on an example first."
        )
    if parameter.is_complex():
        raise FunctionError(
            f"parameter {name!r} is complex ({parameter.dtype}), of which kernels are "
            "not defined here. Hold its real and imaginary parts as real parameters."
        )
    if parameter.is_meta:
        raise FunctionError(
            f"parameter {name!r} is on the meta device and has no values. Load the "
            "checkpoint, for example with `from_pretrained`, before taking a kernel."
        )
    if parameter.is_inference():
        raise FunctionError(
            f"parameter {name!r} was made under torch.inference_mode, so autograd "
            "cannot differentiate in it. Build the model outside of it, or replace "
            "each parameter by nn.Parameter(parameter.clone())."
        )
    if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
        raise FunctionError(
            f"parameter {name!r} is quantised ({parameter.dtype}): its gradient is "
            "not defined. Replace its layers with rocoft.dequantised_on_use(model)."
        )


def check_finite(model: nn.Module, outputs: Tensor) -> None:
    """Check that outputs are finite; if not, look for the cause.

    Args:
        model: The model.
        outputs: ``(n, c)``.

    Raises:
        FunctionError: If an output is NaN or infinite.
    """
    if bool(torch.isfinite(outputs).all()):
        return
    for name, parameter in model.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise FunctionError(
                f"parameter {name!r} has {bad} NaN or infinite entries of "
                f"{parameter.numel()}. Check the checkpoint."
            )
    raise FunctionError(
        "the model's outputs have NaN or infinite entries though its parameters have "
        "none. Check its dtype and the attention mask."
    )


def to_batches(
    inputs: Inputs, device: torch.device, size: int | None = None
) -> list[Batch]:
    """Split inputs into batches on one device.

    Args:
        inputs: A batch, or a list of batches that may differ in padded length.
        device: The model's device.
        size: Maximum number of examples in a batch; None takes batches whole.

    Returns:
        Batches with the examples in order.

    Raises:
        ValueError: If there are no examples, a tensor's first axis is not the
            examples, or ``size`` is not positive.
    """
    if size is not None and size < 1:
        raise ValueError(f"batch_size={size} must be at least 1.")
    batches: list[Batch] = []
    for batch in [inputs] if isinstance(inputs, Mapping | Tensor) else inputs:
        n = batch_length(batch)
        step = size or n
        for start in range(0, n, step):
            part = take(batch, slice(start, min(start + step, n)))
            batches.append(_to(part, device))
    if not batches:
        raise ValueError("inputs holds no examples. Pass at least one.")
    return batches


def batch_length(batch: Batch) -> int:
    """Return the number of examples of a batch.

    Args:
        batch: A mapping of tensors or a tensor.

    Returns:
        The length of the first axis.

    Raises:
        ValueError: If there is no tensor or no example, or the first axes differ.
    """
    if isinstance(batch, Tensor):
        lengths = {"inputs": len(batch) if batch.ndim else 0}
    elif isinstance(batch, Mapping):
        lengths = {
            key: len(value) if value.ndim else 0
            for key, value in batch.items()
            if isinstance(value, Tensor)
        }
    else:
        raise ValueError(
            f"inputs is a {type(batch).__name__}, but must be a tensor or a mapping of "
            "tensors (what a tokenizer returns with return_tensors='pt')."
        )
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "every tensor in inputs needs the same number of examples, at least 1, on "
            f"its first axis, but got {lengths}."
        )
    return next(iter(lengths.values()))


def take(batch: Batch, examples: slice) -> Batch:
    """Return some examples of a batch; values other than tensors are unchanged."""
    if isinstance(batch, Tensor):
        return batch[examples]
    return {k: v[examples] if isinstance(v, Tensor) else v for k, v in batch.items()}


def _to(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, Tensor):
        return _usable(batch).to(device)
    return {
        k: _usable(v).to(device) if isinstance(v, Tensor) else v
        for k, v in batch.items()
    }


def _usable(values: Tensor) -> Tensor:
    """Return inputs without a graph that autograd may keep for a backward pass."""
    if not values.is_inference():
        return values.detach()
    with torch.inference_mode(False):
        return values.clone()
