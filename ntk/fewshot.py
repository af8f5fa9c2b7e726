"""One split of a few-shot study: kernels and fine-tuning on the same examples.

The protocol is that of the kernel view of fine-tuning (Malladi et al. 2023): k training
examples of each label, k others to choose hyperparameters by, a fixed test set; the
kernel classifier's regularisation and offset are chosen as the learning rate is. The
kernel of two outputs is that of their margin. More outputs have a function each on the
kernel summed over outputs, or coupled ones on all pairs of outputs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk import distance, spectrum
from ntk.calibration import calibrate
from ntk.evolution import kernel_change, merged
from ntk.function import evaluating
from ntk.kernel import Kind, Reduction, compute, gram_matrix
from ntk.notation import parse_space
from ntk.sampling import growth
from ntk.spaces import Full, Head, Space
from ntk.study import Cell, Record
from ntk.tuning import Method, Tuned, tune
from rocoft.architecture import Architecture
from rocoft.backbone import Backbone, Readout, load_backbone
from rocoft.backbone import Head as HeadStart
from rocoft.metrics import metric_names, scores
from rocoft.readouts import logits
from rocoft.splits import Split, lmbff_split
from rocoft.tasks import Task, load_task
from rocoft.trainer import fine_tune, versions

Array = NDArray[np.float64]

CLASSIFIERS: tuple[Method, ...] = ("ridge", "logistic", "svm")
"""Of a symmetric kernel, ties on dev in this order."""
SHUFFLES = 5
"""Draws of shuffled training labels, for the control."""
GROWTH_DRAWS = 20
DIGITS = 6
"""Of outputs in a record."""


@dataclass(frozen=True)
class Protocol:
    """What is the same for every record of a study.

    Attributes:
        model: Hub id or local folder; None means the embedded MiniLM.
        data_dir: Folder of the tasks; None means the Hub.
        readout: As in `rocoft.backbone.load_backbone`.
        head: How a head that the checkpoint lacks is made.
        max_length: Most tokens of an example.
        test_size: Most test examples, the same ones for every split.
        batch_size: Examples in a pass.
        device: Where to compute.
        dtype: Of the model's parameters.
        coupled: Contract all pairs of more than two outputs.
        rates: For each method the learning rates, where not its own.
        rate_seed: The seed whose choice of a learning rate serves all seeds; None has
            each choose its own.
        arguments: Of transformers' Trainer.
    """

    model: str | None = None
    data_dir: Path | None = None
    readout: Readout | None = None
    head: HeadStart = "probe"
    max_length: int = 128
    test_size: int = 1000
    batch_size: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    coupled: bool = False
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rate_seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON knows it."""
        own = asdict(self)
        del own["batch_size"], own["device"]
        data = None if self.data_dir is None else str(self.data_dir)
        return {**own, "data_dir": data, "versions": versions()}

    def task(self, name: str) -> Task:
        """Load a task by name."""
        return load_task(name, self.data_dir, regression=True)

    def draw(self, task: Task, cell: Cell) -> Split:
        """Draw the split of a cell from its task."""
        return lmbff_split(task, cell.shots, cell.seed, test_size=self.test_size)

    def split(self, cell: Cell) -> Split:
        """Draw the split of a cell."""
        return self.draw(self.task(cell.task), cell)

    def backbone(self, split: Split) -> Backbone:
        """Load the model, ready for a split."""
        return load_backbone(
            self.model,
            split,
            readout=self.readout,
            head=self.head,
            seed=split.seed,
            max_length=self.max_length,
            device=self.device,
            dtype=getattr(torch, self.dtype),
        )


def kernel_records(
    protocol: Protocol, cell: Cell, kind: Kind, spaces: Sequence[str]
) -> list[Record]:
    """Compute the kernels of some spaces in one pass and classify with each.

    Args:
        protocol: Of the study.
        cell: The split.
        kind: Of kernel.
        spaces: As `notation.parse_space` reads them. A head that was made for the task
            belongs to each of them, as fine-tuning trains it.

    Returns:
        A record for each space.
    """
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = _Examples.of(backbone, split, protocol)
    module = backbone.module
    named: dict[str, Space] = {"": Full()}
    for text in spaces:
        space = calibrate(parse_space(text), module, data.batches[: data.train_batches])
        if backbone.new_head and not isinstance(space, Full | Head):
            space = space + Head()
        named[text] = space
    result = compute(
        module,
        data.batches,
        data.train_batches,
        spaces=named,
        reduce=_reduction(data.f0.shape[1], protocol),
        kind=kind,
    )
    kernels = {name: data.sorted(kernel) for name, kernel in result.kernels.items()}
    seconds = time.perf_counter() - start
    total = sum(p.numel() for p in Architecture(module).parameters.values())
    common = {
        **_description(backbone, split),
        "kernel": kind,
        "reduction": _reduction(data.f0.shape[1], protocol),
        "f0": data.scored(data.f0[data.dev], data.f0[data.test]),
        "seconds_of_pass": seconds,
        "spaces_of_pass": len(named),
    }
    records = []
    for text in spaces:
        kernel = kernels[text]
        record = {
            **common,
            "space": text,
            "parameters": result.sizes[text],
            "share": result.sizes[text] / total,
            "classifiers": _classify(data, kernel, kind),
        }
        if kind != "asymmetric_signgd":
            record |= _measures(data, kernels[""], kernel)
            record["shuffled"] = _shuffled(data, kernel)
        records.append(record)
    return records


def fine_tuning_records(
    protocol: Protocol, cell: Cell, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune on a split and measure how the full kernel changed.

    Args:
        protocol: Of the study.
        cell: The split.
        methods: As `rocoft.methods.parse_method` reads them.

    Returns:
        A record for each method.
    """
    return [
        _fine_tuning_record(protocol, cell, method, protocol.rates.get(method))
        for method in methods
    ]


def repeated_records(
    protocol: Protocol, cell: Cell, chosen: Record, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune on another split with the learning rate that one has chosen.

    Args:
        protocol: Of the study.
        cell: The split.
        chosen: The other split's record of the method.
        methods: One.

    Returns:
        A record.
    """
    rates = [] if chosen["learning_rate"] is None else [chosen["learning_rate"]]
    return [_fine_tuning_record(protocol, cell, method, rates) for method in methods]


def _fine_tuning_record(
    protocol: Protocol, cell: Cell, method: str, rates: Sequence[float] | None
) -> Record:
    start = time.perf_counter()
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    found = fine_tune(
        backbone,
        split,
        method,
        lrs=rates,
        arguments=protocol.arguments,
        seed=cell.seed,
    )
    seconds = time.perf_counter() - start
    keep = ("test", "dev", "learning_rate", "steps", "parameters")
    data = _Examples.of(backbone, replace(split, dev=(), test=()), protocol)
    reduction = _reduction(found.logits.shape[1], protocol)
    kernels = []
    for module in (backbone.module, merged(found.model)):
        kernel = compute(module, data.batches, spaces={"": Full()}, reduce=reduction)
        kernels.append(gram_matrix(data.sorted(kernel.kernels[""])))
    return {
        **_description(backbone, split),
        "method": method,
        **{key: found.record[key] for key in keep},
        "grid": {
            f"{run['learning_rate']:g}": run["dev"]
            for run in found.record["learning_rates"]
        },
        "outputs": _rounded(found.logits.double().numpy()),
        "kernel_change": asdict(kernel_change(*kernels, targets=data.targets())),
        "seconds": seconds,
    }


@dataclass(frozen=True)
class _Examples:
    """A split's examples as batches: training, then dev, then test.

    Attributes:
        batches: Each of one part, sorted by length.
        train_batches: How many hold the training examples.
        place: For each row of the batches the number of its example.
        labels: ``(n,)`` by example.
        train: Number of training examples; they come first.
        held: Number of dev examples; they come next.
        f0: ``(n, c)`` the model's own outputs, by example.
        names: Metrics, the first to choose by.
        regression: Whether the labels are scores.
    """

    batches: list[dict[str, Tensor]]
    train_batches: int
    place: list[int]
    labels: NDArray[Any]
    train: int
    held: int
    f0: Array
    names: tuple[str, ...]
    regression: bool

    @classmethod
    def of(cls, backbone: Backbone, split: Split, protocol: Protocol) -> "_Examples":
        batches: list[dict[str, Tensor]] = []
        place: list[int] = []
        counts = []
        for part in (split.train, split.dev, split.test):
            some, order = backbone.encode(part, protocol.batch_size)
            place += [len(place) + i for i in order]
            batches += [
                {k: v.to(protocol.device) for k, v in batch.items()} for batch in some
            ]
            counts.append(len(some))
        with evaluating(backbone.module), torch.no_grad():
            rows = [logits(backbone.module(**batch)) for batch in batches]
        f0 = torch.cat(rows).double().cpu().numpy()[np.argsort(place)]
        labels = [e.label for e in (*split.train, *split.dev, *split.test)]
        task = split.task
        names = metric_names(task.name, regression=task.regression)
        sizes = len(split.train), len(split.dev)
        return cls(
            *(batches, counts[0], place, np.array(labels), *sizes, f0, names),
            regression=task.regression,
        )

    @property
    def dev(self) -> slice:
        return slice(self.train, self.train + self.held)

    @property
    def test(self) -> slice:
        return slice(self.train + self.held, None)

    def sorted(self, kernel: Tensor) -> Tensor:
        """Put a kernel's rows and columns in the order of the examples."""
        rows = torch.tensor(np.argsort(self.place))
        columns = torch.tensor(np.argsort(self.place[: self.train]))
        return kernel.cpu()[rows][:, columns]

    def targets(self) -> Array:
        """Return the training labels as a Gram matrix's targets, mean zero."""
        labels, c = self.labels[: self.train], self.f0.shape[1]
        targets = labels if c <= 2 else np.eye(c)[labels]
        return targets - targets.mean(axis=0)

    def judge(self, outputs: Array, labels: Array) -> float:
        return scores(outputs, labels, self.names)[self.names[0]]

    def scored(self, dev: Array, test: Array) -> Record:
        """Return the scores of outputs on dev and test examples."""
        return {
            "dev": self.judge(dev, self.labels[self.dev]),
            "test": scores(test, self.labels[self.test], self.names),
        }


def _reduction(outputs: int, protocol: Protocol) -> Reduction:
    if outputs == 2:
        return "margin"
    return "full" if protocol.coupled else "trace"


def _description(backbone: Backbone, split: Split) -> Record:
    """Return what every record says of its split and model."""
    task = split.task
    return {
        "model": backbone.name,
        "readout": backbone.readout,
        "task": task.name,
        "task_labels": list(task.labels),
        "metric": metric_names(task.name, regression=task.regression)[0],
        "examples": [len(split.train), len(split.dev), len(split.test)],
        "labels": [example.label for example in split.test],
        "notes": [*split.notes, *backbone.notes],
    }


def _classify(data: _Examples, kernel: Tensor, kind: Kind) -> Record:
    """Return what each classifier chose on dev and reached on the test examples."""
    methods: tuple[Method, ...] = ("ridge",) if data.regression else CLASSIFIERS
    if kind == "asymmetric_signgd":
        methods = ("asymmetric",)
    found: Record = {}
    for method in methods:
        tuned = _tuned(data, kernel, data.labels[: data.train], method)
        found[method] = {
            **data.scored(tuned.dev, tuned.test),
            "regularisation": tuned.regularisation,
            "offset_scale": tuned.offset_scale,
            "outputs": _rounded(tuned.test),
        }
    return found


def _tuned(
    data: _Examples, kernel: Tensor, labels: NDArray[Any], method: Method
) -> Tuned:
    return tune(
        kernel.numpy(),
        labels,
        data.labels[data.dev],
        method=method,
        f0=None if method == "svm" else data.f0,
        judge=data.judge,
        regression=data.regression,
    )


def _shuffled(data: _Examples, kernel: Tensor) -> Record:
    """Return what ridge reaches when the training labels mean nothing."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(SHUFFLES):
        labels = generator.permutation(data.labels[: data.train])
        # f0 of a probe knows the true labels.
        tuned = _tuned(replace(data, f0=0 * data.f0), kernel, labels, "ridge")
        found.append(data.judge(tuned.test, data.labels[data.test]))
    return {"ridge": float(np.mean(found)), "draws": SHUFFLES}


def _measures(data: _Examples, full: Tensor, kernel: Tensor) -> Record:
    """Return how a kernel over the training examples is and lies to the full one."""
    reference, gram = (gram_matrix(k[: data.train]).numpy() for k in (full, kernel))
    rank = min(10, len(gram) - 1)
    return {
        "distance": asdict(distance.summary(reference, gram, rank=rank)),
        "spectrum": asdict(spectrum.summary(gram, eps=float(np.finfo(np.float32).eps))),
        "alignment": distance.alignment(gram, _flat(data.targets(), gram)),
        "growth": [
            asdict(spread)
            for spread in growth(
                partial(distance.relative_difference, norm="frobenius", rescale=True),
                full[: data.train].numpy(),
                kernel[: data.train].numpy(),
                draws=GROWTH_DRAWS,
                labels=data.labels[: data.train],
            )
        ],
    }


def _flat(targets: Array, gram: Array) -> Array:
    """Return targets with a row for each row of the Gram matrix."""
    return targets if len(targets) == len(gram) else targets.reshape(-1)


def _rounded(outputs: Array) -> list[list[float]]:
    return np.round(outputs, DIGITS).tolist()
