"""Tasks: what is read from files, what is refused."""

import csv
import json
import re

import pytest
from tasks_on_disk import SHARED, needs_shared

from rocoft.data.splits import few_shot
from rocoft.data.tasks import (
    HUB,
    PROMPTS,
    Example,
    Prompt,
    Task,
    TaskError,
    load_file,
    load_task,
    with_prompt,
)

ROWS = [
    {"text": "a fine film, all in all", "label": "good"},
    {"text": 'he said "no" to it', "label": "bad"},
    {"text": "naïve but charming", "label": "good"},
    {"text": "what a bore", "label": "bad"},
]
NO_QUOTES = {"quoting": csv.QUOTE_NONE, "quotechar": None}


def jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(path, rows, delimiter=",", **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def labelled(*labels, **more):
    return [{"text": f"text {i}", "label": y, **more} for i, y in enumerate(labels)]


def folder(path, train, test):
    path.mkdir(parents=True)
    jsonl(path / "train.jsonl", train)
    jsonl(path / "test.jsonl", test)
    return path.parent


# What is read.


def test_embedded_reviews():
    task = load_task("reviews")
    assert task.labels == ("negative", "positive")
    assert (len(task.train), len(task.test)) == (2009, 960)
    assert {e.label for e in (*task.train, *task.test)} == {0, 1}
    assert all(e.a.strip() and e.b is None for e in (*task.train, *task.test))
    assert task.prompt == PROMPTS["reviews"]
    assert not {e.a for e in task.train} & {e.a for e in task.test}
    # A review that any reader would call positive.
    psychotic = next(e for e in task.train if "psychotic but lovable" in e.a)
    assert task.labels[psychotic.label] == "positive"


def test_formats_are_equal(tmp_path):
    files = (
        jsonl(tmp_path / "same.jsonl", ROWS),
        table(tmp_path / "same.csv", ROWS),
        table(
            tmp_path / "same.tsv", ROWS, "\t", quoting=csv.QUOTE_NONE, quotechar=None
        ),
    )
    tasks = [load_file(file) for file in files]
    assert tasks[0].labels == ("bad", "good")
    assert [e.label for e in tasks[0].train] == [1, 0, 1, 0]
    assert [e.a for e in tasks[0].train] == [row["text"] for row in ROWS]
    assert tasks[0].train == tasks[1].train == tasks[2].train
    assert tasks[0].labels == tasks[1].labels == tasks[2].labels
    assert tasks[0].test == ()


def test_pairs(tmp_path):
    rows = [{"text_a": "p", "text_b": "q", "label": i % 2} for i in range(4)]
    task = load_file(table(tmp_path / "pairs.csv", rows))
    assert task.train[1] == Example("p", "q", 1)


def test_cell_with_a_line_break(tmp_path):
    rows = [{"text": "one\ntwo", "label": "x"}, {"text": "three", "label": "y"}]
    task = load_file(table(tmp_path / "breaks.csv", rows))
    assert [e.a for e in task.train] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("kind", "character"),
    [
        ("jsonl", "\u2028"),
        ("jsonl", "\x85"),
        ("csv", "\u2028"),
        ("csv", "\x85"),
        ("csv", "\x0c"),
    ],
    ids=ascii,
)
def test_a_text_holds_any_character(tmp_path, kind, character):
    """What str.splitlines takes for the end of a line is none of JSON or CSV."""
    text = f"one{character}two"
    rows = [{"text": text, "label": "x"}, {"text": "three", "label": "y"}]
    write = jsonl if kind == "jsonl" else table
    task = load_file(write(tmp_path / f"odd.{kind}", rows))
    assert [e.a for e in task.train] == [text, "three"]


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        (("no", "yes", "no"), ("no", "yes"), [0, 1, 0]),
        ((1, 2, 2), ("1", "2"), [0, 1, 1]),
        (("2", "10", "2"), ("2", "10"), [0, 1, 0]),
        ((-1, 1, -1), ("-1", "1"), [0, 1, 0]),
        ((True, False, True), ("False", "True"), [1, 0, 1]),
    ],
)
def test_labels(tmp_path, labels, names, values):
    task = load_file(jsonl(tmp_path / "task.jsonl", labelled(*labels)))
    assert task.labels == names
    assert [e.label for e in task.train] == values


def test_label_names(tmp_path):
    rows = [
        {"text": "a", "label": 1, "label_name": "good"},
        {"text": "b", "label": 0, "label_name": "bad"},
    ]
    task = load_file(jsonl(tmp_path / "task.jsonl", rows))
    assert task.labels == ("bad", "good")
    assert [e.label for e in task.train] == [1, 0]


def test_byte_order_mark(tmp_path):
    file = tmp_path / "excel.csv"
    file.write_bytes("\ufefftext,label\ra,x\rb,y\r".replace("\r", "\r\n").encode())
    assert [e.a for e in load_file(file).train] == ["a", "b"]


def test_blank_lines_are_no_examples(tmp_path):
    file = tmp_path / "task.jsonl"
    lines = [json.dumps(row) for row in labelled("x", "y")]
    file.write_text("\n\n".join(lines) + "\n\n")
    assert len(load_file(file).train) == 2


def test_labels_of_a_test_file_are_those_of_the_training_file(tmp_path):
    data = folder(tmp_path / "own", labelled(1, 2, 3), labelled(3, 1, 2, 2))
    task = load_task("own", data)
    assert [e.label for e in task.test] == [2, 0, 1, 1]
    data = folder(tmp_path / "lacks" / "own", labelled(0, 1, 2), labelled(2, 0))
    assert [e.label for e in load_task("own", data).test] == [2, 0]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        # The test file lacks class 2, hence its label 1 is the first class.
        ((1, 2), (1, 1), [0, 0]),
        ((0, 1), (0, 5), None),
        ((1, 2), (0, 1), None),
    ],
    ids=str,
)
def test_no_label_of_a_test_file_is_taken_for_another(tmp_path, train, test, expected):
    data = folder(tmp_path / "own", labelled(*train), labelled(*test))
    try:
        found = [e.label for e in load_task("own", data).test]
    except TaskError:
        found = None
    assert found == expected or found is None


def test_prompts_have_a_word_for_each_label_and_a_mask():
    for name, prompt in PROMPTS.items():
        assert prompt.template.count("{mask}") == 1, name
        assert "{mask}" not in prompt.causal, name
        assert len(set(prompt.words)) == len(prompt.words), name
        causal = prompt.words_for(causal=True)
        assert len(set(causal)) == len(causal) == len(prompt.words), name
        assert prompt.words_for(causal=False) == prompt.words, name
        # A label word comes after the template, with a space of its own.
        assert prompt.causal == prompt.causal.rstrip(), name
        assert prompt.causal.count("{a}") == 1, name
        assert prompt.causal.count("{b}") == ("{b}" in prompt.template), name
        assert not prompt.causal.endswith("}"), name
    assert set(HUB) <= set(PROMPTS)


@needs_shared
@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_shared_tasks(name):
    task = load_task(name, SHARED)
    assert task.prompt is not None
    assert len(task.labels) == len(task.prompt.words)
    for examples in (task.train, task.test):
        assert len(examples) > 200
        assert {e.label for e in examples} == set(range(len(task.labels)))
    lines = (SHARED / name / "test.jsonl").read_text().split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert [task.labels[e.label] for e in task.test] == [r["label_name"] for r in rows]
    split = few_shot(task, 8, 20, 0)
    assert len(split.train) == 8 * len(task.labels)


@needs_shared
def test_shared_regression_is_refused():
    with pytest.raises(TaskError, match="Regression is not supported"):
        load_task("stsb", SHARED)


# What is refused.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no examples"),
        ('{"text": "a", "label": 0}\nnonsense\n', "line 2 .* is not JSON"),
        ('["a", 0]\n', "line 1 .* is not a JSON object"),
        ('{"text": "a"}\n', "example 1 .* no 'label'"),
        ('{"text": "a", "label": null}\n', "example 1 .* no 'label'"),
        ('{"sentence": "a", "label": 0}\n', "no 'text'.*has 'sentence', 'label'"),
        ('{"text": "", "label": 0}\n', "no 'text'"),
        ('{"text_a": "a", "label": 0}\n', "no 'text_b'"),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": 0}', "one class only, '0'"),
        ('{"text": "a", "label": 0.5}\n{"text": "b", "label": 2}', "Regression"),
    ],
)
def test_refused_lines(tmp_path, content, message):
    file = tmp_path / "task.jsonl"
    file.write_text(content)
    with pytest.raises(TaskError, match=message):
        load_file(file)


def test_refused_table_without_its_column(tmp_path):
    file = tmp_path / "task.csv"
    file.write_text("sentence,label\na,0\nb,1\n")
    with pytest.raises(TaskError, match="no 'text'"):
        load_file(file)
    file.write_text("text,label\na,0\nb\n")
    with pytest.raises(TaskError, match="example 2 .* no 'label'"):
        load_file(file)


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_scores_of_a_table_are_real_numbers(tmp_path, kind):
    file, between = tmp_path / f"task.{kind}", {"csv": ",", "tsv": "\t"}[kind]
    labels = ["3.8", "4", "0.5", "1e-1"]
    rows = [("text", "label"), *((f"text {label}", label) for label in labels)]
    file.write_text("".join(between.join(row) + "\n" for row in rows))
    task = load_file(file, regression=True)
    assert task.regression
    assert [e.label for e in task.train] == [3.8, 4.0, 0.5, 0.1]
    with pytest.raises(TaskError, match=r"such as 3.8. Regression is not supported"):
        load_file(file)
    file.write_text(f"text{between}label\na{between}0.5\nb{between}n/a\n")
    with pytest.raises(TaskError, match="the label 'n/a' beside real numbers"):
        load_file(file, regression=True)


@pytest.mark.parametrize("labels", ["0 1", "0.0 1.0", "nan inf", "v1.5 v2.5"])
def test_other_labels_of_a_table_are_classes(tmp_path, labels):
    file = tmp_path / "task.csv"
    file.write_text("text,label\n" + "".join(f"a,{x}\n" for x in labels.split()))
    task = load_file(file, regression=True)
    assert sorted(task.labels) == sorted(labels.split())


def test_refused_encoding(tmp_path):
    file = tmp_path / "latin.csv"
    file.write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    with pytest.raises(TaskError, match=r"not UTF-8: byte 0xe9 at position 14"):
        load_file(file)


def test_refused_paths(tmp_path):
    with pytest.raises(TaskError, match=r"must end in .jsonl, .csv or .tsv"):
        load_file(tmp_path / "task.xlsx")
    with pytest.raises(TaskError, match="does not exist"):
        load_file(tmp_path / "task.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TaskError, match="cannot be read: Is a directory"):
        load_file(tmp_path / "folder.csv")


def test_refused_names(tmp_path):
    with pytest.raises(TaskError, match=r"'nope' is unknown.*reviews.*--data FILE"):
        load_task("nope")
    with pytest.raises(TaskError, match="no folder with a train.jsonl"):
        load_task("nope", tmp_path)
    data = folder(tmp_path / "own", labelled(0, 1), labelled(0, 1))
    with pytest.raises(TaskError, match=r"'nope' is not in data_dir.*holds own"):
        load_task("nope", data)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} It was {mask}.", "field other than {a}, {b} and {mask}: 'text'"),
        ("{a} It was {0} {mask}.", "field other than {a}, {b} and {mask}"),
        ("{a} It was great.", "must hold {a} and {mask} once"),
        ("{mask} {mask} {a}", "must hold {a} and {mask} once"),
        ("It was {mask}.", "must hold {a} and {mask} once"),
    ],
)
def test_refused_templates(template, message):
    with pytest.raises(TaskError, match=re.escape(message)):
        Prompt(template, ("bad", "good"), "{a} It was")


def test_refused_labels_of_a_test_file(tmp_path):
    data = folder(tmp_path / "own", labelled("x", "y"), labelled("x", "z"))
    with pytest.raises(TaskError, match="labels z, but the training"):
        load_task("own", data)
    data = folder(tmp_path / "more" / "own", labelled(0, 1), labelled(0, 1, 2))
    with pytest.raises(TaskError, match="labels 2, but the training"):
        load_task("own", data)


def test_other_label_words_keep_the_task_s_prompt_for_causal_models():
    old = PROMPTS["mnli"]
    task = Task("mnli", ("0", "1", "2"), (), (), old, "made")
    found = with_prompt(task, None, ["True", "Perhaps", "False"]).prompt
    assert (found.template, found.causal) == (old.template, old.causal)
    for causal in (True, False):
        assert found.words_for(causal=causal) == ("True", "Perhaps", "False")
    other = with_prompt(task, "{a} so {b} is {mask} .", []).prompt
    assert (other.words, other.causal) == (old.words, "{a} so {b} is")
    assert other.words_for(causal=True) == old.words_for(causal=True)
    with pytest.raises(TaskError, match="one of --label-words for each"):
        with_prompt(task, None, ["yes"])


# Published splits.


def published(path, content):
    """A folder with four examples, two of each label, and a file of splits."""
    data = folder(path / "own", labelled(0, 1, 1, 0), labelled(0, 1))
    text = content if isinstance(content, str) else json.dumps(content)
    (data / "own" / "lmbff16.json").write_text(text, encoding="utf-8")
    return data


def test_rows_of_published_splits_are_read_in_their_order(tmp_path):
    rows = {
        "13": {"train": [2, 0], "dev": [3, 1]},
        "7": {"train": [1, 3], "dev": [0, 2]},
    }
    task = load_task("own", published(tmp_path, rows))
    assert task.published == {13: ((2, 0), (3, 1)), 7: ((1, 3), (0, 2))}
    assert task.published[7].dev == (0, 2)
    assert with_prompt(task, "{a} {mask}", ["x", "y"]).published == task.published
    # Tasks stay keys of dictionaries.
    assert {task: "known"}[task] == "known"
    bare = folder(tmp_path / "bare" / "own", labelled(0, 1), labelled(0, 1))
    assert load_task("own", bare).published == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON, or was cut short: Expecting value"),
        ('{"13": {"train": [0, 1], "dev": [2', "is not JSON, or was cut short"),
        ([[0, 1], [2, 3]], "is not a JSON object that gives the rows of each seed"),
        ({}, "is not a JSON object that gives the rows of each seed"),
        ({"train": [0, 1], "dev": [2, 3]}, "is not a JSON object that gives the rows"),
        ({"-1": {"train": [0, 1], "dev": [2, 3]}}, "is not a JSON object that gives"),
        ({"13": [[0, 1], [2, 3]]}, "'train' of seed 13 is no list of rows"),
        ({"13": {"train": [0, 1]}}, "'dev' of seed 13 is no list of rows"),
        ({"13": {"train": [], "dev": [2, 3]}}, "'train' of seed 13 is no list of rows"),
        ({"13": {"train": "01", "dev": [2, 3]}}, "'train' of seed 13 is no list"),
        ({"13": {"train": [0, 4], "dev": [2, 3]}}, "has 4, which .* from 0 to 3"),
        ({"13": {"train": [0, -1], "dev": [2, 3]}}, "'train' of seed 13 has -1, which"),
        ({"13": {"train": [0, 1.0], "dev": [2, 3]}}, "has 1.0, which is no row"),
        ({"13": {"train": [0, True], "dev": [2, 3]}}, "has True, which is no row"),
        ({"13": {"train": ["0", 1], "dev": [2, 3]}}, "has '0', which is no row"),
        ({"13": {"train": [0, 3], "dev": [1, 2]}}, "'train' .* no row of label '1'"),
        ({"13": {"train": [0, 1], "dev": [2]}}, "'dev' of seed 13 has no row of label"),
    ],
    ids=str,
)
def test_refused_files_of_published_splits(tmp_path, content, message):
    data = published(tmp_path, content)
    with pytest.raises(TaskError, match=message) as caught:
        load_task("own", data)
    assert "lmbff16.json" in str(caught.value)
    assert "Get the whole file, or remove it" in str(caught.value)
