"""Files that are written whole or not at all, and settings that are kept in them."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its place, and put it there once it is whole.

    Args:
        path: Where to.

    Yields:
        Where to write.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
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


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside its place, and put it there once it is whole.

    Args:
        folder: The place; what is there is removed.

    Yields:
        The folder to fill.

    Raises:
        OSError: If it cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OSError(
            f"{str(folder.parent)!r} cannot be written to: {error.strerror}. Choose "
            "another folder with --output."
        ) from error
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
