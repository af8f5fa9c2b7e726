"""Records of a study -> its summary: scores, comparisons, and what is missing.

The summary is plain JSON. It depends neither on the order of the records nor on any
time, so a study that was stopped and taken up again has the same one. What cannot be
computed is None; nothing is filled in, and every mean says what it is over.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ntk.kernel import KINDS
from ntk.storage import StorageError
from ntk.study import Key, Record
from ntk.study_comparison import AGREEMENTS, agreement_of_seeds, compare
from ntk.study_order import (
    FINE_TUNING,
    KERNEL,
    order_of_key,
    order_of_kind,
    order_of_subject,
    same_parameters,
)
from ntk.study_records import overview, rounded
from ntk.study_scores import (
    CLASSIFIERS,
    Row,
    across,
    chosen,
    points,
    results,
    score,
    spread,
    spreads,
)

Place = tuple[str, int, str, str]
"""Task, shots, kind of kernel or `FINE_TUNING`, and space or method."""

Growth = dict[tuple[int, ...], dict[str, dict[int, dict[str, float]]]]
"""By numbers of examples, then by space, number of examples and task."""

MEASURES = (
    *("distance.frobenius", "distance.frobenius_rescaled", "distance.cosine"),
    *("distance.cka", "distance.overlap", "distance.trace_ratio", "alignment"),
    *("spectrum.effective_dimension", "spectrum.entropy_rank"),
)
"""Of a kernel, and of how it lies to the full one."""

CHANGES = (
    *("distance", "norm_ratio", "measures.frobenius", "measures.cka"),
    *("measures.overlap", "alignment_before", "alignment_after"),
)
"""Of how the full kernel changes by fine-tuning."""

FEW_ROWS = "rows:3"
SIGNIFICANT = 0.05


def collect(
    records: Sequence[tuple[Key, Record | None]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary of a study.

    A kernel's score is that of the classifier which is best on dev in each seed. It is
    compared with the method that trains the same parameters and with full
    fine-tuning, on the seeds that both have (`study_comparison.compare`).

    Args:
        records: In any order; None stands for one that is missing. Those of splits,
            seeds and subjects that others have are found missing in any case.
        command: That makes the study.
        settings: Of the study, as JSON knows them.

    Returns:
        ``splits`` (with f0's own score), ``kernels``, ``tuned`` and ``comparisons``
        are rows by task and shots, with spreads and means as `study_scores` describes.
        ``over_tasks`` has the means of the last three, and ``answers`` the two figures
        that the study is made for: the mean ratio of the full kernel to full
        fine-tuning, and the points that a few rows lose against the full kernel.

    Raises:
        StorageError: If records of a task are of different test examples.
    """
    there = [(key, record) for key, record in records if record is not None]
    there.sort(key=lambda pair: order_of_key(pair[0]))
    _check_examples(there)
    found: dict[Place, dict[int, Record]] = defaultdict(dict)
    for key, record in there:
        kind = key.kind.removeprefix(KERNEL)
        place = (key.cell.task, key.cell.shots, kind, key.subject)
        found[place][key.cell.seed] = record
    kernels = {at: own for at, own in found.items() if at[2] != FINE_TUNING}
    tuned = {at: own for at, own in found.items() if at[2] == FINE_TUNING}
    rows = {
        "kernels": [
            _kernel_row(at, own, kernels.get((*at[:3], "full"), {}))
            for at, own in kernels.items()
        ],
        "tuned": [
            _tuned_row(at, own, tuned.get((*at[:3], "full"), {}))
            for at, own in tuned.items()
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


def select(rows: Iterable[Row], **where: object) -> list[Row]:
    """Return the rows that have some values.

    Args:
        rows: Of a summary.
        **where: Values by field.
    """
    return [row for row in rows if all(row[key] == v for key, v in where.items())]


class ShotsPart(NamedTuple):
    """The rows of a summary of one number of shots.

    Attributes:
        title: Which.
        name: For links.
        tasks: In their order.
        summary: With the rows of these shots alone.
    """

    title: str
    name: str
    tasks: list[str]
    summary: dict[str, list[Row]]

    def rows(self, field: str, **where: object) -> list[Row]:
        """Return the rows that have some values.

        Args:
            field: Of the summary.
            **where: Values by field.
        """
        return select(self.summary[field], **where)


def growth_by_sizes(rows: Iterable[Row]) -> Growth:
    """Return how the distance to the full kernel grows with the examples.

    Args:
        rows: Of kernels; the full one, its own reference, is left out.

    Returns:
        For each sequence of numbers of examples, by space and number, the means of the
        tasks that were measured at just these.
    """
    found: Growth = {}
    for row in rows:
        known = {p["size"]: p["mean"] for p in row["growth"] if p["mean"] is not None}
        if row["space"] == "full" or not known:
            continue
        curves = found.setdefault(tuple(known), {}).setdefault(row["space"], {})
        for size, value in known.items():
            curves.setdefault(size, {})[row["task"]] = value
    return dict(sorted(found.items(), key=lambda group: group[0][::-1]))


def _subjects(places: Iterable[Place]) -> list[str]:
    return sorted({subject for *_, subject in places}, key=order_of_subject)


def _kernel_row(
    at: Place, own: Mapping[int, Record], full: Mapping[int, Record]
) -> Row:
    """Return what is known of the kernels over one space, by seed."""
    several = list(own.values())
    names = [
        name for name in CLASSIFIERS if any(name in r["classifiers"] for r in several)
    ]
    return {
        **dict(zip(("task", "shots", "kind", "space"), at, strict=True)),
        "seeds": list(own),
        "parameters": several[-1]["parameters"],
        "share": several[-1]["share"],
        "test": spread(map(score, several)),
        "dev": spread(results(record)["dev"] for record in several),
        "chosen": [chosen(record) for record in several],
        "classifiers": {
            name: _classifier(
                [record["classifiers"].get(name, {}) for record in several],
                several[-1]["metric"],
            )
            for name in names
        },
        "points_to_full": spread(
            points(score(own[seed]), score(full.get(seed))) for seed in own
        ),
        "shuffled": spread((r.get("shuffled") or {}).get("ridge") for r in several),
        "measures": spreads(several, MEASURES),
        "growth": _growth([record.get("growth") or [] for record in several]),
    }


def _classifier(several: Sequence[Record], metric: str) -> Row:
    return {
        "test": spread((found.get("test") or {}).get(metric) for found in several),
        "regularisation": [found.get("regularisation") for found in several],
        "offset_scale": [found.get("offset_scale") for found in several],
    }


def _tuned_row(at: Place, own: Mapping[int, Record], full: Mapping[int, Record]) -> Row:
    """Return what is known of fine-tuning by one method, by seed."""
    task, shots, _, method = at
    several = list(own.values())
    return {
        "task": task,
        "shots": shots,
        "method": method,
        "seeds": list(own),
        "parameters": several[-1]["parameters"],
        "test": spread(map(score, several)),
        "dev": spread((r["dev"] or {}).get(r["metric"]) for r in several),
        "learning_rates": [record["learning_rate"] for record in several],
        "steps": [record["steps"] for record in several],
        "points_to_full": spread(
            points(score(own[seed]), score(full.get(seed))) for seed in own
        ),
        "agreement_of_seeds": agreement_of_seeds(several),
        "kernel_change": spreads(
            (record.get("kernel_change") or {} for record in several), CHANGES
        ),
    }


def _comparisons(
    kernels: Mapping[Place, dict[int, Record]],
    tuned: Mapping[Place, dict[int, Record]],
) -> list[Row]:
    """Compare each space with the method of the same parameters and with full."""
    rows = []
    for at, own in kernels.items():
        task, shots, kind, space = at
        for method in dict.fromkeys((same_parameters(space), "full")):
            others = tuned.get((task, shots, FINE_TUNING, method), {})
            if own.keys() & others.keys():
                rows.append(
                    {
                        "task": task,
                        "shots": shots,
                        "kind": kind,
                        "space": space,
                        "method": method,
                        "same_parameters": method == same_parameters(space),
                        **compare(own, others),
                    }
                )
    return rows


def _over_tasks(rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return means over tasks, and on how many of them the 90 % rule holds."""
    found: dict[str, list[Row]] = {}
    for part, fields in (
        ("kernels", ("shots", "kind", "space")),
        ("tuned", ("shots", "method")),
        ("comparisons", ("shots", "kind", "space", "method", "same_parameters")),
    ):
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        for row in rows[part]:
            groups[tuple(row[field] for field in fields)].append(row)
        means = _of_pair if part == "comparisons" else _of_scores
        found[part] = [
            dict(zip(fields, values, strict=True)) | means(groups[values])
            for values in sorted(groups, key=partial(_order_of_group, fields))
        ]
    return found


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
    found = []
    pairs = ((row["shots"], row["kind"]) for row in over_tasks["kernels"])
    for shots, kind in dict.fromkeys(pairs):
        where = {"shots": shots, "kind": kind}
        full = {"space": "full", "method": "full"}
        ratio = select(over_tasks["comparisons"], **where, **full)
        few = select(over_tasks["kernels"], **where, space=FEW_ROWS)
        found.append(
            {
                **where,
                "ratio_of_full": ratio[0]["ratio"] if ratio else None,
                "few_rows": FEW_ROWS,
                "points_of_few_rows": few[0]["points_to_full"] if few else None,
            }
        )
    return found


def _tasks(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    found = {key.cell.task: record for key, record in records}
    return [
        {
            "task": task,
            "metric": record["metric"],
            "labels": record["task_labels"],
            "readout": record["readout"],
            "test": len(record["labels"]),
        }
        for task, record in found.items()
    ]


def _splits(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    """Return sizes, seeds and f0's own score by task and shots."""
    found: dict[tuple[str, int], dict[int, Record]] = defaultdict(dict)
    for key, record in records:
        own = found[key.cell.task, key.cell.shots]
        # Kernels' records come first, and they alone know f0's score.
        own.setdefault(key.cell.seed, record)
    rows = []
    for (task, shots), by_seed in found.items():
        seeds = sorted(by_seed)
        several = [by_seed[seed] for seed in seeds]
        metric = several[0]["metric"]
        rows.append(
            {
                "task": task,
                "shots": shots,
                "seeds": seeds,
                "train": several[0]["examples"][0],
                "dev": several[0]["examples"][1],
                "f0": spread(
                    ((r.get("f0") or {}).get("test") or {}).get(metric) for r in several
                ),
            }
        )
    return rows


def _growth(several: Sequence[Sequence[Record]]) -> list[Row]:
    """Return a measure at each number of examples, as means over seeds."""
    rows = []
    for size in sorted({point["size"] for found in several for point in found}):
        own = [p for found in several for p in found if p["size"] == size]
        whole = spread(point["mean"] for point in own)
        rows.append(
            {
                "size": size,
                "mean": whole["mean"],
                "deviation": whole["deviation"],
                "deviation_of_subsets": spread(point["std"] for point in own)["mean"],
            }
        )
    return rows


def _check_examples(records: Iterable[tuple[Key, Record]]) -> None:
    """See that the records of each task are of the same test examples."""
    first: dict[str, tuple[Key, Record]] = {}
    for key, record in records:
        begun, other = first.setdefault(key.cell.task, (key, record))
        if any(other[f] != record[f] for f in ("labels", "task_labels", "metric")):
            raise StorageError(
                f"records {begun.file!r} and {key.file!r} are of different test "
                f"examples of task {key.cell.task!r}: the data changed in between. "
                "Remove the older ones, or begin another study with --name."
            )
