"""What the commands show while they work, on standard error."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

from rocoft.commands.text import printable

Progress = Callable[[str, int, int], None]
"""Told what is done, how many steps of it, and of how many."""


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """Show every stage of the work with the time left.

    Args:
        quiet: Show nothing.

    Yields:
        What is to be told of the work; None if nothing is shown.
    """
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    text = TextColumn("{task.description:>20}", markup=False)
    columns = (text, BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep loading bars and advice of other libraries out of the output.

    Yields:
        Nothing.
    """
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
