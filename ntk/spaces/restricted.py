"""Spaces derived from others: without some parameters, or with their choice fixed."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ntk.spaces.kinds import Space
from ntk.spaces.maps import Maps
from rocoft.models import Architecture, LinearWeight, SelectionError


@dataclass(frozen=True)
class Without(Space):
    """A space without some parameters.

    Args:
        space: The space.
        excluded: Names of the parameters to leave out.
    """

    space: Space
    excluded: tuple[str, ...]

    @property
    def lasting(self) -> bool:
        """Whether the maps do not depend on the values of the weights."""
        return self.space.lasting

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Resolve the space and drop the excluded parameters."""
        maps = self.space.maps(model)
        return {name: m for name, m in maps.items() if name not in self.excluded}

    @property
    def name(self) -> str:
        """The name of the whole space."""
        return self.space.name


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
