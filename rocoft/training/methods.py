"""Fine-tuning methods: their notation, and the parameters that they train.

The notation is that of the tangent spaces in `ntk.spaces.notation`: a name, a count
after a colon, modules after ``@`` and options after slashes.

>>> str(parse_method("rows:3@query,value/layers=0,11"))
'rows:3@query,value/layers=0,11'

- ``full``: every parameter.
- ``rows:3``, ``columns:3``, ``rows:3+columns:3``: RoCoFT. ``auto:3`` takes rows where a
  weight has at most as many inputs as outputs, else columns. ``+bias`` adds all biases.
- ``lora:8``, ``dora:8``: rank 8; ``/alpha=16`` sets the scaling to alpha / rank.
- ``bitfit``: all biases (Ben Zaken et al. 2022).
- ``head``: the head only; ``probe``: its last layer, by logistic regression on frozen
  features.
- ``masked rows:3``: whole weights with gradients masked to the selection, the plain
  reference for RoCoFT that saves no memory.

A classification head trains with every method, as users of peft expect.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from rocoft.adapter import Axes, Loss, RoCoFTConfig, calibrated
from rocoft.commands import STRATEGIES, Strategy
from rocoft.models import (
    DATA_STRATEGIES,
    Architecture,
    Axis,
    LinearWeight,
    Prompted,
    SelectionError,
    check_counts,
    match,
    read,
    select_each,
    split_term,
)

Kind = Literal["full", "rocoft", "masked", "lora", "dora", "bitfit", "head", "probe"]

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "full": (2e-5, 5e-5, 1e-4),
    "rocoft": (5e-4, 1e-3, 2e-3),
    "masked": (5e-4, 1e-3, 2e-3),
    "lora": (2e-4, 5e-4, 1e-3),
    "dora": (2e-4, 5e-4, 1e-3),
    "bitfit": (5e-4, 1e-3, 2e-3),
    "head": (1e-3, 3e-3, 1e-2),
    "probe": (),
}
"""Default learning rates of the search, by kind of method."""

_NAMES = {"rows": "row", "columns": "column", "auto": "auto"}
_PLAIN = ("full", "bitfit", "head", "probe")
_SLICED = ("rocoft", "masked")


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Attributes:
        kind: The kind of method.
        count: Rows or columns of each weight, or the rank.
        slices: Rows, columns or both, for RoCoFT and its masked reference.
        strategy: How rows and columns are selected, see `selection.select`.
        seed: Seed of random selection.
        alpha: LoRA's scaling is alpha / rank; None means a scaling of 1.
        bias: Whether RoCoFT trains all biases too, as the authors' code does.
        patterns: Patterns of the weights' names, see `architecture.match`; none means
            all.
        blocks: Transformer blocks, negative from the end; none means all.
    """

    kind: Kind
    count: int = 0
    slices: Axes = "row"
    strategy: Strategy = "first"
    seed: int = 0
    alpha: float | None = None
    bias: bool = False
    patterns: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise SelectionError(
                f"kind={self.kind!r} is unknown. Choose one of {kinds}."
            )
        if self.kind not in _PLAIN and self.count < 1:
            raise SelectionError(f"method {self!s} needs a count of at least 1.")
        if self.strategy not in STRATEGIES:
            raise SelectionError(
                f"strategy={self.strategy!r} is unknown. Choose one of "
                f"{', '.join(STRATEGIES)}."
            )
        if self.kind == "masked" and (self.bias or self.strategy in DATA_STRATEGIES):
            raise SelectionError(
                f"method {self!s} is no masked reference: that selects rows and "
                "columns by position, at random or by norm, without biases."
            )

    def __str__(self) -> str:
        if self.kind in _PLAIN:
            return self.kind
        options = f"@{','.join(self.patterns)}" if self.patterns else ""
        if self.blocks:
            options += f"/layers={','.join(map(str, self.blocks))}"
        if self.strategy != "first":
            options += f"/strategy={self.strategy}"
        if self.seed:
            options += f"/seed={self.seed}"
        if self.alpha is not None:
            options += f"/alpha={self.alpha!r}".replace("+", "")
        names: list[str] = [self.kind]
        if self.kind in _SLICED:
            wanted = {"row", "column"} if self.slices == "both" else {self.slices}
            names = [name for name, slices in _NAMES.items() if slices in wanted]
        text = "+".join(f"{name}:{self.count}{options}" for name in names)
        prefix = "masked " if self.kind == "masked" else ""
        return prefix + text + ("+bias" if self.bias else "")

    @property
    def adapter(self) -> bool:
        """Whether peft applies the method and saves it as an adapter."""
        return self.kind in {"rocoft", "lora", "dora"}


def parse_method(text: str) -> Method:
    """Parse a method.

    Args:
        text: The method in this module's notation.

    Returns:
        The method.

    Raises:
        SelectionError: If the text is not a method.
    """
    masked = text.strip().startswith("masked ")
    terms = [t.strip() for t in text.strip().removeprefix("masked ").split("+")]
    bias = len(terms) > 1 and terms[-1] == "bias"
    first, *rest = [_term(text, term) for term in (terms[:-1] if bias else terms)]
    slices = {first.pop("slices", None)}
    for other in rest:
        slices.add(other.pop("slices", None))
        if other != first or slices != {"row", "column"}:
            raise SelectionError(
                f"method {text!r} is no sum that can be trained. Only rows and columns "
                "with the same count and options can be added, such as "
                "rows:3+columns:3, and +bias."
            )
    if None in slices and (masked or bias):
        raise SelectionError(
            f"method {text!r}: only rows and columns can be masked or take +bias."
        )
    if None not in slices:
        (name,) = slices if len(slices) == 1 else ("both",)
        first |= {"slices": name, "kind": "masked" if masked else "rocoft"}
    return Method(**first, bias=bias)


def _term(method: str, text: str) -> dict[str, Any]:
    """Return the fields of `Method` that one term of the notation gives."""
    name, count, patterns, options = split_term(text)
    whole, known = f"method {method!r}", (*_NAMES, "lora", "dora", *_PLAIN)
    if name not in known:
        raise SelectionError(
            f"{whole} is unknown: {name!r} is none of {', '.join(known)}. "
            "Write for example rows:3, lora:8/alpha=16 or full."
        )
    fields: dict[str, Any] = {"kind": name}
    if name in _NAMES:
        fields = {"kind": "rocoft", "slices": _NAMES[name]}
    if name in _PLAIN and text != name:
        raise SelectionError(f"{whole}: {name!r} takes no number or option.")
    if name not in _PLAIN:
        fields["count"] = read(whole, "number", count)
    allowed = ("layers", "strategy", "seed") if name in _NAMES else ("layers", "alpha")
    for key, value in options:
        if key not in allowed:
            option = key if value is None else f"{key}={value}"
            raise SelectionError(
                f"{whole}: option {option!r} is none of "
                f"{', '.join(f'{k}=...' for k in allowed)}."
            )
        fields["blocks" if key == "layers" else key] = read(whole, key, value)
    if patterns:
        fields["patterns"] = patterns
    return fields


def apply_method(
    module: nn.Module,
    method: Method,
    *,
    train_head: bool,
    batches: Iterable[Mapping[str, Tensor]] = (),
    loss: Loss | None = None,
) -> nn.Module:
    """Prepare a model so that exactly the method's parameters require gradients.

    Args:
        module: The model; it is changed.
        method: The method.
        train_head: Whether the head trains with every method. A classification head
            does, the output layer of a language model does not.
        batches: Examples for selections by activation or gradient.
        loss: Loss of the wrapped model on one example, for selections by gradient;
            None means the model's own loss.

    Returns:
        The model to train: ``module``, or a `PeftModel` around it. In a `Prompted` the
        language model inside is wrapped, so that the adapter is that of the plain
        language model.

    Raises:
        SelectionError: If the method selects nothing of this model.
    """
    for text in left_out(module, method):
        warnings.warn(f"{text}.", stacklevel=2)
    if method.adapter and isinstance(module, Prompted):
        inner = _with_adapter(module.model, method, False, batches, loss)
        module.set_submodule("model", inner)
        return module
    if method.adapter:
        return _with_adapter(module, method, train_head, batches, loss)
    architecture = Architecture(module)
    names = _trained(architecture, method)
    if not names:
        raise SelectionError(
            f"method {method!s} trains nothing of {architecture.name}, which has no "
            f"{'bias' if method.kind == 'bitfit' else 'head'} parameters. Use full, "
            "rows, columns or lora."
        )
    head = architecture.head if train_head and method.kind != "probe" else ()
    trained = {*names, *head}
    for name, parameter in architecture.parameters.items():
        parameter.requires_grad_(name in trained)
    if method.kind == "masked":
        targets = _targets(architecture, method)
        check_counts(
            [(w, axis, method.count) for w in targets for axis in _axes(w, method)]
        )
        for weight in targets:
            parameter = architecture.parameters[weight.name]
            mask = _mask(weight, parameter.detach(), method)
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
    return module


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def left_out(module: nn.Module, method: Method) -> list[str]:
    """Return what a method of all linear weights leaves out of the blocks, if anything.

    Args:
        module: The model, before or after the method is applied.
        method: The method.

    Returns:
        At most one sentence for users; none if the method names its modules itself.
    """
    if method.kind not in {*_SLICED, "lora", "dora"} or method.patterns:
        return []
    architecture = Architecture(module)
    text = architecture.left_out(architecture.linear_weights)
    return [f"{text}; method {method!s} leaves them as they are"] if text else []


def _trained(architecture: Architecture, method: Method) -> Sequence[str]:
    if method.kind == "full":
        return list(architecture.parameters)
    if method.kind == "bitfit":
        return architecture.biases
    if method.kind == "masked":
        return [weight.name for weight in _targets(architecture, method)]
    if method.kind == "probe":
        weights = architecture.linear_weights.items()
        last = [weight.module for name, weight in weights if name in architecture.head]
        return [n for n in architecture.head if n.rpartition(".")[0] in last[-1:]]
    return architecture.head


def _targets(architecture: Architecture, method: Method) -> list[LinearWeight]:
    """Return the weights that a method of rows, columns or low rank adapts."""
    names = list(architecture.targets)
    if method.patterns:
        names = match(names, method.patterns)
    if method.blocks:
        indices = {architecture.block(name) for name in architecture.targets}
        depth = max((i for i in indices if i is not None), default=-1) + 1
        if bad := [b for b in method.blocks if not -depth <= b < depth]:
            raise SelectionError(
                f"layers {', '.join(map(str, bad))} do not exist: the model has "
                f"{depth} blocks, 0 to {depth - 1}."
            )
        blocks = {b % depth for b in method.blocks}
        names = [name for name in names if architecture.block(name) in blocks]
    if not names:
        raise SelectionError(
            f"method {method!s} selects none of the model's linear weights."
        )
    return [architecture.targets[name] for name in names]


def _with_adapter(
    model: nn.Module,
    method: Method,
    train_head: bool,
    batches: Iterable[Mapping[str, Tensor]],
    loss: Loss | None,
) -> PeftModel:
    architecture = Architecture(model)
    weights = _targets(architecture, method)
    head = sorted({name.partition(".")[0] for name in architecture.head})
    options: dict[str, Any] = {
        "task_type": _task_type(model),
        "r": method.count,
        "target_modules": _module_names(architecture, weights),
        "modules_to_save": head if train_head and head else None,
    }
    config: PeftConfig
    if method.kind == "rocoft":
        config = RoCoFTConfig(
            axis=method.slices,
            selection=method.strategy,
            seed=method.seed,
            bias="all" if method.bias else "none",
            **options,
        )
        if method.strategy in DATA_STRATEGIES:
            config = calibrated(config, model, batches, loss=loss)
    else:
        config = LoraConfig(
            # Annotated as int, but any number works: peft only divides it by the rank.
            lora_alpha=method.count if method.alpha is None else method.alpha,  # type: ignore[arg-type]
            use_dora=method.kind == "dora",
            fan_in_fan_out=any(weight.output_dim for weight in weights),
            **options,
        )
    return get_peft_model(model, config)


def _task_type(model: nn.Module) -> str | None:
    """Return peft's task type of a model, which peft's Auto classes need."""
    endings = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    name = type(model).__name__
    return next((task for end, task in endings.items() if name.endswith(end)), None)


def _module_names(
    architecture: Architecture, weights: Sequence[LinearWeight]
) -> list[str]:
    """Return names for peft that match the weights' modules and no other.

    Names inside a block (``attention.self.query``) where they suffice, else full names.
    """
    paths = {weight.module for weight in weights}
    short = {_inside_block(architecture, path) for path in paths}
    others = {w.module for w in architecture.linear_weights.values()} - paths
    if any(f".{path}".endswith(f".{end}") for path in others for end in short):
        return sorted(paths)
    return sorted(short)


def _inside_block(architecture: Architecture, path: str) -> str:
    """Return a module's name relative to its block."""
    index = architecture.block(path)
    return path if index is None else path.partition(f".{index}.")[2]


def _mask(weight: LinearWeight, stored: Tensor, method: Method) -> Tensor:
    """Return a mask of a stored weight: 1 in the selected rows and columns, else 0."""
    mask = torch.zeros_like(stored)
    # Views in the orientation (outputs, inputs).
    values, view = (stored, mask) if weight.output_dim == 0 else (stored.T, mask.T)
    for axis in _axes(weight, method):
        parts = len(weight.parts) if axis == "row" else 1
        chosen = select_each(
            *(weight, values, axis, [method.count] * parts, method.strategy),
            seed=method.seed,
        )
        dim = 0 if axis == "row" else 1
        view.index_fill_(dim, torch.tensor(chosen, device=mask.device), 1.0)
    return mask


def _axes(weight: LinearWeight, method: Method) -> tuple[Axis, ...]:
    """Return whether a method takes rows of a weight, columns, or both."""
    slices = weight.narrow_axis if method.slices == "auto" else method.slices
    return ("row", "column") if slices == "both" else (slices,)
