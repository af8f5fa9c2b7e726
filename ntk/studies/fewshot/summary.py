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
    ratio_across,
    results,
    score,
    select,
    spread,
    spreads,
)
from ntk.scale import StorageError
from ntk.studies.fewshot.against_tuning import AGREEMENTS, compare, score_of_f0
from ntk.studies.fewshot.reliability import reliability
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
from ntk.studies.tuned import rate_end

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
HEAD = "head"
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
        `ntk.reporting.scores`. What follows from them is that of `derived`.

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
    summary = {
        **overview([key for key, _ in records], there, command, settings),
        "kinds": [kind for kind in KINDS if any(at[2] == kind for at in kernels)],
        "spaces": _subjects(kernels),
        "methods": _subjects(tuned),
        "tasks": _tasks(there),
        "splits": _splits(there),
        **rows,
        **derived(rows),
    }
    return rounded(summary)


def derived(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Return the parts of a summary that follow from its other rows.

    Args:
        rows: ``kernels``, ``tuned`` and ``comparisons`` of a summary.

    Returns:
        ``over_tasks``, means of these over tasks; a ratio there is that of the means of
        its terms, with the standard error of the jackknife over tasks. ``reliability``
        (`reliability.reliability`) by shots, of all methods and of those but the head.
        ``answers``: for the full kernel and full fine-tuning the recovery, the ratio of
        f0 to fine-tuning and that of the kernel, and the difference in points between a
        few rows and the full kernel.
    """
    over_tasks = _over_tasks(rows)
    return {
        "over_tasks": over_tasks,
        "reliability": [
            {"shots": shots, **row}
            for shots in sorted({row["shots"] for row in rows["tuned"]})
            for row in _reliabilities(select(rows["tuned"], shots=shots))
        ],
        "answers": _answers(over_tasks),
    }


def _reliabilities(tuned: Sequence[Row]) -> list[Row]:
    """Return the reliability of all methods, and without the head if there is one."""
    found = [reliability(tuned)]
    if any(row["method"] == HEAD for row in tuned):
        found.append(reliability(tuned, without=[HEAD]))
    return [row for row in found if row is not None]


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
        "rates_at_end": _rate_ends(records),
        "steps": [record["steps"] for record in records],
        "points_to_full": _points_to_full(by_seed, full),
        "kernel_change": spreads(
            (record.get("kernel_change") or {} for record in records), CHANGES
        ),
    }


def _rate_ends(by_seed: Sequence[Record]) -> list[str | None]:
    """Return for each seed the end of the grid at which its learning rate is.

    A rate that was chosen on another seed's split is alone in the grid of a record; old
    records do not say where it was there.
    """
    ends = [rate_end(record) for record in by_seed]
    searched = {
        record["learning_rate"]: end
        for record, end in zip(by_seed, ends, strict=True)
        if len(record.get("grid", {})) > 1
    }
    return [
        end if "rate_at_end" in record else searched.get(record["learning_rate"], end)
        for record, end in zip(by_seed, ends, strict=True)
    ]


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
    with_ratio = [row for row in rows if row["ratio"] is not None]
    ratios = [row["ratio"] for row in with_ratio]
    tested = [ratio for ratio in ratios if math.isfinite(ratio["p_value"])]
    return {
        "recovery": ratio_across(rows, "kernel", "tuned", less="f0"),
        "f0_ratio": ratio_across(rows, "f0", "tuned"),
        "ratio": ratio_across(with_ratio, "kernel", "tuned"),
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
        pair = select(over_tasks["comparisons"], **where, **full)
        few = select(over_tasks["kernels"], **where, space=FEW_ROWS)
        answers.append(
            {
                **where,
                "recovery_of_full": pair[0]["recovery"] if pair else None,
                "ratio_of_f0": pair[0]["f0_ratio"] if pair else None,
                "ratio_of_full": pair[0]["ratio"] if pair else None,
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
        rows.append(
            {
                "task": task,
                "shots": shots,
                "seeds": seeds,
                "train": of_seeds[0]["examples"][0],
                "dev": of_seeds[0]["examples"][1],
                "f0": spread(map(score_of_f0, of_seeds)),
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
