"""A file for what passes leave of examples, where memory has no room for it.

Tensors are appended one after another, at addresses that processors like, and mapped
into memory when they are read. The file has no name once it is open, so that whatever
ends the process frees the disk, too.
"""

import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ntk.factors import Factor, Vector
from ntk.features import Stored, tensors_of
from ntk.storage import StorageError

__all__ = ["FactorFile", "Piece"]

ALIGNMENT = 64
"""Bytes whose multiples tensors begin at, as those in memory do."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file, and where it came from."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Kept:
    """A factor whose tensors are in the file."""

    kind: type[Factor]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """What some examples left of one parameter and map, in the file.

    Attributes:
        what: Features, or the factors of a batch.
        bytes: What it takes in memory.
    """

    what: _Place | list[_Kept]
    bytes: int


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

    @property
    def bytes(self) -> int:
        """What has been written."""
        return self._end

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
        size = sum(tensor.nbytes for tensor in tensors_of(stored))
        if isinstance(stored, Tensor):
            return Piece(self._append(stored), size)
        (batch,) = stored
        kept = [
            _Kept(
                type(factor),
                {name: self._written(value) for name, value in vars(factor).items()},
            )
            for factor in batch
        ]
        return Piece(kept, size)

    def read(self, pieces: Sequence[Piece]) -> Stored:
        """Return what several batches left, as if it had never been in a file.

        Args:
            pieces: In the order of the batches.

        Returns:
            Features ``(c, n, p)`` if all are features, in memory of their own; else
            factors, whose tensors are mapped from the file.
        """
        places = [each.what for each in pieces if isinstance(each.what, _Place)]
        if len(places) == len(pieces):
            return self._joined(places)
        return [
            [Vector(self._mapped(each.what))]
            if isinstance(each.what, _Place)
            else [self._factor(kept) for kept in each.what]
            for each in pieces
        ]

    def _joined(self, places: Sequence[_Place]) -> Tensor:
        """Copy features one batch after another, no more than one of them twice."""
        c, _, p = places[0].shape
        n = sum(place.shape[1] for place in places)
        dtype = places[0].dtype
        for place in places[1:]:
            dtype = torch.promote_types(dtype, place.dtype)
        found = torch.empty(c, n, p, dtype=dtype, device=places[0].device)
        start = 0
        for place in places:
            found[:, start : start + place.shape[1]] = self._mapped(place)
            start += place.shape[1]
        return found

    def _factor(self, kept: _Kept) -> Factor:
        return kept.kind(**{k: self._value(v) for k, v in kept.fields.items()})

    def _value(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._value, value))
        return self._mapped(value) if isinstance(value, _Place) else value

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

    def _mapped(self, place: _Place) -> Tensor:
        """Map a tensor into memory; what is written to it does not go to the file."""
        if not place.shape.numel():
            return torch.empty(place.shape, dtype=place.dtype, device=place.device)
        first = place.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skip = place.start - first
        view = mmap.mmap(
            self._file.fileno(),
            skip + place.bytes,
            access=mmap.ACCESS_COPY,
            offset=first,
        )
        count = place.shape.numel()
        flat = torch.frombuffer(view, dtype=place.dtype, count=count, offset=skip)
        return flat.view(place.shape).to(place.device)

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"{str(self.folder)!r} has no room for what waits to be contracted, "
            f"{self._end / 2**30:.2g} GiB so far ({error.strerror}). Free some, choose "
            "another folder with --output, or use --no-spill, which runs more passes "
            "instead."
        )
