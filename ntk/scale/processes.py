"""Processes that compute one kernel together: shares of examples, and messages.

Every process runs the same command and takes its share of every batch, so batches of
long and of short examples are shared evenly. `accelerate launch`, `torchrun` or MPI
start the processes; torch.distributed carries their messages.
"""

import io
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor

from ntk.gradients import Batch, batch_length, take

__all__ = ["LostProcessError", "Processes"]

Value = TypeVar("Value")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables in which launchers set the number of processes."""


class LostProcessError(ConnectionError):
    """A process of the group has ended or cannot be reached."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes, at least 2.
        device: The device of this process's model.
        peers: Host name, process id and start time of each process.
    """

    rank: int
    size: int
    device: torch.device
    peers: tuple[tuple[str, int, float], ...]

    @classmethod
    def launched(cls, device: str) -> "Processes | None":
        """Join the processes that a launcher has started together with this one.

        Args:
            device: The device of models, such as ``cpu``; ``cuda`` means this process's
                own GPU.

        Returns:
            The processes; None if this one is alone.
        """
        if launched_size() < 2:
            return None
        from accelerate import PartialState  # type: ignore[import-untyped]

        cpu = torch.device(device).type == "cpu"
        state = PartialState(cpu=cpu)
        return cls.joined(state.device)

    @classmethod
    def joined(cls, device: torch.device) -> "Processes":
        """Return the processes of the default group of torch.distributed.

        Args:
            device: The device of this process's model.
        """
        this = psutil.Process()
        peers: list[Any] = [None] * dist.get_world_size()
        with _connected():
            dist.all_gather_object(
                peers, (socket.gethostname(), this.pid, this.create_time())
            )
        return cls(dist.get_rank(), len(peers), device, tuple(peers))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """Number of processes on this machine, this one included."""
        return sum(peer[0] == self.peers[self.rank][0] for peer in self.peers)

    def share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return this process's share of every batch, where it is not empty."""
        parts = ((b, self._part(batch_length(b), self.rank)) for b in batches)
        return [take(b, part) for b, part in parts if part.start < part.stop]

    def largest_share(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the largest share of every batch that a process has."""
        return [take(b, slice(-(-batch_length(b) // self.size))) for b in batches]

    def places(self, batches: Sequence[Batch]) -> list[list[int]]:
        """Return, for each process, the indices of its examples among all."""
        places: list[list[int]] = [[] for _ in range(self.size)]
        start = 0
        for length in map(batch_length, batches):
            for rank, indices in enumerate(places):
                part = self._part(length, rank)
                indices += range(start + part.start, start + part.stop)
            start += length
        return places

    def _part(self, length: int, rank: int) -> slice:
        return slice(length * rank // self.size, length * (rank + 1) // self.size)

    def broadcast(self, value: Value, source: int) -> Value:
        """Send a value from one process to all.

        Args:
            value: Anything that can be pickled; tensors are sent without pickling.
            source: Rank of the sender; the values of the others are ignored.

        Returns:
            The value itself on the sender, elsewhere a copy on this device.

        Raises:
            LostProcessError: If a process has ended.
        """
        header: list[Any] = [None]
        sent: list[Tensor] = []
        if self.rank == source:
            text = io.BytesIO()
            _Pickler(text, sent).dump(value)
            header = [(text.getvalue(), [(t.shape, t.dtype) for t in sent])]
        with _connected():
            dist.broadcast_object_list(header, source)
            pickled, kinds = header[0]
            tensors = [
                sent[number].detach().to(self.device).contiguous()
                if self.rank == source
                else torch.empty(shape, dtype=dtype, device=self.device)
                for number, (shape, dtype) in enumerate(kinds)
            ]
            for tensor in tensors:
                if tensor.numel():
                    # A view, not a copy, so that the tensor itself is received.
                    dist.broadcast(tensor.view(-1).view(torch.uint8), source)
        if self.rank == source:
            return value
        received: Value = _Unpickler(io.BytesIO(pickled), tensors).load()
        return received

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, in the order of ranks.

        Args:
            value: This process's value; anything that can be pickled.

        Raises:
            LostProcessError: If a process has ended.
        """
        return [self.broadcast(value, source) for source in range(self.size)]

    def check(self) -> None:
        """Check that the processes on this machine are still alive.

        Raises:
            LostProcessError: If one is not.
        """
        here = self.peers[self.rank][0]
        for rank, (host, pid, began) in enumerate(self.peers):
            if host == here and not _alive(pid, began):
                raise LostProcessError(
                    f"process {rank} of {self.size} (process id {pid} on {host}) "
                    f"has ended. {_WAY_OUT}"
                )


def launched_size() -> int:
    """Return the number of processes that a launcher has started; 1 without one."""
    return max(int(os.environ.get(name, 1)) for name in SIZES)


_WAY_OUT = (
    "If it printed an error, that is the cause; if not, the system may have stopped it "
    "for lack of memory. Start all of them again: finished passes are kept."
)


@contextmanager
def _connected() -> Iterator[None]:
    """Turn failures of communication into `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LostProcessError(
            f"one of the processes that compute this kernel together has ended or "
            f"cannot be reached ({reason}). {_WAY_OUT}"
        ) from error


def _alive(pid: int, began: float) -> bool:
    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return bool(process.create_time() == began) and not ended
    except psutil.NoSuchProcess:
        return False


class _Pickler(pickle.Pickler):
    """Collects tensors and pickles their indices instead."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Puts tensors in place of their indices."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid]
