"""What the default selection of a configuration leaves out of a model."""

import warnings

from torch import nn

from rocoft.adapter.config import RoCoFTConfig
from rocoft.adapter.slices import adaptable
from rocoft.models import Architecture


def warn_of_left_out(config: RoCoFTConfig, model: nn.Module) -> None:
    """Warn where the blocks' weights cannot all be adapted, with the share of the rest.

    Modules that the user names are the user's choice; there is no warning of others.

    Args:
        config: The configuration, as the user gave it.
        model: The model.
    """
    if config.indices is not None or not (
        config.target_modules is None or isinstance(config.target_modules, str)
    ):
        return
    architecture = Architecture(model)
    weights = architecture.linear_weights.items()
    chosen = {name for name, w in weights if adaptable(model, w.module)}
    if left_out := architecture.left_out(chosen):
        warnings.warn(
            f"{left_out}. RoCoFT leaves them as they are; peft's LoRA trains such "
            "parameters by target_parameters.",
            stacklevel=2,
        )
