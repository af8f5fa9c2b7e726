from .accumulator import Accumulator
from .contraction import Contraction, Operations, block_entries, block_gram
from .empirical import compute, empirical_ntk, reader
from .engine import (
    LEFT_BYTES,
    Counter,
    Engine,
    EngineInput,
    KernelResult,
    Store,
    Sums,
    groups,
    parameters_of,
    stored_maps,
)
from .estimates import (
    ApproximateKernel,
    Estimator,
    SketchEstimator,
    estimated_ntk,
    sketched_ntk,
)
from .features import Features, Stored, stored_bytes
from .importance import SamplingEstimator, sampled_ntk
from .layerwise import LayerKernel, combined, gram_matrices, layer_kernels, layer_spaces
from .options import KINDS, Implementation, KernelOptions, Kind, Precision
from .positions import position_gram
from .shared import shared_features
from .spot_check import (
    SpotCheckError,
    check_entries,
    reference_model,
    require_small_errors,
    tolerated_error,
)

__all__ = [
    # for users
    "empirical_ntk",
    "estimated_ntk",
    "sketched_ntk",
    "sampled_ntk",
    "layer_kernels",
    "KernelOptions",
    "KernelResult",
    # accumulator
    "Accumulator",
    # contraction
    "Contraction",
    "Operations",
    "block_entries",
    "block_gram",
    # empirical
    "compute",
    "reader",
    # engine
    "Counter",
    "Engine",
    "EngineInput",
    "LEFT_BYTES",
    "Store",
    "Sums",
    "groups",
    "parameters_of",
    "stored_maps",
    # estimates
    "ApproximateKernel",
    "Estimator",
    "SketchEstimator",
    # features
    "Features",
    "Stored",
    "stored_bytes",
    # importance
    "SamplingEstimator",
    # layerwise
    "LayerKernel",
    "combined",
    "gram_matrices",
    "layer_spaces",
    # options
    "Implementation",
    "KINDS",
    "Kind",
    "Precision",
    # positions
    "position_gram",
    # shared
    "shared_features",
    # spot_check
    "SpotCheckError",
    "check_entries",
    "reference_model",
    "require_small_errors",
    "tolerated_error",
]
