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

from ntk.scale import Resources, kernels
from ntk.spaces import Rows
from ntk.studies.comparison.record import evaluate, fold_kernels
from ntk.studies.comparison.subject import Comparison
from rocoft.data import lmbff_split, load_task
from rocoft.models import load_backbone

TASKS = (
    *("sst2", "sst5", "mr", "cr", "mpqa", "subj", "trec", "ag_news"),
    *("mnli", "snli", "qnli", "rte", "mrpc", "qqp"),
)
PERMUTATIONS = 10
"""Permutations of the training labels, whose scores are averaged."""
KINDS = ("ridge", "logistic", "svm")


def record_of(split, *, folds=True):
    """Return the record of a comparison of rows 3 with the full kernel."""
    backbone = load_backbone(None, split)
    compared = Comparison.of(backbone, split, [Rows(3)])
    computation = kernels(compared.work)
    held = fold_kernels(compared, Resources()) if folds else None
    return evaluate(compared, computation, folds=held).record


def permuted(split, seed):
    """Return the split with permuted training labels and few test examples."""
    labels = np.random.default_rng(seed).permutation(
        [example.label for example in split.train]
    )
    train = tuple(
        replace(example, label=int(label))
        for example, label in zip(split.train, labels, strict=True)
    )
    return replace(split, train=train, test=split.test[:2])


def chance_errors(records):
    """Return the distances of internal scores from chance, in standard errors.

    The errors are those of the mean over permutations, by their own spread: scores of
    one permutation are no independent trials, because its examples share a classifier.
    """
    each = [_from_chance(record) for record in records]
    distances = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        error = statistics.stdev(values) / math.sqrt(len(values))
        distances[name] = statistics.mean(values) / error
    return distances


def _from_chance(record):
    """Return the differences of internal scores from chance."""
    scores = {}
    for entry in record["spaces"]:
        for kind in KINDS:
            score = entry["classifiers"][kind]["selection"]
            scores[f"{entry['label']} {kind}"] = score - 1 / record["task"]["outputs"]
        a = entry["alignment"]
        scores[f"{entry['label']} alignment"] = a["value"] - a["null_mean"]
    return scores


def measured(name, data_dir, seed, size):
    """Return what is measured on one task."""
    task = load_task(name, data_dir)
    split = replace(lmbff_split(task, 16, seed, test_size=size), dev=())
    record = record_of(split)
    full = record["spaces"][0]["classifiers"]["ridge"]
    p, q, n, m = full["selection"], full["accuracy"], len(split.train), len(split.test)
    error = math.sqrt(p * (1 - p) / n + q * (1 - q) / m)
    leaking = record_of(replace(split, test=split.test[:2]), folds=False)
    chance = chance_errors(
        [record_of(permuted(split, seed)) for seed in range(PERMUTATIONS)]
    )
    worst = max(chance, key=lambda score: abs(chance[score]))
    return {
        "task": name,
        "out_of_fold": p,
        "fresh": q,
        "standard_error": error,
        "within_two": abs(p - q) <= 2 * error,
        "leave_one_out": leaking["spaces"][0]["classifiers"]["ridge"]["selection"],
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
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.tasks:
        row = measured(name, options.data_dir, options.seed, options.test_size)
        rows.append(row)
        print(  # noqa: T201
            f"{name:8} out of fold {100 * row['out_of_fold']:5.1f} %, fresh "
            f"{100 * row['fresh']:5.1f} % (se {100 * row['standard_error']:.1f}), "
            f"leave-one-out {100 * row['leave_one_out']:5.1f} %; permuted: "
            f"{row['permuted_worst']['standard_errors']:+.1f} se "
            f"({row['permuted_worst']['score']})",
            flush=True,
        )
    result = {
        "command": "python -m tests.benchmarks.labels " + " ".join(sys.argv[1:]),
        "model": "MiniLM-L6",
        "within_two": sum(row["within_two"] for row in rows),
        "permuted_within_three": sum(row["permuted_within_three"] for row in rows),
        "tasks": rows,
    }
    print(  # noqa: T201
        f"{result['within_two']} of {len(rows)} tasks within two standard errors, "
        f"{result['permuted_within_three']} with permuted labels at chance"
    )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
