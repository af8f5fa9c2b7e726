"""Classify with a precomputed kernel: ridge, logistic regression and SVM.

Scikit-learn estimators with ``fit(K, y)``, ``predict(K)``, ``decision_function(K)`` and
``score(K, y)``, tagged ``pairwise``: `cross_val_score` and `GridSearchCV` cut both
example axes of K. A training kernel is symmetric positive semi-definite, in one of two
forms, for n training examples, m test examples and c classes:

- scalar, ``(n, n)``, test ``(m, n)``, reduction "trace" or "margin": an independent
  function for each class, or one for the margin f[1] - f[0] of two, on one kernel;
- block, ``(n, n, c, c)``, test ``(m, n, c, c)``, reduction "full": one function
  f(x)[c] = sum_{j, d} K[x, j, c, d] a[j, d] with coupled outputs. Output c of the model
  belongs to ``classes_[c]``.

The number of outputs o is c, but 1 for two classes in the scalar form.

The offset is the model's own output f0, logits ``(n, c)``, or ``(n,)`` margins where
o = 1, possibly scaled down (Malladi et al., 2023): predictions are f0 plus the kernel's
part. Without an offset the constant that predicts the class frequencies takes its
place. It is what an infinitely regularised ridge or logistic machine returns.

Regularisation is in units of ``scale_``, the mean diagonal entry of the Gram matrix, or
chosen on the training examples, leaving out whole ones. Cross-validating with an offset
takes scikit-learn's metadata routing, `set_fit_request` and `set_score_request`.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC
from sklearn.utils import Tags, assert_all_finite, check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ntk.risk import left_out_residuals
from ntk.spectrum import PSD_TOLERANCE, as_symmetric, eigensystem, numerical_rank

__all__ = ["KernelLogisticRegression", "KernelRidgeClassifier", "KernelSVC"]

Array = NDArray[np.float64]
Labels = NDArray[np.intp]
Maybe = ArrayLike | None

ALPHAS = tuple(10.0 ** (i / 2) for i in range(-12, 7))
CS = tuple(10.0**i for i in range(-3, 5))
TIE = 1 + 1e-9  # Losses within this factor of the smallest are equal up to rounding.
KERNEL = {"dtype": np.float64, "allow_nd": True, "input_name": "K"}


class _KernelClassifier(ClassifierMixin, BaseEstimator):
    """What the classifiers share: validation, offset, decisions."""

    tolerance: float

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags

    def fit(self, K: ArrayLike, y: ArrayLike, offset: Maybe = None) -> Self:
        """Fit to a training kernel.

        Args:
            K: ``(n, n)`` or ``(n, n, c, c)``. An asymmetric or indefinite one raises
                `ntk.spectrum.NotSymmetricError` or `NotPSDError`, both ValueError.
            y: ``(n,)`` labels of any type, at least two different.
            offset: ``(n, c)`` or None. If given, every prediction needs one too.

        Returns:
            The estimator.

        Raises:
            ValueError: If a shape does not fit the others, a value is missing or
                infinite, `y` holds one class, or a parameter is out of range.
        """
        K = np.asarray(check_array(K, **KERNEL))
        y = np.asarray(column_or_1d(y, warn=True))
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        if K.shape[0] != K.shape[1] or len(y) != len(K):
            raise ValueError(
                f"`K` has shape {K.shape} and `y` has {len(y)} labels; expected a "
                "square kernel and a label for each of its rows. Pass the kernel "
                "between the training examples, the same on both axes."
            )
        self.classes_, labels = np.unique(y, return_inverse=True)
        if (c := len(self.classes_)) < 2:
            raise ValueError(
                f"`y` holds one class, {y[0]!r}; sample examples of at least two."
            )
        if K.shape[2:] not in {(), (c, c)}:
            raise ValueError(
                f"`K` has shape {K.shape} and `y` has {c} classes; expected (n, n) or "
                f"(n, n, {c}, {c}). Compute the kernel of these classes, or its trace."
            )
        self.n_features_in_, self.kernel_ndim_ = len(K), K.ndim
        self.n_outputs_ = 1 if K.ndim == c == 2 else c
        self.uses_offset_ = offset is not None
        f0 = self._offset(offset, len(K))
        gram = self._checked(self._gram(K))
        self.scale_ = float(gram.trace() / len(gram))
        if not self.scale_ > 0:
            raise ValueError(
                f"`K` has mean diagonal {self.scale_:.2e}; expected more than 0. Check "
                "that the tangent space holds parameters that reach the output."
            )
        self._fit(gram, labels, f0)
        return self

    def decision_function(self, K: ArrayLike, offset: Maybe = None) -> Array:
        """Return the outputs on test examples.

        Args:
            K: ``(m, n)`` or ``(m, n, c, c)`` as in `fit`: rows are test examples,
                columns are the training examples in their order.
            offset: ``(m, c)`` if and only if `fit` had one.

        Returns:
            ``(m,)`` margins f[1] - f[0] for two classes, else ``(m, c)``.
        """
        return _margin(self._outputs(K, offset))

    def predict(self, K: ArrayLike, offset: Maybe = None) -> NDArray[np.generic]:
        """Return ``(m,)`` classes of the largest output, see `decision_function`."""
        index = _decide(self._outputs(K, offset))
        return np.asarray(self.classes_[index])

    def score(
        self,
        K: ArrayLike,
        y: ArrayLike,
        sample_weight: Maybe = None,
        offset: Maybe = None,
    ) -> float:
        """Return the accuracy on ``(m,)`` labels `y`, see `decision_function`."""
        predicted = self.predict(K, offset)
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))

    def _checked(self, gram: Array) -> Array:
        """Return a Gram matrix that the classifier can learn from."""
        return as_symmetric(gram, "K", tolerance=self.tolerance)

    @abstractmethod
    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        """Learn from a Gram matrix, ``(n,)`` class indices and ``(n, o)`` f0."""

    @staticmethod
    def _gram(K: Array) -> Array:
        """Return ``(n, n)`` as it is and ``(n, n, c, c)`` as ``(n c, n c)``."""
        size = len(K) * (K.shape[2] if K.ndim == 4 else 1)
        return K if K.ndim == 2 else K.swapaxes(1, 2).reshape(size, size)

    def _evaluate(self, K: Array) -> Array:
        """Return ``(m, o)`` outputs without the offset."""
        a, axes = self.dual_coef_, ([1], [0]) if K.ndim == 2 else ([1, 3], [0, 1])
        return np.asarray(np.tensordot(K, a, axes=axes) + self.intercept_)

    def _outputs(self, K: ArrayLike, offset: Maybe) -> Array:
        check_is_fitted(self)
        K = np.asarray(check_array(K, **KERNEL))
        n, name = self.n_features_in_, type(self).__name__
        expected = (len(K), n, *(len(self.classes_),) * (self.kernel_ndim_ - 2))
        if K.shape != expected:  # It begins in scikit-learn's words: tools match them.
            raise ValueError(
                f"X has {K.shape[1]} features, but {name} is expecting {n} features as "
                f"input of shape {expected}; `K` has shape {K.shape}. Pass test rows, "
                "the training columns in the order of `fit`, and the same outputs."
            )
        if self.uses_offset_ != (offset is not None):
            raise ValueError(
                f"`offset` was {'' if self.uses_offset_ else 'not '}given to `fit`; "
                "expected the same here. Pass the model's outputs to both or to none."
            )
        f0, outputs = self._offset(offset, len(K)), self._evaluate(K)
        return outputs if f0 is None else outputs + f0

    def _offset(self, offset: Maybe, n: int) -> Array | None:
        if offset is None:
            return None
        f0 = check_array(offset, dtype=np.float64, ensure_2d=False, input_name="offset")
        if self.n_outputs_ == 1 and f0.shape in {(n,), (n, 2)}:
            f0 = _margin(f0.reshape(n, -1))[:, None]
        if f0.shape != (n, self.n_outputs_):
            raise ValueError(
                f"`offset` has shape {f0.shape}; expected ({n}, {len(self.classes_)}), "
                "the model's logits for the rows of `K` and the classes in `classes_`."
            )
        return np.asarray(f0)


Solution = tuple[Array, Array, Callable[[Array], Array]]
"""(K + ridge I)^-1 on r, ``(n, b, t)``, and on the identity repeated for every example,
``(n, b, b)``; and the function from a dual solution to what leaving out leaves."""


class _RidgeClassifier(_KernelClassifier):
    """What ridge classifiers share: targets, their mean, and the choice of alpha."""

    alpha: float | None
    alphas: Sequence[float]

    @abstractmethod
    def _solutions(
        self, gram: Array, r: Array, ridges: Sequence[float]
    ) -> Iterator[Solution]:
        """Yield the solution at each ridge for ``(n, b, t)`` right sides."""

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        alphas = _grid(self, "alpha")[::-1]
        n, o = len(labels), self.n_outputs_
        targets = np.eye(o)[labels] if o > 1 else np.where(labels, 1.0, -1.0)[:, None]
        b = len(gram) // n  # Blocks of b rows, o / b columns: b = 1 in the scalar form.
        r = (targets if f0 is None else targets - f0).reshape(n, b, -1)
        # The mean over all examples, and over all but each.
        mean = r.mean(axis=0) * (f0 is None)
        mean_without = (n * mean - r) / (n - 1) * (f0 is None)
        results = []
        ridges = [alpha * self.scale_ for alpha in alphas]
        for G_r, G_1, left_out in self._solutions(gram, r, ridges):
            residual = left_out(G_r - G_1 @ mean_without).reshape(n, o)
            results.append((residual, G_r - G_1 @ mean))
        errors = np.array([(residual**2).mean() for residual, _ in results])
        best = int(np.argmax(errors <= errors.min() * TIE))
        residual, a = results[best]
        self.alpha_, self.loo_error_ = alphas[best], float(errors[best])
        self.loo_accuracy_ = float((_decide(targets - residual) == labels).mean())
        self.dual_coef_, self.intercept_ = a.reshape(n, o), mean.ravel()


class KernelRidgeClassifier(_RidgeClassifier):
    """Kernel ridge regression on class indicators.

    Solves (K + alpha scale_ I) a = r, K being the Gram matrix. Targets are +-1 where
    o = 1, else one-hot; r is targets - offset, or without offset targets - their mean.

    Leave-one-out needs no refit: with G = (K + alpha scale_ I)^-1 in c x c blocks,
    example i left out has the residual G[i, i]^-1 (G r)[i], exactly. The mean is that
    of the others; `scale_` is kept. One eigendecomposition serves all alphas.

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
            alphas: To choose from.
            tolerance: Relative rounding of K, as in `ntk.spectrum.eigensystem`.
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


class _CrossValidatedClassifier(_KernelClassifier):
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
            C: Inverse regularisation in units of 1 / `scale_`, above 0. None chooses.
                Among equals the smallest wins.
            Cs: To choose from.
            cv: Number of folds, at most the size of the smallest class. If that is 1
                nothing can be compared: the smallest C is used, with a warning.
            random_state: Seed of the folds.
            tolerance: Relative rounding of K, as in `ntk.spectrum.eigensystem`.
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
    has the squared norm a' K a / scale_ and CE is the softmax cross-entropy, of (0, f)
    where o = 1. (Hence k in scalar form with 2 C is k I in block form with C.)

    K = P P' with P = U sqrt(L) is exact, less the directions below the numerical rank.
    In the coordinates of P it is solved by SciPy's trust-region Newton method. C is
    chosen by log-loss, with the same P and `scale_` in all folds.

    Attributes:
        C_: The C used.
        cv_loss_: Mean log-loss in nats over the folds; None where nothing was chosen.
        dual_coef_: ``(n, o)``.
        intercept_: ``(o,)``, log class frequencies or log-odds; 0 with an offset.
    """

    def predict_proba(self, K: ArrayLike, offset: Maybe = None) -> Array:
        """Return ``(m, c)`` class probabilities, see `decision_function`."""
        return np.exp(_log_proba(self._outputs(K, offset)))

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        Cs, n, o = _grid(self, "C"), len(labels), self.n_outputs_
        values, U = eigensystem(gram, tolerance=self.tolerance)
        rank = numerical_rank(values)
        U, root = U[:, :rank], np.sqrt(values[:rank] / self.scale_)
        P = (U * root).reshape(n, -1, rank)

        def prior(train: Labels | slice) -> Array:
            log = np.log(np.bincount(labels[train]) / len(labels[train]))
            return (log if o > 1 else log[1:] - log[:1]) * (f0 is None)

        start = np.zeros((n, o)) if f0 is None else f0
        losses, splits = np.zeros(len(Cs)), self._splits(labels)
        for train, test in splits:
            begin = start + prior(train)
            path = _logistic_path(P[train], labels[train], begin[train], Cs)
            for i, W in enumerate(path):
                f = begin[test] + (P[test] @ W).reshape(-1, o)
                losses[i] -= _log_proba(f)[range(len(test)), labels[test]].sum() / n
        best = int(np.argmax(losses <= losses.min() * TIE))
        self.C_, self.cv_loss_ = Cs[best], float(losses[best]) if splits else None
        self.intercept_ = prior(slice(None))
        (W,) = _logistic_path(P, labels, start + self.intercept_, [self.C_])
        # f - prior = P W = K a
        self.dual_coef_ = (U @ (W / root[:, None]) / self.scale_).reshape(n, o)


class KernelSVC(_CrossValidatedClassifier):
    """Support vector machine: scikit-learn's `SVC`, one-vs-one for several classes.

    It has an intercept of its own and no offset. A block kernel of two classes is used
    as its margin kernel K[1, 1] + K[0, 0] - K[0, 1] - K[1, 0], exactly; of more as its
    trace: no library solves the coupled (Crammer-Singer) machine on a block kernel.
    C is chosen by accuracy.

    Attributes:
        C_: The C used.
        cv_accuracy_: Mean accuracy of the folds; None where nothing was chosen.
        svc_: The fitted `SVC` of class indices, on the scalar kernel over `scale_`.
    """

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        if f0 is not None:
            raise ValueError("`offset` is given; expected None. An SVM cannot use it.")
        eigensystem(gram, tolerance=self.tolerance)  # Raises where K is indefinite.
        Cs, K, splits = _grid(self, "C"), gram / self.scale_, self._splits(labels)
        # With ties broken, `predict` is the argmax of the decision function.
        svc = SVC(kernel="precomputed", C=Cs[0], break_ties=True)
        self.C_, self.cv_accuracy_ = Cs[0], None
        if splits:
            search = GridSearchCV(svc, {"C": Cs}, cv=splits, refit=False).fit(K, labels)
            self.C_, self.cv_accuracy_ = search.best_params_["C"], search.best_score_
        self.svc_ = svc.set_params(C=self.C_).fit(K, labels)

    @staticmethod
    def _gram(K: Array) -> Array:
        if K.ndim == 4 and K.shape[2] == 2:
            return K[..., 1, 1] + K[..., 0, 0] - K[..., 0, 1] - K[..., 1, 0]
        return np.trace(K, axis1=2, axis2=3) if K.ndim == 4 else K

    def _evaluate(self, K: Array) -> Array:
        decision = self.svc_.decision_function(self._gram(K) / self.scale_)
        return np.asarray(decision).reshape(len(K), -1)


def _grid(estimator: _KernelClassifier, name: str) -> list[float]:
    # The one value of a parameter or else its grid, ascending.
    fixed, many = getattr(estimator, name), getattr(estimator, f"{name}s")
    grid = sorted(many if fixed is None else [fixed])
    if not grid or not all(0 < value < np.inf for value in grid):
        raise ValueError(
            f"`{name}={fixed!r}`, `{name}s={many!r}`; expected positive finite "
            f"numbers: one, or for `{name}=None` at least one to choose from."
        )
    return grid


def _margin(outputs: Array) -> Array:
    """Return one or two outputs as ``(m,)`` margins, more as they are, ``(m, c)``."""
    return outputs if outputs.shape[1] > 2 else np.diff(outputs, prepend=0)[:, -1]


def _decide(outputs: Array) -> Labels:
    """Return ``(m,)`` indices of the largest output."""
    margin = _margin(outputs)
    return (margin > 0).astype(np.intp) if margin.ndim == 1 else margin.argmax(axis=1)


def _log_proba(outputs: Array) -> Array:
    """Return ``(m, c)`` log class probabilities; one output is the log-odds."""
    reference = np.zeros((len(outputs), int(outputs.shape[1] == 1)))
    return np.asarray(log_softmax(np.hstack([reference, outputs]), axis=1))


def _logistic_path(
    P: Array, labels: Labels, prior: Array, Cs: Sequence[float]
) -> Iterator[Array]:
    """Yield ``(r, t)`` weights of ``(n, b, r)`` features for each C, ascending.

    Each solution starts the next. The objective is divided by n.
    """
    (n, b, r), o = P.shape, prior.shape[1]
    flat, Y = P.reshape(n * b, r), np.eye(max(o, 2))[labels][:, -o:]

    forward = lambda w: (flat @ w.reshape(r, -1)).reshape(n, o)
    backward = lambda df: (flat.T @ df.reshape(n * b, -1)).ravel()

    def objective(w: Array, C: float) -> tuple[float, Array]:
        log_p = _log_proba(prior + forward(w))
        loss = w @ w / (2 * C) - log_p[range(n), labels].sum()
        return loss / n, (backward(np.exp(log_p)[:, -o:] - Y) + w / C) / n

    def hessian_product(w: Array, v: Array, C: float) -> Array:
        p, df = np.exp(_log_proba(prior + forward(w)))[:, -o:], forward(v)
        dp = p * (df - (p * df).sum(axis=1, keepdims=True))
        return (backward(dp) + v / C) / n

    newton = {"method": "trust-ncg", "jac": True, "hessp": hessian_product}
    options, w = {"gtol": 1e-10, "maxiter": 1000}, np.zeros(r * (o // b))
    for C in Cs:
        solution = minimize(objective, w, args=(C,), options=options, **newton)
        w, gradient = solution.x, float(np.linalg.norm(solution.jac))
        if gradient > 1e-6:
            message = (
                f"C={C:g}: gradient norm {gradient:.1e} after {solution.nit} steps"
            )
            warnings.warn(
                f"{message}; expected 1e-6.", ConvergenceWarning, stacklevel=2
            )
        yield w.reshape(r, -1)
