from .architecture import (
    Architecture,
    LinearWeight,
    SelectionError,
    fused_parts,
    match,
    order_of_place,
)
from .backbone import Backbone, allow_padding, fit_probe, length_limit, load_backbone
from .merging import merged
from .notation import read, split_term
from .offloaded import keep_on_host
from .on_use import LinearOnUse, base_weight
from .pretrained import EMBEDDED_NAME, load_pretrained, resolved_device
from .quantised import dequantised_on_use
from .readouts import LabelWords, MeanPooled, Prompted, SharedOutput, logits
from .selection import DATA_STRATEGIES, Axis, select

__all__ = [
    # for users
    "load_backbone",
    "Backbone",
    "Architecture",
    "dequantised_on_use",
    "keep_on_host",
    "SelectionError",
    # architecture
    "LinearWeight",
    "fused_parts",
    "match",
    "order_of_place",
    # backbone
    "allow_padding",
    "fit_probe",
    "length_limit",
    # merging
    "merged",
    # notation
    "read",
    "split_term",
    # on_use
    "LinearOnUse",
    "base_weight",
    # pretrained
    "EMBEDDED_NAME",
    "load_pretrained",
    "resolved_device",
    # readouts
    "LabelWords",
    "MeanPooled",
    "Prompted",
    "SharedOutput",
    "logits",
    # selection
    "Axis",
    "DATA_STRATEGIES",
    "select",
]
