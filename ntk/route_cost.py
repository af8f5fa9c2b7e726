"""What either route of contracting a linear weight costs here, against what is counted.

The engine takes the route with fewer counted multiply-adds (`contraction.Operations`).
Timing both on real factors says whether the count chooses well on this machine.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ntk.capture import complete, record
from ntk.contraction import Contraction, Operations, block_gram
from ntk.cost import in_rounds
from ntk.factors import Matrix, raised
from ntk.function import Batch, NetworkFunction, batch_length, evaluating
from ntk.positions import position_gram
from rocoft.architecture import Architecture

__all__ = ["RouteCost", "measure_routes"]


@dataclass(frozen=True)
class RouteCost:
    """Both routes of the weights of one shape, on the same factors.

    Attributes:
        shape: ``(d_out, d_in)``.
        weights: How many weights have it.
        examples: Whose kernel with themselves is contracted.
        seconds: Of one weight by ``"positions"`` and by ``"blocks"``, medians.
        operations: Counted multiply-adds of one weight by either.
        taken: The route that the engine takes.
    """

    shape: tuple[int, int]
    weights: int
    examples: int
    seconds: dict[str, float]
    operations: dict[str, float]
    taken: str

    @property
    def loss(self) -> float:
        """How many times the faster route's time the one that is taken takes."""
        return self.seconds[self.taken] / min(self.seconds.values())


def measure_routes(model: nn.Module, batch: Batch, rounds: int = 3) -> list[RouteCost]:
    """Time both routes for the first weight of every shape.

    Args:
        model: Any module.
        batch: The examples; their kernel with themselves is contracted.
        rounds: How often each is timed, after once that does not count.

    Returns:
        The costs, shapes in the order of the model. A shape whose first weight is used
        otherwise than once over all examples, as where layers share it, is left out.
    """
    function = NetworkFunction(model)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, of in Architecture(model).linear_weights.items():
        by_shape.setdefault((of.outputs, of.inputs), []).append(name)
    first = {names[0] for names in by_shape.values()}
    with evaluating(model):
        outputs, recorder = record(function, batch, first)
        factors = complete(outputs, recorder)
    how, n = Contraction(), batch_length(batch)
    found = []
    for shape, names in by_shape.items():
        uses = [raised(factor) for factor in factors.get(names[0], [])]
        if len(uses) != 1 or not isinstance(uses[0], Matrix) or len(uses[0].x) != n:
            continue
        use, stored = uses[0], function.parameters[names[0]].shape
        side = [[use]]
        cases: dict[str, Callable[[], object]] = {
            "positions": partial(
                position_gram, side, n, coupled=True, precision="float32"
            ),
            "blocks": partial(block_gram, side, side, stored, how),
        }
        with torch.no_grad():
            times = in_rounds(cases, rounds + 1, use.x.device)
        p, c = use.positions(), len(use.g)
        count = Operations.count(shape, c, (n, n), (p, p), symmetric=True)
        found.append(
            RouteCost(
                shape,
                len(names),
                n,
                {name: statistics.median(own[1:]) for name, own in times.items()},
                {"positions": count.positions, "blocks": count.blocks},
                "positions" if count.positions_are_cheaper else "blocks",
            )
        )
    return found
