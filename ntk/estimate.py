"""About how long a plan takes: passes timed on one batch, products counted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ntk.capture import backward, record
from ntk.chunks import ENTRY, count_positions
from ntk.contraction import Operations
from ntk.function import Batch, NetworkFunction, batch_length, evaluating
from ntk.maps import Whole
from ntk.memory import Plan, in_units
from ntk.yardsticks import multiply_adds_per_second
from rocoft.architecture import Architecture

__all__ = ["Estimate", "Route", "routes"]


@dataclass(frozen=True)
class Route:
    """How weights of one shape are contracted.

    Attributes:
        shape: ``(d_out, d_in)``.
        weights: How many there are.
        route: ``"positions"`` or ``"blocks"``.
        operations: Multiply-adds of all of them.
    """

    shape: tuple[int, int]
    weights: int
    route: str
    operations: float


@dataclass(frozen=True)
class Estimate:
    """What a plan comes to on this machine.

    Attributes:
        plan: The plan.
        seconds_per_example: Of a pass, forward and c times backward, on one batch.
        routes: How whole weights are contracted.
        multiply_adds_per_second: Of a matrix product here.
        processes: How many share the work.
    """

    plan: Plan
    seconds_per_example: float
    routes: tuple[Route, ...]
    multiply_adds_per_second: float
    processes: int = 1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[Batch],
        how: Plan,
        *,
        processes: int = 1,
    ) -> "Estimate":
        """Time a pass and a product, and count the products.

        Args:
            model: As in `memory.plan`.
            batches: As in `memory.plan`.
            how: The plan.
            processes: How many share the work.

        Returns:
            The estimate.
        """
        counted = routes(Architecture(model), batches, how)
        rate = multiply_adds_per_second(next(model.parameters()).device)
        each = _seconds_per_example(model, batches)
        return cls(how, each, counted, rate, processes)

    @property
    def seconds(self) -> float:
        """About how long it will take: all passes whole, and products at full speed."""
        how = self.plan
        operations = sum(route.operations for route in self.routes)
        passes = how.passes * how.examples[0] * self.seconds_per_example
        whole = passes + operations / self.multiply_adds_per_second
        if how.spill is not None:
            whole += how.spill.seconds
        return whole / self.processes

    def lines(self) -> list[str]:
        """Return the plan as text."""
        how = self.plan
        n, m = how.examples
        columns = "" if len(how.columns) == 1 else f" in {len(how.columns)} parts"
        found = [
            f"budget {in_units(how.budget)}, at most {in_units(how.peak)} held: "
            f"{in_units(how.held)} before, {in_units(how.activations)} by a batch, "
            f"{in_units(how.sums)} by the kernels, {in_units(how.workspace)} by "
            "products, the rest by what is kept of examples",
            f"kernels {n} x {m}{columns}; every example passes {how.passes} x, "
            f"forward and {how.outputs} x backward, {self.seconds_per_example:.2g} s",
        ]
        if how.spill is not None:
            found.append(
                f"what they leave waits in a file, {in_units(how.spill.bytes)} in "
                f"{str(how.spill.folder)!r}: about {how.spill.seconds:.2g} s instead "
                f"of {how.spill.spared:.2g} s of passes"
            )
        part = "pass" if how.spill is None else "part"
        for number, chunk in enumerate(how.chunks, 1):
            names = {name for maps in chunk.spaces.values() for name in maps}
            found.append(
                f"{part} {number}: {len(names)} parameters, {len(chunk.spaces)} "
                f"spaces, {in_units(chunk.entries * ENTRY)} kept of the right examples"
            )
        for route in self.routes:
            d_out, d_in = route.shape
            found.append(
                f"{route.weights} whole weights {d_out} x {d_in}: contracted by "
                f"{route.route}, {route.operations:.2g} multiply-adds"
            )
        shared = f", shared by {self.processes} processes" * (self.processes > 1)
        return [*found, f"about {self.seconds:.2g} s in all{shared}"]


def _seconds_per_example(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return what a pass over the largest batch takes, by its examples."""
    batch = max(batches, key=count_positions)
    function = NetworkFunction(model)
    with evaluating(model):
        for _ in range(2):  # The first one is slower.
            start = time.perf_counter()
            outputs, recorder = record(function, batch, function.parameters)
            backward(outputs, recorder, lambda use, k, factor: None)
            took = time.perf_counter() - start
    return took / batch_length(batch)


def routes(
    architecture: Architecture, batches: Sequence[Batch], how: Plan
) -> tuple[Route, ...]:
    """Count how whole weights are contracted.

    Args:
        architecture: Of the model.
        batches: As in `memory.plan`.
        how: The plan.

    Returns:
        The routes, by the shape of the weights.
    """
    (n, m), c = how.examples, how.outputs
    p = sum(map(count_positions, batches))
    q = round(p * m / n)
    held = {
        name
        for part in how.chunks
        for maps in part.spaces.values()
        for name, several in maps.items()
        if any(isinstance(each, Whole) for each in several)
    }
    tables = set(architecture.embeddings)
    found: dict[tuple[int, int], list[str]] = {}
    for name in sorted(held - tables):
        of = architecture.linear_weights.get(name)
        if of is not None:
            found.setdefault((of.outputs, of.inputs), []).append(name)
    counted = []
    for shape, names in found.items():
        square = Operations.count(shape, c, (m, m), (q, q), symmetric=True)
        rest = Operations.count(shape, c, (n - m, m), (p - q, q), symmetric=False)
        route = "positions" if square.positions_are_cheaper else "blocks"
        operations = len(names) * (square.least + (rest.least if n > m else 0))
        counted.append(Route(shape, len(names), route, operations))
    return tuple(counted)
