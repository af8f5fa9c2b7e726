"""What the summary of any study says of its records: what was run, what is missing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ntk.storage import finite
from ntk.study import Key, Record
from ntk.study_order import order_of_kind, order_of_subject, order_of_task
from ntk.study_scores import Row

DIGITS = 6
"""Significant ones, of every number of a summary."""


def overview(
    asked: Sequence[Key],
    there: Sequence[tuple[Key, Record]],
    command: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what was run, how much of it is there, and what it has to say.

    Args:
        asked: All records of the study.
        there: Those that are there, in the order of the report.
        command: That was run.
        settings: Of the study.

    Returns:
        ``"command"``, ``"settings"``, ``"models"``, ``"seeds"`` and ``"shots"`` of what
        is there, ``"records"`` as numbers ``"asked"`` and ``"there"``, ``"missing"`` by
        split and subject, and ``"notes"`` with their splits.
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
    """Return a summary with numbers of `DIGITS` digits, None for what is not finite.

    Args:
        summary: As JSON knows it, but for infinities and NaN.
    """
    return _rounded(finite(summary))


def _missing(keys: Sequence[Key], there: set[Key]) -> tuple[list[Row], int]:
    """Return what is missing, and how many records there should be."""
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
            place = {"task": task, "shots": shots, "kind": kind, "subject": subject}
            lacking = [seed for seed in seeds if (*place.values(), seed) not in done]
            if lacking:
                rows.append({**place, "seeds": lacking})
    return rows, len(splits) * len(subjects) * len(seeds)


def _notes(records: Sequence[tuple[Key, Record]]) -> list[Row]:
    """Return what splits and models have to say, and where."""
    found: dict[str, dict[tuple[str, int], None]] = defaultdict(dict)
    for key, record in records:
        for note in record.get("notes") or []:
            found[note][key.cell.task, key.cell.shots] = None
    return [
        {"note": note, "splits": [list(split) for split in splits]}
        for note, splits in sorted(found.items())
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
