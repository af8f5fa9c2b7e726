from .classifiers.estimators import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
)
from .gradients.contrasts import ContrastReadout
from .gradients.data_selection import calibrate
from .kernels.empirical import empirical_ntk
from .kernels.estimates import sketched_ntk
from .kernels.importance import sampled_ntk
from .measures.distance import (
    alignment,
    cka,
    cosine,
    relative_difference,
    subspace_overlap,
)
from .measures.gram import contrasts, gram_matrix
from .measures.spectrum import (
    effective_dimension,
    eigensystem,
    eigenvalues,
    entropy_rank,
)
from .scale.storage import load_kernels, save_kernels
from .spaces.kinds import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows
from .spaces.notation import parse_space

__all__ = [
    # which parameters
    "Full",
    "Rows",
    "Columns",
    "LoRA",
    "Bias",
    "Head",
    "Norm",
    "Embeddings",
    "parse_space",
    "calibrate",
    # kernels
    "empirical_ntk",
    "sketched_ntk",
    "sampled_ntk",
    "gram_matrix",
    "contrasts",
    "ContrastReadout",
    "save_kernels",
    "load_kernels",
    # what a kernel looks like
    "eigenvalues",
    "eigensystem",
    "effective_dimension",
    "entropy_rank",
    # how far two kernels are apart, and from a target
    "relative_difference",
    "cosine",
    "cka",
    "subspace_overlap",
    "alignment",
    # classifiers on kernels
    "KernelRidgeClassifier",
    "KernelLogisticRegression",
    "KernelSVC",
]
