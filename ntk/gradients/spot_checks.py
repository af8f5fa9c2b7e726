"""Later examples on which factors are compared with the judge.

Coverage verdicts come from the first few examples. A later example may take another
branch, route its tokens elsewhere or meet the others of its batch. So a few more are
run alone, by plain autograd, and compared with what the passes delivered for them. Of n
examples at least one in 64 is checked: one forward and one backward pass, half of the
weights' gradients, which is under 2 % of the passes at 64 examples or more. Of fewer
examples up to six are checked, with all weights, once for the same examples and values
of the weights.

Whole gradients are never formed: u' G v is compared, u and v drawn from a normal
distribution, whose standard deviation is the norm of G.
"""

import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntk.gradients.coverage import (
    BatchDependenceError,
    Service,
    Verdicts,
    check_same_outputs,
    checked_before,
    mixture,
    tolerance,
)
from ntk.gradients.factors import Factor
from ntk.gradients.function import Batch, NetworkFunction, batch_length, take
from ntk.gradients.judge import deliver_gradients, requiring
from ntk.gradients.rules import Use

__all__ = ["BatchDependenceError", "Comparison", "SpotChecks"]

EVERY = 64
"""Number of examples for each one checked."""
FEW = 6
"""Largest number of examples checked of fewer than `EVERY`."""


class SpotChecks:
    """Chooses the examples to check.

    Args:
        function: The model and its readout, in evaluation mode.
        batches: All examples.
    """

    def __init__(self, function: NetworkFunction, batches: Sequence[Batch]) -> None:
        self.function = function
        lengths = list(map(batch_length, batches))
        n = sum(lengths)
        count = min(n, max(n // EVERY, min(FEW, 3 * EVERY // (2 * n))))
        chosen = {n - 1 - j * n // count for j in range(count)}
        self._half = n >= EVERY
        self._rows: dict[int, list[int]] = {}
        start = 0
        for batch, length in zip(batches, lengths, strict=True):
            rows = [i for i in range(length) if start + i in chosen]
            if rows:
                self._rows[id(batch)] = rows
            start += length
        # Keeps the batches alive, so that their ids stay theirs.
        self._batches = batches

    def examples(self) -> list[Batch]:
        """Return the chosen examples, each a batch of its own."""
        return [
            take(batch, slice(row, row + 1))
            for batch in self._batches
            for row in self._rows.get(id(batch), ())
        ]

    def check_outputs(self) -> None:
        """Check that the examples have the outputs in their batch that they have alone.

        Raises:
            BatchDependenceError: If one has not.
        """
        with requiring(self.function.parameters, ()):
            for batch in self._batches:
                if rows := self._rows.get(id(batch)):
                    together = self.function(batch).detach()
                    for row in rows:
                        alone = self.function(take(batch, slice(row, row + 1)))
                        check_same_outputs(together[row : row + 1], alone.detach())

    def begin(
        self, batch: Batch, place: slice, verdicts: Verdicts, names: Collection[str]
    ) -> "Comparison":
        """Start the comparison of a group of examples.

        Args:
            batch: The batch that the group is taken from.
            place: The examples of the batch that are in the group.
            verdicts: How parameters are served.
            names: The parameters served in this pass.

        Returns:
            The comparison, without examples if none of the group is to be checked.
        """
        comparison = Comparison(self.function, names)
        for row in self._rows.get(id(batch), ()):
            if not place.start <= row < place.stop:
                continue
            example = take(batch, slice(row, row + 1))
            done = checked_before(self.function, _digest(example))
            chosen = {
                name
                for name in names
                if not (self._half and verdicts[name].proven)
                or (zlib.crc32(name.encode()) + row) % 2
            }
            chosen = {n for n in chosen if (n, verdicts[n].service) not in done}
            if chosen:
                comparison.examples[row - place.start] = _Example(
                    example, {name: verdicts[name].service for name in chosen}, done
                )
        return comparison


@dataclass
class _Example:
    """An example to check, the parameters to check, and what was delivered for them.

    Attributes:
        batch: A batch of this example alone.
        names: The parameters, and how they are served.
        done: Receives the parameters that agree.
        sums: For each parameter, u' G v of the mixed outputs.
        sizes: For each parameter, the sum of the magnitudes of its terms.
    """

    batch: Batch
    names: dict[str, Service]
    done: set[tuple[str, Service]]
    sums: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)


class Comparison:
    """Compares the factors of some examples of a group with the judge's gradients.

    Args:
        function: The model and its readout, in evaluation mode.
        names: The parameters served in this pass.
    """

    def __init__(self, function: NetworkFunction, names: Collection[str]) -> None:
        self.function = function
        self.names = names
        self.examples: dict[int, _Example] = {}
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self._outputs: Tensor | None = None

    def start(self, outputs: Tensor) -> None:
        """Receive the outputs ``(n, c)`` of the group."""
        self._outputs = outputs.detach()

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Receive the factor of output k for one use of a parameter."""
        if self._outputs is None:
            return
        for row, example in self.examples.items():
            if use.name in example.names:
                weight = float(mixture(self._outputs)[k])
                value, size = factor.example(row).projected(*self._pair(use.name))
                example.sums[use.name] = (
                    example.sums.get(use.name, 0.0) + weight * value
                )
                example.sizes[use.name] = example.sizes.get(use.name, 0.0) + size

    def wrong(self) -> set[str]:
        """Return the parameters whose factors are not the judge's gradients.

        Raises:
            BatchDependenceError: If an example alone has other outputs.
        """
        wrong: set[str] = set()
        for row, example in self.examples.items():
            missed = self._judged(row, example)
            example.done |= {
                item for item in example.names.items() if item[0] not in missed
            }
            wrong |= missed
        return wrong

    def _judged(self, row: int, example: _Example) -> set[str]:
        assert self._outputs is not None
        parameters = self.function.parameters
        chosen = {name: parameters[name] for name in sorted(example.names)}
        wrong = set(chosen)

        def compare(name: str, gradient: Tensor) -> None:
            u, v = self._pair(name)
            flat = gradient.reshape(len(u), len(v)).to(u)
            expected, norm = float(u @ flat @ v), float(flat.norm())
            if self._agree(name, example, expected, norm):
                wrong.discard(name)

        with requiring(parameters, chosen):
            outputs = self.function(example.batch)
            check_same_outputs(self._outputs[row : row + 1], outputs.detach())
            mixed = (outputs @ mixture(outputs)).sum()
            arrived = deliver_gradients(mixed, chosen, compare, retain=False)
        for name in chosen.keys() - arrived:
            if self._agree(name, example, 0.0, 0.0):
                wrong.discard(name)
        return wrong

    def _agree(
        self, name: str, example: _Example, expected: float, norm: float
    ) -> bool:
        accuracy = tolerance(self.function.parameters[name].dtype)
        error = abs(example.sums.get(name, 0.0) - expected)
        # The factor 4 is for the normal distribution of u' (error) v.
        return error <= 4 * accuracy * norm + 0.01 * accuracy * example.sizes.get(
            name, 0.0
        )

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return u and v of a parameter, of the lengths of its rows and of a row."""
        if name not in self._vectors:
            parameter = self.function.parameters[name]
            rows = parameter.shape[0] if parameter.ndim else 1
            sizes = (rows, parameter.numel() // max(1, rows))
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            wide = torch.promote_types(parameter.dtype, torch.float32)
            u, v = (
                torch.randn(size, generator=generator, dtype=wide).to(parameter.device)
                for size in sizes
            )
            self._vectors[name] = (u, v if parameter.ndim > 1 else torch.ones_like(v))
        return self._vectors[name]


def _digest(example: Batch) -> bytes:
    """Return a digest of an example's tensors."""
    tensors: Mapping[str, object] = (
        {"": example} if isinstance(example, Tensor) else example
    )
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            raw = value.detach().cpu().contiguous().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()
