"""Weights that a count does not fit, and weights that cannot be adapted at all."""

import warnings

import pytest
import transformers as tf
from adapted import bert, layers
from peft import get_peft_model
from torch import nn

from rocoft import RoCoFTConfig, parameter_count
from rocoft.models.architecture import Architecture, SelectionError


def classifier(labels, **options):
    config = tf.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=labels,
        **options,
    )
    return tf.BertForSequenceClassification(config)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("selection", ["first", "last", "random", "max", "mixed"])
def test_a_narrow_head_has_all_its_rows_trained(labels, selection):
    config = RoCoFTConfig.paper(r=3, selection=selection)
    with pytest.warns(
        UserWarning, match=f"1 of 14 .* than 3, .*'classifier' with {labels}"
    ):
        model = get_peft_model(classifier(labels), config)
    rows = {name: layer.rocoft_rows.default for name, layer in layers(model).items()}
    assert rows.pop("classifier").shape == (labels, 16)
    assert len(rows) == 13
    assert all(len(row) == 3 for row in rows.values())


def test_narrow_inputs_and_fused_parts_have_all_theirs_trained():
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8))
    config = RoCoFTConfig(r=3, axis="column", target_modules="every-linear")
    with pytest.warns(UserWarning, match="fewer columns than 3, such as '0' with 1"):
        assert parameter_count(config, model) == {"0": 8, "1": 24}


def test_a_narrow_pattern_is_clipped_like_r():
    config = RoCoFTConfig(r=2, rank_pattern={"query": 17})
    with pytest.warns(UserWarning, match="2 of 12 .* than 17"):
        counts = parameter_count(config, bert())
    assert {n: k for n, k in counts.items() if n.endswith("query")} == {
        f"bert.encoder.layer.{i}.attention.self.query": 16 * 16 for i in (0, 1)
    }


def test_a_count_that_no_weight_has_is_refused():
    with pytest.raises(SelectionError, match="rows=9 .* from 1 to 8"):
        parameter_count(
            RoCoFTConfig(r=9, target_modules="every-linear"),
            nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 8)),
        )


def experts(kind, **options):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    config = getattr(tf, f"{kind}Config")(**sizes, **options)
    return getattr(tf, f"{kind}ForCausalLM")(config)


MIXTURES = [
    lambda: experts("Mixtral", num_local_experts=4),
    lambda: experts(
        "Qwen2Moe",
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    ),
    lambda: experts("GptOss", num_local_experts=4, head_dim=8),
]


@pytest.mark.parametrize("build", MIXTURES)
@pytest.mark.parametrize("targets", [None, "every-linear", "all-linear"])
def test_fused_experts_are_left_out_with_their_share(build, targets):
    model = build()
    inside = {n: p for n, p in model.named_parameters() if ".layers." in n}
    matrices = {n: p.numel() for n, p in inside.items() if p.ndim > 1}
    linear = {
        f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)
    }
    left = sum(k for n, k in matrices.items() if n not in linear)
    share = f"{100 * left / sum(matrices.values()):.0f} % of the numbers"
    with pytest.warns(UserWarning, match=rf"{share}.*experts.*target_parameters"):
        get_peft_model(model, RoCoFTConfig(r=2, target_modules=targets))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"]])
def test_modules_of_the_users_choice_are_taken_without_a_word(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(MIXTURES[0](), RoCoFTConfig(r=2, target_modules=targets))


def test_models_of_linear_layers_leave_nothing_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(bert(), RoCoFTConfig(r=2))


def test_layers_whose_weight_is_read_past_them_are_said_to_be_left_out():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.ModuleDict({"blocks": nn.ModuleList([layer]), "head": nn.Linear(16, 2)})
    config = RoCoFTConfig(r=2)
    with (
        pytest.warns(UserWarning, match="100 % of the numbers"),
        pytest.raises(ValueError, match="match|target"),
    ):
        get_peft_model(model, config)


def test_recurrent_weights_in_blocks_are_said_to_be_left_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent, self.out = nn.GRU(8, 8), nn.Linear(8, 8)

    model = nn.ModuleList([Block(), Block()])
    assert sum(Architecture(model).matrices.values()) == 2 * (2 * 24 * 8 + 64)
    with pytest.warns(UserWarning, match="86 % .* 4 parameters such as '0.recurrent"):
        get_peft_model(model, RoCoFTConfig(r=2))
