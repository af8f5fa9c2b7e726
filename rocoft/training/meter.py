"""The cost and progress of a training: seconds per step, peak memory, steps."""

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from rocoft.commands import Progress

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Meter(TrainerCallback):
    """Times the steps of a training, without evaluation and saving."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        _synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        _synchronize()
        self.times.append(time.perf_counter() - self._start)

    @property
    def seconds(self) -> float | None:
        """Median time of a step (s); None if there was no step."""
        return statistics.median(self.times) if self.times else None


class TrainLoss(TrainerCallback, ExportableState):
    """Sums the loss of a training, also over its interruptions.

    transformers' Trainer knows the mean since the last one only. The sum is kept in
    checkpoints, to the bit.

    Attributes:
        total: Sum of the steps' losses.
        steps: Number of these steps.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.steps = 0

    def add(self, loss: Tensor) -> None:
        """Add the loss of one batch, a part of its step's."""
        self.total += float(loss)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count a step."""
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "steps": self.steps}}

    def mean(self, steps: int) -> float:
        """Return the mean loss of a training; nan if not all its steps were counted.

        Args:
            steps: Number of its steps.
        """
        return self.total / steps if steps and self.steps == steps else float("nan")


def reset_peak_memory(device: torch.device) -> bool:
    """Start a new measurement of peak memory.

    Args:
        device: Device of the training.

    Returns:
        Whether that is possible here; if not, `peak_memory` covers the process since
        its start.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM.
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Return the peak memory (bytes).

    Args:
        device: Device of the training.

    Returns:
        Peak of torch's allocations on a GPU; on a CPU the process's peak resident
        memory, Python and libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # ru_maxrss is in KiB, on macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class ShowProgress(TrainerCallback):
    """Reports every step."""

    def __init__(self, label: str, progress: Progress) -> None:
        self.label, self.progress = label, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a step."""
        self.progress(self.label, state.global_step, state.max_steps)
