"""A pretrained transformer with its tokenizer and readout: texts in, outputs out.

Readouts
--------
- ``"head"``: logits of a classification head. If the checkpoint has none, a new head is
  made; its last layer is fitted to the training examples (``"probe"``, Kumar et al.
  2022) or keeps its seeded initialisation (``"random"``).
- ``"masked"``: logits of the label words at the mask of a prompt.
- ``"causal"``: logits of the label words after the prompt; the words' log-likelihoods
  if one has several tokens (`rocoft.models.words`).

A head that the checkpoint has is read in the order of the task's labels, by their names
(`rocoft.models.label_names`).

Prompts of causal models
------------------------
- *Padding* is on the right, whatever the tokenizer's own side, and the outputs are read
  at the last token of each prompt. A causal model does not look ahead, so padding
  changes no output; on the left it would shift the learned positions of GPT-2 and OPT.
- *Beginning of the text*: the token that the tokenizer itself adds (LLaMA, Gemma), no
  second one; none if it adds none (GPT-2, SmolLM2). An end that it adds is removed, as
  the label word continues the prompt.
- *Chat templates* are not applied, to instruction-tuned models neither. A template's
  role marks and system text differ between models, base models have none, and a reply
  begins without the space that label words begin with. So all models see the same
  prompt, and fine-tuning starts from it. To use a chat format, write its text into your
  own template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rocoft.commands import Bits, Head, Readout
from rocoft.data import Example, Prompt, Split, without_end
from rocoft.models.architecture import Architecture
from rocoft.models.label_names import name_outputs
from rocoft.models.location import locate
from rocoft.models.offloaded import keep_on_host
from rocoft.models.pretrained import (
    BackboneError,
    check_device,
    check_words,
    is_mean_pooled,
    language_model,
    load_pretrained,
    weight_options,
    with_head,
    with_mean_head,
)
from rocoft.models.probe import fit_probe
from rocoft.models.quantised import dequantised_on_use
from rocoft.models.readouts import logits
from rocoft.models.words import prompted, word_tokens

_PROBED = 6
"""Number of tokens of the texts that show in which direction a model reads."""


@dataclass
class Backbone:
    """A model that is ready to be called on examples.

    Attributes:
        name: Hub id, local folder or GGUF file, or the title of an embedded model.
        module: Maps a batch of `encode` to ``(n, labels)`` logits, or to an object with
            ``.logits``.
        tokenizer: The tokenizer.
        readout: ``"head"``, ``"masked"`` or ``"causal"``.
        new_head: Whether the classification head was made here.
        prompt: The prompt of a language model.
        max_length: Maximum number of tokens of an example.
        notes: Remarks for the user: origin of the weights, new heads, cut examples.
        fitted_head: Whether the head was fitted to the training examples, so that it
            has seen their labels, see `rocoft.models.probe`.
        sequences: Whether a label word of several tokens makes the outputs the words'
            log-likelihoods.
    """

    name: str
    module: nn.Module
    tokenizer: PreTrainedTokenizerBase
    readout: Readout
    new_head: bool
    prompt: Prompt | None
    max_length: int
    notes: list[str] = field(default_factory=list)
    fitted_head: bool = False
    sequences: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The label words; empty for a classification head."""
        if self.prompt is None:
            return ()
        return self.prompt.words_for(causal=self.readout == "causal")

    @property
    def readout_key(self) -> str:
        """What the outputs depend on besides the model and the examples, as text."""
        return f"{self.readout} {self.prompt!r}"

    def encode(
        self, examples: Sequence[Example], batch_size: int
    ) -> tuple[list[dict[str, Tensor]], list[int]]:
        """Tokenise examples into batches of similar length.

        Args:
            examples: The examples.
            batch_size: Maximum number of examples in a batch.

        Returns:
            The batches, and the indices in ``examples`` of their rows, in order.
        """
        texts = [self._text(example) for example in examples]
        encoded: list[Any] = [self._tokens(*text) for text in texts]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        batches = []
        for start in range(0, len(order), batch_size):
            rows = [encoded[i] for i in order[start : start + batch_size]]
            batch = dict(self.tokenizer.pad(rows, return_tensors="pt"))
            if self.readout == "masked":
                batch["position"] = self._mask_positions(batch["input_ids"])
            elif self.readout == "causal":
                batch["position"] = batch["attention_mask"].sum(dim=1) - 1
                if self.sequences:
                    columns = (1, len(self.words))
                    batch["position"] = batch["position"][:, None].repeat(columns)
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
            return _texts(example)
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
        if self.readout == "causal":
            kept = len(without_end(self.tokenizer, encoded["input_ids"]))
            encoded = {key: values[:kept] for key, values in encoded.items()}
        excess = len(encoded["input_ids"]) - self.max_length
        if excess <= 0:
            return encoded
        return self._shortened(encoded, excess)

    def _shortened(self, encoded: Mapping[str, Any], excess: int) -> Mapping[str, Any]:
        """Cut tokens from the front of the text, so that the prompt's end stays."""
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        free = [i for i, t in enumerate(encoded["input_ids"]) if t not in special]
        drop = set(free[:excess])
        return {
            key: [v for i, v in enumerate(values) if i not in drop]
            for key, values in encoded.items()
        }

    def _mask_positions(self, tokens: Tensor) -> Tensor:
        is_mask = tokens == self.tokenizer.mask_token_id
        if not bool((is_mask.sum(dim=1) == 1).all()):
            raise BackboneError(
                "a prompt must hold exactly one mask, but that of an example has none "
                f"or several. Remove {self.tokenizer.mask_token!r} from its text."
            )
        return is_mask.int().argmax(dim=1)


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
    """Load a pretrained model with the readout for a task.

    Args:
        model: Hub id, local folder, GGUF file or an embedded model, see
            `rocoft.models.locate`; None means the embedded MiniLM.
        split: The examples; a new head is fitted to the training examples.
        readout: ``"head"``, ``"masked"``, ``"causal"`` or None: label words if the
            checkpoint is a language model and the task has a prompt, else a head.
        head: Initialisation of a new head.
        seed: Seed of a new head.
        max_length: Maximum number of tokens of an example.
        device: Device of the model.
        dtype: Type of its parameters.
        load_in: Quantisation of the linear layers by bitsandbytes (``"4bit"``: NF4);
            their weights are dequantised on use. None means no quantisation.
        offload: Whether the weights of linear layers stay in host memory and are
            copied to the device on use, see `rocoft.models.offloaded`.

    Returns:
        The backbone, in evaluation mode.

    Raises:
        BackboneError: If the model cannot be loaded, lacks the readout, or does not
            look the way that the readout needs: a causal model reads no later token, a
            masked one does.
    """
    place = locate(model)
    path, name = place.path, place.name
    config = load_pretrained(AutoConfig, path, name)
    tokenizer = load_pretrained(AutoTokenizer, path, name)
    check_words(tokenizer, map(_texts, [*split.train, *split.test]), name)
    prompt = split.task.prompt
    readout = readout or _default_readout(config, prompt)
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
    if readout == "causal" and getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"readout='causal' is for decoders, but {name!r} is an encoder-decoder: "
            "its decoder alone would read no prompt that it was trained on. Use "
            "readout='head'."
        )
    check_device(device)
    options = weight_options(dtype, load_in, device)
    torch_state = torch.get_rng_state()
    try:
        # transformers initialises new heads from the global generator.
        torch.manual_seed(seed)
        module: Any
        new_names: list[str] = []
        if readout != "head":
            module = language_model(path, name, readout, options)
        else:
            load = with_mean_head if is_mean_pooled(path) else with_head
            module, new_names = load(path, name, len(split.task.labels), options)
    finally:
        torch.set_rng_state(torch_state)
    notes = [] if readout != "head" else _labelled(module, split, new=bool(new_names))
    allow_padding(tokenizer, module)
    limit = length_limit(config, tokenizer)
    new_paths = [parameter.rpartition(".")[0] for parameter in new_names]
    if offload:
        outputs = [module.get_submodule(new_path) for new_path in new_paths]
        if readout != "head":
            # Label words are rows of the output layer's weight: it must be in place.
            outputs.append(module.get_output_embeddings())
        module = keep_on_host(module, device, but=outputs)
    elif load_in is None:
        module = module.to(device)
    else:
        module = dequantised_on_use(module)
        for new_path in new_paths:
            module.get_submodule(new_path).to(device)
    if readout == "head":
        _check_reading(module.eval(), name)
    else:
        check_direction(module.eval(), name, causal=readout == "causal")
    backbone = Backbone(
        *(name, module.eval(), tokenizer, readout, bool(new_names)),
        *(prompt if readout != "head" else None, min(max_length, limit)),
        notes=[*place.notes, *notes],
    )
    if offload:
        backbone.notes.append("weights of linear layers are in the host's memory")
    if max_length > limit:
        backbone.notes.append(
            f"max_length={max_length} is over the model's limit {limit}"
        )
    if readout != "head":
        assert prompt is not None
        words = word_tokens(tokenizer, backbone.words, readout)
        backbone.module = prompted(module, words).eval()
        if (longest := max(map(len, words))) > 1:
            backbone.sequences = True
            # The model reads all tokens of a word but the last.
            backbone.max_length = min(backbone.max_length, limit - longest + 1)
            backbone.notes.append(
                f"label words of up to {longest} tokens: outputs are their "
                "log-likelihoods, and a pass reads an example once for each word"
            )
    elif new_names:
        backbone.notes.append(f"new head: {', '.join(new_names)} ({head})")
        if head == "probe":
            fit_probe(backbone, split.task, split.train)
            backbone.fitted_head = True
    architecture = Architecture(backbone.module)
    if others := architecture.left_out(architecture.targets):
        backbone.notes.append(f"rows, columns and LoRA are not all: {others}")
    examples = [*split.train, *split.test]
    if cut := backbone.truncated(examples):
        backbone.notes.append(
            f"{cut} of {len(examples)} examples were cut to {backbone.max_length} "
            "tokens"
        )
    return backbone


def check_direction(module: Any, name: str, *, causal: bool) -> None:
    """Refuse a language model that reads in another direction than the task needs.

    An encoder taken as a causal model sees the token that it is to predict; a decoder
    taken as a masked model does not see the text after the mask.

    Args:
        module: The model, in evaluation mode.
        name: Name of the model in errors.
        causal: Whether it is to read no later token, not to read later ones.

    Raises:
        BackboneError: If it reads in the other direction.
    """
    kind = type(module).__name__
    looks_ahead = _depends(module, slice(_PROBED // 2, None), slice(_PROBED // 2))
    if causal and looks_ahead:
        raise BackboneError(
            f"{name!r} is no causal language model: its {kind} reads later tokens, so "
            "it would see the answer. Give a decoder, or use readout='masked' or "
            "'head' for a task with classes."
        )
    if not causal and not looks_ahead:
        raise BackboneError(
            f"{name!r} is no masked language model: its {kind} reads no later token "
            "(is_decoder in its configuration?), so it would not see the text after "
            "the mask. Use readout='causal' or 'head'."
        )


def _check_reading(module: Any, name: str) -> None:
    """Refuse a classifier that reads the first token and nothing after it."""
    if not getattr(module.config, "is_decoder", False):
        return
    if _depends(module, slice(1)) and not _depends(module, slice(1, None)):
        raise BackboneError(
            f"{name!r} is no classifier of texts: its {type(module).__name__} reads "
            "the first token, which sees no other (is_decoder in its configuration). "
            "Set is_decoder to false there, or use a readout of label words."
        )


def _depends(module: Any, changed: slice, read: slice | None = None) -> bool:
    """Whether outputs change with some tokens of a text.

    Args:
        module: The model, in evaluation mode.
        changed: Places of the tokens that are changed.
        read: Places of the outputs, of those of each token; None means all outputs.

    Returns:
        Whether they do.
    """
    vocabulary = module.config.get_text_config().vocab_size
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    # No special tokens, as these are at the ends of vocabularies.
    first = torch.arange(_PROBED) + vocabulary // 2
    second = first.clone()
    second[changed] += _PROBED
    outputs = []
    with torch.no_grad():
        # One pass each: what does not change is then equal to the bit.
        for text in (first, second):
            tokens = text.remainder(vocabulary)[None].to(parameter.device)
            output = logits(
                module(input_ids=tokens, attention_mask=torch.ones_like(tokens))
            )
            outputs.append((output if read is None else output[:, read]).float())
    difference = (outputs[0] - outputs[1]).abs().max()
    # But for sums in another order, as on some GPUs.
    rounding = torch.finfo(parameter.dtype).eps * outputs[0].abs().max()
    return bool(difference > 2 * rounding)


def _texts(example: Example) -> tuple[str, ...]:
    return (example.a,) if example.b is None else (example.a, example.b)


def _default_readout(config: Any, prompt: Prompt | None) -> Readout:
    kinds = " ".join(getattr(config, "architectures", None) or [])
    if prompt is not None and "ForMaskedLM" in kinds:
        return "masked"
    if prompt is not None and ("ForCausalLM" in kinds or "LMHeadModel" in kinds):
        return "causal"
    return "head"


def _labelled(module: Any, split: Split, *, new: bool) -> list[str]:
    """Give a head's outputs the order and a new head the names of the labels."""
    labels = split.task.labels
    if not new:
        return name_outputs(module, labels)
    if not split.task.regression:
        module.config.id2label = dict(enumerate(labels))
        module.config.label2id = {label: i for i, label in enumerate(labels)}
    return []


def allow_padding(tokenizer: PreTrainedTokenizerBase, module: Any) -> None:
    """Enable padding for models that were trained without it (GPT-2, LLaMA)."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if getattr(module.config, "pad_token_id", None) is None:
        module.config.pad_token_id = tokenizer.pad_token_id
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False


def length_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum number of tokens of a model and its tokenizer."""
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    # RoBERTa numbers positions from padding_idx + 1.
    if getattr(config, "model_type", "") in {"roberta", "xlm-roberta", "camembert"}:
        positions -= (getattr(config, "pad_token_id", 1) or 0) + 1
    return int(min(positions, tokenizer.model_max_length))
