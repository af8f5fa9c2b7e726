"""Collects features of maps, and factors of whole weights, from backward passes.

Gradients arrive weight by weight from the last layer to the first, one output of the
model after another. Features are usually computed as a gradient arrives. They wait for
the gradients of all outputs if they need only a small part of each, or if the whole
gradient is kept anyway: the layer's input is then read from memory once.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ntk.gradients import Factor, Key, Matrix, Use, Vector, dense, joined, raised
from ntk.spaces import InputSide, Map, Sketch, Slices, Whole

Stored = Tensor | list[list[Factor]]
"""Features ``(c, n, p)``, or the factors of every batch."""

Ready = Callable[[Key, Stored], None]
"""Called with the complete features or factors of one parameter and map."""


class Features:
    """Collects features and factors, batch after batch.

    Args:
        wanted: For each parameter the maps to store.
        parameters: Tensors of the shape, dtype and device of the gradients.
        n: Number of examples of all batches.
        store: Receives the features and factors when `finish` is called.
        ready: If given, receives the features or factors of a parameter as soon as all
            its gradients in a batch have arrived; nothing is then kept here.
    """

    def __init__(
        self,
        wanted: Mapping[str, Sequence[Map]],
        parameters: Mapping[str, Tensor],
        n: int,
        store: dict[Key, Stored],
        ready: Ready | None = None,
    ) -> None:
        self.wanted = wanted
        self.parameters = parameters
        self.n = n
        self.store = store
        self.ready = ready
        self._with_factors = {
            name
            for name, maps in wanted.items()
            if any(self._keeps_factors(name, map_) for map_ in maps)
        }
        self.features: dict[Key, Tensor] = {}
        self.factors: dict[Key, list[list[Factor]]] = {}
        self._place = slice(0, 0)
        self._outputs = 0
        self._uses: dict[str, list[Use]] = {}
        self._missing: dict[str, int] = {}
        self._arrived_factors: dict[int, list[Factor]] = {}
        self._buffered: dict[tuple[int, Map], tuple[Tensor, list[Tensor]]] = {}
        self._prepared: dict[tuple[int, Map], tuple[Tensor, ...]] = {}
        self._written: set[tuple[Key, int]] = set()

    def begin(
        self, uses: Sequence[Use], examples: int, outputs: int, without: Collection[str]
    ) -> None:
        """Start the next batch.

        Args:
            uses: All uses whose gradients will arrive.
            examples: Number of examples in the batch.
            outputs: Number of outputs of the model.
            without: Parameters to leave out.
        """
        start = self._place.stop if self.ready is None else 0
        self._place = slice(start, start + examples)
        self._outputs = outputs
        self._uses = {name: [] for name in self.wanted if name not in without}
        for use in uses:
            if use.name in self._uses:
                self._uses[use.name].append(use)
        self._missing = {n: len(u) * outputs for n, u in self._uses.items()}

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Receive the gradient factor of output k for one use of a parameter."""
        name = use.name
        if name not in self._uses:
            return
        if isinstance(factor, Vector):
            factor = raised(factor)
        for map_ in self.wanted[name]:
            if self._keeps_factors(name, map_):
                self._arrived_factors.setdefault(id(use), []).append(factor)
            elif isinstance(map_, Whole):
                assert isinstance(factor, Vector)
                self._accumulate((name, map_), k, factor.v[0])
            else:
                assert isinstance(map_, Slices | InputSide | Sketch)
                self._add(use, map_, k, factor)
        self._missing[name] -= 1
        if not self._missing[name]:
            self._close(name)

    def end(self) -> None:
        """Close the batch; gradients that have not arrived by now are zero."""
        for name in list(self._uses):
            self._close(name)
        self._written = set()

    def finish(self, without: Collection[str]) -> None:
        """Write features and factors to the store, except those of some parameters."""
        collected: dict[Key, Stored] = {
            key: self._collected(key) for key in self.factors
        }
        collected.update(self.features)
        self.store.update({k: v for k, v in collected.items() if k[0] not in without})

    def _close(self, name: str) -> None:
        """Complete the batch for one parameter."""
        uses = self._uses.pop(name)
        for map_ in self.wanted[name]:
            key = (name, map_)
            if self._keeps_factors(name, map_):
                arrived = [joined(self._arrived_factors.pop(id(use))) for use in uses]
                factors = arrived or [self._zero_factor(name)]
                self.factors.setdefault(key, []).append(factors)
            else:
                for use in uses:
                    self._add_buffered(use, map_)
                for k in range(self._outputs):
                    if (key, k) not in self._written:
                        self._buffer(key)[k, self._place] = 0
            if self.ready is not None:
                if key in self.factors:
                    self.ready(key, self._collected(key))
                    del self.factors[key]
                else:
                    self.ready(key, self.features.pop(key))

    def _keeps_factors(self, name: str, map_: Map) -> bool:
        """Whether factors are kept; for vectors the gradient itself is stored."""
        return isinstance(map_, Whole) and self.parameters[name].ndim > 1

    def _accumulate(self, key: Key, k: int, features: Tensor) -> None:
        """Add features ``(n, size)`` of output k to those of the batch."""
        out = self._buffer(key, features.dtype)[k, self._place]
        if (key, k) in self._written:
            out += features
        else:
            self._written.add((key, k))
            out.copy_(features)

    def _add(
        self, use: Use, map_: Slices | InputSide | Sketch, k: int, factor: Factor
    ) -> None:
        """Add output k's contribution, or buffer it until all outputs have arrived."""
        if (
            isinstance(factor, Matrix)
            and factor.rows is None
            and factor.output_dim == map_.of.output_dim
        ):
            (g,) = factor.g
            if map_.picks_few or use.name in self._with_factors:
                _, arrived = self._buffered.setdefault((id(use), map_), (factor.x, []))
                arrived.append(map_.pick(g))
                return
            if (prepared := self._prepared.get((id(use), map_))) is None:
                x = factor.x.to(self._buffer((use.name, map_), g.dtype))
                prepared = self._prepared[id(use), map_] = map_.prepare(x)
            self._add_prepared(use.name, map_, k, prepared, map_.pick(g))
            return
        # The weight is not used as a linear map in its own orientation.
        key, shape = (use.name, map_), self.parameters[use.name].shape
        gradient = dense([factor], shape).unflatten(2, shape)
        turned = gradient if map_.of.output_dim == 0 else gradient.transpose(2, 3)
        self._accumulate(key, k, map_.of_gradient(turned)[0])

    def _add_buffered(self, use: Use, map_: Map) -> None:
        """Compute the features of a use whose gradients were buffered."""
        self._prepared.pop((id(use), map_), None)
        if (id(use), map_) not in self._buffered:
            return
        assert isinstance(map_, Slices | InputSide | Sketch)
        x, arrived = self._buffered.pop((id(use), map_))
        prepared = map_.prepare(x.to(self._buffer((use.name, map_), arrived[0].dtype)))
        for k, g in enumerate(arrived):
            self._add_prepared(use.name, map_, k, prepared, g)

    def _add_prepared(
        self,
        name: str,
        map_: Slices | InputSide | Sketch,
        k: int,
        prepared: tuple[Tensor, ...],
        g: Tensor,
    ) -> None:
        key = (name, map_)
        buffer = self._buffer(key, g.dtype)
        first = (key, k) not in self._written
        self._written.add((key, k))
        map_.add(g.to(buffer), prepared, buffer[k, self._place], first=first)

    def _buffer(self, key: Key, dtype: torch.dtype | None = None) -> Tensor:
        """Return the feature buffer of a map, allocated at the first call.

        It is at least float32, in which half-precision features are summed, and wider
        if the model casts the weight to a wider dtype before using it.
        """
        if key not in self.features:
            like = self.parameters[key[0]]
            dtype = torch.promote_types(dtype or like.dtype, like.dtype)
            dtype = torch.promote_types(dtype, torch.float32)
            n = self.n if self.ready is None else self._place.stop
            shape = (self._outputs, n, key[1].size(like.shape))
            self.features[key] = like.new_empty(shape, dtype=dtype)
        return self.features[key]

    def _zero_factor(self, name: str) -> Factor:
        """Return the zero factor of a parameter that a batch does not use."""
        like, c = self.parameters[name], self._outputs
        shape, n = like.shape, self._place.stop - self._place.start
        if len(shape) < 2:
            return Vector(like.new_zeros(c, n, shape.numel()))
        g = tuple(like.new_zeros(n, 0, shape[0]) for _ in range(c))
        return Matrix(like.new_zeros(n, 0, shape.numel() // shape[0]), g)

    def _collected(self, key: Key) -> Stored:
        """Return the factors of all batches, as features if they are plain vectors."""
        uses, shape = self.factors[key], self.parameters[key[0]].shape
        if all(isinstance(factor, Vector) for batch in uses for factor in batch):
            return torch.cat([dense(batch, shape) for batch in uses], dim=1)
        return uses


def stored_bytes(stored: Iterable[Stored]) -> int:
    """Return the memory that features and factors hold, in bytes.

    Args:
        stored: Features and factors; memory that they share is counted once.
    """
    tensors = [tensor for item in stored for tensor in _tensors(item)]
    held = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(held.values())


def _tensors(stored: Stored) -> list[Tensor]:
    if isinstance(stored, Tensor):
        return [stored]
    factors = [factor for batch in stored for factor in batch]
    return [v for f in factors for field in vars(f).values() for v in _within(field)]


def _within(value: object) -> list[Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor)]
