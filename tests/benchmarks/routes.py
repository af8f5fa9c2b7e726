"""Times of both routes of contracting a linear weight.

The engine takes the route with fewer counted multiply-adds (`contraction.Operations`).
Timing both on real factors shows whether the count chooses well on this machine:

    python -m tests.benchmarks.routes
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ntk.gradients import (
    Batch,
    Matrix,
    NetworkFunction,
    batch_length,
    complete,
    evaluating,
    raised,
    record,
)
from ntk.kernels import Contraction, Operations, block_gram, position_gram
from ntk.studies.bench.cost import in_rounds
from rocoft.models import Architecture
from tests.benchmarks import setting

__all__ = ["RouteCost", "measure_routes"]


@dataclass(frozen=True)
class RouteCost:
    """The cost of both routes for the weights of one shape.

    Attributes:
        shape: ``(d_out, d_in)`` of the weights.
        weights: Number of weights with this shape.
        examples: Number of examples of the kernel.
        seconds: Median seconds per weight, by route ``"positions"`` and ``"blocks"``.
        operations: Counted multiply-adds per weight, by route.
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
        """Time of the route taken divided by that of the faster route."""
        return self.seconds[self.taken] / min(self.seconds.values())


def measure_routes(model: nn.Module, batch: Batch, rounds: int = 3) -> list[RouteCost]:
    """Time both routes for the first weight of every shape.

    Args:
        model: Any module.
        batch: The examples of the kernel.
        rounds: Number of timed runs of each, after one warm-up run.

    Returns:
        The costs, shapes in the order of the model. Shapes whose first weight is not
        used exactly once by all examples, such as shared weights, are left out.
    """
    function = NetworkFunction(model)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, of in Architecture(model).linear_weights.items():
        by_shape.setdefault((of.outputs, of.inputs), []).append(name)
    first = {names[0] for names in by_shape.values()}
    with evaluating(model):
        outputs, recorder = record(function, batch, first)
        factors = complete(outputs, recorder)
    contraction, n = Contraction(), batch_length(batch)
    costs = []
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
            "blocks": partial(block_gram, side, side, stored, contraction),
        }
        with torch.no_grad():
            times = in_rounds(cases, rounds + 1, use.x.device)
        p, c = use.positions(), len(use.g)
        count = Operations.count(shape, c, (n, n), (p, p), symmetric=True)
        costs.append(
            RouteCost(
                shape,
                len(names),
                n,
                {name: statistics.median(runs[1:]) for name, runs in times.items()},
                {"positions": count.positions, "blocks": count.blocks},
                "positions" if count.positions_are_cheaper else "blocks",
            )
        )
    return costs


def main() -> None:
    """Print both routes of every shape of MiniLM-L6 on 16 examples."""
    print(f"{'shape':>12} {'weights':>7} {'positions':>9} {'blocks':>9}  taken")
    for cost in measure_routes(setting.load_model(), setting.sentences(16)):
        times = (f"{1e3 * cost.seconds[way]:9.3g}" for way in ("positions", "blocks"))
        shape = "{} x {}".format(*cost.shape)
        print(
            f"{shape:>12} {cost.weights:7} {' '.join(times)}  {cost.taken} "
            f"({cost.loss:.2f} times the faster; milliseconds)"
        )


if __name__ == "__main__":
    main()
