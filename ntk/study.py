"""A study: independent records, each written when it is done and never made twice.

A study's folder holds ``settings.json``, what decides every number but is in no
record's key, and ``records/``, one JSON file for each. A study that was stopped goes on
with the records that are missing; one whose file was cut short is made again.
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

from ntk.storage import StorageError, finite
from rocoft.console import Progress
from rocoft.files import write_text
from rocoft.search import differences

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Where a record stands in a study: the task, shots and seed of one split."""

    task: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """The cell as a name of files."""
        return f"{self.task}-{self.shots}-{self.seed}"


@dataclass(frozen=True)
class Key:
    """What a record is of.

    Attributes:
        cell: The split.
        kind: Of record, such as ``"kernel"``.
        subject: What was measured on the split, such as a space.
    """

    cell: Cell
    kind: str
    subject: str

    @property
    def file(self) -> str:
        """The record's file; names are cut to letters and digits, and kept apart."""
        plain = "".join(c if c.isalnum() else "-" for c in self.subject)[:40]
        digest = hashlib.sha256(self.subject.encode()).hexdigest()[:8]
        return f"{self.cell.name}/{self.kind}-{plain}-{digest}.json"


@dataclass(frozen=True)
class Unit:
    """Work that leaves some records of one cell.

    Attributes:
        keys: Of the records that it leaves.
        work: From ``arguments`` and the subjects of some keys to a record for each; a
            function of a module, since it may run in another process.
        arguments: Of the function.
        after: A record, of a unit that needs none, which the function gets as its last
            but one argument.
    """

    keys: tuple[Key, ...]
    work: Callable[..., Sequence[Record]]
    arguments: tuple[Any, ...]
    after: Key | None = None

    def __call__(self) -> Sequence[Record]:
        """Do the work."""
        return self.work(*self.arguments, [key.subject for key in self.keys])

    @property
    def name(self) -> str:
        """What is being done, for progress and errors."""
        several = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        first = self.keys[0]
        return f"{first.cell.name} {first.kind} {first.subject}{several}"


@dataclass
class Study:
    """The records of a study on disk.

    Attributes:
        folder: Of the study.
        damaged: Files that were found cut short or foreign, and count as missing.
    """

    folder: Path
    damaged: list[str] = field(default_factory=list)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the folder, or see that it was begun with the same settings.

        Args:
            settings: Values that JSON knows.

        Raises:
            StorageError: If it holds another study, or something else.
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
        """Return a record, None if it is missing or its file is not whole.

        Args:
            key: Of the record.
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
        """Write a record whole or not at all.

        Args:
            key: Of the record.
            record: Values that JSON knows.

        Raises:
            StorageError: If it cannot be written.
        """
        file = self.folder / "records" / key.file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(finite({"key": asdict(key), **record}), allow_nan=False)
            write_text(file, text + "\n")
        except OSError as error:
            raise StorageError(
                f"record {str(file)!r} cannot be written: {error.strerror}. Make room "
                "and start again: what is done is kept."
            ) from error

    def run(
        self,
        units: Sequence[Unit],
        jobs: int = 1,
        progress: Progress | None = None,
    ) -> list[str]:
        """Do the units that miss a record.

        Args:
            units: In the order in which they are begun.
            jobs: Processes; the processor's cores are parted among them.
            progress: Told of every unit that is done.

        Returns:
            What failed, in sentences; the other units were done nevertheless.
        """
        missing = []
        for unit in units:
            keys = tuple(key for key in unit.keys if self.read(key) is None)
            if keys:
                missing.append(replace(unit, keys=keys))
        done, failed = len(units) - len(missing), []
        for stage in (False, True):
            ready = []
            for unit in (u for u in missing if (u.after is not None) is stage):
                if unit.after is None:
                    ready.append(unit)
                elif (record := self.read(unit.after)) is not None:
                    more = replace(unit, arguments=(*unit.arguments, record))
                    ready.append(more)
                else:
                    failed.append(f"{unit.name}: it needs {unit.after.file}.")
            for unit, found in _results(ready, jobs):
                if isinstance(found, Exception):
                    failed.append(f"{unit.name}: {found}")
                else:
                    for key, record in zip(unit.keys, found, strict=True):
                        self.write(key, record)
                done += 1
                if progress is not None:
                    progress("records", done, len(units))
        return failed


def _results(
    units: Sequence[Unit], jobs: int
) -> Iterator[tuple[Unit, Sequence[Record] | Exception]]:
    """Yield what each unit leaves, or the error that is the user's to mend."""
    if jobs == 1 or len(units) < 2:
        for unit in units:
            try:
                yield unit, unit()
            except (ValueError, OSError) as error:
                yield unit, error
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A forked process would share the threads of torch, and hang.
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
    """Set a worker's process up, and have it end when the study is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
