"""Empirical neural tangent kernels of Hugging Face models, over chosen parameters.

>>> import ntk
>>> ntk.Rows(3).at("query", "value") + ntk.Bias()  # doctest: +ELLIPSIS
Sum(...)
"""

from ntk.approximation import sketched_ntk
from ntk.calibration import calibrate
from ntk.classifiers import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
)
from ntk.distance import alignment, cka, cosine, relative_difference, subspace_overlap
from ntk.importance import sampled_ntk
from ntk.kernel import empirical_ntk, gram_matrix
from ntk.notation import parse_space
from ntk.spaces import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows
from ntk.spectrum import effective_dimension, eigensystem, eigenvalues, entropy_rank
from ntk.storage import load_kernels, save_kernels

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
