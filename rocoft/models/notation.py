"""The grammar that spaces and methods share: ``name:count@patterns/option=value``.

>>> term = split_term("rows:3@query,value/layers=0,11")
>>> term.name, term.number, term.patterns, term.options
('rows', '3', ('query', 'value'), (('layers', '0,11'),))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rocoft.models.architecture import SelectionError


class Term(NamedTuple):
    """One term of a sum, its parts as text.

    Attributes:
        name: The name, such as ``rows``.
        number: What follows the colon; None without a colon.
        patterns: What follows ``@``, cut at commas.
        options: What follows slashes: keys and values; None without ``=``.
    """

    name: str
    number: str | None
    patterns: tuple[str, ...]
    options: tuple[tuple[str, str | None], ...]


def split_term(text: str) -> Term:
    """Cut a term into its parts.

    Args:
        text: The term.

    Returns:
        The parts.
    """
    start, *options = text.split("/")
    start, _, patterns = start.partition("@")
    name, colon, count = start.partition(":")
    pairs = []
    for option in options:
        key, equals, value = option.partition("=")
        pairs.append((key, value if equals else None))
    return Term(
        name,
        count if colon else None,
        tuple(patterns.split(",")) if patterns else (),
        tuple(pairs),
    )


def integers(text: str) -> tuple[int, ...]:
    """Read whole numbers between commas.

    Args:
        text: The numbers.

    Returns:
        The numbers.
    """
    return tuple(int(part) for part in text.split(","))


READERS: dict[str, Callable[[str], Any]] = {
    "number": int,
    "layers": integers,
    "indices": integers,
    "strategy": str,
    "seed": int,
    "alpha": float,
}
"""How the count and the value of each option are read."""


def read(whole: str, key: str, value: str | None) -> Any:
    """Return the value of an option.

    Args:
        whole: What the option is part of, for the error, such as ``space 'rows:x'``.
        key: A key of `READERS`.
        value: The value as text.

    Returns:
        The value.

    Raises:
        SelectionError: If the text is no such value.
    """
    try:
        return READERS[key](value or "")
    except ValueError:
        raise SelectionError(f"{whole}: {key} cannot be {value or ''!r}.") from None
