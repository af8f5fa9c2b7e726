"""A frozen linear layer with trainable rows and columns, as a layer of peft."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import (
    QuantizationBackend,
    quantization_extra_repr,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rocoft.adapter.functional import Index, Slices, linear_with_slices
from rocoft.adapter.slices import Selected
from rocoft.models import SelectionError


@dataclass(frozen=True)
class _Layout:
    """The indices of an adapter's slices, cached for its index buffers."""

    rows: Index | None
    columns: Index | None
    unselected_rows: Tensor | None

    def is_valid_for(self, rows: Tensor | None, columns: Tensor | None) -> bool:
        return rows is (None if self.rows is None else self.rows.values) and (
            columns is (None if self.columns is None else self.columns.values)
        )


class RoCoFTLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with the trainable slices of each adapter.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D` or a quantised linear layer.
        adapter_name: Name of the first adapter.
        selected: Its rows and columns.
        backend: Quantisation of the base weight, if any.
        inference_mode: Whether the adapter is frozen too.

    Attributes:
        rocoft_rows: ``(k, inputs)``, differences of the selected rows, by adapter.
        rocoft_columns: ``(outputs, k)``, differences of the selected columns; with
            selected rows ``(outputs - rows, k)``, without those rows.
        rocoft_row_indices: ``(k,)`` int64, indices of the rows; saved with the adapter.
        rocoft_column_indices: ``(k,)`` int64, indices of the columns.
    """

    adapter_layer_names = ("rocoft_rows", "rocoft_columns")
    other_param_names = ("rocoft_row_indices", "rocoft_column_indices")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        selected: Selected,
        backend: QuantizationBackend | None = None,
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.in_features = selected.weight.inputs
        self.out_features = selected.weight.outputs
        self.rocoft_rows = nn.ParameterDict()
        self.rocoft_columns = nn.ParameterDict()
        self.rocoft_row_indices = BufferDict(persistent=True)
        self.rocoft_column_indices = BufferDict(persistent=True)
        self.merged_adapters: list[str] = []
        self._originals: list[_Original | _QuantisedOriginal] = []
        self._layouts: dict[str, _Layout] = {}
        self._transposed = isinstance(base_layer, Conv1D)
        self._active_adapter = adapter_name
        # Loading writes into the index buffers, which makes cached layouts stale.
        self.register_load_state_dict_post_hook(_forget_layouts)
        self.update_layer(adapter_name, selected, inference_mode)

    def update_layer(
        self, adapter_name: str, selected: Selected, inference_mode: bool = False
    ) -> None:
        """Add an adapter with slices of zeros.

        Args:
            adapter_name: Its name.
            selected: Its rows and columns.
            inference_mode: Whether it is frozen.
        """
        shapes = selected.shapes
        if selected.rows:
            zeros = torch.zeros(shapes["rocoft_rows"])
            self.rocoft_rows[adapter_name] = nn.Parameter(zeros)
            self.rocoft_row_indices[adapter_name] = torch.tensor(selected.rows)
        if selected.columns:
            zeros = torch.zeros(shapes["rocoft_columns"])
            self.rocoft_columns[adapter_name] = nn.Parameter(zeros)
            self.rocoft_column_indices[adapter_name] = torch.tensor(selected.columns)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._layouts.pop(adapter_name, None)
        self._layout(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(
        self,
        x: Tensor,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the layer's output with the active adapters.

        Args:
            x: ``(..., inputs)``.
            *args: Arguments of the base layer.
            adapter_names: One adapter for each example, ``"__base__"`` for none.
            **kwargs: Arguments of the base layer.

        Returns:
            ``(..., outputs)``.

        Raises:
            ValueError: If `adapter_names` does not have one name for each example, or
                adapters are merged.
        """
        if adapter_names is not None:
            if len(adapter_names) != len(x):
                raise ValueError(
                    f"adapter_names has {len(adapter_names)} names for {len(x)} "
                    "examples. Give one for each, '__base__' for none."
                )
            if self.merged:
                raise ValueError(
                    f"adapter_names cannot be used while {self.merged_adapters} are "
                    "merged. Call unmerge_adapter first."
                )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed(self.base_layer(x, *args, **kwargs), x, adapter_names)
        active = [name for name in self.active_adapters if self.has(name)]
        if len(active) == 1 and not (args or kwargs) and self._base_is_plain():
            base: Any = self.base_layer
            return linear_with_slices(
                *(x, base.weight, base.bias, self.slices(active[0])),
                transposed=self._transposed,
            )
        y = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        for name in active:
            y = self.slices(name).added_to(y, x)
        return y

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Add the slices to the base weight; the original values are kept.

        Args:
            safe_merge: Refuse a result that is not finite.
            adapter_names: Names of adapters; None means the active ones.

        Raises:
            SelectionError: If adapters share a row or column, or the quantised weight
                cannot be changed.
            ValueError: If the result is not finite and `safe_merge` is set.
        """
        for name in self.mergeable(check_adapters_to_merge(self, adapter_names)):
            self._merge(name, safe_merge)
            self.merged_adapters.append(name)

    def mergeable(self, adapter_names: list[str] | None = None) -> list[str]:
        """Return the adapters that `merge` would merge.

        Args:
            adapter_names: Names of adapters; None means the active ones.

        Returns:
            Names of adapters of this layer that are not merged yet.

        Raises:
            SelectionError: If they cannot be merged.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if self.has(n) and n not in self.merged_adapters]
        backend = self.quantization_backend
        if names and backend is not None and not backend.supports_merge:
            raise SelectionError(
                f"adapters {names} cannot be merged into a {backend.backend_name} "
                "weight. Load the model unquantised, or leave them unmerged."
            )
        for first, second in combinations([*self.merged_adapters, *names], 2):
            for axis, indices in (
                ("rows", self.rocoft_row_indices),
                ("columns", self.rocoft_column_indices),
            ):
                if first not in indices or second not in indices:
                    continue
                shared = set(indices[first].tolist()) & set(indices[second].tolist())
                if shared:
                    raise SelectionError(
                        f"adapters {first!r} and {second!r} cannot both be merged: "
                        f"both train {axis} {sorted(shared)}. Merge one of them, or "
                        "use both unmerged."
                    )
        return names

    def unmerge(self) -> None:
        """Restore the weights that merging replaced, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            self._originals.pop().restore(self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return an adapter's difference D of the whole weight.

        Args:
            adapter: Name of the adapter.

        Returns:
            A tensor in the shape of the stored weight.
        """
        slices = self.slices(adapter)
        values = slices.rows if slices.rows is not None else slices.columns
        assert values is not None
        delta = values.new_zeros(self.out_features, self.in_features)
        if slices.columns is not None and slices.column_index is not None:
            delta = delta.index_copy(1, slices.column_index.values, slices.columns)
        if slices.rows is not None and slices.row_index is not None:
            delta = delta.index_copy(0, slices.row_index.values, slices.rows)
        return delta.t() if self._transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True: every adapter is a difference of the weight.

        Args:
            adapter_name: Name of the adapter.
        """
        return True

    def slices(self, adapter: str) -> Slices:
        """Return an adapter's slices, differentiable in its parameters.

        Args:
            adapter: Name of the adapter.

        Returns:
            The slices; rows are not copied.
        """
        layout = self._layout(adapter)
        rows = self.rocoft_rows[adapter] if layout.rows is not None else None
        columns = self.rocoft_columns[adapter] if layout.columns is not None else None
        if columns is not None and layout.unselected_rows is not None:
            zeros = columns.new_zeros(self.out_features, columns.shape[1])
            columns = zeros.index_copy(0, layout.unselected_rows, columns)
        return Slices(rows, layout.rows, columns, layout.columns)

    def has(self, adapter: str) -> bool:
        """Return whether the layer has slices of an adapter."""
        return adapter in self.rocoft_rows or adapter in self.rocoft_columns

    def is_zero(self, adapter: str) -> bool:
        """Return whether an adapter changes nothing here: as it was made, or absent."""
        slices = (self.rocoft_rows, self.rocoft_columns)
        values = [by_adapter[adapter] for by_adapter in slices if adapter in by_adapter]
        return all(value.is_meta or not bool(value.any()) for value in values)

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return an adapter's slices and indices as they are saved.

        Args:
            adapter: Name of the adapter.

        Returns:
            Tensors by name of the layer's attribute.
        """
        names = self.adapter_layer_names + self.other_param_names
        by_adapter = {name: getattr(self, name) for name in names}
        return {n: by_adapter[n][adapter] for n in names if adapter in by_adapter[n]}

    def extra_repr(self) -> str:
        """Return the quantisation of the base weight, if any."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"rocoft.{super().__repr__()}"

    def _layout(self, adapter: str) -> _Layout:
        rows = self.rocoft_row_indices._buffers.get(adapter)
        columns = self.rocoft_column_indices._buffers.get(adapter)
        cached = self._layouts.get(adapter)
        if cached is not None and cached.is_valid_for(rows, columns):
            return cached
        unselected = None
        if rows is not None and columns is not None:
            mask = torch.zeros(self.out_features, dtype=torch.int8, device=rows.device)
            mask = mask.index_fill(0, rows, 1)
            unselected = mask.argsort(stable=True)[: self.out_features - len(rows)]
        layout = _Layout(_index(rows), _index(columns), unselected)
        if not torch.compiler.is_compiling():
            self._layouts[adapter] = layout
        return layout

    def _base_is_plain(self) -> bool:
        """Whether the base layer is a frozen linear map without hooks."""
        base = self.base_layer
        return (
            self.quantization_backend is None
            and type(base).forward in {nn.Linear.forward, Conv1D.forward}
            and "forward" not in vars(base)
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and not base._backward_hooks
            and not base._backward_pre_hooks
            and not base.weight.requires_grad
        )

    def _mixed(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        for name in sorted(set(adapter_names)):
            if not self.has(name):
                continue
            mask = torch.tensor([n == name for n in adapter_names], device=y.device)
            y = y.clone()
            y[mask] = self.slices(name).added_to(y[mask], x[mask])
        return y

    def _merge(self, adapter: str, safe: bool) -> None:
        stored = self.get_base_weight()
        slices = self.slices(adapter)
        weight = stored.t() if self._transposed else stored
        if self.quantization_backend is not None:
            weight = weight.clone()
        changes: list[_Change] = []
        # Rows come last: where they cross columns, the columns are zero.
        for dim, index, added in (
            (1, slices.column_index, slices.columns),
            (0, slices.row_index, slices.rows),
        ):
            if index is None or added is None:
                continue
            before = weight.index_select(dim, index.values)
            # Add in float32 or better and round once.
            dtype = torch.promote_types(weight.dtype, torch.float32)
            after = (before.to(dtype) + added.detach().to(dtype)).to(weight.dtype)
            if safe and not bool(after.isfinite().all()):
                raise ValueError(
                    f"adapter {adapter!r} makes weights that are not finite, so it "
                    "seems to be broken. It has not been merged."
                )
            changes.append(_Change(dim, index.values, before, after))
        if self.quantization_backend is None:
            self._originals.append(_Original(changes))
        else:
            self._originals.append(_QuantisedOriginal(self))
        for change in changes:
            weight.index_copy_(change.dim, change.index, change.after)
        if self.quantization_backend is not None:
            self.set_base_weight(weight)


@dataclass(frozen=True)
class _Change:
    """Rows (dim 0) or columns (dim 1) of a weight before and after merging."""

    dim: int
    index: Tensor
    before: Tensor
    after: Tensor


class _Original:
    """The rows and columns that merging replaced in a float weight."""

    def __init__(self, changes: Sequence[_Change]) -> None:
        self.slices = [(change.dim, change.index, change.before) for change in changes]

    def restore(self, layer: RoCoFTLinear) -> None:
        stored = layer.get_base_weight()
        weight = stored.t() if layer._transposed else stored
        for dim, index, before in self.slices:
            weight.index_copy_(dim, index.to(weight.device), before.to(weight.device))


class _QuantisedOriginal:
    """A quantised weight before merging; quantising again would not restore it."""

    def __init__(self, layer: RoCoFTLinear) -> None:
        self.base = layer.base_layer
        self.weight: Any = self.base.weight
        # bitsandbytes stores scales in the weight, the layer and the layer's state.
        self.owners = [self.weight, self.base]
        if hasattr(self.base, "state"):
            self.owners.append(self.base.state)
        self.values = [dict(vars(owner)) for owner in self.owners]

    def restore(self, layer: RoCoFTLinear) -> None:
        for owner, values in zip(self.owners, self.values, strict=True):
            vars(owner).update(values)
        self.base.weight = self.weight
        layer.base_layer = self.base


def _index(values: Tensor | None) -> Index | None:
    """Return an index, with its span if the values can be read and are consecutive."""
    if values is None:
        return None
    if values.is_meta or torch.compiler.is_compiling():
        return Index(values)
    first, *_ = numbers = values.tolist()
    consecutive = numbers == list(range(first, first + len(numbers)))
    return Index(values, (first, len(numbers)) if consecutive else None)


def _forget_layouts(module: nn.Module, _: Any) -> None:
    assert isinstance(module, RoCoFTLinear)
    module._layouts.clear()
    for name in module._get_available_adapters():
        module._layout(name)
