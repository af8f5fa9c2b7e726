"""Checkpoints of transformers' Trainer: their content and how to resume from them."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from rocoft.commands import temporary_folder
from rocoft.training.methods import trained_parameters
from rocoft.training.readout_trainer import TrainingError


@contextlib.contextmanager
def only_trained_is_saved(model: nn.Module) -> Iterator[None]:
    """Keep frozen parameters out of checkpoints of modules of other libraries.

    Nothing changes for models of transformers and peft.
    """
    # The Trainer would write the whole state, and fails on shared parameters such as
    # those of the label words.

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in state.keys() - trained_parameters(module).keys():
            del state[name]

    def accept_missing(module: nn.Module, keys: Any) -> None:
        keys.missing_keys.clear()

    if isinstance(model, PreTrainedModel | PeftModel):
        yield
        return
    handles = (
        model.register_state_dict_post_hook(drop),
        model.register_load_state_dict_post_hook(accept_missing),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None."""
    paths = [path for path in folder.glob("checkpoint-*") if _is_complete(path)]
    if not paths:
        return None
    return str(max(paths, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_complete(checkpoint: Path) -> bool:
    """Whether all files are there: writing and removal may have been interrupted."""
    needed = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "*.safetensors")
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return all(any(checkpoint.glob(name)) for name in needed)


def has_ended(checkpoint: str) -> bool:
    """Whether training had ended when the checkpoint was written."""
    # The Trainer itself would take one more step before it checks.
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    control: Any = state.stateful_callbacks.get("TrainerControl", {})
    stopped = control.get("args", {}).get("should_training_stop", False)
    return stopped or state.global_step >= state.max_steps


def restore_final_state(trainer: Trainer, checkpoint: str, *, best: bool) -> None:
    """Restore state and weights that a Trainer had at the end of its training.

    Args:
        trainer: The new Trainer.
        checkpoint: The last checkpoint of the training.
        best: Whether to load the best weights on dev, not those of the checkpoint.
    """
    path = Path(checkpoint)
    trainer.state = state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
    if best and not state.best_global_step:
        return
    name = f"checkpoint-{state.best_global_step}" if best else path.name
    state.best_model_checkpoint = str(path.with_name(name))
    trainer._load_best_model()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> float:
    """Copy trained weights into a model that was built in the same way.

    Args:
        model: The model.
        weights: The weights by name.

    Returns:
        Their Euclidean distance to the weights that the model had.

    Raises:
        TrainingError: If the model trains other parameters.
    """
    parameters = trained_parameters(model)
    if parameters.keys() != weights.keys():
        raise TrainingError(
            "the weights on disk belong to other parameters than those trained now. "
            "Use another folder."
        )
    squares = 0.0
    with torch.no_grad():
        for name, parameter in parameters.items():
            weight = weights[name].to(parameter.device)
            squares += float((weight - parameter).double().square().sum())
            parameter.copy_(weight)
    return math.sqrt(squares)


@contextlib.contextmanager
def search_folder(folder: Path | None) -> Iterator[Path]:
    """Yield the folder of a search: the given one, or a temporary one if None.

    Args:
        folder: The folder.

    Yields:
        The folder.
    """
    if folder is not None:
        yield folder
        return
    parent = Path(tempfile.gettempdir())
    with temporary_folder(parent, "rocoft-search-") as temporary:
        yield temporary / "search"
