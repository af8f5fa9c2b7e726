"""The options of `python -m ntk.linearize`; importing this imports no torch."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ntk.studies.options import (
    BatchOptions,
    FineTuningOptions,
    KernelModelOptions,
    SplitOptions,
    StudyOutputOptions,
    refuse_repeated,
)
from rocoft.commands import option
from rocoft.training import file_name

METHODS = ("lora:8",)
LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{text!r} must be a finite number, at least 0.")
    return value


@dataclass(frozen=True)
class TrainedOptions(FineTuningOptions):
    """What is trained, and how."""

    title: ClassVar[str] = "training, the same of both models"

    lrs: tuple[str, ...] = option(
        (),
        "learning rates of a method, such as rows:3=1e-3,3e-3; of several fine-tuning "
        "chooses on dev for each lambda, and its linear twin has the same",
        metavar="METHOD=LR,LR",
        shown="the middle one of each method's own",
    )
    methods: tuple[str, ...] = option(
        METHODS,
        "what is trained, such as rows:3, full or head; --method is the same",
        metavar="METHOD",
        also=("method",),
    )
    lambdas: tuple[float, ...] = option(
        LAMBDAS,
        "how strongly parameters are held at their start, in loss per squared "
        "distance: the objective is the mean loss over training examples + (LAMBDA / "
        "2) ||theta - theta0||^2, so a LAMBDA of an objective with the sum, as in "
        "Rahimi Afzal et al. (2025), is divided by the number of examples; 0 trains "
        "freely",
        metavar="LAMBDA",
        parse=_strength,
    )
    selective: bool = option(
        False,
        "pull only in steps where that agrees with the descent of the loss, instead of "
        "in every step",
    )
    loss: Literal["cross-entropy", "squared"] = option(
        "cross-entropy",
        "of the training examples; squared is the squared distance to one-hot labels, "
        "summed over labels, for which bounds are evaluated too, at about twice the "
        "time",
    )
    optimizer: Literal["adamw", "sgd"] = option(
        "adamw",
        "adamw, warmed up and decaying, or sgd, plain gradient descent of one step "
        "size, which needs --lrs; bounds of gradient flow need sgd on all examples in "
        "a step",
    )

    def __post_init__(self) -> None:
        """Refuse what is asked for twice."""
        refuse_repeated(lambdas=self.lambdas)


@dataclass(frozen=True)
class LinearizeOutputOptions(StudyOutputOptions):
    """How the study is done, and where its results go."""

    name: str = option("linearization", "name of the study", parse=file_name)


@dataclass(frozen=True)
class LinearizeOptions:
    """All options of the study."""

    model: KernelModelOptions
    splits: SplitOptions
    fine_tuning: TrainedOptions
    kernels: BatchOptions
    output: LinearizeOutputOptions
