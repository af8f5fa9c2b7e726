"""The options of `python -m ntk.evaluate`; importing this imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ntk.kernels import Kind
from ntk.studies.options import (
    LMBFF_SEEDS,
    EvaluatedFineTuningOptions,
    KernelGroup,
    KernelModelOptions,
    SplitOptions,
    StudyOutputOptions,
    refuse_repeated,
)
from rocoft.commands import OptionError, option
from rocoft.training import file_name

SPACES = (
    *("full", "rows:1", "rows:3", "columns:1", "columns:3", "rows:3+columns:3"),
    *("lora:8", "bias", "head"),
)
METHODS = ("full", "rows:3", "columns:3", "lora:8", "bitfit", "head")


@dataclass(frozen=True)
class EvaluateSplitOptions(SplitOptions):
    """Which tasks, and which splits of each."""

    seeds: tuple[int, ...] = option(
        LMBFF_SEEDS,
        "of the splits, new heads and fine-tuning",
        metavar="SEED",
        shown=f"those of LM-BFF, {' '.join(map(str, LMBFF_SEEDS))}",
    )


@dataclass(frozen=True)
class EvaluateFineTuningOptions(EvaluatedFineTuningOptions):
    """How models are fine-tuned beside the kernels."""

    choose_lr: Literal["each", "first"] = option(
        "each",
        "whether each seed chooses its learning rate on its own dev examples, as its "
        "kernels choose their regularisation, or the first one for all seeds of a task "
        "and method, in less than half of the time",
    )


@dataclass(frozen=True)
class MeasuredOptions:
    """Which kernels and methods are measured."""

    title: ClassVar[str] = "what is measured"

    spaces: tuple[str, ...] = option(
        SPACES, "spaces of kernels", metavar="SPEC", may_be_empty=True
    )
    kinds: tuple[Kind, ...] = option(
        ("sgd",), "kinds of kernel: <g, g'>, <sign g, sign g'> or <g, sign g'>"
    )
    finetune: tuple[str, ...] = option(
        METHODS,
        "methods of fine-tuning to compare with; none if nothing follows",
        metavar="METHOD",
        may_be_empty=True,
    )
    coupled: bool = option(
        False,
        "with more than two labels, contract all pairs of outputs instead of their "
        "sum; as many times slower as there are labels",
    )

    def __post_init__(self) -> None:
        """Refuse to measure nothing, or something twice."""
        refuse_repeated(kinds=self.kinds)
        if not self.spaces and not self.finetune:
            raise OptionError(
                "--spaces and --finetune are both empty: nothing to measure."
            )


@dataclass(frozen=True)
class EvaluateOutputOptions(StudyOutputOptions):
    """How the study is done, and where its results go."""

    name: str = option("fewshot", "name of the study", parse=file_name)


@dataclass(frozen=True)
class EvaluateOptions:
    """All options of the study."""

    model: KernelModelOptions
    splits: EvaluateSplitOptions
    measured: MeasuredOptions
    kernels: KernelGroup
    fine_tuning: EvaluateFineTuningOptions
    output: EvaluateOutputOptions
