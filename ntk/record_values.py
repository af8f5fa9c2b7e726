"""Values of a record: what it lacks, and what is None in it, is NaN and a dash.

A record is a plain dictionary as JSON knows it, that of `evaluation.evaluate`.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

Record = Mapping[str, Any]

DASH = "–"
SECTIONS = ("reference", "requested", "control")
"""Roles of spaces in the order in which they are shown."""


def spaces_of(record: Record) -> list[Record]:
    """Return the spaces: the reference, then the requested ones, then controls.

    Args:
        record: Of one evaluation.
    """
    order = {role: i for i, role in enumerate(SECTIONS)}
    spaces = record.get("spaces") or []
    return sorted(spaces, key=lambda s: order.get(s.get("role"), len(order)))


def reference_of(record: Record) -> Record | None:
    """Return the space that others are compared with, if there is one.

    Args:
        record: Of one evaluation.
    """
    return next((s for s in spaces_of(record) if s.get("role") == SECTIONS[0]), None)


def label_of(space: Record) -> str:
    """Return what a space is called.

    Args:
        space: Of a record.
    """
    return str(space.get("label") or space.get("name"))


def number(values: object, path: str) -> float:
    """Return a number from within dictionaries, NaN if it is not there.

    Args:
        values: Dictionaries of dictionaries.
        path: Their keys, with dots between.
    """
    for key in path.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, Real) else math.nan


def shown(value: float, form: str) -> str:
    """Return a number as text, a dash if it is none.

    Args:
        value: The number.
        form: As `format` knows it.
    """
    return format(value, form) if math.isfinite(value) else DASH
