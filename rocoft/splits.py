"""Splits of a task: which examples are learnt, which choose, which are tested on.

`lmbff_split` draws as the studies of LM-BFF (Gao, Fisch and Chen 2021) and of the
kernel view of fine-tuning (Malladi et al. 2023) do, so that scores can be laid beside
theirs; `few_shot` and `full_split` serve any task, with test examples or without.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

from rocoft.tasks import LMBFF_FILE, LMBFF_SHOTS, Example, FewShotRows, Task, TaskError

LMBFF_TEST_SEED = 42
"""Of the draw of test examples where there are more than wanted, for every split."""


@dataclass(frozen=True)
class Split:
    """Examples of a task to train on, to choose by (if any) and to test on.

    Attributes:
        task: Whose examples they are.
        train: To train on.
        test: To test on.
        seed: Of the draw.
        dev: To choose hyperparameters by.
        notes: What the split lacks of what was asked for.
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
    """Draw training examples of every label and test examples.

    Args:
        task: The task.
        shots: Training examples of each label.
        test_size: Most test examples.
        seed: Of the training examples. Test examples that come from a split of their
            own are the same for all seeds.
        dev_shots: Examples of each label to choose hyperparameters by, as LM-BFF
            draws them: other ones, as many as ``shots``.

    Returns:
        The split; training examples label by label.

    Raises:
        TaskError: If a label has too few examples, or none are left to test on.
    """
    if shots < 1 or test_size < 1:
        raise TaskError(f"shots={shots} and test_size={test_size} must be at least 1.")
    if task.regression:
        raise TaskError(
            f"task {task.name!r} is a regression: it has no labels of which to draw "
            f"shots={shots}. Use all its examples."
        )
    order = np.random.default_rng(seed).permutation(len(task.train))
    chosen: list[int] = []
    dev: list[int] = []
    for label, name in enumerate(task.labels):
        own = [int(i) for i in order if task.train[i].label == label]
        if len(own) < shots + dev_shots:
            extra = f" and dev_shots={dev_shots}" if dev_shots else ""
            raise TaskError(
                f"label {name!r} of task {task.name!r} has {len(own)} examples, fewer "
                f"than shots={shots}{extra}. Lower --shots or add examples."
            )
        chosen += own[:shots]
        dev += own[shots : shots + dev_shots]
    pool = _test_pool(task)
    if not task.test:
        taken = {*chosen, *dev}
        pool = [task.train[int(i)] for i in order if int(i) not in taken]
    if not pool:
        raise TaskError(
            f"task {task.name!r} has no examples left to test on after shots={shots}. "
            "Lower --shots or add examples."
        )
    train, held = (tuple(task.train[i] for i in some) for some in (chosen, dev))
    return Split(task, train, tuple(pool[:test_size]), seed, held)


def lmbff_split(task: Task, shots: int, seed: int, *, test_size: int = 1000) -> Split:
    """Take the few-shot split that LM-BFF published, or draw one by its rule.

    With 16 shots and a seed of `Task.published` the split has the published rows in
    the published order. Otherwise the training examples are shuffled by NumPy's legacy
    generator; of each label the first ``shots`` are trained on and the next ``shots``
    choose hyperparameters, fewer where the label has no more. Labels stand in the
    order in which the shuffle meets them.

    Args:
        task: The task, with test examples of its own.
        shots: Training examples of each label, and as many dev examples.
        seed: Of the shuffle; those of LM-BFF are 13, 21, 42, 87 and 100.
        test_size: Most test examples. More are cut to a draw that is the same for all
            seeds and shots.

    Returns:
        The split. Its notes say which labels have fewer examples than was asked for or
        none among the drawn test examples, and how many published rows come twice.

    Raises:
        TaskError: If a label has fewer than ``shots + 1`` training examples or no test
            examples, if a regression has no such split published, or if an argument is
            out of its range.

    Source:
        ``tools/generate_k_shot_data.py`` of LM-BFF (Gao, Fisch and Chen 2021), and for
        the test examples that of Malladi et al. (2023), mode ``k-shot-1k-test``.
    """
    if shots < 1 or test_size < 1:
        raise TaskError(f"shots={shots} and test_size={test_size} must be at least 1.")
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
    train, dev = (tuple(task.train[i] for i in some) for some in rows)
    return Split(task, train, test, seed, dev, _notes(task, shots, rows, test))


def full_split(
    task: Task, *, seed: int, dev_share: float = 0.1, test_size: int | None = None
) -> Split:
    """Take all of a task's examples, some of the training ones to choose by.

    Args:
        task: The task. If it has no test examples of its own, a fifth of all is drawn
            for the test, the same for all seeds.
        seed: Of the draw of the dev examples.
        dev_share: Share of the training examples that becomes dev examples, of each
            label in proportion.
        test_size: Most test examples; None means all.

    Returns:
        The split; the three parts are disjoint.

    Raises:
        TaskError: If a part would be empty.
    """
    train, test = list(task.train), _test_pool(task)
    if not test:
        train, test = _parted(task, train, 0.2, 0)
    train, dev = _parted(task, train, dev_share, seed)
    return Split(task, tuple(train), tuple(test[:test_size]), seed, tuple(dev))


def _test_pool(task: Task) -> list[Example]:
    """Return the task's own test examples, in an order that is the same always."""
    fixed = np.random.default_rng(0).permutation(len(task.test))
    return [task.test[int(i)] for i in fixed]


def _parted(
    task: Task, examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw a share of the examples, of each label in proportion; return both parts."""
    try:
        rest, drawn = train_test_split(
            examples,
            test_size=share,
            random_state=seed,
            stratify=None if task.regression else [e.label for e in examples],
        )
    except ValueError as error:
        raise TaskError(
            f"the {len(examples)} examples of task {task.name!r} cannot be parted, "
            f"{share:g} of them to choose or test by: {str(error).rstrip('.')}. Add "
            "examples."
        ) from None
    return rest, drawn


def _lmbff_rows(task: Task, shots: int, seed: int) -> FewShotRows:
    if task.regression:
        seeds = ", ".join(map(str, task.published))
        way = (
            f"Take a published split, shots={LMBFF_SHOTS} and a seed of {seeds}"
            if seeds
            else f"Add {LMBFF_FILE}, its published splits, or take full_split"
        )
        raise TaskError(
            f"task {task.name!r} is a regression: it has no labels of which to draw "
            f"shots={shots} with seed={seed}. {way}."
        )
    own: dict[int | float, list[int]] = {}
    for row in np.random.RandomState(seed).permutation(len(task.train)).tolist():
        own.setdefault(task.train[row].label, []).append(row)
    for label, name in enumerate(task.labels):
        if (count := len(own.get(label, ()))) <= shots:
            raise TaskError(
                f"label {name!r} of task {task.name!r} has {count} training examples; "
                f"shots={shots} needs {shots} to train on and at least one more to "
                "choose hyperparameters by. Lower --shots or add examples."
            )
    return FewShotRows(
        tuple(row for rows in own.values() for row in rows[:shots]),
        tuple(row for rows in own.values() for row in rows[shots : 2 * shots]),
    )


def _lmbff_test(task: Task, size: int) -> tuple[Example, ...]:
    """Return the task's test examples in their order, or a fixed draw of some."""
    if not task.test:
        raise TaskError(
            f"task {task.name!r} has no test examples of its own, where LM-BFF's "
            "splits have theirs from. Add a test.jsonl beside its train.jsonl and read "
            "them with --data-dir, or draw with few_shot."
        )
    held = {example.label for example in task.test}
    absent = [name for label, name in enumerate(task.labels) if label not in held]
    if absent and not task.regression:
        raise TaskError(
            f"task {task.name!r} has no test example of label "
            f"{', '.join(map(repr, absent))}: no score would tell how well it is "
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
    for part, some in (("training", rows.train), ("dev", rows.dev)):
        counts = Counter(task.train[row].label for row in some)
        notes += [
            f"label {name!r} has {counts[label]} {part} examples, not {shots}"
            for label, name in names
            if counts[label] != shots
        ]
        if (different := len(set(some))) < len(some):
            notes.append(f"{different} of {len(some)} {part} examples are distinct")
    if shared := len({*rows.train} & {*rows.dev}):
        notes.append(f"{shared} of {len(rows.dev)} dev examples are training examples")
    counts = Counter(example.label for example in test)
    notes += [
        f"label {name!r} has none of the {len(test)} test examples"
        for label, name in names
        if not counts[label]
    ]
    return tuple(notes)
