"""Measures and classifiers of the kernels of one split."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ntk.classifiers import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
    Method,
    cross_fit,
)
from ntk.kernels import Kind
from ntk.measures import (
    UndefinedError,
    contrasts,
    distance,
    gram_matrix,
    reduced,
    spectrum,
)
from ntk.studies.encoding import EncodedSplit
from ntk.studies.folds import HeldOut

Array = NDArray[np.float64]
Record = dict[str, Any]

SHUFFLES = 10
BLOCK_LIMIT = 1500
"""Largest coupled Gram matrix (rows) that multi-class classifiers use."""
EIGENSPACE = 10
CLASSIFIERS: dict[type, tuple[str, Method, str]] = {
    KernelRidgeClassifier: ("alpha", "ridge", "loo_accuracy_"),
    KernelLogisticRegression: ("C", "logistic", "cv_loss_"),
    KernelSVC: ("C", "svm", "cv_accuracy_"),
}
"""Of each classifier the regularisation, the method of `cross_fit`, and the score by
which it chooses where the head has seen no labels."""
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
        folds: Kernels under heads that were fitted without a fold. What uses training
            labels, choices and alignment, is then measured on examples that the head
            has not seen.
    """

    def __init__(
        self,
        data: EncodedSplit,
        kernels: Mapping[str, Tensor],
        kind: Kind,
        outputs: Array,
        offset: bool,
        seed: int,
        folds: Sequence[HeldOut] = (),
    ) -> None:
        self.n = data.train
        self.kernels = kernels
        self.symmetric = kind != "asymmetric_signgd"
        self.outputs, self.offset = outputs, offset
        self.seed, self.folds = seed, folds
        self.train, self.test = data.labels[: self.n], data.labels[self.n :]
        c, self.b = outputs.shape[1], next(iter(kernels.values())).shape[2]
        self.encoder = contrasts(c).numpy() if self.b == c - 1 else np.eye(c) - 1 / c
        self.targets = self.encoder[self.train].reshape(-1)

    def gram(self, name: str) -> Array:
        """Return the Gram matrix over the training examples."""
        return gram_matrix(self.kernels[name][: self.n]).numpy()

    def is_zero(self, name: str) -> bool:
        """Whether a kernel, or that of a fold, has no scale: nothing is of it."""
        parts = [self.kernels[name][: self.n]]
        parts += [fold.kernels[name] for fold in self.folds]
        return any(not float(gram_matrix(part).trace()) > 0 for part in parts)

    def measures(self, name: str, head: str | None) -> Record:
        """Return the distances, the spectrum and the alignment of one kernel."""
        zero = self.symmetric and self.is_zero(name)
        if zero and name == "full":
            raise ValueError(
                "the kernel over all parameters is zero on the training examples, so "
                "that there is nothing to compare with: the outputs depend on no "
                "parameter there. Check the model and the readout."
            )
        if zero or not self.symmetric:
            undefined = ("distance", "body_distance", "spectrum", "alignment")
            empty: Record = {"eigenvalues": [], "cumulative_power": []}
            return {**dict.fromkeys(undefined), **empty, "zero": zero}
        reference, gram = self.gram("full"), self.gram(name)
        body = None
        if head is not None and name != head:
            block = self.gram(head)
            body = self._distance(reference - block, gram - block)
        values, vectors = spectrum.eigensystem(gram)
        power = spectrum.cumulative_power(vectors, self.targets)
        return {
            "distance": self._distance(reference, gram),
            "body_distance": body,
            "spectrum": asdict(spectrum.summary(gram, eps=FLOAT32_EPS)),
            "eigenvalues": values.tolist(),
            "cumulative_power": power.tolist(),
            "alignment": self._alignment(name),
        }

    def _alignment(self, name: str) -> Record | None:
        """Return the kernel-target alignment, and that with permuted labels.

        With folds, their mean: of each the kernel between the examples that the head
        has not seen.
        """
        parts = [(self.gram(name), self.targets)]
        if self.folds:
            parts = [
                (
                    gram_matrix(fold.unseen(name)).numpy(),
                    self.encoder[self.train[list(fold.held)]].reshape(-1),
                )
                for fold in self.folds
            ]
        try:
            nulls = [
                distance.permutation_alignment(
                    gram, targets, seed=self.seed, draws=200, outputs=self.b
                )
                for gram, targets in parts
            ]
        except UndefinedError:
            return None
        return {
            "value": float(np.mean([null.observed for null in nulls])),
            "null_mean": float(np.mean([null.mean for null in nulls])),
            "null_std": float(np.linalg.norm([n.std for n in nulls])) / len(nulls),
        }

    def _distance(self, reference: Array, gram: Array) -> Record | None:
        # The kernel minus that of the head is rounding if the space is the head.
        if np.abs(gram).max() <= FLOAT32_EPS * np.abs(reference).max():
            return None
        rank = min(EIGENSPACE, len(gram) - 1)
        try:
            return asdict(distance.summary(reference, gram, rank=rank))
        except UndefinedError:
            # Such as that of a constant kernel, which centring leaves nothing of.
            return None

    def classify(self, name: str) -> Record:
        """Return the test accuracy of each classifier on one kernel."""
        if not self.symmetric or self.is_zero(name):
            return dict.fromkeys(("ridge", "logistic", "svm"))
        return {
            method: self._classified(name, model())
            for model, (_, method, _) in CLASSIFIERS.items()
        }

    def random_selections(self, names: Sequence[str]) -> list[Record]:
        """Return means and deviations over seeds of random rows and columns."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.partition("#")[0], []).append(name)
        found = []
        for group, selections in groups.items():
            if not self.symmetric:
                continue
            members = [name for name in selections if not self.is_zero(name)]
            if not members:
                continue
            axis, _, count = group.partition(":")
            full = self.gram("full")
            values: dict[str, list[float]] = {}
            for name in members:
                gram = self.gram(name)
                score = self._classified(name, KernelRidgeClassifier())
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
        kernel = self._form(self.kernels["full"]).numpy()
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

    def _form(self, kernel: Tensor) -> Tensor:
        """Return a kernel for classifiers, ``(n, m)`` or ``(n, m, b, b)``."""
        coupled = self.b == 1 or self.n * self.b <= BLOCK_LIMIT
        return kernel if coupled else reduced(kernel, "trace")

    def _classified(self, name: str, model: Any) -> Record:
        """Choose a regularisation, fit on the training examples, score on test."""
        kernel = self._form(self.kernels[name]).numpy()
        parameter, method, chosen = CLASSIFIERS[type(model)]
        selection = None
        if self.folds:
            result = cross_fit(
                [fold.fold(self._form(fold.kernels[name])) for fold in self.folds],
                self.train,
                judge=_accuracy,
                method=method,
                offset=self._starts(method),
            )
            model.set_params(**{parameter: result.regularisation})
            selection = result.score
        train, test = slice(self.n), slice(self.n, None)
        model.fit(kernel[train], self.train, **self._start(train, method))
        if not self.folds:
            selection = getattr(model, chosen)
        predicted = model.predict(kernel[test], **self._start(test, method))
        return {
            "accuracy": float((predicted == self.test).mean()),
            "regularisation": float(getattr(model, f"{parameter}_")),
            "selection": selection,
            "correct": [(predicted == self.test).astype(int).tolist()],
        }

    def _start(self, rows: slice, method: Method) -> dict[str, Array]:
        """Return the model's outputs where a classifier is to start from them."""
        return {"offset": self.outputs[rows]} if self._starts(method) else {}

    def _starts(self, method: Method) -> bool:
        """Whether a classifier is to start from the model's outputs; an SVM cannot."""
        return self.offset and method != "svm"


def _accuracy(outputs: Array, labels: NDArray[Any]) -> float:
    return float((outputs.argmax(axis=1) == labels).mean())


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "std": spread}
