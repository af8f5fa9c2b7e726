"""Estimated time of a plan: passes timed on one batch, products counted."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ntk.gradients import (
    Batch,
    NetworkFunction,
    backward,
    batch_length,
    evaluating,
    record,
)
from ntk.kernels import Operations, reader
from ntk.scale.machine import multiply_adds_per_second
from ntk.scale.parts import ENTRY, count_positions
from ntk.scale.planning import Plan
from ntk.scale.units import in_units
from ntk.scale.work import Work
from ntk.spaces import Whole
from rocoft.models import Architecture

__all__ = ["PlanCost", "Route", "routes"]


@dataclass(frozen=True)
class Route:
    """How weights of one shape are contracted.

    Attributes:
        shape: ``(d_out, d_in)``.
        weights: Number of weights.
        route: ``"positions"`` or ``"blocks"``.
        operations: Multiply-adds of all of them.
    """

    shape: tuple[int, int]
    weights: int
    route: str
    operations: float


@dataclass(frozen=True)
class PlanCost:
    """The time of a plan on this machine.

    Attributes:
        plan: The plan.
        seconds_per_example: Time of a pass, forward and c times backward.
        routes: How whole weights are contracted.
        multiply_adds_per_second: Rate of a matrix product.
        processes: Number of processes that share the work.
    """

    plan: Plan
    seconds_per_example: float
    routes: tuple[Route, ...]
    multiply_adds_per_second: float
    processes: int = 1

    @classmethod
    def of(cls, work: Work, plan: Plan, *, processes: int = 1) -> "PlanCost":
        """Time a pass and a matrix product, and count the products.

        Args:
            work: The kernels to compute.
            plan: The plan.
            processes: Number of processes that share the work.

        Returns:
            The cost.
        """
        counted = routes(Architecture(work.model), work.batches, plan)
        rate = multiply_adds_per_second(next(work.model.parameters()).device)
        seconds = _seconds_per_example(work)
        return cls(plan, seconds, counted, rate, processes)

    @property
    def seconds(self) -> float:
        """Estimated time: full passes, and products at the rate of a matrix product."""
        plan = self.plan
        operations = sum(route.operations for route in self.routes)
        passes = plan.passes * plan.examples[0] * self.seconds_per_example
        total = passes + operations / self.multiply_adds_per_second
        return total / self.processes

    def lines(self) -> list[str]:
        """Return the plan as text."""
        plan = self.plan
        n, m = plan.examples
        columns = "" if len(plan.columns) == 1 else f" in {len(plan.columns)} parts"
        lines = [
            f"budget {in_units(plan.budget)}, at most {in_units(plan.peak)} in use: "
            f"{in_units(plan.held)} already, {in_units(plan.activations)} activations, "
            f"{in_units(plan.sums)} kernels, {in_units(plan.workspace)} workspace, the "
            "rest features and factors of the examples",
            f"kernels {n} x {m}{columns}; every example passes {plan.passes} x, "
            f"forward and {plan.outputs} x backward, {self.seconds_per_example:.2g} s",
        ]
        if plan.spill is not None:
            lines.append(
                "features and factors are kept in a file, "
                f"{in_units(plan.spill.bytes)} in {str(plan.spill.folder)!r}, instead "
                f"of {plan.parts} passes"
            )
        part = "pass" if plan.spill is None else "part"
        for number, chunk in enumerate(plan.chunks, 1):
            names = {name for maps in chunk.spaces.values() for name in maps}
            lines.append(
                f"{part} {number}: {len(names)} parameters, {len(chunk.spaces)} "
                f"spaces, {in_units(chunk.entries * ENTRY)} for the right examples"
            )
        for route in self.routes:
            d_out, d_in = route.shape
            lines.append(
                f"{route.weights} whole weights {d_out} x {d_in}: contracted by "
                f"{route.route}, {route.operations:.2g} multiply-adds"
            )
        shared = f", shared by {self.processes} processes" * (self.processes > 1)
        return [*lines, f"about {self.seconds:.2g} s in all{shared}"]


def _seconds_per_example(work: Work) -> float:
    """Return the seconds per example of a pass over the largest batch."""
    batch = max(work.batches, key=count_positions)
    function = NetworkFunction(work.model, reader(work.options))
    with evaluating(work.model):
        for _ in range(2):  # The first pass is a warm-up.
            start = time.perf_counter()
            outputs, recorder = record(function, batch, function.parameters)
            backward(outputs, recorder, lambda use, k, factor: None)
            seconds = time.perf_counter() - start
    return seconds / batch_length(batch)


def routes(
    architecture: Architecture, batches: Sequence[Batch], plan: Plan
) -> tuple[Route, ...]:
    """Return how whole weights are contracted, by their shapes.

    Args:
        architecture: The architecture of the model.
        batches: The left examples.
        plan: The plan.

    Returns:
        One route per shape.
    """
    (n, m), c = plan.examples, plan.outputs
    p = sum(map(count_positions, batches))
    q = round(p * m / n)
    whole = {
        name
        for chunk in plan.chunks
        for maps in chunk.spaces.values()
        for name, held in maps.items()
        if any(isinstance(map_, Whole) for map_ in held)
    }
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name in sorted(whole - set(architecture.embeddings)):
        weight = architecture.linear_weights.get(name)
        if weight is not None:
            by_shape.setdefault((weight.outputs, weight.inputs), []).append(name)
    counted = []
    for shape, names in by_shape.items():
        square = Operations.count(shape, c, (m, m), (q, q), symmetric=True)
        rest = Operations.count(shape, c, (n - m, m), (p - q, q), symmetric=False)
        route = "positions" if square.positions_are_cheaper else "blocks"
        operations = len(names) * (square.least + (rest.least if n > m else 0))
        counted.append(Route(shape, len(names), route, operations))
    return tuple(counted)
