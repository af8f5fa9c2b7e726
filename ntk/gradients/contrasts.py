"""Readouts of what a classifier's softmax sees: contrasts of the outputs.

`ntk.measures.gram` says what contrasts are and why kernels are taken of them.
"""

from dataclasses import dataclass

from torch import Tensor

from ntk.gradients.function import FunctionError, Readout, logits
from ntk.measures import contrasts


@dataclass(frozen=True)
class ContrastReadout:
    """Reads out the contrasts of a model's outputs, ``(n, c)`` to ``(n, c - 1)``.

    Equal to itself for the same readout.

    Attributes:
        read: Maps the model's output to ``(n, c)``; None takes its `.logits`, or the
            tensor itself.
        centred: Whether more than two outputs are read out as the c outputs less their
            mean instead, which span the same and treat all classes alike.

    >>> import torch
    >>> ContrastReadout()(torch.tensor([[1.0, 3.0]]))
    tensor([[1.4142]])
    """

    read: Readout | None = None
    centred: bool = False

    def __call__(self, output: object) -> Tensor:
        """Return ``(n, c - 1)`` contrasts, or ``(n, c)`` centred outputs."""
        values = (self.read or logits)(output)
        if values.ndim != 2 or values.shape[1] < 2:
            raise FunctionError(
                f"the model's outputs have shape {tuple(values.shape)}; expected "
                "(n, c) with two or more outputs, of which contrasts are differences. "
                "Take reduce='full' or 'trace' of a single output."
            )
        if self.centred and values.shape[1] > 2:
            return values - values.mean(dim=1, keepdim=True)
        return values @ contrasts(values.shape[1]).to(values)


@dataclass(frozen=True)
class MarginReadout:
    """Reads out f[1] - f[0] of two outputs; equal to itself for the same readout.

    Attributes:
        read: Maps the model's output to ``(n, 2)``; None takes its `.logits`, or the
            tensor itself.
    """

    read: Readout | None = None

    def __call__(self, output: object) -> Tensor:
        """Return ``(n, 1)`` margins."""
        values = (self.read or logits)(output)
        if values.ndim != 2 or values.shape[1] != 2:
            raise FunctionError(
                "reduce='margin' needs two outputs, but the model has shape "
                f"{tuple(values.shape)}."
            )
        return values[:, 1:] - values[:, :1]
