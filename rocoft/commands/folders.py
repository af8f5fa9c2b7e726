"""Folders that commands write: one holder at a time, and nothing of anyone else lost.

A folder of a command holds a file, `MARK`, that says which command wrote it. Only such
a folder is ever replaced, and only when that was asked for and it holds nothing that
the command did not write.

While a command runs, ``OUTPUT/.unfinished/NAME`` is its room: ``lock``, ``new`` (a
result that is being written), ``old`` (what it replaces) and ``gone`` (what is being
removed). A result moves into its place only when it is whole: the old one is renamed
into the room, the new one out of it, and only then is the old one removed. Whatever a
killed command leaves in its room, the next command with the same ``--output`` puts in
order: a whole result goes to its place if that is free, a replaced one goes back if
there is no whole one, everything else is removed.
"""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocoft.commands.files import PART, write_text
from rocoft.commands.locks import BusyError, locked
from rocoft.commands.options import OptionError

MARK = ".written-by.json"
"""The file that says which command wrote a folder, and whether it is finished."""

UNFINISHED = ".unfinished"
"""The folder of what is being written, inside ``--output``."""


@dataclass(frozen=True)
class FolderKind:
    """The folders of one command.

    Attributes:
        command: The command, such as ``"ntk.compare"``.
        what: What such a folder holds, for messages: result, study, run.
        names: All names that the command writes at the top of its folder.
    """

    command: str
    what: str
    names: tuple[str, ...]

    def is_own(self, folder: Path) -> bool:
        """Return whether a folder was written by this command.

        Args:
            folder: The folder.
        """
        return read_mark(folder).get("command") == self.command

    def check_own(self, folder: Path) -> None:
        """Refuse a folder that must not be removed.

        Args:
            folder: The folder.

        Raises:
            OptionError: If this command did not write it, or someone has put something
                else into it.
        """
        if folder.is_symlink() or not self.is_own(folder):
            raise OptionError(
                f"{str(folder)!r} exists and is no earlier {self.what}. Choose another "
                "--name."
            )
        if others := self.others_in(folder):
            raise OptionError(
                f"{str(folder)!r} holds {', '.join(map(repr, others[:3]))}, which "
                f"{self.command} did not write. Move it elsewhere, or choose another "
                "--name."
            )

    def others_in(self, folder: Path) -> list[str]:
        """Return the names in a folder that this command does not write.

        Args:
            folder: The folder.
        """
        names = (entry.name for entry in folder.iterdir())
        return sorted(
            name
            for name in names
            if name not in (*self.names, MARK) and not name.endswith(PART)
        )

    def mark(self, folder: Path, *, finished: bool, **more: Any) -> None:
        """Write who writes a folder.

        Args:
            folder: The folder.
            finished: Whether all of it is there.
            **more: Other facts, as JSON values.
        """
        from importlib import metadata  # Slow to import, and not for --help.

        facts = {
            "command": self.command,
            "version": metadata.version("rocoft-ntk"),
            "finished": finished,
            **more,
        }
        write_text(folder / MARK, json.dumps(facts) + "\n")


def read_mark(folder: Path) -> dict[str, Any]:
    """Return what a folder says of who wrote it; nothing if it does not.

    Args:
        folder: The folder.
    """
    try:
        facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def is_taken(folder: Path) -> bool:
    """Return whether a path is anything but free or an empty folder.

    Args:
        folder: The path.
    """
    if not os.path.lexists(folder):
        return False
    return folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())


@dataclass
class Place:
    """A folder of results that this process alone writes, see `claimed`.

    Attributes:
        folder: Where the results go.
        kind: The command's folders.
        overwrite: Whether an earlier folder of the command is replaced.
        room: Where they wait until they are whole.
    """

    folder: Path
    kind: FolderKind
    overwrite: bool
    room: Path

    def check(self) -> None:
        """Refuse a place that is not free and must not be replaced.

        Raises:
            OptionError: If something is there that is not to be replaced.
        """
        if not is_taken(self.folder):
            return
        self.kind.check_own(self.folder)
        if not self.overwrite:
            raise OptionError(
                f"{str(self.folder)!r} holds an earlier {self.kind.what}. Choose "
                "another --name, or replace it with --overwrite."
            )

    @contextlib.contextmanager
    def filled(self) -> Iterator[Path]:
        """Fill a folder aside, and put it into its place once it is whole.

        Where the place was taken by someone else in the meantime, the result gets a
        number behind its name, and `folder` says so.

        Yields:
            The folder to fill.
        """
        new = self.room / "new"
        new.mkdir()
        yield new
        self.kind.mark(new, finished=True)
        try:
            self.check()
        except OptionError:
            self.folder = self._free()
        if is_taken(self.folder):
            self.folder.rename(self.room / "old")
        try:
            new.rename(self.folder)
        except OSError:  # Someone was faster.
            self.folder = self._free()
            new.rename(self.folder)

    def _free(self) -> Path:
        return next(path for path in _numbered(self.folder) if not is_taken(path))

    @contextlib.contextmanager
    def begun(self, **more: Any) -> Iterator[Path]:
        """Begin a folder in its place, for work that is continued after a stop.

        With `overwrite` an earlier one waits in the room until `finish`, and comes back
        if the new one is abandoned.

        Args:
            **more: Other facts of the folder, as JSON values.

        Yields:
            The folder to put into it what it begins with.
        """
        self.check()
        new, old = self.room / "new", self.room / "old"
        new.mkdir()
        yield new
        self.kind.mark(new, finished=False, **more)
        if is_taken(self.folder):
            if os.path.lexists(old):  # This one was to replace it, and never finished.
                _remove(self.folder, self.room)
            else:
                self.folder.rename(old)
        new.rename(self.folder)

    def finish(self, **more: Any) -> None:
        """Say that the folder is finished; what it replaces goes.

        Args:
            **more: Other facts of the folder, as JSON values.
        """
        known = read_mark(self.folder)
        facts = {key: known[key] for key in known.keys() - {"command", "version"}}
        self.kind.mark(self.folder, **{**facts, **more, "finished": True})

    @property
    def replaces(self) -> bool:
        """Whether an earlier folder waits for this one to be finished."""
        return os.path.lexists(self.room / "old")

    def abandon(self) -> None:
        """Remove a folder that was begun in vain, unless it holds something else."""
        with contextlib.suppress(OptionError, OSError):
            self.kind.check_own(self.folder)
            _remove(self.folder, self.room)


@contextlib.contextmanager
def claimed(
    output: Path,
    name: str,
    kind: FolderKind,
    *,
    overwrite: bool = False,
    numbered: bool = False,
) -> Iterator[Place]:
    """Hold a folder of results against other processes.

    What killed commands have left in the same output folder is put in order first.

    Args:
        output: The folder of all results, created if missing.
        name: The name of the new one.
        kind: The command's folders.
        overwrite: Whether an earlier folder of the command is replaced.
        numbered: Whether a name that is taken gets a number behind it.

    Yields:
        The place.

    Raises:
        OptionError: If another process writes the folder, or nobody can.
    """
    for folder in _numbered(output / name) if numbered else [output / name]:
        with contextlib.ExitStack() as stack:
            try:
                sweep(output)
                room = stack.enter_context(_room(output, folder.name))
            except BusyError as error:
                if numbered:
                    continue
                raise OptionError(
                    f"another process writes {str(folder)!r}. Wait for it, or choose "
                    "another --name."
                ) from error
            except OSError as error:
                raise OptionError(
                    f"{str(folder)!r} cannot be written to: {error.strerror}. Choose "
                    "another folder with --output."
                ) from error
            if numbered and is_taken(folder):
                continue
            yield Place(folder, kind, overwrite, room)
            return


def sweep(output: Path) -> None:
    """Put in order what killed commands have left in a folder of results.

    Args:
        output: The folder; what living commands hold in it stays.
    """
    rooms = output / UNFINISHED
    if rooms.is_symlink() or not rooms.is_dir():
        return
    for room in list(rooms.iterdir()):
        if room.is_symlink() or not room.is_dir():
            continue
        is_ours = (room / "lock").is_file() or read_mark(room / "old")
        if is_ours or not any(room.iterdir()):
            with contextlib.suppress(OSError), _room(output, room.name):
                pass


@contextlib.contextmanager
def _room(output: Path, name: str) -> Iterator[Path]:
    """Hold the room of a name, put in order before and after."""
    room = output / UNFINISHED / name
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    if room.parent.is_symlink() or room.is_symlink():
        raise OSError(None, f"{str(room.parent)!r} is or holds a link; remove it")
    try:
        with contextlib.ExitStack() as stack:
            while True:
                room.mkdir(parents=True, exist_ok=True)
                # Whoever left last may have removed the room in between.
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(locked(room / "lock"))
                    break
            _settle(room, output / name)
            try:
                yield room
            finally:
                _settle(room, output / name)
    finally:
        with contextlib.suppress(OSError):
            for folder in (room, room.parent, *made):
                folder.rmdir()


def _settle(room: Path, folder: Path) -> None:
    """Bring a room to its end: nothing whole is lost, nothing else is left.

    The states are those between the steps of `Place`, in whose order they come.
    """
    new, old, gone = (room / part for part in ("new", "old", "gone"))
    if gone.exists():
        shutil.rmtree(gone)
    if os.path.lexists(old) and is_taken(folder) and new.exists():
        return  # Someone else has taken the place between the renames: all stay.
    if not is_taken(folder):
        if new.exists() and read_mark(new).get("finished"):
            new.rename(folder)
        elif os.path.lexists(old):
            old.rename(folder)
    if new.exists():
        _remove(new, room)
    if os.path.lexists(old) and read_mark(folder).get("finished"):
        _remove(old, room)


def _remove(folder: Path, room: Path) -> None:
    """Remove a folder so that no half of it is ever taken for the whole."""
    gone = room / "gone"
    if gone.exists():
        shutil.rmtree(gone)
    folder.rename(gone)
    shutil.rmtree(gone)


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")
