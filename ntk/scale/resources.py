"""Memory, disk and processes of a kernel computation. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntk.scale.processes import Processes


@dataclass(frozen=True)
class Resources:
    """The memory, disk and processes that a computation may use.

    Attributes:
        memory: Largest memory of each process in bytes, libraries and model included;
            None means what it uses already and a share of the free memory.
        cache: Folder of the kernel cache, for finished and partly computed kernels;
            None means no cache.
        spill: Folder for a file of features and factors that do not fit into memory;
            None means more passes instead.
        processes: The processes that share the work, each making the same calls; None
            means a single process.
    """

    memory: int | None = None
    cache: Path | None = None
    spill: Path | None = None
    processes: Processes | None = None
