"""Kernels of random projections: unbiased, with a standard error, for what is large.

The exact kernel of whole weights keeps a layer's inputs and gradients at every position
and contracts them pair by pair. A sketch (`maps.Sketch`) keeps s numbers of every
weight, example and output, whatever the size of the weight. Its kernel is a Gram
matrix, and so positive semi-definite.

The s numbers are those of several independent sketches. Each has a kernel of its own;
the estimate is their mean, and their spread says how far it is from the truth. So it is
with other estimates of whole weights (`importance`).
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, overload

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from ntk.function import Batch, Inputs, Readout
from ntk.kernel import Kind, Reduction, compute
from ntk.maps import Map, Maps, Sketch, Whole
from ntk.spaces import Full, Space
from rocoft.architecture import Architecture, LinearWeight
from rocoft.console import Progress

__all__ = [
    "ApproximateKernel",
    "Estimated",
    "Estimator",
    "Sketched",
    "Sketches",
    "estimated",
    "sketched_ntk",
    "whole_weights",
]

REPLICATES = 8


@dataclass(frozen=True)
class Estimated(Space):
    """A space whose whole weights are replaced by what estimates their kernel.

    Exact are biases and normalisations, tables that tokens are looked up in, the head,
    of which few rows are used, and rows, columns and LoRA pairs, which are small.

    Args:
        space: The space.
    """

    space: Space

    def at(self, *patterns: str) -> Self:
        """Return the estimate of the restricted space, see `Space.at`."""
        return replace(self, space=self.space.at(*patterns))

    def layers(self, *indices: int) -> Self:
        """Return the estimate of the restricted space, see `Space.layers`."""
        return replace(self, space=self.space.layers(*indices))

    @property
    def name(self) -> str:
        """The space, which is not another one for being estimated."""
        return self.space.name

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Resolve the space and replace whole weights."""
        known = model if isinstance(model, Architecture) else Architecture(model)
        found = dict(self.space.maps(known))
        for name, of in whole_weights(found, known).items():
            if (instead := self.instead(name, of)) is not None:
                found[name] = tuple(
                    instead if isinstance(m, Whole) else m for m in found[name]
                )
        return found

    def instead(self, name: str, of: LinearWeight) -> Map | None:
        """Return what stands for a whole weight, None for itself.

        Args:
            name: Of the parameter.
            of: The weight.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Sketched(Estimated):
    """A space whose whole weights are replaced by random projections of them.

    Exact is what is no larger than its projection, too.

    Args:
        space: The space.
        entries: Numbers that are kept of each weight.
        seed: Of the projections.
    """

    entries: int
    seed: int = 0

    @property
    def lasting(self) -> bool:
        """Whether it is resolved alike whatever the values of the weights."""
        return self.space.lasting

    def instead(self, name: str, of: LinearWeight) -> Map | None:
        """Return the projection of a weight, see `Estimated`."""
        if self.entries < of.outputs * of.inputs:
            return Sketch(of, self.entries, self.seed)
        return None


def whole_weights(maps: Maps, known: Architecture) -> dict[str, LinearWeight]:
    """Return the linear weights that are wanted whole, which are worth estimating.

    Tables that tokens are looked up in are left out, of whose rows few are used, and
    the head.

    Args:
        maps: Of a space.
        known: The model that they are of.

    Returns:
        The weights by parameter name.
    """
    exact = {*known.embeddings, *known.head}
    return {
        name: of
        for name, several in maps.items()
        if (of := known.linear_weights.get(name)) is not None
        and name not in exact
        and any(isinstance(each, Whole) for each in several)
    }


@dataclass(frozen=True)
class ApproximateKernel:
    """An unbiased estimate of a kernel, and how far from the truth it may be.

    Attributes:
        kernel: ``(n, m, c, d)`` or ``(n, m)``, in float64.
        standard_error: Of each entry, in the same shape.
        entries: How many numbers, rows or columns were kept of each large weight.
        replicates: Independent estimates that the kernel is the mean of.
        unit: What these are: ``"numbers"``, ``"rows"`` or ``"columns"``.
    """

    kernel: Tensor
    standard_error: Tensor
    entries: int
    replicates: int
    unit: str = "numbers"

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return bounds that each entry of the exact kernel is within, so often.

        Args:
            level: How often, above 0 and below 1.

        Returns:
            The lower and the upper bound of every entry, by Student's distribution.

        Raises:
            ValueError: If the level is no probability between.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be above 0 and below 1.")
        width = float(student.ppf((1 + level) / 2, self.replicates - 1))
        return (
            self.kernel - width * self.standard_error,
            self.kernel + width * self.standard_error,
        )

    def relative_error(self) -> float:
        """Return the Frobenius norm of the error expected, relative to the kernel's.

        The kernel's own is taken less what the error adds to it. NaN if the error is
        all that is left.
        """
        error = float(self.standard_error.square().sum())
        signal = float(self.kernel.square().sum()) - error
        return (error / signal) ** 0.5 if signal > 0 else float("nan")


@dataclass(frozen=True)
class Estimator:
    """How whole weights are estimated, and the way from kernels of it to an estimate.

    Attributes:
        entries: Of each weight, example and output, of all replicates together.
        replicates: Independent estimates that share them, at least 2.
        seed: Of what is drawn.
    """

    entries: int = 4096
    replicates: int = REPLICATES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replicates < 2:
            raise ValueError(
                f"replicates={self.replicates} must be at least 2: one alone has no "
                "spread."
            )
        if self.entries < self.replicates or self.entries % self.replicates:
            near = self.replicates * max(1, round(self.entries / self.replicates))
            raise ValueError(
                f"{self.unit}={self.entries} must be a multiple of "
                f"replicates={self.replicates}, such as {near}."
            )

    @property
    def unit(self) -> str:
        """What is counted."""
        return "entries"

    def fitted(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        *,
        spaces: Iterable[Space],
        outputs: Readout | None = None,
        kind: Kind = "sgd",
    ) -> Self:
        """Return it with what it needs to know of the model on some examples.

        Args:
            model: The model.
            batches: The examples.
            spaces: What is estimated.
            outputs: As in `kernel.empirical_ntk`.
            kind: As in `kernel.empirical_ntk`.
        """
        return self

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return a space whose kernel estimates that of another without bias.

        Args:
            space: The other one.
            entries: Of each weight, example and output.
            seed: Of what is drawn.
        """
        raise NotImplementedError

    def parted(self, name: str, space: Space) -> dict[str, Space]:
        """Return the spaces whose kernels' mean estimates that of one space.

        Args:
            name: Of the space.
            space: The space.

        Returns:
            Estimating spaces by names of their own.
        """
        size, first = self.entries // self.replicates, self.seed * self.replicates
        return {
            self._name(name, r): self.replicate(space, size, first + r)
            for r in range(self.replicates)
        }

    def collected(
        self, name: str, kernels: MutableMapping[str, Tensor]
    ) -> ApproximateKernel:
        """Return the estimate of a space's kernel.

        Args:
            name: Of the space.
            kernels: With those of the estimating spaces, which are taken out.
        """
        found = [kernels.pop(self._name(name, r)) for r in range(self.replicates)]
        each = torch.stack(found)
        error = each.std(dim=0) / self.replicates**0.5
        unit = "numbers" if self.unit == "entries" else self.unit
        return ApproximateKernel(
            each.mean(dim=0), error, self.entries, self.replicates, unit
        )

    def _name(self, name: str, replicate: int) -> str:
        return f"{name}, estimate {replicate}"


@dataclass(frozen=True)
class Sketches(Estimator):
    """Estimates whole weights by random projections of them."""

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return the space with its whole weights sketched, see `Estimator`."""
        return Sketched(space, entries, seed)


@overload
def sketched_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space = ...,
    entries: int = ...,
    replicates: int = ...,
    seed: int = ...,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ApproximateKernel: ...
@overload
def sketched_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Mapping[str, Space],
    entries: int = ...,
    replicates: int = ...,
    seed: int = ...,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, ApproximateKernel]: ...
def sketched_ntk(
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space | Mapping[str, Space] | None = None,
    entries: int = 4096,
    replicates: int = REPLICATES,
    seed: int = 0,
    outputs: Readout | None = None,
    reduce: Reduction = "full",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ApproximateKernel | dict[str, ApproximateKernel]:
    """Estimate the empirical NTK from random projections of the gradients.

    Each entry's error is at most about ``sqrt(11 / entries)`` of the geometric mean of
    the two examples' own entries, whatever the size of the model; it falls with the
    square root of ``entries``.

    Args:
        model: As in `kernel.empirical_ntk`.
        inputs: As in `kernel.empirical_ntk`.
        other: As in `kernel.empirical_ntk`.
        space: As in `kernel.empirical_ntk`.
        entries: Numbers kept of each weight, example and output, of all replicates
            together.
        replicates: Independent sketches that share them, at least 2. More of them say
            the error more surely, and take more time.
        seed: Of the projections. The same seed gives the same ones, so that blocks of
            examples computed apart are those of one kernel.
        outputs: As in `kernel.empirical_ntk`.
        reduce: As in `kernel.empirical_ntk`.
        batch_size: As in `kernel.empirical_ntk`.
        progress: As in `kernel.compute`.

    Returns:
        The estimate; for a mapping of spaces a dictionary of them.

    Raises:
        ValueError: If ``entries`` cannot be parted among the replicates.
    """
    return estimated(
        Sketches(entries, replicates, seed),
        model,
        inputs,
        other,
        space=space,
        outputs=outputs,
        reduce=reduce,
        batch_size=batch_size,
        progress=progress,
    )


def estimated(
    estimator: Estimator,
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None,
    *,
    space: Space | Mapping[str, Space] | None,
    outputs: Readout | None,
    reduce: Reduction,
    kind: Kind = "sgd",
    batch_size: int | None,
    progress: Progress | None,
) -> ApproximateKernel | dict[str, ApproximateKernel]:
    """Estimate kernels.

    Args:
        estimator: How.
        model: As in `kernel.empirical_ntk`.
        inputs: As in `kernel.empirical_ntk`.
        other: As in `kernel.empirical_ntk`.
        space: As in `kernel.empirical_ntk`.
        outputs: As in `kernel.empirical_ntk`.
        reduce: As in `kernel.empirical_ntk`.
        kind: As in `kernel.empirical_ntk`.
        batch_size: As in `kernel.empirical_ntk`.
        progress: As in `kernel.compute`.

    Returns:
        The estimate; for a mapping of spaces a dictionary of them.
    """
    named = space if isinstance(space, Mapping) else {"": space or Full()}
    spaces: dict[str, Space] = {}
    for name, each in named.items():
        spaces |= estimator.parted(name, each)
    kernels = compute(
        model,
        inputs,
        other,
        spaces=spaces,
        outputs=outputs,
        reduce=reduce,
        kind=kind,
        batch_size=batch_size,
        progress=progress,
    ).kernels
    found = {name: estimator.collected(name, kernels) for name in named}
    return found if isinstance(space, Mapping) else found[""]
