"""Errors that are no mistakes of the program: each becomes one line.

Errors of ours are ValueError or OSError and say their way out. Other libraries have
classes of their own, or raise RuntimeError for a full disk and for lack of memory.
Anything else is a mistake of the program and keeps its traceback.
"""

import errno
import re

from rocoft.commands.text import printable


class CheckFailedError(RuntimeError):
    """Results have failed a check of the program's own: nothing is right in them."""


MEMORY = (
    "there is not enough memory. Give a smaller batch size or --max-length, or a "
    "budget with --memory where the command has it"
)
DISK = "the disk is full. Make room, or choose another folder with --output"
_ALLOCATION = (
    r"out of memory|can't allocate memory|cannot allocate memory|bad allocation|"
    r"bad_alloc|alloc_failed|not enough memory"
)
_WRITING = (
    r"no space left|disk quota|file write failed|failed writing file|iostream error|"
    r"inline_container|unexpected pos \d+ vs"
)
_CLASSES = {
    ("_csv", "Error"): "a table of text cannot be read",
    ("safetensors", "SafetensorError"): "a file of tensors is damaged or incomplete",
    ("yaml", "YAMLError"): "a YAML file cannot be read",
    ("zipfile", "BadZipFile"): "an archive is damaged",
    ("zlib", "error"): "a compressed file is damaged",
    ("_pickle", "UnpicklingError"): "a file of weights is damaged or not to be trusted",
    ("pickle", "UnpicklingError"): "a file of weights is damaged or not to be trusted",
    ("datasets", "DatasetGenerationError"): "a data set cannot be read",
    ("jinja2", "TemplateError"): "a template of the tokenizer cannot be used",
    ("torch", "AcceleratorError"): "the device failed",
}
"""Classes of other libraries by package and name, and what they mean."""


def reason(error: BaseException) -> str | None:
    """Return an error of a user or a machine in one line.

    Args:
        error: Any error.

    Returns:
        What went wrong; None for a mistake of the program.

    Example:
        >>> reason(RuntimeError("[enforce fail] can't allocate memory: 8 bytes"))
        'there is not enough memory. Give a smaller batch size or --max-length, or a \
budget with --memory where the command has it'
        >>> reason(KeyError("x")) is None
        True
    """
    text = _one_line(error)
    if _is_memory(error):
        return MEMORY
    if _is_disk(error) or _matches(error, _WRITING):
        return DISK
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read. Make it flatter"
    for (package, name), meaning in _CLASSES.items():
        for each in type(error).__mro__:
            if each.__name__ == name and each.__module__.split(".")[0] == package:
                return f"{meaning}: {text}"
    if isinstance(error, ImportError) and not _is_own(error):
        return f"{text}. Install what is missing, or leave out the option that needs it"
    if isinstance(error, TypeError) and _is_of_a_schedule(text):
        return (
            f"the schedule of the learning rate needs arguments that no option gives: "
            f"{text}. Choose another --lr-scheduler-type"
        )
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return text
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text)


def _is_own(error: ImportError) -> bool:
    return (error.name or "").split(".")[0] in {"ntk", "rocoft"}


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _matches(error, _ALLOCATION)


def _is_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def _matches(error: BaseException, pattern: str) -> bool:
    """Whether a library says by its text what it has no class for."""
    other = isinstance(error, RuntimeError) or "Safetensor" in type(error).__name__
    return other and re.search(pattern, str(error), re.IGNORECASE) is not None


def _is_of_a_schedule(text: str) -> bool:
    called = r"_?get_\w*schedule\w*\(\)|\w*(LR|Plateau)\.__init__\(\)"
    return re.match(called, text) is not None
