"""Work that processes share: one that is killed costs its own work alone."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
import transformers

from rocoft.commands import reason

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that processes have to end before they are killed."""


class WorkError(ValueError):
    """Work that failed by its input or the machine, in one line."""


@dataclass
class _Worker(Generic[T]):
    """A process, the way to it, and what it works on."""

    process: BaseProcess
    way: Connection
    work: T | None = None


def results(
    units: Sequence[T], work: Callable[[T], Any], jobs: int
) -> Generator[tuple[T, Any]]:
    """Do work, in this process or in several.

    Args:
        units: What is worked on, in the order in which it starts; picklable if several
            processes share it.
        work: From a unit to its result.
        jobs: Number of processes.

    Yields:
        Each unit with its result, or with a `WorkError`, in the order in which they
        end.

    Raises:
        RuntimeError: For a mistake of the program in another process, with its
            traceback.
    """
    if jobs == 1 or len(units) < 2:
        for unit in units:
            yield unit, _attempted(work, unit)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    left = list(units)
    workers: list[_Worker[T]] = []
    try:
        while left or workers:
            while left and len(workers) < jobs:
                workers.append(_started(work, threads))
                _give(workers[-1], left.pop(0))
            for way in wait([worker.way for worker in workers]):
                worker = next(w for w in workers if w.way is way)
                done, result = worker.work, _answer(worker)
                assert done is not None
                if worker.work is None and left:
                    _give(worker, left.pop(0))
                else:
                    # It has died, or nothing is left for it.
                    workers.remove(worker)
                    _end([worker])
                yield done, result
    finally:
        _end(workers)


def _attempted(work: Callable[[T], Any], unit: T) -> Any:
    """Return a result, or the known error that it ended with."""
    try:
        return work(unit)
    except Exception as error:
        if (text := reason(error)) is None:
            raise
        return WorkError(text)


def _started(work: Callable[[T], Any], threads: int) -> _Worker[T]:
    # Forked processes hang in torch's thread pool.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work, threads))
    # A terminal interrupts all its processes. This one alone answers, and ends others.
    # The tracker, started with the first process, would let interruptions through.
    resource_tracker.ensure_running()
    with _uninterrupted():
        process.start()
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker[T], unit: T) -> None:
    worker.work = unit
    # One that has died already answers nothing, which is seen there.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.way.send(unit)


def _answer(worker: _Worker[T]) -> Any:
    """Return what a process answers; its work is none if it is ready for more."""
    try:
        is_result, answer = worker.way.recv()
    except (EOFError, OSError):
        worker.process.join(PATIENCE)
        return WorkError(f"its process {_end_of(worker.process.exitcode)}.")
    if not is_result:
        raise RuntimeError(f"in another process:\n{answer}")
    worker.work = None
    return answer


def _end_of(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps for lack of memory; fewer --jobs need less"
    return f"was ended by {name}{hint if -code == signal.SIGKILL else ''}"


def _end(workers: Sequence[_Worker[T]]) -> None:
    """End processes, whatever they do."""
    for worker in workers:
        worker.way.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(PATIENCE)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold interruptions back; processes that are started here never see any."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(way: Connection, work: Callable[[T], Any], threads: int) -> None:
    """Work on what comes until nothing does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prepare(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            unit = way.recv()
            try:
                answer = True, _attempted(work, unit)
            except Exception:
                answer = False, traceback.format_exc()
            way.send(answer)


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
