from .architecture import (
    Architecture,
    LinearWeight,
    SelectionError,
    fused_parts,
    match,
    order_of_place,
)
from .backbone import (
    Backbone,
    allow_padding,
    check_direction,
    length_limit,
    load_backbone,
)
from .location import Location, as_given, locate
from .merging import merged, shared_weights
from .notation import read, split_term
from .offloaded import keep_on_host
from .on_use import LinearOnUse, base_weight
from .pretrained import BackboneError, load_pretrained, resolved_device
from .probe import fit_probe, heads_without
from .quantised import dequantised_on_use
from .readouts import LabelWords, MeanPooled, Prompted, SharedOutput, logits
from .selection import DATA_STRATEGIES, Axis, check_counts, select, select_each

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
    "check_direction",
    "fit_probe",
    "heads_without",
    "length_limit",
    # location
    "Location",
    "as_given",
    "locate",
    # merging
    "merged",
    "shared_weights",
    # notation
    "read",
    "split_term",
    # on_use
    "LinearOnUse",
    "base_weight",
    # pretrained
    "BackboneError",
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
    "check_counts",
    "select",
    "select_each",
]
