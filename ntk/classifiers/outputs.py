"""How the functions that are fitted on a kernel stand for the classes.

A kernel of n training examples and c classes has one of these forms, with o fitted
functions each:

- scalar, ``(n, n)``, reduction "trace" or "contrast_trace": a function for each class;
  of two classes one function, the margin f[1] - f[0], also for reduction "margin";
- block, ``(n, n, c, c)``, reduction "full": one coupled function for each class;
- contrasts, ``(n, n, c - 1, c - 1)``, reduction "contrast": one coupled function for
  each of the `ntk.measures.contrasts` of the classes.

With z the fitted functions ``(m, o)`` and f the logits ``(m, c)``, z = f E and
f = z E (E^T E)^-1, E being I, the column (-1, 1) or the contrasts Q. A constant that is
added to all logits is lost where E has no direction for it, as it is in the softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ntk.measures import contrasts

Array = NDArray[np.float64]

MARGIN = np.array([[-1.0], [1.0]])


@dataclass(frozen=True, eq=False)
class Outputs:
    """The fitted functions of c classes.

    Attributes:
        encoder: E, ``(c, o)``.
    """

    encoder: Array

    @classmethod
    def of(cls, shape: Sequence[int], classes: int) -> "Outputs | None":
        """Return the functions that are fitted on a kernel.

        Args:
            shape: Shape of the kernel.
            classes: c; 1 for a regression.

        Returns:
            The functions; None if the kernel has none of the forms.
        """
        block, c = tuple(shape[2:]), classes
        if block in {(), (c, c)}:
            return cls(MARGIN if c == 2 and not block else np.eye(c))
        if c > 1 and block == (c - 1, c - 1):
            return cls(contrasts(c).numpy())
        return None

    @property
    def count(self) -> int:
        """The number o of functions."""
        return self.encoder.shape[1]

    @cached_property
    def decoder(self) -> Array:
        """``(o, c)``: E (E^T E)^-1, transposed."""
        E = self.encoder
        return E.T / (E**2).sum(axis=0)[:, None]

    def encoded(self, logits: Array) -> Array:
        """Return the functions ``(m, o)`` of logits ``(m, c)``."""
        return logits @ self.encoder

    def decoded(self, functions: Array) -> Array:
        """Return the logits ``(m, c)`` of functions ``(m, o)``."""
        return functions @ self.decoder
