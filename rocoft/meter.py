"""What a training costs: seconds a step and the most memory held."""

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Meter(TrainerCallback):
    """Times the steps of a training, evaluation and saving left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        _synchronize()
        self.times.append(time.perf_counter() - self._start)

    @property
    def seconds(self) -> float | None:
        """Median seconds of a step (s); None if there was none."""
        return statistics.median(self.times) if self.times else None


def reset_peak_memory(device: torch.device) -> bool:
    """Forget the most memory held so far.

    Args:
        device: Where the training runs.

    Returns:
        Whether that is possible here; if not, `peak_memory` is that of the process
        since it began.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts anew.
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Return the most memory held (bytes).

    Args:
        device: Where the training runs.

    Returns:
        What torch allocated on a GPU; on a CPU what the process had in memory, Python
        and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Kibibytes, but on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
