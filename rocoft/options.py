"""The options of `python -m rocoft.train`.

Those that go to transformers' Trainer have the names of its `TrainingArguments`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

DESCRIPTION = (
    "Fine-tune a pretrained transformer by rows and columns (RoCoFT) or another way; "
    "the learning rate is chosen on dev, the best checkpoint is tested once. Without "
    "options it trains three rows of every weight of the embedded MiniLM-L6 on the "
    "embedded task 'reviews'."
)
EPILOG = (
    "A SPEC reads rows:3@query,value/layers=0,11: full, rows:R, columns:R, "
    "rows:R+columns:R, auto:R, lora:R, dora:R, bitfit, head, probe, 'masked rows:R'; "
    "modules after @, options after / (layers=, strategy=, seed=, alpha=), and +bias. "
    "Options can be written with - or _. Exit codes: 0 done, 2 bad input, 130 "
    "interrupted."
)


NULLS = ("", "~", "null", "Null", "NULL")
"""How YAML writes that there is no value."""


class OptionError(ValueError):
    """An option that has no meaning, or a configuration file that cannot be read."""


def _option(default: Any, text: str, **more: Any) -> Any:
    metadata = {"help": text.replace("%", "%%"), **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read out."""

    _argument_group_name = "model"

    model: str | None = _option(
        None, "hub id or local folder; without it the embedded MiniLM", metavar="ID"
    )
    readout: Literal["head", "masked", "causal"] | None = _option(
        None,
        "outputs: logits of a classification head, or of label words at the mask or "
        "after the prompt; without it label words for language models whose task has "
        "a prompt, else head",
    )
    head_init: Literal["probe", "random"] = _option(
        "random",
        "start of a head that the checkpoint lacks: seeded random, or fitted to the "
        "training examples by logistic regression, where ntk.compare starts",
    )
    dtype: Literal["float32", "float64", "bfloat16"] = _option(
        "float32", "precision of the model's parameters"
    )
    device: str = _option("cpu", "where to train, such as cuda")
    max_length: int = _option(128, "longer examples are cut (tokens)", metavar="TOKENS")


@dataclass(frozen=True)
class TaskOptions:
    """Which examples."""

    _argument_group_name = "task"

    task: str | None = _option(
        None,
        "reviews (embedded), a task of the Hub such as sst2 or stsb, or any folder of "
        "--data-dir; without it reviews",
    )
    data: str | None = _option(
        None,
        "own examples, drawn for training, dev and test: .jsonl, .csv or .tsv with "
        "columns text (or text_a, text_b) and label; or .jsonl with prompt and "
        "completion, or prompt, choices and answer, which trains a language model",
        metavar="FILE",
    )
    data_dir: str | None = _option(
        None,
        "folder with TASK/train.jsonl and TASK/test.jsonl, instead of the Hub",
        metavar="DIR",
    )
    template: str | None = _option(
        None,
        "prompt with {a}, {b} for pairs and {mask}, such as '{a} It was {mask}.'; "
        "without it the task's",
        metavar="TEXT",
    )
    label_words: list[str] = _option([], "one word a label, in label order")
    shots: int | None = _option(
        None,
        "training examples of each label, and as many dev examples; without it all, a "
        "tenth of them for dev",
        metavar="K",
    )
    test_size: int | None = _option(
        None, "most test examples; without it all", metavar="N"
    )
    seed: int = _option(
        0, "of the draw of examples, a new head, their order, LoRA and dropout"
    )


@dataclass(frozen=True)
class MethodOptions:
    """What is trained."""

    _argument_group_name = "method, one of"

    method: str | None = _option(None, "any method, see below", metavar="SPEC")
    rows: int | None = _option(
        None,
        "RoCoFT: rows (output features) of every weight in the blocks; with "
        "--columns both",
        metavar="R",
    )
    columns: int | None = _option(
        None, "RoCoFT: columns (input features) of these weights", metavar="R"
    )
    lora: int | None = _option(None, "LoRA of this rank on these weights", metavar="R")
    strategy: str = _option(
        "first",
        "which rows and columns: first, last, random, by norm max, min or mixed, by "
        "activation or gradient on training examples",
    )


@dataclass(frozen=True)
class TrainingOptions:
    """How it is trained."""

    _argument_group_name = "training"

    lr: list[float] = _option(
        [],
        "peak learning rates to try, the best on dev counts; without it three that "
        "suit the method",
        metavar="RATE",
    )
    num_train_epochs: float = _option(5.0, "passes over the training examples")
    max_steps: int = _option(-1, "optimizer steps instead of epochs, if positive")
    per_device_train_batch_size: int = _option(16, "examples in one training pass")
    per_device_eval_batch_size: int = _option(64, "examples in one evaluation pass")
    gradient_accumulation_steps: int = _option(1, "passes before an optimizer step")
    lr_scheduler_type: str = _option(
        "linear", "decay of the learning rate: linear, cosine, constant, ..."
    )
    warmup_steps: float = _option(
        0.06, "steps in which the learning rate rises; below 1 a share of all steps"
    )
    weight_decay: float = _option(
        0.0,
        "AdamW's, per step and learning rate; RoCoFT and LoRA decay towards the "
        "pretrained weights, the other methods towards zero",
    )
    max_grad_norm: float = _option(1.0, "gradients are scaled to at most this norm")
    label_smoothing_factor: float = _option(0.0, "of the cross-entropy, from 0 to 1")
    optim: str = _option("adamw_torch", "optimizer, by the Trainer's name")
    bf16: bool = _option(False, "compute in bfloat16 under autocast")
    gradient_checkpointing: bool = _option(
        False, "compute activations twice instead of keeping them: less memory, slower"
    )
    eval_strategy: Literal["epoch", "steps"] = _option(
        "epoch", "when to look at dev and save a checkpoint"
    )
    eval_steps: int | None = _option(
        None, "optimizer steps between two looks at dev, with --eval-strategy steps"
    )
    early_stopping_patience: int | None = _option(
        None,
        "looks at dev without a new best after which training stops; without it, it "
        "goes on to the end, and the best checkpoint counts all the same",
        metavar="N",
    )
    report_to: list[str] = _option(
        ["none"], "trackers: tensorboard, wandb, trackio, ... or none"
    )

    def arguments(self) -> dict[str, Any]:
        """Return those that go to the Trainer under their own names."""
        apart = ("lr", "early_stopping_patience")
        given = {k: v for k, v in dataclasses.asdict(self).items() if k not in apart}
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class OutputOptions:
    """Where it goes."""

    _argument_group_name = "output"

    name: str | None = _option(
        None, "of the run; without it model, task, method and seed"
    )
    output_dir: str = _option("runs", "results go to DIR/NAME", metavar="DIR")
    config: str | None = _option(
        None, "YAML with the same names as these options; flags win", metavar="FILE"
    )
    resume: bool = _option(
        False, "continue a run of that name, or begin it if there is none"
    )
    overwrite: bool = _option(False, "remove an earlier run of that name")
    quiet: bool = _option(False, "print nothing but errors")
    json: bool = _option(False, "print the record alone, as JSON")


@dataclass(frozen=True)
class Options:
    """All options of one run."""

    model: ModelOptions
    task: TaskOptions
    method: MethodOptions
    training: TrainingOptions
    output: OutputOptions

    def resolved(self) -> dict[str, Any]:
        """Return what decides the result, by the name of the option."""
        parts = (self.model, self.task, self.method, self.training)
        return {k: v for part in parts for k, v in dataclasses.asdict(part).items()}

    def spec(self) -> str:
        """Return the method that the options name, rows:3 if none.

        Returns:
            As `rocoft.methods.parse_method` reads it.

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


def build_parser() -> HfArgumentParser:
    """Return the parser; its help is the documentation of the command."""
    kinds: Any = [field.type for field in dataclasses.fields(Options)]
    return HfArgumentParser(
        kinds,
        prog="python -m rocoft.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
    )


def parse_options(given: Sequence[str]) -> Options:
    """Parse flags over the values of a configuration file.

    Args:
        given: Arguments of the command.

    Returns:
        The options.

    Raises:
        OptionError: If the configuration file cannot be read or names no option, or
            options contradict each other.
    """
    parser = build_parser()
    options = _parsed(parser, given)
    if options.output.config is None:
        return _checked(options)
    file = Path(options.output.config)
    try:
        text = file.read_text(encoding="utf-8")
        # As texts, like flags: YAML would make True of the label word Yes.
        values = yaml.load(text, yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {str(file)!r} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {str(file)!r} must map options to values.")
    known = {
        f.name for kind in parser.dataclass_types for f in dataclasses.fields(kind)
    }
    arguments: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known - {"config"}:
            raise OptionError(
                f"--config {str(file)!r}: {key!r} is no option. See --help."
            )
        several = value if isinstance(value, list) else [value]
        if several and value not in NULLS:
            arguments += [f"--{name}", *map(str, several)]
    return _checked(_parsed(parser, [*arguments, *given]))


def _parsed(parser: HfArgumentParser, given: Sequence[str]) -> Options:
    return Options(
        *parser.parse_args_into_dataclasses(list(given), look_for_args_file=False)
    )


def _checked(options: Options) -> Options:
    """Return options that agree with each other, or raise."""
    steps, strategy = options.training.eval_steps, options.training.eval_strategy
    if steps is not None and strategy != "steps":
        raise OptionError(
            f"--eval_steps {steps} has no meaning with --eval_strategy {strategy}. Add "
            "--eval_strategy steps, or leave it out."
        )
    if options.output.overwrite and options.output.resume:
        raise OptionError(
            "--overwrite removes an earlier run and --resume continues it. Give one of "
            "them."
        )
    counts = {
        "max_length": options.model.max_length,
        "shots": options.task.shots,
        "test_size": options.task.test_size,
        "num_train_epochs": options.training.num_train_epochs,
        "per_device_train_batch_size": options.training.per_device_train_batch_size,
        "per_device_eval_batch_size": options.training.per_device_eval_batch_size,
        "gradient_accumulation_steps": options.training.gradient_accumulation_steps,
        "eval_steps": options.training.eval_steps,
        "early_stopping_patience": options.training.early_stopping_patience,
    }
    counts["lr"] = min(options.training.lr, default=None)
    for name, value in counts.items():
        if value is not None and not value > 0:
            raise OptionError(f"--{name} {value} must be more than 0.")
    return options
