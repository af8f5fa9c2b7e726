"""What the commands print: lines, tables and JSON, with text from outside escaped."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rocoft.commands.text import printable, printable_json

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 110
"""Width of tables that do not go to a terminal, in characters."""


def show_lines(lines: Iterable[str], *, error: bool = False) -> None:
    """Print lines as they are, each as one line.

    Args:
        lines: The lines.
        error: Whether they go to standard error.
    """
    for line in lines:
        print(printable(line), file=sys.stderr if error else sys.stdout)  # noqa: T201


def show_json(record: Any) -> None:
    """Print a record as JSON.

    Args:
        record: JSON values, or their text.
    """
    text = record if isinstance(record, str) else json.dumps(record, indent=1)
    print(printable_json(text.rstrip("\n")))  # noqa: T201


def show_tables(tables: Sequence["Table"], lines: Iterable[str] = ()) -> None:
    """Print tables, then lines, which wrap at the width of a terminal.

    Args:
        tables: The tables; their cells and titles are escaped already.
        lines: The lines.
    """
    from rich.console import Console

    class ToPipe(Console):
        """A console that leaves a broken pipe to whoever prints."""

        def on_broken_pipe(self) -> None:
            # Called while the error is handled.
            raise

    # Nothing is read as markup: names and paths hold brackets.
    console = ToPipe(
        width=None if sys.stdout.isatty() else WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(printable(line))
