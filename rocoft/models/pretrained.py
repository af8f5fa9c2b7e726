"""Pretrained models from the Hub or a folder, in any precision.

Only this file downloads models.
"""

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rocoft.commands import Bits
from rocoft.models.architecture import Architecture
from rocoft.models.readouts import MeanPooled

_SPACES = "\u2581\u0120 "
"""Marks of a space before a word in SentencePiece and in byte-level vocabularies."""


class BackboneError(ValueError):
    """A model that cannot be loaded, or lacks the readout."""


def first_line(error: Exception) -> str:
    """Return the first line of an error that may have many, without its full stop.

    Args:
        error: An error of another library.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def load_pretrained(kind: Any, path: str, name: str, **options: Any) -> Any:
    """Call `from_pretrained` and report failures in one sentence.

    Code that comes with a model is never run. A tokenizer without a vocabulary is a
    failure: transformers makes one of a model's kind, which knows no word, where a
    folder has no files of a tokenizer.

    Args:
        kind: One of transformers' Auto classes.
        path: Hub id or local folder.
        name: Name of the model in errors.
        **options: More arguments of `from_pretrained`.

    Returns:
        The result of `from_pretrained`.

    Raises:
        BackboneError: If it cannot be loaded, or is a tokenizer without words.
    """
    local = os.path.isdir(path) or not _hub_is_known()
    try:
        # Not None, the default, which asks the user and waits for an answer.
        loaded = kind.from_pretrained(
            path, local_files_only=local, trust_remote_code=False, **options
        )
    except Exception as error:
        # Hub, network, parser and configuration errors share no base class.
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            raise BackboneError(
                f"model {name!r} needs code of its own, from its folder or repository, "
                "and only models that transformers knows are loaded here: no code of "
                "others is run. Convert it, or name another model."
            ) from error
        if local and not os.path.isdir(path):
            reason = "the Hub cannot be reached and the model is not in the local cache"
        origin = "" if os.path.isdir(path) else " from the Hub"
        raise BackboneError(
            f"model {name!r} could not be loaded{origin}: {reason}. Check the name "
            "and the network, give a local folder, or leave --model out to use the "
            "embedded MiniLM."
        ) from error
    if isinstance(loaded, PreTrainedTokenizerBase) and not _has_words(loaded):
        raise BackboneError(
            f"the tokenizer of model {name!r} knows no word, only its "
            f"{len(loaded.get_vocab())} special tokens, so that the model could not "
            "tell texts apart. Put the files of its tokenizer, such as tokenizer.json "
            "or vocab.txt, beside its weights."
        )
    return loaded


def check_words(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[Sequence[str]], name: str
) -> None:
    """Refuse a tokenizer that knows no token of any of the texts.

    Args:
        tokenizer: The model's tokenizer.
        texts: Texts of examples, one or two of each.
        name: Name of the model in errors.

    Raises:
        BackboneError: If all texts are made of unknown tokens.
    """
    examples = list(texts)
    for example in examples:
        for text in example:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if _speaks(tokenizer, tokenizer.convert_ids_to_tokens(tokens)):
                return
    if examples:
        raise BackboneError(
            f"the tokenizer of model {name!r} knows no token of the "
            f"{len(examples)} examples: all are {tokenizer.unk_token!r} or special, so "
            "that the model cannot tell them apart. Check that the tokenizer is that "
            "of the model, and the language of the examples."
        )


def _has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a vocabulary holds more than added tokens and marks of a space."""
    added = tokenizer.get_added_vocab()
    return _speaks(tokenizer, (x for x in tokenizer.get_vocab() if x not in added))


def _speaks(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> bool:
    """Whether one of the tokens is part of a text: neither special nor a space."""
    special = {*tokenizer.all_special_tokens}
    return any(x not in special and bool(x.strip(_SPACES)) for x in tokens)


def weight_options(
    dtype: torch.dtype, load_in: Bits | None, device: str
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for type and quantisation of weights.

    Args:
        dtype: Type of unquantised parameters.
        load_in: Quantisation of the linear layers; None means none.
        device: Device of quantised weights.

    Returns:
        Arguments by name.

    Raises:
        BackboneError: If bitsandbytes is not installed.
    """
    if load_in is None:
        return {"dtype": dtype}
    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"load_in={load_in!r} needs bitsandbytes, which is not installed. Install "
            "it with pip install bitsandbytes, or leave the option out."
        )
    if load_in == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"dtype": dtype, "quantization_config": config, "device_map": {"": device}}


def resolved_device(device: str) -> str:
    """Return the device that ``auto`` stands for here.

    Args:
        device: Such as ``cuda``; ``auto`` means a GPU if torch finds one, else ``cpu``.

    Returns:
        The device; one that is named as it is.
    """
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Args:
        device: A device such as ``cuda``.

    Raises:
        BackboneError: If torch cannot use it.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BackboneError(
            f"device={device!r} cannot be used: {reason}. Use 'cpu', or 'cuda' where "
            "torch finds a GPU."
        ) from error


def _hub_is_known() -> bool:
    """Whether the Hub's name resolves: requests for files would retry for long."""
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return bool(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"))
    return True


def language_model(
    path: str,
    name: str,
    readout: Literal["masked", "causal"],
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """Load a model with a language-model head.

    Args:
        path: Hub id or local folder.
        name: Name of the model in errors.
        readout: The kind of language model.
        options: Arguments from `weight_options`.

    Returns:
        The model.

    Raises:
        BackboneError: If the checkpoint has no such head.
    """
    kind = AutoModelForMaskedLM if readout == "masked" else AutoModelForCausalLM
    module, info = load_pretrained(
        kind, path, name, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise BackboneError(
            f"readout={readout!r} needs a checkpoint with a language-model head, but "
            f"that of {name!r} lacks {', '.join(sorted(info['missing_keys'])[:3])}. "
            "Use --readout head."
        )
    return module


def with_head(
    path: str,
    name: str,
    labels: int,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model with a classification head.

    Args:
        path: Hub id or local folder.
        name: Name of the model in errors.
        labels: Number of outputs.
        options: Arguments from `weight_options`.

    Returns:
        The model, and the names of its newly initialised parameters.
    """
    module: Any
    module, info = load_pretrained(
        AutoModelForSequenceClassification,
        path,
        name,
        num_labels=labels,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    missing = {str(key) for key in info["missing_keys"]}
    missing |= {str(key[0]) for key in info["mismatched_keys"]}
    head = Architecture(module).head
    outside = missing - set(head)
    _refuse_missing(outside, name, module)
    return module, [*sorted(outside), *(key for key in head if key in missing)]


def is_mean_pooled(path: str) -> bool:
    """Return whether a local checkpoint is a sentence encoder with mean pooling.

    Args:
        path: Folder of the checkpoint, or a Hub id.
    """
    file = Path(path) / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    return bool(json.loads(file.read_text()).get("pooling_mode_mean_tokens"))


def with_mean_head(
    path: str, name: str, labels: int, options: Mapping[str, Any]
) -> tuple[MeanPooled, list[str]]:
    """Load a sentence encoder with mean pooling and a new head.

    Args:
        path: Hub id or local folder.
        name: Name of the model in errors.
        labels: Number of outputs.
        options: Arguments from `weight_options`.

    Returns:
        The model, and the names of its head's parameters.
    """
    body, info = load_pretrained(
        AutoModel, path, name, output_loading_info=True, **options
    )
    _refuse_missing(info["missing_keys"], name, body)
    if hasattr(body, "pooler"):
        # Nothing reads the pooled first token, so its layer would have no gradient.
        body.pooler = None
    module = MeanPooled(body, labels)
    module.classifier.to(options["dtype"])
    return module, ["classifier.weight", "classifier.bias"]


def _refuse_missing(missing: Iterable[Any], name: str, module: nn.Module) -> None:
    """Refuse a checkpoint that lacks weights of the body, other than a pooler's."""
    lacking = sorted(key for key in map(str, missing) if "pooler" not in key)
    if lacking:
        raise BackboneError(
            f"the checkpoint of {name!r} lacks {len(lacking)} weights of the body, "
            f"such as {lacking[0]!r}, so it is no pretrained {type(module).__name__}."
        )
