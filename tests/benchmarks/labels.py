"""Whether internal scores are honest: permuted labels, and accuracy on new examples.

On each task, `ntk.compare` under a head that was fitted to the training examples:

- with permuted training labels every internal score (out-of-fold accuracies, and
  alignment against its permutations within folds) should be chance within three
  standard errors, on the mean over permutations;
- with the labels as they are the out-of-fold accuracy of the full kernel should be the
  accuracy on fresh examples within two standard errors of their difference. It is that
  of half the training examples, so it may be a little lower.

The leave-one-out accuracy, which the head has seen the labels of, is shown beside.

    python -m tests.benchmarks.labels --data-dir DIR --output figures/labels.json
"""

import argparse
import json
import math
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from ntk import Full, Head, KernelRidgeClassifier, Rows, empirical_ntk
from ntk.classifiers import cross_fit
from ntk.measures import distance
from ntk.studies.encoding import encode_split
from ntk.studies.folds import held_out
from rocoft.data import lmbff_split, load_task
from rocoft.models import load_backbone

TASKS = (
    *("sst2", "mr", "cr", "mpqa", "subj", "qqp", "mrpc", "rte", "qnli"),
    *("trec", "sst5", "ag_news", "snli", "mnli"),
)
KINDS = ("ridge", "logistic", "svm")
SPACES = {"full": Full(), "rows:3": Rows(3) + Head()}


def accuracy(outputs, labels):
    """Return the share of labels with the largest output."""
    return float((outputs.argmax(axis=1) == labels).mean())


class Scored:
    """A split, its folds and what is measured on them with labels."""

    def __init__(self, backbone, split):
        self.split = replace(split, dev=(), test=())
        self.labels = np.array([example.label for example in split.train])
        data = encode_split(backbone, self.split, 32, "cpu")
        self.folds = held_out(
            *(backbone, self.split, data),
            lambda train: empirical_ntk(
                backbone.module, train.batches, space=SPACES, reduce="contrast"
            ),
        )

    def accuracies(self, space):
        """Return the out-of-fold accuracy of each classifier."""
        folds = [fold.fold(fold.kernels[space]) for fold in self.folds]
        return {
            kind: cross_fit(folds, self.labels, judge=accuracy, method=kind).score
            for kind in KINDS
        }

    def from_chance(self):
        """Return the differences of all internal scores from chance."""
        c = len(self.split.task.labels)
        scores = {}
        for space in SPACES:
            for kind, score in self.accuracies(space).items():
                scores[f"{space} {kind}"] = score - 1 / c
            scores[f"{space} alignment"] = statistics.mean(
                self._alignment(fold, space, c) for fold in self.folds
            )
        return scores

    def _alignment(self, fold, space, c):
        kernel = fold.unseen(space).diagonal(dim1=2, dim2=3).sum(-1).numpy()
        targets = np.eye(c)[self.labels[list(fold.held)]] - 1 / c
        null = distance.permutation_alignment(kernel, targets, seed=0, draws=200)
        return null.observed - null.mean


def permuted(split, seed):
    """Return the split with permuted training labels."""
    labels = np.random.default_rng(seed).permutation([e.label for e in split.train])
    train = tuple(
        replace(example, label=int(label))
        for example, label in zip(split.train, labels, strict=True)
    )
    return replace(split, train=train)


def chance_errors(each):
    """Return the distances of mean internal scores from chance, in standard errors.

    The errors are those of the mean over permutations, by their own spread: scores of
    one permutation are no independent trials, because its examples share a classifier.
    """
    distances = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        error = statistics.stdev(values) / math.sqrt(len(values))
        distances[name] = statistics.mean(values) / error
    return distances


def measured(name, data_dir, seed, size, permutations):
    """Return what is measured on one task."""
    task = load_task(name, data_dir)
    split = lmbff_split(task, 16, seed, test_size=size)
    backbone = load_backbone(None, split)
    chance = chance_errors(
        [
            Scored(backbone, permuted(split, s)).from_chance()
            for s in range(permutations)
        ]
    )
    worst = max(chance, key=lambda score: abs(chance[score]))
    scored = Scored(backbone, split)
    data = encode_split(backbone, replace(split, dev=()), 32, "cpu")
    kernel = data.in_split_order(
        empirical_ntk(
            backbone.module,
            data.batches,
            data.batches[: data.train_batches],
            space=Full(),
            reduce="contrast",
        )
    ).numpy()
    n, m = len(split.train), len(split.test)
    machine = KernelRidgeClassifier().fit(kernel[:n], scored.labels)
    p, q = (
        scored.accuracies("full")["ridge"],
        machine.score(kernel[n:], data.labels[n:]),
    )
    error = math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    return {
        "task": name,
        "out_of_fold": p,
        "fresh": q,
        "standard_error": error,
        "within_two": abs(p - q) <= 2 * error,
        "leave_one_out": machine.loo_accuracy_,
        "permuted_worst": {"score": worst, "standard_errors": chance[worst]},
        "permuted_within_three": abs(chance[worst]) <= 3,
    }


def main():
    """Measure all tasks, print a line for each and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--permutations", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    settings = {
        name: getattr(options, name) for name in ("seed", "test_size", "permutations")
    }
    kept = earlier(options.output, settings)
    rows = []
    for name in options.tasks:
        row = kept.get(name) or measured(name, options.data_dir, *settings.values())
        rows.append(row)
        write(options.output, settings, rows)
        print(  # noqa: T201
            f"{name:8} out of fold {100 * row['out_of_fold']:5.1f} %, fresh "
            f"{100 * row['fresh']:5.1f} % (se {100 * row['standard_error']:.1f}), "
            f"leave-one-out {100 * row['leave_one_out']:5.1f} %; permuted: "
            f"{row['permuted_worst']['standard_errors']:+.1f} se "
            f"({row['permuted_worst']['score']})",
            flush=True,
        )
    result = summary(settings, rows)
    print(  # noqa: T201
        f"{result['within_two']} of {len(rows)} tasks within two standard errors, "
        f"{result['permuted_within_three']} with permuted labels at chance"
    )


def earlier(file, settings):
    """Return the rows of an earlier run with these settings, by task."""
    if file is None or not file.is_file():
        return {}
    result = json.loads(file.read_text(encoding="utf-8"))
    if result.get("settings") != settings:
        return {}
    return {row["task"]: row for row in result["tasks"]}


def summary(settings, rows):
    """Return what is written."""
    return {
        "command": "python -m tests.benchmarks.labels " + " ".join(sys.argv[1:]),
        "model": "MiniLM-L6",
        "settings": settings,
        "within_two": sum(row["within_two"] for row in rows),
        "permuted_within_three": sum(row["permuted_within_three"] for row in rows),
        "tasks": rows,
    }


def write(file, settings, rows):
    """Write what is measured so far; the same command goes on from there."""
    if file is not None:
        text = json.dumps(summary(settings, rows), indent=1) + "\n"
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
