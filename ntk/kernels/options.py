"""The options of a kernel computation, as one value. Does not import torch.

Axes and reductions are described in `ntk.measures.gram`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ntk.measures import COUPLED, REDUCTIONS, Reduction

if TYPE_CHECKING:
    from ntk.gradients import Readout

Kind = Literal["sgd", "signgd", "asymmetric_signgd"]
Precision = Literal["float32", "tf32", "bf16", "bf16x3"]
Implementation = Literal["factors", "autograd", "jacobian", "jvp"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
IMPLEMENTATIONS: dict[Implementation, str] = {
    "factors": "one forward and c backward passes a batch; time and memory of those",
    "autograd": "the definition, by plain backward passes; memory n c p",
    "jacobian": "torch.func: vmap of jacrev; memory n c p",
    "jvp": "torch.func: a vjp, then jvps; time n m c, memory of one gradient",
}


@dataclass(frozen=True)
class KernelOptions:
    """How kernels are computed.

    Attributes:
        kind: ``"sgd"`` <g, g'>, ``"signgd"`` <sign g, sign g'> or
            ``"asymmetric_signgd"`` <g, sign g'> (Malladi et al. 2023, section 3).
        reduce: One of `REDUCTIONS`, see `ntk.measures.gram`.
        precision: Precision of the products that contract float32 gradients, see
            `ntk.kernels.precision`. The model is evaluated in its own dtype.
        implementation: A key of `IMPLEMENTATIONS`: the same kernel at different costs.
        outputs: Maps the model's output to ``(n, c)``; None takes its `.logits`, or
            the tensor itself.
        batch_size: Largest number of examples in one pass; None keeps batches as given.

    Raises:
        ValueError: If a value is not one of its choices, or two options exclude each
            other.
    """

    kind: Kind = "sgd"
    reduce: Reduction = "full"
    precision: Precision = "float32"
    implementation: Implementation = "factors"
    outputs: Readout | None = None
    batch_size: int | None = None

    @property
    def coupled(self) -> bool:
        """Whether the kernel keeps pairs of outputs."""
        return self.reduce in COUPLED

    def __post_init__(self) -> None:
        """Check values and their combination."""
        for argument, choices in (
            ("kind", KINDS),
            ("reduce", REDUCTIONS),
            ("precision", PRECISIONS),
            ("implementation", tuple(IMPLEMENTATIONS)),
        ):
            if (value := getattr(self, argument)) not in choices:
                raise ValueError(
                    f"{argument}={value!r} must be one of {', '.join(choices)}."
                )
        if self.implementation == "jvp" and self.kind == "signgd":
            raise ValueError(
                "kind='signgd' needs every gradient itself, which implementation='jvp' "
                "never forms. Use 'factors' or 'autograd'."
            )
        if self.implementation == "jvp" and self.precision != "float32":
            raise ValueError(
                f"precision={self.precision!r} is for products of gradients, which "
                "implementation='jvp' never forms. Use 'factors' or 'autograd'."
            )
