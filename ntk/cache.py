"""Kernels kept by the content of what they are computed from, whole or half done.

The name of a file is a digest of everything that a kernel depends on: the values of
the model's weights, the tokens, the spaces, the versions and the number of threads. The
same command finds it again, after a crash as well; another one has another file, so
nothing is ever mixed. A file holds the sums after some of the parts of a plan, and
that plan, so that going on gives the bits that an undisturbed run would have given.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntk.chunks import Chunk
from ntk.coverage import Service
from ntk.engine import KernelResult
from ntk.function import Batch
from ntk.kernel import Kind, Reduction
from ntk.maps import Maps
from ntk.memory import Plan
from ntk.precision import Precision
from ntk.spill_plan import SpillPlan
from ntk.storage import StorageError, load_kernels, save_kernels
from rocoft.on_use import LinearOnUse

__all__ = ["BusyError", "KernelCache", "content_key"]

SECONDS = 20.0
"""Least time between two writes of half done kernels."""


class BusyError(StorageError):
    """Another process computes the same kernels."""


def content_key(
    model: nn.Module,
    batches: Sequence[Batch],
    right: int,
    resolved: Mapping[str, Maps],
    *,
    kind: Kind = "sgd",
    precision: Precision = "float32",
    reduce: Reduction = "full",
    readout: str = "",
    processes: int = 1,
) -> str:
    """Return a digest of everything that kernels depend on.

    Args:
        model: Its parameters and buffers, their names, and the modules they are in.
        batches: The left examples.
        right: How many batches are the right examples too.
        resolved: The maps of every space.
        kind: Of kernel.
        precision: Of its products.
        reduce: As in `kernel.compute`.
        readout: What else the outputs depend on, such as label words.
        processes: How many share the work.

    Returns:
        A text of 40 characters.
    """
    digest = hashlib.blake2b(digest_size=20)
    first = next(model.parameters())
    facts = {
        "versions": [importlib.metadata.version(p) for p in ("rocoft-ntk", "torch")],
        "threads": torch.get_num_threads(),
        "device": first.device.type,
        "config": str(getattr(model, "config", "")),
        "modules": [(name, type(m).__qualname__) for name, m in model.named_modules()],
        "right": right,
        "kernel": [kind, precision, reduce, readout, processes],
        "spaces": {name: repr(maps) for name, maps in resolved.items()},
    }
    digest.update(json.dumps(facts, sort_keys=True, default=repr).encode())
    state = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in state:
        _digest(digest, name, tensor)
    for name, module in model.named_modules():
        if isinstance(module, LinearOnUse):
            _digest(digest, name, module.base_values())
    for batch in batches:
        named = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in named.items():
            if isinstance(value, Tensor):
                _digest(digest, name, value)
            else:
                digest.update(f"{name}{value!r}".encode())
    return digest.hexdigest()


@dataclass
class KernelCache:
    """The file of some kernels, for one process at a time.

    Attributes:
        folder: Where it is.
        key: Its name, as `content_key` returns it.
        seconds: Least time between two writes of half done kernels.
        problem: What was wrong with a file that was there, for the user; else empty.
        found: Parts that had been done before.
    """

    folder: Path
    key: str
    seconds: float = SECONDS
    problem: str = ""
    found: int = 0
    _written: float = float("-inf")

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.key}.safetensors"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes away meanwhile.

        Yields:
            Nothing.

        Raises:
            BusyError: If another one computes these kernels now.
            StorageError: If the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"{self.key}.lock").open("w")
        except OSError as error:
            raise StorageError(
                f"{str(self.folder)!r} cannot be written to: {error.strerror}. Choose "
                "another folder with --output, or --no-cache."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"another process computes the same kernels in "
                    f"{str(self.folder)!r}. Wait for it, or compute them here, too, "
                    "with --no-cache."
                ) from error
            yield

    def load(
        self, how: Plan, resolved: Mapping[str, Maps], spill: Path | None = None
    ) -> tuple[Plan, int, KernelResult]:
        """Return what has been done.

        Args:
            how: What would be done.
            resolved: The maps of every space.
            spill: Folder for a file of what passes leave, as in `memory.plan`.

        Returns:
            The plan to follow, how many of its steps are done, and their sums. That is
            the given plan from its start where nothing, or nothing whole, is there, or
            where the earlier plan would hold more than this budget, or needs a file for
            which there is no folder or room.
        """
        nothing = how, 0, KernelResult({})
        if not self.path.is_file():
            return nothing
        try:
            kernels, header = load_kernels(self.path)
            state = header["state"] if header["key"] == self.key else {}
            earlier = replace(
                how,
                chunks=tuple(_chunk(each, resolved) for each in state["chunks"]),
                columns=tuple(map(tuple, state["columns"])),
                left_bytes=state["left_bytes"],
                spill=_spill(state.get("spill"), spill or self.folder),
            )
            done = int(state["done"])
            result = KernelResult(
                {name: kernels[name] for name in state["sizes"]},
                state["traces"],
                state["sizes"],
                {name: Service(value) for name, value in state["services"].items()},
            )
        except (StorageError, KeyError, ValueError, TypeError, IndexError) as error:
            self.problem = (
                f"the kept kernels {str(self.path)!r} could not be used and were "
                f"computed again ({error})"
            )
            return nothing
        if done < earlier.parts and (
            earlier.peak > how.budget or not _has_room(earlier.spill, spill)
        ):
            return nothing
        self.found = done
        return earlier, done, result

    def store(
        self, how: Plan, resolved: Mapping[str, Maps], done: int, result: KernelResult
    ) -> None:
        """Keep what has been done, if it is all or some time has passed.

        Args:
            how: The plan.
            resolved: The maps of every space.
            done: How many of its steps are done.
            result: Their sums.

        Raises:
            StorageError: If it cannot be written; what was kept before still is.
        """
        now = time.monotonic()
        if done < how.parts and now - self._written < self.seconds:
            return
        self._written = now
        state = {
            "done": done,
            "chunks": [_indices(chunk, resolved) for chunk in how.chunks],
            "columns": how.columns,
            "left_bytes": how.left_bytes,
            "spill": _spill_state(how.spill),
            "traces": result.traces,
            "sizes": result.sizes,
            "services": {name: s.value for name, s in result.services.items()},
        }
        save_kernels(self.path, result.kernels, {"key": self.key, "state": state})


def _digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _indices(chunk: Chunk, resolved: Mapping[str, Maps]) -> dict[str, Any]:
    """Return a chunk as JSON knows it: the places of its maps."""
    spaces = {
        space: {
            name: [resolved[space][name].index(m) for m in several]
            for name, several in maps.items()
        }
        for space, maps in chunk.spaces.items()
    }
    return {"entries": chunk.entries, "spaces": spaces}


def _spill_state(how: SpillPlan | None) -> dict[str, Any] | None:
    """Return the plan of a file as JSON knows it, but for where it is."""
    if how is None:
        return None
    return {name: value for name, value in asdict(how).items() if name != "folder"}


def _spill(state: Mapping[str, Any] | None, folder: Path) -> SpillPlan | None:
    """Return the plan that `_spill_state` wrote."""
    return None if state is None else SpillPlan(folder, **state)


def _has_room(how: SpillPlan | None, folder: Path | None) -> bool:
    """Whether there is a folder with room for a file, if a plan has one."""
    return how is None or (folder is not None and how.fits(folder))


def _chunk(state: Mapping[str, Any], resolved: Mapping[str, Maps]) -> Chunk:
    """Return the chunk that `_indices` wrote."""
    spaces = {
        space: {
            name: tuple(resolved[space][name][i] for i in places)
            for name, places in maps.items()
        }
        for space, maps in state["spaces"].items()
    }
    return Chunk(spaces, state["entries"])
