"""RoCoFT put into whole models by peft: outputs, biases, merging, several adapters."""

from copy import deepcopy

import peft
import pytest
import torch
from adapted import AXES, FAMILIES, adapted, bert, layers, named, read
from cases import BY_NAME, DECODER, of
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from rocoft import RoCoFTConfig, RoCoFTModel, SelectionError
from rocoft.adapter.config import ROCOFT, _peft_type
from rocoft.adapter.model import _register
from rocoft.models.architecture import Architecture


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_family_computes_with_the_dense_weights(name, axis):
    family = BY_NAME[name]
    inputs, outputs = family.inputs(), read(family)
    base = family.build()
    zero = adapted(family.build(), axis=axis, filled=False)
    expected = outputs(base(**inputs))
    torch.testing.assert_close(outputs(zero(**inputs)), expected, rtol=0, atol=1e-14)
    model = adapted(family.build(), axis=axis, selection="random")
    changed = outputs(model(**inputs))
    assert not torch.allclose(changed, expected)
    # The twin: a plain model whose weights are the sums.
    with torch.no_grad():
        for module, layer in layers(model).items():
            weight = base.get_submodule(module).weight
            weight += layer.get_delta_weight("default")
    torch.testing.assert_close(changed, outputs(base(**inputs)), rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model(**inputs)), expected)


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [("none", 0), ("all", 19), ("rocoft_only", 12)],
)
def test_biases(bias, wanted):
    model = adapted(bert(), bias=bias)
    trained = [n for n, p in named(model, "bias").items() if p.requires_grad]
    assert len(trained) == wanted
    read(BY_NAME["bert"])(model(**BY_NAME["bert"].inputs())).sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


def test_layers_whose_weight_is_read_past_them_are_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 2))
    for target in ("out_proj", "linear1", "self_attn"):
        with pytest.raises(SelectionError, match="cannot be targeted"):
            get_peft_model(model, RoCoFTConfig(target_modules=[target]))


def test_another_method_on_the_same_layer_is_refused():
    model = get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(SelectionError, match="another peft method"):
        get_peft_model(model.base_model.model, RoCoFTConfig(target_modules=["query"]))


def test_merging_and_unloading():
    family = BY_NAME["bert"]
    base, inputs = family.build(), family.inputs()
    expected = base(**inputs).logits
    model = adapted(family.build(), axis="both")
    changed = model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, changed, rtol=1e-9, atol=1e-9)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, changed)
    merged = deepcopy(model).merge_and_unload()
    assert type(merged) is type(base)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(merged(**inputs).logits, changed, rtol=1e-9, atol=1e-9)
    plain = model.unload()
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.parameters(), base.parameters(), strict=True)
    )


def test_merge_error_in_float32():
    family = BY_NAME["bert"]
    model = adapted(family.build().float(), axis="both", selection="random")
    expected = model(**family.inputs()).logits
    model.merge_adapter()
    error = (model(**family.inputs()).logits - expected).abs().max()
    assert error <= 1e-6


def test_overlap_is_refused_before_anything_is_merged():
    model = adapted(bert(), target_modules=["query", "value"])
    # The last layer alone would refuse.
    last = "bert.encoder.layer.1.attention.self.value"
    indices = {
        name: {"rows": [2, 3] if name != last else [1, 2]} for name in layers(model)
    }
    model.add_adapter("second", RoCoFTConfig(indices=indices))
    before = {n: p.clone() for n, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SelectionError, match=r"both train rows \[1\]"):
            merge(adapter_names=["default", "second"])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(layer.merged for layer in layers(model).values())


def test_several_adapters():
    family = BY_NAME["bert"]
    inputs = family.inputs()
    model = adapted(family.build(), axis="row")
    first = model(**inputs).logits
    # Other modules than the first's, and the same rows of some.
    options = {"axis": "column", "target_modules": ["query", "pooler.dense"]}
    model.add_adapter("second", RoCoFTConfig(r=1, **options))
    assert torch.equal(model(**inputs).logits, first)
    model.set_adapter("second")
    with torch.no_grad():
        for parameter in named(model, ".second").values():
            parameter.normal_()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.endswith(".second") for name in trained)
    second = model(**inputs).logits
    deltas = {
        name: {a: layer.get_delta_weight(a) for a in layer._get_available_adapters()}
        for name, layer in layers(model).items()
    }
    for active in (["default", "second"], ["second"], ["default"]):
        model.base_model.set_adapter(active)
        twin = family.build()
        with torch.no_grad():
            for name, found in deltas.items():
                for adapter in active:
                    twin.get_submodule(name).weight += found.get(adapter, 0)
        expected = twin(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
    model.set_adapter("second")
    names = ["default", "second", "__base__"]
    mixed = model(**inputs, adapter_names=names).logits
    base = family.build()(**inputs).logits
    expected = torch.stack([first[0], second[1], base[2]])
    torch.testing.assert_close(mixed, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"has \['third'\]"):
        model(**inputs, adapter_names=["third"] * 3)
    with pytest.raises(ValueError, match="has 2 names for 3 examples"):
        model(**inputs, adapter_names=["default"] * 2)
    with pytest.raises(ValueError, match="for inference"):
        model.train()(**inputs, adapter_names=names)
    model.eval().delete_adapter("default")
    assert torch.equal(model(**inputs).logits, second)
    assert not named(model, ".default")


def test_mixed_batches_generate_by_beam_search():
    for name, task, text in (
        ("Llama", "ForCausalLM", DECODER),
        (
            "T5",
            "ForConditionalGeneration",
            "vocab_size=60 d_model=16 d_kv=8 d_ff=24 "
            "num_layers=2 num_heads=2 decoder_start_token_id=0",
        ),
    ):
        torch.manual_seed(0)
        model = adapted(of(name, task, text)(), axis="both")
        model.add_adapter("second", RoCoFTConfig(r=3, axis="row"))
        with torch.no_grad():
            for parameter in named(model, ".second").values():
                parameter.normal_()
        tokens = torch.randint(4, 60, (2, 5))
        names = ["second", "default"]
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
        mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
        for i, adapter in enumerate(names):
            model.set_adapter(adapter)
            alone = model.generate(input_ids=tokens[i : i + 1], **options)
            assert torch.equal(mixed[i, : alone.shape[1]], alone[0])


def test_generation_with_a_cache_equals_that_without():
    torch.manual_seed(0)
    model = adapted(of("Llama", "ForCausalLM", DECODER)().eval(), axis="both")
    tokens = torch.randint(4, 60, (2, 5))
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(input_ids=tokens, use_cache=True, **options)
    assert torch.equal(
        cached, model.generate(input_ids=tokens, use_cache=False, **options)
    )


def test_peft_knows_the_method_once():
    assert list(PeftType).count("ROCOFT") == 1
    member = _peft_type()
    assert member is PeftType("ROCOFT") is PeftType["ROCOFT"] is ROCOFT
    assert isinstance(member, str)
    assert f"{member.value}{member.name}" == "ROCOFTROCOFT"
    _register()
    assert PEFT_TYPE_TO_TUNER_MAPPING["ROCOFT"] is RoCoFTModel


@pytest.mark.parametrize("family", ["roberta", "electra", "mpnet", "bart", "bert"])
def test_a_head_of_several_layers_is_unloaded_with_its_training(family):
    module, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    (head,) = {n.split(".")[0] for n in Architecture(module).head}
    model = adapted(module, r=2, task_type="SEQ_CLS", modules_to_save=[head]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    expected = model(**inputs).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, expected, rtol=1e-9, atol=1e-12)
    plain = BY_NAME[family].build()
    assert merged.state_dict().keys() == plain.state_dict().keys()
