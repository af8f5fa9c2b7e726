"""Text-classification tasks: labelled texts from files or the Hub.

A task consists of labelled texts or pairs of texts, the names of its labels and, for
language models, a prompt (`rocoft.data.templates`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from rocoft.data.files import (
    KINDS,
    PACKED,
    Row,
    base_name,
    parse_json,
    read_rows,
    read_text,
    shown,
)
from rocoft.data.labels import SCORE, SCORES, check_classes, classes_of, score_of
from rocoft.data.templates import PROMPTS, Prompt, TaskError

DEFAULT_TASK = "reviews"
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
        data_dir: Folder with ``NAME/train.jsonl`` and ``NAME/test.jsonl``, or with
            files of another kind of `rocoft.data.files`; None means the Hub, except
            for ``"reviews"``.
        regression: Whether labels may be real numbers; otherwise they are refused.

    Returns:
        The task.

    Raises:
        TaskError: If there is no such task, or it cannot be read.
    """
    hub = HUB | SCORED_HUB if regression else HUB
    if data_dir is not None:
        folder = data_dir / name
        if _part(folder, "train") is None:
            known = sorted(
                path.name for path in data_dir.glob("*/") if _part(path, "train")
            )
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
    r"""Load a task from a single file.

    Args:
        path: ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file with the
            columns ``text`` (or ``text_a`` and ``text_b``) and ``label``, and
            ``label_name`` if labels have names; see `rocoft.data.files`.
        prompt: The prompt for language models.
        regression: Whether labels may be real numbers; otherwise they are refused.
            They are real if one of them is no integer, see `rocoft.data.labels`.

    Returns:
        The task, without separate test examples.

    Raises:
        TaskError: If the file cannot be read, or a row, label or name in it is
            malformed or in doubt.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "own.csv"
    ...     _ = path.write_text('label,text\npos,"good, really"\nneg,bad\n')
    ...     task = load_file(path)
    >>> task.labels, task.train[0]
    (('neg', 'pos'), Example(a='good, really', b=None, label=1))
    """
    rows, classes = _labelled(path, regression)
    examples = _examples(rows, classes, path)
    name, labels = base_name(path), tuple(classes.values())
    return Task(name, labels, examples, (), prompt, str(path))


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
    train_file, test_file = _part(folder, "train"), _part(folder, "test")
    assert train_file is not None
    rows, classes = _labelled(train_file, regression)
    train = _examples(rows, classes, train_file)
    test: tuple[Example, ...] = ()
    if test_file is not None:
        test = _examples(list(read_rows(test_file)), classes, test_file)
    labels = tuple(classes.values())
    task = Task(name, labels, train, test, PROMPTS.get(name), source)
    if (folder / LMBFF_FILE).is_file():
        task = replace(task, published=_published(task, folder / LMBFF_FILE))
    return task


def _part(folder: Path, part: str) -> Path | None:
    """Return the one file of a part of a task, ``"train"`` or ``"test"``."""
    endings = [kind + packed for kind in KINDS for packed in ("", PACKED)]
    endings.remove(f".parquet{PACKED}")
    files = [path for x in endings if (path := folder / f"{part}{x}").is_file()]
    if len(files) > 1:
        raise TaskError(
            f"folder {str(folder)!r} has {', '.join(repr(f.name) for f in files)}. "
            "Leave one of them."
        )
    return files[0] if files else None


def _labelled(path: Path, regression: bool) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of a training file and their classes."""
    rows = list(read_rows(path))
    _text_columns(rows, path)
    return rows, classes_of(rows, path, regression=regression)


def _published(task: Task, path: Path) -> dict[int, FewShotRows]:
    """Read the rows of published splits, ``{"13": {"train": [...], "dev": [...]}}``."""
    advice = "Get the whole file, or remove it: splits are then drawn by LM-BFF's rule."
    try:
        seeds = parse_json(read_text(path), f"file {str(path)!r}")
    except TaskError as error:
        raise TaskError(f"{error} {advice}") from None
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
    rows: Sequence[Row], classes: Mapping[str, str], path: Path
) -> tuple[Example, ...]:
    """Return labelled texts; labels are indices in the order of the classes."""
    pair = len(_text_columns(rows, path)) > 1
    label: Callable[[Row], int | float]
    if classes == SCORES:
        label = score_of
    else:
        check_classes(rows, classes, path)
        numbers = {value: number for number, value in enumerate(classes)}
        label = lambda row: numbers[row.text("label") or ""]
    return tuple(
        Example(
            row.text("text_a" if pair else "text") or "",
            row.text("text_b") if pair else None,
            label(row),
        )
        for row in rows
    )


def _text_columns(rows: Sequence[Row], path: Path) -> tuple[str, ...]:
    """Return the columns of the texts, which each row must have, and a label."""
    if not rows:
        raise TaskError(f"file {str(path)!r} holds no examples.")
    names = ("text", "text_a", "text_b")
    given = {name for name in names if rows[0].text(name) is not None}
    columns = ("text",) if "text" in given or not given else ("text_a", "text_b")
    for row in rows:
        for column in (*columns, "label"):
            if row.text(column) is None:
                raise TaskError(
                    f"{row.where} has no {column!r}. Each example needs 'text' (or "
                    "'text_a' and 'text_b') and 'label'; this one has "
                    f"{', '.join(map(shown, row.values)) or 'nothing'}."
                )
        for column in {*names} - {*columns}:
            if (value := row.text(column)) is not None:
                raise TaskError(
                    f"{row.where} has {shown(value)} as {column!r} beside "
                    f"{columns[0]!r}. Give either 'text', or 'text_a' and 'text_b', "
                    "the same in all rows."
                )
    return columns


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
