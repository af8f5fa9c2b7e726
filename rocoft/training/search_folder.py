"""The folder of a search over learning rates: begun, gone on with, told from others'.

It holds ``settings.json``, and of each rate a folder of checkpoints while it is
trained, then a record and the weights.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rocoft.commands import differences, write_text
from rocoft.training.checkpoints import last_checkpoint
from rocoft.training.readout_trainer import TrainingError

LOGS = "logs"
"""Subfolder of the search's folder for the trackers' files."""
SETTINGS = "settings.json"


def begin_or_check(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Begin a folder, or check that it was begun with the same settings.

    Args:
        folder: The search's folder.
        settings: What decides the result, as JSON values.
        resume: Whether an earlier search in it goes on.

    Raises:
        TrainingError: If it was begun with other settings, or holds other files.
    """
    file = folder / SETTINGS
    text = json.dumps(settings, indent=1, default=str) + "\n"
    stored, given = _settings(file), json.loads(text)
    if resume and stored:
        if differ := differences(stored, given):
            raise TrainingError(
                f"{str(folder)!r} was begun with other settings: {differ}. Use the "
                "same ones, or another folder."
            )
        _remove_damaged(folder)
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    own = {name for name in names if name.startswith("lr-")} | {file.name, LOGS}
    if names and (others := sorted(names - own if stored else names)):
        raise TrainingError(
            f"folder={str(folder)!r} holds files but no earlier search: "
            f"{', '.join(others[:3])}. Give an empty folder or a new one."
        )
    if names:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings of a search in a file; none if it holds others."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    # Other programs, too, have files of this name.
    own = {"name", "rates", "arguments", "metric", "seed", "examples_sha256"}
    return stored if isinstance(stored, dict) and own <= stored.keys() else {}


def _remove_damaged(folder: Path) -> None:
    """Remove records of trainings that cannot be read, so that these are done again."""
    for file in folder.glob("lr-*.json"):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            whole = {"learning_rate", "dev", "steps", "history"} <= record.keys()
            with safe_open(file.with_suffix(".safetensors"), framework="pt"):
                pass
        except (OSError, ValueError, AttributeError, SafetensorError):
            whole = False
        if not whole:
            file.unlink()


def can_be_resumed(search: Path) -> bool:
    """Return whether a search holds a training that ended well, or a checkpoint.

    Args:
        search: The search's folder.
    """
    for file in search.glob("lr-*.json"):
        with contextlib.suppress(ValueError, AttributeError):
            if json.loads(file.read_text(encoding="utf-8")).get("dev") is not None:
                return True
    return any(last_checkpoint(folder) for folder in search.glob("lr-*/"))
