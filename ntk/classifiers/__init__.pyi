from .agreement import (
    Interval,
    RatioSummary,
    kappa,
    margin_correlation,
    mean_ratio,
    paired_difference,
)
from .asymmetric import AsymmetricRidgeClassifier
from .crossfit import CrossFitted, Fold, cross_fit
from .estimators import KernelLogisticRegression, KernelRidgeClassifier, KernelSVC
from .logistic import logistic_path
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
    "RatioSummary",
    "kappa",
    "margin_correlation",
    "mean_ratio",
    "paired_difference",
    # crossfit
    "CrossFitted",
    "Fold",
    # logistic
    "logistic_path",
    # tuning
    "Method",
    "Tuned",
]
