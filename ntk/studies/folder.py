"""The records of a study on disk, each computed once.

A study's folder holds ``settings.json``, everything that determines the numbers beyond
the records' keys, and ``records/``, one JSON file per record. An interrupted study
resumes with the missing records; a truncated file counts as missing.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from ntk.scale import StorageError, finite
from rocoft.commands import Progress, differences, write_text

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The task, shots and seed of a split."""

    task: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """The cell as part of file names."""
        return f"{self.task}-{self.shots}-{self.seed}"


@dataclass(frozen=True)
class Key:
    """The key of a record.

    Attributes:
        cell: The split.
        kind: Kind of record, such as ``"kernel"``.
        subject: What was measured on the split, such as a space.
    """

    cell: Cell
    kind: str
    subject: str

    @property
    def file(self) -> str:
        """The record's file name; a digest tells subjects apart."""
        plain = "".join(c if c.isalnum() else "-" for c in self.subject)[:40]
        digest = hashlib.sha256(self.subject.encode()).hexdigest()[:8]
        return f"{self.cell.name}/{self.kind}-{plain}-{digest}.json"


@dataclass(frozen=True)
class Unit:
    """Work that computes some records of one cell.

    Attributes:
        keys: Keys of the records.
        work: Function of ``*arguments`` and a list of subjects that returns a record
            per subject; picklable, since it may run in another process.
        arguments: Arguments of the function.
        after: Key of a record of another unit that must be computed first; the record
            is passed to the function after ``arguments``.
    """

    keys: tuple[Key, ...]
    work: Callable[..., Sequence[Record]]
    arguments: tuple[Any, ...]
    after: Key | None = None

    def __call__(self) -> Sequence[Record]:
        """Compute the records."""
        return self.work(*self.arguments, [key.subject for key in self.keys])

    @property
    def name(self) -> str:
        """Description for progress and errors."""
        more = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        first = self.keys[0]
        return f"{first.cell.name} {first.kind} {first.subject}{more}"


@dataclass
class Study:
    """The records of a study on disk.

    Attributes:
        folder: Folder of the study.
        damaged: Files that are truncated or of another key; they count as missing.
    """

    folder: Path
    damaged: list[str] = field(default_factory=list)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Create the folder, or check that it was created with the same settings.

        Args:
            settings: JSON values.

        Raises:
            StorageError: If the folder holds another study or other files.
        """
        file = self.folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if file.is_file():
            try:
                begun = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                begun = {}
            if differ := differences(begun, json.loads(text)):
                raise StorageError(
                    f"{str(self.folder)!r} was begun with other settings: {differ}. "
                    "Give the same ones, or another --name."
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise StorageError(
                f"{str(self.folder)!r} holds files but no study. Give another --name."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
        except OSError as error:
            raise StorageError(
                f"{str(self.folder)!r} cannot be written to: {error.strerror}. Choose "
                "another folder with --output."
            ) from error

    def read(self, key: Key) -> Record | None:
        """Return a record; None if it is missing or its file is damaged.

        Args:
            key: Key of the record.
        """
        file = self.folder / "records" / key.file
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record.pop("key") == asdict(key):
                return dict(record)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, AttributeError, TypeError):
            pass
        if key.file not in self.damaged:
            self.damaged.append(key.file)
        return None

    def write(self, key: Key, record: Record) -> None:
        """Write a record atomically.

        Args:
            key: Key of the record.
            record: JSON values.

        Raises:
            StorageError: If the record cannot be written.
        """
        file = self.folder / "records" / key.file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(finite({"key": asdict(key), **record}), allow_nan=False)
            write_text(file, text + "\n")
        except OSError as error:
            raise StorageError(
                f"record {str(file)!r} cannot be written: {error.strerror}. Free disk "
                "space and start again; finished records are kept."
            ) from error

    def run(
        self,
        units: Sequence[Unit],
        jobs: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        """Compute the missing records.

        Args:
            units: Units in the order in which they start.
            jobs: Number of worker processes; they share the processor's cores.
            progress: Called after every unit.

        Returns:
            A message per failed unit; the other units are done nevertheless.
        """
        missing = []
        for unit in units:
            keys = tuple(key for key in unit.keys if self.read(key) is None)
            if keys:
                missing.append(replace(unit, keys=keys))
        done, failed = len(units) - len(missing), []
        for dependent in (False, True):
            ready = []
            for unit in (u for u in missing if (u.after is not None) is dependent):
                if unit.after is None:
                    ready.append(unit)
                elif (record := self.read(unit.after)) is not None:
                    arguments = (*unit.arguments, record)
                    ready.append(replace(unit, arguments=arguments))
                else:
                    failed.append(f"{unit.name}: it needs {unit.after.file}.")
            for unit, records in _results(ready, jobs):
                if isinstance(records, Exception):
                    failed.append(f"{unit.name}: {records}")
                else:
                    for key, record in zip(unit.keys, records, strict=True):
                        self.write(key, record)
                done += 1
                if progress is not None:
                    progress("records", done, len(units))
        return failed


def _results(
    units: Sequence[Unit], jobs: int
) -> Iterator[tuple[Unit, Sequence[Record] | Exception]]:
    """Yield the records of each unit, or its ValueError or OSError."""
    if jobs == 1 or len(units) < 2:
        for unit in units:
            try:
                yield unit, unit()
            except (ValueError, OSError) as error:
                yield unit, error
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Forked processes hang in torch's thread pool.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_prepare, initargs=(threads,)
    ) as pool:
        waiting = {pool.submit(unit): unit for unit in units}
        try:
            for future in concurrent.futures.as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except (ValueError, OSError) as error:
                    yield waiting[future], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _prepare(threads: int) -> None:
    """Set up a worker process that ends when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
