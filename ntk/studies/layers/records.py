"""Records of a study of layers: the kernel of each layer, and fine-tuning of some.

The layers are the transformer blocks in which a space has parameters. Parameters
outside the blocks are left out, except a classification head: it is always tuned, so
its kernel is added to that of any layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk.kernels import LayerKernel, layer_spaces
from ntk.layer_selection import starting_residual
from ntk.measures import Array, gram_matrix
from ntk.spaces import Head, LowRank, Maps, parse_space, resolve
from ntk.studies.encoding import by_row, selected
from ntk.studies.folder import Cell, Record
from ntk.studies.folds import HeldOut, block_diagonal, held_out, outputs_out_of_fold
from ntk.studies.protocol import Protocol, ScoredSplit, description
from ntk.studies.tuned import scores_of, tuned_on
from rocoft.models import Architecture, SelectionError
from rocoft.training import parse_method

HEAD = "head"
"""Name of the head in `layerwise.layer_spaces`, and the method that tunes no layer."""
LAYERS = "layers"
"""Kind of the records of kernels."""


@dataclass(frozen=True, eq=False)
class LayerKernels:
    """The kernels of a model's layers on the training examples of a split.

    Attributes:
        layers: ``(k, k)`` kernels by layer.
        base: ``(k, k)`` kernel of the head; zero if there is none.
        residual: ``(k, t)`` one-hot labels minus the model's probabilities; for a
            margin the column of the second label.
        labels: ``(k, t)`` one-hot labels minus their mean.
        outputs: Number of consecutive rows per example.
        folds: Rows of each fold. Kernels between examples of different folds are zero
            and unknown.
        unseen: The same under heads that have not seen the examples' labels, for what
            is measured with labels; None if that is so here.
    """

    layers: dict[str, LayerKernel]
    base: Array
    residual: Array
    labels: Array
    outputs: int
    folds: tuple[NDArray[np.intp], ...]
    unseen: "LayerKernels | None" = None

    @property
    def honest(self) -> "LayerKernels":
        """The kernels under heads that have not seen the examples' labels."""
        return self if self.unseen is None else self.unseen

    @classmethod
    def of(cls, record: Record) -> "LayerKernels":
        """Read the kernels from a record.

        Args:
            record: A record of `layer_records`.

        Returns:
            The kernels.
        """
        sizes = record["parameters"]
        kernels = {name: _whole(rows) for name, rows in record["kernels"].items()}
        base = kernels.pop(HEAD, None)
        layers = {
            name: LayerKernel(torch.from_numpy(kernel), sizes[name])
            for name, kernel in kernels.items()
        }
        rows = len(next(iter(kernels.values())))
        labels, f0 = np.array(record["train_labels"]), np.array(record["own_outputs"])
        unseen = record.get("unseen")
        residual = starting_residual(labels, f0)
        # One column per output, even if a label has no example.
        targets = np.eye(f0.shape[1])[labels]
        margin = record["reduction"] == "margin"
        flat = lambda r: r[:, 1:] if margin else by_row(r, rows)
        outputs = rows // len(labels)
        folds = record.get("folds") or [range(len(labels))]
        return cls(
            layers,
            np.zeros((rows, rows)) if base is None else base,
            flat(residual),
            flat(targets - targets.mean(axis=0)),
            outputs,
            tuple(_rows(fold, outputs) for fold in folds),
            None if unseen is None else cls.of({**record, "unseen": None, **unseen}),
        )


def check_layers(protocol: Protocol, cell: Cell, space: str) -> dict[str, int]:
    """Check that a space has layers, before any kernel is computed.

    Args:
        protocol: Settings of the study.
        cell: Any split.
        space: Space in the notation of `notation.parse_space`.

    Returns:
        The number of parameters of each layer.

    Raises:
        SelectionError: If the space has no layers.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    module = backbone.module
    architecture = Architecture(module)
    # The number of rows does not depend on the examples that select them: use two.
    some = backbone.encode(split.train[:2], 2)[0]
    some = [{k: v.to(protocol.device) for k, v in batch.items()} for batch in some]
    parts = layer_spaces(module, selected(parse_space(space), backbone, some))
    maps = resolve({n: part for n, part in parts.items() if n.isdigit()}, module)
    if not maps:
        raise SelectionError(
            f"--space {space} has no layers to choose from: it reaches "
            f"{', '.join(parts)} alone. Give one of weights in the blocks, such as "
            "lora:8, rows:3 or full."
        )
    return {layer: _trained(own, architecture) for layer, own in maps.items()}


def _trained(maps: Maps, architecture: Architecture) -> int:
    """Return the number of trained parameters; LoRA trains A as well as B."""
    shape = lambda name: architecture.parameters[name].shape
    return sum(
        m.size(shape(name)) + (m.rank * m.of.inputs if isinstance(m, LowRank) else 0)
        for name, of_parameter in maps.items()
        for m in of_parameter
    )


def layer_records(
    protocol: Protocol, cell: Cell, spaces: Sequence[str]
) -> list[Record]:
    """Compute the kernels of all layers on the training examples, one pass per space.

    Args:
        protocol: Settings of the study.
        cell: The split.
        spaces: Spaces in the notation of `notation.parse_space`.

    Returns:
        A record for each space, with the lower triangles of the Gram matrices.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = ScoredSplit.of(backbone, replace(split, dev=(), test=()), protocol)
    reduction = protocol.reduction(data.f0.shape[1])
    records = []
    for text in spaces:
        space = selected(parse_space(text), backbone, data.batches)
        if backbone.readout == "head":
            space = space + Head()
        layers = layer_spaces(backbone.module, space)
        if backbone.readout != "head":
            layers.pop(HEAD, None)
        kept = {n: each for n, each in layers.items() if n.isdigit() or n == HEAD}
        compute = lambda train, kept=kept: (
            protocol.kernels(backbone, train, kept).kernels
        )
        kernels = compute(data)
        folds = held_out(backbone, split, data, compute)
        maps = resolve(kept, backbone.module)
        architecture = Architecture(backbone.module)
        records.append(
            {
                **description(backbone, split),
                "space": text,
                "reduction": reduction,
                "train_labels": data.labels.tolist(),
                "own_outputs": data.f0.tolist(),
                "parameters": {n: _trained(maps[n], architecture) for n in kept},
                "kernels": {
                    n: _triangle(data.in_split_order(kernels[n])) for n in kept
                },
                "left_out": [name for name in layers if name not in kept],
                "unseen": _unseen(folds, kept),
            }
        )
    return records


def fine_tuning_records(
    protocol: Protocol, cell: Cell, space: str, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune some layers on a split.

    Args:
        protocol: Settings of the study. Learning rates of the space are used for any
            of its layers.
        cell: The split.
        space: The method of all layers, in the notation of
            `rocoft.training.methods.parse_method`.
        methods: Methods of some layers, see `subsets.method_of`.

    Returns:
        A record for each method.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    records = []
    for method in methods:
        rates = protocol.rates.get(method)
        if rates is None and method != HEAD:
            rates = protocol.rates.get(str(parse_method(space)))
        tuned = tuned_on(protocol, backbone, split, method, rates)
        names = ("method", "task", "metric")
        records.append(
            {
                "model": backbone.name,
                **{name: tuned.record[name] for name in names},
                **scores_of(tuned),
            }
        )
    return records


def _rows(examples: Sequence[int], outputs: int) -> NDArray[np.intp]:
    """Return the rows of a Gram matrix that belong to some examples."""
    first = np.asarray(examples)[:, None] * outputs
    return (first + np.arange(outputs)).ravel()


def _unseen(folds: Sequence[HeldOut], names: Iterable[str]) -> Record | None:
    """Return the fields of a record that differ under heads fitted without a fold."""
    if not folds:
        return None
    return {
        "folds": [list(fold.held) for fold in folds],
        "own_outputs": outputs_out_of_fold(folds).tolist(),
        "kernels": {name: _triangle(block_diagonal(folds, name)) for name in names},
    }


def _triangle(kernel: Tensor) -> list[list[float]]:
    """Return the rows of the lower triangle of a Gram matrix."""
    rows: list[list[float]] = gram_matrix(kernel).tolist()
    return [row[: i + 1] for i, row in enumerate(rows)]


def _whole(rows: Sequence[Sequence[float]]) -> Array:
    """Return the Gram matrix with the given lower triangle."""
    lower = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        lower[i, : i + 1] = row
    return lower + np.tril(lower, -1).T
