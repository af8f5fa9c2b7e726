"""What loading does not do: run code that comes with a model, or ask whether to."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
from checkpoints import checkpoint, reviews

from rocoft.models.backbone import load_backbone
from rocoft.models.pretrained import BackboneError
from rocoft.training.language import load_language_model

RUNS = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers import BertTokenizer
class OurConfig(BertConfig):
    model_type = {kind!r}
class OurModel(BertForSequenceClassification):
    config_class = OurConfig
class OurTokenizer(BertTokenizer):
    pass
"""
CLASSES = (
    *("AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"),
    "AutoModelForCausalLM",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model with code of its own, and a user who would say yes."""
    path = Path(checkpoint(tmp_path / "model")[0])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return path


def with_code(folder, ran, *, config=None, tokenizer=None):
    """Put code into a model's folder that its configuration or tokenizer names."""
    kind = (config or {}).get("model_type", "bert")
    (folder / "ours.py").write_text(RUNS.format(ran=str(ran), kind=kind))
    for name, more in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer),
    ):
        if more is not None:
            file = folder / name
            known = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(known | more))


MODEL = {"AutoConfig": "ours.OurConfig", **dict.fromkeys(CLASSES, "ours.OurModel")}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["ours.OurTokenizer", "ours.OurTokenizer"]}}


@pytest.mark.parametrize(
    "more",
    [
        {"config": {"auto_map": MODEL, "model_type": "ours"}},
        {"config": {"auto_map": MODEL}},
        {"tokenizer": TOKENIZER},
        {"tokenizer": TOKENIZER | {"tokenizer_class": "OurTokenizer"}},
        {"config": {"auto_map": MODEL, "model_type": "ours"}, "tokenizer": TOKENIZER},
    ],
)
@pytest.mark.parametrize("load", ["backbone", "language"])
def test_no_code_of_a_model_is_run_and_nobody_is_asked(
    folder, tmp_path, capsys, more, load
):
    with_code(folder, tmp_path / "ran", **more)
    # What transformers knows by itself is loaded as that, the rest is refused.
    with contextlib.suppress(BackboneError):
        if load == "backbone":
            load_backbone(str(folder), reviews())
        else:
            load_language_model(str(folder))
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


def test_a_model_that_needs_its_code_is_refused_by_name(folder, tmp_path):
    with_code(folder, tmp_path / "ran", config={"auto_map": MODEL, "model_type": "our"})
    with pytest.raises(BackboneError, match="needs code of its own") as refused:
        load_backbone(str(folder), reviews())
    assert repr(str(folder)) in str(refused.value)
    assert "trust_remote_code" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
