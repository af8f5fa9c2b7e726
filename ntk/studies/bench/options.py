"""The options of `python -m ntk.bench`; importing this imports no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ntk.studies.options import KernelModelOptions, PassOptions
from rocoft.commands import option, positive
from rocoft.training import OutputOptions, TaskOptions, file_name

SPACES = ("full", "rows:1", "rows:3", "columns:3", "lora:8", "bias")


@dataclass(frozen=True)
class TimedOptions:
    """What is timed, and how often."""

    title: ClassVar[str] = "what is timed"

    examples: tuple[int, ...] = option(
        (8, 16, 32),
        "numbers of examples whose kernel is timed",
        metavar="N",
        parse=positive,
    )
    spaces: tuple[str, ...] = option(
        SPACES,
        "spaces that ntk compare --space takes, each alone and all together",
        metavar="SPEC",
    )
    tokens: tuple[int, ...] = option(
        (),
        "as well with the fewest --examples cut or repeated to T tokens each",
        metavar="T",
        shown="only as long as they are",
        parse=positive,
    )
    labels: tuple[int, ...] = option(
        (),
        "as well with the fewest --examples and a new head of C outputs",
        metavar="C",
        shown="only as many as the task has",
        parse=positive,
    )
    more_models: tuple[str, ...] = option(
        (), "as well with the fewest --examples on these models", metavar="ID"
    )
    precisions: tuple[Literal["tf32", "bf16", "bf16x3"], ...] = option(
        (),
        "as well with the products of the first of --spaces in these, and their error",
        shown="only in float32",
    )
    rounds: int = option(
        5,
        "how often each is timed, after once that does not count; medians are shown",
        metavar="N",
        parse=positive,
    )


@dataclass(frozen=True)
class BenchOutputOptions(OutputOptions):
    """Where the record goes, and what is printed."""

    name: str = option("bench", "name of the result", parse=file_name)


@dataclass(frozen=True)
class BenchOptions:
    """All options of a benchmark."""

    model: KernelModelOptions
    task: TaskOptions
    timed: TimedOptions
    kernels: PassOptions
    output: BenchOutputOptions
