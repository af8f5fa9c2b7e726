"""The groups of options that all commands share: model, task and output.

Importing this imports no torch.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rocoft.commands import (
    DEFAULT_MODEL,
    Dtype,
    FolderKind,
    Head,
    OptionError,
    Place,
    Readout,
    claimed,
    embedded_model,
    option,
    positive,
)
from rocoft.data import (
    DEFAULT_TASK,
    HUB,
    SCORED_HUB,
    Task,
    base_name,
    load_file,
    load_task,
    with_prompt,
)


def file_name(text: str) -> str:
    """Read a name that does not leave the folder of results.

    Args:
        text: The text of a value.

    Returns:
        The name.

    Raises:
        ValueError: If it is a path, hidden, or empty.
    """
    if not text.strip() or text.startswith(".") or re.search(r"[/\\\0]", text):
        raise ValueError(
            f"{text!r} must be a name inside --output: without / or \\, and with no "
            "dot in front."
        )
    return text


def task_name(text: str) -> str:
    """Read a task's name, which is a part of names of results.

    Args:
        text: The text of a value.

    Returns:
        The name.

    Raises:
        ValueError: If it leaves the folder of tasks.
    """
    if Path(text).is_absolute() or ".." in Path(text).parts or not text.strip():
        raise ValueError(
            f"{text!r} must be the name of a task, or of a folder in --data-dir."
        )
    return text


def model_name(text: str) -> str | None:
    """Read a model's name; that of the default is none.

    Args:
        text: The text of a value.

    Returns:
        The name; None for the default.
    """
    return None if embedded_model(text) == DEFAULT_MODEL else text


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read out."""

    title: ClassVar[str] = "model"

    model: str | None = option(
        None,
        "Hub id, local folder, GGUF file (PATH.gguf; dequantised once, to a cache "
        "folder) or an embedded model: minilm, smollm2",
        metavar="ID",
        shown=DEFAULT_MODEL,
        parse=model_name,
    )
    readout: Readout | None = option(
        None,
        "outputs: logits of a classification head, or of label words at the mask or "
        "after the prompt",
        shown="label words for language models whose task has a prompt, else head",
    )
    head_init: Head = option(
        "probe",
        "how a head that the checkpoint lacks is made: fitted to the training examples "
        "by logistic regression, or seeded random; kernels are taken at the fitted "
        "one, while ntk train starts from a random one, as fine-tuning is usually done",
    )
    dtype: Dtype = option(
        "float32",
        "precision of the model's parameters and passes; products of gradients are in "
        "float32 at least, sums in float64, and the report says what half precision "
        "costs",
    )
    device: str = option(
        "auto", "where to compute: cpu, cuda, ... or auto, a GPU if there is one"
    )
    max_length: int = option(
        128,
        "longer examples are cut, and the report says how many",
        metavar="TOKENS",
        parse=positive,
    )

    @property
    def name(self) -> str:
        """The model in names of results."""
        path = Path(self.model or DEFAULT_MODEL)
        return path.stem if path.suffix.lower() == ".gguf" else path.name


@dataclass(frozen=True)
class TaskOptions:
    """Which examples."""

    title: ClassVar[str] = "task"

    task: str | None = option(
        None,
        f"reviews (embedded), {', '.join(HUB | SCORED_HUB)} from the Hub, or a folder "
        "of --data-dir",
        shown=DEFAULT_TASK,
        parse=task_name,
    )
    data: Path | None = option(
        None,
        "own examples instead of --task: .csv, .tsv, .jsonl, .json (or one of them "
        "with .gz) or .parquet, with the columns text (or text_a, text_b) and label",
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

    def __post_init__(self) -> None:
        """Refuse examples from two places."""
        refuse_two_sources(self.data, self.data_dir, "--task", self.task)

    @property
    def name(self) -> str:
        """The task in names of results."""
        return (
            (self.task or DEFAULT_TASK) if self.data is None else base_name(self.data)
        )

    def load(self, *, regression: bool = False) -> Task:
        """Read the task, with its prompt.

        Args:
            regression: Whether labels may be real numbers; they are refused otherwise.

        Returns:
            The task.

        Raises:
            TaskError: If it cannot be read.
        """
        if self.data is not None:
            task = load_file(self.data, regression=regression)
        else:
            name = self.task or DEFAULT_TASK
            task = load_task(name, self.data_dir, regression=regression)
        if self.template or self.label_words:
            task = with_prompt(task, self.template, self.label_words)
        return task


def refuse_two_sources(
    data: Path | None, data_dir: Path | None, flag: str, tasks: object
) -> None:
    """Refuse ``--data`` beside other sources of examples.

    Args:
        data: The file.
        data_dir: The folder of tasks.
        flag: The option that names tasks.
        tasks: Its value.

    Raises:
        OptionError: If there are two sources.
    """
    if data is not None:
        for name, value in ((flag, tasks), ("--data-dir", data_dir)):
            if value:
                text = " ".join(value) if isinstance(value, tuple) else str(value)
                raise OptionError(
                    f"--data {str(data)!r} and {name} {text!r} both name examples. "
                    "Give one of them."
                )


@dataclass(frozen=True)
class OutputOptions:
    """Where results go, and what is printed."""

    title: ClassVar[str] = "output"

    name: str | None = option(
        None, "name of the result", shown="model, task and time", parse=file_name
    )
    output: Path = option(
        Path("runs"), "results go to DIR/NAME", metavar="DIR", also=("output_dir",)
    )
    overwrite: bool = option(False, "replace an earlier result of that name")
    config: Path | None = option(
        None, "YAML with the same names as these options; flags win", metavar="FILE"
    )
    quiet: bool = option(False, "print nothing but errors")
    json: bool = option(False, "print the record alone, as JSON")

    @property
    def cache_folder(self) -> Path:
        """The folder of what is kept between runs."""
        return self.output / ".cache"

    @property
    def silent(self) -> bool:
        """Whether nothing is printed on the way."""
        return self.quiet or self.json

    @contextlib.contextmanager
    def claimed(
        self, default: str, kind: FolderKind, *, numbered: bool = False
    ) -> Iterator[Place]:
        """Hold the folder of a new result, after making sure that it can be written.

        Args:
            default: Its name where ``--name`` gives none.
            kind: The command's folders.
            numbered: Whether a number follows the default where it is taken.

        Yields:
            The place.

        Raises:
            OptionError: If it holds something else, or an earlier result that is not to
                be replaced, or cannot be written to.
        """
        name = self.name or plain(default)
        with claimed(
            self.output,
            name,
            kind,
            overwrite=self.overwrite,
            numbered=numbered and self.name is None,
        ) as place:
            place.check()
            yield place


def plain(name: str) -> str:
    """Return a name of results without the characters that paths give a meaning.

    Args:
        name: The parts of the name, which users may have chosen.
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).lstrip(".")
