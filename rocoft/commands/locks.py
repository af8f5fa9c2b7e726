"""Locks of one process against others, which end with the process however it ends."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rocoft.commands.files import PART


class BusyError(OSError):
    """Another process holds a lock."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, or refuse at once.

    The file is empty and is removed at the end. One that a killed process has left
    holds nothing.

    Args:
        path: The lock's file, in an existing folder.

    Yields:
        Nothing.

    Raises:
        BusyError: If another process holds it.
        OSError: If the file cannot be made, or is a link or no file: what stands there
            belongs to someone else.
    """
    descriptor = _held(path)
    try:
        yield
    finally:
        # While it is held: whoever has opened it sees that it is no longer the file.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder that goes at the end, or when a killed process cannot remove it.

    In the second case it goes when the next one of the prefix is made.

    Args:
        parent: The folder in which it is made.
        prefix: How its name begins.

    Yields:
        The folder, empty.
    """
    for left in parent.iterdir():
        if left.name.startswith(prefix) and left.name.endswith(PART):
            _remove_dead(left)
    while True:
        folder = Path(tempfile.mkdtemp(PART, prefix, parent))
        try:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(folder / "lock"))
                except BusyError:  # Taken for a dead one before it was locked.
                    continue
                (folder / "content").mkdir()
                yield folder / "content"
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_dead(folder: Path) -> None:
    """Remove a folder of a process that has ended, and nothing of anyone else."""
    with contextlib.suppress(OSError):
        is_own = folder.stat(follow_symlinks=False).st_uid == os.getuid()
        if is_own and not folder.is_symlink() and (folder / "lock").is_file():
            with locked(folder / "lock"):
                shutil.rmtree(folder)


def _held(path: Path) -> int:
    """Return the descriptor of the locked file that stands at a path."""
    import fcntl  # Not on Windows, where all else works.

    while True:
        descriptor = _opened(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                there = path.stat(follow_symlinks=False)
                if os.path.samestat(there, os.fstat(descriptor)):
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise BusyError(f"another process holds {str(path)!r}") from error
        except BaseException:
            os.close(descriptor)
            raise
        # Its last holder removed it between the two calls.
        os.close(descriptor)


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise _foreign(path, error.errno) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _foreign(path, errno.EINVAL)
    return descriptor


def _foreign(path: Path, number: int) -> OSError:
    return OSError(
        number, f"{str(path)!r} is no lock but a link or something else. Remove it"
    )
