"""Tasks in files: tiny ones that words decide, and those beside the repository."""

import json
from pathlib import Path

import pytest
from checkpoints import BAD, GOOD

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the tasks beside the repository, {SHARED}, are absent"
)


def write_task(folder, name="words"):
    """Write reviews that words decide but for a few."""
    (folder / name).mkdir(parents=True)
    for part, count in (("train", 60), ("test", 24)):
        lines = []
        for i in range(count):
            word = (BAD, GOOD)[(i + (i % 7 == 3)) % 2][i % 3]
            text = f"the {('film', 'play')[i % 2]} {'very ' * (i % 4)}{word}"
            lines.append(json.dumps({"text": text, "label": i % 2}))
        (folder / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def write_reviews(file, count=60):
    """Write separable reviews as a table."""
    rows = ["text\tlabel"]
    for i in range(count):
        word = (BAD, GOOD)[i % 2][i % 3]
        rows.append(f"the {('film', 'play')[i % 2]} {'very ' * (i % 4)}{word}\t{i % 2}")
    file.write_text("\n".join(rows) + "\n")
    return file
