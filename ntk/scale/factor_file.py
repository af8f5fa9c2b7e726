"""A file for features and factors that do not fit into memory.

Tensors are appended at aligned offsets. Each read maps the file once; only pages that
are accessed take memory, until the last tensor of the read is released. The file is
unlinked once it is open, so the disk space is freed however the process ends.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ntk.gradients import Factor, Vector
from ntk.kernels import Stored
from ntk.scale.storage import StorageError

__all__ = ["FactorFile", "Piece"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ALIGNMENT = 64
"""Alignment of tensors in the file in bytes, that of tensors in memory."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Position, shape, dtype and original device of a tensor in the file."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _StoredFactor:
    """A factor whose tensors are in the file."""

    kind: type[Factor]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Features or factors of one batch, parameter and map in the file.

    Attributes:
        content: The features, or the factors of the batch.
    """

    content: _Place | list[_StoredFactor]

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """Bytes of each tensor, by its start and size, which shared tensors repeat."""
        fields = (
            [self.content]
            if isinstance(self.content, _Place)
            else [value for stored in self.content for value in stored.fields.values()]
        )
        values = (
            value
            for field in fields
            for value in (field if isinstance(field, tuple) else (field,))
        )
        places = (value for value in values if isinstance(value, _Place))
        return {(place.start, place.bytes): place.bytes for place in places}


class FactorFile:
    """Keeps features and factors on disk, batch by batch, until they are contracted.

    Args:
        folder: Folder of the file, created if missing. It must be on a real disk: a
            file system in memory would save nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._end = 0
        self._shared: dict[tuple[object, ...], tuple[Tensor, _Place]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> "FactorFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shared.clear()
        self._file.close()

    def begin(self) -> None:
        """Start a batch, which shares no tensors with the previous one."""
        self._shared.clear()

    def write(self, stored: Stored) -> Piece:
        """Append a batch's features or factors of one parameter and map.

        Args:
            stored: ``(c, n, p)`` features, or the factors of one batch.

        Returns:
            The piece to pass to `read`.

        Raises:
            StorageError: If the file cannot be written, such as on a full disk.
        """
        if isinstance(stored, Tensor):
            return Piece(self._append(stored))
        (batch,) = stored
        factors = [
            _StoredFactor(
                type(factor),
                {name: self._written(value) for name, value in vars(factor).items()},
            )
            for factor in batch
        ]
        return Piece(factors)

    def read(self, pieces: Sequence[Piece]) -> Stored:
        """Read back the features or factors of several batches.

        Args:
            pieces: The pieces in the order of the batches.

        Returns:
            Features ``(c, n, p)`` in memory, if all pieces are features; else factors,
            whose tensors are mapped from the file.
        """
        view = self._view()
        contents = [piece.content for piece in pieces]
        places = [content for content in contents if isinstance(content, _Place)]
        if len(places) == len(pieces):
            return _joined(places, view)
        return [
            [Vector(_mapped(content, view))]
            if isinstance(content, _Place)
            else [_factor(stored, view) for stored in content]
            for content in contents
        ]

    def _view(self) -> mmap.mmap | None:
        """Map the whole file, copy-on-write."""
        try:
            file = self._file.fileno()
            size = os.fstat(file).st_size
            return mmap.mmap(file, size, access=mmap.ACCESS_COPY) if size else None
        except (OSError, ValueError) as error:
            raise StorageError(
                f"the file of features and factors in {str(self.folder)!r} cannot be "
                f"read: {error}. Use --no-spill, which runs more passes instead."
            ) from error

    def _written(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._append(tensor) for tensor in value)
        if not isinstance(value, Tensor):
            return value
        # Layers such as query, key and value share their input: write it once.
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in self._shared:
            self._shared[key] = value, self._append(value)
        return self._shared[key][1]

    def _append(self, tensor: Tensor) -> _Place:
        self._end += -self._end % ALIGNMENT
        place = _Place(self._end, tensor.shape, tensor.dtype, tensor.device)
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            data = memoryview(flat.view(torch.uint8).numpy().data)
            try:
                self._file.seek(place.start)
                while data:
                    data = data[self._file.write(data) :]
            except OSError as error:
                raise self._failed(error) from error
        self._end += place.bytes
        return place

    def _failed(self, error: OSError) -> StorageError:
        if error.errno in FULL:
            return StorageError(
                f"{str(self.folder)!r} has no room for the file of features and "
                f"factors, {self._end / 2**30:.2g} GiB so far. Free some space, choose "
                "another folder with --output, or use --no-spill, which runs more "
                "passes instead."
            )
        return StorageError(
            f"no file for features and factors in {str(self.folder)!r}: "
            f"{error.strerror}. Choose another folder with --output, or use "
            "--no-spill, which runs more passes instead."
        )


def _joined(places: Sequence[_Place], view: mmap.mmap | None) -> Tensor:
    """Concatenate the features of batches in memory."""
    c, _, p = places[0].shape
    n = sum(place.shape[1] for place in places)
    dtype = places[0].dtype
    for place in places[1:]:
        dtype = torch.promote_types(dtype, place.dtype)
    features = torch.empty(c, n, p, dtype=dtype, device=places[0].device)
    start = 0
    for place in places:
        features[:, start : start + place.shape[1]] = _mapped(place, view)
        start += place.shape[1]
    return features


def _factor(stored: _StoredFactor, view: mmap.mmap | None) -> Factor:
    def value(field: Any) -> Any:
        if isinstance(field, tuple):
            return tuple(map(value, field))
        return _mapped(field, view) if isinstance(field, _Place) else field

    fields = {name: value(field) for name, field in stored.fields.items()}
    return stored.kind(**fields)


def _mapped(place: _Place, view: mmap.mmap | None) -> Tensor:
    """Return a tensor backed by the mapped file; on a GPU a copy."""
    count = place.shape.numel()
    if not count or view is None:
        return torch.empty(place.shape, dtype=place.dtype, device=place.device)
    flat = torch.frombuffer(view, dtype=place.dtype, count=count, offset=place.start)
    return flat.view(place.shape).to(place.device)
