"""A linear map with trainable rows and columns, as one autograd function.

The output is ``y = x (W + D)^T + b`` with a difference ``D`` that is zero outside the
rows R and the columns C. Backward computes the input gradient and the slices
``dD[R] = g[:, R]^T x`` and ``dD[:, C] = g^T x[:, C]``, never the gradient of W. It
needs W and, for rows, x (both by reference), for columns only ``x[:, C]``.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_Span = tuple[int, int] | None


@dataclass(frozen=True)
class Index:
    """Indices of rows or columns of a weight.

    Attributes:
        values: ``(k,)``, distinct, in ascending order.
        span: The first index and ``k`` if the indices are known to be consecutive.
    """

    values: Tensor
    span: _Span = None


@dataclass(frozen=True)
class Slices:
    """The difference D of one weight.

    Attributes:
        rows: ``(k, d_in)``, the selected rows of D.
        row_index: Their indices.
        columns: ``(d_out, k)``, the selected columns of D, zero in the selected rows.
        column_index: Their indices.
    """

    rows: Tensor | None = None
    row_index: Index | None = None
    columns: Tensor | None = None
    column_index: Index | None = None

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a linear map's output with ``x D^T`` added.

        Args:
            y: ``(..., d_out)``, the output.
            x: ``(..., d_in)``, the input.

        Returns:
            ``(..., d_out)``, in the type of `y`.
        """
        if self.rows is not None and self.row_index is not None:
            added = F.linear(x, self.rows.to(x.dtype)).to(y.dtype)
            y = y.index_add(-1, self.row_index.values, added)
        if self.columns is not None and self.column_index is not None:
            selected = _select(x, self.column_index.values, self.column_index.span)
            y = y + F.linear(selected, self.columns.to(x.dtype)).to(y.dtype)
        return y


def linear_with_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slices: Slices,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return ``x (W + D)^T + b``; autocast applies as to `F.linear`.

    Args:
        x: ``(..., d_in)``.
        weight: ``(d_out, d_in)``, frozen.
        bias: ``(d_out,)``.
        slices: The difference D.
        transposed: Whether the weight is stored as ``(d_in, d_out)``.

    Returns:
        ``(..., d_out)``.
    """
    if torch._C._are_functorch_transforms_active():
        # vmap and forward mode support all combinations of arguments only for plain
        # operations.
        return slices.added_to(
            F.linear(x, weight.t() if transposed else weight, bias), x
        )
    row_values, row_span = _parts(slices.row_index)
    column_values, column_span = _parts(slices.column_index)
    y, _ = _LinearWithSlices.apply(
        *(x, weight, bias, slices.rows, row_values, slices.columns, column_values),
        # In one argument: every argument costs time in every call.
        (row_span, column_span, transposed),
    )
    return y


class _LinearWithSlices(torch.autograd.Function):
    """Return `linear_with_slices` and ``x[..., C]``; each `Index` comes in parts."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        row_values: Tensor | None,
        columns: Tensor | None,
        column_values: Tensor | None,
        layout: tuple[_Span, _Span, bool],
    ) -> tuple[Tensor, Tensor | None]:
        row_span, column_span, transposed = layout
        dtype = _compute_dtype(x)
        cast_x, matrix = _cast(x, dtype), _cast(weight, dtype)
        x_selected = None
        if columns is not None:
            # A copy: a view would keep all of x alive for backward.
            x_selected = _select(x, column_values, column_span)
            x_selected = x_selected.to(dtype, copy=column_span is not None)
        y = F.linear(
            cast_x,
            matrix.t() if transposed else matrix,
            None if bias is None else _cast(bias, dtype),
        )
        if rows is not None:
            added = _thin(_flat(cast_x), _cast(rows, dtype))
            _add(_flat(y), added, row_values, row_span)
        if columns is not None and x_selected is not None:
            # One pass over y for the product and the sum.
            y.view(-1, y.shape[-1]).addmm_(_flat(x_selected), _cast(columns, dtype).t())
        needs = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs[3] else None,
            weight if needs[0] else None,
            *(rows, row_values, columns, column_values),
            # Also an output, so that second derivatives see its dependence on x.
            x_selected if needs[5] else None,
        )
        ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, rows, columns)]
        ctx.layout = layout
        return y, x_selected

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor, dx_selected: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, rows, row_values, columns, column_values, x_selected = (
            ctx.saved_tensors
        )
        x_dtype, bias_dtype, rows_dtype, columns_dtype = ctx.dtypes
        needs_x, _, needs_bias, needs_rows = ctx.needs_input_grad[:4]
        row_span, column_span, transposed = ctx.layout
        dtype = dy.dtype
        flat = _flat(dy)
        dx = dbias = drows = dcolumns = dy_selected = None
        if rows is not None and (needs_x or needs_rows):
            dy_selected = _select(flat, row_values, row_span)
        if needs_x:
            weight = _cast(weight, dtype)
            dx = flat @ (weight.t() if transposed else weight)
            if dy_selected is not None:
                dx.addmm_(dy_selected, _cast(rows, dtype))
            if columns is not None:
                assert dx_selected is not None
                added = _thin(flat, _cast(columns, dtype).t()) + _flat(dx_selected)
                _add(dx, added, column_values, column_span)
            dx = _cast(dx.view(*dy.shape[:-1], dx.shape[-1]), x_dtype)
        if needs_bias:
            dbias = _cast(flat.sum(dim=0), bias_dtype)
        if needs_rows:
            assert dy_selected is not None
            drows = _cast(dy_selected.t() @ _cast(_flat(x), dtype), rows_dtype)
        if x_selected is not None:
            dcolumns = _cast((_flat(x_selected).t() @ flat).t(), columns_dtype)
        return dx, None, dbias, drows, None, dcolumns, None, None


def _parts(index: Index | None) -> tuple[Tensor | None, _Span]:
    return (None, None) if index is None else (index.values, index.span)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which `F.linear` would compute."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A call of `to` that changes nothing costs as much as a small product.
    return x if x.dtype == dtype else x.to(dtype)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _thin(a: Tensor, few: Tensor) -> Tensor:
    """Return ``a few^T`` for few rows.

    Computed as ``(few a^T)^T`` with contiguous rows: down to a third of the time.
    """
    return (few.contiguous() @ a.t()).t()


def _select(x: Tensor, values: Tensor | None, span: _Span) -> Tensor:
    """Return selected features of ``(..., d)``; a view if there is a span."""
    if span is not None:
        return x.narrow(-1, *span)
    assert values is not None
    return x.index_select(-1, values)


def _add(x: Tensor, added: Tensor, values: Tensor | None, span: _Span) -> None:
    """Add to selected features of ``(..., d)``, in place."""
    if span is not None:
        x.narrow(-1, *span).add_(added)
    else:
        assert values is not None
        x.index_add_(-1, values, added)
