"""Tangent spaces written as text: ``rows:3@query,value/layers=0,11+bias``.

A space is a name, a count after a colon, patterns after ``@`` and options after
slashes; ``+`` adds spaces. `parse_space` reads what ``str(space)`` writes.

>>> str(parse_space("rows:3@query,value/layers=0,11+bias"))
'rows:3@query,value/layers=0,11+bias'
>>> parse_space("lora:8/alpha=16").alpha
16.0
"""

from collections.abc import Callable
from typing import Any

from ntk.spaces import (
    Bias,
    Columns,
    Embeddings,
    Full,
    Head,
    LoRA,
    Norm,
    Rows,
    Space,
)
from rocoft.architecture import SelectionError

SPACES: dict[str, type[Space]] = {
    "full": Full,
    "rows": Rows,
    "columns": Columns,
    "lora": LoRA,
    "bias": Bias,
    "head": Head,
    "norm": Norm,
    "embeddings": Embeddings,
}


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


OPTIONS: dict[str, Callable[[str], Any]] = {
    "layers": _integers,
    "indices": _integers,
    "strategy": str,
    "seed": int,
    "alpha": float,
}


def parse_space(text: str) -> Space:
    """Read a space.

    Args:
        text: As this module describes.

    Returns:
        The space.

    Raises:
        SelectionError: If a part of the text has no meaning.
    """
    spaces = [_term(part.strip()) for part in text.split("+")]
    total = spaces[0]
    for space in spaces[1:]:
        total = total + space
    return total


def _term(text: str) -> Space:
    start, *options = text.split("/")
    start, _, patterns = start.partition("@")
    name, colon, count = start.partition(":")
    if name not in SPACES:
        raise SelectionError(
            f"space {text!r} is unknown: {name!r} is none of {', '.join(SPACES)}. "
            "Write for example rows:3@query,value/layers=0,11+bias."
        )
    arguments: dict[str, Any] = {}
    if colon:
        field = "rank" if name == "lora" else "count"
        if name not in {"rows", "columns", "lora"}:
            raise SelectionError(f"space {text!r}: {name!r} takes no number.")
        arguments[field] = _value(text, "number", int, count)
    for option in options:
        key, _, value = option.partition("=")
        if key == "rescale" and not value:
            arguments[key] = True
        elif key in OPTIONS:
            field = "blocks" if key == "layers" else key
            arguments[field] = _value(text, key, OPTIONS[key], value)
        else:
            raise SelectionError(
                f"space {text!r}: option {option!r} is none of "
                f"{', '.join(f'{k}=...' for k in OPTIONS)}, rescale."
            )
    if patterns:
        arguments["patterns"] = tuple(patterns.split(","))
    try:
        return SPACES[name](**arguments)
    except TypeError:
        odd = sorted(set(arguments) - {"patterns", "blocks"})
        raise SelectionError(
            f"space {text!r}: {name!r} does not take {', '.join(odd)}."
        ) from None


def _value(text: str, key: str, kind: Callable[[str], Any], value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise SelectionError(f"space {text!r}: {key} cannot be {value!r}.") from None
