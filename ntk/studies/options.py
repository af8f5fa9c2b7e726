"""The options that commands share which compute kernels; imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ntk.kernels import Precision
from ntk.scale import Resources, parse_bytes
from rocoft.commands import Bits, OptionError, option, positive
from rocoft.data import DEFAULT_TASK, HUB, SCORED_HUB, base_name
from rocoft.training import (
    EXTENSIONS,
    ModelOptions,
    OutputOptions,
    TaskOptions,
    refuse_two_sources,
    task_name,
)

LMBFF_SEEDS = (13, 21, 42, 87, 100)
"""The seeds of the published splits of LM-BFF."""
SEEDS = LMBFF_SEEDS[:3]


@dataclass(frozen=True)
class KernelModelOptions(ModelOptions):
    """Which model kernels are taken of, and where its weights are."""

    load_in: Bits | None = option(
        None,
        "quantise the linear layers with bitsandbytes (4bit: NF4) and dequantise each "
        "as it is used: the kernels are those of the dequantised model, whose weights "
        "never exist together",
        shown="as --dtype says",
    )
    offload: bool = option(
        False,
        "leave the weights of linear layers in the host's memory and copy each to "
        "--device as it is used, forward and backward: for models larger than a GPU",
    )


@dataclass(frozen=True)
class FewShotOptions(TaskOptions):
    """Which examples of one task."""

    shots: int = option(
        16, "training examples of each label", metavar="K", parse=positive
    )
    test_size: int = option(200, "most test examples", metavar="N", parse=positive)
    seed: int = option(0, "of the (first) split and of a new head")
    splits: int = option(
        1,
        "splits with seeds from --seed on: accuracies and measures are their means, "
        "and differences carry the noise of the training examples, too",
        metavar="K",
        parse=positive,
    )


@dataclass(frozen=True)
class SplitOptions:
    """Which tasks, and which splits of each."""

    title: ClassVar[str] = "splits"

    tasks: tuple[str, ...] = option(
        (),
        f"reviews (embedded), {', '.join(HUB | SCORED_HUB)} from the Hub, or folders "
        "of --data-dir; --task is the same",
        metavar="TASK",
        shown=DEFAULT_TASK,
        parse=task_name,
        also=("task",),
    )
    data: Path | None = option(
        None,
        "own examples instead of --tasks: .csv, .tsv, .jsonl, .json (or one of them "
        "with .gz) or .parquet, with the columns text (or text_a, text_b) and label; a "
        "fifth of them, always the same, is tested on",
        metavar="FILE",
    )
    data_dir: Path | None = option(
        None,
        "folder with TASK/train.jsonl and TASK/test.jsonl (or another kind of file "
        "that --data takes), instead of the Hub",
        metavar="DIR",
    )
    template: str | None = option(
        None,
        "prompt with {a}, {b} for pairs and {mask}, such as '{a} It was {mask}.'",
        metavar="TEXT",
        shown="the task's",
    )
    label_words: tuple[str, ...] = option(
        (), "one word a label, in label order", metavar="WORD", shown="the task's"
    )
    shots: tuple[int, ...] = option(
        (16,),
        "training examples of each label, and as many dev examples",
        metavar="K",
        parse=positive,
    )
    seeds: tuple[int, ...] = option(
        SEEDS, "of the splits, new heads and fine-tuning", metavar="SEED"
    )
    test_size: int = option(
        1000,
        "most test examples, the same for all splits",
        metavar="N",
        parse=positive,
    )

    def __post_init__(self) -> None:
        """Refuse examples from two places, and what is asked for twice."""
        refuse_two_sources(self.data, self.data_dir, "--tasks", self.tasks)
        refuse_repeated(tasks=self.tasks, shots=self.shots, seeds=self.seeds)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tasks."""
        if self.data is not None:
            return (base_name(self.data),)
        return self.tasks or (DEFAULT_TASK,)


@dataclass(frozen=True)
class BatchOptions:
    """How much is computed at a time."""

    title: ClassVar[str] = "batches"

    batch_size: int = option(
        32,
        "examples in one pass; changes time and memory",
        metavar="N",
        parse=positive,
    )

    def for_protocol(self, folder: Path) -> dict[str, Any]:
        """Return what a study's protocol takes from these options.

        Args:
            folder: Where what is kept or spilled goes.
        """
        return {"batch_size": self.batch_size}


@dataclass(frozen=True)
class PassOptions(BatchOptions):
    """How much is computed and held at a time."""

    title: ClassVar[str] = "kernels"

    memory: int | None = option(
        None,
        "most that a process holds while kernels are computed, such as 4GiB, libraries "
        "and model included; what does not fit waits in a file, or is computed in more "
        "passes",
        metavar="SIZE",
        shown="what is held, and four fifths of what is free",
        parse=parse_bytes,
    )


@dataclass(frozen=True)
class KernelGroup(PassOptions):
    """How kernels are computed, and what that may use."""

    precision: Precision = option(
        "float32",
        "of the products that contract gradients; --dtype is the model's. bf16 rounds "
        "what is multiplied to bfloat16, bf16x3 what bfloat16 leaves over as well, "
        "tf32 is for GPUs; sums are in float32 at least, and the report says what it "
        "costs",
    )
    cache: bool = option(
        True,
        "keep kernels in DIR/.cache while and after they are computed, by a digest of "
        "the model, the examples and the spaces: the same command goes on where it was "
        "stopped, and does not compute again",
    )
    spill: bool = option(
        True,
        "let what --memory has no room for wait in a file in DIR/.cache, if that is "
        "faster than more passes and the disk has room; the file goes when the kernels "
        "are done or the command ends, and several processes have none",
    )

    def resources(self, folder: Path) -> Resources:
        """Return what kernels may use.

        Args:
            folder: Where what is kept or spilled goes.
        """
        return Resources(
            memory=self.memory,
            cache=folder if self.cache else None,
            spill=folder if self.spill else None,
        )

    def for_protocol(self, folder: Path) -> dict[str, Any]:
        """Return what a study's protocol takes from these options.

        Args:
            folder: Where what is kept or spilled goes.
        """
        return {
            **super().for_protocol(folder),
            "precision": self.precision,
            "resources": self.resources(folder),
        }


@dataclass(frozen=True)
class FineTuningOptions:
    """How models are fine-tuned beside the kernels."""

    title: ClassVar[str] = "fine-tuning"

    num_train_epochs: int = option(
        10, "passes over the training examples", metavar="N", parse=positive
    )
    per_device_train_batch_size: int = option(
        8, "training examples in a step", metavar="N", parse=positive
    )
    lrs: tuple[str, ...] = option(
        (),
        "learning rates of a method to choose from on dev, such as rows:3=1e-3,3e-3; "
        f"if the best of several is at an end, up to {EXTENSIONS} beyond it are tried "
        "too, and one that stays at an end is marked",
        metavar="METHOD=LR,LR",
        shown="three of each method's own",
    )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' Trainer."""
        return {
            "num_train_epochs": self.num_train_epochs,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "eval_strategy": "steps",
            # The Trainer needs one look before the end.
            "eval_steps": 1 / 2,
            # A training is done again as a whole.
            "save_only_model": True,
        }


@dataclass(frozen=True)
class EvaluatedFineTuningOptions(FineTuningOptions):
    """How models are fine-tuned whose best checkpoint is chosen on dev."""

    evaluations: int = option(
        5,
        "looks at dev during a training; the best one's weights are taken; 2 or more",
        metavar="N",
        parse=positive,
    )

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to choose."""
        if self.evaluations < 2:
            raise OptionError(
                "--evaluations 1 leaves no checkpoint to choose. Give 2 or more."
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' Trainer."""
        return {**super().arguments(), "eval_steps": 1 / self.evaluations}


@dataclass(frozen=True)
class StudyOutputOptions(OutputOptions):
    """How a study is done, and where its results go."""

    title: ClassVar[str] = "work and output"

    overwrite: bool = option(
        False, "begin a study of that name anew, instead of continuing it"
    )
    json: bool = option(False, "print the report alone, as JSON")
    jobs: int = option(
        1,
        "records made at the same time, each by a process with its share of the cores",
        metavar="N",
        parse=positive,
    )
    report_only: bool = option(
        False, "report on the records that are there and make none"
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.overwrite and self.report_only:
            raise OptionError(
                "--overwrite removes the records that --report-only reports on. Give "
                "one of them."
            )


class StudyOptions(Protocol):
    """The groups that the options of every study have."""

    @property
    def model(self) -> KernelModelOptions:
        """Which model."""

    @property
    def splits(self) -> SplitOptions:
        """Which tasks and splits."""

    @property
    def kernels(self) -> BatchOptions:
        """How much is computed at a time, and how kernels are."""

    @property
    def fine_tuning(self) -> FineTuningOptions:
        """How models are fine-tuned."""

    @property
    def output(self) -> StudyOutputOptions:
        """How the work is done, and where results go."""


def refuse_repeated(**options: tuple[object, ...]) -> None:
    """Refuse what is asked for twice.

    Args:
        **options: Values of options, by name.

    Raises:
        OptionError: If an option holds a value more than once.
    """
    for name, values in options.items():
        repeated = sorted({str(v) for v in values if values.count(v) > 1})
        if repeated:
            raise OptionError(
                f"--{name.replace('_', '-')} holds {', '.join(repeated)} more than "
                "once. Give each once."
            )
