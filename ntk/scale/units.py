"""Amounts of memory as text. Does not import torch."""

import re

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SIZES |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Read an amount of memory.

    Args:
        text: A number and its unit, such as ``4GiB`` or ``500 MB``.

    Returns:
        The amount in bytes.

    Raises:
        ValueError: If the text is not an amount, or has no unit.

    >>> parse_bytes("4GiB"), parse_bytes("500 MB")
    (4294967296, 500000000)
    """
    parts = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]i?b?|b)?\s*", text.lower())
    try:
        number = float(parts[1]) if parts else 0.0
    except ValueError:
        number = 0.0
    size = SIZES[parts[2].removesuffix("b")] if parts and parts[2] else 1
    if parts is None or number * size < 1:
        raise ValueError(f"{text!r} is no amount of memory. Write for example 4GiB.")
    if parts[2] is None:
        raise ValueError(
            f"{text!r} has no unit, so it could mean bytes or GiB. Write for example "
            f"{parts[1]}GiB."
        )
    return int(number * size)


def in_units(amount: float) -> str:
    """Return an amount of memory as text.

    Args:
        amount: The amount in bytes.

    >>> in_units(1.5 * 2**30)
    '1.5 GiB'
    """
    for unit in ("GiB", "MiB"):
        size = SIZES[unit[:2].lower()]
        if amount >= size:
            return f"{amount / size:.3g} {unit}"
    return f"{amount / 2**10:.3g} KiB"
