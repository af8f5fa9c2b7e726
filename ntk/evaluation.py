"""From a model, a split and tangent spaces to one record of everything measured.

The record is plain values that JSON knows; `report` renders it. Kernels of all spaces
come from one pass over the examples: training and test examples on the left, training
examples on the right.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk import distance, spectrum
from ntk.approximation import ApproximateKernel, Sketches
from ntk.calibration import calibrate
from ntk.certificate import certify
from ntk.classifiers import (
    KernelLogisticRegression,
    KernelRidgeClassifier,
    KernelSVC,
)
from ntk.engine import KernelResult
from ntk.function import Batch, evaluating, logits
from ntk.kernel import Implementation, Kind, compute, gram_matrix, reduced
from ntk.spaces import Bias, Columns, Full, Head, Rows, Space, Sum, Without
from rocoft.architecture import Architecture, SelectionError, order_of_place
from rocoft.backbone import Backbone
from rocoft.console import Progress
from rocoft.splits import Split

Array = NDArray[np.float64]
Record = dict[str, Any]

RANDOM_SEEDS = 5
SHUFFLES = 10
BLOCK_LIMIT = 1500
"""Rows of a coupled Gram matrix up to which several classes are classified with it."""
EIGENSPACE = 10
FLOAT32_EPS = float(np.finfo(np.float32).eps)


@dataclass
class Evaluation:
    """What was measured, and the kernels it was measured on.

    Attributes:
        record: Plain values.
        kernels: By space, ``(train + test, train, c, c)``; rows in the order of the
            split, training examples first.
    """

    record: Record
    kernels: dict[str, Tensor]


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = (
                self.seconds.get(what, 0.0) + time.perf_counter() - start
            )


@dataclass(frozen=True)
class _Data:
    """Batches and where their examples stand in the split."""

    batches: list[Batch]
    train_batches: int
    place: list[int]
    labels: NDArray[np.int64]
    train: int


def evaluate(
    backbone: Backbone,
    split: Split,
    requested: Sequence[Space],
    *,
    with_head: bool = True,
    kind: Kind = "sgd",
    implementation: Implementation = "factors",
    batch_size: int = 32,
    offset: bool = False,
    approximate: Sketches | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the kernels of some spaces with the full kernel.

    Args:
        backbone: The model.
        split: Training and test examples.
        requested: The spaces, without the head.
        with_head: Whether a head made for this task is part of every space.
        kind: Of kernel.
        implementation: How kernels are computed.
        batch_size: Most examples in a pass.
        offset: Start the classifiers from the model's own outputs.
        approximate: How the full kernel is estimated; None means that it is computed.
        progress: Called as the work goes on.

    Returns:
        The record and the kernels.
    """
    watch = _Stopwatch()
    module = backbone.module
    architecture = Architecture(module)
    head = Head() if backbone.new_head and with_head else None
    data = _encode(backbone, split, batch_size)
    train_batches = data.batches[: data.train_batches]
    with watch("kernels"):
        fixed = [calibrate(space, module, train_batches) for space in requested]
        roles, spaces = _spaces(fixed, requested, architecture, head)
        if backbone.new_head and not with_head:
            spaces = {
                n: Without(s, tuple(architecture.head)) for n, s in spaces.items()
            }
        wanted = dict(spaces)
        if approximate is not None:
            wanted |= approximate.parted("full", wanted.pop("full"))
        result = compute(
            module,
            data.batches,
            data.train_batches,
            spaces=wanted,
            kind=kind,
            implementation=implementation,
            batch_size=None,
            progress=progress,
        )
        outputs = _outputs(backbone, data)
    estimate: ApproximateKernel | None = None
    exact = {name: spaces[name] for name in roles}
    if approximate is not None:
        estimate = approximate.collected("full", result.kernels)
        result.kernels["full"] = estimate.kernel
        result.sizes["full"] = _size(exact.pop("full"), architecture)
    place = torch.tensor(np.argsort(data.place))
    own = torch.tensor(np.argsort(data.place[: data.train]))
    kernels = {k: v.cpu()[place][:, own] for k, v in result.kernels.items()}
    with watch("certificate"):
        certificates = certify(
            module,
            data.batches,
            exact,
            result.kernels,
            kind=kind,
            seed=split.seed,
        )
    measure = _Measure(data, kernels, kind, outputs if offset else None, split.seed)
    entries = []
    steps = len(roles)
    for number, (name, role) in enumerate(roles.items()):
        entry = _entry(name, role, spaces[name], result, architecture, certificates)
        with watch("measures"):
            entry |= measure.measures(name, "head" if head is not None else None)
        with watch("classifiers"):
            entry["classifiers"] = measure.classify(name)
        entries.append(entry)
        if progress is not None:
            progress("measures", number + 1, steps)
    with watch("classifiers"):
        random = measure.random_selections([n for n in spaces if n not in roles])
        shuffled = measure.shuffled()
    test = data.labels[data.train :]
    accuracy = float((outputs[data.train :].argmax(axis=1) == test).mean())
    record: Record = {
        "model": {
            "name": backbone.name,
            "parameters": sum(p.numel() for p in architecture.parameters.values()),
            "readout": backbone.readout,
            "new_head": backbone.new_head,
            "notes": backbone.notes,
            "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        },
        "task": {
            "name": split.task.name,
            "labels": list(split.task.labels),
            "source": split.task.source,
            "seed": split.seed,
            "shots": len(split.train) // len(split.task.labels),
            "train": len(split.train),
            "test": len(split.test),
            "outputs": outputs.shape[1],
        },
        "kernel": {
            "kind": kind,
            "implementation": implementation,
            "services": _services(result),
            "with_head": head is not None,
            "offset": offset,
            "estimate": None if estimate is None else _estimate(estimate),
        },
        "f0": {"accuracy": accuracy},
        "spaces": entries,
        "random": random,
        "shuffled": shuffled,
        "heatmap": measure.heatmaps(
            [n for n, r in roles.items() if r != "control"][:4]
        ),
        "timing": watch.seconds,
    }
    return Evaluation(record, {name: kernels[name] for name in roles})


def _encode(backbone: Backbone, split: Split, batch_size: int) -> _Data:
    train, train_order = backbone.encode(split.train, batch_size)
    test, test_order = backbone.encode(split.test, batch_size)
    n = len(split.train)
    device = next(backbone.module.parameters()).device
    batches: list[Batch] = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in (*train, *test)
    ]
    labels = np.array([e.label for e in (*split.train, *split.test)])
    place = [*train_order, *(n + i for i in test_order)]
    return _Data(batches, len(train), place, labels, n)


def _outputs(backbone: Backbone, data: _Data) -> Array:
    """Return the model's own outputs in the order of the split, ``(n, c)``."""
    rows = []
    with evaluating(backbone.module), torch.no_grad():
        for batch in data.batches:
            assert isinstance(batch, Mapping)
            rows.append(logits(backbone.module(**batch)))
    found = torch.cat(rows).double().cpu().numpy()
    return found[np.argsort(data.place)]


def _spaces(
    fixed: Sequence[Space],
    requested: Sequence[Space],
    architecture: Architecture,
    head: Head | None,
) -> tuple[dict[str, str], dict[str, Space]]:
    """Return the role of each named space, and all spaces with the random ones."""

    def whole(space: Space) -> Space:
        if head is None or isinstance(space, Full | Head):
            return space
        return space + head

    roles = {"full": "reference"}
    spaces: dict[str, Space] = {"full": Full()}
    for space, asked in zip(fixed, requested, strict=True):
        if asked.name not in spaces:
            roles[asked.name] = "requested"
            spaces[asked.name] = whole(space)
    controls: list[Space] = [Bias()]
    if head is not None:
        controls.insert(0, head)
    for control in controls:
        if control.name in spaces:
            continue
        try:
            control.maps(architecture)
        except SelectionError:
            # A model without biases has no such control.
            continue
        roles[control.name] = "control"
        spaces[control.name] = whole(control)
    parts = [p for s in requested for p in (s.parts if isinstance(s, Sum) else (s,))]
    counts = {
        (type(p), p.count) for p in parts if isinstance(p, Rows | Columns) and p.count
    }
    for family, count in sorted(
        counts or {(Rows, 3)}, key=lambda pair: (pair[0].__name__, pair[1])
    ):
        for seed in range(RANDOM_SEEDS):
            space = family(count, strategy="random", seed=seed)
            spaces[f"{family.__name__.lower()}:{count}#{seed}"] = whole(space)
    return roles, spaces


def _services(result: KernelResult) -> dict[str, Any]:
    by: dict[str, list[str]] = {}
    for name, service in result.services.items():
        by.setdefault(service.value, []).append(name)
    return {
        "batch": len(by.get("batch", [])),
        **{kind: by.get(kind, []) for kind in ("single", "definition", "unused")},
    }


def _size(space: Space, architecture: Architecture) -> int:
    """Return the number of coordinates of a space."""
    shapes = {name: p.shape for name, p in architecture.parameters.items()}
    maps = space.maps(architecture)
    return sum(m.size(shapes[name]) for name, several in maps.items() for m in several)


def _estimate(estimate: ApproximateKernel) -> Record:
    return {
        "entries": estimate.entries,
        "replicates": estimate.replicates,
        "relative_error": estimate.relative_error(),
    }


def _entry(
    name: str,
    role: str,
    space: Space,
    result: KernelResult,
    architecture: Architecture,
    certificates: Mapping[str, dict[str, Any]],
) -> Record:
    total = sum(p.numel() for p in architecture.parameters.values())
    layers: dict[str, float] = {}
    for parameter, trace in result.traces.get(name, {}).items():
        where = architecture.place(parameter)
        layers[where] = layers.get(where, 0.0) + trace
    return {
        "name": space.name,
        "label": name,
        "role": role,
        "parameters": result.sizes[name],
        "share": result.sizes[name] / total,
        "certificate": certificates.get(name),
        "trace_by_layer": dict(
            sorted(layers.items(), key=lambda item: order_of_place(item[0]))
        ),
    }


class _Measure:
    """Measures and classifiers of the kernels of one split."""

    def __init__(
        self,
        data: _Data,
        kernels: Mapping[str, Tensor],
        kind: Kind,
        offset: Array | None,
        seed: int,
    ) -> None:
        self.n = data.train
        self.kernels = kernels
        self.symmetric = kind != "asymmetric_signgd"
        self.offset = offset
        self.seed = seed
        self.train, self.test = data.labels[: self.n], data.labels[self.n :]
        self.c = next(iter(kernels.values())).shape[2]
        one_hot = np.eye(self.c)[self.train % self.c] - 1 / self.c
        self.targets = one_hot.reshape(-1)

    def gram(self, name: str) -> Array:
        """Return the Gram matrix over the training examples."""
        return gram_matrix(self.kernels[name][: self.n]).numpy()

    def measures(self, name: str, head: str | None) -> Record:
        """Return the distances, the spectrum and the alignment of one kernel."""
        if not self.symmetric:
            nothing = ("distance", "body_distance", "spectrum", "alignment")
            return {**dict.fromkeys(nothing), "eigenvalues": [], "cumulative_power": []}
        reference, gram = self.gram("full"), self.gram(name)
        body = None
        if head is not None and name != head:
            block = self.gram(head)
            body = self._distance(reference - block, gram - block)
        values, vectors = spectrum.eigensystem(gram)
        power = spectrum.cumulative_power(vectors, self.targets)
        null = distance.permutation_alignment(
            gram, self.targets, seed=self.seed, draws=200, outputs=self.c
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
        # A difference of kernels can be all rounding: a space that is the head alone.
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
        """Return mean and deviation over seeds of random rows and columns."""
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
        """Return what classifiers are trained on, ``(n, m)`` or ``(n, m, c, c)``."""
        kernel = self.kernels[name]
        if self.c == 2:
            return reduced(kernel, "margin").numpy()
        coupled = self.n * self.c <= BLOCK_LIMIT
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
        values = self.offset[rows]
        return {"offset": values[:, 1] - values[:, 0] if self.c == 2 else values}


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "std": spread}
