"""What users choose of a model by name. Below `rocoft.models`, which imports peft."""

from typing import Literal, get_args

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
