"""Ridge classifiers: targets, their mean, and the choice of alpha by leave-one-out."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ntk.classifiers.base import TIE, Array, KernelClassifier, Labels, regularisations

Solution = tuple[Array, Array, Callable[[Array], Array]]
"""G r ``(n, b, t)`` and G 1 ``(n, b, b)``, with G = (K + ridge I)^-1 and 1 the identity
repeated per example; and the function from a dual solution to leave-one-out residuals.
"""


class RidgeClassifier(KernelClassifier):
    """Base class of ridge classifiers: targets, their mean, and the choice of alpha."""

    alpha: float | None
    alphas: Sequence[float]

    @abstractmethod
    def _solutions(
        self, gram: Array, r: Array, ridges: Sequence[float]
    ) -> Iterator[Solution]:
        """Yield the solution at each ridge for right-hand sides ``(n, b, t)``."""

    def _fit(self, gram: Array, labels: Labels, f0: Array | None) -> None:
        alphas = regularisations(self, "alpha")[::-1]
        n, o = len(labels), self.outputs_.count
        targets = self.outputs_.encoded(np.eye(len(self.classes_))[labels])
        b = len(gram) // n  # Blocks of b rows, o / b columns: b = 1 in the scalar form.
        r = (targets if f0 is None else targets - f0).reshape(n, b, -1)
        # The mean over all examples, and over all but one, for each.
        mean = r.mean(axis=0) * (f0 is None)
        mean_without = (n * mean - r) / (n - 1) * (f0 is None)
        results = []
        ridges = [alpha * self.scale_ for alpha in alphas]
        for G_r, G_1, leave_one_out in self._solutions(gram, r, ridges):
            residual = leave_one_out(G_r - G_1 @ mean_without).reshape(n, o)
            results.append((residual, G_r - G_1 @ mean))
        errors = np.array([(residual**2).mean() for residual, _ in results])
        best = int(np.argmax(errors <= errors.min() * TIE))
        residual, a = results[best]
        self.alpha_, self.loo_error_ = alphas[best], float(errors[best])
        left_out = self.outputs_.decoded(targets - residual).argmax(axis=1)
        self.loo_accuracy_ = float((left_out == labels).mean())
        self.dual_coef_, self.intercept_ = a.reshape(n, o), mean.ravel()
