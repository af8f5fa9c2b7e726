"""Splits of a task into training, dev and test examples.

`lmbff_split` draws the splits of LM-BFF (Gao, Fisch and Chen 2021) and of the kernel
view of fine-tuning (Malladi et al. 2023), so that scores are comparable with theirs.
`few_shot` and `full_split` are for any task, with or without test examples.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.model_selection import StratifiedKFold, train_test_split

from rocoft.data.tasks import (
    LMBFF_FILE,
    LMBFF_SHOTS,
    Example,
    FewShotRows,
    Task,
)
from rocoft.data.templates import TaskError

LMBFF_TEST_SEED = 42
"""Seed of the draw of test examples where there are more than asked for."""


@dataclass(frozen=True)
class Split:
    """Training, dev (if any) and test examples of a task.

    Attributes:
        task: The task.
        train: Examples to train on.
        test: Examples to test on.
        seed: Seed of the draw.
        dev: Examples to choose hyperparameters by.
        notes: Differences from what was asked for, in words.
    """

    task: Task
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    seed: int
    dev: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()


def few_shot(
    task: Task, shots: int, test_size: int, seed: int, *, dev_shots: int = 0
) -> Split:
    """Draw training and dev examples of every label, and test examples.

    Args:
        task: The task.
        shots: Number of training examples of each label.
        test_size: Maximum number of test examples.
        seed: Seed of the training and dev examples. Test examples are the same for all
            seeds if the task has its own.
        dev_shots: Number of dev examples of each label, disjoint from the training
            examples; LM-BFF draws as many as ``shots``.

    Returns:
        The split; training examples are ordered by label.

    Raises:
        TaskError: If a label has too few examples, or none are left to test on.
    """
    _check_sizes(shots, test_size)
    if task.regression:
        raise TaskError(
            f"task {task.name!r} is a regression: it has no labels of which to draw "
            f"shots={shots}. Use all its examples."
        )
    order = np.random.default_rng(seed).permutation(len(task.train))
    train: list[int] = []
    dev: list[int] = []
    for label, name in enumerate(task.labels):
        rows = [int(i) for i in order if task.train[i].label == label]
        if len(rows) < shots + dev_shots:
            extra = f" and dev_shots={dev_shots}" if dev_shots else ""
            raise TaskError(
                f"label {name!r} of task {task.name!r} has {len(rows)} examples, fewer "
                f"than shots={shots}{extra}. Lower --shots or add examples."
            )
        train += rows[:shots]
        dev += rows[shots : shots + dev_shots]
    pool = _test_pool(task)
    if not task.test:
        drawn = {*train, *dev}
        pool = [task.train[int(i)] for i in order if int(i) not in drawn]
    if not pool:
        raise TaskError(
            f"task {task.name!r} has no examples left to test on after shots={shots}. "
            "Lower --shots or add examples."
        )
    return Split(
        task=task,
        train=tuple(task.train[i] for i in train),
        dev=tuple(task.train[i] for i in dev),
        test=tuple(pool[:test_size]),
        seed=seed,
    )


def lmbff_split(task: Task, shots: int, seed: int, *, test_size: int = 1000) -> Split:
    """Return the few-shot split that LM-BFF published, or draw one by its rule.

    With 16 shots and a seed in `Task.published`, the split has the published rows in
    the published order. Otherwise NumPy's legacy generator shuffles the training
    examples. The first ``shots`` examples of each label are trained on and the next
    ``shots`` (or fewer, if there are no more) are dev examples. Labels are in the order
    of their first examples in the shuffle.

    Args:
        task: The task, with its own test examples.
        shots: Number of training examples of each label, and of dev examples.
        seed: Seed of the shuffle; LM-BFF's are 13, 21, 42, 87 and 100.
        test_size: Maximum number of test examples. If there are more, the same ones are
            drawn for all seeds and shots.

    Returns:
        The split. Its notes name labels with fewer examples than asked for or without
        test examples, and count repeated published rows.

    Raises:
        TaskError: If a label has fewer than ``shots + 1`` training examples or no test
            examples, if a regression has no such published split, or if an argument is
            out of range.

    Source:
        ``tools/generate_k_shot_data.py`` of LM-BFF (Gao, Fisch and Chen 2021), and for
        the test examples that of Malladi et al. (2023), mode ``k-shot-1k-test``.
    """
    _check_sizes(shots, test_size)
    if not 0 <= seed < 2**32:
        raise TaskError(
            f"seed={seed} must be from 0 to 2**32 - 1, the seeds of NumPy's legacy "
            "generator."
        )
    if shots == LMBFF_SHOTS and seed in task.published:
        rows = task.published[seed]
    else:
        rows = _lmbff_rows(task, shots, seed)
    test = _lmbff_test(task, test_size)
    return Split(
        task=task,
        train=tuple(task.train[i] for i in rows.train),
        dev=tuple(task.train[i] for i in rows.dev),
        test=test,
        seed=seed,
        notes=_notes(task, shots, rows, test),
    )


def full_split(
    task: Task, *, seed: int, dev_share: float = 0.1, test_size: int | None = None
) -> Split:
    """Use all examples of a task; a share of the training examples becomes dev.

    Args:
        task: The task. If it has no test examples, a fifth of all examples is drawn,
            the same for all seeds.
        seed: Seed of the dev examples.
        dev_share: Share of the training examples that becomes dev examples, stratified
            by label.
        test_size: Maximum number of test examples; None means all.

    Returns:
        The split; its three parts are disjoint.

    Raises:
        TaskError: If a part would be empty.
    """
    train, test = list(task.train), _test_pool(task)
    if not test:
        train, test = _stratified(task, train, 0.2, 0)
    train, dev = _stratified(task, train, dev_share, seed)
    return Split(task, tuple(train), tuple(test[:test_size]), seed, tuple(dev))


def stratified_folds(
    split: Split, count: int = 2, seed: int | None = None
) -> list[tuple[int, ...]]:
    """Part the training examples into folds with the same share of every label.

    Args:
        split: The split; its labels are classes.
        count: Number of folds, 2 or more.
        seed: Seed of the draw; None means the split's.

    Returns:
        The indices of the training examples of each fold, ascending.

    Raises:
        TaskError: If there are fewer than two folds, or a label has fewer training
            examples than there are folds.

    >>> from rocoft.data import few_shot, load_task
    >>> split = few_shot(load_task("reviews"), 4, 8, 0)
    >>> [len(fold) for fold in stratified_folds(split)]
    [4, 4]
    """
    labels = np.array([example.label for example in split.train])
    counts = Counter(labels.tolist())
    if count < 2:
        raise TaskError(f"folds={count}; expected 2 folds or more.")
    for label, name in enumerate(split.task.labels):
        if counts[label] < count:
            raise TaskError(
                f"label {name!r} of task {split.task.name!r} has {counts[label]} "
                f"training examples, fewer than folds={count}, so that a fold would "
                "lack it. Raise --shots, or take a head that sees no labels "
                "(--head-init random)."
            )
    folds = StratifiedKFold(
        count, shuffle=True, random_state=split.seed if seed is None else seed
    )
    return [tuple(held.tolist()) for _, held in folds.split(labels, labels)]


def _check_sizes(shots: int, test_size: int) -> None:
    if shots < 1 or test_size < 1:
        raise TaskError(f"shots={shots} and test_size={test_size} must be at least 1.")


def with_test(task: Task) -> Task:
    """Give a task without test examples a fifth of its examples, the same always.

    Args:
        task: The task.

    Returns:
        The task; one with test examples of its own as it is.
    """
    if task.test:
        return task
    train, test = _stratified(task, task.train, 0.2, 0)
    return replace(task, train=tuple(train), test=tuple(test))


def _test_pool(task: Task) -> list[Example]:
    """Return the task's test examples in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(task.test))
    return [task.test[int(i)] for i in order]


def _stratified(
    task: Task, examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw a share of the examples, stratified by label; return the rest and these."""
    try:
        rest, drawn = train_test_split(
            examples,
            test_size=share,
            random_state=seed,
            stratify=None if task.regression else [e.label for e in examples],
        )
    except ValueError as error:
        raise TaskError(
            f"no share of {share:g} can be drawn from the {len(examples)} examples of "
            f"task {task.name!r} for dev or test: {str(error).rstrip('.')}. Add "
            "examples."
        ) from None
    return rest, drawn


def _lmbff_rows(task: Task, shots: int, seed: int) -> FewShotRows:
    if task.regression:
        seeds = ", ".join(map(str, task.published))
        advice = (
            f"Take a published split, shots={LMBFF_SHOTS} and a seed of {seeds}"
            if seeds
            else f"Add {LMBFF_FILE}, its published splits, or take full_split"
        )
        raise TaskError(
            f"task {task.name!r} is a regression: it has no labels of which to draw "
            f"shots={shots} with seed={seed}. {advice}."
        )
    by_label: dict[int | float, list[int]] = {}
    for row in np.random.RandomState(seed).permutation(len(task.train)).tolist():
        by_label.setdefault(task.train[row].label, []).append(row)
    for label, name in enumerate(task.labels):
        if (count := len(by_label.get(label, ()))) <= shots:
            raise TaskError(
                f"label {name!r} of task {task.name!r} has {count} training examples; "
                f"shots={shots} needs {shots} to train on and at least one more to "
                "choose hyperparameters by. Lower --shots or add examples."
            )
    return FewShotRows(
        tuple(row for rows in by_label.values() for row in rows[:shots]),
        tuple(row for rows in by_label.values() for row in rows[shots : 2 * shots]),
    )


def _lmbff_test(task: Task, size: int) -> tuple[Example, ...]:
    """Return the task's test examples in order, or a fixed draw of ``size``."""
    if not task.test:
        raise TaskError(
            f"task {task.name!r} has no test examples of its own, which LM-BFF's "
            "splits need. Add a test.jsonl beside its train.jsonl and read them with "
            "--data-dir, or draw with few_shot."
        )
    present = {example.label for example in task.test}
    absent = [name for label, name in enumerate(task.labels) if label not in present]
    if absent and not task.regression:
        raise TaskError(
            f"task {task.name!r} has no test example of label "
            f"{', '.join(map(repr, absent))}: no score would show how well it is "
            "recognised. Add some, or remove the label from the training examples."
        )
    if len(task.test) <= size:
        return task.test
    order = np.random.RandomState(LMBFF_TEST_SEED).permutation(len(task.test))
    return tuple(task.test[i] for i in order[:size].tolist())


def _notes(
    task: Task, shots: int, rows: FewShotRows, test: Sequence[Example]
) -> tuple[str, ...]:
    names = () if task.regression else tuple(enumerate(task.labels))
    notes: list[str] = []
    for part, part_rows in (("training", rows.train), ("dev", rows.dev)):
        counts = Counter(task.train[row].label for row in part_rows)
        notes += [
            f"label {name!r} has {counts[label]} {part} examples, not {shots}"
            for label, name in names
            if counts[label] != shots
        ]
        if (distinct := len(set(part_rows))) < len(part_rows):
            notes.append(f"{distinct} of {len(part_rows)} {part} examples are distinct")
    if shared := len({*rows.train} & {*rows.dev}):
        notes.append(f"{shared} of {len(rows.dev)} dev examples are training examples")
    counts = Counter(example.label for example in test)
    notes += [
        f"label {name!r} has none of the {len(test)} test examples"
        for label, name in names
        if not counts[label]
    ]
    return tuple(notes)
