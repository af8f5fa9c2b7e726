from .kinds import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows, Space, Sum
from .maps import InputSide, LowRank, Map, Maps, Sketch, Slices, Whole, oriented
from .notation import parse_space
from .resolution import resolve
from .restricted import Pinned, Without

__all__ = [
    # for users
    "Full",
    "Rows",
    "Columns",
    "LoRA",
    "Bias",
    "Head",
    "Norm",
    "Embeddings",
    "Space",
    "parse_space",
    "resolve",
    # kinds
    "Sum",
    # maps
    "InputSide",
    "LowRank",
    "Map",
    "Maps",
    "Sketch",
    "Slices",
    "Whole",
    "oriented",
    # restricted
    "Pinned",
    "Without",
]
