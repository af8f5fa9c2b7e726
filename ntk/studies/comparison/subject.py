"""What `ntk.compare` compares: a model, examples, and spaces with their roles.

The full kernel is the reference for the requested spaces; biases, the head alone and
random rows or columns are controls. Kernels are those of the contrasts of the outputs,
which is what a classifier's softmax sees, see `ntk.measures.gram`. No kernels are
computed here; only the rows and columns that depend on training examples are selected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ntk.kernels import (
    ApproximateKernel,
    Estimator,
    KernelOptions,
    KernelResult,
    reader,
)
from ntk.scale import Work
from ntk.spaces import Bias, Columns, Full, Head, Rows, Space, Sum, Without
from ntk.studies.encoding import EncodedSplit, encode_split, selected
from rocoft.data import Split
from rocoft.models import Architecture, Backbone, SelectionError

RANDOM_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """A model, examples and spaces to compare.

    Attributes:
        backbone: The model.
        split: Training and test examples.
        roles: "reference", "requested" or "control" by name of the compared space.
        spaces: The compared spaces and random selections, by name.
        approximate: Estimator of the full kernel; None if it is computed exactly.
        with_head: Whether a head made for this task is part of every space.
        data: The encoded examples.
        options: Options of the kernels.
    """

    backbone: Backbone
    split: Split
    roles: Mapping[str, str]
    spaces: Mapping[str, Space]
    approximate: Estimator | None
    with_head: bool
    data: EncodedSplit
    options: KernelOptions

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
        options: KernelOptions = KernelOptions(),
    ) -> "Comparison":
        """Encode the examples and select rows and columns that depend on them.

        Args:
            backbone: The model.
            split: Training and test examples.
            requested: The requested spaces, without the head.
            with_head: Whether a head made for this task is part of every space.
            batch_size: Maximal number of examples per batch.
            approximate: Estimator of the full kernel; None to compute it exactly.
            options: Options of the kernels; their reduction is to contrasts.

        Returns:
            The comparison.
        """
        options = replace(options, reduce="contrast")
        module = backbone.module
        architecture = Architecture(module)
        head = Head() if backbone.new_head and with_head else None
        device = next(module.parameters()).device
        data = encode_split(backbone, replace(split, dev=()), batch_size, device)
        train = data.batches[: data.train_batches]
        fixed = [selected(space, backbone, train) for space in requested]
        roles, spaces = _spaces(fixed, requested, architecture, head)
        if backbone.new_head and not with_head:
            new = tuple(architecture.head)
            spaces = {name: Without(space, new) for name, space in spaces.items()}
        if approximate is not None:
            approximate = approximate.fitted(
                module,
                train,
                spaces=[spaces["full"]],
                outputs=reader(options),
                kind=options.kind,
            )
        with_head = head is not None
        return cls(
            *(backbone, split, roles, spaces, approximate, with_head, data, options)
        )

    @cached_property
    def computed(self) -> dict[str, Space]:
        """The spaces whose kernels are computed; estimating ones replace the full."""
        if self.approximate is None:
            return dict(self.spaces)
        others = {n: s for n, s in self.spaces.items() if n != "full"}
        return others | self.approximate.parted("full", self.spaces["full"])

    @cached_property
    def work(self) -> Work:
        """The kernels to compute."""
        return Work(
            self.backbone.module,
            self.data.batches,
            self.data.train_batches,
            self.computed,
            self.options,
            readout=self.backbone.readout_key,
        )

    def estimated(self, result: KernelResult) -> ApproximateKernel | None:
        """Replace the kernels of estimating spaces by the estimate of the full kernel.

        Args:
            result: The computed kernels; modified in place.

        Returns:
            The estimate of the full kernel; None if it was computed exactly.
        """
        if self.approximate is None:
            return None
        estimate = self.approximate.collected("full", result.kernels)
        result.kernels["full"] = estimate.kernel
        return estimate


def _spaces(
    fixed: Sequence[Space],
    requested: Sequence[Space],
    architecture: Architecture,
    head: Head | None,
) -> tuple[dict[str, str], dict[str, Space]]:
    """Return the roles of compared spaces, and all spaces including random ones."""

    def with_head(space: Space) -> Space:
        if head is None or isinstance(space, Full | Head):
            return space
        return space + head

    roles = {"full": "reference"}
    spaces: dict[str, Space] = {"full": Full()}
    for space, asked in zip(fixed, requested, strict=True):
        if asked.name not in spaces:
            roles[asked.name] = "requested"
            spaces[asked.name] = with_head(space)
    controls: list[Space] = [Bias()]
    if head is not None:
        controls.insert(0, head)
    for control in controls:
        if control.name in spaces:
            continue
        try:
            control.maps(architecture)
        except SelectionError:
            continue  # The model has no biases.
        roles[control.name] = "control"
        spaces[control.name] = with_head(control)
    parts = [p for s in requested for p in (s.parts if isinstance(s, Sum) else (s,))]
    counts = {
        (type(p), p.count) for p in parts if isinstance(p, Rows | Columns) and p.count
    }
    for family, count in sorted(
        counts or {(Rows, 3)}, key=lambda pair: (pair[0].__name__, pair[1])
    ):
        for seed in range(RANDOM_SEEDS):
            space = family(count, strategy="random", seed=seed)
            spaces[f"{family.__name__.lower()}:{count}#{seed}"] = with_head(space)
    return roles, spaces
