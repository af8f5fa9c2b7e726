"""Computes kernels within a memory budget, with a cache from which it resumes.

Work + Resources -> plan -> parts found in the cache -> remaining parts computed
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from ntk.kernels import Engine, EngineInput, KernelResult, compute
from ntk.scale.cache import KernelCache, content_key
from ntk.scale.planning import Plan, compute_as_planned, plan
from ntk.scale.processes import Processes
from ntk.scale.resources import Resources
from ntk.scale.sharded import ShardedEngine
from ntk.scale.work import Work
from rocoft.commands import Progress

__all__ = ["Computation", "kernels"]


@dataclass(frozen=True)
class Computation:
    """Computed kernels, with the plan that was followed.

    Attributes:
        result: The kernels, rows and columns in the order of the batches.
        plan: The plan that was followed; None unless the implementation is factors.
        cache: The cache file of the kernels, if there is one.
        processes: Number of processes that shared the work.
        seconds: Wall time.
    """

    result: KernelResult
    plan: Plan | None
    cache: KernelCache | None
    processes: int
    seconds: float


def kernels(
    work: Work,
    resources: Resources = Resources(),
    *,
    progress: Progress | None = None,
) -> Computation:
    """Compute kernels within given resources.

    The implementation by factors respects the memory budget, caches each finished part,
    and resumes from parts that an earlier call has cached. The other implementations
    run in one piece, without plan and cache.

    Args:
        work: The kernels to compute.
        resources: The memory, disk and processes to use. Several processes must all
            call this with the same work; all get the kernels, the first one caches
            them.
        progress: Called as the work goes on.

    Returns:
        The kernels.

    Raises:
        ValueError: If processes have different work, the implementation cannot be
            shared among processes, or a custom readout has no name for the cache.

    >>> import torch
    >>> from ntk.spaces import Full
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    >>> kernels(Work(model, [x], 1, {"full": Full()})).result.kernels["full"].shape
    torch.Size([4, 4, 2, 2])
    """
    start = time.perf_counter()
    processes, options = resources.processes, work.options
    if resources.cache is not None and options.outputs and not work.readout:
        raise ValueError(
            "outputs= is a function, which cannot be part of a cache key. Name it with "
            "Work(readout=...), or compute without a cache."
        )
    key = ""
    if processes is not None or resources.cache is not None:
        key = content_key(work, processes=1 if processes is None else processes.size)
    if processes is not None and len(set(processes.gather(key))) > 1:
        raise ValueError(
            "the processes do not have the same weights, examples, spaces, "
            "versions or number of threads. Start them with the same command, "
            "on machines with the same installation."
        )
    followed, cache = None, None
    if options.implementation == "factors":
        if resources.cache is not None and (processes is None or processes.is_first):
            cache = KernelCache(resources.cache, key)
        followed, result = _by_plan(work, resources, cache, progress)
    else:
        result = _whole(work, processes, progress)
    size = 1 if processes is None else processes.size
    return Computation(result, followed, cache, size, time.perf_counter() - start)


def _whole(
    work: Work, processes: Processes | None, progress: Progress | None
) -> KernelResult:
    """Compute all kernels in one piece, without a plan."""
    engine: Callable[[EngineInput], Engine] = Engine
    if processes is not None:
        if work.options.implementation == "jvp":
            raise ValueError(
                "implementation='jvp' is not shared among processes. Use 'factors' or "
                "'autograd', or one process."
            )
        engine = partial(ShardedEngine, processes=processes)
    return compute(
        work.model,
        list(work.batches),
        work.right,
        spaces=work.spaces,
        options=work.options,
        engine=engine,
        progress=progress,
    )


def _by_plan(
    work: Work,
    resources: Resources,
    cache: KernelCache | None,
    progress: Progress | None,
) -> tuple[Plan, KernelResult]:
    """Compute the parts that are not cached; return the plan that was followed, too."""
    followed, processes = plan(work, resources), resources.processes
    keep: Callable[[int, KernelResult], None] | None = None
    with nullcontext() if cache is None else cache.held():
        done, sums = 0, KernelResult({})
        if cache is not None:
            followed, done, sums = cache.load(followed, work.resolved, resources.spill)
            keep = lambda number, sums: cache.store(
                followed, work.resolved, number, sums
            )
        if processes is not None:
            followed, done, sums = processes.broadcast((followed, done, sums), 0)
        result = compute_as_planned(
            work,
            followed,
            start=(sums, done),
            keep=keep,
            processes=processes,
            progress=progress,
        )
    return followed, result
