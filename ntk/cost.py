"""What kernels of a model cost here: times by space and by number of examples.

All cases of one size are timed in rounds: every round runs each once, in an order
shuffled anew, after one run of each that is not counted. A ratio is taken within a
round and its median reported, so that a slow phase of the machine falls on numerator
and denominator alike.
"""

import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ntk.chunks import count_positions
from ntk.estimate import routes
from ntk.function import Batch, NetworkFunction, batch_length
from ntk.memory import compute_as_planned, plan
from ntk.precision import Precision
from ntk.spaces import Space
from ntk.yardsticks import multiply_adds_per_second, run_floor, seconds
from rocoft.architecture import Architecture
from rocoft.console import Progress

__all__ = ["Cost", "in_rounds", "measure"]

CPU = torch.device("cpu")
TOGETHER = "all of these"
FLOOR = "floor"
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Cost:
    """What the kernels of some examples cost.

    Attributes:
        examples: n.
        outputs: c.
        positions: Of all examples, padding included.
        seconds: Of the floor, of each space alone and of all together; medians.
        over_floor: Of each but the floor, the median over rounds of its ratio to it.
        operations: Multiply-adds of contracting the full kernel's weights; None where
            that kernel is not timed, as the ratio below.
        multiply_adds_per_second: Of a matrix product here.
        over_bound: Of the full kernel, the ratio to floor plus counted operations.
        passes: How often every example passed the model, by kernel.
        errors: Of the first space's kernel in another precision of its products, the
            relative difference (Frobenius) to that in float32.
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
        precisions: Others than float32, in which the first space is timed as well.
        rounds: How often each is timed.
        memory: Most bytes to hold, see `memory.plan`.
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
    plans = {
        name: plan(model, batches, len(batches), spaces=own, memory=memory)
        for name, own in named.items()
    }
    cases: dict[str, Callable[[], object]] = {
        FLOOR: lambda: run_floor(function, batches)
    }
    cases |= {
        name: partial(compute_as_planned, model, batches, plans[name], spaces=own)
        for name, own in named.items()
    }
    first = next(iter(spaces))
    in_float32 = partial(compute_as_planned, model, batches, plans[first])
    less = {
        f"{first}, {precision}": partial(
            in_float32, spaces=named[first], precision=precision
        )
        for precision in precisions
    }
    errors = {}
    if less:
        exact = in_float32(spaces=named[first]).kernels[first]
        for name, run in less.items():
            difference = run().kernels[first] - exact
            errors[name] = float(difference.norm() / exact.norm())
    cases |= less
    # The first round warms up.
    times = {
        name: own[1:]
        for name, own in in_rounds(cases, rounds + 1, device, progress).items()
    }
    floor = times[FLOOR]
    ratios = {
        name: statistics.median(a / b for a, b in zip(own, floor, strict=True))
        for name, own in times.items()
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
        seconds={name: statistics.median(own) for name, own in times.items()},
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

    As `timeit` does, without the garbage collector, which would run in whatever case
    its count is full; nor before each, since walking over all objects of Python empties
    the caches that real calls find full.

    Args:
        cases: What is timed, by name.
        rounds: How often.
        device: Where it runs.
        progress: Called after every round.

    Returns:
        For each case as many seconds as rounds.
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
