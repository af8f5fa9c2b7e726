"""The passes over a list of batches, each parameter served by its coverage verdict.

A parameter that a batch uses differently from the compared examples is served one
example at a time; if no rule covers it then, by the definition. That needs no new
comparison with autograd: a single example shares no tensors, and its uses have rules.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ntk.gradients.capture import backward, record
from ntk.gradients.coverage import Service, Verdict, Verdicts
from ntk.gradients.factors import Factor
from ntk.gradients.function import Batch, NetworkFunction, batch_length, take
from ntk.gradients.rules import Use


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


def run(
    function: NetworkFunction,
    batches: Sequence[Batch],
    verdicts: Verdicts,
    collect: Callable[[Service, set[str]], Collector],
    progress: Callable[[int], None] | None = None,
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

    Returns:
        The number of outputs, 0 if no pass was run.
    """
    c = 0
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
        for group in (g for batch in batches for g in _groups(batch, single=single)):
            outputs, recorder = record(function, group, (served | watched) - late)
            layouts = recorder.layouts()
            late |= recorder.unserved.keys() & served
            late |= watched & (layouts.keys() | recorder.unserved.keys())
            if not single and batch_length(group) > 1:
                late |= {
                    name
                    for name in layouts.keys() & served
                    if layouts[name] != verdicts[name].layouts
                }
            n, c = batch_length(group), outputs.shape[1]
            collector.begin(recorder.uses, n, c, late)
            backward(outputs, recorder, collector.receive)
            collector.end()
            if progress is not None:
                progress(n)
        collector.finish(late)
        verdicts.update(dict.fromkeys(late, Verdict(fallback)))
    return c


def sample(*sides: Sequence[Batch]) -> Batch:
    """Return a batch for the comparison, of several examples if there is one."""
    batches = [batch for side in sides for batch in side]
    return next((b for b in batches if batch_length(b) > 1), batches[0])


def _groups(batch: Batch, *, single: bool) -> list[Batch]:
    """Return the inputs of each pass: the batch, or each of its examples."""
    if not single:
        return [batch]
    return [take(batch, slice(i, i + 1)) for i in range(batch_length(batch))]
