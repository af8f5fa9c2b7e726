from .choices import STRATEGIES, Bits, Dtype, Head, Readout, Strategy
from .files import differences, replacing, replacing_folder, write_text
from .main import Command, Group
from .options import OptionError, above_zero, option, positive
from .progress import Progress, progress_bar

__all__ = [
    # choices
    "Bits",
    "Dtype",
    "Head",
    "Readout",
    "STRATEGIES",
    "Strategy",
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
