"""Classify with a precomputed kernel: ridge, logistic regression and SVM.

Scikit-learn estimators with ``fit(K, y)``, ``predict(K)``, ``decision_function(K)`` and
``score(K, y)``, tagged ``pairwise``: `cross_val_score` and `GridSearchCV` split both
example axes of K. A training kernel is symmetric positive semi-definite, in a form that
`ntk.classifiers.outputs` lists: ``(n, n)``, ``(n, n, c, c)`` or, on contrasts,
``(n, n, c - 1, c - 1)`` for n training examples and c classes, ``(m, n, ...)`` for m
test examples. In the coupled forms f(x)[c] = sum_{j, d} K[x, j, c, d] a[j, d], and
output c of the model belongs to ``classes_[c]``. Decision functions and probabilities
are those of the c classes.

Logistic regression gives the same probabilities on a kernel K of outputs as on its
contrasts Q^T K Q at the same strength: its residuals p - y are orthogonal to the
direction that softmax ignores, so f = K a with a = Q b. So does the SVM of two classes.
Ridge regression fits that direction too if it is given: take the contrasts.

The offset is the model's own output f0, logits ``(n, c)``, or ``(n,)`` margins if
o = 1, possibly scaled down (Malladi et al., 2023): predictions are f0 plus the kernel's
part. The default offset is the constant that predicts the class frequencies, the limit
of infinitely regularised ridge or logistic regression.

Regularisation is in units of ``scale_``, the mean diagonal entry of the Gram matrix, or
chosen on the training examples by leaving out whole examples. Cross-validation with an
offset needs scikit-learn's metadata routing, `set_fit_request` and `set_score_request`.

On resampled 16-shot draws of ten pairs of model and task, the alpha that leave-one-out
chooses is 2.4 +- 0.3 points below the best one in hindsight. A normal prior of log10
alpha around 0 with a deviation of one decade gains 0.5 +- 0.2 points over it,
but with the deviation chosen on the other model and tasks 0.4 +- 0.3; fixed strengths
so chosen 0.3 +- 0.3, cosine normalisation 0.3 +- 0.3. None is a safe default
(``figures/ridge_strength.json``, its command inside; jackknife errors over the pairs).
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC

from ntk.classifiers.base import (
    TIE,
    Array,
    KernelClassifier,
    Labels,
    Maybe,
    regularisations,
)
from ntk.classifiers.logistic import logistic_path
from ntk.classifiers.outputs import MARGIN, Outputs
from ntk.classifiers.ridge import RidgeClassifier, Solution
from ntk.measures import PSD_TOLERANCE, eigensystem, left_out_residuals, numerical_rank

__all__ = ["KernelLogisticRegression", "KernelRidgeClassifier", "KernelSVC"]

ALPHAS = tuple(10.0 ** (i / 2) for i in range(-12, 7))
CS = tuple(10.0**i for i in range(-3, 5))


class KernelRidgeClassifier(RidgeClassifier):
    """Kernel ridge regression on class indicators.

    Solves (K + alpha scale_ I) a = r, K being the Gram matrix. Targets are one-hot
    vectors, as the o fitted functions (+-1 for a margin); r is targets - offset,
    without an offset targets - their mean.

    Leave-one-out needs no refit: with G = (K + alpha scale_ I)^-1 in c x c blocks, the
    residual of example i left out is exactly G[i, i]^-1 (G r)[i], with the mean of the
    other examples and the same `scale_`. One eigendecomposition serves all alphas.

    Attributes:
        alpha_: The alpha used.
        loo_error_: Mean squared leave-one-out residual over examples and outputs.
        loo_accuracy_: Leave-one-out accuracy.
        dual_coef_: ``(n, o)``.
        intercept_: ``(o,)``, the mean of the targets; 0 with an offset.
    """

    def __init__(
        self,
        alpha: float | None = None,
        *,
        alphas: Sequence[float] = ALPHAS,
        tolerance: float = PSD_TOLERANCE,
    ) -> None:
        """Store the parameters.

        Args:
            alpha: Ridge in units of `scale_`, above 0. None chooses the smallest
                leave-one-out error, the largest alpha among equals.
            alphas: Candidates for alpha.
            tolerance: Relative rounding error of K, see
                `ntk.measures.spectrum.eigenvalues`.
        """
        self.alpha = alpha
        self.alphas = alphas
        self.tolerance = tolerance

    def _solutions(
        self, gram: Array, r: Array, ridges: Sequence[float]
    ) -> Iterator[Solution]:
        values, U = eigensystem(gram, tolerance=self.tolerance)
        n, b = r.shape[:2]
        U_i = U.reshape(n, b, -1)
        U_r, U_1 = U.T @ r.reshape(n * b, -1), U_i.sum(axis=0).T
        for ridge in ridges:
            G_U = (U / (values + ridge)).reshape(n, b, -1)
            yield G_U @ U_r, G_U @ U_1, partial(left_out_residuals, G_U, U_i)


class _CrossValidatedClassifier(KernelClassifier):
    """A classifier whose C is chosen by stratified k-fold cross-validation."""

    def __init__(
        self,
        C: float | None = None,
        *,
        Cs: Sequence[float] = CS,
        cv: int = 5,
        random_state: int = 0,
        tolerance: float = PSD_TOLERANCE,
    ) -> None:
        """Store the parameters.

        Args:
            C: Inverse regularisation in units of 1 / `scale_`, above 0. None chooses by
                cross-validation, the smallest C among equals.
            Cs: Candidates for C.
            cv: Number of folds, reduced to the size of the smallest class. If that is
                1, the smallest C is used, with a warning.
            random_state: Seed of the folds.
            tolerance: Relative rounding error of K, see
                `ntk.measures.spectrum.eigenvalues`.
        """
        self.C = C
        self.Cs = Cs
        self.cv = cv
        self.random_state = random_state
        self.tolerance = tolerance

    def _splits(self, labels: Labels) -> list[tuple[Labels, Labels]]:
        smallest = int(np.bincount(labels).min())
        if self.C is None and smallest < 2:
            message = "A class has one example: no folds can choose `C`, it is min(Cs)."
            warnings.warn(f"{message} Sample two of each or pass `C`.", stacklevel=4)
        if self.C is not None or smallest < 2:
            return []
        k, seed = min(self.cv, smallest), self.random_state
        folds = StratifiedKFold(k, shuffle=True, random_state=seed)
        return list(folds.split(labels, labels))


class KernelLogisticRegression(_CrossValidatedClassifier):
    """Multinomial logistic regression penalised by the norm of the function.

    Minimises sum_i CE(y[i], f(x_i)) + |f - offset|^2 / (2 C), where f - offset = K a
    has the squared norm a' K a / scale_ and CE is the softmax cross-entropy of
    the logits. (Hence k in scalar form with 2 C is k I in block form with C.)

    K = P P' with P = U sqrt(L) is exact up to the directions below the numerical rank.
    SciPy's trust-region Newton method solves the problem in the coordinates of P. C is
    chosen by log-loss, with the same P and `scale_` in all folds.

    Attributes:
        C_: The C used.
        cv_loss_: Mean log-loss in nats over the folds; None without cross-validation.
        dual_coef_: ``(n, o)``.
        intercept_: ``(o,)``, log class frequencies or log-odds; 0 with an offset.
    """

    def predict_proba(self, K: ArrayLike, offset: Maybe = None) -> Array:
        """Return ``(m, c)`` class probabilities, see `decision_function`."""
        return np.exp(log_softmax(self._logits(K, offset), axis=1))

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        Cs, n, o = regularisations(self, "C"), len(labels), self.outputs_.count
        values, U = eigensystem(gram, tolerance=self.tolerance)
        rank = numerical_rank(values)
        U, root = U[:, :rank], np.sqrt(values[:rank] / self.scale_)
        P = (U * root).reshape(n, -1, rank)

        def prior(train: Labels | slice) -> Array:
            log = np.log(np.bincount(labels[train]) / len(labels[train]))
            return self.outputs_.encoded(log) * (f0 is None)

        start = np.zeros((n, o)) if f0 is None else f0
        losses, splits = np.zeros(len(Cs)), self._splits(labels)
        for train, test in splits:
            offset = start + prior(train)
            path = logistic_path(
                P[train], labels[train], offset[train], Cs, self.outputs_
            )
            for i, W in enumerate(path):
                z = offset[test] + (P[test] @ W).reshape(-1, o)
                log_p = log_softmax(self.outputs_.decoded(z), axis=1)
                losses[i] -= log_p[range(len(test)), labels[test]].sum() / n
        best = int(np.argmax(losses <= losses.min() * TIE))
        self.C_, self.cv_loss_ = Cs[best], float(losses[best]) if splits else None
        self.intercept_ = prior(slice(None))
        (W,) = logistic_path(
            P, labels, start + self.intercept_, [self.C_], self.outputs_
        )
        # f - prior = P W = K a
        self.dual_coef_ = (U @ (W / root[:, None]) / self.scale_).reshape(n, o)


class KernelSVC(_CrossValidatedClassifier):
    """Support vector machine: scikit-learn's `SVC`, one-vs-one for several classes.

    It has its own intercept and no offset. A coupled kernel of two classes is reduced
    to that of its margin, exactly; of more classes to its trace, because no library
    solves the coupled (Crammer-Singer) SVM on a block kernel. C is chosen by accuracy.

    Attributes:
        C_: The C used.
        cv_accuracy_: Mean accuracy over the folds; None without cross-validation.
        svc_: The fitted `SVC` of class indices, on the scalar kernel over `scale_`.
    """

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        if f0 is not None:
            raise ValueError("`offset` is given; expected None. An SVM cannot use it.")
        eigensystem(gram, tolerance=self.tolerance)  # Raises if K is indefinite.
        Cs, K, splits = (
            regularisations(self, "C"),
            gram / self.scale_,
            self._splits(labels),
        )
        # With ties broken, `predict` is the argmax of the decision function.
        svc = SVC(kernel="precomputed", C=Cs[0], break_ties=True)
        self.C_, self.cv_accuracy_ = Cs[0], None
        if splits:
            search = GridSearchCV(svc, {"C": Cs}, cv=splits, refit=False).fit(K, labels)
            self.C_, self.cv_accuracy_ = search.best_params_["C"], search.best_score_
        self.svc_ = svc.set_params(C=self.C_).fit(K, labels)

    def _gram(self, K: Array) -> Array:
        if len(self.classes_) == K.shape[-1] == 2 and K.ndim == 4:
            return np.einsum("mncd,co,do->mn", K, MARGIN, MARGIN)
        return np.trace(K, axis1=2, axis2=3) if K.ndim == 4 else K

    def _evaluate(self, K: Array, f0: Array | None) -> Array:
        decision = self.svc_.decision_function(self._gram(K) / self.scale_)
        if len(self.classes_) > 2:
            return np.asarray(decision)
        return Outputs(MARGIN).decoded(np.asarray(decision)[:, None])
