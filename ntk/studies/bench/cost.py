"""Times of a model's kernels by space.

All cases are timed in rounds: each round runs every case once, in a new random order,
after one warm-up round. Ratios are taken within a round and their medians reported, so
that a slow phase of the machine affects numerator and denominator alike.
"""

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from ntk.gradients import Batch, NetworkFunction, batch_length
from ntk.kernels import KernelOptions, Precision
from ntk.scale import (
    Resources,
    Work,
    compute_as_planned,
    count_positions,
    multiply_adds_per_second,
    plan,
    routes,
    run_floor,
    seconds,
)
from ntk.spaces import Space
from rocoft.commands import Progress
from rocoft.models import Architecture

__all__ = ["Cost", "in_rounds", "measure"]

CPU = torch.device("cpu")
TOGETHER = "all of these"
FLOOR = "floor"
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Cost:
    """The cost of the kernels of some examples.

    Attributes:
        examples: Number of examples n.
        outputs: Number of outputs c.
        positions: Number of positions of all examples, padding included.
        seconds: Median seconds of the floor, of each space alone and of all together.
        over_floor: Median ratio of each time to the floor.
        operations: Multiply-adds of contracting the full kernel's weights; None if the
            full kernel is not timed.
        multiply_adds_per_second: Rate of a matrix product on this machine.
        over_bound: Median ratio of the full kernel's time to the floor plus the time
            of ``operations`` at this rate; None if the full kernel is not timed.
        passes: Number of passes over the examples, by kernel.
        errors: Relative difference (Frobenius) to float32 of the first space's kernel
            in other precisions.
    """

    examples: int
    outputs: int
    positions: int
    seconds: dict[str, float]
    over_floor: dict[str, float]
    operations: float | None
    multiply_adds_per_second: float
    over_bound: float | None
    passes: dict[str, int]
    errors: dict[str, float] = field(default_factory=dict)


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    spaces: Mapping[str, Space],
    *,
    precisions: Sequence[Precision] = (),
    rounds: int = 5,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Cost:
    """Time the kernels of some examples.

    Args:
        model: Any module.
        batches: The examples.
        spaces: Tangent spaces by name; "full" is compared with its bound.
        precisions: Further precisions in which the first space is timed.
        rounds: Number of timed rounds.
        memory: Memory budget in bytes, see `ntk.scale.planning.plan`.
        progress: Called after every round.

    Returns:
        The cost.
    """
    device = next(model.parameters()).device
    function = NetworkFunction(model)
    named: dict[str, Mapping[str, Space]] = {
        name: {name: s} for name, s in spaces.items()
    }
    if len(spaces) > 1:
        named[TOGETHER] = spaces
    resources, count = Resources(memory=memory), len(batches)
    works = {name: Work(model, batches, count, each) for name, each in named.items()}
    plans = {name: plan(work, resources) for name, work in works.items()}
    cases: dict[str, Callable[[], object]] = {
        FLOOR: lambda: run_floor(function, batches)
    }
    cases |= {
        name: partial(compute_as_planned, work, plans[name])
        for name, work in works.items()
    }
    first = next(iter(spaces))
    less = {
        f"{first}, {precision}": partial(
            compute_as_planned,
            replace(works[first], options=KernelOptions(precision=precision)),
            plans[first],
        )
        for precision in precisions
    }
    errors = {}
    if less:
        exact = compute_as_planned(works[first], plans[first]).kernels[first]
        for name, run in less.items():
            difference = run().kernels[first] - exact
            errors[name] = float(difference.norm() / exact.norm())
    cases |= less
    # The first round is a warm-up.
    times = {
        name: runs[1:]
        for name, runs in in_rounds(cases, rounds + 1, device, progress).items()
    }
    floor = times[FLOOR]
    ratios = {
        name: statistics.median(a / b for a, b in zip(runs, floor, strict=True))
        for name, runs in times.items()
        if name != FLOOR
    }
    rate = multiply_adds_per_second(device)
    operations, bound = None, None
    if "full" in spaces:
        counted = routes(Architecture(model), batches, plans["full"])
        operations = sum(route.operations for route in counted)
        bound = statistics.median(
            a / (b + operations / rate)
            for a, b in zip(times["full"], floor, strict=True)
        )
    return Cost(
        examples=sum(map(batch_length, batches)),
        outputs=next(iter(plans.values())).outputs,
        positions=sum(map(count_positions, batches)),
        seconds={name: statistics.median(runs) for name, runs in times.items()},
        over_floor=ratios,
        operations=operations,
        multiply_adds_per_second=rate,
        over_bound=bound,
        passes={name: each.passes for name, each in plans.items()},
        errors=errors,
    )


def in_rounds(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Times:
    """Return the seconds of each case in every round.

    Like `timeit`, it disables the garbage collector, which would run in arbitrary
    cases. It collects once per round only: collecting before each case would evict
    caches that are warm in real calls.

    Args:
        cases: Functions to time, by name.
        rounds: Number of rounds.
        device: Device of the functions.
        progress: Called after every round.

    Returns:
        Seconds per round, by case.
    """
    times: Times = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(0).shuffle
    for number in range(1, rounds + 1):
        shuffle(order)
        gc.collect()
        gc.disable()
        try:
            for name in order:
                times[name].append(seconds(cases[name], device))
        finally:
            gc.enable()
        if progress is not None:
            progress("rounds", number, rounds)
    return times
