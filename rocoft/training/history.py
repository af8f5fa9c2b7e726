"""Metrics of the evaluations during a training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Trainer

from rocoft.training.meter import TrainLoss


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


def train_loss(trainer: Trainer) -> float:
    """Return the mean loss of all steps of a training, before an interruption too.

    Args:
        trainer: After training, or with the state of a training that had ended.

    Returns:
        The mean; nan if a checkpoint lacks the losses of earlier steps.
    """
    state: Any = trainer.state
    callbacks = trainer.callback_handler.callbacks
    (losses,) = (c for c in callbacks if isinstance(c, TrainLoss))
    kept = state.stateful_callbacks.get(TrainLoss.__name__)
    if not losses.steps and kept:
        # All steps were taken by another process.
        losses = TrainLoss.from_state(kept[0] if isinstance(kept, list) else kept)
    return losses.mean(state.global_step)


def warnings(
    runs: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    metric: str,
    distance: float,
) -> list[str]:
    """Return what makes the scores of a search say less than they seem to.

    Args:
        runs: The records of its trainings.
        best: The chosen one.
        metric: The metric that it was chosen by.
        distance: Distance of the chosen weights to those before training.

    Returns:
        Sentences for users; none if the training moved and dev told rates apart.

    Example:
        >>> run = {"learning_rate": 0.1, "steps": 9, "dev": {"step": 3, "loss": 0.7}}
        >>> run |= {"history": [run["dev"]]}
        >>> warnings([run], run, "loss", 0.0)[0][:20]
        'training never moved'
        >>> warnings([run], run, "loss", 0.3)
        []
    """
    found = []
    losses = [entry.get("loss") for run in runs for entry in run["history"]]
    if distance == 0:
        found.append(
            f"training never moved: the chosen weights (learning rate "
            f"{best['learning_rate']!r}, step {best['dev']['step']} of "
            f"{best['steps']}) are those before any update, and so are the scores"
        )
    elif len(losses) > 1 and len(set(losses)) == 1:
        found.append(
            f"training changed no output: the loss on dev is {losses[0]!r} at all "
            f"{len(losses)} evaluations"
        )
    scores = [run["dev"][metric] for run in runs if run["dev"] is not None]
    if len(runs) > 1 and len(scores) == len(runs) and len(set(scores)) == 1:
        found.append(
            f"all {len(runs)} learning rates have the same {metric} on dev, "
            f"{scores[0]:.4g}: their order chose among them, not the examples"
        )
    return found


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
