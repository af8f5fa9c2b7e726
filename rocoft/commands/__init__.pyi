from .choices import (
    DEFAULT_MODEL,
    STRATEGIES,
    Bits,
    Dtype,
    EmbeddedModel,
    Head,
    Readout,
    Strategy,
    embedded_model,
)
from .failures import CheckFailedError, reason
from .files import (
    differences,
    remove_parts,
    replacing,
    replacing_folder,
    write_text,
)
from .folders import MARK, FolderKind, Place, claimed, is_taken, read_mark, sweep
from .locks import BusyError, locked, temporary_folder
from .main import Command, Group, launched_rank
from .options import OptionError, above_zero, option, positive
from .progress import Progress, progress_bar
from .show import show_json, show_lines, show_tables
from .text import markdown, markdown_code, printable, printable_json

__all__ = [
    # choices
    "Bits",
    "DEFAULT_MODEL",
    "Dtype",
    "EmbeddedModel",
    "Head",
    "Readout",
    "STRATEGIES",
    "Strategy",
    "embedded_model",
    # failures
    "CheckFailedError",
    "reason",
    # files
    "differences",
    "remove_parts",
    "replacing",
    "replacing_folder",
    "write_text",
    # folders
    "FolderKind",
    "MARK",
    "Place",
    "claimed",
    "is_taken",
    "read_mark",
    "sweep",
    # locks
    "BusyError",
    "locked",
    "temporary_folder",
    # main
    "Command",
    "Group",
    "launched_rank",
    # options
    "OptionError",
    "above_zero",
    "option",
    "positive",
    # progress
    "Progress",
    "progress_bar",
    # show
    "show_json",
    "show_lines",
    "show_tables",
    # text
    "markdown",
    "markdown_code",
    "printable",
    "printable_json",
]
