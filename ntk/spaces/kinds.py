"""Tangent spaces: the directions in parameter space that a kernel is made of.

A `Space` does not depend on a model; `space.maps(model)` resolves it to linear maps
(`ntk.spaces.maps`) of the parameters it selects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor, nn

from ntk.spaces.maps import LowRank, Map, Maps, Slices, Whole, oriented
from ntk.spaces.union import unite
from rocoft.commands import Strategy
from rocoft.models import (
    DATA_STRATEGIES,
    Architecture,
    Axis,
    LinearWeight,
    SelectionError,
    check_counts,
    match,
    select_each,
)


@dataclass(frozen=True)
class Space:
    """A tangent space that can be resolved on any model.

    ``space_a + space_b`` is the union of both (entries selected twice count once);
    ``.at(...)`` and ``.layers(...)`` restrict a space.
    """

    patterns: tuple[str, ...] = field(default=(), kw_only=True)
    blocks: tuple[int, ...] = field(default=(), kw_only=True)

    def at(self, *patterns: str) -> Self:
        """Return the space restricted to parameters whose names match.

        Args:
            *patterns: Runs of whole name components, or globs, see
                `rocoft.models.architecture.match`.

        Returns:
            The restricted space.
        """
        return replace(self, patterns=(*self.patterns, *patterns))

    def layers(self, *indices: int) -> Self:
        """Return the space restricted to some transformer blocks.

        Args:
            *indices: Block indices from 0; negative ones count from the last block.

        Returns:
            The restricted space.
        """
        return replace(self, blocks=(*self.blocks, *indices))

    def __add__(self, other: "Space") -> "Sum":
        """Return the union of both spaces."""
        return Sum((*_parts(self), *_parts(other)))

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Resolve the space on a model.

        Args:
            model: The model or its architecture.

        Returns:
            The maps of every selected parameter, by name.
        """
        architecture = model if isinstance(model, Architecture) else Architecture(model)
        chosen = self.chosen_parameters(architecture)
        return {n: (self._map(architecture, n, of),) for n, of in chosen.items()}

    def chosen_parameters(self, model: Architecture) -> dict[str, LinearWeight | None]:
        """Return the parameters that the space selects.

        Args:
            model: The model's architecture.

        Returns:
            By name, the linear weight, or None if the space does not treat it as one.

        Raises:
            SelectionError: If the space selects no parameter.
        """
        available = self._available(model)
        chosen = list(available)
        if chosen and self.patterns:
            chosen = match(chosen, self.patterns)
        if not chosen:
            raise SelectionError(
                f"space {self.name!r} selects nothing: {model.name} has no "
                f"{self._wanted()}. {_selecting(model)}"
            )
        if self.blocks and not (chosen := _in_blocks(model, chosen, self.blocks)):
            raise SelectionError(
                f"space {self.name!r} selects nothing: {model.name} has no "
                f"{self._wanted()} in these layers. Leave the layers out."
            )
        return {name: available[name] for name in chosen}

    @property
    def lasting(self) -> bool:
        """Whether the maps do not depend on the values of the weights."""
        return True

    @property
    def of_linear(self) -> bool:
        """Whether the space selects among all linear weights of the blocks."""
        return False

    @property
    def name(self) -> str:
        """The space as text, read by `ntk.spaces.notation.parse_space`."""
        text = self._term()
        if self.patterns:
            text += "@" + ",".join(self.patterns)
        if self.blocks:
            text += "/layers=" + ",".join(map(str, self.blocks))
        return text + self._options()

    def __str__(self) -> str:
        """Return the name."""
        return self.name

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        raise NotImplementedError

    def _map(self, model: Architecture, name: str, of: LinearWeight | None) -> Map:
        return Whole()

    def _term(self) -> str:
        return type(self).__name__.lower()

    def _options(self) -> str:
        return ""

    def _wanted(self) -> str:
        """Return what the space is made of, in the plural."""
        return f"{self._term()} parameters"


@dataclass(frozen=True)
class Full(Space):
    """Every parameter that requires a gradient."""

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return {n: None for n, p in model.parameters.items() if p.requires_grad}

    def _wanted(self) -> str:
        return "parameters that require a gradient"


@dataclass(frozen=True)
class Bias(Space):
    """Every bias vector, including those of normalisation layers (BitFit)."""

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return dict.fromkeys(model.biases)


@dataclass(frozen=True)
class Head(Space):
    """All parameters of the head: those outside the base model, or the last linear."""

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return dict.fromkeys(model.head)


@dataclass(frozen=True)
class Norm(Space):
    """Scales and biases of the normalisation layers."""

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return dict.fromkeys(model.norms)


@dataclass(frozen=True)
class Embeddings(Space):
    """Embedding tables, learned positions and class tokens."""

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        return dict.fromkeys(model.embeddings)

    def _wanted(self) -> str:
        return "embeddings"


@dataclass(frozen=True)
class _OfLinear(Space):
    """Base class of spaces of linear weights, by default those in the blocks."""

    @property
    def of_linear(self) -> bool:
        """Whether the space selects among all linear weights of the blocks."""
        return not self.patterns

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        if not self.patterns:
            return model.targets
        # A pattern may name weights that are not default targets, such as the head's.
        named = match(list(model.linear_weights), self.patterns)
        narrow = {n: w for n, w in model.targets.items() if n in named}
        return narrow or model.linear_weights

    def _wanted(self) -> str:
        return "linear layers"


@dataclass(frozen=True)
class _Sliced(_OfLinear):
    """Base class of rows and columns: their count or indices, and the strategy."""

    count: int | None = None
    strategy: Strategy = field(default="first", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    rescale: bool = field(default=False, kw_only=True)
    indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = field(
        default=None, kw_only=True
    )

    _axis = "row"

    def __post_init__(self) -> None:
        if (self.count is None) == (self.indices is None):
            raise SelectionError(
                f"{type(self).__name__} needs either a count, as in "
                f"{type(self).__name__}(3), or indices=(0, 5, 7), not "
                f"{'both' if self.count is not None else 'neither'}."
            )
        if self.count is not None and type(self.count) is not int:
            raise SelectionError(f"count={self.count!r} must be a whole number.")

    @property
    def needs_examples(self) -> bool:
        """Whether the indices depend on data, see `ntk.gradients.data_selection`."""
        return self.indices is None and self.strategy in DATA_STRATEGIES

    @property
    def lasting(self) -> bool:
        """Whether the maps do not depend on the values of the weights."""
        given = isinstance(self.indices, Mapping)
        return not given and self.strategy in {"first", "last", "random"}

    def chosen(
        self, of: LinearWeight, values: Tensor, statistics: Tensor | None = None
    ) -> tuple[int, ...]:
        """Return the selected rows or columns of one weight.

        Args:
            of: The weight.
            values: Its stored values.
            statistics: Statistics for strategies that need examples, see
                `rocoft.models.selection`.

        Returns:
            Indices, ascending.

        Raises:
            SelectionError: If an explicit index is out of range or repeated.
        """
        axis: Axis = "row" if self._axis == "row" else "column"
        if self.indices is None:
            count = self.count or 0
            return select_each(
                of,
                oriented(values.detach(), of),
                axis,
                [count] * (len(of.parts) if axis == "row" else 1),
                self.strategy,
                seed=self.seed,
                statistics=statistics,
            )
        given = self.indices
        if isinstance(given, Mapping) and of.name not in given:
            raise SelectionError(
                f"indices has no entry for {of.name!r}. Give one for every weight, or "
                "restrict the space with .at(...)."
            )
        chosen = tuple(given[of.name] if isinstance(given, Mapping) else given)
        limit = of.outputs if axis == "row" else of.inputs
        distinct = set(chosen)
        if (
            len(distinct) != len(chosen)
            or not distinct
            or not distinct <= set(range(limit))
        ):
            raise SelectionError(
                f"indices={chosen} must be distinct, at least one, and from 0 to "
                f"{limit - 1}, the {axis}s of {of.name!r}."
            )
        return tuple(sorted(chosen))

    def chosen_parameters(self, model: Architecture) -> dict[str, LinearWeight | None]:
        """Return the parameters that the space selects; see `Space`.

        Warns:
            UserWarning: If some weights have fewer rows or columns than asked for, of
                which all are taken.
        """
        chosen = super().chosen_parameters(model)
        if self.indices is None:
            axis: Axis = "row" if self._axis == "row" else "column"
            check_counts([(of, axis, self.count or 0) for of in chosen.values() if of])
        return chosen

    def _map(self, model: Architecture, name: str, of: LinearWeight | None) -> Map:
        assert of is not None
        chosen = self.chosen(of, model.values(name))
        if self._axis == "row":
            return Slices(of, chosen, (), self.rescale)
        return Slices(of, (), chosen, self.rescale)

    def _term(self) -> str:
        count = "" if self.count is None else f":{self.count}"
        return super()._term() + count

    def _options(self) -> str:
        text = ""
        if isinstance(self.indices, Mapping):
            text += "/calibrated"
        elif self.indices is not None:
            text += "/indices=" + ",".join(map(str, self.indices))
        if self.strategy != "first":
            text += f"/strategy={self.strategy}"
        if self.seed:
            text += f"/seed={self.seed}"
        return text + ("/rescale" if self.rescale else "")


@dataclass(frozen=True)
class Rows(_Sliced):
    """Some rows (output features) of every linear weight in the blocks.

    Args:
        count: Number of rows; of a fused query-key-value weight, of each of the three.
        strategy: How rows are chosen, see `rocoft.models.selection.select`.
        seed: Seed of ``strategy="random"``.
        rescale: Whether to weight by d_out / count, which makes the kernel of uniform
            random rows an unbiased estimate of the whole weight's.
        indices: Explicit rows instead of a count, the same for every weight or by
            parameter name.
    """


@dataclass(frozen=True)
class Columns(_Sliced):
    """Some columns (input features) of every linear weight in the blocks.

    Args:
        count: Number of columns.
        strategy: How columns are chosen, see `rocoft.models.selection.select`.
        seed: Seed of ``strategy="random"``.
        rescale: Whether to weight by d_in / count, which makes the kernel of uniform
            random columns an unbiased estimate of the whole weight's.
        indices: Explicit columns instead of a count, the same for every weight or by
            parameter name.
    """

    _axis = "column"


@dataclass(frozen=True)
class LoRA(_OfLinear):
    """LoRA at initialisation on linear weights, or the adapters of a peft model.

    Args:
        rank: Rank of new pairs on every linear weight in the blocks. None means the
            parameters of the peft adapters already in the model.
        seed: Seed of the new A.
        alpha: The scaling is alpha / rank; None means a scaling of 1.
        rescale: Whether to make the kernel an unbiased estimate of the whole weights'.
    """

    rank: int | None = None
    seed: int = field(default=0, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    rescale: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise SelectionError(f"LoRA rank={self.rank} must be at least 1.")

    @property
    def of_linear(self) -> bool:
        """Whether the space selects among all linear weights of the blocks."""
        return self.rank is not None and super().of_linear

    def _available(self, model: Architecture) -> Mapping[str, LinearWeight | None]:
        if self.rank is None:
            return {n: None for n, _ in model.parameters.items() if ".lora_" in n}
        return super()._available(model)

    def _map(self, model: Architecture, name: str, of: LinearWeight | None) -> Map:
        if of is None or self.rank is None:
            return Whole()
        scaling = 1.0 if self.alpha is None else self.alpha / self.rank
        return LowRank(of, self.rank, self.seed, scaling, self.rescale)

    def _term(self) -> str:
        return "lora" + ("" if self.rank is None else f":{self.rank}")

    def _options(self) -> str:
        text = f"/seed={self.seed}" if self.seed else ""
        if self.alpha is not None:
            text += f"/alpha={self.alpha!r}".replace("+", "")
        return text + ("/rescale" if self.rescale else "")

    def _wanted(self) -> str:
        if self.rank is None:
            return "adapters (give a rank, LoRA(8), for fresh ones)"
        return super()._wanted()


@dataclass(frozen=True)
class Sum(Space):
    """The union of several spaces."""

    parts: tuple[Space, ...] = ()

    @property
    def of_linear(self) -> bool:
        """Whether a part selects among all linear weights of the blocks."""
        return any(part.of_linear for part in self.parts)

    @property
    def lasting(self) -> bool:
        """Whether the maps do not depend on the values of the weights."""
        return all(part.lasting for part in self.parts)

    def at(self, *patterns: str) -> Self:
        """Return the sum with every part restricted to matching parameters."""
        return replace(self, parts=tuple(p.at(*patterns) for p in self.parts))

    def layers(self, *indices: int) -> Self:
        """Return the sum with every part restricted to some blocks."""
        return replace(self, parts=tuple(p.layers(*indices) for p in self.parts))

    def maps(self, model: nn.Module | Architecture) -> Maps:
        """Resolve every part and unite the maps of each parameter."""
        architecture = model if isinstance(model, Architecture) else Architecture(model)
        united: Maps = {}
        for part in self.parts:
            for name, maps in part.maps(architecture).items():
                united[name] = unite(name, united.get(name, ()), maps)
        return united

    @property
    def name(self) -> str:
        """The space as text, read by `ntk.spaces.notation.parse_space`."""
        return "+".join(part.name for part in self.parts)


def _selecting(model: Architecture) -> str:
    """Name the kinds of spaces that select something of a model."""
    kinds = (Full(), Rows(1), Columns(1), LoRA(1), Bias(), Norm(), Embeddings(), Head())
    names = [type(kind).__name__.lower() for kind in kinds if kind._available(model)]
    return f"Spaces that select some of its parameters: {', '.join(names) or 'none'}."


def _parts(space: Space) -> tuple[Space, ...]:
    return space.parts if isinstance(space, Sum) else (space,)


def _in_blocks(
    model: Architecture, names: list[str], indices: tuple[int, ...]
) -> list[str]:
    blocks = {name: model.block(name) for name in names}
    count = 1 + max((b for b in blocks.values() if b is not None), default=-1)
    if not count:
        return []
    wanted = {i + count if i < 0 else i for i in indices}
    if not wanted <= set(range(count)):
        raise SelectionError(
            f"layers={indices} are not all among the model's {count} blocks, 0 to "
            f"{count - 1}."
        )
    return [name for name in names if blocks[name] in wanted]
