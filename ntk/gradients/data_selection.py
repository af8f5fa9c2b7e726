"""Rows and columns selected on examples, by activations or gradient energy."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ntk.gradients import coverage, passes
from ntk.gradients.coverage import Service
from ntk.gradients.factors import Factor, Matrix, dense, raised
from ntk.gradients.function import (
    Inputs,
    NetworkFunction,
    Readout,
    check_model,
    evaluating,
    to_batches,
)
from ntk.gradients.judge import autograd_rows
from ntk.gradients.passes import sample
from ntk.gradients.rules import Use
from ntk.spaces import Columns, Maps, Rows, Space, Sum, Whole, oriented
from rocoft.models import Architecture, LinearWeight, SelectionError


def calibrate(
    space: Space,
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: Readout | None = None,
    batch_size: int | None = None,
) -> Space:
    """Select on some examples the rows and columns of data-dependent strategies.

    ``"activation"`` scores by ``sum |W| ||x||``, with the norm of each input feature of
    the layer over all positions (Sun et al. 2024); ``"gradient"`` by the sum of squared
    gradients over examples and outputs.

    Args:
        space: Any space; parts that need no examples are unchanged.
        model: The model.
        inputs: The examples: a batch, or a list of batches.
        outputs: Function from the model's output to ``(n, c)``; by default its
            `.logits`, or the tensor itself.
        batch_size: Maximum number of examples in one pass; None takes batches whole.

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
    measured = statistics(
        model, weights, inputs, outputs=outputs, batch_size=batch_size
    )
    fixed = tuple(
        _fixed(part, architecture, measured)
        if isinstance(part, Rows | Columns) and part.needs_examples
        else part
        for part in parts
    )
    return replace(space, parts=fixed) if isinstance(space, Sum) else fixed[0]


def _fixed(
    part: Rows | Columns,
    architecture: Architecture,
    measured: Mapping[str, Mapping[str, Tensor]],
) -> Rows | Columns:
    key: str = part.strategy
    if key == "gradient":
        key = "row energy" if isinstance(part, Rows) else "column energy"
    chosen = {}
    for name, of in part.chosen_parameters(architecture).items():
        assert of is not None
        if key not in measured[name]:
            raise SelectionError(
                f"strategy={part.strategy!r} cannot see the inputs of {name!r}, which "
                "no known layer uses. Choose another strategy, or other weights with "
                ".at(...)."
            )
        values = architecture.values(name)
        chosen[name] = part.chosen(of, values, measured[name][key].to(values))
    return replace(part, count=None, strategy="first", indices=chosen)


def statistics(
    model: nn.Module,
    weights: Mapping[str, LinearWeight],
    inputs: Inputs,
    *,
    outputs: Readout | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Measure the statistics of linear weights that data-dependent strategies use.

    Args:
        model: The model.
        weights: Linear weights by parameter name.
        inputs: The examples: a batch, or a list of batches.
        outputs: Function from the model's output to ``(n, c)``; by default its
            `.logits`, or the tensor itself.
        batch_size: Maximum number of examples in one pass; None takes batches whole.

    Returns:
        For each weight ``"row energy"`` ``(d_out,)`` and ``"column energy"``
        ``(d_in,)``, squared gradients summed over examples and outputs, and, if a known
        layer uses it, ``"activation"`` ``(d_in,)``, norms of its input features.
    """
    check_model(model)
    device = next(model.parameters()).device
    batches = to_batches(inputs, device, batch_size)
    function = NetworkFunction(model, outputs)
    results: dict[str, dict[str, Tensor]] = {}
    with evaluating(model):
        verdicts = coverage.services(function, sample(batches), weights)
        collect = lambda service, names: _Statistics(weights, names, results)
        passes.run(function, batches, verdicts, collect)
        unserved: Maps = {
            n: (Whole(),) for n in weights if verdicts[n].service is Service.DEFINITION
        }
        if unserved:
            for (name, _), rows in autograd_rows(function, batches, unserved).items():
                results[name] = {}
                _add_energies(results[name], rows, weights[name])
    return {name: results.get(name, {}) for name in weights}


class _Statistics:
    """Sums input norms and gradient energies of weights over batches.

    Args:
        weights: Linear weights by parameter name.
        names: Names of the weights to collect.
        results: Dictionary to which `finish` adds the statistics.
    """

    def __init__(
        self,
        weights: Mapping[str, LinearWeight],
        names: set[str],
        results: dict[str, dict[str, Tensor]],
    ) -> None:
        self.weights = weights
        self.results = results
        self.totals: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        self._examples = 0
        self._count: dict[str, int] = {}
        self._factors: dict[tuple[str, int], list[Factor]] = {}

    def begin(
        self, uses: Sequence[Use], examples: int, outputs: int, without: Collection[str]
    ) -> None:
        """Start a batch."""
        self._examples = examples
        self._count = dict.fromkeys(self.totals, 0)
        for use in uses:
            if use.name in self._count:
                self._count[use.name] += 1

    def receive(self, use: Use, k: int, factor: Factor) -> None:
        """Receive the factor of output k for one use of a parameter."""
        name = use.name
        if name not in self.totals:
            return
        factors = self._factors.setdefault((name, k), [])
        factors.append(raised(factor))
        if len(factors) == self._count[name]:
            self._reduce(name, k, self._factors.pop((name, k)))

    def end(self) -> None:
        """End the batch."""
        self._factors = {}

    def _reduce(self, name: str, k: int, uses: Sequence[Factor]) -> None:
        of, total = self.weights[name], self.totals[name]
        stored = (of.outputs, of.inputs)[:: 1 if of.output_dim == 0 else -1]
        for i in range(self._examples):
            # One example at a time: whole gradients are large.
            rows = dense([factor.example(i) for factor in uses], torch.Size(stored))
            _add_energies(total, rows, of)
        for factor in uses:
            if not isinstance(factor, Matrix) or factor.output_dim != of.output_dim:
                continue
            if k == 0:
                power = factor.x.double().square().sum(dim=(0, 1))
                _add(total, "squared activation", power)

    def finish(self, without: Collection[str]) -> None:
        """Store the statistics, except those of some parameters."""
        for name, total in self.totals.items():
            if name not in without:
                if "squared activation" in total:
                    total["activation"] = total["squared activation"].sqrt()
                self.results[name] = total


def _add_energies(total: dict[str, Tensor], rows: Tensor, of: LinearWeight) -> None:
    """Add the row and column energies of a weight's gradients ``(c, n, p)``."""
    power = rows.double().square().sum(dim=(0, 1))
    stored = (of.outputs, of.inputs) if of.output_dim == 0 else (of.inputs, of.outputs)
    logical = oriented(power.view(stored), of)
    _add(total, "row energy", logical.sum(dim=1))
    _add(total, "column energy", logical.sum(dim=0))


def _add(total: dict[str, Tensor], key: str, value: Tensor) -> None:
    total[key] = total[key] + value if key in total else value
