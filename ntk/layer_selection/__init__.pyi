from .budget import Budget, LayerOrder
from .rules import (
    first_layers,
    gradient_norm,
    kernel_alignment,
    last_layers,
    least_growth,
    random_layers,
    starting_residual,
    target_aware,
)

__all__ = [
    # for users
    "target_aware",
    "least_growth",
    "Budget",
    # budget
    "LayerOrder",
    # rules
    "first_layers",
    "gradient_norm",
    "kernel_alignment",
    "last_layers",
    "random_layers",
    "starting_residual",
]
