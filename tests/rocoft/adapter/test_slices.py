"""What a RoCoFT configuration selects, counts, refuses and chooses by data."""

import pytest
import torch
import transformers as tf
from adapted import adapted, bert, layers, named
from cases import BY_NAME
from peft import get_peft_model
from torch import nn

from rocoft import RoCoFTConfig, SelectionError, calibrated, parameter_count
from rocoft.commands.choices import STRATEGIES
from rocoft.models.architecture import Architecture
from rocoft.models.selection import select


def on_meta(kind, **sizes):
    name, _, task = kind.partition("For")
    with torch.device("meta"):
        return getattr(tf, f"{name}For{task}")(getattr(tf, f"{name}Config")(**sizes))


ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


LLAMA_7B = {"vocab_size": 32000, "intermediate_size": 11008}


LLAMA_13B = {
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}


BLOOM_7B = {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}


# Of a block of Bloom, width d: q, k, v, output and up read d, down reads 4 d.
BLOOM_ROWS = 30 * 3 * (3 * 4096 + 4096 + 4096 + 4 * 4096)


BLOOM_COLUMNS = 30 * 3 * (3 * 4096 + 4096 + 4 * 4096 + 4096)


@pytest.mark.parametrize(
    ("kind", "sizes", "axis", "expected"),
    [
        ("RobertaForSequenceClassification", {}, "row", 248_832),
        ("RobertaForSequenceClassification", {}, "column", 248_832),
        ("RobertaForSequenceClassification", ROBERTA_LARGE, "row", 663_552),
        ("LlamaForCausalLM", LLAMA_7B, "row", 3_416_064),
        ("LlamaForCausalLM", LLAMA_7B, "column", 4_079_616),
        ("LlamaForCausalLM", LLAMA_13B, "row", 5_345_280),
        ("LlamaForCausalLM", LLAMA_13B, "column", 6_389_760),
        ("BloomForCausalLM", BLOOM_7B, "row", BLOOM_ROWS),
        ("BloomForCausalLM", BLOOM_7B, "column", BLOOM_COLUMNS),
    ],
)
@pytest.mark.parametrize("selection", ["first", "random"])
def test_parameters_of_published_models(kind, sizes, axis, expected, selection):
    model = on_meta(kind, **sizes)
    config = RoCoFTConfig(r=3, axis=axis, selection=selection)
    assert sum(parameter_count(config, model).values()) == expected
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == expected


def test_parameters_of_the_paper_preset():
    model = on_meta("LlamaForCausalLM", **LLAMA_7B)
    counts = parameter_count(RoCoFTConfig.paper(r=3), model)
    assert counts.pop("lm_head") == 12_288
    assert sum(counts.values()) == 3_416_064
    model = on_meta("RobertaForSequenceClassification")
    counts = parameter_count(RoCoFTConfig.paper(r=1), model)
    assert counts.pop("classifier.dense") + counts.pop("classifier.out_proj") == 1536
    # 82,944 rows and as many biases in the blocks, and LayerNorms' biases besides.
    assert sum(counts.values()) == 82_944
    trained = get_peft_model(model, RoCoFTConfig.paper(r=1))
    norms = sum(n.endswith("LayerNorm.bias") for n, _ in trained.named_parameters())
    total = trained.get_nb_trainable_parameters()[0]
    assert total == 2 * 82_944 + 1536 + 770 + 768 * norms


def test_counting_changes_nothing():
    model = BY_NAME["bert"].build()
    config = RoCoFTConfig(r=2, axis="both")
    before = [type(m) for m in model.modules()], config.to_dict()
    counts = parameter_count(config, model)
    assert ([type(m) for m in model.modules()], config.to_dict()) == before
    trainable = get_peft_model(model, config).get_nb_trainable_parameters()[0]
    assert sum(counts.values()) == trainable


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s[-1] not in "tn"])
@pytest.mark.parametrize("name", ["bert", "bloom", "gpt2", "llama"])
def test_indices_are_those_of_the_selection_module(name, strategy):
    model = BY_NAME[name].build()
    weights = Architecture(model).targets
    expected = {}
    for weight in weights.values():
        values = model.get_parameter(weight.name).detach()
        values = values if weight.output_dim == 0 else values.t()
        expected[weight.module] = [
            list(select(weight, values.float(), axis, 2, strategy, seed=7))
            for axis in ("row", "column")
        ]
    tuned = adapted(model, axis="both", selection=strategy, seed=7)
    found = {
        module: [
            layer.rocoft_row_indices["default"].tolist(),
            layer.rocoft_column_indices["default"].tolist(),
        ]
        for module, layer in layers(tuned).items()
    }
    assert found == expected


def test_fused_projections_train_rows_of_each_part():
    for name, module in (("gpt2", "c_attn"), ("bloom", "query_key_value")):
        model = adapted(BY_NAME[name].build(), r=3)
        layer = next(v for k, v in layers(model).items() if k.endswith(module))
        assert len(layer.rocoft_row_indices["default"]) == 9


def test_fraction_takes_a_share_of_each_part():
    config = tf.Phi3Config(
        **{
            "vocab_size": 60,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "pad_token_id": 0,
        }
    )
    model = tf.Phi3ForCausalLM(config)
    tuned = adapted(model, fraction=0.25, selection="random")
    layer = next(v for k, v in layers(tuned).items() if k.endswith("qkv_proj"))
    # 32 queries, 8 keys, 8 values.
    rows = layer.rocoft_row_indices["default"]
    parts = [int(((rows >= a) & (rows < b)).sum()) for a, b in ((0, 32), (32, 40))]
    assert [*parts, len(rows)] == [8, 2, 12]


def test_axis_by_module_and_rank_by_pattern():
    model = adapted(
        BY_NAME["bert"].build(),
        axis={"query": "column", "attention.output.dense": "both", ".*": "row"},
        rank_pattern={"layer.1.*": 3},
        r=1,
    )
    shapes = {
        name.removeprefix("bert.encoder.layer."): tuple(
            tuple(side["default"].shape) if "default" in side else None
            for side in (layer.rocoft_rows, layer.rocoft_columns)
        )
        for name, layer in layers(model).items()
    }
    assert shapes["0.attention.self.query"] == (None, (16, 1))
    assert shapes["1.attention.self.query"] == (None, (16, 3))
    assert shapes["0.attention.output.dense"] == ((1, 16), (15, 1))
    assert shapes["1.output.dense"] == ((3, 24), None)


def test_auto_takes_the_narrow_side():
    model = adapted(BY_NAME["bert"].build(), axis="auto")
    for name, layer in layers(model).items():
        wide = name.endswith("layer.0.output.dense") or name.endswith("1.output.dense")
        wide = wide and "attention" not in name
        assert bool(layer.rocoft_columns) == wide


@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"target_modules": ["query"]}, 2),
        ({"target_modules": r".*layer\.0.*(query|value)"}, 2),
        # All linears but the classifier: the pooler's too.
        ({"target_modules": "all-linear", "task_type": "SEQ_CLS"}, 13),
        ({"target_modules": "every-linear"}, 14),
        ({"layers_to_transform": 1}, 6),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layer"}, 12),
        ({"target_modules": ["key"], "layers_to_transform": [1]}, 1),
        ({"exclude_modules": ["query", "key"]}, 8),
        ({"exclude_modules": r".*attention.*"}, 4),
        ({"indices": {"bert.pooler.dense": {"rows": [3], "columns": [0]}}}, 1),
    ],
)
def test_targets(options, modules):
    model = adapted(BY_NAME["bert"].build(), **options)
    assert len(layers(model)) == modules
    again = sum(parameter_count(model.peft_config["default"], bert()).values())
    assert again == sum(p.numel() for p in named(model, ".rocoft_").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 is no number"),
        ({"r": 2.5}, "r=2.5 is no number"),
        ({"r": True}, "r=True is no number"),
        ({"fraction": 0.0}, "fraction=0.0 is no share"),
        ({"fraction": 1.5}, "fraction=1.5 is no share"),
        ({"axis": "rows"}, "axis='rows' is unknown. Choose one of row, column"),
        ({"axis": {"query": "up"}}, r"axis\['query'\]='up' is unknown"),
        ({"axis": {}}, "axis={} names no module"),
        ({"selection": "best"}, "selection='best' is unknown. Choose one of first"),
        ({"bias": "lora_only"}, "bias='lora_only' is unknown"),
        ({"rank_pattern": {"query": -1}}, r"rank_pattern\['query'\]=-1"),
        ({"layers_pattern": "layer"}, "used only with layers_to_transform"),
        (
            {"target_modules": "all-linear", "layers_to_transform": [0]},
            "cannot be used with target_modules='all-linear'",
        ),
        (
            {"target_modules": ".*query", "layers_to_transform": 0},
            "layers_to_transform=0 cannot be used with target_modules",
        ),
        ({"indices": {}}, "names no module"),
        ({"indices": {"a": {"row": [1]}}}, "must map 'rows' and 'columns'"),
        ({"indices": {"a": {"rows": [1, 1]}}}, "negative or repeated"),
        ({"indices": {"a": {"rows": [-1]}}}, "negative or repeated"),
        ({"indices": {"a": {"rows": []}}}, "is empty"),
    ],
)
def test_configuration_is_refused(options, message):
    with pytest.raises(SelectionError, match=message):
        RoCoFTConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 25}, "rows=25 cannot be selected from.*16 rows.*from 1 to 24"),
        ({"r": 25, "axis": "column"}, "columns=25 cannot be selected"),
        ({"target_modules": ["layer_norm", "LayerNorm"]}, "it is a LayerNorm"),
        ({"target_modules": ["word_embeddings"]}, "it is a Embedding"),
        ({"target_modules": ["nothing"]}, "nothing.* not found"),
        ({"target_modules": ".*nothing"}, "nothing.* not found"),
        ({"exclude_modules": ".*"}, "excluded"),
        ({"layers_to_transform": [7]}, "matches no transformer block"),
        ({"axis": {"query": "row"}}, "has no pattern for module"),
        ({"axis": {"quary": "row", ".*": "row"}}, "axis pattern 'quary' matches"),
        ({"rank_pattern": {"quary": 2}}, "rank_pattern pattern 'quary' matches"),
        ({"selection": "activation"}, "rocoft.calibrated"),
        ({"selection": "gradient"}, "selection='gradient' needs examples"),
        ({"indices": {"bert.pooler.dense": {"rows": [16]}}}, "has 16 rows"),
        (
            {"indices": {"a": {"rows": [1]}}, "target_modules": ["query"]},
            "indices name no rows or columns of the targeted module",
        ),
    ],
)
def test_application_is_refused_and_nothing_changes(options, message):
    model = bert()
    before = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, RoCoFTConfig(**options))
    assert [type(m) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


def test_scores_need_weights():
    model = on_meta("RobertaForSequenceClassification", num_hidden_layers=1)
    with pytest.raises(SelectionError, match="has none \\(meta device\\)"):
        get_peft_model(model, RoCoFTConfig(selection="max"))


def calibration_batches(family, labels=False):
    inputs = dict(family.inputs())
    if labels:
        inputs["labels"] = torch.tensor([0, 1, 0])
    return [inputs, {k: v[:2] for k, v in inputs.items()}]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_calibration_by_activation(name):
    family = BY_NAME[name]
    model = family.build()
    batches = calibration_batches(family)
    weights = Architecture(model).targets
    # The twin: one example at a time, cut to its length, through hooks of its own.
    squares = {}
    for w in weights.values():
        squares[w.module] = torch.zeros(w.inputs, dtype=torch.float64)

        def add(module, args, output, name=w.module):
            squares[name] += args[0].detach().flatten(0, -2).square().sum(0)

        model.get_submodule(w.module).register_forward_hook(add)
    for batch in batches:
        for tokens, mask in zip(
            batch["input_ids"], batch["attention_mask"], strict=True
        ):
            model(input_ids=tokens[mask.bool()][None])
    for module in model.modules():
        module._forward_hooks.clear()
    before = state(model)
    config = calibrated(
        RoCoFTConfig(r=2, axis="both", selection="activation"), model, batches
    )
    assert same(before, state(model))
    for w in weights.values():
        values = model.get_parameter(w.name).detach()
        values = (values if w.output_dim == 0 else values.t()).abs()
        scores = values * squares[w.module].sqrt()
        tops = [
            [i for part in parts for i in best(s, part)]
            for s, parts in (
                (scores.sum(1), w.parts),
                (scores.sum(0), (range(w.inputs),)),
            )
        ]
        found = config.indices[w.module]
        assert [found["rows"], found["columns"]] == [sorted(top) for top in tops]
    tuned = adapted(model, **{k: getattr(config, k) for k in ("indices", "selection")})
    assert len(layers(tuned)) == len(weights)


def best(scores, part):
    return sorted(part, key=lambda i: -scores[i])[:2]


def state(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [len(m._forward_pre_hooks) for m in model.modules()],
        [p.clone() for p in model.parameters()],
    )


def same(first, second):
    return first[:4] == second[:4] and all(map(torch.equal, first[4], second[4]))


def test_calibration_by_gradient():
    family = BY_NAME["bert"]
    model = family.build().train()
    batches = calibration_batches(family, labels=True)
    twin = family.build()
    energies = dict.fromkeys(Architecture(twin).targets, 0)
    for batch in batches:
        for i in range(len(batch["labels"])):
            twin.zero_grad()
            mask = batch["attention_mask"][i].bool()
            tokens = batch["input_ids"][i][mask][None]
            twin(input_ids=tokens, labels=batch["labels"][i : i + 1]).loss.backward()
            for name in energies:
                energies[name] = energies[name] + twin.get_parameter(name).grad.square()
    before = state(model)
    config = RoCoFTConfig(r=2, axis="both", selection="gradient")
    found = calibrated(config, model, batches)
    assert same(before, state(model))
    for name, energy in energies.items():
        chosen = found.indices[name.removesuffix(".weight")]
        assert chosen["rows"] == sorted(best(energy.sum(1), range(len(energy))))
        columns = best(energy.sum(0), range(energy.shape[1]))
        assert chosen["columns"] == sorted(columns)

    # The same with a loss from outside.
    def loss(model, example):
        example = dict(example)
        labels = example.pop("labels")
        return nn.functional.cross_entropy(model(**example).logits, labels)

    assert calibrated(config, model, batches, loss=loss).indices == found.indices


def test_calibration_needs_what_it_uses():
    family = BY_NAME["bert"]
    config = RoCoFTConfig(selection="gradient")
    with pytest.raises(SelectionError, match="Add labels, or pass loss="):
        calibrated(config, bert(), [family.inputs()])
    with pytest.raises(SelectionError, match="do not reach 12 targeted modules"):
        calibrated(RoCoFTConfig(selection="activation"), bert(), [])
    plain = RoCoFTConfig(selection="max")
    assert calibrated(plain, bert(), []) is plain


def test_sequence_to_sequence_calibration_drops_both_paddings():
    family = BY_NAME["t5-generation"]
    model = family.build()
    inputs = family.inputs()
    labels = torch.tensor([[5, 6, 7], [8, 9, -100], [5, -100, -100]])
    decoder = {
        "decoder_input_ids": torch.tensor([[0, 5, 6], [0, 8, 0], [0, 0, 0]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
    }
    batch = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    config = RoCoFTConfig(r=2, selection="gradient")
    padded = calibrated(config, model, [{**batch, **decoder, "labels": labels}])
    alone = []
    for i, n in enumerate((3, 2, 1)):
        mask = batch["attention_mask"][i].bool()
        one = {
            "input_ids": batch["input_ids"][i][mask][None],
            "decoder_input_ids": decoder["decoder_input_ids"][i : i + 1, :n],
            "labels": labels[i : i + 1, :n],
        }
        alone.append(one)
    assert calibrated(config, model, alone).indices == padded.indices
