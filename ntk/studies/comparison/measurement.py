"""Measures and classifiers of the kernels of one split."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk.classifiers import KernelLogisticRegression, KernelRidgeClassifier, KernelSVC
from ntk.kernels import Kind
from ntk.measures import contrasts, distance, gram_matrix, reduced, spectrum
from ntk.studies.encoding import EncodedSplit

Array = NDArray[np.float64]
Record = dict[str, Any]

SHUFFLES = 10
BLOCK_LIMIT = 1500
"""Largest coupled Gram matrix (rows) that multi-class classifiers use."""
EIGENSPACE = 10
FLOAT32_EPS = float(np.finfo(np.float32).eps)


class Measurement:
    """Measures and classifiers of the kernels of one split.

    Args:
        data: The examples.
        kernels: Kernels of contrasts by space, ``(train + test, train, b, b)``, b being
            c - 1, or c for signs of more than two classes; rows in the order of the
            split, training examples first.
        kind: The kind of kernel.
        outputs: ``(n, c)`` outputs of the model, less their mean.
        offset: Whether classifiers start from them, and not from zero.
        seed: Seed of permutations.
    """

    def __init__(
        self,
        data: EncodedSplit,
        kernels: Mapping[str, Tensor],
        kind: Kind,
        outputs: Array,
        offset: bool,
        seed: int,
    ) -> None:
        self.n = data.train
        self.kernels = kernels
        self.symmetric = kind != "asymmetric_signgd"
        self.offset = outputs if offset else None
        self.seed = seed
        self.train, self.test = data.labels[: self.n], data.labels[self.n :]
        c, self.b = outputs.shape[1], next(iter(kernels.values())).shape[2]
        encoder = contrasts(c).numpy() if self.b == c - 1 else np.eye(c) - 1 / c
        self.targets = encoder[self.train].reshape(-1)

    def gram(self, name: str) -> Array:
        """Return the Gram matrix over the training examples."""
        return gram_matrix(self.kernels[name][: self.n]).numpy()

    def measures(self, name: str, head: str | None) -> Record:
        """Return the distances, the spectrum and the alignment of one kernel."""
        if not self.symmetric:
            undefined = ("distance", "body_distance", "spectrum", "alignment")
            empty: Record = {"eigenvalues": [], "cumulative_power": []}
            return {**dict.fromkeys(undefined), **empty}
        reference, gram = self.gram("full"), self.gram(name)
        body = None
        if head is not None and name != head:
            block = self.gram(head)
            body = self._distance(reference - block, gram - block)
        values, vectors = spectrum.eigensystem(gram)
        power = spectrum.cumulative_power(vectors, self.targets)
        null = distance.permutation_alignment(
            gram, self.targets, seed=self.seed, draws=200, outputs=self.b
        )
        return {
            "distance": self._distance(reference, gram),
            "body_distance": body,
            "spectrum": asdict(spectrum.summary(gram, eps=FLOAT32_EPS)),
            "eigenvalues": values.tolist(),
            "cumulative_power": power.tolist(),
            "alignment": {
                "value": null.observed,
                "null_mean": null.mean,
                "null_std": null.std,
            },
        }

    def _distance(self, reference: Array, gram: Array) -> Record | None:
        # The kernel minus that of the head is rounding if the space is the head.
        if np.abs(gram).max() <= FLOAT32_EPS * np.abs(reference).max():
            return None
        rank = min(EIGENSPACE, len(gram) - 1)
        return asdict(distance.summary(reference, gram, rank=rank))

    def classify(self, name: str) -> Record:
        """Return the test accuracy of each classifier on one kernel."""
        if not self.symmetric:
            return dict.fromkeys(("ridge", "logistic", "svm"))
        kernel = self._kernel(name)
        ridge = self._fit(KernelRidgeClassifier(), kernel)
        logistic = self._fit(KernelLogisticRegression(), kernel)
        svm = self._fit(KernelSVC(), kernel, offset=False)
        return {
            "ridge": self._score(ridge, kernel, ridge.alpha_, ridge.loo_accuracy_),
            "logistic": self._score(logistic, kernel, logistic.C_, logistic.cv_loss_),
            "svm": self._score(svm, kernel, svm.C_, svm.cv_accuracy_, offset=False),
        }

    def random_selections(self, names: Sequence[str]) -> list[Record]:
        """Return means and deviations over seeds of random rows and columns."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.partition("#")[0], []).append(name)
        found = []
        for group, members in groups.items():
            if not self.symmetric:
                continue
            axis, _, count = group.partition(":")
            full = self.gram("full")
            values: dict[str, list[float]] = {}
            for name in members:
                gram = self.gram(name)
                ridge = self._fit(KernelRidgeClassifier(), self._kernel(name))
                score = self._score(ridge, self._kernel(name), 0, None)
                far = distance.relative_difference(
                    full, gram, "frobenius", rescale=True
                )
                values.setdefault("frobenius_rescaled", []).append(far)
                values.setdefault("cosine", []).append(distance.cosine(full, gram))
                values.setdefault("ridge", []).append(score["accuracy"])
            spread = {k: _mean_std(v) for k, v in values.items()}
            found.append(
                {"axis": axis, "count": int(count), "seeds": len(members), **spread}
            )
        return found

    def shuffled(self) -> Record | None:
        """Return the accuracy of ridge on the full kernel with shuffled labels."""
        if not self.symmetric:
            return None
        generator = np.random.default_rng(self.seed)
        kernel = self._kernel("full")
        scores = []
        for _ in range(SHUFFLES):
            labels = generator.permutation(self.train)
            model = KernelRidgeClassifier().fit(kernel[: self.n], labels)
            scores.append(float(model.score(kernel[self.n :], self.test)))
        return {"ridge": {**_mean_std(scores), "draws": SHUFFLES}}

    def heatmaps(self, names: Sequence[str]) -> Record:
        """Return cosine-normalised trace kernels, training examples sorted by label."""
        order = np.argsort(self.train, kind="stable")
        kernels = {}
        for name in names:
            trace = reduced(self.kernels[name][: self.n], "trace").numpy()
            length = np.sqrt(np.abs(np.diagonal(trace)))
            length[length == 0] = 1
            cosine = trace / length[:, None] / length[None, :]
            kernels[name] = np.round(cosine[order][:, order], 4).tolist()
        return {"labels": self.train[order].tolist(), "kernels": kernels}

    def _kernel(self, name: str) -> Array:
        """Return the kernel for classifiers, ``(n, m)`` or ``(n, m, b, b)``."""
        kernel = self.kernels[name]
        coupled = self.b == 1 or self.n * self.b <= BLOCK_LIMIT
        return (kernel if coupled else reduced(kernel, "trace")).numpy()

    def _fit(self, model: Any, kernel: Array, *, offset: bool = True) -> Any:
        return model.fit(
            kernel[: self.n], self.train, **self._start(slice(0, self.n), offset)
        )

    def _score(
        self,
        model: Any,
        kernel: Array,
        regularisation: float,
        selection: float | None,
        *,
        offset: bool = True,
    ) -> Record:
        start = self._start(slice(self.n, None), offset)
        predicted = model.predict(kernel[self.n :], **start)
        return {
            "accuracy": float((predicted == self.test).mean()),
            "regularisation": float(regularisation),
            "selection": None if selection is None else float(selection),
        }

    def _start(self, rows: slice, wanted: bool) -> dict[str, Array]:
        if self.offset is None or not wanted:
            return {}
        return {"offset": self.offset[rows]}


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "std": spread}
