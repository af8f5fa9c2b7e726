"""The options of `python -m ntk.compare`; importing this imports no torch."""

import re
from dataclasses import dataclass
from typing import ClassVar

from ntk.kernels import Implementation, Kind
from ntk.studies.options import FewShotOptions, KernelGroup, KernelModelOptions
from rocoft.commands import Strategy, option, positive
from rocoft.training import OutputOptions


def _estimator(text: str) -> str:
    if not re.fullmatch(r"(sketch|rows|columns):\d+", text):
        raise ValueError(
            f"{text!r} must read sketch:S, rows:R or columns:R, such as sketch:4096."
        )
    return text


@dataclass(frozen=True)
class SpaceOptions:
    """Which spaces are compared with all parameters."""

    title: ClassVar[str] = "spaces to compare with the full kernel"

    rows: tuple[int, ...] = option(
        (),
        "R rows (output features) of every linear weight in the blocks",
        metavar="R",
        shown="1 3 if no other space is named",
    )
    columns: tuple[int, ...] = option(
        (),
        "R columns (input features) of every linear weight in the blocks",
        metavar="R",
        shown="1 3 if no other space is named",
    )
    lora: tuple[int, ...] = option(
        (), "LoRA of rank R at initialisation on the same weights", metavar="R"
    )
    bias: bool = option(False, "all biases (always shown as a control too)")
    norm: bool = option(False, "weights of normalisation layers")
    embeddings: bool = option(False, "tables of token and position embeddings")
    space: tuple[str, ...] = option((), "any other choice, see below", metavar="SPEC")
    head: bool = option(
        True,
        "whether a head that was made here is part of every space, as fine-tuning "
        "trains it; a language-model head never is",
    )
    layers: tuple[int, ...] = option(
        (),
        "restrict the spaces to these blocks, from 0, negative from the end",
        metavar="I",
    )
    modules: tuple[str, ...] = option(
        (),
        "restrict the spaces to parameters whose names hold these components or match "
        "these globs, such as query value",
        metavar="PATTERN",
    )
    strategy: Strategy = option(
        "first",
        "which rows and columns: first, last, random, by norm max, min or mixed, by "
        "activation or gradient on the training examples",
    )
    rescale: bool = option(
        False,
        "weight entries by their inverse odds of selection: unbiased for random rows "
        "and columns",
    )


@dataclass(frozen=True)
class CompareKernelOptions(KernelGroup):
    """How kernels are computed, and what that may use."""

    kind: Kind = option("sgd", "<g, g'>, <sign g, sign g'> or <g, sign g'>")
    implementation: Implementation = option(
        "factors", "factors, autograd (the definition) or torch.func, both slower"
    )
    approximate: str | None = option(
        None,
        "estimate the full kernel instead of computing it: sketch:S from random "
        "projections to S numbers of each large weight, example and output, rows:R or "
        "columns:R from R of each weight, drawn by the gradients of a few examples and "
        "weighted so that none is favoured (S, R: multiples of 8); the relative error "
        "is reported, and falls with the root of S or R",
        metavar="HOW",
        shown="computed",
        parse=_estimator,
    )
    plan: bool = option(
        False,
        "print what would be computed in which pass, what it would hold and about how "
        "long it would take, and compute nothing",
    )
    folds: int = option(
        2,
        "folds of the training examples where the head was fitted to them: "
        "regularisations are chosen, and alignment is measured, on examples of a fold "
        "under a head that was fitted without it; each costs a pass over the training "
        "examples",
        metavar="K",
        parse=positive,
    )
    offset: bool = option(
        False, "classifiers start from the model's own outputs instead of zero"
    )


@dataclass(frozen=True)
class CompareOptions:
    """All options of one comparison."""

    model: KernelModelOptions
    task: FewShotOptions
    spaces: SpaceOptions
    kernels: CompareKernelOptions
    output: OutputOptions
