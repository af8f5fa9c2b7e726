"""What is found in models, and fused layouts against the models' own splitting."""

import pytest
import torch
from cases import BY_NAME, DECODER, GPT2, NUMBERS, SHORT, SMALL, classifier
from torch import nn

from rocoft.models.architecture import Architecture, SelectionError, match

SIZE, HEADS, WIDTH = 16, 2, 8
FALCON = NUMBERS + SMALL.replace("num_attention_heads=2", "num_attention_heads=4")
FALCON_WIDTH = 4


def consecutive(sizes):
    def split(y):
        return y.split(sizes, dim=-1)

    return split


def by_head(y):
    """As GPT-NeoX, GPT-BigCode and DeBERTa split: each head holds q, k and v."""
    return [part.flatten(-2) for part in y.unflatten(-1, (HEADS, -1)).chunk(3, dim=-1)]


def attention_of(model, ending):
    return next(m for n, m in model.named_modules() if n.endswith(ending))


def own_split(ending, call):
    """Split by the model's own code; parts may come in any axis order."""

    def split(y, model):
        return [p.reshape(len(y), -1) for p in call(attention_of(model, ending), y)]

    return split


def falcon_split(attention, y):
    query, key, value = attention._split_heads(y[:, None, :])
    # Falcon repeats shared keys and values for every query; once is enough.
    groups = attention.num_kv_heads if attention.new_decoder_architecture else None
    groups = 1 if groups is None and attention.multi_query else groups
    if groups is not None and key.shape[2] > groups:
        repeats = key.shape[2] // groups
        key, value = key[:, :, ::repeats], value[:, :, ::repeats]
    return query, key, value


FUSED = {
    "gpt2": (
        classifier("GPT2", GPT2),
        "c_attn",
        lambda y, m: y.split(m.transformer.h[0].attn.split_size, dim=-1),
    ),
    "bloom": (
        classifier("Bloom", NUMBERS + "hidden_size=16 n_layer=1 n_head=2"),
        "query_key_value",
        own_split("self_attention", lambda a, y: a._reshape(y[:, None, :])),
    ),
    "gpt-neox": (
        classifier("GPTNeoX", SHORT),
        "query_key_value",
        lambda y, m: by_head(y),
    ),
    "gpt-bigcode": (
        classifier("GPTBigCode", GPT2, multi_query=False),
        "c_attn",
        lambda y, m: by_head(y),
    ),
    "gpt-bigcode multi-query": (
        classifier("GPTBigCode", GPT2, multi_query=True),
        "c_attn",
        lambda y, m: y.split([SIZE, WIDTH, WIDTH], dim=-1),
    ),
    "deberta": (
        classifier("Deberta", SHORT),
        "in_proj",
        lambda y, m: by_head(y),
    ),
    "modernbert": (
        BY_NAME["modernbert"].make,
        "Wqkv",
        lambda y, m: y.view(-1, 3, HEADS, WIDTH).flatten(-2).unbind(1),
    ),
    "phi3": (
        classifier("Phi3", DECODER),
        "qkv_proj",
        lambda y, m: y.split([SIZE, WIDTH, WIDTH], dim=-1),
    ),
    "falcon by head": (
        classifier("Falcon", FALCON, multi_query=False),
        "query_key_value",
        own_split("self_attention", falcon_split),
    ),
    "falcon multi-query": (
        classifier("Falcon", FALCON, multi_query=True),
        "query_key_value",
        own_split("self_attention", falcon_split),
    ),
    "falcon new decoder": (
        classifier("Falcon", FALCON + "num_kv_heads=2 ", new_decoder_architecture=True),
        "query_key_value",
        own_split("self_attention", falcon_split),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_parts_are_where_the_model_splits(name):
    """Basis vectors as the layer's output: which of them reach q, k and v?"""
    make, ending, split = FUSED[name]
    model = make()
    of = next(
        w
        for w in Architecture(model).linear_weights.values()
        if w.module.endswith(ending)
    )
    basis = torch.eye(of.outputs)
    expected = [
        {int(i) for i in part.abs().sum(1).nonzero()} for part in split(basis, model)
    ]
    assert [set(part) for part in of.parts] == expected
    assert sorted(i for part in of.parts for i in part) == list(range(of.outputs))


@pytest.mark.parametrize("name", FUSED)
def test_the_last_part_is_the_value(name):
    """Attention over a single token is its value, whatever query and key."""
    make, ending, _ = FUSED[name]
    model = make().eval()
    weights = Architecture(model).linear_weights.values()
    of = next(w for w in weights if w.module.endswith(ending))
    model(torch.tensor([[5]])).logits[0, 0].backward()
    gradient = model.get_parameter(of.name).grad
    by_row = gradient.abs().sum(1 - of.output_dim)
    by_row[by_row < 1e-6 * by_row.max()] = 0  # rounding of zeros
    assert set(by_row.nonzero().flatten().tolist()) == set(of.parts[2])


def test_multihead_attention_has_three_parts():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    of = Architecture(model).linear_weights["0.in_proj_weight"]
    assert of.parts == (range(4), range(4, 8), range(8, 12))


def test_adapters_do_not_hide_fused_parts():
    found = Architecture(BY_NAME["gpt2-lora"].build()).linear_weights
    weights = [w for w in found.values() if "c_attn" in w.name]
    assert weights
    assert all(len(w.parts) == 3 for w in weights)
    assert not any(".lora_" in name for name in found)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_outputs_and_inputs_follow_the_layer(name):
    model = BY_NAME[name].build()
    owners = dict(model.named_modules())
    found = Architecture(model).linear_weights
    assert found
    for of in found.values():
        layer = owners[of.module]
        inputs = torch.zeros(1, of.inputs, dtype=torch.float64)
        assert layer(inputs).shape == (1, of.outputs), of
        conv = type(layer).__name__ == "Conv1D"
        assert of.output_dim == int(conv), of


def test_targets_lie_in_the_blocks():
    known = Architecture(BY_NAME["bert"].build())
    assert len(known.targets) == 2 * 6
    assert all(".encoder.layer." in name for name in known.targets)
    assert known.head == ["classifier.weight", "classifier.bias"]
    known = Architecture(BY_NAME["mlp"].build())
    assert list(known.targets) == ["0.weight", "2.weight"]
    assert known.head == ["4.weight", "4.bias"]


def test_tied_parameters_belong_to_the_base_model():
    known = Architecture(BY_NAME["llama-lm"].build())
    assert known.head == []
    assert "model.embed_tokens.weight" in known.embeddings
    assert "lm_head.weight" not in known.parameters


def test_blocks_are_numbered():
    known = Architecture(BY_NAME["t5"].build())
    assert (
        known.block("transformer.encoder.block.1.layer.0.SelfAttention.q.weight") == 1
    )
    assert (
        known.block("transformer.decoder.block.0.layer.2.DenseReluDense.wi.weight") == 0
    )
    assert known.block("transformer.shared.weight") is None


def test_kinds_of_parameters():
    known = Architecture(BY_NAME["vit"].build())
    assert "vit.embeddings.cls_token" in known.embeddings
    assert "vit.embeddings.position_embeddings" in known.embeddings
    assert all("norm" in name for name in known.norms)
    assert len(known.norms) == 2 * (2 * 2 + 1)
    known = Architecture(BY_NAME["cnn"].build())
    assert known.norms == ["norm.weight", "norm.bias", "group.weight", "group.bias"]
    assert known.biases == [n for n in known.parameters if n.endswith("bias")]


NAMES = [
    "bert.layer.0.attention.query.weight",
    "bert.layer.0.attention.self.key.weight",
    "bert.layer.10.attention.query.weight",
    "head.queryless.weight",
]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["query"], [0, 2]),
        (["attention.self"], [1]),
        (["layer.0"], [0, 1]),
        (["layer.1*"], []),
        (["*.layer.1?.*"], [2]),
        (["head.queryless.weight"], [3]),
        (["key", "queryless"], [1, 3]),
        (["weight"], [0, 1, 2, 3]),
    ],
)
def test_patterns_match_whole_components_or_globs(patterns, expected):
    if not expected:
        with pytest.raises(SelectionError, match="matches none of the 4 parameters"):
            match(NAMES, patterns)
    else:
        assert match(NAMES, patterns) == [NAMES[i] for i in expected]


def test_a_pattern_that_matches_nothing_names_what_there_is():
    with pytest.raises(SelectionError, match=r"'quer'.*attention.*key.*query"):
        match(NAMES, ["query", "quer"])


class Renamed(nn.LayerNorm):
    """A normalisation layer whose class is named otherwise."""


class Scaled(Renamed):
    """A subclass of a subclass."""


class Experts(nn.Module):
    """Experts fused in parameters of three dimensions, as mixtures have them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(4, 6, 8))
        self.gate_up_proj_bias = nn.Parameter(torch.ones(4, 6))


def test_biases_norms_and_tables_of_every_kind():
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 4, bidirectional=True),
            "experts": Experts(),
            "norm": Scaled(4),
            "bag": nn.EmbeddingBag(5, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "batch": nn.SyncBatchNorm(4),
        }
    )
    model.relative_position_bias_table = nn.Parameter(torch.ones(3, 3))
    found = Architecture(model)
    biases = [n for n in found.biases if n.startswith(("lstm", "experts"))]
    assert biases == [
        *("lstm.bias_ih_l0", "lstm.bias_hh_l0"),
        *("lstm.bias_ih_l0_reverse", "lstm.bias_hh_l0_reverse"),
        "experts.gate_up_proj_bias",
    ]
    assert {"attention.bias_k", "attention.in_proj_bias"} <= set(found.biases)
    assert "relative_position_bias_table" not in found.biases
    assert found.norms == ["norm.weight", "norm.bias", "batch.weight", "batch.bias"]
    assert "bag.weight" in found.embeddings
