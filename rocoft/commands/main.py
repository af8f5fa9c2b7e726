"""The one way in which commands run: options, errors, exit codes, interruption.

Options are read before anything slow is imported: ``--help`` and mistyped options
answer at once.
"""

import contextlib
import importlib
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rocoft.commands.failures import CheckFailedError, reason
from rocoft.commands.options import nearest, parse_options, version
from rocoft.commands.text import printable

DONE = 0
FAILED = 1
USAGE_ERROR = 2
WRONG = 3
"""Results failed a check of the program itself; nothing was written."""
INTERRUPTED = 130
UNREAD = 141
"""Whoever read the output has gone; shells say so of programs that a pipe ends."""

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Where launchers of several processes say which one this is."""


@dataclass(frozen=True)
class Command:
    """A command: its name, its options, and what it runs.

    Attributes:
        module: The module that ``python -m`` runs.
        options: The dataclass of its options.
        run: The module whose function ``run`` does the work, imported once the options
            are read. The function takes the options and the command line, and returns
            sentences about what failed.
        description: The help's first paragraph.
        epilog: The help's last paragraph.
        interrupted: What an interruption leaves, said when it happens.
    """

    module: str
    options: type
    run: str
    description: str
    epilog: str = ""
    interrupted: str = "nothing was written"

    @property
    def name(self) -> str:
        """The sub-command of ``ntk``."""
        return self.module.rpartition(".")[2]

    def parse(self, given: Sequence[str]) -> Any:
        """Read the command's options.

        Args:
            given: Its arguments.

        Returns:
            The options.

        Raises:
            OptionError: If they cannot be read.
        """
        return parse_options(
            self.options,
            given,
            usage=f"ntk {self.name} [options]\n"
            f"   or: python -m {self.module} [options]",
            description=self.description,
            epilog=self.epilog,
        )

    def __call__(
        self, argv: Sequence[str] | None = None, *, is_process: bool = False
    ) -> int:
        """Run the command.

        Args:
            argv: Its arguments; None means those of the process.
            is_process: Whether the process is there for this command alone and may end
                with it; with ``argv=None`` it is.

        Returns:
            The exit code: 0 done, 1 parts failed, 2 bad input, 3 if results failed a
            check, 130 interrupted, 141 if nobody reads the output.
        """
        given = list(sys.argv[1:] if argv is None else argv)
        _write_what_the_encoding_lacks()
        try:
            with _interrupted_at_once(is_process or argv is None):
                options = self.parse(given)
                work = importlib.import_module(self.run)
                from rocoft.commands.progress import quiet_libraries

                importlib.import_module("transformers")
            with quiet_libraries():
                line = shlex.join(["python", "-m", self.module, *given])
                failed = work.run(options, line)
            sys.stdout.flush()
            for what in failed:
                _say(f"failed: {what}")
        except BrokenPipeError:
            _write_to_nobody()
            return UNREAD
        except KeyboardInterrupt:
            if not launched_rank():
                _say(f"interrupted; {self.interrupted}")
            return INTERRUPTED
        except CheckFailedError as error:
            _say(f"error: {error}")
            return WRONG
        except Exception as error:
            if (text := reason(error)) is None:
                raise
            if not launched_rank() or _is_of_this_process(error):
                _say(f"error: {text}")
            return USAGE_ERROR
        return FAILED if failed else DONE


@dataclass(frozen=True)
class Group:
    """Commands as sub-commands of one.

    Attributes:
        name: The name on the command line.
        description: The help's first paragraph.
        commands: By sub-command its module, whose ``main`` is a `Command`, and what it
            is for.
    """

    name: str
    description: str
    commands: Mapping[str, tuple[str, str]]

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run a sub-command.

        Args:
            argv: Its name and arguments; None means those of the process.

        Returns:
            The exit code.
        """
        name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
        if name in self.commands:
            command = importlib.import_module(self.commands[name][0]).main
            return int(command(rest, is_process=argv is None))
        if name in {"-h", "--help"}:
            print(self.help())  # noqa: T201
            return DONE
        if name == "--version":
            print(version())  # noqa: T201
            return DONE
        near = nearest(name, [*self.commands, "--help", "--version"])
        _say(f"error: {name} is no command.{near} See {self.name} --help.")
        return USAGE_ERROR

    def help(self) -> str:
        """Return the list of commands."""
        return "\n".join(
            (
                f"usage: {self.name} COMMAND [options]",
                f"   or: python -m {self.name} COMMAND [options]",
                "",
                self.description,
                "",
                "commands:",
                *(f"  {key:10} {text}" for key, (_, text) in self.commands.items()),
                "",
                f"{self.name} COMMAND --help describes a command's options.",
            )
        )


def launched_rank() -> int:
    """Return which of several launched processes this is, by the launcher's word."""
    return max(int(os.environ.get(name, 0)) for name in RANKS)


@contextlib.contextmanager
def _interrupted_at_once(is_process: bool) -> Iterator[None]:
    """End the process with one line if it is interrupted while modules are imported.

    An exception would pass through the imports of other libraries, some of which report
    it as an error of their own.
    """
    # Whoever ignores or handles interruptions, goes on doing so.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_process and is_usual and is_main):
        yield
        return

    def end(*_: Any) -> None:
        if not launched_rank():
            _say("interrupted")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_of_this_process(error: Exception) -> bool:
    """Whether an error may have met one of several processes alone."""
    # Bad input meets all of them, and the first one says so.
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    return joined and isinstance(error, OSError)


def _write_what_the_encoding_lacks() -> None:
    """Let the streams write out characters that their encoding lacks, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    """Say a line, unless nobody listens."""
    with contextlib.suppress(BrokenPipeError):
        print(printable(text), file=sys.stderr)  # noqa: T201


def _write_to_nobody() -> None:
    """Let what is still to be written, at the end of the process too, go nowhere."""
    # Objects that stand in for the streams have no descriptor.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
