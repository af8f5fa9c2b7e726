"""The engine of a process that computes its blocks of kernels, and what joins them.

Examples are shared out among P processes. Each runs the passes over its own and keeps
what these leave; then, parameter by parameter, each in turn sends what it holds of its
right examples to the others, which contract it with their own. So passes, memory and
products are all parted by P, and what is sent of a weight is what its factors take:

    K = [K_ab],  a, b = 1..P,   K_ab contracted by process a as b sends its share.

Of a symmetric kernel a pair of blocks K_ab and K_ba is computed once, by the one for
which the other is among the next P / 2 in a ring, so that all have as many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntk.accumulator import Accumulator
from ntk.coverage import Service, Verdicts
from ntk.engine import Counter, Engine, Store, Sums, groups
from ntk.features import stored_bytes
from ntk.function import batch_length
from ntk.processes import Processes

SEVERITY = (Service.UNUSED, Service.BATCH, Service.SINGLE, Service.DEFINITION)
"""Services from the one that asks least of a parameter to that which asks most."""


@dataclass
class Block:
    """The Gram matrices of some left examples and one process's right ones.

    Attributes:
        rows: Numbers of the left examples among all.
        source: The rank of the process whose right examples these are.
        square: Whether left examples are some of the right ones.
        sums: The Gram matrices.
    """

    rows: Sequence[int]
    source: int
    square: bool
    sums: Accumulator


class ShardedEngine(Engine):
    """Computes Gram matrices together with other processes; all get the whole.

    Args:
        processes: They and this one.
        what: The arguments of `Engine`, the same in all of them.
    """

    def __init__(self, processes: Processes, *what: Any) -> None:
        super().__init__(*what)
        self.processes = processes

    def accumulated(self, verdicts: Verdicts) -> Sums:
        """Run this process's passes and contractions, and join all processes' blocks.

        Args:
            verdicts: How parameters are served; the severest of all processes after.

        Returns:
            The Gram matrices and traces of all examples.
        """
        blocks = list(self._blocks(verdicts))
        self.outputs = max(self.processes.gather(self.outputs))
        for others in self.processes.gather(verdicts):
            for name, verdict in others.items():
                if _severity(verdict.service) > _severity(verdicts[name].service):
                    verdicts[name] = verdict
        outputs = self.outputs if self.how.coupled else 1
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
        team = self.processes
        further = self.left[len(self.right) :] if self.prefix else self.left
        own_right, own_further = team.share(self.right), team.share(further)
        places = team.places(self.right)
        kinds = {v.service for v in verdicts.values()} - {Service.UNUSED}
        examples = sum(map(batch_length, (*own_right, *own_further)))
        passes = Counter("passes", examples * max(1, len(kinds)), self._told)
        right = self._store(own_right, verdicts, passes)
        size = stored_bytes(right.values()) / max(1, len(places[team.rank]))
        some = groups(own_further, size, self.left_bytes)
        # All must take part in sending as often as the one with most groups.
        rounds = max(team.gather(len(some)))
        some += [[]] * (rounds - len(some))
        counted = Counter(
            "contractions", len(self.jobs) * (rounds + self.prefix), self._told
        )
        lengths = [len(own) for own in places]
        if self.prefix:
            rows = places[team.rank]
            sources = [b for b in range(team.size) if self._computes(team.rank, b)]
            sums = self._sums(len(rows), lengths, sources)
            self._exchange(sums, right, right, counted, last=not rounds)
            for source, own in sums.items():
                yield Block(rows, source, True, own)
        start = sum(map(batch_length, self.left)) - sum(map(batch_length, further))
        rows = [start + i for i in team.places(further)[team.rank]]
        for number, group in enumerate(some, 1):
            left = self._store(group, verdicts, passes)
            n = sum(map(batch_length, group))
            sums = self._sums(n, lengths, range(team.size))
            self._exchange(sums, left, right, counted, last=number == rounds)
            for source, own in sums.items():
                yield Block(rows[:n], source, False, own)
            rows = rows[n:]

    def _computes(self, a: int, b: int) -> bool:
        """Whether process a computes the block of its own and b's right examples."""
        size, ahead = self.processes.size, (b - a) % self.processes.size
        if a == b or self.how.left is not self.how.right:
            return True
        return 2 * ahead < size or (2 * ahead == size and a < b)

    def _sums(
        self, n: int, lengths: Sequence[int], sources: Sequence[int]
    ) -> dict[int, Accumulator]:
        rank, spaces = self.processes.rank, list(self.maps)
        return {
            b: Accumulator(spaces, n, lengths[b], self.how, traced=b == rank)
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
            sums: For each process whose blocks this one computes, where they go.
            left: Of own left examples; emptied.
            right: Of own right examples; the same object if they are the same.
            counter: Told of every job.
            last: Whether this empties the right store as well.
        """
        with torch.no_grad():
            for key in self.jobs:
                mine = right.pop(key, None) if last else right.get(key)
                ours = mine if left is right else left.pop(key, None)
                for source in range(self.processes.size):
                    theirs = self.processes.broadcast(mine, source)
                    if source in sums and ours is not None and theirs is not None:
                        self._add(sums[source], key, ours, theirs)
                counter(1)
            for own in sums.values():
                own.contract()

    def _joined(
        self, blocks: Sequence[Block], outputs: int, like: Tensor
    ) -> dict[str, Tensor]:
        """Send all blocks to all processes and put them in their places."""
        n, m = (sum(map(batch_length, side)) for side in (self.left, self.right))
        places = self.processes.places(self.right)
        c, found = outputs, {}
        for space in self.maps:
            own = [
                (b.rows, b.source, b.square, b.sums.grams(c, like)[space])
                for b in blocks
            ]
            whole = like.new_zeros((c, n, c, m), dtype=torch.float64)
            for part in self.processes.gather(own):
                for rows, source, square, gram in part:
                    columns = places[source]
                    if not (len(rows) and len(columns)):
                        continue
                    i, j = (
                        torch.tensor(some, device=like.device)
                        for some in (rows, columns)
                    )
                    block = gram.view(c, len(rows), c, len(columns))
                    whole[:, i[:, None], :, j] = block.permute(1, 3, 0, 2)
                    if square and self.how.left is self.how.right:
                        whole[:, j[:, None], :, i] = block.permute(3, 1, 2, 0)
            found[space] = whole.view(c * n, c * m)
        return found

    def _told(self, what: str, done: int, total: int) -> None:
        """Hand on progress, and see whether the others go on as well."""
        self.processes.check()
        if self.progress is not None:
            self.progress(what, done, total)


def _severity(service: Service) -> int:
    return SEVERITY.index(service)


def _traces(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """Return what each parameter adds to the trace over own examples."""
    own = [b.sums.traces() for b in blocks if b.square and b.sums.traced]
    return own[0] if own else {}
