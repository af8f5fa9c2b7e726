"""Text-classification tasks: labelled texts from files or the Hub.

A task consists of labelled texts or pairs of texts, the names of its labels and, for
language models, a prompt (`rocoft.data.templates`).
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from rocoft.data.templates import PROMPTS, Prompt, TaskError

DEFAULT_TASK = "reviews"
TABLES = (".csv", ".tsv")
SCORE = "score"
"""Label name of a regression."""
LMBFF_FILE = "lmbff16.json"
"""File in a task's folder with the rows of LM-BFF's published splits."""
LMBFF_SHOTS = 16
"""Number of training examples of each label in those splits."""


@dataclass(frozen=True)
class Example:
    """A text or a pair of texts, with the index of its label or its score."""

    a: str
    b: str | None
    label: int | float


class FewShotRows(NamedTuple):
    """Indices in a task's training examples of a few-shot split's examples."""

    train: tuple[int, ...]
    dev: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Labelled texts.

    Attributes:
        name: Name of the task.
        labels: Names of the labels, in order; in a regression, the name of the score.
        train: Examples to draw training examples from.
        test: Examples to draw test examples from; empty if they come from ``train``.
        prompt: The prompt for language models, if any.
        source: Origin of the texts.
        published: LM-BFF's published 16-shot splits by seed, if known.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    prompt: Prompt | None
    source: str
    published: Mapping[int, FewShotRows] = field(default_factory=dict, hash=False)

    @property
    def regression(self) -> bool:
        """Whether the labels are scores."""
        return len(self.labels) == 1


HUB = {
    "sst2": ("nyu-mll/glue", "sst2", ("sentence",), "validation"),
    "cola": ("nyu-mll/glue", "cola", ("sentence",), "validation"),
    "mnli": ("nyu-mll/glue", "mnli", ("premise", "hypothesis"), "validation_matched"),
    "qnli": ("nyu-mll/glue", "qnli", ("question", "sentence"), "validation"),
    "rte": ("nyu-mll/glue", "rte", ("sentence1", "sentence2"), "validation"),
    "mrpc": ("nyu-mll/glue", "mrpc", ("sentence1", "sentence2"), "validation"),
    "qqp": ("nyu-mll/glue", "qqp", ("question1", "question2"), "validation"),
    "snli": ("stanfordnlp/snli", None, ("premise", "hypothesis"), "test"),
    "ag_news": ("fancyzhx/ag_news", None, ("text",), "test"),
    "sst5": ("SetFit/sst5", None, ("text",), "test"),
    "mr": ("cornell-movie-review-data/rotten_tomatoes", None, ("text",), "test"),
}
"""Tasks on the Hub: data set, its configuration, text columns and test split."""

SCORED_HUB = {
    "stsb": ("nyu-mll/glue", "stsb", ("sentence1", "sentence2"), "validation"),
}
"""Regression tasks on the Hub, in the format of `HUB`."""


def load_task(
    name: str, data_dir: Path | None = None, *, regression: bool = False
) -> Task:
    """Load a task by name.

    Args:
        name: ``"reviews"``, which is part of the package, or one of `HUB`; with
            ``data_dir`` the name of a folder in it.
        data_dir: Folder with ``NAME/train.jsonl`` and ``NAME/test.jsonl``; None means
            the Hub, except for ``"reviews"``.
        regression: Whether labels may be real numbers; otherwise they are refused.

    Returns:
        The task.

    Raises:
        TaskError: If there is no such task, or it cannot be read.
    """
    hub = HUB | SCORED_HUB if regression else HUB
    if data_dir is not None:
        folder = data_dir / name
        if not (folder / "train.jsonl").is_file():
            known = sorted(p.parent.name for p in data_dir.glob("*/train.jsonl"))
            raise TaskError(
                f"task {name!r} is not in data_dir={str(data_dir)!r}, which holds "
                f"{', '.join(known) or 'no folder with a train.jsonl'}."
            )
        return _from_folder(name, folder, str(folder), regression)
    if name == DEFAULT_TASK:
        with resources.as_file(resources.files("rocoft.data") / "reviews") as folder:
            source = "embedded in the package, CC BY 4.0"
            return _from_folder(name, folder, source, regression)
    if name not in hub:
        raise TaskError(
            f"task {name!r} is unknown. Choose one of {DEFAULT_TASK}, "
            f"{', '.join(hub)}, or read your own with --data FILE or --data-dir DIR."
        )
    return _from_hub(name, *hub[name])


def load_file(
    path: Path, prompt: Prompt | None = None, *, regression: bool = False
) -> Task:
    """Load a task from a single file.

    Args:
        path: ``.jsonl``, ``.csv`` or ``.tsv`` file with the columns ``text`` (or
            ``text_a`` and ``text_b``) and ``label``, in UTF-8.
        prompt: The prompt for language models.
        regression: Whether labels may be real numbers; otherwise they are refused. In
            ``.csv`` and ``.tsv``, labels are real if one of them is no integer.

    Returns:
        The task, without separate test examples.
    """
    rows = _rows(path)
    classes = _classes(rows, path, regression)
    examples = _examples(rows, classes, path)
    return Task(path.stem, tuple(classes.values()), examples, (), prompt, str(path))


def with_prompt(task: Task, template: str | None, words: Sequence[str]) -> Task:
    """Give a task another template or other label words.

    Args:
        task: The task.
        template: Text with ``{a}``, ``{b}`` for pairs and ``{mask}``; None means the
            task's templates.
        words: One word for each label, for masked and causal models; empty means the
            task's words.

    Returns:
        The task with the new prompt.

    Raises:
        TaskError: If there is no template, or not one word for each label.
    """
    old = task.prompt
    own = tuple(words)
    words = own or (old.words if old else ())
    if (template is None and old is None) or len(words) != len(task.labels):
        raise TaskError(
            "a prompt needs --template and one of --label-words for each of the labels "
            f"{', '.join(task.labels)}; got {template!r} and {words}."
        )
    if template is None and old is not None:
        causal_words = () if own else old.causal_words
        prompt = replace(old, words=words, causal_words=causal_words)
        return replace(task, prompt=prompt)
    assert template is not None
    causal = template.partition("{mask}")[0].rstrip()
    causal_words = old.causal_words if old and not own else ()
    return replace(task, prompt=Prompt(template, words, causal, causal_words))


def _from_folder(name: str, folder: Path, source: str, regression: bool) -> Task:
    train_file, test_file = folder / "train.jsonl", folder / "test.jsonl"
    rows = _rows(train_file)
    classes = _classes(rows, train_file, regression)
    train = _examples(rows, classes, train_file)
    test: tuple[Example, ...] = ()
    if test_file.is_file():
        test = _examples(_rows(test_file), classes, test_file)
    labels = tuple(classes.values())
    task = Task(name, labels, train, test, PROMPTS.get(name), source)
    if (folder / LMBFF_FILE).is_file():
        task = replace(task, published=_published(task, folder / LMBFF_FILE))
    return task


def _published(task: Task, path: Path) -> dict[int, FewShotRows]:
    """Read the rows of published splits, ``{"13": {"train": [...], "dev": [...]}}``."""
    advice = "Get the whole file, or remove it: splits are then drawn by LM-BFF's rule."
    try:
        seeds = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise TaskError(
            f"file {str(path)!r} is not JSON, or was cut short: {error}. {advice}"
        ) from None
    if not isinstance(seeds, dict) or not seeds or not all(map(str.isdecimal, seeds)):
        raise TaskError(
            f"file {str(path)!r} is not a JSON object that gives the rows of each "
            f"seed, a whole number. {advice}"
        )
    for seed, parts in seeds.items():
        for part in FewShotRows._fields:
            rows = parts.get(part) if isinstance(parts, dict) else None
            if fault := _fault(task, rows):
                raise TaskError(
                    f"file {str(path)!r}: {part!r} of seed {seed} {fault}. {advice}"
                )
    return {
        int(seed): FewShotRows(tuple(parts["train"]), tuple(parts["dev"]))
        for seed, parts in seeds.items()
    }


def _fault(task: Task, rows: object) -> str:
    """Describe the error in a list of a split's rows; empty if it is correct."""
    if not isinstance(rows, list) or not rows:
        return "is no list of rows"
    last = len(task.train) - 1
    if wrong := [row for row in rows if type(row) is not int or not 0 <= row <= last]:
        return f"has {wrong[0]!r}, which is no row of train.jsonl, from 0 to {last}"
    present = {task.train[row].label for row in rows}
    if task.regression or len(present) == len(task.labels):
        return ""
    absent = [name for label, name in enumerate(task.labels) if label not in present]
    return f"has no row of label {', '.join(map(repr, absent))}"


def _from_hub(
    name: str, path: str, config: str | None, columns: tuple[str, ...], test_split: str
) -> Task:
    import datasets

    try:
        data = datasets.load_dataset(path, config)
    except Exception as error:
        # Connection, proxy, Hub and parser errors share no base class.
        raise TaskError(
            f"task {name!r} could not be loaded from the Hub ({path}): "
            f"{_first_line(error)}. Check the network, read local files with "
            f"--data-dir DIR, or use the embedded task {DEFAULT_TASK!r}."
        ) from error
    feature = data["train"].features["label"]
    names = getattr(feature, "names", None) or sorted(set(data["train"]["label"]))
    if name in SCORED_HUB:
        names = [SCORE]
    labels = tuple(str(n) for n in names)
    train, test = (
        tuple(
            Example(
                r[columns[0]], r[columns[1]] if len(columns) > 1 else None, r["label"]
            )
            for r in data[split]
            if r["label"] >= 0
        )
        for split in ("train", test_split)
    )
    return Task(name, labels, train, test, PROMPTS.get(name), f"hub:{path}")


def _examples(
    rows: Sequence[Mapping[str, Any]], classes: Mapping[str, str], path: Path
) -> tuple[Example, ...]:
    """Return labelled texts; labels are indices in the order of the classes."""
    _check_columns(rows, path)
    numbers: dict[str, int | float]
    numbers = {value: number for number, value in enumerate(classes)}
    if classes == {SCORE: SCORE}:
        numbers = {str(row["label"]): _score(row["label"], path) for row in rows}
    unknown = sorted({str(row["label"]) for row in rows} - numbers.keys())
    if unknown:
        raise TaskError(
            f"file {str(path)!r} has labels {', '.join(unknown)}, but the training "
            f"examples have only {', '.join(classes)}."
        )
    pair = "text_a" in rows[0]
    return tuple(
        Example(
            str(row["text_a" if pair else "text"]),
            str(row["text_b"]) if pair else None,
            numbers[str(row["label"])],
        )
        for row in rows
    )


def _check_columns(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    if not rows:
        raise TaskError(f"file {str(path)!r} holds no examples.")
    needed = ("text_a", "text_b") if "text_a" in rows[0] else ("text",)
    for number, row in enumerate(rows, start=1):
        for column in (*needed, "label"):
            if row.get(column) in (None, ""):
                raise TaskError(
                    f"example {number} of {str(path)!r} has no {column!r}. Each "
                    "example needs 'text' (or 'text_a' and 'text_b') and 'label'; this "
                    f"one has {', '.join(map(repr, row)) or 'nothing'}."
                )


def _rows(path: Path) -> list[Mapping[str, Any]]:
    kind = path.suffix.lower()
    if kind not in {".jsonl", ".json", *TABLES}:
        raise TaskError(
            f"file {str(path)!r} must end in .jsonl, .csv or .tsv, not {kind!r}."
        )
    text = _text(path)
    if kind in TABLES:
        lines = io.StringIO(text, newline="")
        return list(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
    return list(_json_rows(text, path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(f"file {str(path)!r} does not exist.") from None
    except OSError as error:
        raise TaskError(
            f"file {str(path)!r} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError as error:
        raise TaskError(
            f"file {str(path)!r} is not UTF-8: byte {error.object[error.start]:#04x} "
            f"at position {error.start}. Save it as UTF-8."
        ) from None


def _json_rows(text: str, path: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"line {number} of {str(path)!r} is not JSON: {error.msg}."
            ) from None
        if not isinstance(row, dict):
            raise TaskError(f"line {number} of {str(path)!r} is not a JSON object.")
        yield row


def _score(label: object, path: Path) -> float:
    try:
        score = float(str(label))
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise TaskError(
            f"file {str(path)!r} has the label {label!r} beside real numbers. All "
            "labels of a regression must be finite numbers."
        )
    return score


def _is_real(label: object, table: bool) -> bool:
    """Whether a label is a real number, not the integer of a class."""
    if not table:
        return isinstance(label, float)
    # All values of a table are texts.
    try:
        number = float(str(label))
    except ValueError:
        return False
    return math.isfinite(number) and not number.is_integer()


def _classes(
    rows: Sequence[Mapping[str, Any]], path: Path, regression: bool = False
) -> dict[str, str]:
    """Return the names of the labels by value, sorted as integers or as text."""
    _check_columns(rows, path)
    table = path.suffix.lower() in TABLES
    real = [row["label"] for row in rows if _is_real(row["label"], table)]
    if real and regression:
        return {SCORE: SCORE}
    if real:
        raise TaskError(
            f"file {str(path)!r} has labels that are no classes, such as "
            f"{real[0]}. Regression is not supported."
        )
    names = {str(r["label"]): str(r.get("label_name") or r["label"]) for r in rows}
    if len(names) < 2:
        raise TaskError(
            f"file {str(path)!r} has one class only, {next(iter(names))!r}. A "
            "classifier needs at least two."
        )
    order = sorted(names, key=int if all(v.isdigit() for v in names) else str)
    return {value: names[value] for value in order}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
