"""The part of a summary that all studies share: what was run and what is missing."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ntk.reporting import Row
from ntk.scale import finite
from ntk.studies.folder import Key, Record
from ntk.studies.order import order_of_kind, order_of_subject, order_of_task

DIGITS = 6
"""Significant digits of the numbers of a summary."""


def overview(
    asked: Sequence[Key],
    there: Sequence[tuple[Key, Record]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what was run, what is missing, and the notes of models and splits.

    Args:
        asked: Keys of all records of the study.
        there: The existing records, in the order of the report.
        command: Command that was run.
        settings: Settings of the study.

    Returns:
        ``"command"``, ``"settings"``; ``"models"``, ``"seeds"`` and ``"shots"`` of the
        existing records; ``"records"``, the numbers ``"asked"`` and ``"there"``;
        ``"missing"`` by split and subject; ``"notes"`` with their splits.
    """
    missing, count = _missing(asked, {key for key, _ in there})
    return {
        "command": command,
        "settings": dict(settings),
        "models": sorted({record["model"] for _, record in there}),
        "seeds": sorted({key.cell.seed for key, _ in there}),
        "shots": sorted({key.cell.shots for key, _ in there}),
        "records": {"asked": count, "there": len(there)},
        "missing": missing,
        "notes": _notes(there),
    }


def rounded(summary: Any) -> Any:
    """Return a summary with numbers rounded to `DIGITS` digits, non-finite ones None.

    Args:
        summary: JSON values, infinities or NaN.
    """
    return _rounded(finite(summary))


def record_remark(summary: Mapping[str, Any], missing: str = "") -> str:
    """Return whether the records of a study are complete, as a sentence.

    Args:
        summary: The study's summary.
        missing: Description of the missing records; the first one if empty.
    """
    asked, there = summary["records"]["asked"], summary["records"]["there"]
    if not there:
        return "There are no records yet."
    if not summary["missing"]:
        return f"All {there:,} requested records are present."
    if not missing:
        row = summary["missing"][0]
        seeds = row["seeds"] if "seeds" in row else [row["seed"]]
        missing = (
            f"first {row['task']} at {row['shots']} shots, {row['kind']} "
            f"{row['subject']}, seeds {', '.join(map(str, seeds))}"
        )
    count = asked - there
    return (
        f"{count:,} of {asked:,} records {'is' if count == 1 else 'are'} missing, and "
        f"means are over the others: {missing}."
    )


def metric_remarks(metrics: Mapping[str, str]) -> Iterator[str]:
    """Yield which tasks are not scored by accuracy, if any.

    Args:
        metrics: Primary metric by task.
    """
    tasks: dict[str, list[str]] = defaultdict(list)
    for task, metric in metrics.items():
        if metric != "accuracy":
            name = "F1" if metric == "f1" else metric.replace("_", " ")
            tasks[name].append(task)
    if tasks:
        listed = "; ".join(f"{name} for {', '.join(t)}" for name, t in tasks.items())
        yield f"Scores are accuracies, except {listed}."


def note_remarks(
    summary: Mapping[str, Any], splits: int | None = None
) -> Iterator[str]:
    """Yield the notes of models and splits, with the splits that they concern.

    Args:
        summary: The study's summary.
        splits: Number of pairs of task and shots; a note on all of them names none.
    """
    for row in summary["notes"]:
        where = ", ".join(f"{task} at {shots} shots" for task, shots in row["splits"])
        everywhere = len(row["splits"]) == splits
        yield row["note"] if everywhere else f"{where}: {row['note']}"


def _missing(keys: Sequence[Key], there: set[Key]) -> tuple[list[Row], int]:
    """Return the missing records and the number of all records."""
    done = {(k.cell.task, k.cell.shots, k.kind, k.subject, k.cell.seed) for k in there}
    splits = sorted(
        {(key.cell.task, key.cell.shots) for key in keys},
        key=lambda split: (order_of_task(split[0]), split[1]),
    )
    subjects = sorted(
        {(key.kind, key.subject) for key in keys},
        key=lambda pair: (order_of_kind(pair[0]), order_of_subject(pair[1])),
    )
    seeds = sorted({key.cell.seed for key in keys})
    rows = []
    for task, shots in splits:
        for kind, subject in subjects:
            row = {"task": task, "shots": shots, "kind": kind, "subject": subject}
            missing = [seed for seed in seeds if (*row.values(), seed) not in done]
            if missing:
                rows.append({**row, "seeds": missing})
    return rows, len(splits) * len(subjects) * len(seeds)


def _notes(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    """Return the notes of the records with their tasks and shots."""
    by_note: dict[str, dict[tuple[str, int], None]] = defaultdict(dict)
    for key, record in records:
        for note in record.get("notes") or []:
            by_note[note][key.cell.task, key.cell.shots] = None
    return [
        {"note": note, "splits": [list(split) for split in splits]}
        for note, splits in sorted(by_note.items())
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
