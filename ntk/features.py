"""What the passes over one side leave: features of maps, factors of whole weights.

Gradients arrive weight by weight from the last layer to the first, one output of the
model after another. A map's features are made of each at once, unless what they need of
a gradient is little, or is kept anyway because the parameter is wanted whole: then they
are made when the gradients of all outputs are there, so that the layer's input is read
from memory once and features need not wait for the next backward pass.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ntk.factors import Factor, Matrix, Vector, dense, joined, raised
from ntk.jacobian import Key
from ntk.maps import InputSide, Map, Sketch, Slices, Whole
from ntk.rules import Use

Stored = Tensor | list[list[Factor]]
"""Features ``(c, n, p)``, or the factors of every batch."""


Ready = Callable[[Key, Stored], None]
"""Called with what is complete of one parameter and map."""


class Features:
    """Collects what gradients leave, batch after batch.

    Args:
        wanted: For each parameter the maps that are stored.
        parameters: Tensors of the shape, dtype and device of the gradients.
        n: Number of examples of all batches.
        store: Where what was collected goes in the end.
        ready: Called as soon as all gradients of a parameter in a batch have arrived,
            which hands what they left over instead of keeping it.
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
        self._wholes = {
            name
            for name, maps in wanted.items()
            if any(self._kept_whole(name, each) for each in maps)
        }
        self.features: dict[Key, Tensor] = {}
        self.factors: dict[Key, list[list[Factor]]] = {}
        self._place = slice(0, 0)
        self._outputs = 0
        self._uses: dict[str, list[Use]] = {}
        self._missing: dict[str, int] = {}
        self._whole: dict[int, list[Factor]] = {}
        self._waiting: dict[tuple[int, Map], tuple[Tensor, list[Tensor]]] = {}
        self._kept: dict[tuple[int, Map], tuple[Tensor, ...]] = {}
        self._written: set[tuple[Key, int]] = set()

    def begin(
        self, uses: Sequence[Use], examples: int, outputs: int, without: Collection[str]
    ) -> None:
        """Expect the next examples.

        Args:
            uses: All uses whose gradients will arrive.
            examples: How many examples follow.
            outputs: Of the model.
            without: Parameters that are not collected after all.
        """
        start = self._place.stop if self.ready is None else 0
        self._place = slice(start, start + examples)
        self._outputs = outputs
        self._uses = {name: [] for name in self.wanted if name not in without}
        for use in uses:
            if use.name in self._uses:
                self._uses[use.name].append(use)
        self._missing = {n: len(own) * outputs for n, own in self._uses.items()}

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Take what output k leaves of one use."""
        name = use.name
        if name not in self._uses:
            return
        if isinstance(factor, Vector):
            factor = raised(factor)
        for each in self.wanted[name]:
            if self._kept_whole(name, each):
                self._whole.setdefault(id(use), []).append(factor)
            elif isinstance(each, Whole):
                assert isinstance(factor, Vector)
                self._put((name, each), k, factor.v[0])
            else:
                assert isinstance(each, Slices | InputSide | Sketch)
                self._add(use, each, k, factor)
        self._missing[name] -= 1
        if not self._missing[name]:
            self._close(name)

    def end(self) -> None:
        """Close the batch: what has not arrived does not depend on the parameter."""
        for name in list(self._uses):
            self._close(name)
        self._written = set()

    def finish(self, without: Collection[str]) -> None:
        """Store what was collected, some parameters left out."""
        found: dict[Key, Stored] = {key: self._small(key) for key in self.factors}
        found.update(self.features)
        self.store.update({k: v for k, v in found.items() if k[0] not in without})

    def _close(self, name: str) -> None:
        """End the batch for one parameter."""
        uses = self._uses.pop(name)
        for each in self.wanted[name]:
            key = (name, each)
            if self._kept_whole(name, each):
                arrived = [joined(self._whole.pop(id(use))) for use in uses]
                whole = self.factors.setdefault(key, [])
                whole.append(arrived or [self._nothing(name)])
            else:
                for use in uses:
                    self._add_waiting(use, each)
                for k in range(self._outputs):
                    if (key, k) not in self._written:
                        self._room(key)[k, self._place] = 0
            if self.ready is not None:
                if key in self.factors:
                    self.ready(key, self._small(key))
                    del self.factors[key]
                else:
                    self.ready(key, self.features.pop(key))

    def _kept_whole(self, name: str, each: Map) -> bool:
        """Whether factors are kept; those of a vector are its gradients themselves."""
        return isinstance(each, Whole) and self.parameters[name].ndim > 1

    def _put(self, key: Key, k: int, features: Tensor) -> None:
        """Add features ``(n, size)`` of output k to those of the batch."""
        out = self._room(key, features.dtype)[k, self._place]
        if (key, k) in self._written:
            out += features
        else:
            self._written.add((key, k))
            out.copy_(features)

    def _add(
        self, use: Use, each: Slices | InputSide | Sketch, k: int, factor: Factor
    ) -> None:
        """Make what output k adds to the features, or keep what it takes to make it."""
        if (
            isinstance(factor, Matrix)
            and factor.rows is None
            and factor.output_dim == each.of.output_dim
        ):
            (g,) = factor.g
            if each.picks_few or use.name in self._wholes:
                _, arrived = self._waiting.setdefault((id(use), each), (factor.x, []))
                arrived.append(each.pick(g))
                return
            if (kept := self._kept.get((id(use), each))) is None:
                x = factor.x.to(self._room((use.name, each), g.dtype))
                kept = self._kept[id(use), each] = each.prepare(x)
            self._add_made(use.name, each, k, kept, each.pick(g))
            return
        # Used otherwise than as the layer that owns it uses it.
        key, shape = (use.name, each), self.parameters[use.name].shape
        gradient = dense([factor], shape).unflatten(2, shape)
        turned = gradient if each.of.output_dim == 0 else gradient.transpose(2, 3)
        self._put(key, k, each.of_gradient(turned)[0])

    def _add_waiting(self, use: Use, each: Map) -> None:
        """Make the features of a use whose gradients were kept until all arrived."""
        self._kept.pop((id(use), each), None)
        if (id(use), each) not in self._waiting:
            return
        assert isinstance(each, Slices | InputSide | Sketch)
        x, arrived = self._waiting.pop((id(use), each))
        kept = each.prepare(x.to(self._room((use.name, each), arrived[0].dtype)))
        for k, g in enumerate(arrived):
            self._add_made(use.name, each, k, kept, g)

    def _add_made(
        self,
        name: str,
        each: Slices | InputSide | Sketch,
        k: int,
        kept: tuple[Tensor, ...],
        g: Tensor,
    ) -> None:
        key = (name, each)
        room = self._room(key, g.dtype)
        first = (key, k) not in self._written
        self._written.add((key, k))
        each.add(g.to(room), kept, room[k, self._place], first=first)

    def _room(self, key: Key, dtype: torch.dtype | None = None) -> Tensor:
        """Return the features of a map, made when first asked for.

        Of a model in half precision they are float32, which they are summed in. A model
        may cast a weight up before it uses it.
        """
        if key not in self.features:
            like = self.parameters[key[0]]
            kind = torch.promote_types(dtype or like.dtype, like.dtype)
            kind = torch.promote_types(kind, torch.float32)
            n = self.n if self.ready is None else self._place.stop
            shape = (self._outputs, n, key[1].size(like.shape))
            self.features[key] = like.new_empty(shape, dtype=kind)
        return self.features[key]

    def _nothing(self, name: str) -> Factor:
        """Return the factor of a parameter that a batch did not use."""
        like, c = self.parameters[name], self._outputs
        shape, n = like.shape, self._place.stop - self._place.start
        if len(shape) < 2:
            return Vector(like.new_zeros(c, n, shape.numel()))
        g = tuple(like.new_zeros(n, 0, shape[0]) for _ in range(c))
        return Matrix(like.new_zeros(n, 0, shape.numel() // shape[0]), g)

    def _small(self, key: Key) -> Stored:
        """Turn factors that are gradients themselves into features."""
        uses, shape = self.factors[key], self.parameters[key[0]].shape
        if all(isinstance(factor, Vector) for batch in uses for factor in batch):
            return torch.cat([dense(batch, shape) for batch in uses], dim=1)
        return uses


def stored_bytes(stored: Iterable[Stored]) -> int:
    """Return the memory that features and factors hold, in bytes.

    Args:
        stored: Of any parameters. What several of them share is counted once.
    """
    tensors = [t for each in stored for t in _tensors(each)]
    held = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(held.values())


def _tensors(stored: Stored) -> list[Tensor]:
    if isinstance(stored, Tensor):
        return [stored]
    factors = [factor for batch in stored for factor in batch]
    return [v for f in factors for field in vars(f).values() for v in _within(field)]


def _within(value: object) -> list[Tensor]:
    several = value if isinstance(value, tuple) else (value,)
    return [each for each in several if isinstance(each, Tensor)]
