"""One split of a study of layers: the kernel of each one, and what tuning some reaches.

The layers are the transformer blocks that a space reaches. What it holds of the model
outside of them is no choice and left out; a classification head is tuned whichever
layers are, so its kernel is the `base` of them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ntk.calibration import calibrate
from ntk.kernel import gram_matrix
from ntk.layer_selection import starting_residual
from ntk.layerwise import LayerKernel, layer_kernels, layer_spaces
from ntk.maps import LowRank, Maps
from ntk.notation import parse_space
from ntk.protocol import Examples, Protocol, description
from ntk.resolution import resolve
from ntk.spaces import Head
from ntk.spectrum import Array
from ntk.study import Cell, Record
from rocoft.architecture import Architecture, SelectionError
from rocoft.methods import parse_method
from rocoft.trainer import fine_tune

HEAD = "head"
"""The group of `layerwise.layer_spaces`, and the method that tunes no layer."""
LAYERS = "layers"
"""Kind of records of kernels."""


@dataclass(frozen=True, eq=False)
class Split:
    """The layers of a model on the training examples of a split.

    Attributes:
        layers: Their kernels, ``(k, k)``.
        base: ``(k, k)``, the kernel of the head; zero where none is tuned.
        residual: ``(k, t)``, one-hot labels less the model's own probabilities; of a
            margin the second label's column.
        labels: ``(k, t)``, the same less their mean: what a model without knowledge
            of the task has to learn.
        outputs: Consecutive rows that are one example.
    """

    layers: dict[str, LayerKernel]
    base: Array
    residual: Array
    labels: Array
    outputs: int

    @classmethod
    def of(cls, record: Record) -> "Split":
        """Read the layers from their record.

        Args:
            record: As `layer_records` makes it.

        Returns:
            The layers.
        """
        sizes = record["parameters"]
        kernels = {name: _whole(rows) for name, rows in record["kernels"].items()}
        base = kernels.pop(HEAD, None)
        layers = {
            name: LayerKernel(torch.from_numpy(kernel), sizes[name])
            for name, kernel in kernels.items()
        }
        rows = len(next(iter(kernels.values())))
        numbers, own = np.array(record["train_labels"]), np.array(record["own_outputs"])
        residual = starting_residual(numbers, own)
        # Of as many columns as there are outputs, also where a label has no example.
        targets = np.eye(own.shape[1])[numbers]
        flat = lambda r: _beside(r, rows, margin=record["reduction"] == "margin")
        return cls(
            layers,
            np.zeros((rows, rows)) if base is None else base,
            flat(residual),
            flat(targets - targets.mean(axis=0)),
            rows // len(numbers),
        )


def check_layers(protocol: Protocol, cell: Cell, space: str) -> dict[str, int]:
    """See that a space has layers, before any kernel is computed.

    Args:
        protocol: Of the study.
        cell: Any split.
        space: As `notation.parse_space` reads it.

    Returns:
        The number of parameters of each layer.

    Raises:
        SelectionError: If it has none.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    module = backbone.module
    architecture = Architecture(module)
    # Which rows examples choose does not change how many there are: a few will do.
    some = backbone.encode(split.train[:2], 2)[0]
    some = [{k: v.to(protocol.device) for k, v in batch.items()} for batch in some]
    parts = layer_spaces(module, calibrate(parse_space(space), module, some))
    maps = resolve({n: part for n, part in parts.items() if n.isdigit()}, module)
    if not maps:
        raise SelectionError(
            f"--space {space} has no layers to choose from: it reaches "
            f"{', '.join(parts)} alone. Give one of weights in the blocks, such as "
            "lora:8, rows:3 or full."
        )
    return {layer: _trained(found, architecture) for layer, found in maps.items()}


def _trained(maps: Maps, architecture: Architecture) -> int:
    """Return how many parameters fine-tuning trains: of LoRA it is A as well as B."""
    shape = lambda name: architecture.parameters[name].shape
    return sum(
        m.size(shape(name)) + (m.rank * m.of.inputs if isinstance(m, LowRank) else 0)
        for name, own in maps.items()
        for m in own
    )


def layer_records(
    protocol: Protocol, cell: Cell, spaces: Sequence[str]
) -> list[Record]:
    """Compute the kernels of all layers on the training examples, in one pass a space.

    Args:
        protocol: Of the study.
        cell: The split.
        spaces: As `notation.parse_space` reads them.

    Returns:
        A record for each space, with the lower triangles of the Gram matrices.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    data = Examples.of(backbone, replace(split, dev=(), test=()), protocol)
    reduction = protocol.reduction(data.f0.shape[1])
    records = []
    for text in spaces:
        space = calibrate(parse_space(text), backbone.module, data.batches)
        if backbone.readout == "head":
            space = space + Head()
        found = layer_kernels(
            backbone.module, data.batches, space=space, reduce=reduction
        )
        if backbone.readout != "head":
            found.pop(HEAD, None)
        kept = {n: each for n, each in found.items() if n.isdigit() or n == HEAD}
        parts = layer_spaces(backbone.module, space)
        maps = resolve({n: parts[n] for n in kept}, backbone.module)
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
                    n: _triangle(data.sorted(each.kernel)) for n, each in kept.items()
                },
                "left_out": [name for name in found if name not in kept],
            }
        )
    return records


def fine_tuning_records(
    protocol: Protocol, cell: Cell, space: str, methods: Sequence[str]
) -> list[Record]:
    """Fine-tune some layers on a split.

    Args:
        protocol: Of the study. Learning rates that it has for the space are meant for
            any of its layers.
        cell: The split.
        space: Of all layers, as `rocoft.methods.parse_method` reads it.
        methods: Which layers, as `layers_subsets.method_of` writes it.

    Returns:
        A record for each method.
    """
    split = protocol.split(cell)
    backbone = protocol.backbone(split)
    keep = ("method", "task", "metric", "test", "dev", "learning_rate", "steps")
    records = []
    for method in methods:
        own = protocol.rates.get(method)
        if own is None and method != HEAD:
            own = protocol.rates.get(str(parse_method(space)))
        found = fine_tune(
            backbone,
            split,
            method,
            lrs=own,
            arguments=protocol.arguments,
            seed=cell.seed,
        ).record
        records.append(
            {
                "model": backbone.name,
                **{key: found[key] for key in (*keep, "parameters")},
                "grid": {
                    f"{run['learning_rate']:g}": run["dev"]
                    for run in found["learning_rates"]
                },
            }
        )
    return records


def _triangle(kernel: Tensor) -> list[list[float]]:
    """Return the rows of a Gram matrix up to the diagonal."""
    rows: list[list[float]] = gram_matrix(kernel).tolist()
    return [row[: i + 1] for i, row in enumerate(rows)]


def _whole(rows: Sequence[Sequence[float]]) -> Array:
    """Return the Gram matrix of `_triangle`."""
    lower = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        lower[i, : i + 1] = row
    return lower + np.tril(lower, -1).T


def _beside(targets: Array, rows: int, *, margin: bool) -> Array:
    """Return targets ``(n, c)`` with a row for each row of the Gram matrix."""
    if margin:
        return targets[:, 1:]
    return targets if len(targets) == rows else targets.reshape(-1, 1)
