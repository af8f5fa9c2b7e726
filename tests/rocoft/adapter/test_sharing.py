"""Adapters on weights and modules that have another use in the model."""

import peft
import pytest
import torch
import transformers as tf
from adapted import adapted, layers
from peft import PeftModel, get_peft_model
from torch import nn

from rocoft import RoCoFTConfig, export_lora
from rocoft.models.architecture import SelectionError
from rocoft.models.merging import MergeError, merged, shared_weights

IDS = torch.arange(12).view(2, 6)


def language_model(kind="Llama", **options):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.4,
    }
    torch.manual_seed(0)
    config = getattr(tf, f"{kind}Config")(**sizes, **options)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )


def tied_head():
    return language_model(tie_word_embeddings=True), "lm_head"


def tied_by_memory():
    model = language_model(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    return model, "lm_head"


def tied_to_a_part():
    model = language_model(tie_word_embeddings=False)
    whole = nn.Parameter(torch.randn(48, 16))
    model.model.embed_tokens.weight = nn.Parameter(whole[:40])
    model.lm_head.weight = nn.Parameter(whole[8:])
    model.lm_head.out_features = 40
    return model, "lm_head"


def two_layers_of_one_parameter():
    model = language_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    return model, "q_proj"


SHARED = [tied_head, tied_by_memory, tied_to_a_part, two_layers_of_one_parameter]


@pytest.mark.parametrize("build", SHARED)
def test_a_shared_weight_is_not_merged_and_nothing_changes(build):
    model, target = build()
    model = adapted(model, target_modules=[target, "v_proj"])
    before, outputs = values(model), model(IDS).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SelectionError, match=f"{target}.* is also that of 'model"):
            merge()
        assert same(model, before)
        assert torch.equal(model(IDS).logits, outputs)
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("build", SHARED)
@pytest.mark.parametrize("config", [RoCoFTConfig, peft.LoraConfig])
def test_plain_copies_compute_the_same_or_are_refused(build, config):
    model, target = build()
    model = get_peft_model(model, config(r=2, target_modules=[target])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    if build in (tied_by_memory, tied_to_a_part):
        # Copies of two parameters have memory of their own.
        plain = merged(model)
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
        return
    with pytest.raises(MergeError, match=f"{target}.* is also that of 'model"):
        merged(model)


def test_what_the_message_advises_works(tmp_path):
    model = adapted(tied_head()[0], **{"target_modules": "every-linear"})
    outputs = model(IDS).logits
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(tied_head()[0], tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, outputs, rtol=1e-5, atol=1e-5)
    without = adapted(
        tied_head()[0], target_modules="every-linear", exclude_modules=["lm_head"]
    )
    outputs = without(IDS).logits
    plain = without.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, outputs, rtol=1e-5, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_other_adapters_of_the_model_merge():
    model = adapted(tied_head()[0], target_modules=["lm_head"])
    model.add_adapter("second", RoCoFTConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second" in name:
                parameter.normal_()
    outputs = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=1e-5, atol=1e-5)


def test_weights_that_lie_side_by_side_in_one_memory_are_not_shared():
    model = language_model()
    attention = model.model.layers[0].self_attn
    whole = torch.randn(32, 16)
    attention.q_proj.weight = nn.Parameter(whole[:16])
    attention.v_proj.weight = nn.Parameter(whole[16:])
    model = adapted(model)
    assert shared_weights(model) == {}
    outputs = model(IDS).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, outputs, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer, layer])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_a_module_of_two_names_is_adapted_under_both(tmp_path):
    x = torch.randn(5, 8)
    plain = Twice()
    model = adapted(plain, target_modules=["layers.0"])
    outputs = model(x)
    # The twin: the rows themselves are other ones, in both uses.
    twin = Twice()
    with torch.no_grad():
        twin.layers[0].weight += layers(model)["layers.0"].get_delta_weight("default")
    torch.testing.assert_close(outputs, twin(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Twice(), tmp_path)
    assert torch.equal(loaded(x), outputs)
    with pytest.raises(SelectionError, match=r"layers\.0.*also registered as 'layers"):
        export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(merged(model)(x), outputs)
    unmerged = model.merge_and_unload()
    torch.testing.assert_close(unmerged(x), outputs)
    assert unmerged.layers[0] is unmerged.layers[1]
    assert type(unmerged.layers[0]) is nn.Linear


def test_a_peft_layer_on_one_name_of_two_is_not_merged():
    model = get_peft_model(Twice(), peft.LoraConfig(target_modules=["layers.0"]))
    with pytest.raises(MergeError, match=r"layers\.0.*also that of 'layers\.1'"):
        merged(model)
