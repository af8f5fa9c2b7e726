"""Unbiased estimates of kernels, with a standard error, from random projections.

The exact kernel of whole weights keeps a layer's inputs and gradients at every position
and contracts them pair by pair. A sketch (`maps.Sketch`) keeps s numbers per weight,
example and output, whatever the size of the weight. Its kernel is a Gram matrix, hence
positive semi-definite.

The s numbers are divided among several independent sketches, each with its own kernel.
The estimate is their mean; their spread gives its standard error. The estimates of
`importance` work alike.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, overload

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from ntk.gradients import Batch, Inputs, Readout
from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions, Kind
from ntk.measures import Reduction
from ntk.spaces import Full, Map, Maps, Sketch, Space, Whole
from rocoft.commands import Progress
from rocoft.models import Architecture, LinearWeight

__all__ = [
    "ApproximateKernel",
    "EstimatedSpace",
    "Estimator",
    "SketchEstimator",
    "SketchedSpace",
    "estimated_ntk",
    "sketched_ntk",
    "whole_weights",
]

REPLICATES = 8


@dataclass(frozen=True)
class EstimatedSpace(Space):
    """A space whose whole weights are replaced by maps that estimate their kernel.

    Small maps stay exact: biases, normalisations, rows, columns and LoRA pairs. So do
    embedding tables and the head, few of whose rows are used.

    Args:
        space: The wrapped space.
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
        """The name of the wrapped space."""
        return self.space.name

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Resolve the space and replace whole weights."""
        if not isinstance(model, Architecture):
            model = Architecture(model)
        maps = dict(self.space.maps(model))
        for name, weight in whole_weights(maps, model).items():
            if (estimate := self.replacement(name, weight)) is not None:
                maps[name] = tuple(
                    estimate if isinstance(m, Whole) else m for m in maps[name]
                )
        return maps

    def replacement(self, name: str, weight: LinearWeight) -> Map | None:
        """Return the map that replaces a whole weight; None keeps it exact.

        Args:
            name: The parameter.
            weight: The weight.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class SketchedSpace(EstimatedSpace):
    """A space whose whole weights are replaced by random projections.

    Weights no larger than their projection stay exact.

    Args:
        space: The wrapped space.
        entries: Size of the projection of each weight.
        seed: Seed of the projections.
    """

    entries: int
    seed: int = 0

    @property
    def lasting(self) -> bool:
        """Whether the maps do not depend on the values of the weights."""
        return self.space.lasting

    def replacement(self, name: str, weight: LinearWeight) -> Map | None:
        """Return the projection of a weight, see `EstimatedSpace`."""
        if self.entries < weight.outputs * weight.inputs:
            return Sketch(weight, self.entries, self.seed)
        return None


def whole_weights(maps: Maps, architecture: Architecture) -> dict[str, LinearWeight]:
    """Return the whole linear weights of a space, which are worth estimating.

    Embedding tables and the head are left out: few of their rows are used.

    Args:
        maps: The maps of a space.
        architecture: The architecture of its model.

    Returns:
        The weights by parameter name.
    """
    exact = {*architecture.embeddings, *architecture.head}
    return {
        name: weight
        for name, held in maps.items()
        if (weight := architecture.linear_weights.get(name)) is not None
        and name not in exact
        and any(isinstance(map_, Whole) for map_ in held)
    }


@dataclass(frozen=True)
class ApproximateKernel:
    """An unbiased estimate of a kernel, with its standard error.

    Attributes:
        kernel: ``(n, m, c, d)`` or ``(n, m)``, in float64.
        standard_error: Standard error of each entry, in the same shape.
        entries: How many numbers, rows or columns were kept per large weight.
        replicates: Number of independent estimates whose mean the kernel is.
        unit: What ``entries`` counts: ``"numbers"``, ``"rows"`` or ``"columns"``.
    """

    kernel: Tensor
    standard_error: Tensor
    entries: int
    replicates: int
    unit: str = "numbers"

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return confidence intervals of the entries of the exact kernel.

        Args:
            level: Confidence level, above 0 and below 1.

        Returns:
            The lower and the upper bound of every entry, by Student's t distribution.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be above 0 and below 1.")
        width = float(student.ppf((1 + level) / 2, self.replicates - 1))
        return (
            self.kernel - width * self.standard_error,
            self.kernel + width * self.standard_error,
        )

    def relative_error(self) -> float:
        """Return the expected error relative to the kernel, in Frobenius norms.

        The squared norm of the estimate is corrected for the part that the error adds.
        NaN if nothing is left after the correction.
        """
        error = float(self.standard_error.square().sum())
        signal = float(self.kernel.square().sum()) - error
        return (error / signal) ** 0.5 if signal > 0 else float("nan")


@dataclass(frozen=True)
class Estimator:
    """Replaces whole weights by random maps, and averages over replicates.

    Attributes:
        entries: Numbers, rows or columns per weight, over all replicates.
        replicates: Number of independent estimates that share them, at least 2.
        seed: Seed of the random draws.
    """

    entries: int = 4096
    replicates: int = REPLICATES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replicates < 2:
            raise ValueError(
                f"replicates={self.replicates} must be at least 2: one has no standard "
                "error."
            )
        if self.entries < self.replicates or self.entries % self.replicates:
            near = self.replicates * max(1, round(self.entries / self.replicates))
            raise ValueError(
                f"{self.unit}={self.entries} must be a multiple of "
                f"replicates={self.replicates}, such as {near}."
            )

    @property
    def unit(self) -> str:
        """What ``entries`` counts."""
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
        """Return the estimator, adapted to a model and examples if it needs to be.

        Args:
            model: The model.
            batches: The examples.
            spaces: The spaces to estimate.
            outputs: Maps the model's output to ``(n, c)``.
            kind: The kind of kernel.
        """
        return self

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return a space whose kernel is an unbiased estimate of another's.

        Args:
            space: The space to estimate.
            entries: Numbers, rows or columns per weight.
            seed: Seed of the random draw.
        """
        raise NotImplementedError

    def parted(self, name: str, space: Space) -> dict[str, Space]:
        """Return the replicates of a space; their kernels' mean is the estimate.

        Args:
            name: Name of the space.
            space: The space.

        Returns:
            The replicates by name.
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
            name: Name of the space.
            kernels: Kernels by name; those of the replicates are removed.
        """
        replicates = torch.stack(
            [kernels.pop(self._name(name, r)) for r in range(self.replicates)]
        )
        error = replicates.std(dim=0) / self.replicates**0.5
        unit = "numbers" if self.unit == "entries" else self.unit
        return ApproximateKernel(
            replicates.mean(dim=0), error, self.entries, self.replicates, unit
        )

    def _name(self, name: str, replicate: int) -> str:
        return f"{name}, estimate {replicate}"


@dataclass(frozen=True)
class SketchEstimator(Estimator):
    """Estimates whole weights by random projections."""

    def replicate(self, space: Space, entries: int, seed: int) -> Space:
        """Return the space with its whole weights sketched, see `Estimator`."""
        return SketchedSpace(space, entries, seed)


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

    The error of an entry is at most about ``sqrt(11 / entries)`` times the geometric
    mean of the two examples' diagonal entries, whatever the size of the model.

    Args:
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples.
        other: m examples; None means ``inputs``.
        space: A tangent space, or several by name; None means `Full()`.
        entries: Numbers kept per weight, example and output, over all replicates.
        replicates: Number of independent sketches that share them, at least 2. More
            give a more reliable standard error and take more time.
        seed: Seed of the projections. Blocks of one kernel may be computed separately
            with the same seed.
        outputs: Maps the model's output to ``(n, c)``.
        reduce: One of `ntk.measures.REDUCTIONS`.
        batch_size: Largest number of examples in one pass.
        progress: Called as the work goes on.

    Returns:
        The estimate; for a mapping of spaces, a dictionary of estimates.

    Raises:
        ValueError: If ``entries`` is not a multiple of ``replicates``.
    """
    return estimated_ntk(
        SketchEstimator(entries, replicates, seed),
        model,
        inputs,
        other,
        space=space,
        options=KernelOptions(reduce=reduce, outputs=outputs, batch_size=batch_size),
        progress=progress,
    )


def estimated_ntk(
    estimator: Estimator,
    model: nn.Module,
    inputs: Inputs,
    other: Inputs | None = None,
    *,
    space: Space | Mapping[str, Space] | None = None,
    options: KernelOptions = KernelOptions(),
    progress: Progress | None = None,
) -> ApproximateKernel | dict[str, ApproximateKernel]:
    """Return an unbiased estimate of the empirical NTK, with its standard error.

    Args:
        estimator: How whole weights are estimated.
        model: Any module; evaluated in eval mode and restored.
        inputs: n examples.
        other: m examples; None means ``inputs``.
        space: A tangent space, or several by name; None means `Full()`.
        options: How kernels are computed.
        progress: Called as the work goes on.

    Returns:
        The estimate; for a mapping of spaces, a dictionary of estimates.
    """
    named = space if isinstance(space, Mapping) else {"": space or Full()}
    spaces: dict[str, Space] = {}
    for name, exact in named.items():
        spaces |= estimator.parted(name, exact)
    kernels = compute(
        model, inputs, other, spaces=spaces, options=options, progress=progress
    ).kernels
    estimates = {name: estimator.collected(name, kernels) for name in named}
    return estimates if isinstance(space, Mapping) else estimates[""]
