"""What is the same for all records of a study, and a split's examples as it wants them.

The protocol is that of the kernel view of fine-tuning (Malladi et al. 2023): k training
examples of each label, k others to choose hyperparameters by, a fixed test set. The
kernel of two outputs is that of their margin. More outputs have a function each on the
kernel summed over outputs, or coupled ones on all pairs of outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk.function import evaluating
from ntk.kernel import Reduction
from ntk.study import Cell, Record
from rocoft.backbone import Backbone, Readout, load_backbone
from rocoft.backbone import Head as HeadStart
from rocoft.metrics import metric_names, scores
from rocoft.readouts import logits
from rocoft.splits import Split, lmbff_split
from rocoft.tasks import Task, load_task
from rocoft.trainer import versions

Array = NDArray[np.float64]


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

    def reduction(self, outputs: int) -> Reduction:
        """Return how the kernel of a model is reduced.

        Args:
            outputs: Of the model.
        """
        if outputs == 2:
            return "margin"
        return "full" if self.coupled else "trace"


@dataclass(frozen=True)
class Examples:
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
    def of(cls, backbone: Backbone, split: Split, protocol: Protocol) -> "Examples":
        """Encode a split and run the model on it.

        Args:
            backbone: The model, ready for the split.
            split: The split; parts of it may be empty.
            protocol: Says where to compute, and how many at a time.

        Returns:
            The examples.
        """
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
        """Where the dev examples are."""
        return slice(self.train, self.train + self.held)

    @property
    def test(self) -> slice:
        """Where the test examples are."""
        return slice(self.train + self.held, None)

    def sorted(self, kernel: Tensor) -> Tensor:
        """Put a kernel's rows and columns in the order of the examples.

        Args:
            kernel: Between all batches and those of the training examples.

        Returns:
            ``(n, m)`` or ``(n, m, c, d)``, on the CPU.
        """
        rows = torch.tensor(np.argsort(self.place))
        columns = torch.tensor(np.argsort(self.place[: self.train]))
        return kernel.cpu()[rows][:, columns]

    def targets(self) -> Array:
        """Return the training labels as targets, ``(n,)`` or ``(n, c)``, mean zero."""
        labels, c = self.labels[: self.train], self.f0.shape[1]
        targets = labels if c <= 2 else np.eye(c)[labels]
        return targets - targets.mean(axis=0)

    def targets_of(self, gram: Array) -> Array:
        """Return the targets with a row for each row of a Gram matrix.

        Args:
            gram: Of the training examples, coupled or not.
        """
        targets = self.targets()
        return targets if len(targets) == len(gram) else targets.reshape(-1)

    def judge(self, outputs: Array, labels: Array) -> float:
        """Return the score to choose by.

        Args:
            outputs: ``(n, c)``.
            labels: ``(n,)``.
        """
        return scores(outputs, labels, self.names)[self.names[0]]

    def scored(self, dev: Array, test: Array) -> Record:
        """Return the scores of outputs on dev and test examples.

        Args:
            dev: Outputs.
            test: Outputs.
        """
        return {
            "dev": self.judge(dev, self.labels[self.dev]),
            "test": scores(test, self.labels[self.test], self.names),
        }


def description(backbone: Backbone, split: Split) -> Record:
    """Return what every record says of its split and model.

    Args:
        backbone: The model, ready for the split.
        split: The split.
    """
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
