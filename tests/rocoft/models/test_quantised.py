"""Kernels of models whose weights bitsandbytes has quantised."""

import copy
import importlib.util
import json
from functools import partial

import pytest
import torch
import transformers as tf
from checkpoints import QUANTISED
from commands import exit_code
from dense import assert_close

from ntk import compare
from ntk.gradients.function import FunctionError
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.scale.cache import content_key
from ntk.scale.work import Work
from ntk.spaces.kinds import Columns, Full, LoRA, Rows
from ntk.spaces.resolution import resolve
from rocoft import dequantised_on_use
from rocoft.models import pretrained
from rocoft.models.on_use import base_weight
from rocoft.models.quantised import QuantisedLinear

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed",
)

SPACES = {
    "full": Full(),
    "rows": Rows(3),
    "large": Rows(2, strategy="max") + Columns(2, strategy="max"),
    "lora": LoRA(4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny classifier."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        num_labels=3,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("quantised")
    tf.LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def load(folder, kind):
    return tf.AutoModelForSequenceClassification.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=tf.BitsAndBytesConfig(**QUANTISED[kind]),
    ).eval()


def dequantised(folder, kind):
    """Return the same weights as an ordinary model."""
    quantised = load(folder, kind)
    plain = tf.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            other = quantised.get_submodule(name)
            module.weight.data = base_weight(other, quantised).float()
    return plain


def inputs(n=5):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 60, (n, 7), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("kind", QUANTISED)
def test_kernels_are_those_of_the_dequantised_model(folder, kind):
    model = dequantised_on_use(load(folder, kind))
    plain = dequantised(folder, kind)
    assert sum(isinstance(m, QuantisedLinear) for m in model.modules()) == 14
    assert_close(model(**inputs()).logits, plain(**inputs()).logits, 1e-5)
    expected = empirical_ntk(plain, inputs(), space=SPACES)
    found = compute(model, inputs(), spaces=SPACES)
    assert {s.value for s in found.services.values()} == {"batch"}
    for name in SPACES:
        assert_close(found.kernels[name], expected[name], 1e-5, of=name)


@pytest.mark.parametrize("implementation", ["jacobian", "jvp"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_the_definition(folder, kind, implementation):
    model = dequantised_on_use(load(folder, kind))
    spaces = {"rows": Rows(2), "lora": LoRA(2)}
    found = empirical_ntk(model, inputs(3), space=spaces)
    expected = empirical_ntk(
        model, inputs(3), space=spaces, implementation=implementation
    )
    for name in spaces:
        assert_close(found[name], expected[name], 1e-4, of=name)


@pytest.mark.parametrize("kind", QUANTISED)
def test_offsets_take_no_memory(folder, kind):
    model = dequantised_on_use(load(folder, kind))
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            assert module.weight.untyped_storage().nbytes() == 4
            assert module.weight.shape == (module.out_features, module.in_features)


def test_selections_are_those_of_the_values(folder):
    spaces = {"max": Rows(2, strategy="max"), "mixed": Columns(2, strategy="mixed")}
    model, plain = dequantised_on_use(load(folder, "nf4")), dequantised(folder, "nf4")
    assert resolve(spaces, model) == resolve(spaces, plain)


def test_kernels_are_kept_by_the_values(folder):
    def key(model):
        return content_key(Work(model, [inputs()], 1, {"": Full()}))

    model = load(folder, "nf4")
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight.quant_state.absmax *= 2
    assert key(dequantised_on_use(model)) != key(dequantised_on_use(other))
    again = dequantised_on_use(load(folder, "nf4"))
    assert key(dequantised_on_use(load(folder, "nf4"))) == key(again)


def test_the_error_says_how(folder):
    with pytest.raises(FunctionError, match="dequantised_on_use"):
        empirical_ntk(load(folder, "nf4"), inputs())


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_the_command(tmp_path, capsys, bits):
    run = partial(exit_code, compare.main)
    size = ["--shots", "2", "--test-size", "2", "--rows", "1", "--max-length", "16"]
    output = ["--load-in", bits, "--output", tmp_path, "--name", "run"]
    assert run(*size, *output) == 0
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    assert record["model"]["parameters"] > 2e7
    errors = [s["certificate"]["relative_error"] for s in record["spaces"]]
    assert max(errors) < 1e-4


def test_a_missing_library(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(pretrained.BackboneError, match="pip install bitsandbytes"):
        pretrained.weight_options(torch.float32, "4bit", "cpu")
