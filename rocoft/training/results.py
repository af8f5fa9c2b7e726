"""Results of a training on disk: the adapter or model, predictions and the record.

Each file or folder is written under a temporary name and renamed, ``results.json``
last: if it exists, the rest is complete.
"""

import json
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

from rocoft.commands import (
    markdown,
    markdown_code,
    printable,
    replacing,
    replacing_folder,
    write_text,
)
from rocoft.models import MeanPooled, Prompted, SharedOutput, as_given
from rocoft.training.methods import Method
from rocoft.training.trainer import FineTuned

RECORD = "results.json"

_MEAN_POOLED = """\
from rocoft.models import MeanPooled
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
    """Write the model, the predictions and the record of one training.

    ``adapter`` or ``model`` is a folder with a model card, ``predictions.safetensors``
    holds the test examples' ``logits`` and ``labels``.

    Args:
        folder: An existing folder.
        tuned: The fine-tuned model.
        tokenizer: The model's tokenizer.
        record: The content of ``results.json``: `FineTuned.record` and more.
    """
    model, method = tuned.model, tuned.method
    model_folder = folder / ("adapter" if method.adapter else "model")
    with replacing_folder(model_folder) as part:
        _save_model(model, part, str(record["model"]))
        tokenizer.save_pretrained(part)
        _write_card(model, method, part, record, folder.name)
        for file in part.iterdir():
            if file.is_file():
                # safetensors writes files that only their owner can read.
                shutil.copymode(part / "README.md", file)
    tensors = {"logits": tuned.logits.contiguous(), "labels": tuned.labels.contiguous()}
    with replacing(folder / "predictions.safetensors") as file:
        save_file(tensors, file)
        shutil.copymode(model_folder / "README.md", file)
    text = json.dumps(record, indent=1, default=str, allow_nan=False)
    write_text(folder / RECORD, text + "\n")


def _save_model(model: nn.Module, folder: Path, name: str) -> None:
    inner = model.model if isinstance(model, Prompted) else model
    if isinstance(inner, PeftModel):
        config = inner.peft_config["default"]
        if config.base_model_name_or_path is None:
            # peft finds a name only in transformers' models.
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
        if isinstance(output, SharedOutput):
            inner.set_output_embeddings(_output_layer(output))
        try:
            inner.save_pretrained(folder)
        finally:
            if isinstance(output, SharedOutput):
                inner.set_output_embeddings(output)
    else:
        save_file(inner.state_dict(), folder / "model.safetensors")


def _output_layer(shared: SharedOutput) -> nn.Linear:
    """Return the original output layer; it shares the parameters."""
    outputs, inputs = shared.weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=shared.bias is not None)
    layer.register_parameter("weight", shared.weight)
    layer.register_parameter("bias", shared.bias)
    return layer


def _write_card(
    model: nn.Module,
    method: Method,
    folder: Path,
    record: Mapping[str, Any],
    name: str,
) -> None:
    """Write a model card: origin, test scores, and how to load the model.

    Names of models and tasks may hold Markdown, HTML and what closes a block of YAML.
    """
    kinds = {"causal": "text-generation", "seq2seq": "text2text-generation"}
    has_classes = bool(record["labels"])
    kind = "text-classification" if has_classes else kinds[record["readout"]]
    on_hub = "/" in str(record["model"]) and not Path(str(record["model"])).exists()
    task = printable(record["task"])
    data = ModelCardData(
        base_model=printable(record["model"]) if on_hub else None,
        library_name="peft" if method.adapter else "transformers",
        tags=["rocoft"] if method.kind == "rocoft" else None,
        model_name=printable(name),
        eval_results=[
            EvalResult(kind, task, task, k, v) for k, v in record["test"].items()
        ],
    )
    counts = record["parameters"]
    scores = ", ".join(f"{k} {v:.4f}" for k, v in record["test"].items())
    warned = "".join(f"Warning: {w}.\n\n" for w in record.get("warnings", ()))
    title = markdown(f"{record['model']}, {method!s}, {task}")
    text = (
        f"# {title}\n\n"
        f"Fine-tuned by `python -m rocoft.train`: method {markdown_code(str(method))}, "
        f"{counts['trainable']:,} trained parameters ({counts['without_head']:,} "
        f"without the head), learning rate {record['learning_rate']}, chosen on "
        f"{record['examples']['dev']} dev examples, seed {record['seed']}.\n\n"
        f"Test ({record['examples']['test']} examples): {scores}.\n\n{warned}"
        f"## How to load it\n\n```python\n{_loading(model, method, record)}\n```\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _loading(model: nn.Module, method: Method, record: Mapping[str, Any]) -> str:
    """Return Python code that loads the saved model."""
    inner: Any = model.model if isinstance(model, Prompted) else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    kind = type(inner).__name__
    base, imports, ending = repr("this folder"), "", ""
    if isinstance(inner, MeanPooled):
        template, ending = _MEAN_POOLED, _HEAD
    elif kind.endswith("ForSequenceClassification"):
        template = _CLASSIFIER
    else:
        template = _OTHER
    if method.adapter:
        given = as_given(str(record["model"]))
        base, ending = repr(given), _ADAPTER
        if method.kind == "rocoft":
            imports = "import rocoft  # registers RoCoFT with peft\n"
        if given != record["model"] or given.lower().endswith(".gguf"):
            # transformers alone knows neither embedded models nor where files are kept.
            base = f"locate({given!r}).path"
            imports += "from rocoft.models import locate\n"
    model_code = template.format(base=base, kind=kind, labels=len(record["labels"]))
    return (imports + model_code + ending).rstrip()
