"""Checkpoints of transformers' Trainer: what they hold, and which can be continued."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rocoft.methods import trained_parameters


@contextlib.contextmanager
def only_trained_is_saved(model: nn.Module) -> Iterator[None]:
    """Keep what is frozen out of the checkpoints of modules that are no library's."""
    # The Trainer would write their whole state, and fail on parameters that are shared,
    # as the label words' are.

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in state.keys() - trained_parameters(module).keys():
            del state[name]

    def expect_no_more(module: nn.Module, keys: Any) -> None:
        keys.missing_keys.clear()

    if isinstance(model, PreTrainedModel | PeftModel):
        yield
        return
    handles = (
        model.register_state_dict_post_hook(drop),
        model.register_load_state_dict_post_hook(expect_no_more),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end."""
    found = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob("checkpoint-*")
        if _is_whole(path)
    }
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether nothing is missing, be it not written yet or partly removed."""
    needed = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "*.safetensors")
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return all(any(checkpoint.glob(name)) for name in needed)


def has_ended(checkpoint: str) -> bool:
    """Whether training was over when the checkpoint was written."""
    # The Trainer would take one more step before it looked.
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    stopped = control.get("args", {}).get("should_training_stop", False)
    return stopped or state.global_step >= state.max_steps


def take(trainer: Trainer, checkpoint: str, *, best: bool) -> None:
    """Put a Trainer where it was when training had ended.

    Args:
        trainer: To put there.
        checkpoint: The last one of the training.
        best: Whether to load the best weights on dev, not those of the checkpoint.
    """
    place = Path(checkpoint)
    trainer.state = state = TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))
    if best and not state.best_global_step:
        return
    name = f"checkpoint-{state.best_global_step}" if best else place.name
    state.best_model_checkpoint = str(place.with_name(name))
    trainer._load_best_model()
