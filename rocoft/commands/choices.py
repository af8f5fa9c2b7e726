"""What users choose of a model by name. Below `rocoft.models`, which imports peft."""

from pathlib import Path
from typing import Literal, get_args

EmbeddedModel = Literal["minilm", "smollm2"]
"""Models whose weights come inside a Python package, see `rocoft.models.locate`."""
DEFAULT_MODEL: EmbeddedModel = "minilm"

Readout = Literal["head", "masked", "causal"]
Head = Literal["probe", "random"]
"""How a head that a checkpoint lacks is made."""
Bits = Literal["8bit", "4bit"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Strategy = Literal[
    "first", "last", "random", "max", "min", "mixed", "activation", "gradient"
]
"""How rows and columns are selected."""
STRATEGIES: tuple[str, ...] = get_args(Strategy)


def embedded_model(model: str) -> EmbeddedModel | None:
    """Return the embedded model that a user names.

    A model's folder of the same name comes first, as it does for names of the Hub.

    Args:
        model: A name, a path or a Hub id.

    Returns:
        The embedded model; None if another is meant.
    """
    for name in get_args(EmbeddedModel):
        if model == name and not (Path(model) / "config.json").is_file():
            return name
    return None
