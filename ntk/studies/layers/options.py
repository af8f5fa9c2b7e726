"""The options of `python -m ntk.layers`; importing this imports no torch."""

import re
from dataclasses import dataclass
from typing import ClassVar

from ntk.studies.options import (
    EvaluatedFineTuningOptions,
    KernelGroup,
    KernelModelOptions,
    SplitOptions,
    StudyOutputOptions,
)
from rocoft.commands import above_zero, option, positive
from rocoft.training import file_name

BUDGET = re.compile(r"(\d+)(p?)")
"""A number of layers, or of parameters with a p."""


def _budget(text: str) -> str:
    found = BUDGET.fullmatch(text)
    if found is None or int(found[1]) < 1:
        raise ValueError(
            f"{text!r} must read 3 for three layers or 40000p for so many parameters."
        )
    return text


@dataclass(frozen=True)
class ChoiceOptions:
    """What layers are chosen by, and whether the choice is verified."""

    title: ClassVar[str] = "which layers"

    space: str = option(
        "lora:8",
        "what is tuned of a layer; a classification head is tuned in any case",
        metavar="SPACE",
    )
    budget: str = option(
        "3",
        "most layers, such as 3, or most parameters with a p, such as 40000p; every "
        "rule has the same",
        metavar="N",
        parse=_budget,
    )
    epsilon: float = option(
        1e-3,
        "the ridge in units of the mean eigenvalue",
        metavar="E",
        parse=above_zero,
    )
    random_seeds: int = option(
        3, "random choices of layers, a baseline", metavar="N", parse=positive
    )
    verify: bool = option(
        False,
        "fine-tune what the rules chose, all layers and the head alone, and say "
        "whether the ranking held",
    )
    subsets: int | None = option(
        None,
        "fine-tune N sets of layers too, single ones, first and last ones, random ones "
        "and all, the same on every split, and correlate what is known before training "
        "with their scores",
        metavar="N",
        shown="none",
        parse=positive,
    )


@dataclass(frozen=True)
class LayersOutputOptions(StudyOutputOptions):
    """How the study is done, and where its results go."""

    name: str = option("layers", "name of the study", parse=file_name)


@dataclass(frozen=True)
class LayersOptions:
    """All options of the study."""

    model: KernelModelOptions
    splits: SplitOptions
    choice: ChoiceOptions
    kernels: KernelGroup
    fine_tuning: EvaluatedFineTuningOptions
    output: LayersOutputOptions
