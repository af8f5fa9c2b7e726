"""A pretrained transformer with its tokenizer and readout: texts in, outputs out.

Readouts
--------
- ``"head"``: the logits of a classification head. A checkpoint's own head is used; a
  head it does not have is made, and its last layer fitted to the training examples
  (``"probe"``, Kumar et al. 2022) or left at its seeded start (``"random"``).
- ``"masked"``: the logits of the label words at the mask of a prompt.
- ``"causal"``: the logits of the label words after the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rocoft.architecture import Architecture
from rocoft.offloaded import keep_on_host
from rocoft.pretrained import (
    EMBEDDED_NAME,
    BackboneError,
    Bits,
    check_device,
    embedded_folder,
    is_mean_pooled,
    language_model,
    load_pretrained,
    weight_options,
    with_head,
    with_mean_head,
)
from rocoft.quantised import dequantised_on_use
from rocoft.readouts import LabelWords, Prompted, logits
from rocoft.splits import Split
from rocoft.tasks import Example, Prompt

Readout = Literal["head", "masked", "causal"]
Head = Literal["probe", "random"]


@dataclass
class Backbone:
    """A model that is ready to be called on examples.

    Attributes:
        name: As the user named it.
        module: From a batch of `encode` to ``(n, labels)`` logits, or an object that
            has them as ``.logits``.
        tokenizer: Its tokenizer.
        readout: How its outputs are read.
        new_head: Whether the classification head was made here.
        prompt: The prompt of a language model.
        max_length: Most tokens of an example.
        notes: What the user should know of how it was made.
    """

    name: str
    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    readout: Readout
    new_head: bool
    prompt: Prompt | None
    max_length: int
    notes: list[str] = field(default_factory=list)

    def encode(
        self, examples: Sequence[Example], batch_size: int
    ) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Tokenise examples into batches of similar length.

        Args:
            examples: The examples.
            batch_size: Most examples in a batch.

        Returns:
            The batches, and for each example in their order its number in
            ``examples``.
        """
        texts = [self._text(example) for example in examples]
        encoded: list[Any] = [self._tokens(*text) for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        batches = []
        for start in range(0, len(order), batch_size):
            some = [encoded[i] for i in order[start : start + batch_size]]
            batch = dict(self.tokenizer.pad(some, return_tensors="pt"))
            if self.readout == "masked":
                batch["position"] = self._mask_positions(batch["input_ids"])
            elif self.readout == "causal":
                batch["position"] = batch["attention_mask"].sum(dim=1) - 1
            batches.append(batch)
        return batches, order

    def truncated(self, examples: Sequence[Example]) -> int:
        """Return how many examples are longer than ``max_length`` tokens."""
        return sum(
            len(self.tokenizer(*self._text(example))["input_ids"]) > self.max_length
            for example in examples
        )

    def _text(self, example: Example) -> tuple[str, ...]:
        if self.readout == "head":
            return (example.a,) if example.b is None else (example.a, example.b)
        return (self._fill(example.a, example.b or ""),)

    def _fill(self, a: str, b: str) -> str:
        assert self.prompt is not None
        if self.readout == "causal":
            return self.prompt.causal.format(a=a, b=b)
        template, mask = self.prompt.template, self.tokenizer.mask_token
        if "{a}?" in template:
            # LM-BFF's templates turn the first sentence into a question.
            a = a.rstrip(" .?!")
        return template.format(a=a, b=b, mask=mask)

    def _tokens(self, *texts: str) -> Mapping[str, Any]:
        if self.readout == "head":
            return self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        encoded = self.tokenizer(*texts)
        excess = len(encoded["input_ids"]) - self.max_length
        if excess <= 0:
            return encoded
        return self._shortened(encoded, excess)

    def _shortened(self, encoded: Mapping[str, Any], excess: int) -> Mapping[str, Any]:
        """Cut tokens from the front of the text, so that the prompt's end stays."""
        ids = encoded["input_ids"]
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        keep = [i for i, token in enumerate(ids) if token in special]
        free = [i for i in range(len(ids)) if i not in keep]
        drop = set(free[:excess])
        return {
            key: [v for i, v in enumerate(values) if i not in drop]
            for key, values in encoded.items()
        }

    def _mask_positions(self, tokens: Tensor) -> Tensor:
        found = tokens == self.tokenizer.mask_token_id
        if not bool((found.sum(dim=1) == 1).all()):
            raise BackboneError(
                "a prompt must hold exactly one mask, but an example's text has "
                f"{self.tokenizer.mask_token!r} in it or lost it."
            )
        return found.int().argmax(dim=1)


def load_backbone(
    model: str | None,
    split: Split,
    *,
    readout: Readout | None = None,
    head: Head = "probe",
    seed: int = 0,
    max_length: int = 128,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    load_in: Bits | None = None,
    offload: bool = False,
) -> Backbone:
    """Load a pretrained model and read it out for a task.

    Args:
        model: Hub id or local folder; None means the embedded MiniLM.
        split: The examples; a new head is fitted to the training ones.
        readout: How to read it out. None takes a language model's label words if the
            checkpoint is one and the task has a prompt, else a head.
        head: How a head that the checkpoint lacks is made.
        seed: Of a new head.
        max_length: Most tokens of an example.
        device: Where to put it.
        dtype: Of its parameters.
        load_in: How bitsandbytes quantises its linear layers (``"4bit"``: NF4); their
            weights are dequantised as they are used. None means not at all.
        offload: Whether the weights of its linear layers stay in the host's memory and
            are brought to the device as they are used, see `rocoft.offloaded`.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        BackboneError: If it cannot be loaded or read out.
    """
    path, name = (
        (str(embedded_folder()), EMBEDDED_NAME) if model is None else (model,) * 2
    )
    config = load_pretrained(AutoConfig, path, name)
    tokenizer = load_pretrained(AutoTokenizer, path, name)
    prompt = split.task.prompt
    readout = readout or _natural_readout(config, prompt)
    if readout != "head" and prompt is None:
        raise BackboneError(
            f"readout={readout!r} needs a prompt; task {split.task.name!r} has none. "
            "Use readout='head', or give --template and --label-words."
        )
    if offload and load_in is not None:
        raise BackboneError(
            f"load_in={load_in!r} keeps the weights on the device, offload=True does "
            "not. Choose one of them."
        )
    check_device(device)
    how = weight_options(dtype, load_in, device)
    torch_state = torch.get_rng_state()
    try:
        # transformers initialises new heads from the global generator.
        torch.manual_seed(seed)
        module: Any
        fresh: list[str] = []
        if readout != "head":
            module = language_model(path, name, readout, how)
        elif is_mean_pooled(path):
            module, fresh = with_mean_head(path, name, len(split.task.labels), how)
        else:
            module, fresh = with_head(path, name, len(split.task.labels), how)
    finally:
        torch.set_rng_state(torch_state)
    allow_padding(tokenizer, module)
    limit = length_limit(config, tokenizer)
    if offload:
        made = [module.get_submodule(name.rpartition(".")[0]) for name in fresh]
        # Label words are rows of the output layer, which must be there to be picked.
        read = [module.get_output_embeddings()] if readout != "head" else []
        module = keep_on_host(module, device, but=[*made, *read])
    elif load_in is None:
        module = module.to(device)
    else:
        module = dequantised_on_use(module)
        for parameter in fresh:
            module.get_submodule(parameter.rpartition(".")[0]).to(device)
    backbone = Backbone(
        *(name, module.eval(), tokenizer, readout, bool(fresh)),
        *(prompt if readout != "head" else None, min(max_length, limit)),
    )
    if offload:
        backbone.notes.append("weights of linear layers are in the host's memory")
    if max_length > limit:
        backbone.notes.append(
            f"max_length={max_length} is over the model's limit {limit}"
        )
    if readout != "head":
        assert prompt is not None
        words = _word_tokens(tokenizer, prompt, readout)
        output = module.get_output_embeddings()
        module.set_output_embeddings(LabelWords(output, words).to(device))
        backbone.module = Prompted(module).eval()
    elif fresh:
        backbone.notes.append(f"new head: {', '.join(fresh)} ({head})")
        if head == "probe":
            fit_probe(backbone, split)
    cut = backbone.truncated([*split.train, *split.test])
    if cut:
        backbone.notes.append(
            f"{cut} of {len(split.train) + len(split.test)} examples were cut to "
            f"{backbone.max_length} tokens"
        )
    return backbone


def _natural_readout(config: Any, prompt: Prompt | None) -> Readout:
    kinds = " ".join(getattr(config, "architectures", None) or [])
    if prompt is not None and "ForMaskedLM" in kinds:
        return "masked"
    if prompt is not None and ("ForCausalLM" in kinds or "LMHeadModel" in kinds):
        return "causal"
    return "head"


def allow_padding(tokenizer: PreTrainedTokenizerBase, module: Any) -> None:
    """Let models pad that were trained without padding (GPT-2, LLaMA)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if getattr(module.config, "pad_token_id", None) is None:
        module.config.pad_token_id = tokenizer.pad_token_id
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False


def length_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the most tokens that a model and its tokenizer take."""
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    # RoBERTa numbers positions from padding_idx + 1.
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        positions -= (getattr(config, "pad_token_id", 1) or 0) + 1
    return int(min(positions, tokenizer.model_max_length))


def _word_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, readout: Readout
) -> list[int]:
    """Return the token of each label word as it stands inside a sentence."""
    if readout == "masked" and tokenizer.mask_token is None:
        raise BackboneError(
            "readout='masked' needs a tokenizer with a mask token. Use 'causal' or "
            "'head'."
        )
    found = []
    for word in prompt.words:
        lead = tokenizer("a", add_special_tokens=False)["input_ids"]
        both = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        tokens = both[len(lead) :] if both[: len(lead)] == lead else both
        if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise BackboneError(
                f"label word {word!r} is not one token of this model but {pieces}. "
                "Give other words with --label-words, or use --readout head."
            )
        found.append(tokens[0])
    if len(set(found)) != len(found):
        raise BackboneError(
            f"label words {prompt.words} are not distinct tokens of this model. Give "
            "others with --label-words, or use --readout head."
        )
    return found


def fit_probe(backbone: Backbone, split: Split) -> None:
    """Fit the head's last layer to the training examples by logistic regression.

    Of a regression, by ridge regression on the scores.

    Args:
        backbone: Its module is changed.
        split: The training examples are used.

    Raises:
        BackboneError: If the head has no linear layer to fit.
    """
    module = backbone.module
    head = Architecture(module).head
    last = [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and f"{path}.weight" in head
        and layer.out_features == len(split.task.labels)
    ]
    if not last:
        raise BackboneError(
            f"the head of {type(module).__name__} has no linear output layer to fit. "
            "Use --head-init random."
        )
    path, layer = last[-1]
    batches, order = backbone.encode(split.train, batch_size=32)
    # With the layer taken out, the model's own pooling gives the layer's inputs.
    module.set_submodule(path, nn.Identity())
    try:
        device = layer.weight.device
        with torch.no_grad():
            inputs = [
                logits(module(**{k: v.to(device) for k, v in b.items()}))
                for b in batches
            ]
    finally:
        module.set_submodule(path, layer)
    features = torch.cat(inputs).double().cpu().numpy()
    labels = np.array([split.train[i].label for i in order])
    biased, regression = layer.bias is not None, split.task.regression
    probe = Ridge(fit_intercept=biased)
    if not regression:
        probe = LogisticRegression(max_iter=5000, fit_intercept=biased)
    probe.fit(features, labels)
    weight, bias = np.atleast_2d(probe.coef_), np.atleast_1d(probe.intercept_)
    if len(weight) == 1 and not regression:
        # Two classes have one boundary; its halves are the two logits.
        weight, bias = np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.as_tensor(bias))
