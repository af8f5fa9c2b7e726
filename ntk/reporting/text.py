"""Values as text."""

from collections.abc import Mapping
from numbers import Real

from jinja2 import ChainableUndefined

from ntk.reporting.values import number_at, shown


def flat(value: object) -> str:
    """Return nested dictionaries and lists as one line of text.

    Args:
        value: A JSON value.
    """
    if isinstance(value, Mapping):
        parts = ((k, flat(v)) for k, v in value.items() if v not in (None, "", []))
        return ", ".join(f"{k} {text}" for k, text in parts)
    if isinstance(value, list):
        return f"({', '.join(map(flat, value))})"
    return as_text(value) if isinstance(value, float) else str(value)


def as_text(value: object) -> str:
    """Return a value as text; floats have four significant digits.

    Args:
        value: A JSON value.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Real | None | ChainableUndefined):
        return shown(number_at({"": value}, ""), ".4g")
    return str(value)
