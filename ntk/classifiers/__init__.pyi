from .agreement import (
    Interval,
    kappa,
    margin_correlation,
    paired_difference,
)
from .asymmetric import AsymmetricRidgeClassifier
from .crossfit import CrossFitted, Fold, cross_fit
from .estimators import KernelLogisticRegression, KernelRidgeClassifier, KernelSVC
from .logistic import logistic_path
from .ratios import RatioSummary, ratio_of_means, ratio_over_seeds, recovery
from .tuning import Method, Tuned, tune

__all__ = [
    # for users
    "KernelRidgeClassifier",
    "KernelLogisticRegression",
    "KernelSVC",
    "AsymmetricRidgeClassifier",
    "tune",
    "cross_fit",
    # agreement
    "Interval",
    "kappa",
    "margin_correlation",
    "paired_difference",
    # crossfit
    "CrossFitted",
    "Fold",
    # logistic
    "logistic_path",
    # ratios
    "RatioSummary",
    "ratio_of_means",
    "ratio_over_seeds",
    "recovery",
    # tuning
    "Method",
    "Tuned",
]
