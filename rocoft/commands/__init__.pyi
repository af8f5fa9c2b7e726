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
from .files import differences, replacing, replacing_folder, write_text
from .main import Command, Group
from .options import OptionError, above_zero, option, positive
from .progress import Progress, progress_bar

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
    # files
    "differences",
    "replacing",
    "replacing_folder",
    "write_text",
    # main
    "Command",
    "Group",
    # options
    "OptionError",
    "above_zero",
    "option",
    "positive",
    # progress
    "Progress",
    "progress_bar",
]
