"""The options of `python -m ntk.ablate`; importing this imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from ntk.studies.options import (
    EvaluatedFineTuningOptions,
    KernelGroup,
    KernelModelOptions,
    SplitOptions,
    StudyOutputOptions,
    refuse_repeated,
)
from rocoft.commands import Strategy, option, positive
from rocoft.training import file_name

Axis = Literal["rows", "columns", "both"]
ALL = "all"
"""The count of a whole weight."""
COUNTS = (1, 2, 3, 5, 8, 16, 64, ALL)
DRAWS = 5


def _count(text: str) -> int | str:
    try:
        return text if text == ALL else positive(text)
    except ValueError:
        raise ValueError(
            f"{text!r} must be a whole number of at least 1, or {ALL}."
        ) from None


@dataclass(frozen=True)
class MeasuredOptions:
    """Which selections are measured."""

    title: ClassVar[str] = "what is measured"

    axes: tuple[Axis, ...] = option(
        get_args(Axis), "select rows, columns, or as many of both"
    )
    counts: tuple[int | str, ...] = option(
        COUNTS,
        "rows or columns of each linear weight in the blocks; all stands for the whole "
        "weights",
        metavar="R",
        parse=_count,
    )
    strategies: tuple[Strategy, ...] = option(
        get_args(Strategy),
        "how they are chosen, see ntk compare --help",
        shown="every way",
    )
    random_seeds: int = option(
        DRAWS, "random selections of each size", metavar="N", parse=positive
    )
    finetune_points: tuple[str, ...] = option(
        (),
        "fine-tune by these too, such as rows:3/strategy=max",
        metavar="METHOD",
        shown="none",
    )

    def __post_init__(self) -> None:
        """Refuse what is asked for twice."""
        refuse_repeated(axes=self.axes, counts=self.counts, strategies=self.strategies)


@dataclass(frozen=True)
class AblateOutputOptions(StudyOutputOptions):
    """How the study is done, and where its results go."""

    name: str = option("ablation", "name of the study", parse=file_name)


@dataclass(frozen=True)
class AblateOptions:
    """All options of the study."""

    model: KernelModelOptions
    splits: SplitOptions
    measured: MeasuredOptions
    kernels: KernelGroup
    fine_tuning: EvaluatedFineTuningOptions
    output: AblateOutputOptions
