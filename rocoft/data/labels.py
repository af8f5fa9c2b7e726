"""Labels of a file: classes with their names, or scores.

A label means the same in all kinds of files, because it is taken by its text: ``1`` of
JSON is the ``1`` of a table. Labels are scores if one of them is a number that is no
integer. All else are classes, in numerical order if all are numbers, else in that of
their text.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from rocoft.data.files import Row, shown
from rocoft.data.templates import TaskError

SCORE = "score"
"""Label name of a regression."""
SCORES = {SCORE: SCORE}
"""The classes of a regression: none."""

# Digits are limited, as Python reads no longer integers.
_NUMBER = re.compile(r"[+-]?(\d{1,300}(\.\d*)?|\.\d+)(e[+-]?\d{1,9})?", re.ASCII | re.I)


def classes_of(
    rows: Sequence[Row], path: Path, *, regression: bool = False
) -> dict[str, str]:
    """Return the classes of a training file.

    Args:
        rows: Its rows, each with a label.
        path: The file, for errors.
        regression: Whether labels may be scores; otherwise they are refused.

    Returns:
        The name of each class by its label, in order; `SCORES` if labels are scores.

    Raises:
        TaskError: If there is one class only, if a class has two names or two classes
            have one, or if labels or names differ only by blanks, case or the way that
            a number is written.

    >>> rows = [Row(f"row {i}", {"label": i % 2 + 9}) for i in range(4)]
    >>> classes_of(rows, Path("own.csv"))
    {'9': '9', '10': '10'}
    """
    first = _first_rows(rows, "label")
    if real := next((label for label in first if _is_real(label)), None):
        if regression:
            return dict(SCORES)
        raise TaskError(
            f"file {str(path)!r} has labels that are no classes, such as {real}. "
            f"Regression is not supported. It is in {first[real].where}."
        )
    if len(first) < 2:
        raise TaskError(
            f"file {str(path)!r} has one class only, {next(iter(first))!r}. A "
            "classifier needs at least two."
        )
    _refuse_alike(first)
    names = _names(rows)
    numbers = {x: number for x in first if (number := _number(x)) is not None}
    order = sorted(first)
    if len(numbers) == len(first):
        order.sort(key=numbers.__getitem__)
    return {label: names.get(label, label) for label in order}


def check_classes(rows: Sequence[Row], classes: Mapping[str, str], path: Path) -> None:
    """Refuse a file whose labels are not those of the training examples.

    Args:
        rows: Its rows, each with a label.
        classes: The classes, from `classes_of`.
        path: The file, for errors.

    Raises:
        TaskError: If a label is unknown, or has another name.
    """
    first = _first_rows(rows, "label")
    if unknown := sorted(first.keys() - classes.keys()):
        labels, known = (", ".join(map(_plain, x)) for x in (unknown, classes))
        raise TaskError(
            f"file {str(path)!r} has labels {labels}, but the training examples have "
            f"only {known}. The first of these is in {first[unknown[0]].where}."
        )
    for label, name in _names(rows).items():
        if name != classes[label] and classes[label] != label:
            row = next(r for r in rows if r.text("label") == label)
            raise TaskError(
                f"{row.where} has {shown(name)} as the 'label_name' of label "
                f"{label!r}, which the training examples call {classes[label]!r}. Give "
                "each label one name."
            )


def score_of(row: Row) -> float:
    """Return the label of a row of a regression.

    Args:
        row: The row.

    Raises:
        TaskError: If it is no finite number.
    """
    label = row.text("label") or ""
    number = _number(label)
    if number is None:
        raise TaskError(
            f"{row.where} has the label {label!r} beside real numbers. All labels of a "
            "regression must be finite numbers."
        )
    return float(number)


def _first_rows(rows: Sequence[Row], column: str) -> dict[str, Row]:
    """Return the first row of each value."""
    first: dict[str, Row] = {}
    for row in rows:
        value = row.text(column)
        if value is not None:
            first.setdefault(value, row)
    return first


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Return the names of labels; those that no row names are left out."""
    named: dict[str, tuple[str, Row]] = {}
    for row in rows:
        label, name = row.text("label"), row.text("label_name")
        if label is None or name is None:
            continue
        other, first = named.setdefault(label, (name, row))
        if other != name:
            raise TaskError(
                f"{row.where} has {shown(name)} as the 'label_name' of label "
                f"{label!r}, but {first.where} has {shown(other)}. Give each label one "
                "name."
            )
    by_name: dict[object, tuple[str, Row]] = {}
    for label, (name, row) in named.items():
        same, first = by_name.setdefault(_alike(name), (label, row))
        if same != label:
            raise TaskError(
                f"{row.where} gives label {label!r} the 'label_name' {shown(name)}, "
                f"which is that of label {same!r} in {first.where}, or differs only "
                "by blanks, case or the way that a number is written. Give each label "
                "a name of its own."
            )
    unnamed = {_alike(v): v for r in rows if (v := r.text("label")) and v not in named}
    for label, (name, row) in named.items():
        if clash := unnamed.get(_alike(name)):
            raise TaskError(
                f"{row.where} gives label {label!r} the 'label_name' {shown(name)}, "
                f"which is the label {clash!r} of other rows. Name both, or neither."
            )
    return {label: name for label, (name, _) in named.items()}


def _refuse_alike(first: Mapping[str, Row]) -> None:
    known: dict[object, str] = {}
    for label, row in first.items():
        other = known.setdefault(_alike(label), label)
        if other != label:
            raise TaskError(
                f"{row.where} has the label {label!r}, {first[other].where} has "
                f"{other!r}: they differ only by blanks, case or the way that a number "
                "is written. Write them the same if they are one class, or else "
                "differently."
            )


def _plain(label: str) -> str:
    """Return a label in quotes only where its blanks would not be seen."""
    return label if label.isprintable() and label == label.strip() else repr(label)


def _alike(text: str) -> object:
    """Return what texts share that a reader takes for the same."""
    number = _number(text)
    if number is not None:
        return number
    composed = unicodedata.normalize("NFC", text).casefold()
    # Blanks, and characters without a glyph, such as a zero-width space.
    seen = "".join(
        c for c in composed if not c.isspace() and unicodedata.category(c) != "Cf"
    )
    return {"false": 0, "true": 1}.get(seen, seen)


def _number(text: str) -> int | float | None:
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    if text.lstrip("+-").isdecimal():
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else None


def _is_real(label: str) -> bool:
    number = _number(label)
    return isinstance(number, float) and not number.is_integer()
