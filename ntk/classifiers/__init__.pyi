from .agreement import Interval, RatioSummary, kappa, margin_correlation, mean_ratio
from .asymmetric import AsymmetricRidgeClassifier
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
    # agreement
    "Interval",
    "RatioSummary",
    "kappa",
    "margin_correlation",
    "mean_ratio",
    # logistic
    "logistic_path",
    # tuning
    "Method",
    "Tuned",
]
