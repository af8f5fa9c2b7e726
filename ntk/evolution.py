"""How a kernel changes while its model is fine-tuned.

Kernels can be compared where they are of the same coordinates. A model that peft has
wrapped has others than the plain one: its parameters are those of the adapter, with the
base model's frozen. So kernels before, during and after training are those of the plain
model with the tuned weights (`merged`), over a space whose rows and columns were chosen
once (`pinned`). `Full()` then is all of the base model's parameters, whatever was
trained; what a method itself can move is a space of the plain model, too: `Rows(3)` for
rows:3, `Bias()` for bitfit, `Head()` for head, and, up to the draw of A, `LoRA(8)` for
the start of lora:8.

Kernels here are ``(n, n, c, c)``, or ``(k, k)``: reduced ones, or Gram matrices.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    extract_model_from_parallel,
)
from numpy.typing import ArrayLike
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import TrainerCallback

from ntk import distance
from ntk.distance import DistanceSummary
from ntk.function import FunctionError, Inputs, Readout, check_model
from ntk.kernel import Kind, Reduction, empirical_ntk, gram_matrix
from ntk.maps import Maps
from ntk.spaces import Space
from ntk.spectrum import Array, as_array
from rocoft.architecture import Architecture, LinearWeight, SelectionError

__all__ = [
    "KernelChange",
    "KernelTrack",
    "Pinned",
    "kernel_change",
    "merged",
    "pinned",
    "velocity",
]

EIGENSPACE = 10
"""Leading eigenvectors that are compared unless told."""


@dataclass(frozen=True)
class KernelChange:
    """A kernel before and after fine-tuning, in numbers.

    Attributes:
        distance: S = 1 - cosine, in [0, 1]; blind to the kernel's scale.
        norm_ratio: ||after||_F / ||before||_F.
        measures: The kernel before is the reference; `frobenius` is the relative
            difference, and there are CKA and the overlap of eigenspaces.
        rank: Of these eigenspaces.
        alignment_before: Of the kernel before with the targets; None without targets.
        alignment_after: Of the kernel after.
    """

    distance: float
    norm_ratio: float
    measures: DistanceSummary
    rank: int
    alignment_before: float | None
    alignment_after: float | None


def kernel_change(
    before: ArrayLike,
    after: ArrayLike,
    *,
    targets: ArrayLike | None = None,
    rank: int | None = None,
) -> KernelChange:
    """Compare the kernels of a model before and after fine-tuning.

    The distance is that of Fort et al. (2020), the norm ratio the growth of Shan and
    Bordelon (2021), and alignment, uncentred, is expected to rise (Baratin et al.
    2021): take kernels on examples that were not trained on, or say that they were.

    Args:
        before: ``(n, n, c, c)`` or ``(k, k)``, symmetric positive semi-definite.
        after: Likewise, on the same examples and of the same space.
        targets: ``(k,)`` or ``(k, t)``, for ``(n, n, c, c)`` also ``(n, c)``.
        rank: Of the eigenspaces that are compared; 10, or k - 1 if that is less,
            unless given.

    Returns:
        The change; `asdict` makes it JSON.

    Raises:
        ValueError: If a shape does not fit, or the rank is not within 1..k.
    """
    A, B = _gram(before, "before"), _gram(after, "after")
    if rank is None:
        rank = max(1, min(EIGENSPACE, len(A) - 1))
    aligned: list[float | None] = [None, None]
    if targets is not None:
        Y = _targets(targets, np.shape(before))
        aligned = [distance.alignment(gram, Y) for gram in (A, B)]
    return KernelChange(
        distance=distance.kernel_distance(A, B),
        norm_ratio=float(np.linalg.norm(B) / np.linalg.norm(A)),
        measures=distance.summary(A, B, rank=rank),
        rank=rank,
        alignment_before=aligned[0],
        alignment_after=aligned[1],
    )


def velocity(kernels: Sequence[ArrayLike], times: Sequence[float]) -> Array:
    """Return the kernel velocity S(K_t, K_t+dt) / dt between successive kernels.

    S is the kernel distance 1 - cosine. Fort et al. (2020), with dt = 0.4 epochs. For
    small steps S is quadratic in them, so velocities at different dt do not compare.

    Args:
        kernels: At least two, ``(n, n, c, c)`` or ``(k, k)``, in the order of training.
        times: When each was measured, ascending: steps or epochs.

    Returns:
        ``(len(kernels) - 1,)``, per unit of time.

    Raises:
        ValueError: If there is not a time for each kernel, or they do not ascend.
    """
    when = np.asarray(times, dtype=np.float64)
    if len(kernels) < 2 or when.shape != (len(kernels),):
        raise ValueError(
            f"`times` has shape {when.shape} for {len(kernels)} kernels; expected a "
            "time for each of at least two."
        )
    steps = np.diff(when)
    if not (steps > 0).all():
        raise ValueError(f"`times={list(times)}`; expected ascending ones.")
    grams = [_gram(kernel, "kernels") for kernel in kernels]
    moved = [
        distance.kernel_distance(a, b) for a, b in zip(grams, grams[1:], strict=False)
    ]
    return np.array(moved) / steps


def merged(model: nn.Module) -> nn.Module:
    """Return a plain copy of a model with its tuned weights, all requiring gradients.

    Adapters (RoCoFT, LoRA, DoRA and whatever else peft merges) are merged into the
    weights, heads that were trained beside them take their places, and wrappers of
    data-parallel, compiled or mixed-precision training are left out. Parameters have
    the names that they had before any method was applied, so spaces resolve alike. The
    model itself is left as it was; the copy needs as much memory again.

    Args:
        model: As `rocoft.methods.apply_method`, `rocoft.trainer.fine_tune` or peft
            leave it, also in the midst of training. Readouts such as
            `rocoft.readouts.Prompted` may be around the adapted model.

    Returns:
        The copy, in the same mode of training or evaluation.

    Raises:
        FunctionError: If an adapter has no weights to merge, as prompts and prefixes,
            is no part of a `PeftModel`, or a parameter is quantised.
    """
    plain = copy.deepcopy(extract_model_from_parallel(model, keep_torch_compile=False))
    # On the copy alone: it takes autocast out of the forward of what it is given.
    plain = extract_model_from_parallel(plain, keep_fp32_wrapper=False)
    for module in list(plain.modules()):
        if isinstance(module, PeftModel):
            _check_mergeable(module)
    # peft itself unloads heads of several layers only where the method is LoRA.
    for path, module in list(plain.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain.set_submodule(
                path, module.unload_and_optionally_merge_module(True, False, None)
            )
    for path, module in list(plain.named_modules()):
        if isinstance(module, PeftModel):
            whole = module.merge_and_unload()
            if not path:
                plain = whole
            else:
                plain.set_submodule(path, whole)
    left = [n for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
    if left:
        raise FunctionError(
            f"model {type(model).__name__} has {len(left)} adapted layers, such as "
            f"{left[0]!r}, but no PeftModel to merge them. Wrap the model by "
            "peft.get_peft_model, or load it by PeftModel.from_pretrained."
        )
    check_model(plain)
    return plain.requires_grad_(True)


def _check_mergeable(model: PeftModel) -> None:
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise FunctionError(
            f"adapter {model.active_adapter!r} is of type {config.peft_type}, which "
            "changes inputs and not weights: nothing can be merged. Compute the kernel "
            "of the PeftModel itself."
        )


@dataclass(frozen=True)
class Pinned(Space):
    """A space with its choice made: the same coordinates whatever the weights become.

    Args:
        space: The space.
        chosen: Its maps on the model that it was made for.
    """

    space: Space
    chosen: Maps

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Return the maps that were chosen.

        Args:
            model: A model with parameters of the same names.

        Returns:
            The maps of every parameter that the space touches.

        Raises:
            SelectionError: If the model lacks one of the parameters.
        """
        known = model if isinstance(model, Architecture) else Architecture(model)
        if lacking := sorted(self.chosen.keys() - known.parameters.keys()):
            raise SelectionError(
                f"space {self.name!r} was pinned on a model with {lacking[0]!r}, which "
                f"this {type(known.model).__name__} lacks. Pin it on the plain model, "
                "and compute kernels of `merged` ones."
            )
        return {name: self.chosen[name] for name in self.chosen_parameters(known)}

    @property
    def lasting(self) -> bool:
        """Whether it is worth keeping resolved: it is resolved as it is."""
        return False

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return dict.fromkeys(self.chosen)

    def _term(self) -> str:
        return self.space.name


def pinned(space: Space, model: nn.Module) -> Space:
    """Choose now which rows and columns a space takes, for all later weights.

    `Rows(3, strategy="max")` on a tuned model may choose other rows than before. A
    space that does not look at the values of the weights is returned as it is.

    Args:
        space: The space; one that chooses by examples goes through
            `ntk.calibration.calibrate` first.
        model: The model before it is trained.

    Returns:
        A space for this model and those with parameters of the same names and shapes.
    """
    return space if space.lasting else Pinned(space, space.maps(model))


class KernelTrack(TrainerCallback):
    """Computes kernels of a model while transformers' Trainer trains it.

    Each is the kernel of the `merged` model over spaces `pinned` at the first one, in
    evaluation mode; the model, its gradients and the random numbers are left alone, so
    training takes the same steps as without. A training that is begun anew starts the
    track anew; one that is resumed keeps what was measured up to there.

    Args:
        inputs: n examples, as for `ntk.kernel.empirical_ntk`.
        spaces: Tangent spaces by name.
        every: Measure before the first step, after every so many, and after the last
            one unless training is stopped before it.
        at: Measure after these numbers of steps instead; 0 is before the first one.
        outputs: As for `empirical_ntk`.
        reduce: As for `empirical_ntk`.
        kind: As for `empirical_ntk`.
        batch_size: As for `empirical_ntk`.

    Attributes:
        steps: Number of steps taken at each measurement.
        epochs: Number of epochs, with their fractions.
        kernels: For each space its kernels, ``(n, n, c, c)`` or, reduced, ``(n, n)``,
            in float64 on the CPU.

    Raises:
        ValueError: If neither or both of ``every`` and ``at`` are given, or a step is
            out of range.
    """

    def __init__(
        self,
        inputs: Inputs,
        spaces: Mapping[str, Space],
        *,
        every: int | None = None,
        at: Collection[int] | None = None,
        outputs: Readout | None = None,
        reduce: Reduction = "full",
        kind: Kind = "sgd",
        batch_size: int | None = None,
    ) -> None:
        if (every is None) == (at is None):
            raise ValueError(
                f"`every={every}, at={at}`; expected one of them: every=10, or "
                "at=(0, 1, 10, 100)."
            )
        if every is not None and every < 1:
            raise ValueError(f"`every={every}`; expected a number of steps, 1 or more.")
        if at is not None and (not at or min(at) < 0):
            raise ValueError(f"`at={at}`; expected numbers of steps, 0 or more.")
        self.inputs = inputs
        self.spaces = dict(spaces)
        self.every = every
        self.at = None if at is None else frozenset(at)
        self.options: dict[str, Any] = {
            "outputs": outputs,
            "reduce": reduce,
            "kind": kind,
            "batch_size": batch_size,
        }
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self.kernels: dict[str, list[Tensor]] = {name: [] for name in self.spaces}
        self._pinned: dict[str, Space] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Measure before the first step, if wanted."""
        step = state.global_step
        if step == 0:
            self._pinned = None
        kept = sum(earlier < step for earlier in self.steps)
        self.steps, self.epochs = self.steps[:kept], self.epochs[:kept]
        self.kernels = {name: k[:kept] for name, k in self.kernels.items()}
        if self._wants(step):
            self._measure(kwargs["model"], state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after a step, if wanted."""
        last = self.every is not None and state.global_step == state.max_steps
        if last or self._wants(state.global_step):
            self._measure(kwargs["model"], state)

    def _wants(self, step: int) -> bool:
        if self.at is not None:
            return step in self.at
        return self.every is not None and step % self.every == 0

    def _measure(self, model: nn.Module, state: Any) -> None:
        plain = merged(model)
        if self._pinned is None:
            self._pinned = {n: pinned(s, plain) for n, s in self.spaces.items()}
        found = empirical_ntk(plain, self.inputs, space=self._pinned, **self.options)
        for name, kernel in found.items():
            self.kernels[name].append(kernel.cpu())
        self.steps.append(state.global_step)
        self.epochs.append(float(state.epoch or 0.0))


def _gram(kernel: ArrayLike, name: str) -> Array:
    """Return a kernel ``(n, n, c, c)`` or ``(k, k)`` as a Gram matrix."""
    array = as_array(kernel, name)
    if array.ndim not in {2, 4}:
        raise ValueError(
            f"`{name}` has shape {array.shape}; expected (n, n, c, c) or (k, k)."
        )
    return gram_matrix(torch.tensor(array)).numpy()


def _targets(targets: ArrayLike, kernel: tuple[int, ...]) -> Array:
    """Return targets with a row for each row of the Gram matrix of a kernel."""
    Y = as_array(targets, "targets")
    return Y.reshape(-1) if Y.shape == (kernel[0], *kernel[3:]) else Y
