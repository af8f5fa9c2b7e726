"""Files that are written whole or not at all, and settings that are kept in them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PART = ".part"
"""How the names of unfinished files and folders end."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and put it there once it is whole.

    Args:
        path: Where to.

    Yields:
        Where to write: an empty file with a name that nobody could know before.
    """
    number, name = tempfile.mkstemp(PART, f".{path.name[:40]}.", path.parent)
    os.close(number)
    part = Path(name)
    try:
        yield part
        # Some libraries make files that are their owner's alone; results are not.
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all.

    Args:
        path: Where to.
        text: What.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill a part of a folder of results beside its place, and put it there when whole.

    The folder itself must be this process's alone, see `rocoft.commands.claimed`.

    Args:
        folder: The place; what is there goes.

    Yields:
        The folder to fill.
    """
    part = Path(tempfile.mkdtemp(PART, f".{folder.name[:40]}.", folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path, start: str = "") -> None:
    """Remove unfinished files that a killed process has left.

    Args:
        folder: A folder that this process alone writes.
        start: How the names of the finished files begin.
    """
    for part in folder.glob(f".{start}*{PART}"):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Return what differs between stored and given settings, as text; "" if nothing.

    Args:
        stored: The settings in a file.
        given: The settings now.
    """
    return "; ".join(
        f"{key} {stored.get(key)} there, {given[key]} now"
        for key in given
        if stored.get(key) != given[key]
    )
