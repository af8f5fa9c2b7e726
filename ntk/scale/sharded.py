"""An engine that computes its process's blocks of kernels, and joins those of all.

Examples are divided among P processes. Each runs the passes over its own examples and
stores features and factors. Then, parameter by parameter, each process in turn sends
those of its right examples to the others, which contract them with their own left
examples. Passes, memory and products are all divided by P; the traffic is the size of
the factors:

    K = [K_ab],  a, b = 1..P,   K_ab contracted by process a as b sends its share.

Of a symmetric kernel only one of K_ab and K_ba is computed: by the process for which
the other one is among the next P / 2 in a ring, which balances the work.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk.gradients import Service, Verdicts, batch_length
from ntk.kernels import (
    Accumulator,
    Counter,
    Engine,
    EngineInput,
    Store,
    Sums,
    groups,
    stored_bytes,
)
from ntk.scale.processes import Processes

SEVERITY = (Service.UNUSED, Service.BATCH, Service.SINGLE, Service.DEFINITION)
"""Services from the cheapest to the most general."""


@dataclass
class Block:
    """Gram matrices of some left examples with one process's right examples.

    Attributes:
        rows: Indices of the left examples among all.
        source: Rank of the process that has the right examples.
        square: Whether the left examples are also right ones.
        sums: The Gram matrices.
    """

    rows: Sequence[int]
    source: int
    square: bool
    sums: Accumulator


class ShardedEngine(Engine):
    """Computes Gram matrices together with other processes; all get the result.

    Args:
        given: What to compute, the same in all processes.
        processes: The processes.
    """

    def __init__(self, given: EngineInput, processes: Processes) -> None:
        super().__init__(given)
        self.processes = processes

    def accumulated(self, verdicts: Verdicts) -> Sums:
        """Run this process's passes and contractions, and join all processes' blocks.

        Args:
            verdicts: How parameters are served; updated to the most general service
                that any process needs.

        Returns:
            The Gram matrices and traces of all examples.
        """
        blocks = list(self._blocks(verdicts))
        self.outputs = max(self.processes.gather(self.outputs))
        for reached in self.processes.gather(verdicts):
            for name, verdict in reached.items():
                if _severity(verdict.service) > _severity(verdicts[name].service):
                    verdicts[name] = verdict
        outputs = self.outputs if self.contraction.coupled else 1
        like = next(iter(self.function.parameters.values()))
        traces: dict[str, dict[str, float]] = {space: {} for space in self.maps}
        for part in self.processes.gather(_traces(blocks)):
            for space, by_name in part.items():
                for name, value in by_name.items():
                    total = traces[space].get(name, 0.0) + value
                    traces[space][name] = total
        return Sums(self._joined(blocks, outputs, like), traces)

    def _blocks(self, verdicts: Verdicts) -> Iterator[Block]:
        """Compute this process's blocks."""
        processes = self.processes
        others = self.left[len(self.right) :] if self.prefix else self.left
        my_right, my_others = processes.share(self.right), processes.share(others)
        places = processes.places(self.right)
        kinds = {v.service for v in verdicts.values()} - {Service.UNUSED}
        examples = sum(map(batch_length, (*my_right, *my_others)))
        passed = Counter("passes", examples * max(1, len(kinds)), self._report)
        right = self._store(my_right, verdicts, passed)
        size = stored_bytes(right.values()) / max(1, len(places[processes.rank]))
        parts = groups(my_others, size, self.left_bytes)
        # Every process must take part in every exchange: pad with empty groups.
        rounds = max(processes.gather(len(parts)))
        parts += [[]] * (rounds - len(parts))
        contracted = Counter(
            "contractions", len(self.shared) * (rounds + self.prefix), self._report
        )
        lengths = [len(indices) for indices in places]
        if self.prefix:
            rows = places[processes.rank]
            sources = [
                b for b in range(processes.size) if self._computes(processes.rank, b)
            ]
            sums = self._sums(len(rows), lengths, sources)
            self._exchange(sums, right, right, contracted, last=not rounds)
            for source, block in sums.items():
                yield Block(rows, source, True, block)
        start = sum(map(batch_length, self.left)) - sum(map(batch_length, others))
        rows = [start + i for i in processes.places(others)[processes.rank]]
        for number, group in enumerate(parts, 1):
            left = self._store(group, verdicts, passed)
            n = sum(map(batch_length, group))
            sums = self._sums(n, lengths, range(processes.size))
            self._exchange(sums, left, right, contracted, last=number == rounds)
            for source, block in sums.items():
                yield Block(rows[:n], source, False, block)
            rows = rows[n:]

    def _computes(self, a: int, b: int) -> bool:
        """Whether process a computes the block of its own with b's right examples."""
        size, ahead = self.processes.size, (b - a) % self.processes.size
        if a == b or self.contraction.left is not self.contraction.right:
            return True
        return 2 * ahead < size or (2 * ahead == size and a < b)

    def _sums(
        self, n: int, lengths: Sequence[int], sources: Sequence[int]
    ) -> dict[int, Accumulator]:
        rank, spaces = self.processes.rank, list(self.maps)
        return {
            b: Accumulator(spaces, n, lengths[b], self.contraction, traced=b == rank)
            for b in sources
        }

    def _exchange(
        self,
        sums: dict[int, Accumulator],
        left: Store,
        right: Store,
        counter: Counter,
        *,
        last: bool,
    ) -> None:
        """Contract own left examples with the right ones of each process in turn.

        Args:
            sums: Receives the Gram matrices, by the rank of the right examples.
            left: Store of own left examples; emptied.
            right: Store of own right examples; may be the same object.
            counter: Called with the number of contractions done.
            last: Whether to empty the right store as well.
        """
        with torch.no_grad():
            for key in self.shared:
                mine = right.pop(key, None) if last else right.get(key)
                ours = mine if left is right else left.pop(key, None)
                for source in range(self.processes.size):
                    theirs = self.processes.broadcast(mine, source)
                    if source in sums and ours is not None and theirs is not None:
                        self._add(sums[source], key, ours, theirs)
                counter(1)
            for block in sums.values():
                block.contract()

    def _joined(
        self, blocks: Sequence[Block], outputs: int, like: Tensor
    ) -> dict[str, Tensor]:
        """Send all blocks to all processes and assemble the Gram matrices."""
        n, m = (sum(map(batch_length, side)) for side in (self.left, self.right))
        places = self.processes.places(self.right)
        c, joined = outputs, {}
        for space in self.maps:
            mine = [
                (b.rows, b.source, b.square, b.sums.grams(c, like)[space])
                for b in blocks
            ]
            whole = like.new_zeros((c, n, c, m), dtype=torch.float64)
            for part in self.processes.gather(mine):
                for rows, source, square, gram in part:
                    columns = places[source]
                    if not (len(rows) and len(columns)):
                        continue
                    i, j = (
                        torch.tensor(indices, device=like.device)
                        for indices in (rows, columns)
                    )
                    block = gram.view(c, len(rows), c, len(columns))
                    whole[:, i[:, None], :, j] = block.permute(1, 3, 0, 2)
                    if square and self.contraction.left is self.contraction.right:
                        whole[:, j[:, None], :, i] = block.permute(3, 1, 2, 0)
            joined[space] = whole.view(c * n, c * m)
        return joined

    def _report(self, step: str, done: int, total: int) -> None:
        """Report progress, and check that the other processes are alive."""
        self.processes.check()
        if self.progress is not None:
            self.progress(step, done, total)


def _severity(service: Service) -> int:
    return SEVERITY.index(service)


def _traces(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """Return each parameter's share of the trace over this process's examples."""
    traces = [b.sums.traces() for b in blocks if b.square and b.sums.traced]
    return traces[0] if traces else {}
