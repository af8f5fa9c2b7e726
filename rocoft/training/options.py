"""The options of `python -m rocoft.train`; importing this imports no torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from rocoft.commands import (
    Head,
    OptionError,
    Strategy,
    above_zero,
    option,
    positive,
)
from rocoft.training.grid import EXTENSIONS
from rocoft.training.groups import ModelOptions, OutputOptions, TaskOptions, file_name


@dataclass(frozen=True)
class TrainModelOptions(ModelOptions):
    """Which model is trained."""

    head_init: Head = option(
        "random",
        "how a head that the checkpoint lacks is made: fitted to the training examples "
        "by logistic regression, or seeded random; fine-tuning usually starts from a "
        "random one, while the other commands take kernels at a fitted one",
    )
    dtype: Literal["float32", "float64", "bfloat16"] = option(
        "float32", "precision of the model's parameters; float16 cannot be trained"
    )


@dataclass(frozen=True)
class TrainTaskOptions(TaskOptions):
    """Which examples are trained and tested on."""

    data: Path | None = option(
        None,
        "own examples instead of --task, drawn for training, dev and test: .csv, .tsv, "
        ".jsonl, .json (or one of them with .gz) or .parquet, with the columns text "
        "(or text_a, text_b) and label; or with prompt and completion, or prompt, "
        "choices and answer, which trains a language model",
        metavar="FILE",
    )
    shots: int | None = option(
        None,
        "training examples of each label, and as many dev examples",
        metavar="K",
        shown="all, a tenth of them for dev",
        parse=positive,
    )
    test_size: int | None = option(
        None, "most test examples", metavar="N", shown="all", parse=positive
    )
    seed: int = option(
        0, "of the draw of examples, a new head, their order, LoRA and dropout"
    )


@dataclass(frozen=True)
class MethodOptions:
    """What is trained."""

    title: ClassVar[str] = "method, one of"

    method: str | None = option(None, "any method, see below", metavar="SPEC")
    rows: int | None = option(
        None,
        "RoCoFT: rows (output features) of every weight in the blocks; with --columns "
        "both",
        metavar="R",
    )
    columns: int | None = option(
        None, "RoCoFT: columns (input features) of these weights", metavar="R"
    )
    lora: int | None = option(None, "LoRA of this rank on these weights", metavar="R")
    strategy: Strategy = option(
        "first",
        "which rows and columns: first, last, random, by norm max, min or mixed, by "
        "activation or gradient on the training examples",
    )


@dataclass(frozen=True)
class TrainingOptions:
    """How it is trained."""

    title: ClassVar[str] = "training"

    lr: tuple[float, ...] = option(
        (),
        "peak learning rates to try, the best on dev counts; if that is the lowest or "
        f"highest of several, up to {EXTENSIONS} beyond it are tried too",
        metavar="RATE",
        shown="three that suit the method",
        parse=above_zero,
    )
    num_train_epochs: float = option(
        5.0, "passes over the training examples", metavar="N", parse=above_zero
    )
    max_steps: int = option(
        -1, "optimizer steps instead of epochs, if positive", metavar="N"
    )
    per_device_train_batch_size: int = option(
        16, "training examples in a step", metavar="N", parse=positive
    )
    per_device_eval_batch_size: int = option(
        64, "examples in one evaluation pass", metavar="N", parse=positive
    )
    gradient_accumulation_steps: int = option(
        1, "passes before an optimizer step", metavar="N", parse=positive
    )
    lr_scheduler_type: str = option(
        "linear",
        "decay of the learning rate: linear, cosine, constant, ...",
        metavar="NAME",
    )
    warmup_steps: float = option(
        0.06,
        "steps in which the learning rate rises; below 1 a share of all steps",
        metavar="N",
    )
    weight_decay: float = option(
        0.0,
        "AdamW's, per step and learning rate; RoCoFT and LoRA decay towards the "
        "pretrained weights, the other methods towards zero",
        metavar="RATE",
    )
    max_grad_norm: float = option(
        1.0, "gradients are scaled to at most this norm", metavar="NORM"
    )
    label_smoothing_factor: float = option(
        0.0, "of the cross-entropy, from 0 to 1", metavar="SHARE"
    )
    optim: str = option("adamw_torch", "optimizer, by the Trainer's name")
    bf16: bool = option(False, "compute in bfloat16 under autocast")
    gradient_checkpointing: bool = option(
        False, "compute activations twice instead of keeping them: less memory, slower"
    )
    eval_strategy: Literal["epoch", "steps"] = option(
        "epoch", "when to look at dev and save a checkpoint"
    )
    eval_steps: int | None = option(
        None,
        "optimizer steps between two looks at dev, with --eval-strategy steps",
        metavar="N",
        parse=positive,
    )
    early_stopping_patience: int | None = option(
        None,
        "looks at dev without a new best after which training stops; the best "
        "checkpoint counts in any case",
        metavar="N",
        shown="it goes on to the end",
        parse=positive,
    )
    report_to: tuple[str, ...] = option(
        ("none",), "trackers: tensorboard, wandb, trackio, ... or none", metavar="NAME"
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise OptionError(
                f"--eval-steps {self.eval_steps} has no meaning with --eval-strategy "
                f"{self.eval_strategy}. Add --eval-strategy steps, or leave it out."
            )

    def arguments(self) -> dict[str, Any]:
        """Return those that go to the Trainer under their own names."""
        apart = ("lr", "early_stopping_patience")
        return {
            key: value
            for key, value in _as_yaml(self).items()
            if key not in apart and value is not None
        }


@dataclass(frozen=True)
class TrainOutputOptions(OutputOptions):
    """Where a run goes, and whether it continues."""

    name: str | None = option(
        None,
        "name of the result",
        shown="model, task, method and seed",
        parse=file_name,
    )
    resume: bool = option(
        False, "continue a run of that name, or begin it if there is none"
    )

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.overwrite and self.resume:
            raise OptionError(
                "--overwrite removes an earlier run and --resume continues it. Give "
                "one of them."
            )


@dataclass(frozen=True)
class TrainOptions:
    """All options of one run."""

    model: TrainModelOptions
    task: TrainTaskOptions
    method: MethodOptions
    training: TrainingOptions
    output: TrainOutputOptions

    def resolved(self) -> dict[str, Any]:
        """Return what decides the result, by the name of the option, for YAML."""
        parts = (self.model, self.task, self.method, self.training)
        return {k: v for part in parts for k, v in _as_yaml(part).items()}

    def spec(self) -> str:
        """Return the method that the options name, rows:3 if none.

        Returns:
            A text that `rocoft.training.methods.parse_method` reads.

        Raises:
            OptionError: If they name several.
        """
        chosen = self.method
        extra = "" if chosen.strategy == "first" else f"/strategy={chosen.strategy}"
        if extra and self.task.seed:
            extra += f"/seed={self.task.seed}"
        counts = {"rows": chosen.rows, "columns": chosen.columns}
        slices = [f"{k}:{n}{extra}" for k, n in counts.items() if n is not None]
        named = ["+".join(slices)] if slices else []
        if chosen.lora is not None:
            named.append(f"lora:{chosen.lora}")
        if chosen.method is not None:
            named.append(chosen.method)
        if len(named) > 1 or (extra and not slices and named):
            raise OptionError(
                "one run trains one method: give --method, or --rows and --columns "
                f"with --strategy, or --lora; got {', '.join(named)}{extra}."
            )
        return named[0] if named else f"rows:3{extra}"


def _as_yaml(group: Any) -> dict[str, Any]:
    """Return a group's values in types that YAML has."""
    values: dict[str, Any] = dataclasses.asdict(group)
    for key, value in values.items():
        if isinstance(value, tuple):
            values[key] = list(value)
        elif isinstance(value, Path):
            values[key] = str(value)
    return values
