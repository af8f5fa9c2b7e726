"""Metrics of the evaluations during a training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import Trainer


def history(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the metrics of every evaluation, in order.

    Args:
        trainer: After training.
    """
    log = trainer.state.log_history
    return [_metrics(entry) for entry in log if "eval_loss" in entry]


def metrics_at(trainer: Trainer, step: int | None) -> dict[str, Any] | None:
    """Return the metrics of the evaluation at a step, if there was one.

    Args:
        trainer: After training.
        step: The step.
    """
    return next((e for e in history(trainer) if e["step"] == step), None)


def _metrics(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step and the metrics of one evaluation."""
    timings = ("runtime", "samples_per_second", "steps_per_second")
    metrics = {
        key.removeprefix("eval_"): finite(value)
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(timings)
    }
    return {"step": entry["step"], **metrics}


def finite(value: float) -> float | None:
    """Return a number for JSON, which knows no other than finite ones."""
    return float(value) if np.isfinite(value) else None
