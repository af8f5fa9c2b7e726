"""Splits: LM-BFF's as published and by its rule, few-shot and full ones, refusals."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tasks_on_disk import SHARED, needs_shared

from rocoft.data.splits import few_shot, lmbff_split
from rocoft.data.tasks import PROMPTS, Example, FewShotRows, Task, TaskError, load_task

SEEDS = (13, 21, 42, 87, 100)
TASKS = sorted({*PROMPTS, "stsb"} - {"reviews"})
CLASSES = [name for name in TASKS if name != "stsb"]
PUBLISHED_NOTES = {
    ("cr", 13): ("label 'positive' has 15 training examples, not 16",),
    ("cr", 42): ("label 'negative' has 15 training examples, not 16",),
    ("mpqa", 21): ("31 of 32 dev examples are distinct",),
    ("mpqa", 42): (
        "31 of 32 training examples are distinct",
        "2 of 32 dev examples are training examples",
    ),
}


def numbered(count=40, classes=2, test=0):
    """A task whose texts are numbers; the test texts go on from the training ones."""
    examples = tuple(Example(str(i), None, i % classes) for i in range(count + test))
    names = tuple("abcdef"[:classes])
    return Task("numbers", names, examples[:count], examples[count:], None, "here")


@pytest.fixture(scope="module")
def shared():
    """Tasks beside the repository, each read once."""
    tasks = {}

    def load(name):
        if name not in tasks:
            tasks[name] = load_task(name, SHARED, regression=True)
        return tasks[name]

    return load


def json_lines(name, part):
    """What a file says of each example, read without the package."""
    text = (SHARED / name / f"{part}.jsonl").read_bytes().decode()
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [
        (row.get("text", row.get("text_a")), row.get("text_b"), row["label_name"])
        + ((row["label"],) if name == "stsb" else ())
        for row in rows
    ]


def said(split, part):
    """The same of the examples of a split."""
    return [
        (e.a, e.b, "similarity_0_to_5", e.label)
        if split.task.regression
        else (e.a, e.b, split.task.labels[e.label])
        for e in getattr(split, part)
    ]


# Published splits.


@needs_shared
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TASKS)
def test_published_splits_are_reproduced_row_for_row(shared, name, seed):
    published = json.loads((SHARED / name / "lmbff16.json").read_text())[str(seed)]
    lines = json_lines(name, "train")
    split = lmbff_split(shared(name), 16, seed)
    assert said(split, "train") == [lines[row] for row in published["train"]]
    assert said(split, "dev") == [lines[row] for row in published["dev"]]
    assert split.seed == seed
    assert split.notes == PUBLISHED_NOTES.get((name, seed), ())


@needs_shared
@pytest.mark.parametrize("name", TASKS)
def test_every_published_seed_is_known(shared, name):
    assert tuple(shared(name).published) == SEEDS


def test_published_rows_serve_their_shots_and_seeds_alone():
    task = numbered(80, test=10)
    rows = FewShotRows(tuple(range(32)), tuple(range(32, 64)))
    known = replace(task, published={13: rows})
    split = lmbff_split(known, 16, 13)
    assert split.train == task.train[:32]
    assert split.dev == task.train[32:64]
    for shots, seed in ((16, 21), (15, 13), (17, 13)):
        by_rule = lmbff_split(task, shots, seed)
        assert lmbff_split(known, shots, seed) == replace(by_rule, task=known)
    assert lmbff_split(task, 16, 13).train != split.train


# The rule.


def legacy_shuffle(items, seed):
    """Shuffle a list as scripts do, by NumPy's global generator, which is put back."""
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        items = list(items)
        np.random.shuffle(items)
    finally:
        np.random.set_state(state)
    return items


def by_rule(lines, label, shots, seed):
    """LM-BFF's rule, one line after the other: a list of each label in a dictionary."""
    lists = {}
    for line in legacy_shuffle(lines, seed):
        lists.setdefault(label(line), []).append(line)
    train, dev = [], []
    for some in lists.values():
        for place, line in enumerate(some):
            if place < shots:
                train.append(line)
            elif place < 2 * shots:
                dev.append(line)
    return train, dev


@pytest.mark.parametrize("seed", [0, 13, 100, 2**32 - 1])
@pytest.mark.parametrize(
    ("classes", "shots"), [(2, 1), (2, 16), (3, 5), (3, 10), (6, 4)]
)
def test_rule_against_a_dumb_twin(classes, shots, seed):
    task = numbered(72, classes, test=classes)
    before = np.random.get_state()[1].copy()
    split = lmbff_split(task, shots, seed)
    assert (np.random.get_state()[1] == before).all()
    train, dev = by_rule(task.train, lambda e: e.label, shots, seed)
    assert list(split.train) == train
    assert list(split.dev) == dev
    assert not {*split.train} & {*split.dev}
    for part in (split.train, split.dev):
        assert Counter(e.label for e in part) == dict.fromkeys(range(classes), shots)
    assert split.notes == ()
    assert split == lmbff_split(task, shots, seed)


@needs_shared
@pytest.mark.parametrize("name", CLASSES)
def test_rule_on_real_tasks(shared, name):
    lines = json_lines(name, "train")
    for shots, seed in ((64, 13), (64, 100), (8, 42)):
        split = lmbff_split(shared(name), shots, seed)
        train, dev = by_rule(lines, lambda line: line[2], shots, seed)
        assert said(split, "train") == train
        assert said(split, "dev") == dev
        parts = (said(split, "train"), said(split, "dev"), said(split, "test"))
        texts = [(a, b) for part in parts for a, b, _ in part]
        assert len(texts) == len({*texts})
        if (name, shots) != ("trec", 64):
            assert len(train) == len(dev) == shots * len(split.task.labels)
            assert split.notes == ()


@needs_shared
@pytest.mark.parametrize("seed", SEEDS)
def test_a_label_with_few_examples_trains_first(shared, seed):
    """TREC asks 86 questions for an abbreviation: 64 to train on, 22 are left."""
    split = lmbff_split(shared("trec"), 64, seed)
    abbreviation = split.task.labels.index("abbreviation")
    for part, few in ((split.train, 64), (split.dev, 22)):
        counts = dict.fromkeys(range(6), 64) | {abbreviation: few}
        assert Counter(e.label for e in part) == counts
    assert split.notes == ("label 'abbreviation' has 22 dev examples, not 64",)


def test_one_example_to_choose_by_is_enough():
    examples = numbered(40).train[:21] + (Example("more", None, 0),) * 5
    task = Task("odd", ("a", "b"), examples, examples[:2], None, "here")
    split = lmbff_split(task, 9, 0)
    assert Counter(e.label for e in split.dev) == {0: 7, 1: 1}
    assert split.notes == (
        "label 'a' has 7 dev examples, not 9",
        "label 'b' has 1 dev examples, not 9",
    )
    message = "label 'b' of task 'odd' has 10 training examples; shots=10 needs 10 to"
    with pytest.raises(TaskError, match=message):
        lmbff_split(task, 10, 0)


# Test examples.


@pytest.mark.parametrize("size", [1, 10, 29])
def test_test_examples_are_those_that_both_of_the_study_s_ways_draw(size):
    """GLUE's are shuffled with seed 42, the other tasks' sampled by pandas with it."""
    task = numbered(60, 2, test=30)
    drawn = list(lmbff_split(task, 2, 7, test_size=size).test)
    assert drawn == legacy_shuffle(task.test, 42)[:size]
    frame = pd.DataFrame({"text": [e.a for e in task.test]})
    sampled = frame.sample(n=size, random_state=42)
    assert [e.a for e in drawn] == sampled["text"].tolist()


@pytest.mark.parametrize("size", [30, 31, 1000])
def test_few_test_examples_stay_in_their_order(size):
    task = numbered(60, 2, test=30)
    assert lmbff_split(task, 2, 7, test_size=size).test == task.test


@needs_shared
@pytest.mark.parametrize("name", TASKS)
def test_test_examples_are_the_same_for_all_seeds_and_shots(shared, name):
    lines = json_lines(name, "test")
    expected = legacy_shuffle(lines, 42)[:1000] if len(lines) > 1000 else lines
    assert len(expected) == min(1000, len(lines))
    asked = [(16, seed) for seed in SEEDS]
    asked += [] if name == "stsb" else [(4, 13), (64, 87)]
    for shots, seed in asked:
        assert said(lmbff_split(shared(name), shots, seed), "test") == expected


def test_a_label_that_the_cut_leaves_out_is_noted():
    task = numbered(60, 3, test=30)
    split = lmbff_split(task, 2, 7, test_size=1)
    (only,) = split.test
    others = [name for label, name in enumerate(task.labels) if label != only.label]
    assert split.notes == tuple(
        f"label {name!r} has none of the 1 test examples" for name in others
    )


# Refused splits of LM-BFF.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 13), "shots=0 and test_size=5 must be at least 1"),
        ((-1, 13), "shots=-1 and test_size=5 must be at least 1"),
        ((4, -1), "seed=-1 must be from 0 to"),
        ((4, 2**32), "seed=4294967296 must be from 0 to"),
        ((20, 13), "label 'a' .* has 20 training examples; .* Lower --shots or add"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(TaskError, match=message):
        lmbff_split(numbered(40, test=10), *arguments, test_size=5)
    with pytest.raises(TaskError, match="test_size=0 must be at least 1"):
        lmbff_split(numbered(40, test=10), 4, 13, test_size=0)


def test_refused_tests():
    task = numbered(60, 3, test=30)
    lacking = replace(task, test=tuple(e for e in task.test if e.label == 1))
    with pytest.raises(TaskError, match="no test example of label 'a', 'c': no"):
        lmbff_split(lacking, 4, 13)
    with pytest.raises(TaskError, match="no test examples of its own.*few_shot"):
        lmbff_split(replace(task, test=()), 4, 13)


def test_a_regression_is_split_as_published_or_not_at_all():
    scores = tuple(Example(str(i), None, i / 7) for i in range(40))
    task = Task("scores", ("score",), scores[:30], scores[30:], None, "here")
    with pytest.raises(TaskError, match="shots=16 .* Add lmbff16.json, its"):
        lmbff_split(task, 16, 13)
    known = replace(task, published={13: FewShotRows((3, 1), (2, 0))})
    split = lmbff_split(known, 16, 13, test_size=4)
    assert split.train == (scores[3], scores[1])
    assert split.dev == (scores[2], scores[0])
    assert list(split.test) == legacy_shuffle(task.test, 42)[:4]
    assert split.notes == ()
    for shots, seed in ((64, 13), (16, 21)):
        message = f"shots={shots} with seed={seed}.* shots=16 and a seed of 13"
        with pytest.raises(TaskError, match=message):
            lmbff_split(known, shots, seed)


# Few-shot splits.


@pytest.mark.parametrize("classes", [2, 3])
def test_split_has_as_many_of_each_label(classes):
    split = few_shot(numbered(60, classes, test=30), 5, 12, 0)
    assert Counter(e.label for e in split.train) == dict.fromkeys(range(classes), 5)
    assert [e.label for e in split.train] == sorted(e.label for e in split.train)
    assert len(set(split.train)) == 5 * classes
    assert len(split.test) == len(set(split.test)) == 12


def test_split_is_seeded():
    task = numbered(test=20)
    assert few_shot(task, 4, 8, 1) == few_shot(task, 4, 8, 1)
    assert len({few_shot(task, 4, 8, seed).train for seed in range(5)}) == 5


def test_test_examples_of_their_own_split_are_the_same_for_all_seeds():
    task = numbered(test=20)
    drawn = {few_shot(task, 4, 8, seed).test for seed in range(5)}
    assert len(drawn) == 1
    assert set(drawn.pop()) <= set(task.test)
    # A smaller test set is the beginning of a larger one.
    assert few_shot(task, 4, 8, 0).test == few_shot(task, 4, 12, 3).test[:8]


@pytest.mark.parametrize("seed", range(5))
def test_examples_of_one_file_are_drawn_once(seed):
    split = few_shot(numbered(20), 4, 100, seed)
    assert not set(split.train) & set(split.test)
    assert len(split.test) == 20 - 8


def test_test_examples_come_from_the_test_split():
    task = numbered(20, test=30)
    assert set(few_shot(task, 4, 100, 0).test) == set(task.test)


@pytest.mark.parametrize(
    ("shots", "test_size", "message"),
    [
        (11, 5, "label 'a' .* has 10 examples, fewer than shots=11. Lower --shots"),
        (10, 5, "no examples left to test on after shots=10"),
        (0, 5, "shots=0 .* at least 1"),
        (5, 0, "test_size=0 .* at least 1"),
    ],
)
def test_refused_splits(shots, test_size, message):
    with pytest.raises(TaskError, match=message):
        few_shot(numbered(20), shots, test_size, 0)
