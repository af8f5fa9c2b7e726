"""The summary of a few-shot study: scores, comparisons and missing records.

The summary is plain JSON. It depends neither on the order of the records nor on times,
so an interrupted and resumed study has the same summary. Missing values are None and
are not imputed; every mean lists what it averages.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ntk.kernels import KINDS
from ntk.reporting import (
    CLASSIFIERS,
    Row,
    across,
    chosen,
    points,
    results,
    score,
    select,
    spread,
    spreads,
)
from ntk.scale import StorageError
from ntk.studies.fewshot.against_tuning import AGREEMENTS, agreement_of_seeds, compare
from ntk.studies.folder import Key, Record
from ntk.studies.order import (
    FINE_TUNING,
    KERNEL,
    order_of_key,
    order_of_kind,
    order_of_subject,
    same_parameters,
)
from ntk.studies.overview import overview, rounded

Place = tuple[str, int, str, str]
"""Task, shots, kind of kernel or `FINE_TUNING`, and space or method."""

Growth = dict[tuple[int, ...], dict[str, dict[int, dict[str, float]]]]
"""Values by all numbers of examples, then by space, number of examples and task."""

MEASURES = (
    *("distance.frobenius", "distance.frobenius_rescaled", "distance.cosine"),
    *("distance.cka", "distance.overlap", "distance.trace_ratio", "alignment"),
    *("spectrum.effective_dimension", "spectrum.entropy_rank"),
)
"""Measures of a kernel, also against the full one."""

CHANGES = (
    *("distance", "norm_ratio", "measures.frobenius", "measures.cka"),
    *("measures.overlap", "alignment_before", "alignment_after"),
)
"""Measures of the change of the full kernel by fine-tuning."""

FEW_ROWS = "rows:3"
SIGNIFICANT = 0.05


def collect(
    records: Sequence[tuple[Key, Record | None]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of a study.

    A kernel's score is that of the best classifier on dev, for each seed. It is
    compared with the method that trains the same parameters and with full fine-tuning,
    on their common seeds (`against_tuning.compare`).

    Args:
        records: Records in any order, None for missing ones. Every combination of
            split, seed and subject that occurs is expected.
        command: Command that computes the study.
        settings: Settings of the study, JSON values.

    Returns:
        ``splits`` (with the score of f0), ``kernels``, ``tuned`` and ``comparisons``
        are rows by task and shots, with spreads and means as in
        `ntk.reporting.scores`. ``over_tasks`` holds means of the last three.
        ``answers`` holds the mean ratio of the full kernel to full fine-tuning and
        the difference in points between a few rows and the full kernel.

    Raises:
        StorageError: If records of a task have different test examples.
    """
    there = [(key, record) for key, record in records if record is not None]
    there.sort(key=lambda pair: order_of_key(pair[0]))
    _check_examples(there)
    by_place: dict[Place, dict[int, Record]] = defaultdict(dict)
    for key, record in there:
        kind = key.kind.removeprefix(KERNEL)
        place = (key.cell.task, key.cell.shots, kind, key.subject)
        by_place[place][key.cell.seed] = record
    kernels = {at: seeds for at, seeds in by_place.items() if at[2] != FINE_TUNING}
    tuned = {at: seeds for at, seeds in by_place.items() if at[2] == FINE_TUNING}
    rows = {
        "kernels": [
            _kernel_row(at, by_seed, kernels.get((*at[:3], "full"), {}))
            for at, by_seed in kernels.items()
        ],
        "tuned": [
            _tuned_row(at, by_seed, tuned.get((*at[:3], "full"), {}))
            for at, by_seed in tuned.items()
        ],
        "comparisons": _comparisons(kernels, tuned),
    }
    over_tasks = _over_tasks(rows)
    summary = {
        **overview([key for key, _ in records], there, command, settings),
        "kinds": [kind for kind in KINDS if any(at[2] == kind for at in kernels)],
        "spaces": _subjects(kernels),
        "methods": _subjects(tuned),
        "tasks": _tasks(there),
        "splits": _splits(there),
        **rows,
        "over_tasks": over_tasks,
        "answers": _answers(over_tasks),
    }
    return rounded(summary)


def growth_by_sizes(rows: Iterable[Row]) -> Growth:
    """Return the distance to the full kernel by number of examples.

    Args:
        rows: Rows of kernels; the full kernel is left out.

    Returns:
        Means by the sequence of numbers of examples at which a task was measured, by
        space, number of examples and task.
    """
    groups: Growth = {}
    for row in rows:
        known = {p["size"]: p["mean"] for p in row["growth"] if p["mean"] is not None}
        if row["space"] == "full" or not known:
            continue
        curves = groups.setdefault(tuple(known), {}).setdefault(row["space"], {})
        for size, value in known.items():
            curves.setdefault(size, {})[row["task"]] = value
    return dict(sorted(groups.items(), key=lambda group: group[0][::-1]))


def _subjects(places: Iterable[Place]) -> list[str]:
    return sorted({subject for *_, subject in places}, key=order_of_subject)


def _kernel_row(
    at: Place, by_seed: Mapping[int, Record], full: Mapping[int, Record]
) -> Row:
    """Return the row of the kernels over one space."""
    records = list(by_seed.values())
    names = [
        name for name in CLASSIFIERS if any(name in r["classifiers"] for r in records)
    ]
    return {
        **dict(zip(("task", "shots", "kind", "space"), at, strict=True)),
        "seeds": list(by_seed),
        "parameters": records[-1]["parameters"],
        "share": records[-1]["share"],
        "test": spread(map(score, records)),
        "dev": spread(results(record)["dev"] for record in records),
        "chosen": [chosen(record) for record in records],
        "classifiers": {
            name: _classifier(
                [record["classifiers"].get(name, {}) for record in records],
                records[-1]["metric"],
            )
            for name in names
        },
        "points_to_full": _points_to_full(by_seed, full),
        "shuffled": spread((r.get("shuffled") or {}).get("ridge") for r in records),
        "measures": spreads(records, MEASURES),
        "growth": _growth([record.get("growth") or [] for record in records]),
    }


def _classifier(by_seed: Sequence[Record], metric: str) -> Row:
    return {
        "test": spread((result.get("test") or {}).get(metric) for result in by_seed),
        "regularisation": [result.get("regularisation") for result in by_seed],
        "offset_scale": [result.get("offset_scale") for result in by_seed],
    }


def _tuned_row(
    at: Place, by_seed: Mapping[int, Record], full: Mapping[int, Record]
) -> Row:
    """Return the row of fine-tuning by one method."""
    task, shots, _, method = at
    records = list(by_seed.values())
    return {
        "task": task,
        "shots": shots,
        "method": method,
        "seeds": list(by_seed),
        "parameters": records[-1]["parameters"],
        "test": spread(map(score, records)),
        "dev": spread((r["dev"] or {}).get(r["metric"]) for r in records),
        "learning_rates": [record["learning_rate"] for record in records],
        "steps": [record["steps"] for record in records],
        "points_to_full": _points_to_full(by_seed, full),
        "agreement_of_seeds": agreement_of_seeds(records),
        "kernel_change": spreads(
            (record.get("kernel_change") or {} for record in records), CHANGES
        ),
    }


def _points_to_full(by_seed: Mapping[int, Record], full: Mapping[int, Record]) -> Row:
    return spread(
        points(score(record), score(full.get(seed))) for seed, record in by_seed.items()
    )


def _comparisons(
    kernels: Mapping[Place, dict[int, Record]],
    tuned: Mapping[Place, dict[int, Record]],
) -> list[Row]:
    """Compare each space with the method of the same parameters and with full."""
    rows = []
    for at, by_seed in kernels.items():
        task, shots, kind, space = at
        for method in dict.fromkeys((same_parameters(space), "full")):
            others = tuned.get((task, shots, FINE_TUNING, method), {})
            if by_seed.keys() & others.keys():
                rows.append(
                    {
                        "task": task,
                        "shots": shots,
                        "kind": kind,
                        "space": space,
                        "method": method,
                        "same_parameters": method == same_parameters(space),
                        **compare(by_seed, others),
                    }
                )
    return rows


def _over_tasks(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return means over tasks and the number of tasks on which the 90 % rule holds."""
    over_tasks: dict[str, list[Row]] = {}
    for part, fields in (
        ("kernels", ("shots", "kind", "space")),
        ("tuned", ("shots", "method")),
        ("comparisons", ("shots", "kind", "space", "method", "same_parameters")),
    ):
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows[part]:
            groups[tuple(row[field] for field in fields)].append(row)
        means = _of_pair if part == "comparisons" else _of_scores
        over_tasks[part] = [
            dict(zip(fields, values, strict=True)) | means(groups[values])
            for values in sorted(groups, key=partial(_order_of_group, fields))
        ]
    return over_tasks


def _order_of_group(fields: Sequence[str], values: Sequence[Any]) -> list[Any]:
    orders = {
        "kind": lambda kind: order_of_kind(KERNEL + kind),
        "space": order_of_subject,
        "method": order_of_subject,
    }
    return [
        orders.get(field, int)(value)
        for field, value in zip(fields, values, strict=True)
    ]


def _of_scores(rows: Sequence[Row]) -> Row:
    """Return the means of one space or method over its tasks."""
    return {key: across(rows, key, "mean") for key in ("test", "points_to_full")}


def _of_pair(rows: Sequence[Row]) -> Row:
    """Return the means of one space and method over their tasks."""
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    tested = [ratio for ratio in ratios if math.isfinite(ratio["p_value"])]
    return {
        "ratio": across(rows, "ratio", "mean"),
        "reached": sum(ratio["reached"] for ratio in ratios),
        "tested": len(tested),
        "surely_reached": sum(ratio["p_value"] < SIGNIFICANT for ratio in tested),
        **{key: across(rows, key, "mean") for key in ("points", *AGREEMENTS)},
    }


def _answers(over_tasks: Mapping[str, list[Row]]) -> list[Row]:
    answers = []
    pairs = ((row["shots"], row["kind"]) for row in over_tasks["kernels"])
    for shots, kind in dict.fromkeys(pairs):
        where = {"shots": shots, "kind": kind}
        full = {"space": "full", "method": "full"}
        ratio = select(over_tasks["comparisons"], **where, **full)
        few = select(over_tasks["kernels"], **where, space=FEW_ROWS)
        answers.append(
            {
                **where,
                "ratio_of_full": ratio[0]["ratio"] if ratio else None,
                "few_rows": FEW_ROWS,
                "points_of_few_rows": few[0]["points_to_full"] if few else None,
            }
        )
    return answers


def _tasks(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    by_task = {key.cell.task: record for key, record in records}
    return [
        {
            "task": task,
            "metric": record["metric"],
            "labels": record["task_labels"],
            "readout": record["readout"],
            "test": len(record["labels"]),
        }
        for task, record in by_task.items()
    ]


def _splits(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    """Return sizes, seeds and the score of f0 by task and shots."""
    splits: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
    for key, record in records:
        # Kernel records come first; only they hold the score of f0.
        splits[key.cell.task, key.cell.shots].setdefault(key.cell.seed, record)
    rows = []
    for (task, shots), by_seed in splits.items():
        seeds = sorted(by_seed)
        of_seeds = [by_seed[seed] for seed in seeds]
        metric = of_seeds[0]["metric"]
        rows.append(
            {
                "task": task,
                "shots": shots,
                "seeds": seeds,
                "train": of_seeds[0]["examples"][0],
                "dev": of_seeds[0]["examples"][1],
                "f0": spread(
                    ((r.get("f0") or {}).get("test") or {}).get(metric)
                    for r in of_seeds
                ),
            }
        )
    return rows


def _growth(by_seed: Sequence[Sequence[Record]]) -> list[Row]:
    """Return a measure at each number of examples, as means over seeds."""
    points_at: dict[int, list[Record]] = defaultdict(list)
    for curve in by_seed:
        for point in curve:
            points_at[point["size"]].append(point)
    rows = []
    for size, at_size in sorted(points_at.items()):
        over_seeds = spread(point["mean"] for point in at_size)
        rows.append(
            {
                "size": size,
                "mean": over_seeds["mean"],
                "deviation": over_seeds["deviation"],
                "deviation_of_subsets": spread(p["std"] for p in at_size)["mean"],
            }
        )
    return rows


def _check_examples(records: Iterable[tuple[Key, Record]]) -> None:
    """Check that all records of a task have the same test examples."""
    first: dict[str, tuple[Key, Record]] = {}
    for key, record in records:
        first_key, other = first.setdefault(key.cell.task, (key, record))
        if any(other[f] != record[f] for f in ("labels", "task_labels", "metric")):
            raise StorageError(
                f"records {first_key.file!r} and {key.file!r} are of different test "
                f"examples of task {key.cell.task!r}: the data changed in between. "
                "Remove the older ones, or start another study with --name."
            )
