"""Selection of rows or columns of a weight matrix.

A row is an output feature and a column an input feature. Weights here are always in the
orientation (outputs, inputs), however a layer stores them
(`architecture.LinearWeight.output_dim`).
"""

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rocoft.commands import STRATEGIES, Strategy
from rocoft.models.architecture import LinearWeight, SelectionError

Axis = Literal["row", "column"]
DATA_STRATEGIES = ("activation", "gradient")
"""Strategies whose scores need the model and examples, not only the weight."""


def select(
    weight: LinearWeight,
    values: Tensor,
    axis: Axis,
    count: int,
    strategy: Strategy = "first",
    *,
    seed: int = 0,
    statistics: Tensor | None = None,
) -> tuple[int, ...]:
    """Return the indices of the selected rows or columns, in ascending order.

    Rows of a fused query-key-value weight are selected in each of its parts, so that
    a fused and an unfused model select the same number of parameters.

    Args:
        weight: The weight, from `architecture.Architecture.linear_weights`.
        values: ``(outputs, inputs)``, the values of the weight.
        axis: ``"row"`` (output features) or ``"column"`` (input features).
        count: Number of rows (of each fused part) or columns.
        strategy: ``"first"`` (as in RoCoFT), ``"last"``, ``"random"``; by Euclidean
            norm ``"max"``, ``"min"`` or ``"mixed"`` (half of each); ``"activation"``,
            the largest sums of ``|W| * ||x||`` (Sun et al. 2024); ``"gradient"``, the
            largest squared gradients.
        seed: Seed for ``"random"``; each weight has its own random stream.
        statistics: For ``"activation"`` the ``(inputs,)`` norms of the layer's inputs,
            for ``"gradient"`` the squared gradient summed over each row,
            ``(outputs,)``, or column, ``(inputs,)``.

    Returns:
        ``count`` indices, or for rows ``count`` indices of each fused part.

    Raises:
        SelectionError: If ``count`` is not between 1 and the number of features, or
            ``strategy`` is unknown or lacks its statistics.
    """
    if strategy not in STRATEGIES:
        raise SelectionError(
            f"strategy={strategy!r} is unknown. Choose one of {', '.join(STRATEGIES)}."
        )
    parts: Sequence[Sequence[int]]
    parts = weight.parts if axis == "row" else (range(weight.inputs),)
    available = min(len(part) for part in parts)
    if not 1 <= count <= available:
        raise SelectionError(
            f"{axis}s={count} cannot be selected from {weight.name!r}, which has "
            f"{available} {axis}s{' in each fused part' if len(parts) > 1 else ''}. "
            f"Choose a number from 1 to {available}."
        )
    scores = _scores(values, axis, strategy, statistics, weight.name)
    generator = torch.Generator()
    if strategy == "random":
        generator.manual_seed(seed + zlib.crc32(weight.name.encode()))
    chosen: list[int] = []
    for part in parts:
        order = _order(part, scores, strategy, count, generator)
        chosen += [part[i] for i in order]
    return tuple(sorted(chosen))


def select_each(
    weight: LinearWeight,
    values: Tensor,
    axis: Axis,
    counts: Sequence[int],
    strategy: Strategy = "first",
    *,
    seed: int = 0,
    statistics: Tensor | None = None,
) -> tuple[int, ...]:
    """Return selected rows or columns, all of a part that has fewer than asked for.

    Args:
        weight: As for `select`.
        values: As for `select`.
        axis: As for `select`.
        counts: Number of rows of each fused part, or the number of columns.
        strategy: As for `select`.
        seed: As for `select`.
        statistics: As for `select`.

    Returns:
        The indices, in ascending order.

    Example:
        >>> narrow = LinearWeight("w", "", 1, 4, 0, (range(1),))
        >>> select_each(narrow, torch.ones(1, 4), "row", [3])
        (0,)
    """
    parts: Sequence[Sequence[int]]
    parts = weight.parts if axis == "row" else (range(weight.inputs),)
    # One narrow weight, such as the head of a regression, refuses no selection.
    taken = [min(n, len(part)) for n, part in zip(counts, parts, strict=True)]
    choose = partial(
        select,
        values=values,
        axis=axis,
        strategy=strategy,
        seed=seed,
        statistics=statistics,
    )
    if len(set(taken)) == 1:
        return choose(weight, count=taken[0])
    # Where heads share keys, a fraction is more queries than keys and values.
    chosen: list[int] = []
    for part, count in zip(parts, taken, strict=True):
        chosen += choose(replace(weight, parts=(tuple(part),)), count=count)
    return tuple(sorted(chosen))


def check_counts(asked: Sequence[tuple[LinearWeight, Axis, int]]) -> None:
    """Warn of weights with fewer rows or columns than asked for.

    A count that no weight has is a mistake; where only some lack it, all they have is
    taken, see `select_each`.

    Args:
        asked: Weights, with the rows or columns that are asked of them.

    Raises:
        SelectionError: If all weights have fewer.
    """
    narrow: list[tuple[LinearWeight, str, int, int]] = []
    for weight, axis, count in asked:
        rows = min(len(part) for part in weight.parts)
        available = rows if axis == "row" else weight.inputs
        if count > available:
            narrow.append((weight, f"{axis}s", count, available))
    if not narrow:
        return
    every, short = ({w.module for w, *_ in some} for some in (asked, narrow))
    weight, side, count, available = narrow[0]
    fused = " in each fused part" if len(weight.parts) > 1 and side == "rows" else ""
    if len(narrow) == len(asked):
        raise SelectionError(
            f"{side}={count} cannot be selected from {weight.module!r}, which has "
            f"{available} {side}{fused}, nor from another of the {len(every)} targeted "
            f"weights. Choose a number from 1 to {max(n for *_, n in narrow)}."
        )
    warnings.warn(
        f"{len(short)} of {len(every)} targeted weights have fewer {side} than "
        f"{count}, such as {weight.module!r} with {available}{fused}: all of theirs "
        "are taken.",
        stacklevel=2,
    )


def _scores(
    values: Tensor,
    axis: Axis,
    strategy: Strategy,
    statistics: Tensor | None,
    name: str,
) -> Tensor | None:
    other = 1 if axis == "row" else 0
    if strategy in {"max", "min", "mixed"}:
        return values.norm(dim=other)
    if strategy not in DATA_STRATEGIES:
        return None
    if statistics is None:
        raise SelectionError(
            f"strategy={strategy!r} needs examples to score {name!r}. Fix the space "
            "with some first: space = ntk.calibrate(space, model, inputs)."
        )
    if strategy == "activation":
        return (values.abs() * statistics).sum(dim=other)
    return statistics


def _order(
    part: Sequence[int],
    scores: Tensor | None,
    strategy: Strategy,
    count: int,
    generator: torch.Generator,
) -> list[int]:
    if strategy == "random":
        return torch.randperm(len(part), generator=generator)[:count].tolist()
    if strategy == "last":
        return list(range(len(part) - count, len(part)))
    if scores is None:
        return list(range(count))
    # Stable sort: ties go to the lower index on every machine.
    ranked = torch.argsort(scores[list(part)], descending=True, stable=True).tolist()
    if strategy == "min":
        return ranked[-count:]
    if strategy == "mixed":
        low = count // 2
        return ranked[: count - low] + (ranked[-low:] if low else [])
    return ranked[:count]
