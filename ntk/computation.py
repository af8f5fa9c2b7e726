"""The kernels of a comparison: planned for the memory there is, kept, computed.

Between what is compared and what is measured on it: the kernels are computed as the
caller asks for, found where an earlier run has kept them, and an estimated full kernel
is put together from its estimates.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ntk.approximation import ApproximateKernel
from ntk.cache import KernelCache
from ntk.comparison import Comparison
from ntk.engine import KernelResult
from ntk.kernel import Implementation, Kind, compute
from ntk.memory import Plan, compute_as_planned
from ntk.precision import Precision
from ntk.processes import Processes
from rocoft.console import Progress

__all__ = ["Computation"]


@dataclass(frozen=True)
class Computation:
    """The kernels of a comparison, and how they came about.

    Attributes:
        result: The kernels, rows and columns in the order of the batches.
        kind: Of kernel.
        precision: Of the products of gradients.
        implementation: How they were computed.
        plan: The plan that was followed; None where only factors have one.
        kept: The file they were found in or are kept in, if any.
        estimate: Of the full kernel, where it is not computed.
        processes: How many shared the work.
        seconds: What it took.
    """

    result: KernelResult
    kind: Kind
    precision: Precision
    implementation: Implementation
    plan: Plan | None
    kept: KernelCache | None
    estimate: ApproximateKernel | None
    processes: int
    seconds: float

    @classmethod
    def of(
        cls,
        compared: Comparison,
        *,
        kind: Kind = "sgd",
        precision: Precision = "float32",
        implementation: Implementation = "factors",
        memory: int | None = None,
        cache: Path | None = None,
        spill: Path | None = None,
        processes: Processes | None = None,
        progress: Progress | None = None,
    ) -> "Computation":
        """Compute the kernels of a comparison.

        Args:
            compared: The model, the examples and the spaces.
            kind: Of kernel.
            precision: Of the products of gradients, see `ntk.precision`.
            implementation: How kernels are computed.
            memory: Most bytes to hold while kernels are computed from factors; None
                means a share of what is free.
            cache: Folder for kernels of factors, where those are kept that have been
                computed, whole or half done, by their content; None means nowhere.
            spill: Folder for what there is no room for, see `memory.plan`.
            processes: Those that compute the same kernels together, each of which
                calls this and gets them; ``memory`` is what each may hold, and the
                first one keeps. None means that this one is alone.
            progress: Called as the work goes on.

        Returns:
            The kernels.

        Raises:
            ValueError: If processes do not have the same model and examples.
        """
        start = time.perf_counter()
        kept, how = None, None
        key = ""
        if processes is not None or cache is not None:
            key = compared.content_key(kind, precision, processes)
        if processes is not None and len(set(processes.gather(key))) > 1:
            raise ValueError(
                "the processes do not have the same weights, examples, spaces, "
                "versions or number of threads. Start them with the same command, "
                "on machines with the same installation."
            )
        if implementation == "factors":
            how = compared.plan(memory, spill, processes)
            if cache is not None and (processes is None or processes.is_first):
                kept = KernelCache(cache, key)
            how, result = _by_plan(
                compared, kind, precision, how, kept, spill, processes, progress
            )
        else:
            result = compute(
                compared.backbone.module,
                compared.data.batches,
                compared.data.train_batches,
                spaces=compared.computed,
                kind=kind,
                precision=precision,
                implementation=implementation,
                processes=processes,
                progress=progress,
            )
        estimate = None
        if compared.approximate is not None:
            estimate = compared.approximate.collected("full", result.kernels)
            result.kernels["full"] = estimate.kernel
        size = 1 if processes is None else processes.size
        seconds = time.perf_counter() - start
        what = (result, kind, precision, implementation)
        return cls(*what, how, kept, estimate, size, seconds)


def _by_plan(
    compared: Comparison,
    kind: Kind,
    precision: Precision,
    how: Plan,
    kept: KernelCache | None,
    spill: Path | None,
    processes: Processes | None,
    progress: Progress | None,
) -> tuple[Plan, KernelResult]:
    """Compute what has not been kept; return the plan that was followed, too."""
    resolved = compared.resolved
    keep: Callable[[int, KernelResult], None] | None = None
    with nullcontext() if kept is None else kept.held():
        done, found = 0, KernelResult({})
        if kept is not None:
            how, done, found = kept.load(how, resolved, spill)
            keep = lambda number, sums: kept.store(how, resolved, number, sums)
        if processes is not None:
            how, done, found = processes.broadcast((how, done, found), 0)
        return how, compute_as_planned(
            compared.backbone.module,
            compared.data.batches,
            how,
            spaces=compared.computed,
            kind=kind,
            precision=precision,
            start=(found, done),
            keep=keep,
            processes=processes,
            progress=progress,
        )
