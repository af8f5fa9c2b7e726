"""Kernels on disk: safetensors with a JSON header, written whole or not at all."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocoft.files import replacing

FORMAT = "ntk-kernels-1"
AXES = "(n, m, c, d): K[i, j] is the c x c block of two examples; (n, m) if reduced"


class StorageError(OSError):
    """A file of kernels that cannot be written, or is not one."""


def save_kernels(
    path: Path, kernels: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write kernels and what they are.

    Args:
        path: The file, replaced if it exists.
        kernels: ``(n, m, c, d)`` or ``(n, m)`` by name.
        header: What the kernels are of (model, task, split, spaces, readout,
            versions), in values that JSON knows.
    """
    text = json.dumps({"format": FORMAT, "axes": AXES, **header})
    tensors = {
        name: k.detach().cpu().contiguous().clone() for name, k in kernels.items()
    }
    _replace(path, lambda part: save_file(tensors, part, metadata={"ntk": text}))


def load_kernels(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read kernels and what they are.

    Args:
        path: A file that `save_kernels` wrote.

    Returns:
        The kernels by name, and the header.

    Raises:
        StorageError: If the file is not one of kernels.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("ntk")
            header = json.loads(text) if text else {}
            if header.get("format") != FORMAT:
                raise StorageError(
                    f"{str(path)!r} holds no kernels: its format is "
                    f"{header.get('format')!r}, not {FORMAT!r}."
                )
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise StorageError(f"{str(path)!r} is damaged: {error}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    _replace(path, lambda part: part.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all, or say why not."""
    try:
        with replacing(path) as part:
            write(part)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"{str(path)!r} could not be written: {reason}. Make room, or choose "
            "another folder with --output."
        ) from error


def finite(value: Any) -> Any:
    """Return a value that JSON knows, with None for numbers that are not finite.

    Args:
        value: Mappings, lists, texts and numbers.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
