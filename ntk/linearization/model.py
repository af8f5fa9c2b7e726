"""The linearised model f0(x) + J(x) delta, trained like any module.

delta are coordinates of a tangent space, theta = theta0 + S delta, and J, ``(n c, p)``,
is the Jacobian of the model with respect to them at theta0; J J' is its kernel. J is
never formed: J v is one forward-mode pass over the batches, J' v one backward pass.

`ntk.linearization.closed_form` computes the result of training it,
`ntk.linearization.closeness` its distance from the fine-tuned model.
"""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk.gradients import (
    Batch,
    Coordinates,
    FunctionError,
    Inputs,
    Key,
    NetworkFunction,
    Readout,
    TangentFunction,
    batch_length,
    check_model,
    differentiated_twice,
    evaluating,
    output_gradients,
    take,
    to_batches,
)
from ntk.spaces import Pinned, Slices, Space, Whole, resolve
from rocoft.models import SelectionError

__all__ = ["LinearizedModel", "evaluated", "linearize"]

ROUNDING = 8
"""Units in the last place by which equal weights may differ."""


def linearize(
    model: nn.Module, space: Space, outputs: Readout | None = None
) -> "LinearizedModel":
    """Return the linearisation of a model in a tangent space, at its current weights.

    To linearise exactly the parameters that a method trains, prepare the model with
    `rocoft.training.methods.apply_method` and use ``Full()``: RoCoFT's differences, A
    and B of LoRA at their current values, biases, head. ``LoRA()`` selects only the
    adapters; ``LoRA(8)``, on a plain model, moves B at a fixed A.

    Args:
        model: Any module; it is copied and not changed.
        space: The tangent space.
        outputs: Function from the model's output to ``(n, c)``; by default its
            `.logits`, or the tensor itself.

    Returns:
        The module ``f0(x) + J(x) delta`` with delta = 0.
    """
    return LinearizedModel(model, space, outputs)


class LinearizedModel(nn.Module):
    """The first-order expansion of a model in the coordinates of a tangent space.

    It is called like the model and returns ``(n, c)``. `delta` is its only trainable
    parameter, for any optimizer or `rocoft.training.trainer.ReadoutTrainer`. It
    linearises the model in evaluation mode, whatever its own mode. Float64 models are
    evaluated in float64 throughout.

    Args:
        model: Any module; it is copied and not changed.
        space: The tangent space.
        outputs: Function from the model's output to ``(n, c)``; by default its
            `.logits`, or the tensor itself.

    Attributes:
        base: A frozen copy of the model, which holds theta0.
        space: The space as resolved on the model, for kernels of ``base``.
        readout: The argument ``outputs``.
        delta: ``(p,)`` coordinates, by parameter and map. With ``rescale`` they are
            scaled so that J J' is the kernel.
    """

    def __init__(
        self, model: nn.Module, space: Space, outputs: Readout | None = None
    ) -> None:
        super().__init__()
        check_model(model)
        self.space = Pinned(space, resolve({"": space}, model)[""])
        self.readout = outputs
        self._trained = {n for n, p in model.named_parameters() if p.requires_grad}
        self.base = copy.deepcopy(model).requires_grad_(False).eval()
        self._original: ref[nn.Module] | None = ref(model)
        self.base.zero_grad()
        if hasattr(model, "config"):
            self.config = self.base.config
        parameters = dict(self.base.named_parameters())
        chosen = self.space.chosen.items()
        self._keys: list[Key] = [(name, m) for name, maps in chosen for m in maps]
        self._sizes = [m.size(parameters[name].shape) for name, m in self._keys]
        touched = [parameters[name] for name in self.space.chosen]
        dtype = touched[0].dtype
        for parameter in touched:
            dtype = torch.promote_types(dtype, parameter.dtype)
        self.delta = nn.Parameter(touched[0].new_zeros(sum(self._sizes), dtype=dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``f0(x) + J(x) delta``, ``(n, c)``.

        Args:
            *args: The input, if the model takes a tensor.
            **kwargs: The inputs, if the model takes named ones.

        Returns:
            ``(n, c)``.

        Raises:
            FunctionError: If the inputs are neither one tensor nor named ones.
        """
        if len(args) + bool(kwargs) != 1:
            raise FunctionError(
                "a linearised model takes one tensor or named inputs, but got "
                f"{len(args)} positional and {len(kwargs)} named ones. Name them all."
            )
        start, change = self._expanded(self.delta, args[0] if args else kwargs)
        return start + change

    def train(self, mode: bool = True) -> "LinearizedModel":
        """Set the mode of this module; the base model stays in evaluation mode.

        Args:
            mode: Whether to set training mode.

        Returns:
            The module.
        """
        super().train(mode)
        self.base.eval()
        return self

    def start(self, inputs: Inputs, *, batch_size: int | None = None) -> Tensor:
        """Return f0 ``(n, c)``, the outputs of the model itself.

        Args:
            inputs: n examples: a batch, or a list of batches.
            batch_size: Maximum number of examples in one pass; None takes batches
                whole.
        """
        return evaluated(self.base, self._batches(inputs, batch_size), self.readout)

    def predict(
        self,
        inputs: Inputs,
        delta: Tensor | None = None,
        *,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return ``f0(x) + J(x) delta``, ``(n, c)``, without gradients.

        Args:
            inputs: n examples.
            delta: ``(p,)``; None means the module's own.
            batch_size: Maximum number of examples in one pass.
        """
        return torch.stack(self._over(inputs, delta, batch_size)).sum(dim=0)

    def jvp(
        self, inputs: Inputs, direction: Tensor, *, batch_size: int | None = None
    ) -> Tensor:
        """Return J direction, ``(n, c)``, by forward-mode differentiation.

        Args:
            inputs: n examples.
            direction: ``(p,)``.
            batch_size: Maximum number of examples in one pass.
        """
        return self._over(inputs, direction, batch_size)[1]

    def vjp(
        self, inputs: Inputs, vectors: Tensor, *, batch_size: int | None = None
    ) -> Tensor:
        """Return J' vectors, ``(p,)``, by one backward pass per batch.

        Args:
            inputs: n examples.
            vectors: ``(n, c)``.
            batch_size: Maximum number of examples in one pass.
        """
        tangent, batches = self._tangent(), self._batches(inputs, batch_size)
        zero = torch.zeros_like(self.delta).requires_grad_()
        total = torch.zeros_like(self.delta, dtype=torch.float64)
        parts = vectors.split([batch_length(batch) for batch in batches])
        for batch, part in zip(batches, parts, strict=True):
            with torch.enable_grad():
                values = tangent(self._split(zero), batch)
            if values.requires_grad:
                total += torch.autograd.grad(values, zero, part.to(values))[0]
        return total.to(self.delta)

    def coordinates(self, model: nn.Module) -> Tensor:
        """Return the coordinates of a fine-tuned model, of theta - theta0.

        Args:
            model: A model with the same parameters as the linearised one. For rows of a
                plain model trained by RoCoFT, the merged model of
                `rocoft.models.merging`.

        Returns:
            ``(p,)``.

        Raises:
            SelectionError: If the model has other parameters, theta - theta0 is outside
                the space, or the coordinates are not unique.
        """
        theirs = dict(model.named_parameters())
        self._check_same(theirs, type(model).__name__)
        pieces = []
        for (name, map_), scale in zip(self._keys, self._scales(), strict=True):
            if not isinstance(map_, Whole | Slices) or len(self.space.chosen[name]) > 1:
                raise SelectionError(
                    f"space {self.space.name!r} moves the B of LoRA at a fixed A, and "
                    f"fine-tuning both, so {name!r} has no coordinates. Linearise the "
                    "adapted model with LoRA() or Full()."
                )
            start = self.base.get_parameter(name)
            moved = theirs[name].detach().to(start) - start
            zero = start.new_zeros(map_.size(start.shape))
            # The columns of S are orthonormal: its transpose is its inverse.
            transpose = vjp(lambda d, m=map_, w=start: m.shift(w, d), zero)[1]
            pieces.append((transpose(moved)[0] / scale).to(self.delta))
        delta = torch.cat(pieces)
        self._check_reached(delta, theirs)
        return delta

    def parameters_at(self, delta: Tensor | None = None) -> dict[str, Tensor]:
        """Return the selected parameters at theta0 + S delta, by name.

        Args:
            delta: ``(p,)``; None means the module's own.
        """
        moved = {n: self.base.get_parameter(n).detach() for n in self.space.chosen}
        pieces = self._split(self._given(delta))
        for i, (name, map_) in enumerate(self._keys):
            moved[name] = map_.shift(moved[name], pieces[str(i)])
        return moved

    def model_at(self, delta: Tensor | None = None) -> nn.Module:
        """Return the model, not linearised, at theta0 + S delta.

        Args:
            delta: ``(p,)``; None means the module's own.

        Returns:
            A copy in evaluation mode, with the original `requires_grad` flags.
        """
        model = copy.deepcopy(self.base)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._trained)
        with torch.no_grad():
            for name, value in self.parameters_at(delta).items():
                model.get_parameter(name).copy_(value)
        return model

    def at(self, delta: Tensor) -> "LinearizedModel":
        """Return the linearisation in the same coordinates at another point.

        Args:
            delta: ``(p,)``; the new point is theta0 + S delta.
        """
        return LinearizedModel(self.model_at(delta), self.space, self.readout)

    def _batches(self, inputs: Inputs, size: int | None) -> list[Batch]:
        return to_batches(inputs, self.delta.device, size)

    def _given(self, delta: Tensor | None) -> Tensor:
        if delta is None:
            return self.delta.detach()
        if delta.shape != self.delta.shape:
            raise ValueError(
                f"delta has shape {tuple(delta.shape)}; expected "
                f"{tuple(self.delta.shape)}, the coordinates of {self.space.name!r}."
            )
        return delta.detach().to(self.delta)

    def _tangent(self) -> TangentFunction:
        # Not cached: the module may have been moved or cast.
        return TangentFunction(NetworkFunction(self.base, self.readout), self._keys)

    def _scales(self) -> list[Tensor]:
        """Return the square roots of the coordinates' weights in the kernel."""
        weights = (map_.weights() for _, map_ in self._keys)
        one = self.delta.new_ones(1)
        return [one if w is None else w.sqrt().to(one) for w in weights]

    def _split(self, delta: Tensor) -> Coordinates:
        """Return the coordinates of each map, in the dtype of its parameter."""
        pieces = zip(self._keys, delta.split(self._sizes), self._scales(), strict=True)
        return {
            str(i): (piece * scale).to(self.base.get_parameter(name).dtype)
            for i, ((name, _), piece, scale) in enumerate(pieces)
        }

    def _over(
        self, inputs: Inputs, delta: Tensor | None, batch_size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return f0 and J delta, ``(n, c)``, without gradients."""
        batches, given = self._batches(inputs, batch_size), self._given(delta)
        with torch.no_grad():
            parts = [self._expanded(given, batch) for batch in batches]
        start, change = (torch.cat(part).detach() for part in zip(*parts, strict=True))
        return start, change

    def _expanded(self, delta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return f0 and J delta, ``(n, c)``; J delta is differentiable in delta."""
        tangent, direction = self._tangent(), self._split(delta)
        zero = tangent.zero()
        self._check_copy(tangent, take(batch, slice(0, 1)))
        # Fused attention kernels have no forward-mode and no second derivative; the
        # math backend has.
        with sdpa_kernel(SDPBackend.MATH):
            try:
                pair = jvp(lambda d: tangent(d, batch), (zero,), (direction,))
                return pair[0], pair[1]
            except (RuntimeError, NotImplementedError):
                return differentiated_twice(tangent, zero, direction, batch)

    def _check_copy(self, tangent: TangentFunction, example: Batch) -> None:
        """Check once that the copy uses its own weights, all of which can be moved."""
        original = None if self._original is None else self._original()
        self._original = None
        if original is None:
            return
        used = []
        for model in (original, self.base):
            with evaluating(model):
                function = NetworkFunction(model, self.readout)
                gradients = output_gradients(function, example, self.space.chosen)
                used.append({name for row in gradients for name in row})
        theirs, ours = used
        if missed := sorted(theirs - ours):
            raise FunctionError(
                f"torch.func cannot replace {', '.join(map(repr, missed[:3]))}"
                f"{' and others' if missed[3:] else ''} in a copy of the model: a "
                "closure, a list or outputs= uses the parameter of the model itself. "
                "Register it in the module that uses it."
            )
        with evaluating(self.base):
            tangent.check_reach(example)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model that was copied: it may be checked once, here."""
        return {**self.__dict__, "_original": None}

    def _check_same(self, theirs: dict[str, nn.Parameter], model: str) -> None:
        ours = {n: p.shape for n, p in self.base.named_parameters()}
        if ours != {n: p.shape for n, p in theirs.items()}:
            other = sorted(ours.keys() ^ theirs.keys())
            where = f": only one of them has {other[0]!r}" if other else ""
            raise SelectionError(
                f"model {model} and the linearised {type(self.base).__name__} have not "
                f"the same parameters{where}. Linearise the model as it was prepared "
                "for fine-tuning, or compare `merged` models."
            )

    def _check_reached(self, delta: Tensor, theirs: dict[str, nn.Parameter]) -> None:
        reached = self.parameters_at(delta)
        for name, start in self.base.named_parameters():
            there = theirs[name].detach().to(start)
            error = float((reached.get(name, start) - there).abs().max())
            if error > ROUNDING * torch.finfo(start.dtype).eps * there.abs().max():
                raise SelectionError(
                    f"{name!r} moved by up to {error:.1e} outside of the space "
                    f"{self.space.name!r}. Linearise in a space of all trained "
                    "parameters, including the head."
                )


def evaluated(
    model: nn.Module, batches: Sequence[Batch], readout: Readout | None = None
) -> Tensor:
    """Return a model's outputs ``(n, c)`` in evaluation mode, without gradients.

    Args:
        model: The model; it is not changed.
        batches: Examples on the model's device.
        readout: Function from the model's output to ``(n, c)``.
    """
    function = NetworkFunction(model, readout)
    with evaluating(model), torch.no_grad():
        return torch.cat([function(batch) for batch in batches])
