"""How a kernel changes while its model is fine-tuned.

Both kernels must be of the same coordinates: those of the plain model with the weights
before and after (`rocoft.models.merging`), over a space whose rows and columns were
chosen once (`ntk.spaces.restricted`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from ntk.measures import distance
from ntk.measures.distance import DistanceSummary
from ntk.measures.gram import gram_matrix
from ntk.measures.spectrum import Array, as_array

EIGENSPACE = 10
"""Default number of leading eigenvectors that are compared."""


@dataclass(frozen=True)
class KernelChange:
    """The change of a kernel by fine-tuning.

    Attributes:
        distance: S = 1 - cosine, in [0, 1]; blind to the kernel's scale.
        norm_ratio: ||after||_F / ||before||_F.
        measures: The kernel before is the reference; `frobenius` is the relative
            difference, and there are CKA and the overlap of eigenspaces.
        rank: Number of leading eigenvectors whose spaces are compared.
        alignment_before: Alignment of the kernel before with the targets; None without
            targets.
        alignment_after: Alignment of the kernel after.
    """

    distance: float
    norm_ratio: float
    measures: DistanceSummary
    rank: int
    alignment_before: float | None
    alignment_after: float | None


def kernel_change(
    before: ArrayLike,
    after: ArrayLike,
    *,
    targets: ArrayLike | None = None,
    rank: int | None = None,
) -> KernelChange:
    """Compare the kernels of a model before and after fine-tuning.

    The distance is that of Fort et al. (2020), the norm ratio the growth of Shan and
    Bordelon (2021), and alignment, uncentred, is expected to rise (Baratin et al.
    2021): take kernels on examples that were not trained on, or say that they were.

    Args:
        before: ``(n, n, c, c)`` or ``(k, k)``, symmetric positive semi-definite.
        after: Likewise, on the same examples and of the same space.
        targets: ``(k,)`` or ``(k, t)``, for ``(n, n, c, c)`` also ``(n, c)``.
        rank: Number of leading eigenvectors whose spaces are compared; by default 10,
            or k - 1 if that is less.

    Returns:
        The change; `asdict` makes it JSON.

    Raises:
        ValueError: If a shape does not fit, or the rank is not within 1..k.
    """
    A, B = _gram(before, "before"), _gram(after, "after")
    if rank is None:
        rank = max(1, min(EIGENSPACE, len(A) - 1))
    aligned: list[float | None] = [None, None]
    if targets is not None:
        Y = _targets(targets, np.shape(before))
        aligned = [distance.alignment(gram, Y) for gram in (A, B)]
    return KernelChange(
        distance=distance.kernel_distance(A, B),
        norm_ratio=float(np.linalg.norm(B) / np.linalg.norm(A)),
        measures=distance.summary(A, B, rank=rank),
        rank=rank,
        alignment_before=aligned[0],
        alignment_after=aligned[1],
    )


def _gram(kernel: ArrayLike, name: str) -> Array:
    """Return a kernel ``(n, n, c, c)`` or ``(k, k)`` as a Gram matrix."""
    array = as_array(kernel, name)
    if array.ndim not in {2, 4}:
        raise ValueError(
            f"`{name}` has shape {array.shape}; expected (n, n, c, c) or (k, k)."
        )
    return gram_matrix(torch.tensor(array)).numpy()


def _targets(targets: ArrayLike, kernel: tuple[int, ...]) -> Array:
    """Return targets with a row for each row of the Gram matrix of a kernel."""
    Y = as_array(targets, "targets")
    return Y.reshape(-1) if Y.shape == (kernel[0], *kernel[3:]) else Y
