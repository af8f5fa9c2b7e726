"""Which rows and columns of which modules RoCoFT trains: the configuration for peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from rocoft.architecture import SelectionError
from rocoft.selection import STRATEGIES

Axes = Literal["row", "column", "both", "auto"]
Bias = Literal["none", "all", "rocoft_only"]
AXES: tuple[str, ...] = get_args(Axes)
BIASES: tuple[str, ...] = get_args(Bias)
EVERY_LINEAR = "every-linear"
"""Value of `target_modules` for all linear layers, the head's included."""

_NAME = "ROCOFT"
_CARD_HEADING = "## How to load this RoCoFT adapter"
_CARD = f"""{_CARD_HEADING}

peft learns of RoCoFT by an import, which must come first (`pip install rocoft-ntk`):

```python
import rocoft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

Without it, peft stops at `KeyError: '{_NAME}'`. `rocoft.export_lora(model, path)`
writes the same adapter as an exact LoRA adapter, which needs no import.
"""


def _peft_type() -> PeftType:
    """Return peft's type of this method, which is added where peft lacks it."""
    if _NAME not in PeftType.__members__:
        # peft's registry is open, but the enumeration that names its entries is not.
        member = str.__new__(PeftType, _NAME)
        member._name_ = member._value_ = _NAME
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
        PeftType._member_names_.append(_NAME)
    found = PeftType.__members__.get(_NAME)
    if found is None or PeftType(_NAME) is not found or _NAME not in list(PeftType):
        raise ImportError(
            f"peft's enumeration of methods took no entry {_NAME!r}: this version of "
            "Python or peft keeps its members elsewhere. Install the versions of "
            "constraints.txt."
        )
    return found


ROCOFT: PeftType = _peft_type()


@dataclass
class RoCoFTConfig(PeftConfig):
    """Train some rows and columns of a model's linear weights, the rest frozen.

    A row is an output feature, ``(inputs,)`` numbers, a column an input feature,
    ``(outputs,)`` numbers, whatever the orientation in which the layer stores its
    weight. What is trained is a difference that starts at zero, so weight decay pulls
    towards the pretrained weights.

    Attributes:
        r: Rows or columns of each weight; of a fused query-key-value weight, rows of
            each of the three. Consecutive rows of an attention projection lie in one
            head (row ``i`` in head ``i // head_dim``).
        fraction: In (0, 1], takes the place of `r`: this share of each weight's rows
            or columns, rounded, at least one.
        axis: ``"row"``, ``"column"``, ``"both"`` (`r` rows and `r` columns of one
            weight, their overlap trained once), ``"auto"`` (rows where a weight has at
            most as many inputs as outputs, else columns: fewer parameters and less
            memory), or a map from patterns to these. A pattern is a regular expression
            for the end of a module's name, as in `rank_pattern`; the first that fits
            counts.
        selection: A strategy of `rocoft.selection`. ``"activation"`` and
            ``"gradient"`` need examples: see `rocoft.calibrated`.
        seed: For ``"random"``; each weight draws from its own stream.
        indices: ``{module: {"rows": [...], "columns": [...]}}``, takes the place of
            `selection`, `r` and `axis`.
        target_modules: Ends of module names, a regular expression, ``"all-linear"``
            (all but the output layer), ``"every-linear"`` (all), or None: the
            modules that `indices` names, else every linear layer in the transformer
            blocks.
        exclude_modules: Ends of module names, or a regular expression.
        layers_to_transform: Indices of the only blocks to take, unless
            `target_modules` is a string.
        layers_pattern: Names of the list of blocks that these indices count.
        rank_pattern: `r` by a regular expression for the end of a module's name.
        modules_to_save: Modules that are trained and saved whole, such as a new head.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"rocoft_only"``,
            those of the targeted modules.

    Raises:
        SelectionError: If an argument is not of these values.

    Source:
        Kowsher et al., RoCoFT, ACL 2025 (arXiv:2410.10075).
    """

    r: int = 3
    fraction: float | None = None
    axis: str | dict[str, str] = "row"
    selection: str = "first"
    seed: int = 0
    indices: dict[str, dict[str, list[int]]] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: str = "none"

    # No fields: peft asks for the first, the second comes of loading.
    target_parameters = None
    _stored_shapes: ClassVar[dict[str, tuple[int, ...]] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ROCOFT
        _check_count("r", self.r)
        for pattern, count in self.rank_pattern.items():
            _check_count(f"rank_pattern[{pattern!r}]", count)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SelectionError(
                f"fraction={self.fraction!r} is no share of the rows or columns. Give "
                "a number in (0, 1], or None to count them by r."
            )
        if isinstance(self.axis, Mapping):
            for pattern, axis in self.axis.items():
                _check_choice(f"axis[{pattern!r}]", axis, AXES)
        else:
            _check_choice("axis", self.axis, AXES)
        if not self.axis:
            raise SelectionError("axis={} names no module. Give 'row', for example.")
        _check_choice("selection", self.selection, STRATEGIES)
        _check_choice("bias", self.bias, BIASES)
        named = isinstance(self.target_modules, str)
        if named and self.layers_to_transform is not None:
            raise SelectionError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be used with "
                f"target_modules={self.target_modules!r}, which is a string. Write the "
                "layers into the expression, or give a list of names or None."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise SelectionError(
                f"layers_pattern={self.layers_pattern!r} says where blocks are "
                "counted, but layers_to_transform names none. Give both or neither."
            )
        if self.indices is not None:
            self.indices = _checked_indices(self.indices)
        # peft looks names up in sets.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                setattr(self, name, set(value))

    @classmethod
    def paper(
        cls,
        r: int = 3,
        axis: Literal["row", "column"] = "row",
        **options: Any,
    ) -> RoCoFTConfig:
        """Return the settings of the paper's code.

        The first `r` rows or columns of every linear layer, the head's included, and
        all biases. Leave `task_type` out: with ``"SEQ_CLS"`` peft trains the whole
        head instead.

        Args:
            r: Rows or columns of each weight.
            axis: Which of the two.
            **options: Other fields.

        Returns:
            The configuration.
        """
        given = {
            "selection": "first",
            "bias": "all",
            "target_modules": EVERY_LINEAR,
        } | options
        return cls(r=r, axis=axis, **given)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Load the configuration of an adapter, and see that its file is whole.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository of the adapter.
            *args: As for `peft.PeftConfig.from_pretrained`.
            **kwargs: As for `peft.PeftConfig.from_pretrained`.

        Returns:
            The configuration.

        Raises:
            SelectionError: If the folder holds an adapter file that cannot be read.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        file = folder / SAFETENSORS_WEIGHTS_NAME
        # peft would notice a broken file only after it has changed the model.
        config._stored_shapes = _shapes(file) if file.is_file() else None
        return config

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors of the adapter that this was loaded with, by name."""
        return self._stored_shapes

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and say in the model card how the adapter loads.

        Args:
            save_directory: Folder of the adapter.
            **kwargs: As for `peft.PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        card_file = Path(save_directory) / "README.md"
        if card_file.exists():
            card = ModelCard.load(card_file)
        else:
            data = ModelCardData(library_name="peft")
            card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# RoCoFT adapter\n")
        if _CARD_HEADING not in card.text:
            card.text = f"{card.text.rstrip()}\n\n{_CARD}"
            card.save(card_file)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in the types of JSON.

        Returns:
            Values by name of the field.
        """
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in super().to_dict().items()
        }


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of RoCoFT's tensors in a file, or raise if it is not whole."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if ".rocoft_" in name]  # noqa: SIM118
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise SelectionError(
            f"adapter file {str(file)!r} cannot be read ({error}): it is corrupt or "
            "was cut short. Copy or download it again; the model has not been changed."
        ) from error


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SelectionError(
            f"{name}={count!r} is no number of rows or columns. Give a whole number "
            "from 1 on, or a share of them as fraction."
        )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SelectionError(
            f"{name}={value!r} is unknown. Choose one of {', '.join(choices)}."
        )


def _checked_indices(
    indices: Mapping[str, Mapping[str, Sequence[int]]],
) -> dict[str, dict[str, list[int]]]:
    """Return indices as sorted lists, or raise and say what is wrong with them."""
    checked: dict[str, dict[str, list[int]]] = {}
    for module, chosen in indices.items():
        name = f"indices[{module!r}]"
        if not isinstance(chosen, Mapping) or not set(chosen) <= {"rows", "columns"}:
            raise SelectionError(
                f"{name}={chosen!r} must map 'rows' and 'columns' to lists of numbers."
            )
        lists = {side: [int(i) for i in found] for side, found in chosen.items()}
        for side, found in lists.items():
            if len(set(found)) != len(found) or min(found, default=0) < 0:
                raise SelectionError(
                    f"{name}[{side!r}]={found} has negative or repeated numbers. Count "
                    "from 0 and name each once."
                )
        if not any(lists.values()):
            raise SelectionError(f"{name} is empty. Leave the module out instead.")
        checked[module] = {side: sorted(found) for side, found in lists.items()}
    if not checked:
        raise SelectionError("indices={} names no module. Give None to select by r.")
    return checked
