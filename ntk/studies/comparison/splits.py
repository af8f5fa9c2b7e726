"""One record of several splits: their means, and which test examples were right.

Spectra, heatmaps and kernels are those of the first split.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]

AVERAGED = ("distance", "body_distance", "spectrum", "alignment")
"""Scalar measures of a space."""


def over_splits(records: Sequence[Record], *, same_test: bool) -> Record:
    """Join the records of several splits.

    Args:
        records: One record for each split, of the same spaces.
        same_test: Whether the splits share the test examples.

    Returns:
        The first record with the means over the splits of measures and accuracies;
        ``"correct"`` of a classifier has one list for each split, and ``"splits"`` says
        how many there are and whether they share the test examples.
    """
    joined = copy.deepcopy(records[0])
    for i, entry in enumerate(joined["spaces"]):
        others = [record["spaces"][i] for record in records]
        for name in AVERAGED:
            entry[name] = _mean([other[name] for other in others])
        for kind, scores in entry["classifiers"].items():
            if scores is not None:
                each = [other["classifiers"][kind] for other in others]
                scores["accuracy"] = _mean([one["accuracy"] for one in each])
                scores["correct"] = [row for one in each for row in one["correct"]]
    for name in ("f0", "random", "shuffled"):
        joined[name] = _mean([record[name] for record in records])
    for name in joined["timing"]:
        joined["timing"][name] = sum(record["timing"][name] for record in records)
    joined["splits"] = {
        "count": len(records),
        "seeds": [record["task"]["seed"] for record in records],
        "same_test": same_test,
    }
    return joined


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of each number of records of one shape; others as in the first.

    A value that one record lacks, such as an undefined distance, is lacking.
    """
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, dict):
        return {name: _mean([value[name] for value in values]) for name in first}
    if isinstance(first, list):
        return [_mean(parts) for parts in zip(*values, strict=True)]
    if isinstance(first, float):
        return float(np.mean(values))
    return first
