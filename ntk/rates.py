"""What this machine does in a second, by which a plan chooses: measured, kept a day."""

import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from ntk.yardsticks import multiply_adds_per_second, seconds
from rocoft.files import write_text

__all__ = ["Rates", "room_on_disk"]

FILE = "rates.json"
BLOCK = 2**22
"""Bytes written and read at a time, about those of a factor."""
BLOCKS = 16
DAY = 86_400
"""Seconds that rates are kept: what was busy when they were measured may be idle."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rates:
    """What is done in a second.

    Attributes:
        multiply_adds: Of a large matrix product.
        written: Bytes to a file, until they are on the disk.
        read: Bytes from there.
    """

    multiply_adds: float
    written: float
    read: float

    @classmethod
    def of(cls, folder: Path, device: torch.device) -> "Rates":
        """Return the rates, measured unless they have been.

        Args:
            folder: On the disk in question, made if it is not there; they are kept in
                it for a day, by machine, device and number of threads.
            device: Where products run.

        Raises:
            OSError: If the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        where = [platform.node(), name, torch.get_num_threads(), torch.__version__]
        key, path = " ".join(map(str, where)), folder / FILE
        known, now = _known(path), time.time()
        try:
            if 0 <= now - known[key]["time"] < DAY:
                return cls(**known[key]["rates"])
        except (KeyError, TypeError):
            pass
        found = cls(multiply_adds_per_second(device), *_disk(folder))
        known[key] = {"time": now, "rates": asdict(found)}
        write_text(path, json.dumps(known, indent=1) + "\n")
        return found


def room_on_disk(folder: Path) -> int:
    """Return the bytes that a folder's disk has free; a disk in memory has none.

    Args:
        folder: Any; of one that is not there yet, its nearest parent's.
    """
    place = folder.resolve()
    above = [at for at in (place, *place.parents) if at.exists()]
    mounts = {Path(p.mountpoint): p for p in psutil.disk_partitions(all=True)}
    mount = next((mounts[at] for at in above if at in mounts), None)
    if mount is not None and (
        mount.fstype in {"tmpfs", "ramfs"}
        or mount.device.startswith(("/dev/ram", "/dev/zram"))
    ):
        return 0
    return shutil.disk_usage(above[0]).free


def _known(path: Path) -> dict[str, Any]:
    """Return what is kept; a file that is damaged is as good as none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _disk(folder: Path) -> tuple[float, float]:
    """Return how many bytes a second are written to a disk and read from it."""
    data = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            for _ in range(BLOCKS):
                file.write(data)
            os.fsync(file.fileno())

        def read() -> None:
            while file.read(BLOCK):
                pass

        written = BLOCKS * BLOCK / seconds(write, CPU)
        if hasattr(os, "posix_fadvise"):
            # What is still in memory would be read at the speed of that.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        return written, BLOCKS * BLOCK / seconds(read, CPU)
