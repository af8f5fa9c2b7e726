"""The kernels of a comparison: planned for the memory there is, kept, computed.

Between what is compared and what is measured on it: the kernels are computed as the
caller asks for, found where an earlier run has kept them, and an estimated full kernel
is put together from its sketches.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ntk.approximation import ApproximateKernel
from ntk.cache import KernelCache
from ntk.comparison import Comparison
from ntk.engine import KernelResult
from ntk.kernel import Implementation, Kind, compute
from ntk.memory import Plan, compute_as_planned
from rocoft.console import Progress

__all__ = ["Computation"]


@dataclass(frozen=True)
class Computation:
    """The kernels of a comparison, and how they came about.

    Attributes:
        result: The kernels, rows and columns in the order of the batches.
        kind: Of kernel.
        implementation: How they were computed.
        plan: The plan that was followed; None where only factors have one.
        kept: The file they were found in or are kept in, if any.
        estimate: Of the full kernel, where it is not computed.
        seconds: What it took.
    """

    result: KernelResult
    kind: Kind
    implementation: Implementation
    plan: Plan | None
    kept: KernelCache | None
    estimate: ApproximateKernel | None
    seconds: float

    @classmethod
    def of(
        cls,
        compared: Comparison,
        *,
        kind: Kind = "sgd",
        implementation: Implementation = "factors",
        memory: int | None = None,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> "Computation":
        """Compute the kernels of a comparison.

        Args:
            compared: The model, the examples and the spaces.
            kind: Of kernel.
            implementation: How kernels are computed.
            memory: Most bytes to hold while kernels are computed from factors; None
                means a share of what is free.
            cache: Folder for kernels of factors, where those are kept that have been
                computed, whole or half done, by their content; None means nowhere.
            progress: Called as the work goes on.

        Returns:
            The kernels.
        """
        start = time.perf_counter()
        kept, how = None, None
        if implementation == "factors":
            how = compared.plan(memory)
            if cache is not None:
                kept = KernelCache(cache, compared.content_key(kind))
            how, result = _by_plan(compared, kind, how, kept, progress)
        else:
            result = compute(
                compared.backbone.module,
                compared.data.batches,
                compared.data.train_batches,
                spaces=compared.computed,
                kind=kind,
                implementation=implementation,
                progress=progress,
            )
        estimate = None
        if compared.approximate is not None:
            estimate = compared.approximate.collected("full", result.kernels)
            result.kernels["full"] = estimate.kernel
        seconds = time.perf_counter() - start
        return cls(result, kind, implementation, how, kept, estimate, seconds)


def _by_plan(
    compared: Comparison,
    kind: Kind,
    how: Plan,
    kept: KernelCache | None,
    progress: Progress | None,
) -> tuple[Plan, KernelResult]:
    """Compute what has not been kept; return the plan that was followed, too."""
    work = partial(
        compute_as_planned,
        compared.backbone.module,
        compared.data.batches,
        spaces=compared.computed,
        kind=kind,
        progress=progress,
    )
    if kept is None:
        return how, work(how)
    resolved = compared.resolved
    with kept.held():
        how, done, found = kept.load(how, resolved)
        keep = lambda number, sums: kept.store(how, resolved, number, sums)
        return how, work(how, start=(found, done), keep=keep)
