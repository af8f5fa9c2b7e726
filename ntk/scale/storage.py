"""Kernels on disk: safetensors with a JSON header, written atomically."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocoft.commands import replacing

FORMAT = "ntk-kernels-1"
AXES = "(n, m, c, d): K[i, j] is the c x c block of two examples; (n, m) if reduced"


class StorageError(OSError):
    """A file of kernels cannot be written or read."""


def save_kernels(
    path: Path, kernels: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write kernels and their description.

    Args:
        path: The file, replaced if it exists.
        kernels: ``(n, m, c, d)`` or ``(n, m)`` by name.
        header: Description of the kernels (model, task, split, spaces, readout,
            versions), in values that JSON can represent.
    """
    tensors = {
        name: k.detach().cpu().contiguous().clone() for name, k in kernels.items()
    }
    described = {"format": FORMAT, "axes": AXES, **header}
    text = json.dumps({**described, "digest": _digest(tensors, described)})
    _replace(path, lambda part: save_file(tensors, part, metadata={"ntk": text}))


def load_kernels(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read kernels and their description.

    Args:
        path: A file that `save_kernels` wrote.

    Returns:
        The kernels by name, and the header.

    Raises:
        StorageError: If the file is damaged or holds no kernels.
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
            kernels = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        raise StorageError(f"{str(path)!r} is damaged: {error}.") from error
    # Files of earlier versions have no digest.
    expected = header.pop("digest", None)
    if expected is not None and expected != _digest(kernels, header):
        raise StorageError(
            f"{str(path)!r} is damaged: its values are not those that were written."
        )
    return kernels, header


def _digest(kernels: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return a digest of kernels and of their description."""
    digest = hashlib.blake2b(digest_size=20)
    # JSON has no tuples: what is written is read as lists.
    digest.update(json.dumps(header, sort_keys=True).encode())
    for name, kernel in sorted(kernels.items()):
        digest.update(f"{name} {kernel.dtype} {tuple(kernel.shape)}".encode())
        if kernel.numel():
            digest.update(kernel.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    _replace(path, lambda part: part.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically; failures become `StorageError`."""
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
    """Return a value for JSON, with None in place of numbers that are not finite.

    Args:
        value: Mappings, lists, strings and numbers, nested.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
