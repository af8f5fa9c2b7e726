"""The records of a study on disk, each computed once.

A study's folder holds ``settings.json``, everything that determines the numbers beyond
the records' keys, and ``records/``, one JSON file per record. An interrupted study
resumes with the missing records; a truncated file counts as missing.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ntk.scale import StorageError, finite
from ntk.studies.workers import WorkError, results
from rocoft.commands import (
    MARK,
    Progress,
    differences,
    read_mark,
    remove_parts,
    write_text,
)

Record = dict[str, Any]

SETTINGS = "settings.json"
RECORDS = "records"
SEAL = "sha256"
"""The field of a record's file that holds the digest of the others."""
SEALED = "sealed"
"""The fact of a study's folder that all of its records have such digests."""


@dataclass(frozen=True)
class Cell:
    """The task, shots and seed of a split."""

    task: str
    shots: int
    seed: int

    @property
    def name(self) -> str:
        """The cell as part of file names, which stay inside the study's folder."""
        name = f"{self.task}-{self.shots}-{self.seed}"
        if _stays_inside(name):
            return name
        plain = "".join(c if c.isalnum() or c == "-" else "_" for c in name)
        return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


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
class NoRecord:
    """What a unit returns for a subject that has no record, beside those that have.

    Attributes:
        why: Why not, in a sentence.
    """

    why: str


@dataclass(frozen=True)
class Unit:
    """Work that computes some records of one cell.

    Attributes:
        keys: Keys of the records.
        work: Function of ``*arguments`` and a list of subjects that returns a record,
            or why there is none, per subject; picklable, since it may run in another
            process.
        arguments: Arguments of the function.
        after: Key of a record of another unit that must be computed first; the record
            is passed to the function after ``arguments``.
    """

    keys: tuple[Key, ...]
    work: Callable[..., Sequence[Record | NoRecord]]
    arguments: tuple[Any, ...]
    after: Key | None = None

    def __call__(self) -> Sequence[Record | NoRecord]:
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
        file = self.folder / SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        # Without records nothing contradicts other settings, if the folder is ours.
        is_old = self.has_records or not read_mark(self.folder)
        if file.is_file() and is_old:
            self._check(file, json.loads(text))
            return
        others = (
            () if file.is_file() or not self.folder.is_dir() else self.folder.iterdir()
        )
        if any(other.name != MARK for other in others):
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

    def _check(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Refuse other settings than those in the folder."""
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            begun = None
        if not isinstance(begun, dict):
            raise StorageError(
                f"{str(file)!r} is damaged, so that nobody knows what the records "
                "beside it are of. Restore it, or give another --name."
            )
        if differ := differences(begun, settings):
            raise StorageError(
                f"{str(self.folder)!r} was begun with other settings: {differ}. "
                "Give the same ones, or another --name."
            )

    @property
    def has_records(self) -> bool:
        """Whether there is any record, whole or not."""
        return any((self.folder / RECORDS).glob("**/*.json"))

    def remove_parts(self) -> None:
        """Remove files that a killed process has not finished."""
        for folder in (self.folder, *self.folder.glob("*/"), *self.folder.glob("*/*/")):
            remove_parts(folder)

    def read(self, key: Key) -> Record | None:
        """Return a record; None if it is missing or its file is damaged.

        Args:
            key: Key of the record.
        """
        file = self.folder / RECORDS / key.file
        with contextlib.suppress(ValueError, KeyError, RecursionError):
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None
            if isinstance(record, dict) and self._is_sealed(record):
                record.pop(SEAL, None)
                if record.pop("key") == asdict(key):
                    return record
        if key.file not in self.damaged:
            self.damaged.append(key.file)
        return None

    def _is_sealed(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is as it was written, as far as it says so."""
        if SEAL not in record:
            # Earlier versions wrote none.
            return not read_mark(self.folder).get(SEALED)
        rest = {name: value for name, value in record.items() if name != SEAL}
        return record[SEAL] == _sealed(rest)

    def write(self, key: Key, record: Record) -> None:
        """Write a record atomically.

        Args:
            key: Key of the record.
            record: JSON values.

        Raises:
            StorageError: If the record cannot be written.
        """
        file = self.folder / RECORDS / key.file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # As it will be read: keys are texts in JSON.
            whole = json.loads(json.dumps(finite({"key": asdict(key), **record})))
            text = json.dumps({**whole, SEAL: _sealed(whole)}, allow_nan=False)
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
            with contextlib.closing(results(ready, _records, jobs)) as finished:
                for unit, records in finished:
                    if isinstance(records, WorkError):
                        failed.append(f"{unit.name}: {records}")
                    else:
                        for key, record in zip(unit.keys, records, strict=True):
                            if isinstance(record, NoRecord):
                                lost = replace(unit, keys=(key,))
                                failed.append(f"{lost.name}: {record.why}")
                            else:
                                self.write(key, record)
                    done += 1
                    if progress is not None:
                        progress("records", done, len(units))
        return failed


def _records(unit: Unit) -> Sequence[Record | NoRecord]:
    return unit()


def _sealed(record: Mapping[str, Any]) -> str:
    """Return a digest of a record, by which an edited one is told."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stays_inside(path: str) -> bool:
    return not path.startswith("/") and not {"..", "."} & {*path.split("/")}
