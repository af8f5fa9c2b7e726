"""Rows and columns that examples choose: by activations or by gradient energy."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ntk import coverage
from ntk.capture import complete, record
from ntk.coverage import Service
from ntk.engine import groups
from ntk.factors import Matrix, dense
from ntk.function import (
    Batch,
    Inputs,
    NetworkFunction,
    Readout,
    batch_length,
    check_model,
    evaluating,
    to_batches,
)
from ntk.jacobian import jacobian
from ntk.maps import Maps, Whole, oriented
from ntk.spaces import Columns, Rows, Space, Sum
from rocoft.architecture import Architecture, LinearWeight, SelectionError


def calibrate(
    space: Space,
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: Readout | None = None,
    batch_size: int | None = None,
) -> Space:
    """Fix on some examples the rows and columns that a strategy chooses by data.

    ``"activation"`` scores by ``sum |W| ||x||`` with the norm of each of the layer's
    true inputs over all positions (Sun et al. 2024); ``"gradient"`` by the sum of
    squared gradients over examples and outputs.

    Args:
        space: Any space; parts that need no examples stay as they are.
        model: The model.
        inputs: The examples, as for `kernel.empirical_ntk`.
        outputs: As for `kernel.empirical_ntk`.
        batch_size: As for `kernel.empirical_ntk`.

    Returns:
        The space with explicit indices by parameter.
    """
    parts = space.parts if isinstance(space, Sum) else (space,)
    open_parts = [
        p for p in parts if isinstance(p, Rows | Columns) and p.needs_examples
    ]
    if not open_parts:
        return space
    architecture = Architecture(model)
    weights = {
        name: of
        for part in open_parts
        for name, of in part.chosen_parameters(architecture).items()
        if of is not None
    }
    statistics = _statistics(model, weights, inputs, outputs, batch_size)
    fixed = tuple(
        _fixed(part, architecture, statistics)
        if isinstance(part, Rows | Columns) and part.needs_examples
        else part
        for part in parts
    )
    return replace(space, parts=fixed) if isinstance(space, Sum) else fixed[0]


def _fixed(
    part: Rows | Columns,
    architecture: Architecture,
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> Rows | Columns:
    key: str = part.strategy
    if key == "gradient":
        key = "row energy" if isinstance(part, Rows) else "column energy"
    chosen = {}
    for name, of in part.chosen_parameters(architecture).items():
        assert of is not None
        if key not in statistics[name]:
            raise SelectionError(
                f"strategy={part.strategy!r} cannot see the inputs of {name!r}, which "
                "no layer that is known uses. Choose another strategy, or other "
                "weights with .at(...)."
            )
        values = architecture.parameters[name]
        chosen[name] = part.chosen(of, values, statistics[name][key].to(values))
    return replace(part, count=None, strategy="first", indices=chosen)


def _statistics(
    model: nn.Module,
    weights: Mapping[str, LinearWeight],
    inputs: Inputs,
    outputs: Readout | None,
    batch_size: int | None,
) -> dict[str, dict[str, Tensor]]:
    """Return, by weight, input norms ``(d_in,)`` and energies by row and column."""
    check_model(model)
    device = next(model.parameters()).device
    batches = to_batches(inputs, device, batch_size)
    function = NetworkFunction(model, outputs)
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    with evaluating(model):
        verdicts = coverage.services(function, batches[0], weights)
        for service in (Service.BATCH, Service.SINGLE):
            served = {n for n in weights if verdicts[n].service is service}
            single = service is Service.SINGLE
            for group in (g for b in batches for g in groups(b, single=single)):
                if served:
                    _add_pass(function, group, served, weights, totals)
        unserved: Maps = {
            n: (Whole(),) for n in weights if verdicts[n].service is Service.DEFINITION
        }
        if unserved:
            for (name, _), rows in jacobian(function, batches, unserved).items():
                _add_energies(totals[name], rows, weights[name])
    return totals


def _add_pass(
    function: NetworkFunction,
    group: Batch,
    served: set[str],
    weights: Mapping[str, LinearWeight],
    totals: dict[str, dict[str, Tensor]],
) -> None:
    outputs, recorder = record(function, group, served)
    factors = complete(outputs, recorder)
    with torch.no_grad():
        for name, uses in factors.items():
            shape = function.model.get_parameter(name).shape
            for i in range(batch_length(group)):
                # One example at a time: whole gradients are large.
                rows = dense([factor.example(i) for factor in uses], shape)
                _add_energies(totals[name], rows, weights[name])
            for factor in uses:
                if isinstance(factor, Matrix):
                    power = factor.x.double().square().sum(dim=(0, 1))
                    _add(totals[name], "squared activation", power)
            total = totals[name]
            total["activation"] = total["squared activation"].sqrt()


def _add_energies(total: dict[str, Tensor], rows: Tensor, of: LinearWeight) -> None:
    """Add the energies of gradients ``(c, n, p)`` of a weight."""
    power = rows.double().square().sum(dim=(0, 1))
    stored = (of.outputs, of.inputs) if of.output_dim == 0 else (of.inputs, of.outputs)
    logical = oriented(power.view(stored), of)
    _add(total, "row energy", logical.sum(dim=1))
    _add(total, "column energy", logical.sum(dim=0))


def _add(total: dict[str, Tensor], key: str, value: Tensor) -> None:
    total[key] = total[key] + value if key in total else value
