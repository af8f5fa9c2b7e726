"""The settings that all records of a study share, and the encoded examples of a split.

The protocol is that of the kernel view of fine-tuning (Malladi et al. 2023): k training
examples of each label, k others for choosing hyperparameters, a fixed test set. Kernels
are those of contrasts of the outputs, which is what a softmax sees, see
`ntk.measures.gram`: of two classes that of the margin; of more, one function per class
is fitted on the kernel summed over contrasts, or coupled functions on the kernel of
all pairs of contrasts. The outputs of a regression are taken as they are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ntk.kernels import KernelOptions, KernelResult, Kind, Precision
from ntk.measures import Reduction
from ntk.scale import Resources, Work, kernels
from ntk.spaces import Space
from ntk.studies.encoding import EncodedSplit, by_row, encode_split, own_outputs
from ntk.studies.folder import Cell, Record
from ntk.studies.options import StudyOptions
from rocoft.commands import Bits, Readout
from rocoft.commands import Head as HeadStart
from rocoft.data import (
    Split,
    Task,
    TaskError,
    lmbff_split,
    load_file,
    load_task,
    metric_names,
    scores,
    with_prompt,
    with_test,
)
from rocoft.models import Backbone, load_backbone, resolved_device
from rocoft.training import parse_method, versions

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """Settings that all records of a study share.

    Attributes:
        model: Hub id, local folder, GGUF file or an embedded model, see
            `rocoft.models.locate`; None for the embedded MiniLM.
        data_dir: Folder of the tasks; None for the Hub.
        data: File of one task, instead of named ones; a fifth of its examples is for
            testing.
        template: Prompt of the tasks; None for each task's own.
        label_words: One word of each label; empty for each task's own.
        readout: Kind of readout, see `rocoft.models.backbone.load_backbone`.
        head: Initialisation of a head that the checkpoint lacks.
        max_length: Maximal number of tokens of an example.
        test_size: Maximal number of test examples, the same ones for every split.
        batch_size: Examples per batch.
        device: Device of the model.
        dtype: Dtype of the model's parameters.
        precision: Precision of the products that contract gradients.
        load_in: Bits that linear layers are quantised to; None for no quantisation.
        offload: Whether the weights of linear layers stay in the host's memory.
        resources: The memory and disk that kernels may use.
        coupled: Whether to use all pairs of contrasts of more than two classes.
        rates: Learning rates by method that replace the method's own.
        rate_seed: Seed whose chosen learning rate is used for all seeds; None if each
            seed chooses its own.
        arguments: Arguments of transformers' Trainer.
    """

    model: str | None = None
    data_dir: Path | None = None
    data: Path | None = None
    template: str | None = None
    label_words: tuple[str, ...] = ()
    readout: Readout | None = None
    head: HeadStart = "probe"
    max_length: int = 128
    test_size: int = 1000
    batch_size: int = 32
    device: str = "cpu"
    dtype: str = "float32"
    precision: Precision = "float32"
    load_in: Bits | None = None
    offload: bool = False
    resources: Resources = Resources()
    coupled: bool = False
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rate_seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the numbers, as JSON values."""
        settings = asdict(self)
        for name in ("batch_size", "device", "offload", "resources"):
            del settings[name]
        # Defaults are left out: older studies lack these settings.
        for name in ("precision", "load_in", "data", "template", "label_words"):
            if settings[name] == getattr(Protocol, name):
                del settings[name]
        if self.data is not None:
            digest = hashlib.sha256(self.data.read_bytes()).hexdigest()
            settings["data"] = {"file": str(self.data), "sha256": digest}
        if self.label_words:
            settings["label_words"] = list(self.label_words)
        data = None if self.data_dir is None else str(self.data_dir)
        return {**settings, "data_dir": data, "versions": versions()}

    def task(self, name: str) -> Task:
        """Load a task by name."""
        if self.data is None:
            task = load_task(name, self.data_dir, regression=True)
        else:
            task = with_test(load_file(self.data, regression=True))
        if self.template or self.label_words:
            task = with_prompt(task, self.template, self.label_words)
        return task

    def draw(self, task: Task, cell: Cell) -> Split:
        """Draw the split of a cell from its task."""
        return lmbff_split(task, cell.shots, cell.seed, test_size=self.test_size)

    def split(self, cell: Cell) -> Split:
        """Draw the split of a cell."""
        return self.draw(self.task(cell.task), cell)

    def backbone(self, split: Split) -> Backbone:
        """Load the model with the readout of a split's task."""
        return load_backbone(
            self.model,
            split,
            readout=self.readout,
            head=self.head,
            seed=split.seed,
            max_length=self.max_length,
            device=self.device,
            dtype=getattr(torch, self.dtype),
            load_in=self.load_in,
            offload=self.offload,
        )

    def reduction(self, outputs: int) -> Reduction:
        """Return the reduction of a model's kernel over pairs of outputs.

        Args:
            outputs: Number of the model's outputs; one is a regression.
        """
        if outputs <= 2:
            return "margin" if outputs == 2 else "trace"
        return "contrast" if self.coupled else "contrast_trace"

    def kernels(
        self,
        backbone: Backbone,
        data: "ScoredSplit",
        spaces: Mapping[str, Space],
        *,
        kind: Kind = "sgd",
        right: int | None = None,
        model: nn.Module | None = None,
    ) -> KernelResult:
        """Compute kernels of a split's examples, within the study's resources.

        Args:
            backbone: The model.
            data: The examples.
            spaces: Tangent spaces by name.
            kind: The kind of kernel.
            right: Number of leading batches that are the right examples; None for the
                batches of training examples.
            model: A model of the same architecture to use instead of the backbone's.

        Returns:
            The kernels, rows and columns in the order of the batches.
        """
        work = Work(
            backbone.module if model is None else model,
            data.batches,
            data.train_batches if right is None else right,
            spaces,
            KernelOptions(
                kind=kind,
                reduce=self.reduction(data.f0.shape[1]),
                precision=self.precision,
            ),
            readout=backbone.readout_key,
        )
        computation = kernels(work, self.resources)
        if computation.cache is not None:
            # The study keeps its records, not the kernels.
            computation.cache.path.unlink(missing_ok=True)
        return computation.result


@dataclass(frozen=True)
class ScoredSplit(EncodedSplit):
    """Encoded examples with the model's own outputs and the metrics of the task.

    Attributes:
        f0: ``(n, c)`` outputs of the model in the order of the split; of classes less
            their mean, which no softmax sees.
        metrics: Names of the metrics, the primary one first.
        regression: Whether the labels are scores.
    """

    f0: Array
    metrics: tuple[str, ...]
    regression: bool

    @classmethod
    def of(cls, backbone: Backbone, split: Split, protocol: Protocol) -> "ScoredSplit":
        """Encode a split and run the model on it.

        Args:
            backbone: The model.
            split: The split; parts of it may be empty.
            protocol: Settings with the device and the batch size.

        Returns:
            The examples.
        """
        encoded = encode_split(backbone, split, protocol.batch_size, protocol.device)
        task = split.task
        return cls(
            **vars(encoded),
            f0=own_outputs(backbone, encoded, regression=task.regression),
            metrics=metric_names(task.name, regression=task.regression),
            regression=task.regression,
        )

    def training(self) -> Self:
        """Return the training examples alone."""
        return replace(super().training(), f0=self.f0[: self.train])

    def targets(self, examples: Sequence[int] | None = None) -> Array:
        """Return centred training labels, ``(n,)`` or one-hot ``(n, c)``.

        Args:
            examples: Indices of training examples; None for all.
        """
        labels, c = self.labels[: self.train], self.f0.shape[1]
        if examples is not None:
            labels = labels[list(examples)]
        targets = labels if c <= 2 else np.eye(c)[labels]
        return targets - targets.mean(axis=0)

    def targets_of(
        self, gram: Array | Tensor, examples: Sequence[int] | None = None
    ) -> Array:
        """Return the targets with one row per row of a Gram matrix.

        Args:
            gram: Gram matrix of training examples, of contrasts or not.
            examples: Their indices; None for all.
        """
        targets, rows = self.targets(examples), len(gram)
        return targets if len(targets) == rows else by_row(targets, rows)[:, 0]

    def primary_metric(self, outputs: Array, labels: Array) -> float:
        """Return the primary metric, by which hyperparameters are chosen.

        Args:
            outputs: ``(n, c)`` outputs.
            labels: ``(n,)`` labels.
        """
        return scores(outputs, labels, self.metrics)[self.metrics[0]]

    def scored(self, dev: Array, test: Array) -> Record:
        """Return the primary metric on dev and all metrics on test.

        Args:
            dev: Outputs on the dev examples.
            test: Outputs on the test examples.
        """
        return {
            "dev": self.primary_metric(dev, self.labels[self.dev]),
            "test": scores(test, self.labels[self.test], self.metrics),
        }


def description(backbone: Backbone, split: Split) -> Record:
    """Return the fields of a record that describe its split and model.

    Args:
        backbone: The model.
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


def protocol_of(
    options: StudyOptions, *, coupled: bool = False, rate_seed: int | None = None
) -> Protocol:
    """Return what is the same for every record.

    Args:
        options: The study's options.
        coupled: Whether all pairs of more than two outputs are contracted.
        rate_seed: The seed whose choice of a learning rate serves all seeds.

    Returns:
        The protocol.

    Raises:
        TaskError: If learning rates cannot be read.
    """
    rates = {}
    for text in options.fine_tuning.lrs:
        method, _, values = text.rpartition("=")
        try:
            rates[str(parse_method(method))] = [float(v) for v in values.split(",")]
        except ValueError as error:
            raise TaskError(
                f"--lrs {text!r} must read METHOD=LR,LR such as rows:3=1e-3,3e-3: "
                f"{error}"
            ) from None
    model, splits = options.model, options.splits
    return Protocol(
        model=model.model,
        data_dir=splits.data_dir,
        data=splits.data,
        template=splits.template,
        label_words=splits.label_words,
        readout=model.readout,
        head=model.head_init,
        max_length=model.max_length,
        test_size=splits.test_size,
        device=resolved_device(model.device),
        dtype=model.dtype,
        load_in=model.load_in,
        offload=model.offload,
        coupled=coupled,
        rates=rates,
        rate_seed=rate_seed,
        arguments=options.fine_tuning.arguments(),
        **options.kernels.for_protocol(options.output.cache_folder),
    )


def cells(options: StudyOptions, protocol: Protocol) -> list[Cell]:
    """Return the splits of a study, after drawing each once to see that it can be.

    Args:
        options: The study's options.
        protocol: The study's protocol.

    Returns:
        All tasks of a seed before the next seed: a study that is stopped early is a
        smaller study.
    """
    tasks = {name: protocol.task(name) for name in options.splits.names}
    splits = [
        Cell(name, shots, seed)
        for shots in options.splits.shots
        for seed in options.splits.seeds
        for name in tasks
    ]
    for cell in splits:
        protocol.draw(tasks[cell.task], cell)
    return splits
