from .capture import backward, complete, record
from .contrasts import ContrastReadout, MarginReadout
from .coverage import Service, Verdict, Verdicts
from .data_selection import calibrate, statistics
from .factors import (
    Factor,
    Matrix,
    Table,
    Uses,
    Vector,
    at_least_float32,
    block,
    dense,
    examples,
    is_prefix,
    joined,
    like,
    outputs,
    raised,
    workspace,
)
from .function import (
    Batch,
    Float64Throughout,
    FunctionError,
    Inputs,
    NetworkFunction,
    Readout,
    batch_length,
    check_model,
    evaluating,
    logits,
    take,
    to_batches,
)
from .jacobians import (
    Coordinates,
    TangentFunction,
    differentiated_twice,
    differing,
    jacobian,
    looped,
    pushed,
)
from .judge import (
    Key,
    autograd_rows,
    coordinate_rows,
    map_keys,
    output_gradients,
)
from .passes import sample
from .rules import Use
from .spot_checks import SpotChecks

__all__ = [
    # for users
    "NetworkFunction",
    "evaluating",
    "Float64Throughout",
    "jacobian",
    "calibrate",
    "ContrastReadout",
    # capture
    "backward",
    "complete",
    "record",
    # contrasts
    "MarginReadout",
    # coverage
    "Service",
    "Verdict",
    "Verdicts",
    # data_selection
    "statistics",
    # factors
    "Factor",
    "Matrix",
    "Table",
    "Uses",
    "Vector",
    "at_least_float32",
    "block",
    "dense",
    "examples",
    "is_prefix",
    "joined",
    "like",
    "outputs",
    "raised",
    "workspace",
    # function
    "Batch",
    "FunctionError",
    "Inputs",
    "Readout",
    "batch_length",
    "check_model",
    "logits",
    "take",
    "to_batches",
    # jacobians
    "Coordinates",
    "TangentFunction",
    "differentiated_twice",
    "differing",
    "looped",
    "pushed",
    # judge
    "Key",
    "autograd_rows",
    "coordinate_rows",
    "map_keys",
    "output_gradients",
    # passes
    "sample",
    # rules
    "Use",
    # spot_checks
    "SpotChecks",
]
