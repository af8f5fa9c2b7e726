"""RoCoFT on weights that bitsandbytes has quantised: training, reloading, merging."""

import importlib.util

import pytest
import torch
import transformers as tf
from checkpoints import QUANTISED
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from rocoft import (
    RoCoFTConfig,
    SelectionError,
    calibrated,
    export_lora,
    parameter_count,
)
from rocoft.adapter.layer import RoCoFTLinear
from rocoft.models.architecture import Architecture
from rocoft.models.selection import select

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a tiny language model whose heads share keys."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("quantised")
    model.save_pretrained(path)
    return path


def load(folder, kind=None):
    options = {}
    if kind is not None:
        options["quantization_config"] = tf.BitsAndBytesConfig(**QUANTISED[kind])
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", **options
    ).eval()


def tokens():
    return torch.randint(4, 60, (4, 7), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def trained(folder, kind, **options):
    base = prepare_model_for_kbit_training(load(folder, kind))
    options = {"r": 3, "selection": "random", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(base, RoCoFTConfig(**options))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, RoCoFTLinear)]


@pytest.mark.parametrize("axis", ["row", "column", "both"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_trains_and_reloads(folder, kind, axis, tmp_path):
    model = trained(folder, kind, axis=axis)
    expected = logits(model)
    # Before saving, for which bitsandbytes packs 4-bit weights anew on some machines.
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(folder, kind)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("kind", QUANTISED)
def test_counts_and_selections_are_those_of_the_plain_model(folder, kind):
    plain, quantised = load(folder), load(folder, kind)
    for options in ({}, {"axis": "column"}, {"axis": "both", "fraction": 0.1}):
        config = RoCoFTConfig(selection="random", **options)
        assert parameter_count(config, quantised) == parameter_count(config, plain)
        indices = [
            [
                (layer.tensors("default")["rocoft_row_indices"].tolist())
                for layer in layers(get_peft_model(load(folder, k), config))
                if "rocoft_row_indices" in layer.tensors("default")
            ]
            for k in (None, kind)
        ]
        assert indices[0] == indices[1]


@pytest.mark.parametrize("kind", QUANTISED)
def test_norms_are_those_of_the_dequantised_weight(folder, kind):
    model = get_peft_model(load(folder, kind), RoCoFTConfig(selection="max"))
    plain = Architecture(load(folder)).linear_weights
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, RoCoFTLinear):
            weight = plain[f"{name}.weight"]
            values = layer.get_base_weight().float()
            found = layer.rocoft_row_indices["default"].tolist()
            assert found == list(select(weight, values, "row", 3, "max"))


@pytest.mark.parametrize("axis", ["row", "both"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_merging_is_undone_bit_for_bit(folder, kind, axis):
    model = trained(folder, kind, axis=axis)
    expected, weights = logits(model), [x.get_base_weight() for x in layers(model)]
    deltas = [x.get_delta_weight("default") for x in layers(model)]
    for _ in range(2):
        model.merge_adapter()
        # Quantising again rounds: by far less than the adapter changes.
        for layer, weight, delta in zip(layers(model), weights, deltas, strict=True):
            error = (layer.get_base_weight() - weight - delta).norm()
            assert error < 0.5 * delta.norm()
        assert not torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", QUANTISED)
def test_export_and_calibration(folder, kind, tmp_path):
    model = trained(folder, kind, axis="both")
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    batches = [{"input_ids": tokens(), "labels": tokens()}]
    config = RoCoFTConfig(r=2, selection="activation")
    chosen = calibrated(config, load(folder, kind), batches)
    assert len(chosen.indices) == 14
    with pytest.raises(SelectionError, match="its weight is quantised"):
        calibrated(RoCoFTConfig(selection="gradient"), load(folder, kind), batches)
