"""RoCoFT's configuration for peft: the rows and columns to train in each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from rocoft.commands import STRATEGIES
from rocoft.models import SelectionError

Axes = Literal["row", "column", "both", "auto"]
Bias = Literal["none", "all", "rocoft_only"]
AXES: tuple[str, ...] = get_args(Axes)
BIASES: tuple[str, ...] = get_args(Bias)
EVERY_LINEAR = "every-linear"
"""Value of `target_modules` for all linear layers, the head's included."""

_NAME = "ROCOFT"
_CARD_HEADING = "## How to load this RoCoFT adapter"
_CARD = f"""{_CARD_HEADING}

Import `rocoft` first: this registers RoCoFT with peft (`pip install rocoft-ntk`).

```python
import rocoft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

Without it, peft stops at `KeyError: '{_NAME}'`. `rocoft.export_lora(model, path)`
writes the same adapter as an exact LoRA adapter, which needs no import.
"""


def _peft_type() -> PeftType:
    """Return this method's member of peft's enumeration; add it if necessary."""
    if _NAME not in PeftType.__members__:
        # peft's registry accepts new methods, but the enumeration of their names does
        # not.
        member = str.__new__(PeftType, _NAME)
        member._name_ = member._value_ = _NAME
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
        PeftType._member_names_.append(_NAME)
    added = PeftType.__members__.get(_NAME)
    if added is None or PeftType(_NAME) is not added or _NAME not in list(PeftType):
        raise ImportError(
            f"the member {_NAME!r} could not be added to peft's enumeration of "
            "methods: this version of Python or peft stores members differently. "
            "Install the versions of constraints.txt."
        )
    return added


ROCOFT: PeftType = _peft_type()


@dataclass
class RoCoFTConfig(PeftConfig):
    """Train some rows and columns of a model's linear weights; freeze the rest.

    A row is an output feature, ``(inputs,)`` numbers, and a column an input feature,
    ``(outputs,)`` numbers, in whatever orientation the layer stores its weight. The
    trained parameters are differences that start at zero, so weight decay pulls
    towards the pretrained weights.

    Attributes:
        r: Rows or columns of each weight; in a fused query-key-value weight, rows of
            each of the three; all that a weight has if it has fewer, with a warning.
            Consecutive rows of an attention projection lie in one head (row ``i`` in
            head ``i // head_dim``).
        fraction: Share of each weight's rows or columns in (0, 1], rounded, at least
            one; replaces `r`.
        axis: ``"row"``, ``"column"``, ``"both"`` (`r` rows and `r` columns of each
            weight, their overlap trained once), ``"auto"`` (rows where a weight has at
            most as many inputs as outputs, else columns: fewer parameters and less
            memory), or a map from patterns to these. A pattern is a regular expression
            for the end of a module's name; the first match counts.
        selection: A strategy of `rocoft.models.selection`. ``"activation"`` and
            ``"gradient"`` need examples: see `rocoft.calibrated`.
        seed: Seed for ``"random"``; each weight has its own random stream.
        indices: ``{module: {"rows": [...], "columns": [...]}}``; replaces `selection`,
            `r` and `axis`.
        target_modules: Ends of module names, a regular expression, ``"all-linear"``
            (all but the output layer), ``"every-linear"`` (all), or None: the modules
            in `indices`, else every linear layer in the transformer blocks. What these
            leave out of the blocks, as experts fused into one tensor, is warned of.
        exclude_modules: Ends of module names, or a regular expression.
        layers_to_transform: Indices of the transformer blocks to target; not with a
            string as `target_modules`.
        layers_pattern: Names of the module list that contains these blocks.
        rank_pattern: `r` by regular expressions for the end of a module's name.
        modules_to_save: Modules that are trained and saved whole, such as a new head.
        bias: The biases to train: ``"none"``, ``"all"``, or ``"rocoft_only"``, those of
            the targeted modules.

    Raises:
        SelectionError: If an argument has another value.

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

    # Not fields: peft reads the first, `from_pretrained` sets the second.
    target_parameters = None
    _stored_shapes: ClassVar[dict[str, tuple[int, ...]] | None] = None
    _folder: ClassVar[str | None] = None
    _weights_are_missing: ClassVar[bool] = False
    # The model before the adapter, while it is loaded: an `undo.Before`.
    before: ClassVar[Any] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ROCOFT
        _check_count("r", self.r)
        for pattern, count in self.rank_pattern.items():
            _check_count(f"rank_pattern[{pattern!r}]", count)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SelectionError(
                f"fraction={self.fraction!r} is no share of the rows or columns. Give "
                "a number in (0, 1], or None to set their number by r."
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
        is_string = isinstance(self.target_modules, str)
        if is_string and self.layers_to_transform is not None:
            raise SelectionError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be used with "
                f"target_modules={self.target_modules!r}, which is a string. Write the "
                "layers into the expression, or give a list of names or None."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise SelectionError(
                f"layers_pattern={self.layers_pattern!r} is used only with "
                "layers_to_transform. Give both or neither."
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
        """Return the configuration of the paper's code.

        It trains the first `r` rows or columns of every linear layer, the head's
        included (all that a layer has if these are fewer), and all biases. Leave
        `task_type` out: with ``"SEQ_CLS"`` peft trains the whole head instead.

        Args:
            r: Rows or columns of each weight.
            axis: ``"row"`` or ``"column"``.
            **options: Other fields.

        Returns:
            The configuration.
        """
        defaults = {
            "selection": "first",
            "bias": "all",
            "target_modules": EVERY_LINEAR,
        }
        return cls(r=r, axis=axis, **(defaults | options))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Load the configuration of an adapter, and check that its file is complete.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository of the adapter.
            *args: Arguments of `peft.PeftConfig.from_pretrained`.
            **kwargs: Arguments of `peft.PeftConfig.from_pretrained`.

        Returns:
            The configuration.

        Raises:
            SelectionError: If the folder holds an adapter file that cannot be read.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        file = folder / SAFETENSORS_WEIGHTS_NAME
        # peft would read a broken file only after it has changed the model.
        config._stored_shapes = _shapes(file) if file.is_file() else None
        config._folder = str(pretrained_model_name_or_path)
        old_file = folder / WEIGHTS_NAME
        config._weights_are_missing = (
            # A configuration without an adapter is saved with inference_mode=False.
            config.inference_mode
            and folder.is_dir()
            and not file.is_file()
            and not old_file.is_file()
        )
        return config

    @property
    def is_loaded(self) -> bool:
        """Whether the configuration was loaded, as peft does to load an adapter."""
        return self._folder is not None

    def check_weights(self) -> None:
        """Refuse the configuration of an adapter whose folder lacks the weights.

        Raises:
            SelectionError: If it does.
        """
        if self._weights_are_missing:
            raise SelectionError(
                f"adapter folder {self._folder!r} has no {SAFETENSORS_WEIGHTS_NAME}: "
                "nothing can be loaded. Copy or download it again; to train anew, make "
                "a new RoCoFTConfig. The model is unchanged."
            )

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes of the tensors in the adapter's file, by name, if it was loaded."""
        return self._stored_shapes

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and explain loading in the model card.

        Args:
            save_directory: Folder of the adapter.
            **kwargs: Arguments of `peft.PeftConfig.save_pretrained`.
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
        """Return the fields by name, with sets as sorted lists, for JSON."""
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in super().to_dict().items()
        }


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of RoCoFT's tensors in a file; refuse an incomplete file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if ".rocoft_" in name]  # noqa: SIM118
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise SelectionError(
            f"adapter file {str(file)!r} cannot be read ({error}): it is corrupt or "
            "was cut short. Copy or download it again. The model is unchanged."
        ) from error


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise SelectionError(
            f"{name}={count!r} is no number of rows or columns. Give an integer of at "
            "least 1, or a share of them as fraction."
        )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SelectionError(
            f"{name}={value!r} is unknown. Choose one of {', '.join(choices)}."
        )


def _checked_indices(
    indices: Mapping[str, Mapping[str, Sequence[int]]],
) -> dict[str, dict[str, list[int]]]:
    """Return indices as sorted lists; refuse invalid ones."""
    checked: dict[str, dict[str, list[int]]] = {}
    for module, chosen in indices.items():
        name = f"indices[{module!r}]"
        if not isinstance(chosen, Mapping) or not set(chosen) <= {"rows", "columns"}:
            raise SelectionError(
                f"{name}={chosen!r} must map 'rows' and 'columns' to lists of numbers."
            )
        lists = {axis: sorted(int(i) for i in chosen[axis]) for axis in chosen}
        for axis, numbers in lists.items():
            if len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
                raise SelectionError(
                    f"{name}[{axis!r}]={numbers} has negative or repeated numbers. "
                    "Count from 0 and name each once."
                )
        if not any(lists.values()):
            raise SelectionError(f"{name} is empty. Leave the module out instead.")
        checked[module] = lists
    if not checked:
        raise SelectionError("indices={} names no module. Give None to select by r.")
    return checked
