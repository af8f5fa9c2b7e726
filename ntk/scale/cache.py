"""A cache of finished and partly computed kernels, keyed by content.

The name of a file is a digest of everything that a kernel depends on: the model's
weights, the tokens, the spaces, the versions and the number of threads. The same
command finds its file again, also after a crash; different kernels never share a file.
A file holds the plan and the sums of the parts that are done, so a resumed run gives
the same bits as an uninterrupted one.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk.gradients import Service
from ntk.kernels import KernelResult
from ntk.scale.parts import Chunk
from ntk.scale.planning import Plan
from ntk.scale.spill_plan import SpillPlan
from ntk.scale.storage import StorageError, load_kernels, save_kernels
from ntk.scale.work import Work
from ntk.spaces import Maps
from rocoft.commands import BusyError as LockedError
from rocoft.commands import locked, remove_parts
from rocoft.models import LinearOnUse

__all__ = ["BusyError", "KernelCache", "content_key"]

SECONDS = 20.0
"""Least time between two writes of partly computed kernels, in seconds."""


class BusyError(StorageError):
    """Another process is computing the same kernels."""


def content_key(work: Work, *, processes: int = 1) -> str:
    """Return a digest of everything that kernels depend on.

    Args:
        work: The kernels to compute.
        processes: Number of processes that share the work; the last digits depend on
            it.

    Returns:
        40 hexadecimal digits.
    """
    model, options = work.model, work.options
    digest = hashlib.blake2b(digest_size=20)
    first = next(model.parameters())
    facts = {
        "versions": [importlib.metadata.version(p) for p in ("rocoft-ntk", "torch")],
        "threads": torch.get_num_threads(),
        "device": first.device.type,
        "config": str(getattr(model, "config", "")),
        "modules": [(name, type(m).__qualname__) for name, m in model.named_modules()],
        "right": work.right,
        "kernel": [
            *(options.kind, options.precision, options.reduce),
            *(work.readout, processes),
        ],
        "spaces": {name: repr(maps) for name, maps in work.resolved.items()},
    }
    digest.update(json.dumps(facts, sort_keys=True, default=repr).encode())
    state = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in state:
        _digest(digest, name, tensor)
    for name, module in model.named_modules():
        if isinstance(module, LinearOnUse):
            _digest(digest, name, module.base_values())
    for batch in work.batches:
        named = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in named.items():
            if isinstance(value, Tensor):
                _digest(digest, name, value)
            else:
                digest.update(f"{name}{value!r}".encode())
    return digest.hexdigest()


@dataclass
class KernelCache:
    """The cache file of some kernels, for one process at a time.

    Attributes:
        folder: Folder of the cache.
        key: Name of the file, see `content_key`.
        seconds: Least time between two writes of partly computed kernels.
        problem: Message for the user if an existing file could not be used; else empty.
        parts_found: Number of parts that were already done.
    """

    folder: Path
    key: str
    seconds: float = SECONDS
    problem: str = ""
    parts_found: int = 0
    _written: float = float("-inf")

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.key}.safetensors"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the file against other processes.

        Yields:
            Nothing.

        Raises:
            BusyError: If another process is computing these kernels.
            StorageError: If the folder cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                stack.enter_context(locked(self._lock(self.key)))
            except LockedError as error:
                raise BusyError(
                    f"another process computes the same kernels in "
                    f"{str(self.folder)!r}. Wait for it, or compute them here, too, "
                    "with --no-cache."
                ) from error
            except OSError as error:
                raise StorageError(
                    f"{str(self.folder)!r} cannot be written to: {error.strerror}. "
                    "Choose another folder with --output, or --no-cache."
                ) from error
            remove_parts(self.folder, self.key)
            yield

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key}.lock"

    def _sweep(self) -> None:
        """Remove unfinished files of processes that were killed."""
        for lock in self.folder.glob("*.lock"):
            if re.fullmatch(r"[0-9a-f]{40}", lock.stem) and lock.is_file():
                with contextlib.suppress(OSError), locked(lock):
                    remove_parts(self.folder, lock.stem)

    def load(
        self, plan: Plan, resolved: Mapping[str, Maps], spill: Path | None = None
    ) -> tuple[Plan, int, KernelResult]:
        """Return the plan to follow and the parts that are done.

        Args:
            plan: A new plan for the same kernels.
            resolved: The maps of every space.
            spill: Folder for a file of features and factors; None allows none.

        Returns:
            The plan to follow, the number of its parts that are done, and their sums.
            The cached plan is dropped for the new one, from its start, if the file is
            missing or damaged, or if the work is unfinished and the cached plan exceeds
            the budget or needs a file for which there is no folder or room.
        """
        nothing = plan, 0, KernelResult({})
        if not self.path.is_file():
            return nothing
        try:
            kernels, header = load_kernels(self.path)
            state = header["state"] if header["key"] == self.key else {}
            earlier = replace(
                plan,
                chunks=tuple(_chunk(chunk, resolved) for chunk in state["chunks"]),
                columns=tuple(map(tuple, state["columns"])),
                left_bytes=state["left_bytes"],
                spill=_spill(state.get("spill"), spill or self.folder),
            )
            done = int(state["done"])
            _check_shapes(kernels, plan, state["sizes"])
            result = KernelResult(
                {name: kernels[name] for name in state["sizes"]},
                state["traces"],
                state["sizes"],
                {name: Service(value) for name, value in state["services"].items()},
            )
        except (StorageError, KeyError, ValueError, TypeError, IndexError) as error:
            self.problem = (
                f"the cached kernels {str(self.path)!r} could not be used and were "
                f"computed again ({error})"
            )
            return nothing
        if done < earlier.parts and (
            earlier.peak > plan.budget or not _has_room(earlier.spill, spill)
        ):
            return nothing
        self.parts_found = done
        return earlier, done, result

    def store(
        self, plan: Plan, resolved: Mapping[str, Maps], done: int, result: KernelResult
    ) -> None:
        """Write the parts that are done, if all are or the last write is long ago.

        Args:
            plan: The plan.
            resolved: The maps of every space.
            done: Number of its parts that are done.
            result: Their sums.

        Raises:
            StorageError: If the file cannot be written; its earlier version remains.
        """
        now = time.monotonic()
        if done < plan.parts and now - self._written < self.seconds:
            return
        self._written = now
        state = {
            "done": done,
            "chunks": [_indices(chunk, resolved) for chunk in plan.chunks],
            "columns": plan.columns,
            "left_bytes": plan.left_bytes,
            "spill": _spill_state(plan.spill),
            "traces": result.traces,
            "sizes": result.sizes,
            "services": {name: s.value for name, s in result.services.items()},
        }
        # Someone may have made room while this went on.
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        save_kernels(self.path, result.kernels, {"key": self.key, "state": state})


def _check_shapes(
    kernels: Mapping[str, Tensor], plan: Plan, spaces: Mapping[str, object]
) -> None:
    """Check that cached kernels have the shape and dtype of those to be computed."""
    c = plan.outputs
    for name in spaces:
        shape, dtype = tuple(kernels[name].shape), kernels[name].dtype
        if shape not in (plan.examples, (*plan.examples, c, c)):
            raise ValueError(f"{name!r} has shape {shape}, not {plan.examples}")
        if dtype != torch.float64:
            raise ValueError(f"{name!r} has dtype {dtype}, not torch.float64")


def _digest(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)


def _indices(chunk: Chunk, resolved: Mapping[str, Maps]) -> dict[str, Any]:
    """Return a chunk for JSON: the indices of its maps in the resolved spaces."""
    spaces = {
        space: {
            name: [resolved[space][name].index(map_) for map_ in held]
            for name, held in maps.items()
        }
        for space, maps in chunk.spaces.items()
    }
    return {"entries": chunk.entries, "spaces": spaces}


def _spill_state(plan: SpillPlan | None) -> dict[str, Any] | None:
    """Return the plan of a file for JSON, without its folder."""
    if plan is None:
        return None
    return {name: value for name, value in asdict(plan).items() if name != "folder"}


def _spill(state: Mapping[str, Any] | None, folder: Path) -> SpillPlan | None:
    """Return the plan of a file from its state, see `_spill_state`."""
    if state is None:
        return None
    return SpillPlan(folder, *(state[name] for name in ("bytes", "examples", "held")))


def _has_room(plan: SpillPlan | None, folder: Path | None) -> bool:
    """Whether the folder has room for the file of a plan; true if it has no file."""
    return plan is None or (folder is not None and plan.fits(folder))


def _chunk(state: Mapping[str, Any], resolved: Mapping[str, Maps]) -> Chunk:
    """Return a chunk from its indices, see `_indices`."""
    spaces = {
        space: {
            name: tuple(resolved[space][name][i] for i in places)
            for name, places in maps.items()
        }
        for space, maps in state["spaces"].items()
    }
    return Chunk(spaces, state["entries"])
