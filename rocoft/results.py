"""What a training leaves on disk: the adapter or model, predictions and the record.

Each file or folder is written beside its place and then renamed, ``results.json`` last:
where that is, the rest is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rocoft.files import replacing, write_text
from rocoft.methods import Method
from rocoft.pretrained import EMBEDDED_NAME
from rocoft.readouts import LabelWords, MeanPooled, Prompted
from rocoft.trainer import FineTuned

RECORD = "results.json"

_MEAN_POOLED = """\
from rocoft.readouts import MeanPooled
from transformers import AutoModel

body = AutoModel.from_pretrained({base})
body.pooler = None
model = MeanPooled(body, {labels})
"""
_CLASSIFIER = """\
from transformers import {kind}

model = {kind}.from_pretrained({base}, num_labels={labels})
"""
_OTHER = """\
from transformers import {kind}

model = {kind}.from_pretrained({base})
"""
_ADAPTER = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, "this folder")
"""
_HEAD = """
from safetensors.torch import load_file

model.classifier.load_state_dict(load_file("this folder/classifier.safetensors"))
"""


def write_results(
    folder: Path,
    tuned: FineTuned,
    tokenizer: PreTrainedTokenizerBase,
    record: Mapping[str, Any],
) -> None:
    """Write everything of one training.

    ``adapter`` or ``model`` is a folder with a model card, ``predictions.safetensors``
    holds the test examples' ``logits`` and ``labels``.

    Args:
        folder: Where to; it exists.
        tuned: The fine-tuned model.
        tokenizer: Of the model.
        record: For ``results.json``: the training's own record and more.
    """
    model, method = tuned.model, tuned.method
    place = folder / ("adapter" if method.adapter else "model")
    part = folder / f".{place.name}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _save_model(model, part, str(record["model"]))
    tokenizer.save_pretrained(part)
    _write_card(model, method, part, record)
    for file in part.iterdir():
        if file.is_file():
            # safetensors writes files that no one else can read.
            shutil.copymode(part / "README.md", file)
    shutil.rmtree(place, ignore_errors=True)
    part.replace(place)
    found = {"logits": tuned.logits.contiguous(), "labels": tuned.labels.contiguous()}
    with replacing(folder / "predictions.safetensors") as part:
        save_file(found, part)
        shutil.copymode(place / "README.md", part)
    text = json.dumps(record, indent=1, default=str, allow_nan=False)
    write_text(folder / RECORD, text + "\n")


def _save_model(model: nn.Module, folder: Path, name: str) -> None:
    inner = model.model if isinstance(model, Prompted) else model
    if isinstance(inner, PeftModel):
        config = inner.peft_config["default"]
        if config.base_model_name_or_path is None:
            # peft asks models that are no transformers' for no name.
            config.base_model_name_or_path = name
        inner.save_pretrained(str(folder), save_embedding_layers=False)
    elif isinstance(inner, MeanPooled):
        inner.body.save_pretrained(folder)
        (folder / "1_Pooling").mkdir()
        pooling = {
            "word_embedding_dimension": inner.body.config.hidden_size,
            "pooling_mode_mean_tokens": True,
        }
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        save_file(inner.classifier.state_dict(), folder / "classifier.safetensors")
    elif isinstance(inner, PreTrainedModel):
        output = inner.get_output_embeddings()
        if isinstance(output, LabelWords):
            inner.set_output_embeddings(_whole(output))
        try:
            inner.save_pretrained(folder)
        finally:
            if isinstance(output, LabelWords):
                inner.set_output_embeddings(output)
    else:
        save_file(inner.state_dict(), folder / "model.safetensors")


def _whole(words: LabelWords) -> nn.Linear:
    """Return the output layer that label words were taken of; parameters are shared."""
    outputs, inputs = words.weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=words.bias is not None)
    layer.register_parameter("weight", words.weight)
    layer.register_parameter("bias", words.bias)
    return layer


def _write_card(
    model: nn.Module, method: Method, folder: Path, record: Mapping[str, Any]
) -> None:
    """Write a card that says what this is, how good it is, and how to load it."""
    kinds = {"causal": "text-generation", "seq2seq": "text2text-generation"}
    classes = bool(record["labels"])
    kind = "text-classification" if classes else kinds[record["readout"]]
    on_hub = "/" in str(record["model"]) and not Path(str(record["model"])).exists()
    data = ModelCardData(
        base_model=record["model"] if on_hub else None,
        library_name="peft" if method.adapter else "transformers",
        tags=["rocoft"] if method.kind == "rocoft" else None,
        model_name=folder.parent.name,
        eval_results=[
            EvalResult(kind, record["task"], record["task"], k, v)
            for k, v in record["test"].items()
        ],
    )
    counts = record["parameters"]
    scores = ", ".join(f"{k} {v:.4f}" for k, v in record["test"].items())
    text = (
        f"# {record['model']}, {method!s}, {record['task']}\n\n"
        f"Fine-tuned by `python -m rocoft.train`: method `{method!s}`, "
        f"{counts['trainable']:,} trained parameters ({counts['without_head']:,} "
        f"without the head), learning rate {record['learning_rate']}, chosen on "
        f"{record['examples']['dev']} dev examples, seed {record['seed']}.\n\n"
        f"Test ({record['examples']['test']} examples): {scores}.\n\n"
        f"## How to load it\n\n```python\n{_loading(model, method, record)}\n```\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _loading(model: nn.Module, method: Method, record: Mapping[str, Any]) -> str:
    """Return the Python that loads what was saved."""
    inner: Any = model.model if isinstance(model, Prompted) else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    kind = type(inner).__name__
    base, first = repr("this folder"), ""
    if method.adapter:
        base = repr(str(record["model"]))
        first = "import rocoft  # peft learns of RoCoFT by this\n"
        first *= method.kind == "rocoft"
        if record["model"] == EMBEDDED_NAME:
            base = "embedded_folder()"
            first += "from rocoft.pretrained import embedded_folder\n"
    mean_pooled = isinstance(inner, MeanPooled)
    text = _CLASSIFIER if kind.endswith("ForSequenceClassification") else _OTHER
    text = _MEAN_POOLED if mean_pooled else text
    text = first + text.format(base=base, kind=kind, labels=len(record["labels"]))
    last = _HEAD if mean_pooled else ""
    return (text + (_ADAPTER if method.adapter else last)).rstrip()
