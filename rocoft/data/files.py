"""Rows of the files that users bring: CSV, TSV, JSON Lines, JSON arrays and Parquet.

========================  ============================================================
ending                    content
========================  ============================================================
``.csv``                  a header, cells between commas, in quotes where needed
``.tsv``                  a header, cells between tabs; a quote is a character as others
``.jsonl``                a JSON object on each line
``.json``                 an array of JSON objects, or an object on each line
``.parquet``              a table of Parquet
all but the last + .gz    the same, compressed by gzip
========================  ============================================================

Text is UTF-8, blank lines are no rows. What is malformed is refused, never repaired.

Tables are read by Python's ``csv`` in its strict mode. It refuses a quote that is not
closed and text after one, counts lines, and hands over every row as it is, so that one
with too many or too few cells can be refused. pandas pads short rows and takes a first
surplus cell for an index; pyarrow takes all after an open quote for one cell. Arrow
reads Parquet, which has none of these doubts.
"""

import csv
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocoft.data.templates import TaskError

KINDS = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
"""Endings of files with rows."""
PACKED = ".gz"
"""Ending after another one, of files that gzip compressed."""
SHOWN = 80
"""Maximum number of characters of a value in an error."""

_CELL = r'(?:"(?:[^"]|"")*+"|(?!\s*")[^,]*+)'
_RECORD = re.compile(rf"{_CELL}(?:,{_CELL})*+[\r\n]*+")
"""A row of CSV, where no blank is before the quote that opens a cell."""
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')
"""A cell that a writer of quotes has put in quotes for the quotes inside it."""


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        where: The row in errors, such as ``example 2 at line 3 of 'own.csv'``.
        values: Its values by column.
    """

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str | None:
        """Return a value as text, which is the same in all kinds of files.

        Args:
            column: Name of the column.

        Returns:
            The text; numbers and truth values as Python writes them. None if there is
            no value, an empty one or only blanks.

        Raises:
            TaskError: If the value is of another kind (a list, an object, bytes), not
                finite, or has half of a surrogate pair, which is no character.

        >>> row = Row("example 1 of 'own.jsonl'", {"text": "fine", "label": 1})
        >>> row.text("label"), row.text("label_name")
        ('1', None)
        """
        value = self.values.get(column)
        if value is None:
            return None
        if not isinstance(value, (str, bool, int, float)):
            raise TaskError(
                f"{self.where} has {shown(value)} as {column!r}, which is neither a "
                "text nor a number. Give one of these."
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise TaskError(
                f"{self.where} has {value} as {column!r}. Give a finite number or a "
                "text, or leave the row out."
            )
        text = str(value)
        check_characters(text, self.where, column)
        return text if text.strip() else None


class _Object(dict[str, Any]):
    """A JSON object that knows a key that it was given twice, with both values."""

    repeated: tuple[str, Any, Any] | None = None

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        for key, value in pairs:
            if key in self:
                self.repeated = (key, self[key], value)
            self[key] = value


def shown(value: object) -> str:
    r"""Return a value as an error shows it: on one line, cut if it is long.

    Args:
        value: The value.

    >>> shown("one\ntwo")
    "'one\\ntwo'"
    """
    try:
        text = repr(value[: SHOWN + 1] if isinstance(value, (str, bytes)) else value)
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def check_characters(text: str, where: str, column: str) -> None:
    r"""Refuse a text with half of a surrogate pair, which UTF-8 cannot hold.

    Args:
        text: The text.
        where: Its row in the error.
        column: Its column.

    Raises:
        TaskError: If there is one, as ``"\ud83d"`` in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{where} has {shown(text)} as {column!r}: {text[error.start]!a}, its "
            f"character {error.start + 1}, is half of a surrogate pair, which is no "
            "character. Write the text anew."
        ) from None


def file_kind(path: Path) -> str:
    """Return the kind of a file by its ending.

    Args:
        path: The file.

    Returns:
        One of `KINDS`; of a compressed file the ending before `PACKED`.

    Raises:
        TaskError: If the ending is another one.

    >>> file_kind(Path("own.CSV.gz"))
    '.csv'
    """
    name = path.name.lower()
    kind = Path(name.removesuffix(PACKED)).suffix
    if kind not in KINDS or (kind == ".parquet" and name.endswith(PACKED)):
        raise TaskError(
            f"file {str(path)!r} must end in .jsonl, .csv or .tsv, in .json or "
            f".parquet, not {path.suffix!r}; all but the last may have {PACKED} after."
        )
    return kind


def base_name(path: Path) -> str:
    """Return the name of a file without its endings.

    Args:
        path: The file.

    >>> base_name(Path("data/own.v2.csv.gz"))
    'own.v2'
    """
    name = path.name
    if name.lower().endswith(PACKED):
        name = name[: -len(PACKED)]
    return Path(name).stem


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file, one after the other.

    Args:
        path: The file, of a kind in `KINDS`.

    Yields:
        Its rows, with what stands in them, whatever that is.

    Raises:
        TaskError: If the file cannot be read, is not of the kind that its ending says,
            or has a malformed row: the error names file, row and value.
    """
    kind = file_kind(path)
    content = _content(path)
    if kind == ".parquet":
        yield from _parquet_rows(content, path)
        return
    text = _decoded(content, path)
    if kind in {".csv", ".tsv"}:
        yield from _table_rows(text, path, tabs=kind == ".tsv")
    elif kind == ".json" and text.lstrip().startswith("["):
        yield from _array_rows(text, path)
    else:
        yield from _line_rows(text, path)


def read_text(path: Path) -> str:
    """Read a file of text.

    Args:
        path: The file, in UTF-8.

    Returns:
        The text, without a byte order mark.

    Raises:
        TaskError: If it cannot be read.
    """
    return _decoded(_content(path), path)


def parse_json(text: str, where: str) -> Any:
    """Read a JSON value, strictly.

    Args:
        text: The text.
        where: The text in errors.

    Returns:
        The value.

    Raises:
        TaskError: If it is no JSON, or an object in it has a key twice.
    """
    value = _parsed(text, where)
    _refuse_repeated(value, where)
    return value


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TaskError(f"file {str(path)!r} does not exist.") from None
    except OSError as error:
        raise TaskError(
            f"file {str(path)!r} cannot be read: {error.strerror}."
        ) from None
    if not path.name.lower().endswith(PACKED):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(
            f"file {str(path)!r} is not compressed by gzip, or was cut short: {error}."
        ) from None


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(
            f"file {str(path)!r} is not UTF-8: byte {error.object[error.start]:#04x} "
            f"at position {error.start}. Save it as UTF-8."
        ) from None


def _table_rows(text: str, path: Path, *, tabs: bool) -> Iterator[Row]:
    """Read a table; every row must have as many cells as the header."""
    lines: list[str] = []
    reader = csv.reader(
        _remembered(text, lines),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] = []
    for number in itertools.count():
        lines.clear()
        begin = reader.line_num + 1
        try:
            # Blank lines are no rows, wherever they stand.
            while len(cells := next(reader)) < 2 and not "".join(cells).strip():
                lines.clear()
                begin = reader.line_num + 1
        except StopIteration:
            return
        except csv.Error as error:
            advice = "Close every quote, and write a quote inside quotes twice."
            raise TaskError(
                f"line {begin} of {str(path)!r}, {shown(lines[0])}, begins a row that "
                f"is malformed up to line {reader.line_num}: {error}."
                + ("" if tabs else f" {advice}")
            ) from None
        if not header:
            header = cells
            _check_header(header, path)
            continue
        where = f"example {number} at line {begin} of {str(path)!r}"
        _check_cells(cells, header, "".join(lines), where, tabs=tabs)
        yield Row(where, dict(zip(header, cells, strict=True)))


def _remembered(text: str, lines: list[str]) -> Iterator[str]:
    r"""Yield the lines of a text and remember them.

    Lines end in \n, or in \r if there is no other end. A \r inside a line is then an
    error of the reader: some writers leave it without quotes.
    """
    for line in io.StringIO(text, newline="\n" if "\n" in text else ""):
        lines.append(line)
        yield line


def _check_header(header: Sequence[str], path: Path) -> None:
    twice = [name for name in header if name.strip() and header.count(name) > 1]
    if twice:
        raise TaskError(
            f"the header of {str(path)!r} has the column {twice[0]!r} twice. Rename or "
            "remove one."
        )


def _check_cells(
    cells: Sequence[str], header: Sequence[str], line: str, where: str, *, tabs: bool
) -> None:
    """Refuse a row that readers of tables would disagree about."""
    if len(cells) != len(header):
        rest = header[len(cells) :]
        lacks = f" It has no {', '.join(map(repr, rest))}." if rest else ""
        advice = (
            "A text cannot hold a tab or a line break in TSV; write such texts as .csv "
            "or .jsonl."
            if tabs
            else "Put a text with a comma, a quote or a line break in quotes."
        )
        raise TaskError(
            f"{where} has {len(cells)} cell{'s' * (len(cells) > 1)}, {shown(cells)}, "
            f"but the header has {len(header)}, {shown(header)}.{lacks} {advice}"
        )
    if not tabs and '"' in line and not _RECORD.fullmatch(line):
        raise TaskError(
            f"{where}, {shown(line.rstrip())}, has a blank before a quote that opens a "
            "cell, so that the quotes would be part of the text. Remove the blank."
        )
    if tabs and (quoted := [cell for cell in cells if _QUOTED.fullmatch(cell)]):
        raise TaskError(
            f"{where} has {shown(quoted[0])}, which looks as if it was put in quotes, "
            "with those inside written twice. TSV has no quotes: write the text as it "
            "is (pandas: to_csv(..., sep='\\t', quoting=csv.QUOTE_NONE)), or as .csv "
            "or .jsonl."
        )


def _line_rows(text: str, path: Path) -> Iterator[Row]:
    number = 0
    # Not splitlines: JSON texts may hold other ends of lines, such as U+2028.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            number += 1
            line_name = f"line {line_number} of {str(path)!r}"
            yield _json_row(
                _parsed(line, line_name), line_name, f"example {number} at {line_name}"
            )


def _array_rows(text: str, path: Path) -> Iterator[Row]:
    values = _parsed(text, f"file {str(path)!r}")
    for number, value in enumerate(values, start=1):
        where = f"example {number} of {str(path)!r}"
        yield _json_row(value, where, where)


def _json_row(value: object, place: str, where: str) -> Row:
    if not isinstance(value, dict):
        raise TaskError(f"{place} is not a JSON object, but {shown(value)}.")
    _refuse_repeated(value, where)
    return Row(where, value)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise TaskError(f"{where} is nested too deeply to be read.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        near = shown(text[max(error.pos - 10, 0) : error.pos + 20])
        raise TaskError(
            f"{where} is not JSON, or was cut short: {error.msg} ({place}column "
            f"{error.colno}, at {near})."
        ) from None
    except ValueError as error:
        # Numbers of more digits than Python reads.
        raise TaskError(f"{where} is not JSON: {error}.") from None


def _refuse_repeated(value: object, where: str) -> None:
    """Refuse an object with a key twice, in any depth."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Object):
            if item.repeated is not None:
                key, first, second = item.repeated
                raise TaskError(
                    f"{where} has the key {shown(key)} twice, with {shown(first)} and "
                    f"{shown(second)}. Remove one."
                )
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _parquet_rows(content: bytes, path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(
            pyarrow.BufferReader(content), page_checksum_verification=True
        )
        names = table.column_names
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TaskError(
            f"file {str(path)!r} cannot be read as Parquet: {reason}."
        ) from None
    if twice := [name for name in names if names.count(name) > 1]:
        raise TaskError(
            f"file {str(path)!r} has the column {twice[0]!r} twice. Rename one."
        )
    for number, values in enumerate(rows, start=1):
        yield Row(f"example {number} of {str(path)!r}", values)
