"""Methods as text, and exactly what each makes trainable."""

import copy
import re

import pytest
import torch
import transformers as tf
from cases import BY_NAME, SHORT, sizes
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from rocoft.models.architecture import Architecture, SelectionError
from rocoft.models.merging import merged as plain_copy
from rocoft.models.readouts import MeanPooled, Prompted
from rocoft.training.methods import (
    LEARNING_RATES,
    Method,
    apply_method,
    left_out,
    parse_method,
    trained_parameters,
)

names = st.text("abcxyz_.*?0189", min_size=1, max_size=10)
where = {
    "patterns": st.lists(names, max_size=3).map(tuple),
    "blocks": st.lists(st.integers(-12, 30), max_size=3).map(tuple),
}
counts = st.integers(1, 4096)
how = {
    "slices": st.sampled_from(["row", "column", "both", "auto"]),
    "seed": st.integers(-5, 10**6),
}
rocoft = st.builds(
    Method,
    st.just("rocoft"),
    counts,
    strategy=st.sampled_from(["first", "random", "max", "activation"]),
    bias=st.booleans(),
    **how,
    **where,
)
masked = st.builds(
    Method,
    st.just("masked"),
    counts,
    strategy=st.sampled_from(["first", "random", "min"]),
    **how,
    **where,
)
low_rank = st.builds(
    Method,
    st.sampled_from(["lora", "dora"]),
    counts,
    alpha=st.none() | st.integers(1, 999).map(lambda n: n / 8) | st.just(1e6),
    **where,
)
plain = st.builds(Method, st.sampled_from(["full", "bitfit", "head", "probe"]))


@given(rocoft | masked | low_rank | plain)
def test_what_is_written_is_read_back(method):
    assert parse_method(str(method)) == method


def test_every_kind_has_learning_rates():
    assert all(
        len(LEARNING_RATES[kind]) == 3 for kind in LEARNING_RATES if kind != "probe"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row:3", "'row' is none of rows, columns, auto, lora"),
        ("rows", "number cannot be ''"),
        ("rows:0", "rows:0 needs a count of at least 1"),
        ("full:3", "'full' takes no number"),
        ("lora:8/strategy=max", "option 'strategy=max' is none of layers=..., alpha="),
        ("rows:3/alpha=2", "option 'alpha=2' is none of layers="),
        ("rows:3/strategy=best", "strategy='best' is unknown"),
        ("rows:3+columns:2", "is no sum that can be trained"),
        ("rows:3+lora:8", "is no sum that can be trained"),
        ("lora:8+bias", r"only rows and columns can be masked or take \+bias"),
        ("masked full", "only rows and columns can be masked"),
        ("masked rows:3+bias", "is no masked reference"),
        ("rows:3/layers=x", "layers cannot be 'x'"),
    ],
)
def test_what_has_no_meaning_is_refused(text, message):
    with pytest.raises(SelectionError, match=message):
        parse_method(text)


@pytest.fixture(scope="module")
def classifier():
    return BY_NAME["bert"].build()


def count(module):
    return sum(p.numel() for p in trained_parameters(module).values())


def applied(module, text, **options):
    options = {"train_head": True, **options}
    return apply_method(copy.deepcopy(module), parse_method(text), **options)


BODY = ("query", "key", "value", "attention.output.dense", "intermediate", "output")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # A weight of the blocks is 16 x 16, 24 x 16 or 16 x 24; there are two blocks.
        ("rows:3", 2 * 3 * (5 * 16 + 24)),
        ("columns:3", 2 * 3 * (5 * 16 + 24)),
        ("auto:3", 2 * 3 * 6 * 16),
        ("rows:1+columns:1", 2 * (4 * 31 + 39 + 39)),
        ("rows:3@query,value", 2 * 2 * 3 * 16),
        ("rows:3@query/layers=-1", 3 * 16),
        ("lora:2", 2 * 2 * (4 * 32 + 40 + 40)),
        ("dora:2", 2 * 2 * (4 * 32 + 40 + 40) + 2 * (5 * 16 + 24)),
        ("masked rows:3", 2 * (4 * 256 + 2 * 384)),
    ],
)
def test_counts_by_hand(classifier, text, expected):
    head = sum(
        classifier.get_parameter(n).numel() for n in Architecture(classifier).head
    )
    assert count(applied(classifier, text)) - head == expected


@pytest.mark.parametrize("text", ["rows:2+bias", "bitfit"])
def test_all_biases(classifier, text):
    found = trained_parameters(applied(classifier, text))
    names = {
        n.removeprefix("base_model.model.").replace("base_layer.", "") for n in found
    }
    missing = set(Architecture(classifier).biases) - {
        n.replace("modules_to_save.default.", "") for n in names
    }
    assert missing == set()


def test_head_and_full(classifier):
    assert (
        list(trained_parameters(applied(classifier, "head")))
        == Architecture(classifier).head
    )
    everything = dict(classifier.named_parameters())
    assert trained_parameters(applied(classifier, "full")).keys() == everything.keys()


@pytest.mark.parametrize("text", ["rows:2", "columns:1", "rows:1+columns:2", "auto:2"])
@pytest.mark.parametrize("strategy", ["first", "random", "max"])
def test_masks_are_of_the_selection(classifier, text, strategy):
    if text == "rows:1+columns:2":
        text = "rows:2+columns:2"
    spec = "+".join(f"{t}/strategy={strategy}/seed=3" for t in text.split("+"))
    masked = applied(classifier, f"masked {spec}")
    model = applied(classifier, spec)
    batch = BY_NAME["bert"].inputs()
    for module in (masked, model):
        module(**batch).logits.square().sum().backward()
    trained = {
        name.removeprefix("base_model.model.").rpartition(".rocoft_")[0]: None
        for name in trained_parameters(model)
        if ".rocoft_" in name
    }
    assert trained
    with torch.no_grad():
        for name in trained:
            module = model.get_submodule(f"base_model.model.{name}")
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad)
            delta = module.get_delta_weight("default")
            gradient = masked.get_submodule(name).weight.grad
            torch.testing.assert_close(delta, gradient, rtol=1e-12, atol=1e-14)


def test_a_language_model_is_wrapped_inside_its_readout():
    model = BY_NAME["llama-lm"].build()
    module = applied(Prompted(model), "rows:2", train_head=False)
    assert type(module) is Prompted
    assert isinstance(module.model, PeftModel)
    assert module.model.peft_config["default"].task_type == "CAUSAL_LM"
    assert all("lm_head" not in name for name in trained_parameters(module))


def test_a_head_outside_of_the_transformer_is_saved_with_the_adapter():
    body = tf.AutoModel.from_config(BY_NAME["bert"].build().config)
    module = applied(MeanPooled(body, 2), "lora:2")
    assert module.peft_config["default"].modules_to_save == ["classifier"]
    assert any("classifier" in name for name in trained_parameters(module))


@pytest.mark.parametrize(
    "family", ["gpt2", "bloom", "deberta-v2", "t5-generation", "llama"]
)
@pytest.mark.parametrize("text", ["rows:1", "columns:1", "lora:1"])
def test_adapters_take_the_default_targets_of_every_family(family, text):
    if family not in BY_NAME:
        pytest.skip(f"there is no case {family}")
    module = BY_NAME[family].build()
    expected = {w.module for w in Architecture(module).targets.values()}
    model = applied(module, text, train_head=False)
    kind = ("rocoft_", "lora_A")[text.startswith("lora")]
    found = {
        name.removeprefix("base_model.model.").partition(f".{kind}")[0]
        for name in trained_parameters(model)
        if f".{kind}" in name
    }
    assert found == expected


def test_refused(classifier):
    with pytest.raises(
        SelectionError, match="layers 2 do not exist: .* 2 blocks, 0 to 1"
    ):
        applied(classifier, "rows:1/layers=2")
    with pytest.raises(SelectionError, match="module pattern 'quary' matches none"):
        applied(classifier, "lora:1@quary")
    llama = BY_NAME["llama"].build()
    with pytest.raises(SelectionError, match="bitfit trains nothing of Llama"):
        applied(llama, "bitfit", train_head=False)


def test_a_probe_trains_the_last_layer_of_a_deep_head():
    config = tf.RobertaConfig(**sizes(SHORT), num_labels=2)
    module = tf.RobertaForSequenceClassification(config)
    # The head is two layers, dense and out_proj.
    found = trained_parameters(applied(module, "probe"))
    assert set(found) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert len(trained_parameters(applied(module, "head"))) == 4


# Weights that a count does not fit, and weights that no method of linear layers holds.


def test_narrow_weights_are_taken_whole_by_rocoft_and_its_reference():
    def two():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6), nn.Linear(6, 3))

    start = two()
    for text in ("rows:3", "columns:3", "rows:3+columns:3", "rows:3/strategy=random"):
        moved = []
        for prefix in ("", "masked "):
            with pytest.warns(UserWarning, match="of 2 targeted weights have fewer"):
                model = apply_method(
                    two(), parse_method(prefix + text), train_head=False
                )
            parameters = list(trained_parameters(model).values())
            model(torch.ones(1, 6)).sum().backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter -= 0.1 * parameter.grad
            moved.append([p for p in plain_copy(model).parameters() if p.ndim == 2])
        for mine, reference, before in zip(
            *moved, (p for p in start.parameters() if p.ndim == 2), strict=True
        ):
            torch.testing.assert_close(mine, reference)
            assert mine.shape == before.shape


@pytest.mark.parametrize("text", ["rows:9", "masked rows:9"])
def test_a_count_that_no_weight_has_is_refused(text):
    with pytest.raises(SelectionError, match="rows=9 cannot .* from 1 to 6"):
        apply_method(
            nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 3)),
            parse_method(text),
            train_head=False,
        )


@pytest.mark.parametrize("text", ["rows:2", "auto:1", "lora:2", "masked rows:2"])
def test_methods_of_linear_layers_say_which_share_they_leave_out(text):
    config = tf.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=4,
    )
    model, method = tf.MixtralForCausalLM(config), parse_method(text)
    # By hand: q, k, v, o against three matrices of each expert and the router of four.
    linear, experts = 4 * 16 * 16, 4 * 3 * 16 * 24 + 4 * 16
    share = f"{100 * experts / (linear + experts):.0f} % of the numbers"
    (said,) = left_out(model, method)
    assert said.startswith(share)
    assert re.search(r"6 parameters such as '.*experts\..*', \(4, ", said)
    with pytest.warns(UserWarning, match=share):
        apply_method(model, method, train_head=False)
    assert left_out(model, parse_method("full")) == []
    assert left_out(model, parse_method("rows:2@q_proj")) == []
