"""Kernels to compute, as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ntk.gradients import Batch
from ntk.kernels import KernelOptions
from ntk.spaces import Maps, Space, resolve


@dataclass(frozen=True)
class Work:
    """Kernels to compute: of a model, between examples, over tangent spaces.

    Attributes:
        model: Any module; evaluated in eval mode and restored.
        batches: The left examples.
        right: Number of batches, from the first, that are also the right examples.
        spaces: Tangent spaces by name.
        options: How kernels are computed.
        readout: Anything else that the outputs depend on, such as label words; part of
            the cache key.
    """

    model: nn.Module
    batches: Sequence[Batch]
    right: int
    spaces: Mapping[str, Space]
    options: KernelOptions = KernelOptions()
    readout: str = ""

    @cached_property
    def resolved(self) -> dict[str, Maps]:
        """The maps of every space."""
        return resolve(self.spaces, self.model)
