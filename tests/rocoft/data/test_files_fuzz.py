"""Any table is read back as it was written, and any bytes give a table or a refusal."""

import csv
import gzip
import io
import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rocoft.data.files import read_rows
from rocoft.data.prompts import has_prompts, read_completions
from rocoft.data.tasks import TaskError, load_file

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")
PACKED = tuple(f"{kind}.gz" for kind in KINDS if kind != "parquet")
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    # The folder holds one file, which each example overwrites.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    # What means something to readers of tables and of JSON.
    st.text("ab ,;\t\"'\\\n\r\x00\u2028\x85#{}[]", min_size=1, max_size=12),
).filter(str.strip)
LABELS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
)


def dumped(rows, kind, by_pandas):
    """Write a table by pandas or by the standard library; return bytes."""
    kind, _, packed = kind.partition(".")
    frame = pd.DataFrame(rows)
    if kind == "parquet":
        stream = io.BytesIO()
        frame.to_parquet(stream, index=False)
        return stream.getvalue()
    if kind in {"csv", "tsv"} and by_pandas:
        quoting = csv.QUOTE_NONE if kind == "tsv" else csv.QUOTE_MINIMAL
        sep = "\t" if kind == "tsv" else ","
        text = frame.to_csv(index=False, sep=sep, quoting=quoting)
    elif kind in {"csv", "tsv"}:
        options = {"quoting": csv.QUOTE_ALL}
        if kind == "tsv":
            options = {"quoting": csv.QUOTE_NONE, "quotechar": None}
            options |= {"delimiter": "\t", "lineterminator": "\n"}
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    elif kind == "json":
        indent = None if by_pandas else 1
        text = json.dumps(rows, ensure_ascii=by_pandas, indent=indent)
    else:
        lines = (json.dumps(row, ensure_ascii=by_pandas) for row in rows)
        text = "\n".join(lines)
    content = text.encode()
    return gzip.compress(content) if packed else content


def fitted(value, kind, by_pandas):
    """Return a value as the writer can write it: TSV has no quotes around a cell."""
    if not isinstance(value, str):
        return value
    if kind.startswith("csv") and by_pandas:
        # pandas puts no quotes around a carriage return.
        return value.replace("\r", " ")
    if kind.startswith("tsv"):
        value = value.translate(dict.fromkeys(map(ord, "\t\n\r"), " "))
        return value.replace('""', '"x"')
    return value


def refusal(read, path, **options):
    """Return the message of the only error that may be raised; empty if none is."""
    try:
        read(path, **options)
    except TaskError as error:
        return str(error)
    return ""


def check_refusals(path):
    """Read a file in all ways; an error must name it, on one line."""
    messages = [
        refusal(load_file, path),
        refusal(load_file, path, regression=True),
        refusal(read_completions, path),
        refusal(has_prompts, path),
    ]
    for message in messages:
        assert not message or path.name in message
        assert "\n" not in message


@pytest.mark.parametrize("kind", [*KINDS, *PACKED])
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.integers(0, 2)), min_size=3, max_size=8),
    labels=st.one_of(
        st.lists(st.integers(-99, 10**15), min_size=3, max_size=3, unique=True),
        st.lists(TEXTS, min_size=3, max_size=3, unique=True),
        st.permutations([0.5, 1.0, -2e-9]),
    ),
    pair=st.booleans(),
    by_pandas=st.booleans(),
)
@SETTINGS
def test_tables_are_read_back(tmp_path, kind, rows, labels, pair, by_pandas):
    table = [
        ({"text_a": a, "text_b": b} if pair else {"text": a}) | {"label": labels[y]}
        for a, b, y in [*rows, ("first", "one", 0), ("last", "one", 1)]
    ]
    table = [
        {key: fitted(value, kind, by_pandas) for key, value in row.items()}
        for row in table
    ]
    path = tmp_path / f"own.{kind}"
    path.write_bytes(dumped(table, kind, by_pandas))
    found = list(read_rows(path))
    assert [{k: row.text(k) for k in row.values} for row in found] == [
        {k: str(value) for k, value in row.items()} for row in table
    ]
    if message := refusal(load_file, path, regression=True):
        # Drawn labels may be alike.
        assert "differ only by" in message or "one class only" in message
        return
    task = load_file(path, regression=True)
    assert [e.a for e in task.train] == [next(iter(row.values())) for row in table]
    assert [e.b for e in task.train] == [row.get("text_b") for row in table]
    if task.regression:
        assert [e.label for e in task.train] == [float(row["label"]) for row in table]
    else:
        named = [task.labels[e.label] for e in task.train]
        assert named == [str(row["label"]) for row in table]


@given(
    rows=st.lists(st.tuples(TEXTS, LABELS), min_size=2, max_size=6),
    by_pandas=st.booleans(),
)
@SETTINGS
def test_labels_are_the_same_in_tables_and_json(tmp_path, rows, by_pandas):
    table = [{"text": text, "label": label} for text, label in rows]
    results = []
    for kind in ("csv", "jsonl", "json"):
        path = tmp_path / f"own.{kind}"
        # Not pandas for the table: its columns have one type for all labels.
        path.write_bytes(dumped(table, kind, by_pandas and kind != "csv"))
        if refusal(load_file, path, regression=True):
            results.append("refused")
        else:
            task = load_file(path, regression=True)
            results.append((task.labels, task.train))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("kind", [*KINDS, *PACKED])
@given(content=st.binary(max_size=200))
@SETTINGS
def test_any_bytes_give_a_table_or_a_refusal(tmp_path, kind, content):
    path = tmp_path / f"own.{kind}"
    path.write_bytes(content)
    check_refusals(path)
    if kind.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
        check_refusals(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "label", "label_name", "prompt", "choices"]), inner
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
@given(values=st.lists(JSON, max_size=4))
@SETTINGS
def test_any_json_gives_a_table_or_a_refusal(tmp_path, kind, values):
    path = tmp_path / f"own.{kind}"
    text = json.dumps(values) if kind == "json" else "\n".join(map(json.dumps, values))
    content = text.encode()
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    check_refusals(path)


BASES = [
    [{"text": 'a "b", c', "label": i % 2, "label_name": "ab"[i % 2]} for i in range(4)],
    [{"text_a": "ä\nb", "text_b": "c", "label": i / 4} for i in range(4)],
    [{"prompt": "a", "completion": f" {i}"} for i in range(4)],
]


@pytest.mark.parametrize("kind", [*KINDS, *PACKED])
@given(
    base=st.sampled_from(BASES),
    edits=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.binary(max_size=4)),
        min_size=1,
        max_size=4,
    ),
    inside=st.booleans(),
)
@SETTINGS
def test_mutations_give_a_table_or_a_refusal(tmp_path, kind, base, edits, inside):
    rows = base
    if kind.startswith("tsv"):
        rows = [
            {key: str(value).replace("\n", " ") for key, value in row.items()}
            for row in base
        ]
    content = dumped(rows, kind, by_pandas=True)
    packed = kind.endswith(".gz")
    if packed and inside:
        content = gzip.decompress(content)
    for place, removed, added in edits:
        place %= len(content) + 1
        content = content[:place] + added + content[place + removed :]
    path = tmp_path / f"own.{kind}"
    path.write_bytes(gzip.compress(content) if packed and inside else content)
    check_refusals(path)
