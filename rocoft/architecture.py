"""What a model is made of: linear weights, transformer blocks and the head.

Selections speak of rows (output features), columns (input features), layers and
heads; models store weights in two orientations, fuse query, key and value in several
layouts and name everything differently. This file is the only one that knows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class SelectionError(ValueError):
    """A selection of parameters that matches nothing or cannot be made."""


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
    parts: tuple[tuple[int, ...], ...]


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """Return every linear weight of the model, adapters' own matrices excepted.

    Args:
        model: Any module. Shared weights appear once, under their first name.

    Returns:
        The weights in the order of the model's parameters.
    """
    config = getattr(_transformer(model)[1], "config", None)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for path, module in model.named_modules():
        if "lora_" in path:
            continue
        if isinstance(module, nn.MultiheadAttention):
            weight, output_dim = module.in_proj_weight, 0
        elif isinstance(module, nn.Linear):
            weight, output_dim = module.weight, 0
        elif isinstance(module, Conv1D):
            weight, output_dim = module.weight, 1
        else:
            continue
        if id(weight) not in names or weight.ndim != 2:
            continue
        outputs, inputs = weight.shape[output_dim], weight.shape[1 - output_dim]
        found[names[id(weight)]] = LinearWeight(
            names[id(weight)],
            path,
            outputs,
            inputs,
            output_dim,
            _fused_parts(path, module, config, outputs),
        )
    return [found[name] for name in names.values() if name in found]


def default_targets(model: nn.Module) -> list[LinearWeight]:
    """Return the linear weights that row, column and LoRA selections take by default.

    Args:
        model: Any module.

    Returns:
        The linear weights inside the transformer blocks; where a model has no
        blocks, all its linear weights but the head's.
    """
    head = set(head_parameters(model))
    weights = [w for w in linear_weights(model) if w.name not in head]
    inside = [w for w in weights if block_index(model, w.name) is not None]
    return inside or weights


def head_parameters(model: nn.Module) -> list[str]:
    """Return the names of the head's parameters.

    Args:
        model: Any module.

    Returns:
        For a transformers model all parameters outside its base model (none if the
        model has no head); for any other module those of its last linear layer.
        Parameters tied to the base model belong to the base model.
    """
    prefix, transformer = _transformer(model)
    if transformer is not None:
        body = {id(p) for p in transformer.base_model.parameters()}
        return [n for n, p in model.named_parameters() if id(p) not in body]
    last = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not last:
        return []
    return [n for n, _ in model.named_parameters() if n.startswith(f"{last[-1]}.")]


def norm_parameters(model: nn.Module) -> list[str]:
    """Return the scales and biases of the normalisation layers."""
    return _owned_by(model, lambda module: "norm" in type(module).__name__.lower())


def embedding_parameters(model: nn.Module) -> list[str]:
    """Return the embedding tables and learned position or class tokens."""
    tables = set(_owned_by(model, lambda module: isinstance(module, nn.Embedding)))
    return [
        name
        for name, _ in model.named_parameters()
        if name in tables
        or name.rsplit(".", 1)[-1].endswith(("_token", "_embedding", "_embeddings"))
    ]


def bias_parameters(model: nn.Module) -> list[str]:
    """Return every bias vector, those of normalisation layers included."""
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rsplit(".", 1)[-1].endswith("bias") and parameter.ndim == 1
    ]


def block_index(model: nn.Module, name: str) -> int | None:
    """Return the index of the transformer block that a parameter lies in.

    Args:
        model: The model.
        name: Name of a parameter or module.

    Returns:
        The index in the outermost `nn.ModuleList` on the path, or None outside of
        any. Encoder and decoder blocks of the same depth share an index.
    """
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return int(part)
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return None


def match(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any pattern.

    Args:
        names: Dotted names of parameters.
        patterns: Each is a run of whole name components (`"query"`,
            `"attention.self"`, a full parameter name) or a glob over the full name
            (`"*.layer.?.attention*"`).

    Returns:
        The matching names in their order.

    Raises:
        SelectionError: If a pattern matches no name.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [n for n in names if f".{pattern}." in f".{n}." or fnmatchcase(n, pattern)]
        if not hits:
            endings = sorted({p for n in names for p in n.split(".") if not p.isdigit()})
            raise SelectionError(
                f"module pattern {pattern!r} matches none of the {len(names)} "
                f"parameters it could select. Their names are made of: "
                f"{', '.join(endings)}."
            )
        chosen.update(hits)
    return [n for n in names if n in chosen]


def _transformer(model: nn.Module) -> tuple[str, PreTrainedModel | None]:
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return path, module
    return "", None


def _owned_by(model: nn.Module, wanted: Any) -> list[str]:  # noqa: ANN401
    owned = {
        id(parameter)
        for module in model.modules()
        if wanted(module)
        for parameter in module.parameters(recurse=False)
    }
    return [name for name, p in model.named_parameters() if id(p) in owned]


def _fused_parts(
    path: str, module: nn.Module, config: Any, outputs: int  # noqa: ANN401
) -> tuple[tuple[int, ...], ...]:
    """Return the output features of query, key and value, or one part for all."""
    whole = (tuple(range(outputs)),)
    name = path.rsplit(".", 1)[-1]
    if isinstance(module, nn.MultiheadAttention):
        return _consecutive([outputs // 3] * 3)
    if config is None:
        return whole
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return whole
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if name == "query_key_value":
        return _interleaved(config, heads, outputs) or whole
    if name in {"c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj"}:
        if getattr(config, "multi_query", False):
            key_heads = 1
        if outputs % (heads + 2 * key_heads):
            return whole
        width = outputs // (heads + 2 * key_heads)
        return _consecutive([heads * width, key_heads * width, key_heads * width])
    return whole


def _interleaved(
    config: Any, heads: int, outputs: int  # noqa: ANN401
) -> tuple[tuple[int, ...], ...] | None:
    """Split the Bloom, GPT-NeoX and Falcon layouts, where each head holds q, k, v.

    Falcon shares keys and values: its groups hold several queries, one key and one
    value (new decoder), or one group holds all queries (multi-query).
    """
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
    slots = [range(queries), range(queries, queries + 1), range(queries + 1, queries + 2)]
    return tuple(
        tuple(
            (group * (queries + 2) + slot) * width + feature
            for group in range(groups)
            for slot in part
            for feature in range(width)
        )
        for part in slots
    )


def _consecutive(sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    def ranges() -> Iterator[tuple[int, ...]]:
        start = 0
        for size in sizes:
            yield tuple(range(start, start + size))
            start += size

    return tuple(ranges())
