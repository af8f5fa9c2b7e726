"""Files of examples: what each kind gives, and what is refused, with file and row."""

import csv
import gzip
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from rocoft.data.files import base_name, read_rows
from rocoft.data.prompts import Completion, has_prompts, read_completions
from rocoft.data.tasks import Example, TaskError, load_file, load_task

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")
PACKED = tuple(f"{kind}.gz" for kind in KINDS if kind != "parquet")


def write(path, rows):
    """Write rows by pandas or json, in the kind that the path's ending says."""
    frame, kind = pd.DataFrame(rows), path.name.split(".")[1]
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "tsv":
        frame.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_NONE)
    elif kind == "parquet":
        frame.to_parquet(path, index=False)
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        pack = gzip.open if path.suffix == ".gz" else open
        with pack(path, "wt", encoding="utf-8") as file:
            file.write(text)
    return path


def refused(path, *parts, read=load_file):
    """Check that a file is refused by an error that names it and these parts."""
    with pytest.raises(TaskError) as caught:
        read(path)
    message = str(caught.value)
    for part in (path.name, *parts):
        assert part in message, message
    assert "\n" not in message
    return message


# What is read.


@pytest.mark.parametrize("kind", [*KINDS, *PACKED])
@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        ([1, 0, 1, 0], ("0", "1"), [1, 0, 1, 0]),
        ([10, 9, 10, 9], ("9", "10"), [1, 0, 1, 0]),
        ([-1, -2, -1, 10], ("-2", "-1", "10"), [1, 0, 1, 2]),
        ([1.0, 10.0, 2.0, 2.0], ("1.0", "2.0", "10.0"), [0, 2, 1, 1]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        (["no", "yes", "yes", "no"], ("no", "yes"), [0, 1, 1, 0]),
        (["1", "0", "1", "1"], ("0", "1"), [1, 0, 1, 1]),
        (["v1.5", "nan", "inf", "²"], ("inf", "nan", "v1.5", "²"), [2, 1, 0, 3]),
        ([0.5, 1.0, 2.0, 3.0], ("score",), [0.5, 1.0, 2.0, 3.0]),
        (["0.5", "1", "2e0", "-.5"], ("score",), [0.5, 1.0, 2.0, -0.5]),
    ],
    ids=str,
)
def test_labels_mean_the_same_in_all_kinds(tmp_path, kind, labels, names, values):
    rows = [{"text": f"text {i}", "label": y} for i, y in enumerate(labels)]
    task = load_file(write(tmp_path / f"own.{kind}", rows), regression=True)
    assert task.labels == names
    assert [e.label for e in task.train] == values
    assert [e.a for e in task.train] == [row["text"] for row in rows]
    assert task.name == "own"
    assert {type(e.label) for e in task.train} == {type(values[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_pairs_in_all_kinds(tmp_path, kind):
    names = ("fails", "follows")
    rows = [
        {"text_a": f"a {i}", "text_b": "b", "label": i % 2, "label_name": names[i % 2]}
        for i in range(4)
    ]
    task = load_file(write(tmp_path / f"own.{kind}", rows))
    assert task.labels == names
    assert task.train[1] == Example("a 1", "b", 1)


def test_a_text_with_a_comma_is_refused_or_right(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text("label,text\npos,good film, really and truly\nneg,bad\n")
    where = ("example 1 at line 2", "3 cells", "' really and truly'", "in quotes")
    refused(file, *where)
    file.write_text('label,text\npos,"good film, really and truly"\nneg,bad\n')
    task = load_file(file)
    assert task.train == (
        Example("good film, really and truly", None, 1),
        Example("bad", None, 0),
    )


def test_tables_have_no_quotes_between_tabs(tmp_path):
    texts = ['"good film', '"good" film', '"good film"', 'a 5" disc', '\'tis, \\"so\\"']
    file = tmp_path / "own.tsv"
    rows = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    file.write_text("text\tlabel\n" + rows)
    assert [e.a for e in load_file(file).train] == texts


def test_quotes_inside_an_unquoted_cell_are_characters(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text('text,label\na 5" disc,0\nthe "best" film,1\n"a ""b"", c" ,0\n')
    message = refused(file, "line 4", "expected after")
    assert '"a ""b"", c"' in message
    file.write_text('text,label\na 5" disc,0\nthe "best" film,1\n"a ""b"", c",0\n')
    texts = [e.a for e in load_file(file).train]
    assert texts == ['a 5" disc', 'the "best" film', 'a "b", c']


@pytest.mark.parametrize("begin", ["\n", "  \n\n", "\r\n", "\ufeff\n", "\t\n"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "parquet"])
def test_blank_lines_do_not_change_a_file(tmp_path, kind, begin):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(4)]
    file = write(tmp_path / f"own.{kind}", rows)
    expected = load_file(file).train
    text = file.read_text()
    if kind == "tsv" and begin == "\t\n":
        begin = " \n"
    file.write_text(begin + text + "\n \n", encoding="utf-8")
    assert load_file(file).train == expected
    assert not has_prompts(file)


@pytest.mark.parametrize("begin", ["", "\n", "  \n\n", "\ufeff\n"])
@pytest.mark.parametrize("kind", [*KINDS, "jsonl.gz"])
def test_prompts_are_told_from_labels_in_all_kinds(tmp_path, kind, begin):
    rows = [{"prompt": f"prompt {i}", "completion": " so"} for i in range(3)]
    file = write(tmp_path / f"own.{kind}", rows)
    if kind in {"csv", "tsv", "json", "jsonl"}:
        file.write_text(begin + file.read_text(), encoding="utf-8")
    assert has_prompts(file)
    assert read_completions(file) == tuple(
        Completion(f"prompt {i}", (" so",)) for i in range(3)
    )
    more = [row | {"text": "a", "label": i} for i, row in enumerate(rows)]
    assert not has_prompts(write(tmp_path / f"labels.{kind}", more))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_choices_in_all_kinds(tmp_path, kind):
    rows = [{"prompt": "p", "choices": ["yes", "no"], "answer": i} for i in (0, 1)]
    found = read_completions(write(tmp_path / f"own.{kind}", rows))
    assert found == tuple(Completion("p", ("yes", "no"), i) for i in (0, 1))


def test_a_word_of_json_is_no_prompt(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('"a prompt"\n')
    assert not has_prompts(file)
    refused(file, "line 1", "not a JSON object, but 'a prompt'")


@pytest.mark.parametrize("train", ["csv", "jsonl.gz", "parquet"])
def test_a_folder_holds_files_of_any_kind(tmp_path, train):
    (tmp_path / "own").mkdir()
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(4)]
    write(tmp_path / "own" / f"train.{train}", rows)
    write(tmp_path / "own" / "test.json", rows[1:2])
    task = load_task("own", tmp_path)
    assert len(task.train) == 4
    assert task.test == (Example("text 1", None, 1),)
    with pytest.raises(TaskError, match="'nope' is not in data_dir.*holds own"):
        load_task("nope", tmp_path)
    write(tmp_path / "own" / "train.tsv", rows)
    with pytest.raises(TaskError, match="'train.tsv'.*Leave one of them"):
        load_task("own", tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=ascii)
def test_any_end_of_lines(tmp_path, end):
    file = tmp_path / "own.csv"
    file.write_bytes(f'text,label{end}"a{end}b",x{end}{end}c,y{end}'.encode())
    assert [e.a for e in load_file(file).train] == [f"a{end}b", "c"]


def test_rows_know_their_place(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text('\ntext,label\n"one\ntwo",a\n\nthree,b\n')
    first, second = read_rows(file)
    assert first.where == f"example 1 at line 3 of {str(file)!r}"
    assert second.where == f"example 2 at line 6 of {str(file)!r}"


@pytest.mark.parametrize(
    ("name", "base"), [("a.csv", "a"), ("a.b.JSONL.GZ", "a.b"), ("a.parquet", "a")]
)
def test_names_without_endings(name, base):
    assert base_name(Path("x.y") / name) == base


# What is refused.


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("label,text\npos,a\nneg\n", ("example 2 at line 3", "1 cell,", "['neg']")),
        ("label,text\npos,a\nneg,b,\n", ("example 2 at line 3", "3 cells", "'neg'")),
        ("label,text\npos,a\n\n\nneg,b,c,d\n", ("example 2 at line 5", "4 cells")),
        ('label,text\npos,a\nneg,"b\nx,c\n', ("line 3", "'neg,\"b\\n'", "line 4")),
        ('label,text\npos,"good" film\nx,c\n', ("line 2", "expected after")),
        ('label,text\npos, "good"\nx,c\n', ("example 1 at line 2", "a blank before")),
        ('label,text\npos, "good, film"\nx,c\n', ("example 1 at line 2", "3 cells")),
        ('text,label\n "a",pos\nx,c\n', ("example 1 at line 2", "a blank before")),
        (f"label,text\npos,a\nneg,{'b' * 140_000}\n", ("line 3", "field limit", "bbb")),
        ("text,label,text\na,pos,b\nc,neg,d\n", ("header", "column 'text' twice")),
        ("text, label\na,pos\nb,neg\n", ("example 1", "no 'label'", "' label'")),
        ("label,text\npos,a\nneg,b\rc\n", ("line 3", "new-line character")),
        ("text,label\na,pos\n\rb,neg\n", ("line 3", "new-line character")),
        ("label,text\npos,a\nneg, \n", ("example 2 at line 3", "no 'text'")),
        ("label,text\npos,a\n,b\n", ("example 2 at line 3", "no 'label'")),
        ("text;label\na;pos\nb;neg\n", ("example 1", "no 'text'", "'text;label'")),
        ("text\tlabel\na\tpos\nb\tneg\n", ("example 1", "no 'text'", "text\\tlabel")),
        ("text,label\n", ("holds no examples",)),
        ("\n\n", ("holds no examples",)),
    ],
)
def test_malformed_csv(tmp_path, content, parts):
    file = tmp_path / "own.csv"
    file.write_text(content)
    refused(file, *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("label\ttext\npos\ta\tb\nneg\tb\n", ("example 1 at line 2", "3 cells")),
        ("label\ttext\npos\ta\nneg\n", ("example 2 at line 3", "1 cell")),
        ('label\ttext\npos\t"a\nb"\n', ("example 2 at line 3", "line break")),
        ('label\ttext\npos\t"a ""b"" c"\n', ("example 1", '"a ""b"" c"', "QUOTE_NONE")),
        ('"label"\t"text"\n"pos"\t"a"\n', ("no 'text'", "'\"label\"'")),
        (f"label\ttext\npos\t{'b' * 140_000}\n", ("line 2", "field limit")),
        ("label,text\npos,a\nneg,b\n", ("no 'text'", "'label,text'")),
        ("text\tlabel\na\tpos\n\rb\tneg\n", ("line 3", "new-line character")),
    ],
)
def test_malformed_tsv(tmp_path, content, parts):
    file = tmp_path / "own.tsv"
    file.write_text(content)
    refused(file, *parts)


GOOD = '{"text": "a", "label": "x"}'


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"text": "b", "label": "y", "label": "x"}', ("'label' twice", "'y'", "'x'")),
        ('{"text": "b", "text": "c", "label": "y"}', ("'text' twice", "'b'", "'c'")),
        ('{"text": "b", "label": "y", "m": [{"k": 1, "k": 2}]}', ("'k' twice", "1")),
        ('{"text": "b \\ud83d", "label": "y"}', ("'b \\ud83d'", "surrogate", "'text'")),
        ('{"text": "b", "label": "\\udc00"}', ("'\\udc00'", "surrogate", "'label'")),
        ('{"text": ["b", "c"], "label": "y"}', ("['b', 'c']", "'text'", "neither")),
        ('{"text": {"de": "b"}, "label": "y"}', ("{'de': 'b'}", "'text'", "neither")),
        ('{"text": "b", "label": ["y"]}', ("['y']", "'label'", "neither")),
        ('{"text": "b", "label": {"y": 1}}', ("{'y': 1}", "'label'", "neither")),
        ('{"text": "b", "label": "y", "label_name": ["u"]}', ("['u']", "'label_name'")),
        ('{"text": "b", "label": NaN}', ("nan", "'label'", "finite")),
        ('{"text": "b", "label": -Infinity}', ("-inf", "'label'", "finite")),
        ('{"text": "b", "label": 1e999}', ("inf", "'label'", "finite")),
        ('{"text": NaN, "label": "y"}', ("nan", "'text'", "finite")),
        ('{"text": " \\t", "label": "y"}', ("no 'text'",)),
        ('{"text": "b", "label": " "}', ("no 'label'",)),
        ('{"text": "b", "text_b": "c", "label": "y"}', ("'c'", "'text_b'", "beside")),
        ('{"text_a": "b", "text_b": "c", "label": "y"}', ("no 'text'", "'text_a'")),
        ('{"text": "b", "label": "y"', ("not JSON", "column 27")),
        ('{"text": "b", "label": "y"} {}', ("not JSON", "Extra data")),
        ("{'text': 'b', 'label': 'y'}", ("not JSON", "property name")),
        ("[" * 100_000, ("nested too deeply",)),
        ('{"text": "b", "label": ' + "1" * 5000 + "}", ("not JSON", "digits")),
        ("null", ("not a JSON object, but None",)),
    ],
)
def test_malformed_json(tmp_path, row, parts):
    file = tmp_path / "own.jsonl"
    file.write_text(f"{GOOD}\n\n{row}\n")
    message = refused(file, *parts)
    assert re.search("^(example 2 at )?line 3 of", message)
    file = tmp_path / "own.json"
    file.write_text(f"[{GOOD},\n\n{row}]\n")
    message = refused(file)
    # What is no JSON at all has no rows.
    assert re.search("^(example 2|file '.*' is n)", message)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        (("pos", "pos ", "neg"), ("'pos'", "'pos '")),
        (("pos", "neg", "\u00a0neg"), ("'neg'", "'\\xa0neg'")),
        (("pos", "neg", "neg\u200b"), ("'neg'", "'neg\\u200b'")),
        (("very good", "very  good", "bad"), ("'very good'", "'very  good'")),
        (("pos", "Pos", "neg"), ("'pos'", "'Pos'")),
        (("caf\u00e9", "cafe\u0301", "tea"), ("'caf\u00e9'", "'cafe\u0301'")),
        (("1", "1.0", "0"), ("'1'", "'1.0'")),
        (("1", "01", "0"), ("'1'", "'01'")),
        (("+1", "0", "1"), ("'+1'", "'1'")),
        (("1", "2", " 1"), ("'1'", "' 1'")),
        (("True", "False", "true"), ("'True'", "'true'")),
        (("True", "False", "1"), ("'True'", "'1'")),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "parquet"])
def test_classes_that_nobody_can_tell_apart(tmp_path, kind, labels, parts):
    rows = [{"text": f"text {i}", "label": y} for i, y in enumerate(labels)]
    message = refused(write(tmp_path / f"own.{kind}", rows), *parts, "example ")
    assert "differ only by blanks, case" in message


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (
            [(0, "bad"), (1, "good"), (0, "bad"), (1, "bad")],
            ("example 4", "'bad'", "label '1'", "example 2", "'good'"),
        ),
        (
            [(0, "bad"), (1, "bad"), (0, "bad"), (1, "bad")],
            ("example 2", "'bad'", "label '1'", "label '0'", "example 1"),
        ),
        (
            [(0, "bad"), (1, "Bad "), (0, "bad"), (1, "Bad ")],
            ("example 2", "'Bad '", "label '1'", "label '0'", "example 1"),
        ),
        ([(0, "bad"), (1, "good"), (0, "bad "), (1, "good")], ("example 3", "'bad '")),
        ([(0, "1"), (1, None), (0, "1"), (1, None)], ("example 1", "label '0'", "'1'")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_contradicting_names(tmp_path, kind, rows, parts):
    named = [
        {"text": f"text {i}", "label": label, "label_name": name}
        for i, (label, name) in enumerate(rows)
    ]
    refused(write(tmp_path / f"own.{kind}", named), *parts)


def test_names_that_some_rows_lack_are_those_of_the_others(tmp_path):
    rows = [(0, "bad"), (1, None), (0, None), (1, "good")]
    named = [{"text": "a", "label": y, "label_name": name} for y, name in rows]
    assert load_file(write(tmp_path / "own.jsonl", named)).labels == ("bad", "good")


def test_names_of_a_test_file_that_contradict_the_training_file(tmp_path):
    (tmp_path / "own").mkdir()
    for part, names in (("train", ("bad", "good")), ("test", ("good", "bad"))):
        rows = [
            {"text": f"text {i}", "label": i, "label_name": names[i]} for i in (0, 1)
        ]
        write(tmp_path / "own" / f"{part}.jsonl", rows)
    with pytest.raises(TaskError) as caught:
        load_task("own", tmp_path)
    for text in ("example 1 ", "test.jsonl", "'good'", "label '0'", "'bad'"):
        assert text in str(caught.value)


def test_unknown_labels_of_a_test_file_are_seen_with_their_blanks(tmp_path):
    (tmp_path / "own").mkdir()
    for part, labels in (("train", ("pos", "neg")), ("test", ("pos", "neg "))):
        rows = [{"text": f"text {i}", "label": y} for i, y in enumerate(labels)]
        write(tmp_path / "own" / f"{part}.csv", rows)
    with pytest.raises(TaskError, match=r"labels 'neg ', but the .* neg, pos.*example"):
        load_task("own", tmp_path)


@pytest.mark.parametrize(
    ("kind", "content", "part"),
    [
        ("csv.gz", b"text,label\na,x\nb,y\n", "not compressed by gzip"),
        ("csv.gz", gzip.compress(b"text,label\na,x\nb,y\n")[:-9], "cut short"),
        ("jsonl.gz", gzip.compress(GOOD.encode())[:12], "cut short"),
        ("csv.gz", gzip.compress("text,label\né,x".encode("latin-1")), "not UTF-8"),
        ("csv", "text,label\na,x\n".encode("utf-16"), "not UTF-8: byte 0xff"),
        ("parquet", b"text,label\na,x\nb,y\n", "cannot be read as Parquet"),
        ("parquet", b"", "cannot be read as Parquet"),
        ("parquet.gz", b"", "must end in"),
        ("gz", b"", "must end in"),
        ("zip", b"", "must end in"),
        ("xlsx", b"", "must end in"),
        ("json", b'[{"text": "a", "label": "x"}', "not JSON, or was cut short"),
        ("json", b"[]", "holds no examples"),
        ("json", b'{"text": {"0": "a", "1": "b"}, "label": {"0": 0}}', "{'0': 'a'"),
    ],
)
def test_files_that_are_not_what_their_ending_says(tmp_path, kind, content, part):
    file = tmp_path / f"own.{kind}"
    file.write_bytes(content)
    refused(file, part)


def test_values_of_parquet_that_are_no_text(tmp_path):
    for values, shown in (
        ([["a"], ["b"]], "['a']"),
        ([b"a", b"b"], "b'a'"),
        ([None, "b"], "no 'text'"),
        ([pd.Timestamp(0), pd.Timestamp(0)], "Timestamp"),
    ):
        frame = pd.DataFrame({"text": values, "label": ["x", "y"]})
        frame.to_parquet(tmp_path / "own.parquet")
        refused(tmp_path / "own.parquet", "example 1 of", shown)
    categories = pd.DataFrame(
        {"text": ["a", "b"], "label": ["x", "y"]}, dtype="category"
    )
    categories.to_parquet(tmp_path / "own.parquet")
    assert load_file(tmp_path / "own.parquet").labels == ("x", "y")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', ("'prompt' twice",)),
        ('{"prompt": "\\ud800", "completion": "c"}', ("surrogate", "'\\ud800'")),
        ('{"prompt": "a", "completion": "\\ud800"}', ("surrogate",)),
        ('{"prompt": ["a"], "completion": "c"}', ("no text as 'prompt'",)),
        ('{"prompt": "a", "completion": ["c"]}', ("neither a text", "['c']")),
        ('{"prompt": "a", "completion": 5}', ("neither a text", "5")),
        (
            '{"prompt": "a", "completion": "c", "choices": ["c", "d"], "answer": 1}',
            ("'c'", "beside 'choices'"),
        ),
        ('{"prompt": "a", "choices": ["c", "c"], "answer": 1}', ("two are equal",)),
        ('{"prompt": "a", "choices": ["c", " c"], "answer": 1}', ("only by blanks",)),
        ('{"prompt": "a", "choices": ["c", "d"], "answer": 1}', ("mixes", "example 1")),
    ],
)
def test_malformed_prompts(tmp_path, row, parts):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
    refused(file, "example 2 at line 2", *parts, read=read_completions)
