"""Values of a comparison's JSON record; missing ones and None are NaN or a dash."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

Record = Mapping[str, Any]

DASH = "–"
SECTIONS = ("reference", "requested", "control")
"""Roles of spaces in display order."""


def spaces_of(record: Record) -> list[Record]:
    """Return the spaces: the reference, then the requested ones, then controls.

    Args:
        record: The record of a comparison.
    """
    order = {role: i for i, role in enumerate(SECTIONS)}
    spaces = record.get("spaces") or []
    return sorted(spaces, key=lambda s: order.get(s.get("role"), len(order)))


def reference_of(record: Record) -> Record | None:
    """Return the space that others are compared with, or None.

    Args:
        record: The record of a comparison.
    """
    return next((s for s in spaces_of(record) if s.get("role") == SECTIONS[0]), None)


def label_of(space: Record) -> str:
    """Return the label of a space, or its name if it has none.

    Args:
        space: A space of a record.
    """
    return str(space.get("label") or space.get("name"))


def number_at(values: object, path: str) -> float:
    """Return a nested number; NaN if it is missing.

    Args:
        values: Nested dictionaries.
        path: Dotted path of keys.
    """
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, Real) else math.nan


def shown(value: float, spec: str) -> str:
    """Return a number as text; a dash if it is not finite.

    Args:
        value: The number.
        spec: Format specification of the built-in `format`.
    """
    return format(value, spec) if math.isfinite(value) else DASH
