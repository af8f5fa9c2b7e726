"""The structure of a model: linear weights, transformer blocks and the head.

Selections are made by rows (output features), columns (input features), layers and the
head. Models store weights in two orientations, fuse query, key and value in several
layouts and name everything differently. Only this file knows these details.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class SelectionError(ValueError):
    """A selection of parameters that matches nothing or is impossible."""


NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
"""Normalisation layers, of which subclasses may be named otherwise."""


@dataclass(frozen=True)
class LinearWeight:
    """One weight matrix used as a linear map.

    Attributes:
        name: Name of the parameter.
        module: Name of the module that owns it.
        outputs: Number of output features, the rows.
        inputs: Number of input features, the columns.
        output_dim: Dimension of the stored tensor that holds the output features:
            0 for `nn.Linear`, 1 for transformers' `Conv1D`.
        parts: Output features of each matrix fused in this weight: one range for a
            plain layer, those of query, key and value for a fused projection.
    """

    name: str
    module: str
    outputs: int
    inputs: int
    output_dim: int
    parts: tuple[tuple[int, ...] | range, ...]

    def __hash__(self) -> int:
        """Hash by name: fast, and names seldom collide."""
        return hash(self.name)

    @property
    def narrow_axis(self) -> Literal["row", "column"]:
        """The shorter of a row and a column; a row if they are equally long."""
        return "row" if self.inputs <= self.outputs else "column"


class Architecture:
    """The roles of a model's parameters, computed on first use.

    Args:
        model: Any module. A shared parameter appears under its first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self._modules = dict(model.named_modules())
        self._transformer = next(
            (m for m in self._modules.values() if isinstance(m, PreTrainedModel)), None
        )

    @cached_property
    def linear_weights(self) -> dict[str, LinearWeight]:
        """Every linear weight by name, without LoRA's matrices."""
        config = getattr(self._transformer, "config", None)
        names = {id(p): name for name, p in self.parameters.items()}
        weights = {}
        for path, module in self._modules.items():
            weight, output_dim = _weight(module)
            if ".lora_" in path or weight is None or id(weight) not in names:
                continue
            name = names[id(weight)]
            outputs, inputs = weight.shape[output_dim], weight.shape[1 - output_dim]
            parts = fused_parts(path, module, config, outputs)
            weights[name] = LinearWeight(name, path, outputs, inputs, output_dim, parts)
        return {name: weights[name] for name in self.parameters if name in weights}

    @property
    def name(self) -> str:
        """Class name of the transformers model inside a readout, else of the module."""
        named = self.model if self._transformer is None else self._transformer
        return type(named).__name__

    def output_layer(self, outputs: int) -> tuple[str, nn.Linear] | None:
        """Return the head's last linear layer, with its path.

        Args:
            outputs: Number of its outputs.

        Returns:
            The path and the layer; None if the head has no such layer.
        """
        head = set(self.head)
        last = [
            (path, module)
            for path, module in self._modules.items()
            if isinstance(module, nn.Linear)
            and f"{path}.weight" in head
            and module.out_features == outputs
        ]
        return last[-1] if last else None

    def values(self, name: str) -> Tensor:
        """Return a parameter's values as stored, dequantised if necessary.

        Args:
            name: Name of the parameter.
        """
        weight = self.linear_weights.get(name)
        owner = None if weight is None else self._modules[weight.module]
        base_values: Callable[[], Tensor] | None = getattr(owner, "base_values", None)
        return self.parameters[name] if base_values is None else base_values()

    @cached_property
    def targets(self) -> dict[str, LinearWeight]:
        """The default weights of row, column and LoRA selections.

        The linear weights inside the transformer blocks; in a model without blocks, all
        but the head's.
        """
        head = set(self.head)
        weights = {n: w for n, w in self.linear_weights.items() if n not in head}
        inside = {n: w for n, w in weights.items() if self.block(n) is not None}
        return inside or weights

    @cached_property
    def matrices(self) -> dict[str, int]:
        """Sizes of the parameters in the transformer blocks with two axes or more.

        Those of `targets`, and what selections of linear weights leave out, such as
        experts that are fused into one tensor. Embedding tables are not counted.
        """
        tables = set(self._owned(lambda module: isinstance(module, nn.Embedding)))
        return {
            name: parameter.numel()
            for name, parameter in self.parameters.items()
            if parameter.ndim > 1
            and self.block(name) is not None
            and name not in tables
            and not any(part in name for part in (".lora_", ".rocoft_"))
        }

    def left_out(self, chosen: Collection[str]) -> str | None:
        """Return what a selection of all linear weights in the blocks leaves out.

        Args:
            chosen: Names of the weights that it can adapt.

        Returns:
            A clause for users with the share of `matrices`; None below one percent.
        """
        others = {name: n for name, n in self.matrices.items() if name not in chosen}
        share = sum(others.values()) / max(1, sum(self.matrices.values()))
        if share < 0.01:
            return None
        largest = max(others, key=lambda name: others[name])
        return (
            f"{100 * share:.0f} % of the numbers in the matrices of {self.name}'s "
            f"blocks are not in linear layers that can be adapted: {len(others)} "
            f"parameters such as {largest!r}, "
            f"{tuple(self.parameters[largest].shape)}"
        )

    @cached_property
    def head(self) -> list[str]:
        """Names of the head's parameters.

        In a transformers model, all parameters outside its base model (none if it has
        no head); in any other module, those of the last linear layer. Parameters tied
        to the base model belong to the base model.
        """
        if self._transformer is not None:
            body = {id(p) for p in self._transformer.base_model.parameters()}
            return [n for n, p in self.parameters.items() if id(p) not in body]
        last = [n for n, m in self._modules.items() if isinstance(m, nn.Linear)]
        return [n for n in self.parameters if last and n.startswith(f"{last[-1]}.")]

    @cached_property
    def norms(self) -> list[str]:
        """Names of the scales and biases of normalisation layers."""
        return self._owned(
            lambda module: (
                isinstance(module, NORMS) or "norm" in type(module).__name__.lower()
            )
        )

    @cached_property
    def embeddings(self) -> list[str]:
        """Names of embedding tables and learned position or class tokens."""
        kinds = (nn.Embedding, nn.EmbeddingBag)
        tables = set(self._owned(lambda module: isinstance(module, kinds)))
        endings = ("_token", "_embedding", "_embeddings")
        return [n for n in self.parameters if n in tables or _last(n).endswith(endings)]

    @cached_property
    def biases(self) -> list[str]:
        """Names of all biases, those of normalisation layers and experts included.

        Tables of relative position biases are no bias vectors.
        """
        return [
            name
            for name in self.parameters
            if "bias" in _last(name).split("_") and not _last(name).endswith("table")
        ]

    def block(self, name: str) -> int | None:
        """Return the index of the transformer block that a parameter lies in.

        Args:
            name: Name of a parameter or module.

        Returns:
            The index in the outermost `nn.ModuleList` on the path, or None if there is
            none. Encoder and decoder blocks of the same depth share an index.
        """
        parts = name.split(".")
        for depth, part in enumerate(parts):
            owner = self._modules.get(".".join(parts[:depth]))
            # Parametrised weights lie in a list, too, under names.
            if isinstance(owner, nn.ModuleList) and part.isdigit():
                return int(part)
        return None

    def place(self, name: str) -> str:
        """Return the part of the model that a parameter belongs to.

        Args:
            name: Name of the parameter.

        Returns:
            ``"head"``, ``"layer 0"`` and so on, ``"embeddings"`` or ``"other"``.
        """
        if name in self.head:
            return "head"
        block = self.block(name)
        if block is not None:
            return f"layer {block}"
        return "embeddings" if "embed" in name.lower() else "other"

    def _owned(self, condition: Callable[[nn.Module], bool]) -> list[str]:
        """Return the parameters that modules which meet a condition own directly."""
        owned = {
            id(parameter)
            for module in self._modules.values()
            if condition(module)
            for parameter in module.parameters(recurse=False)
        }
        return [name for name, p in self.parameters.items() if id(p) in owned]


def match(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any pattern.

    Args:
        names: Dotted names of parameters.
        patterns: Consecutive whole components of a name (`"query"`,
            `"attention.self"`, a full parameter name), or globs for the full name
            (`"*.layer.?.attention*"`).

    Returns:
        The matching names in their order.

    Raises:
        SelectionError: If a pattern matches no name.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [
            n for n in names if f".{pattern}." in f".{n}." or fnmatchcase(n, pattern)
        ]
        if not hits:
            components = sorted(
                {p for n in names for p in n.split(".") if not p.isdigit()}
            )
            raise SelectionError(
                f"module pattern {pattern!r} matches none of the {len(names)} "
                f"parameters it could select. Components of their names: "
                f"{', '.join(components)}."
            )
        chosen.update(hits)
    return [n for n in names if n in chosen]


def _weight(module: nn.Module) -> tuple[Tensor | None, int]:
    """Return a linear module's weight and the dimension of its output features."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight, 0
    if isinstance(module, nn.Linear) or hasattr(module, "base_values"):
        assert isinstance(module.weight, Tensor)
        return module.weight, 0
    if isinstance(module, Conv1D):
        return module.weight, 1
    return None, 0


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def fused_parts(
    path: str,
    module: nn.Module,
    config: Any,
    outputs: int,
) -> tuple[tuple[int, ...] | range, ...]:
    """Return the output features of query, key and value, or one part for all."""
    whole = (range(outputs),)
    # peft keeps the layer that it wraps as base_layer.
    name = _last(path.removesuffix(".base_layer"))
    kind = getattr(config, "model_type", "")
    if isinstance(module, nn.MultiheadAttention):
        return _consecutive([outputs // 3] * 3)
    if config is None:
        return whole
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return whole
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    by_head = kind == "gpt_bigcode" and not getattr(config, "multi_query", True)
    if name == "query_key_value" or by_head or (kind, name) == ("deberta", "in_proj"):
        return _interleaved(config, heads, outputs) or whole
    if kind == "codegen":
        # Its layout follows the device mesh that it was trained on.
        return whole
    if name in {"c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj"}:
        if getattr(config, "multi_query", False):
            key_heads = 1
        if outputs % (heads + 2 * key_heads):
            return whole
        width = outputs // (heads + 2 * key_heads)
        return _consecutive([heads * width, key_heads * width, key_heads * width])
    return whole


def _interleaved(
    config: Any,
    heads: int,
    outputs: int,
) -> tuple[tuple[int, ...], ...] | None:
    """Split the layouts of Bloom, GPT-NeoX and Falcon: q, k, v head by head."""
    # Falcon shares keys and values: a group holds several queries, one key and one
    # value (new decoder), or one group holds all queries (multi-query).
    if getattr(config, "new_decoder_architecture", False):
        groups = getattr(config, "num_kv_heads", heads)
    elif getattr(config, "multi_query", False):
        groups = 1
    else:
        groups = heads
    queries = heads // groups
    if outputs % (groups * (queries + 2)):
        return None
    width = outputs // (groups * (queries + 2))
    slots = [
        range(queries),
        range(queries, queries + 1),
        range(queries + 1, queries + 2),
    ]
    return tuple(
        tuple(
            (group * (queries + 2) + slot) * width + feature
            for group in range(groups)
            for slot in part
            for feature in range(width)
        )
        for part in slots
    )


def _consecutive(sizes: Sequence[int]) -> tuple[range, ...]:
    ends = [0, *accumulate(sizes)]
    return tuple(range(a, b) for a, b in pairwise(ends))


def order_of_place(place: str) -> tuple[int, int]:
    """Return a sort key that orders places from the input to the output.

    Args:
        place: A place from `Architecture.place`.
    """
    if place.startswith("layer "):
        return (1, int(place.removeprefix("layer ")))
    return ({"embeddings": 0, "other": 2, "head": 3}[place], 0)
