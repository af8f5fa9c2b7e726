"""The passes over a list of batches, each parameter served by its coverage verdict.

A parameter that a batch uses differently from the compared examples is served one
example at a time; if no rule covers it then, by the judge. What no rule can see is
looked for in three ways: parameters without an expected use require gradients, so that
autograd tells if it reaches them; a batch that shows no use of a served parameter is
run once more with it; and `ntk.gradients.spot_checks` compares a few later examples.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ntk.gradients.capture import backward, record
from ntk.gradients.coverage import Service, Verdict, Verdicts, revise
from ntk.gradients.factors import Factor
from ntk.gradients.function import Batch, NetworkFunction, batch_length, take
from ntk.gradients.judge import requiring
from ntk.gradients.rules import Use
from ntk.gradients.spot_checks import Comparison, SpotChecks


class Collector(Protocol):
    """Receives the factors of the passes of one service."""

    def begin(
        self, uses: Sequence[Use], examples: int, outputs: int, without: Collection[str]
    ) -> None:
        """Start a batch, without some parameters."""

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Receive the factor of output k for one use of a parameter."""

    def end(self) -> None:
        """End the batch."""

    def finish(self, without: Collection[str]) -> None:
        """Store the results, except those of some parameters."""


class RetractedError(Exception):
    """Factors that were delivered have turned out wrong; the verdicts are corrected."""


def run(
    function: NetworkFunction,
    batches: Sequence[Batch],
    verdicts: Verdicts,
    collect: Callable[[Service, set[str]], Collector],
    progress: Callable[[int], None] | None = None,
    checks: SpotChecks | None = None,
    *,
    streamed: bool = False,
) -> int:
    """Run the passes by batch, then those by example.

    Args:
        function: The model and its readout.
        batches: The examples.
        verdicts: How each parameter is served; updated if a batch uses a parameter
            differently from the compared examples.
        collect: Function of a service and the parameters it serves that returns the
            collector of their factors.
        progress: Called with the number of examples done since the last call.
        checks: The examples to compare with the judge; None chooses some of these.
        streamed: Whether the collector uses factors at once, so that it cannot leave
            out parameters when it finishes.

    Returns:
        The number of outputs, 0 if no pass was run.

    Raises:
        RetractedError: If ``streamed``, and factors were wrong. Run again.
    """
    c = 0
    checks = SpotChecks(function, batches) if checks is None else checks
    for service, fallback in (
        (Service.BATCH, Service.SINGLE),
        (Service.SINGLE, Service.DEFINITION),
    ):
        single = service is Service.SINGLE
        served = {n for n, v in verdicts.items() if v.service is service}
        watched = {n for n, v in verdicts.items() if v.service is Service.UNUSED}
        if not served and (single or not watched):
            continue
        collector = collect(service, served)
        late: set[str] = set()
        for batch, place in _groups(batches, single=single):
            group = take(batch, place)
            live = () if single else watched - late
            wanted = (served | watched) - late
            outputs, recorder = record(function, group, wanted, live)
            layouts = recorder.layouts()
            late |= recorder.unserved.keys() & served
            late |= watched & (layouts.keys() | recorder.unserved.keys())
            late |= _hidden(function, group, served - late - layouts.keys())
            if not single and batch_length(group) > 1:
                late |= {
                    name
                    for name in layouts.keys() & served
                    if layouts[name] != verdicts[name].layouts
                }
            n, c = batch_length(group), outputs.shape[1]
            comparison = checks.begin(batch, place, verdicts, served - late)
            comparison.start(outputs)
            collector.begin(recorder.uses, n, c, late)

            def receive(
                use: Use,
                k: int,
                factor: Factor,
                comparison: Comparison = comparison,
                collector: Collector = collector,
            ) -> None:
                comparison.receive(use, k, factor)
                collector.receive(use, k, factor)

            backward(outputs, recorder, receive)
            collector.end()
            retracted = recorder.unserved.keys() & served - late
            if recorder.reached:
                # Hooks behind a use that is not seen do not fire.
                late |= recorder.reached
                retracted |= recorder.silent & served - late
            wrong = comparison.wrong() - late
            revise(function, wrong, fallback)
            retracted |= wrong
            late |= retracted
            if streamed and retracted:
                verdicts.update(dict.fromkeys(late, Verdict(fallback)))
                raise RetractedError
            if progress is not None:
                progress(n)
        collector.finish(late)
        verdicts.update(dict.fromkeys(late, Verdict(fallback)))
    return c


def _hidden(
    function: NetworkFunction, group: Batch, names: Collection[str]
) -> set[str]:
    """Return parameters without a recorded use if the outputs depend on any of them."""
    if not names:
        return set()
    with requiring(function.parameters, names):
        reached = function(group).requires_grad
    return set(names) if reached else set()


def sample(*sides: Sequence[Batch]) -> Batch:
    """Return examples for the comparison, up to `PAIRS` pairs from one batch.

    Blank and equal examples are left out as far as others are there: only gradients
    that differ, and are not zero, tell how the examples lie in a tensor.

    Args:
        *sides: Lists of batches.
    """
    batches = [batch for side in sides for batch in side]
    candidates = [b for b in batches if batch_length(b) > 1] or batches[:1]
    for batch in candidates[:SEARCHED]:
        distinct = _distinct(batch)
        if len(distinct) > 1:
            return _examples(batch, distinct[: len(distinct) // 2 * 2][: 2 * PAIRS])
    return take(candidates[0], slice(0, 2))


PAIRS = 2
"""Largest number of pairs of examples to compare."""
SEARCHED = 8
"""Number of batches in which examples to compare are looked for."""


def _distinct(batch: Batch) -> list[int]:
    """Return the examples that are neither blank nor equal to one before."""
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values())
    tensors = [
        t.flatten(1) if t.ndim > 1 else t[:, None]
        for t in tensors
        if isinstance(t, Tensor)
    ]
    distinct: list[int] = []
    for i in range(batch_length(batch)):
        blank = not any(bool(t[i].any()) for t in tensors)
        if not blank and not any(
            all(torch.equal(t[i], t[j]) for t in tensors) for j in distinct
        ):
            distinct.append(i)
        if len(distinct) == 2 * PAIRS:
            break
    return distinct


def _examples(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return some examples of a batch by their indices."""
    if isinstance(batch, Tensor):
        return batch[list(rows)]
    return {
        key: value[list(rows)] if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _groups(batches: Sequence[Batch], *, single: bool) -> Iterator[tuple[Batch, slice]]:
    """Yield the inputs of each pass: a batch, and all or one of its examples."""
    for batch in batches:
        n = batch_length(batch)
        if single:
            yield from ((batch, slice(i, i + 1)) for i in range(n))
        else:
            yield batch, slice(0, n)
