"""Base classes of classifiers on a precomputed kernel: validation, offset, decisions.

`ntk.classifiers.estimators` describes the forms of kernels and offsets.
"""

from abc import abstractmethod
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags, assert_all_finite, check_array, column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ntk.classifiers.outputs import MARGIN, Outputs
from ntk.measures import as_symmetric

Array = NDArray[np.float64]
Labels = NDArray[np.intp]
Maybe = ArrayLike | None

TIE = 1 + 1e-9
"""Losses within this factor of the smallest count as equal."""
KERNEL = {"dtype": np.float64, "allow_nd": True, "input_name": "K"}


class KernelClassifier(ClassifierMixin, BaseEstimator):
    """Base class of the classifiers: validation, offset, decisions."""

    tolerance: float

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags

    def fit(self, K: ArrayLike, y: ArrayLike, offset: Maybe = None) -> Self:
        """Fit to a training kernel.

        Args:
            K: ``(n, n)``, ``(n, n, c, c)`` or ``(n, n, c - 1, c - 1)``. An asymmetric
                or indefinite one raises `ntk.measures.spectrum.NotSymmetricError` or
                `NotPSDError`, both ValueError.
            y: ``(n,)`` labels of any type, at least two distinct.
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
        outputs = Outputs.of(K.shape, c)
        if outputs is None:
            raise ValueError(
                f"`K` has shape {K.shape} and `y` has {c} classes; expected (n, n) or "
                f"(n, n, {c}, {c}), or (n, n, {c - 1}, {c - 1}) of contrasts. Compute "
                "the kernel of these classes, of their contrasts, or its trace."
            )
        self.n_features_in_, self.kernel_block_ = len(K), K.shape[2:]
        self.outputs_ = outputs
        self.uses_offset_ = offset is not None
        f0 = self._offset(offset, len(K))
        gram = self._checked(self._gram(K))
        self.scale_ = float(gram.trace() / len(gram))
        if not self.scale_ > 0:
            raise ValueError(
                f"`K` has mean diagonal {self.scale_:.2e}; expected more than 0. Check "
                "that the tangent space holds parameters that the outputs depend on."
            )
        self._fit(gram, labels, f0)
        return self

    def decision_function(self, K: ArrayLike, offset: Maybe = None) -> Array:
        """Return the outputs on test examples.

        Args:
            K: ``(m, n, ...)``, in the form used in `fit`: rows are test examples,
                columns the training examples in order.
            offset: ``(m, c)`` if and only if `fit` had one.

        Returns:
            ``(m,)`` margins f[1] - f[0] for two classes, else ``(m, c)``.
        """
        logits = self._logits(K, offset)
        return logits if logits.shape[1] > 2 else logits[:, 1] - logits[:, 0]

    def predict(self, K: ArrayLike, offset: Maybe = None) -> NDArray[np.generic]:
        """Return ``(m,)`` classes of the largest output, see `decision_function`."""
        index = self._logits(K, offset).argmax(axis=1)
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
        """Check the training Gram matrix and return it."""
        return as_symmetric(gram, "K", tolerance=self.tolerance)

    @abstractmethod
    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        """Fit to a Gram matrix, ``(n,)`` class indices and ``(n, o)`` f0."""

    def _gram(self, K: Array) -> Array:
        """Return ``(n, n)`` as it is and ``(n, n, b, b)`` as ``(n b, n b)``."""
        size = len(K) * (K.shape[2] if K.ndim == 4 else 1)
        return K if K.ndim == 2 else K.swapaxes(1, 2).reshape(size, size)

    def _evaluate(self, K: Array, f0: Array | None) -> Array:
        """Return ``(m, c)`` logits of a kernel and ``(m, o)`` f0."""
        a, axes = self.dual_coef_, ([1], [0]) if K.ndim == 2 else ([1, 3], [0, 1])
        z = np.tensordot(K, a, axes=axes) + self.intercept_
        return self.outputs_.decoded(z if f0 is None else z + f0)

    def _logits(self, K: ArrayLike, offset: Maybe) -> Array:
        check_is_fitted(self)
        K = np.asarray(check_array(K, **KERNEL))
        n, name = self.n_features_in_, type(self).__name__
        expected = (len(K), n, *self.kernel_block_)
        if K.shape != expected:  # Tools match scikit-learn's words at the beginning.
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
        return self._evaluate(K, self._offset(offset, len(K)))

    def _offset(self, offset: Maybe, n: int) -> Array | None:
        if offset is None:
            return None
        f0 = check_array(offset, dtype=np.float64, ensure_2d=False, input_name="offset")
        c = len(self.classes_)
        if self.outputs_.count == 1 and f0.shape == (n,):
            f0 = Outputs(MARGIN).decoded(f0[:, None])
        if f0.shape != (n, c):
            raise ValueError(
                f"`offset` has shape {f0.shape}; expected ({n}, {c}), the model's "
                "logits for the rows of `K` and the classes in `classes_`."
            )
        return self.outputs_.encoded(f0)


def regularisations(estimator: KernelClassifier, name: str) -> list[float]:
    """Return the candidate values of a regularisation parameter, ascending.

    Args:
        estimator: An estimator with the attributes ``name``, a value or None, and
            ``name`` + "s", the grid used for None.
        name: Name of the parameter.

    Returns:
        At least one value.

    Raises:
        ValueError: If there is no value, or one is not positive.
    """
    fixed, candidates = getattr(estimator, name), getattr(estimator, f"{name}s")
    grid = sorted(candidates if fixed is None else [fixed])
    if not grid or not all(0 < value < np.inf for value in grid):
        raise ValueError(
            f"`{name}={fixed!r}`, `{name}s={candidates!r}`; expected positive finite "
            f"numbers: one, or for `{name}=None` at least one to choose from."
        )
    return grid
