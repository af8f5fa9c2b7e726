"""The passes over a list of batches, each parameter served as `coverage` found.

What a batch uses otherwise than the examples that were compared did is served one
example at a time, where everything belongs to that example, and what no rule serves
then is left to the definition. That needs no comparison with autograd: a single
example shares nothing, and the uses are those that the rules know.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from ntk.capture import backward, record
from ntk.coverage import Service, Verdict, Verdicts
from ntk.factors import Factor
from ntk.function import Batch, NetworkFunction, batch_length, take
from ntk.rules import Use


class Collector(Protocol):
    """Takes what the passes of one service leave."""

    def begin(
        self, uses: Sequence[Use], examples: int, outputs: int, without: Collection[str]
    ) -> None:
        """Expect the next examples, less some parameters."""

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Take what output k leaves of one use."""

    def end(self) -> None:
        """Close the batch."""

    def finish(self, without: Collection[str]) -> None:
        """Keep what was collected, less some parameters."""


def run(
    function: NetworkFunction,
    batches: Sequence[Batch],
    verdicts: Verdicts,
    collect: Callable[[Service, set[str]], Collector],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Run the passes by batch and by example.

    Args:
        function: The model and its readout.
        batches: The examples.
        verdicts: How each parameter is served; corrected where a batch shows another
            use than the compared examples did.
        collect: From a service and the parameters it serves to what takes their
            factors.
        progress: Called with the number of examples done.

    Returns:
        The number of outputs, 0 if no pass was run.
    """
    c = 0
    for service, instead in (
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
        verdicts.update(dict.fromkeys(late, Verdict(instead)))
    return c


def sample(*sides: Sequence[Batch]) -> Batch:
    """Return examples to compare on; one alone cannot show what batches share."""
    batches = [batch for side in sides for batch in side]
    return next((b for b in batches if batch_length(b) > 1), batches[0])


def _groups(batch: Batch, *, single: bool) -> list[Batch]:
    """Return what one pass runs on: a batch, or each of its examples."""
    if not single:
        return [batch]
    return [take(batch, slice(i, i + 1)) for i in range(batch_length(batch))]
