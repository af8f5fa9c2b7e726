"""Plans a file of features and factors, if the disk has room for it.

Without a file, every part of a computation runs its own passes over all examples. With
one, all parts share the passes: their features and factors are written once, and each
part reads its own.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from ntk.gradients import Batch, batch_length, take
from ntk.scale.factor_file import FactorFile
from ntk.scale.parts import PassSize, count_positions

__all__ = ["SpillPlan", "room_on_disk"]

DISK_SHARE = 0.8
"""Share of a disk's free space that the file may take."""


@dataclass(frozen=True)
class SpillPlan:
    """A file of features and factors, which saves further passes.

    Attributes:
        folder: Folder of the file.
        bytes: Size of the file.
        examples: Largest number of examples in a pass; batches whose factors do not fit
            into memory are cut to it.
        held: Memory that a pass takes until it is written, in bytes.
    """

    folder: Path
    bytes: int
    examples: int
    held: int

    @classmethod
    def of(
        cls,
        folder: Path,
        batches: Sequence[Batch],
        size: PassSize,
        size_of: Callable[[PassSize], int],
        room: int,
    ) -> "SpillPlan | None":
        """Plan a file, if one example fits into memory and the file on the disk.

        Args:
            folder: Folder of the file, created if missing.
            batches: The left examples.
            size: The size of a pass over all of them.
            size_of: Returns the bytes that a pass of some size keeps.
            room: Memory that a pass may take, in bytes.

        Returns:
            The plan of the file; None if there can be none.
        """
        one = max(size_of(replace(size, **_one_example(batch))) for batch in batches)
        if one > room:
            return None
        longest = max(map(batch_length, batches))
        examples = min(longest, 1 << (room // one).bit_length() - 1)
        plan = cls(folder, size_of(size), examples, examples * one)
        if not plan.fits(folder):
            return None
        try:
            with FactorFile(folder):
                return plan
        except OSError:
            return None

    def fits(self, folder: Path) -> bool:
        """Return whether a folder's disk has room for the file.

        Args:
            folder: Any folder, existing or not.
        """
        return self.bytes <= DISK_SHARE * room_on_disk(folder)


def room_on_disk(folder: Path) -> int:
    """Return the free bytes of a folder's disk, 0 for a file system in memory.

    Args:
        folder: Any folder; if it does not exist, its nearest existing parent counts.
    """
    path = folder.resolve()
    existing = [parent for parent in (path, *path.parents) if parent.exists()]
    mounts = {Path(p.mountpoint): p for p in psutil.disk_partitions(all=True)}
    mount = next((mounts[parent] for parent in existing if parent in mounts), None)
    if mount is not None and (
        mount.fstype in {"tmpfs", "ramfs"}
        or mount.device.startswith(("/dev/ram", "/dev/zram"))
    ):
        return 0
    return shutil.disk_usage(existing[0]).free


def _one_example(batch: Batch) -> dict[str, int]:
    """Return the size of a pass over one example of a batch, with its padding."""
    return {"examples": 1, "positions": count_positions(take(batch, slice(0, 1)))}
