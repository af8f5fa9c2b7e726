"""A file for what passes leave of examples, where memory has no room for it.

Tensors are appended one after another, at addresses that processors like. Reading maps
the file once for all that is asked for, and takes the memory of what is looked at; that
goes with the last tensor. The file has no name once it is open, so that whatever ends
the process frees the disk, too.
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

from ntk.factors import Factor, Vector
from ntk.features import Stored
from ntk.storage import StorageError

__all__ = ["FactorFile", "Piece"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ALIGNMENT = 64
"""Bytes whose multiples tensors begin at, as those in memory do."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in the file, and where it came from."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Kept:
    """A factor whose tensors are in the file."""

    kind: type[Factor]
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """What some examples left of one parameter and map, in the file.

    Attributes:
        what: Features, or the factors of a batch.
    """

    what: _Place | list[_Kept]

    @property
    def sizes(self) -> dict[tuple[int, int], int]:
        """What each of its tensors takes (bytes), by its place, which several share."""
        fields = (
            [self.what]
            if isinstance(self.what, _Place)
            else [value for kept in self.what for value in kept.fields.values()]
        )
        several = (f if isinstance(f, tuple) else (f,) for f in fields)
        places = (each for some in several for each in some if isinstance(each, _Place))
        return {(place.start, place.bytes): place.bytes for place in places}


class FactorFile:
    """Keeps features and factors, of a batch at a time, until they are contracted.

    Args:
        folder: Of the file, made if it is not there. To be on a disk: a file system in
            memory would take what there is no room for.
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
        """Begin with a batch, whose factors share no tensors with the one before."""
        self._shared.clear()

    def write(self, stored: Stored) -> Piece:
        """Append what a batch left of one parameter and map.

        Args:
            stored: ``(c, n, p)`` features, or the factors of one batch.

        Returns:
            What `read` reads.

        Raises:
            StorageError: If the disk is full.
        """
        if isinstance(stored, Tensor):
            return Piece(self._append(stored))
        (batch,) = stored
        kept = [
            _Kept(
                type(factor),
                {name: self._written(value) for name, value in vars(factor).items()},
            )
            for factor in batch
        ]
        return Piece(kept)

    def read(self, pieces: Sequence[Piece]) -> Stored:
        """Return what several batches left, as if it had never been in a file.

        Args:
            pieces: In the order of the batches.

        Returns:
            Features ``(c, n, p)`` if all are features, in memory of their own; else
            factors, whose tensors are mapped from the file.
        """
        view = self._view()
        places = [each.what for each in pieces if isinstance(each.what, _Place)]
        if len(places) == len(pieces):
            return _joined(places, view)
        return [
            [Vector(_mapped(each.what, view))]
            if isinstance(each.what, _Place)
            else [_factor(kept, view) for kept in each.what]
            for each in pieces
        ]

    def _view(self) -> mmap.mmap | None:
        """Map the whole file; what is written to the view does not go to the file."""
        try:
            file = self._file.fileno()
            size = os.fstat(file).st_size
            return mmap.mmap(file, size, access=mmap.ACCESS_COPY) if size else None
        except (OSError, ValueError) as error:
            raise StorageError(
                f"what waits to be contracted in {str(self.folder)!r} cannot be read: "
                f"{error}. Use --no-spill, which runs more passes instead."
            ) from error

    def _written(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._append(each) for each in value)
        if not isinstance(value, Tensor):
            return value
        # Inputs are often those of several layers, as of query, key and value.
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
                f"{str(self.folder)!r} has no room for what waits to be contracted, "
                f"{self._end / 2**30:.2g} GiB so far. Free some, choose another folder "
                "with --output, or use --no-spill, which runs more passes instead."
            )
        return StorageError(
            f"no file for what waits to be contracted in {str(self.folder)!r}: "
            f"{error.strerror}. Choose another folder with --output, or use "
            "--no-spill, which runs more passes instead."
        )


def _joined(places: Sequence[_Place], view: mmap.mmap | None) -> Tensor:
    """Copy features one batch after another."""
    c, _, p = places[0].shape
    n = sum(place.shape[1] for place in places)
    dtype = places[0].dtype
    for place in places[1:]:
        dtype = torch.promote_types(dtype, place.dtype)
    found = torch.empty(c, n, p, dtype=dtype, device=places[0].device)
    start = 0
    for place in places:
        found[:, start : start + place.shape[1]] = _mapped(place, view)
        start += place.shape[1]
    return found


def _factor(kept: _Kept, view: mmap.mmap | None) -> Factor:
    def value(field: Any) -> Any:
        if isinstance(field, tuple):
            return tuple(map(value, field))
        return _mapped(field, view) if isinstance(field, _Place) else field

    return kept.kind(**{name: value(field) for name, field in kept.fields.items()})


def _mapped(place: _Place, view: mmap.mmap | None) -> Tensor:
    """Return a tensor whose memory is the file's; on a GPU a copy."""
    count = place.shape.numel()
    if not count or view is None:
        return torch.empty(place.shape, dtype=place.dtype, device=place.device)
    flat = torch.frombuffer(view, dtype=place.dtype, count=count, offset=place.start)
    return flat.view(place.shape).to(place.device)
