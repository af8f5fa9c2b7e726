"""Whether a file takes less time than passes, and what it holds.

Both are about the same kernels in the same parts. Without a file every part runs its
own passes over all examples, forward and back to its lowest layer. With one all parts
share passes, what these leave is written once, and each part reads its own:

    left examples    once for each of the columns that kernels are parted into
    right examples   once more for each group of left ones beside those of a column
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ntk.chunks import ENTRY, Chunk, PassSize, count_positions, kept_entries
from ntk.factor_file import FactorFile
from ntk.function import Batch, batch_length, take
from ntk.rates import Rates, room_on_disk
from rocoft.architecture import Architecture

__all__ = ["SpillPlan", "Work"]

DISK_SHARE = 0.8
"""Share of a disk's free room that a file may take."""


@dataclass(frozen=True)
class SpillPlan:
    """What waits in a file instead of being computed again.

    Attributes:
        folder: Of the file.
        bytes: What the file takes.
        examples: Most examples in a pass: batches are cut smaller if what a whole one
            leaves has no room.
        held: What is held of one pass until it is written, in bytes.
        seconds: About what writing and reading take.
        spared: About what the passes take that are not run again, in seconds.
    """

    folder: Path
    bytes: int
    examples: int
    held: int
    seconds: float
    spared: float

    def fits(self, folder: Path) -> bool:
        """Return whether a folder's disk has room for the file.

        Args:
            folder: Any, there or not.
        """
        return self.bytes <= DISK_SHARE * room_on_disk(folder)


@dataclass(frozen=True)
class Work:
    """What the parts of a computation take.

    Attributes:
        architecture: Of the model.
        batches: The left examples.
        right: How many batches, from the first, are right examples.
        parts: What each part serves.
        columns: How many parts the right examples are in, each for all chunks.
        left_bytes: What is kept of left examples at a time.
    """

    architecture: Architecture
    batches: Sequence[Batch]
    right: int
    parts: Sequence[Chunk]
    columns: int
    left_bytes: int

    def spilled(
        self, folder: Path, size: PassSize, device: torch.device, room: int
    ) -> SpillPlan | None:
        """Plan a file, if there can be one and it takes less time than passes.

        Args:
            folder: Where; made if it is not there.
            size: Of all left examples.
            device: That the model is on.
            room: For what a pass leaves, in bytes.

        Returns:
            The plan of the file; None means passes.
        """
        one = max(self._bytes(replace(size, **_one(batch))) for batch in self.batches)
        if one > room:
            return None
        longest = max(map(batch_length, self.batches))
        examples = min(longest, 1 << (room // one).bit_length() - 1)
        spared = self._spared(size)
        how = SpillPlan(folder, self._bytes(size), examples, examples * one, 0.0, 0.0)
        if not how.fits(folder):
            return None
        try:
            with FactorFile(folder):
                rates = Rates.of(folder, device)
        except OSError:
            return None
        seconds = how.bytes / rates.written + self._read(how.bytes) / rates.read
        how = replace(how, seconds=seconds, spared=spared / rates.multiply_adds)
        return how if how.seconds < how.spared else None

    def _bytes(self, size: PassSize) -> int:
        return ENTRY * kept_entries(self.parts, self.architecture, size)

    def _read(self, written: int) -> float:
        """Return the bytes that all parts read."""
        n = sum(map(batch_length, self.batches))
        m = sum(map(batch_length, self.batches[: self.right]))
        at_a_time = m / self.columns
        right = max(part.entries for part in self.parts) * ENTRY
        beside = right * (n - at_a_time) / at_a_time
        groups = max(1.0, beside / max(1, self.left_bytes)) if beside else 0.0
        return written * (self.columns + groups * m / n)

    def _spared(self, size: PassSize) -> float:
        """Return the multiply-adds of linear layers in all passes but one."""
        numbers = {name: i for i, name in enumerate(self.architecture.parameters)}
        weights = {
            numbers[name]: of.inputs * of.outputs
            for name, of in self.architecture.linear_weights.items()
        }

        def of_pass(part: Chunk) -> float:
            first = min(numbers[name] for maps in part.spaces.values() for name in maps)
            back = sum(cost for i, cost in weights.items() if i >= first)
            return sum(weights.values()) + size.outputs * back

        each = [of_pass(part) for part in self.parts]
        return size.positions * (self.columns * sum(each) - max(each))


def _one(batch: Batch) -> dict[str, int]:
    """Return the size of a pass over one example of a batch, padded as it is there."""
    return {"examples": 1, "positions": count_positions(take(batch, slice(0, 1)))}
