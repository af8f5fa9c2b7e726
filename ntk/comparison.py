"""What `ntk.compare` compares: a model, examples, and spaces with their roles.

The full kernel is the reference, the requested spaces are compared with it; biases, the
head alone and random rows or columns are controls. Nothing is computed here, but for
the rows and columns that training examples choose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ntk.approximation import Estimator
from ntk.cache import content_key
from ntk.calibration import calibrate
from ntk.function import Batch
from ntk.kernel import Kind
from ntk.maps import Maps
from ntk.memory import Plan, plan
from ntk.precision import Precision
from ntk.processes import Processes
from ntk.resolution import resolve
from ntk.spaces import Bias, Columns, Full, Head, Rows, Space, Sum, Without
from rocoft.architecture import Architecture, SelectionError
from rocoft.backbone import Backbone
from rocoft.splits import Split

RANDOM_SEEDS = 5


@dataclass(frozen=True)
class Examples:
    """The examples of a split in batches, training examples first.

    Attributes:
        batches: Of training examples, then of test examples.
        train_batches: How many are of training examples.
        place: For each example in the order of the batches, its number in the split.
        labels: Of all examples, in the order of the split.
        train: Number of training examples.
    """

    batches: list[Batch]
    train_batches: int
    place: list[int]
    labels: NDArray[np.int64]
    train: int


@dataclass(frozen=True)
class Comparison:
    """What is compared, before anything is computed.

    Attributes:
        backbone: The model.
        split: Training and test examples.
        roles: The names of the compared spaces: "reference", "requested", "control".
        spaces: These, and random selections.
        approximate: How the full kernel is estimated; None means that it is computed.
        with_head: Whether a head made for this task is part of every space.
        data: The examples.
    """

    backbone: Backbone
    split: Split
    roles: Mapping[str, str]
    spaces: Mapping[str, Space]
    approximate: Estimator | None
    with_head: bool
    data: Examples

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        split: Split,
        requested: Sequence[Space],
        *,
        with_head: bool = True,
        batch_size: int = 32,
        approximate: Estimator | None = None,
        kind: Kind = "sgd",
    ) -> "Comparison":
        """Encode the examples and resolve what depends on them.

        Args:
            backbone: The model.
            split: Training and test examples.
            requested: The spaces, without the head.
            with_head: Whether a head made for this task is part of every space.
            batch_size: Most examples in a pass.
            approximate: How the full kernel is estimated.
            kind: Of kernel, which the estimate must know.

        Returns:
            What is compared.
        """
        module = backbone.module
        architecture = Architecture(module)
        head = Head() if backbone.new_head and with_head else None
        data = _encode(backbone, split, batch_size)
        train = data.batches[: data.train_batches]
        fixed = [calibrate(space, module, train) for space in requested]
        roles, spaces = _spaces(fixed, requested, architecture, head)
        if backbone.new_head and not with_head:
            own = tuple(architecture.head)
            spaces = {name: Without(space, own) for name, space in spaces.items()}
        if approximate is not None:
            whole = [spaces["full"]]
            approximate = approximate.fitted(module, train, spaces=whole, kind=kind)
        return cls(backbone, split, roles, spaces, approximate, head is not None, data)

    @cached_property
    def computed(self) -> dict[str, Space]:
        """The spaces whose kernels are computed: estimates of the full one."""
        if self.approximate is None:
            return dict(self.spaces)
        others = {n: s for n, s in self.spaces.items() if n != "full"}
        return others | self.approximate.parted("full", self.spaces["full"])

    @cached_property
    def resolved(self) -> dict[str, Maps]:
        """The maps of the spaces whose kernels are computed."""
        return resolve(self.computed, self.backbone.module)

    def content_key(
        self,
        kind: Kind,
        precision: Precision = "float32",
        processes: Processes | None = None,
    ) -> str:
        """Return a digest of all that the kernels depend on.

        Args:
            kind: Of kernel.
            precision: Of its products.
            processes: Those that share the work, as the last digits depend on them.
        """
        return content_key(
            self.backbone.module,
            self.data.batches,
            self.data.train_batches,
            self.resolved,
            kind=kind,
            precision=precision,
            readout=f"{self.backbone.readout} {self.backbone.prompt!r}",
            processes=1 if processes is None else processes.size,
        )

    def plan(
        self,
        memory: int | None = None,
        spill: Path | None = None,
        processes: Processes | None = None,
    ) -> Plan:
        """Plan the kernels' computation.

        Args:
            memory: Most bytes to hold, see `memory.plan`.
            spill: Folder for what there is no room for, see there.
            processes: Those that share the work.

        Returns:
            The plan.
        """
        return plan(
            self.backbone.module,
            self.data.batches,
            self.data.train_batches,
            spaces=self.computed,
            memory=memory,
            spill=spill,
            processes=processes,
        )


def _encode(backbone: Backbone, split: Split, batch_size: int) -> Examples:
    train, train_order = backbone.encode(split.train, batch_size)
    test, test_order = backbone.encode(split.test, batch_size)
    n = len(split.train)
    device = next(backbone.module.parameters()).device
    batches: list[Batch] = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in (*train, *test)
    ]
    labels = np.array([e.label for e in (*split.train, *split.test)])
    place = [*train_order, *(n + i for i in test_order)]
    return Examples(batches, len(train), place, labels, n)


def _spaces(
    fixed: Sequence[Space],
    requested: Sequence[Space],
    architecture: Architecture,
    head: Head | None,
) -> tuple[dict[str, str], dict[str, Space]]:
    """Return the role of each named space, and all spaces with the random ones."""

    def whole(space: Space) -> Space:
        if head is None or isinstance(space, Full | Head):
            return space
        return space + head

    roles = {"full": "reference"}
    spaces: dict[str, Space] = {"full": Full()}
    for space, asked in zip(fixed, requested, strict=True):
        if asked.name not in spaces:
            roles[asked.name] = "requested"
            spaces[asked.name] = whole(space)
    controls: list[Space] = [Bias()]
    if head is not None:
        controls.insert(0, head)
    for control in controls:
        if control.name in spaces:
            continue
        try:
            control.maps(architecture)
        except SelectionError:
            # A model without biases has no such control.
            continue
        roles[control.name] = "control"
        spaces[control.name] = whole(control)
    parts = [p for s in requested for p in (s.parts if isinstance(s, Sum) else (s,))]
    counts = {
        (type(p), p.count) for p in parts if isinstance(p, Rows | Columns) and p.count
    }
    for family, count in sorted(
        counts or {(Rows, 3)}, key=lambda pair: (pair[0].__name__, pair[1])
    ):
        for seed in range(RANDOM_SEEDS):
            space = family(count, strategy="random", seed=seed)
            spaces[f"{family.__name__.lower()}:{count}#{seed}"] = whole(space)
    return roles, spaces
