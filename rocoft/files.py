"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
