"""Tangent spaces written as text: ``rows:3@query,value/layers=0,11+bias``.

A space is a name, a count after a colon, patterns after ``@`` and options after
slashes; ``+`` adds spaces. `parse_space` reads what ``str(space)`` writes.

>>> str(parse_space("rows:3@query,value/layers=0,11+bias"))
'rows:3@query,value/layers=0,11+bias'
>>> parse_space("lora:8/alpha=16").alpha
16.0
"""

from typing import Any

from ntk.spaces.kinds import (
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
from rocoft.models import SelectionError, read, split_term

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


OPTIONS = ("layers", "indices", "strategy", "seed", "alpha")


def parse_space(text: str) -> Space:
    """Parse a space.

    Args:
        text: A space in the notation of this module.

    Returns:
        The space.

    Raises:
        SelectionError: If a part of the text is not understood.
    """
    spaces = [_term(part.strip()) for part in text.split("+")]
    total = spaces[0]
    for space in spaces[1:]:
        total = total + space
    return total


def _term(text: str) -> Space:
    name, count, patterns, options = split_term(text)
    if name not in SPACES:
        raise SelectionError(
            f"space {text!r} is unknown: {name!r} is none of {', '.join(SPACES)}. "
            "Write for example rows:3@query,value/layers=0,11+bias."
        )
    whole = f"space {text!r}"
    arguments: dict[str, Any] = {}
    if count is not None:
        field = "rank" if name == "lora" else "count"
        if name not in {"rows", "columns", "lora"}:
            raise SelectionError(f"{whole}: {name!r} takes no number.")
        arguments[field] = read(whole, "number", count)
    for key, value in options:
        if key == "rescale" and not value:
            arguments[key] = True
        elif key in OPTIONS:
            field = "blocks" if key == "layers" else key
            arguments[field] = read(whole, key, value)
        else:
            option = key if value is None else f"{key}={value}"
            raise SelectionError(
                f"{whole}: option {option!r} is none of "
                f"{', '.join(f'{k}=...' for k in OPTIONS)}, rescale."
            )
    if patterns:
        arguments["patterns"] = patterns
    try:
        return SPACES[name](**arguments)
    except TypeError:
        rejected = sorted(set(arguments) - {"patterns", "blocks"})
        raise SelectionError(
            f"{whole}: {name!r} does not take {', '.join(rejected)}."
        ) from None
