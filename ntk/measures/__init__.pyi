from .change import EIGENSPACE, kernel_change
from .distance import (
    UndefinedError,
    alignment,
    cka,
    cosine,
    relative_difference,
    subspace_overlap,
)
from .gram import COUPLED, REDUCTIONS, Reduction, contrasts, gram_matrix, reduced
from .perturbation import Bracket, brackets
from .risk import RidgeRegression, left_out_residuals
from .spectrum import (
    PSD_TOLERANCE,
    Array,
    NotPSDError,
    as_array,
    as_symmetric,
    as_targets,
    condition_number,
    effective_dimension,
    eigensystem,
    eigenvalues,
    entropy_rank,
    numerical_rank,
    relative_ridge,
)
from .stability import growth

__all__ = [
    # for users
    "gram_matrix",
    "reduced",
    "contrasts",
    "eigenvalues",
    "eigensystem",
    "effective_dimension",
    "entropy_rank",
    "condition_number",
    "relative_difference",
    "cosine",
    "cka",
    "alignment",
    "subspace_overlap",
    "kernel_change",
    "RidgeRegression",
    # change
    "EIGENSPACE",
    # distance
    "UndefinedError",
    # gram
    "COUPLED",
    "REDUCTIONS",
    "Reduction",
    # perturbation
    "Bracket",
    "brackets",
    # risk
    "left_out_residuals",
    # spectrum
    "Array",
    "NotPSDError",
    "PSD_TOLERANCE",
    "as_array",
    "as_symmetric",
    "as_targets",
    "numerical_rank",
    "relative_ridge",
    # stability
    "growth",
]
