"""Spaces: what they select, names, sums, and kernels with known answers."""

import itertools

import dense
import peft
import pytest
import torch
from cases import BY_NAME, GPT2, classifier
from dense import assert_close

from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows
from ntk.spaces.maps import LowRank, Slices, Whole
from rocoft.models.architecture import Architecture, SelectionError
from rocoft.models.readouts import Prompted

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def kernels(name, spaces, **options):
    family = BY_NAME[name]
    result = compute(
        family.build(), family.inputs(), spaces=spaces, options=KernelOptions(**options)
    )
    return result.kernels


# Names.


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (Full(), "full"),
        (Bias(), "bias"),
        (Norm(), "norm"),
        (Embeddings(), "embeddings"),
        (Head(), "head"),
        (Rows(3), "rows:3"),
        (Columns(2), "columns:2"),
        (LoRA(8), "lora:8"),
        (LoRA(), "lora"),
        (LoRA(8, alpha=16, seed=2, rescale=True), "lora:8/seed=2/alpha=16/rescale"),
        (Rows(3, strategy="random"), "rows:3/strategy=random"),
        (Rows(3, strategy="random", seed=4), "rows:3/strategy=random/seed=4"),
        (Rows(3, rescale=True), "rows:3/rescale"),
        (Columns(indices=(0, 5)), "columns/indices=0,5"),
        (Rows(indices={QUERY: (0,)}), "rows/calibrated"),
        (Rows(3).at("query", "value"), "rows:3@query,value"),
        (Rows(3).at("query").at("value"), "rows:3@query,value"),
        (Rows(3).layers(0, -1), "rows:3/layers=0,-1"),
        (Rows(1) + Columns(1) + Bias(), "rows:1+columns:1+bias"),
        ((Rows(1) + Bias()).layers(0), "rows:1/layers=0+bias/layers=0"),
        ((Rows(1) + LoRA(1)).at("key"), "rows:1@key+lora:1@key"),
    ],
)
def test_name(space, name):
    assert space.name == str(space) == name


# What is selected.


def chosen(model, space):
    return list(space.maps(model))


def test_default_targets_are_in_the_blocks(bert):
    names = chosen(bert, Rows(1))
    assert names == list(Architecture(bert).targets)
    assert chosen(bert, Columns(1)) == chosen(bert, LoRA(1)) == names


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (("query",), 2),
        (("query", "value"), 4),
        (("attention.self",), 6),
        (("*.layer.0.*",), 6),
        (("*attention*dense.weight",), 2),
        ((QUERY,), 1),
        (("dense", QUERY), 7),
    ],
)
def test_patterns_restrict(bert, patterns, count):
    assert len(chosen(bert, Rows(1).at(*patterns))) == count


def test_patterns_may_name_the_head(bert):
    assert chosen(bert, Rows(1).at("classifier")) == ["classifier.weight"]
    assert chosen(bert, LoRA(1).at("pooler")) == ["bert.pooler.dense.weight"]


def test_layers_restrict(bert):
    last = chosen(bert, Rows(1).layers(-1))
    assert last == chosen(bert, Rows(1).layers(1)) == chosen(bert, Rows(1))[6:]
    assert chosen(bert, Rows(1).layers(0, 1)) == chosen(bert, Rows(1))
    assert chosen(bert, Rows(1).layers(0).at("key")) == chosen(
        bert, Rows(1).at("key").layers(0)
    )
    assert not any(".layer.0." in name for name in chosen(bert, Full().layers(1)))


def test_blocks_of_encoder_and_decoder_share_an_index():
    model = BY_NAME["t5"].build()
    first = chosen(model, Rows(1).layers(0))
    assert any(".encoder.block.0." in name for name in first)
    assert any(".decoder.block.0." in name for name in first)
    assert not any(".block.1." in name for name in first)


def test_kinds(bert):
    names = [n for n, _ in bert.named_parameters()]
    assert chosen(bert, Full()) == names
    assert chosen(bert, Bias()) == [n for n in names if n.endswith("bias")]
    assert chosen(bert, Norm()) == [n for n in names if "LayerNorm" in n]
    assert chosen(bert, Embeddings()) == [n for n in names if "_embeddings." in n]
    assert chosen(bert, Head()) == [n for n in names if n.startswith("classifier")]


# Sums.


def test_entries_in_both_parts_count_once(bert):
    both = (Rows(3) + Rows(2)).maps(bert)
    assert both == Rows(3).maps(bert)
    assert (Rows(2) + Full()).maps(bert) == Full().maps(bert)
    assert (Full() + Columns(2)).maps(bert) == Full().maps(bert)
    assert (LoRA(2) + LoRA(2)).maps(bert) == LoRA(2).maps(bert)
    assert len((LoRA(2) + LoRA(2, seed=1)).maps(bert)[QUERY]) == 2
    assert set((Rows(1) + LoRA(2)).maps(bert)[QUERY]) == {
        *Rows(1).maps(bert)[QUERY],
        *LoRA(2).maps(bert)[QUERY],
    }
    ends = (Rows(1) + Rows(1, strategy="last")).maps(bert)[QUERY]
    assert ends == Rows(indices=(0, 15)).maps(bert)[QUERY]


def test_rows_and_columns_are_counted(bert):
    space = (Rows(3) + Columns(2)).at(QUERY)
    ((union,),) = space.maps(bert).values()
    assert union == Slices(union.of, (0, 1, 2), (0, 1))
    assert union.size((16, 16)) == 3 * 16 + 13 * 2
    mask = torch.zeros(16, 16)
    mask[:3] = mask[:, :2] = 1
    assert union.size((16, 16)) == int(mask.sum())


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (Rows(3), 3 * 16),
        (Columns(3), 16 * 3),
        (LoRA(3), 16 * 3),
        (Full(), 16 * 16),
        (Rows(1) + LoRA(2) + LoRA(1), 16 + 16 * 3),
    ],
)
def test_sizes(bert, space, size):
    inputs = BY_NAME["bert"].inputs()
    assert compute(bert, inputs, spaces={"": space.at(QUERY)}).sizes[""] == size


# Errors.


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Rows(2).at("quer"), r"'quer' matches none of the .*query"),
        (Full().at("query", "nothing"), "'nothing' matches none"),
        (Rows(2).layers(2), r"layers=\(2,\) are not all among the model's 2 blocks, 0"),
        (Rows(2).layers(0, -3), "not all among the model's 2 blocks"),
        (Rows(0), "rows=0 cannot be selected"),
        (Columns(-1), "columns=-1 cannot be selected"),
        (Rows(30), "which has 16 rows, nor .* Choose a number from 1 to 24"),
        (Columns(25), "which has 16 columns"),
        (Rows(indices=()), r"indices=\(\) must be distinct"),
        (Rows(indices=(1, 1)), r"indices=\(1, 1\) must be distinct"),
        (Rows(indices=(16,)), "0 to 15"),
        (Columns(indices=(-1,)), "0 to 15"),
        (Rows(indices={"other": (1,)}), f"indices has no entry for '{QUERY}'"),
        (Rows(2, strategy="best"), "strategy='best' is unknown"),
        (Rows(2, strategy="activation"), "needs examples"),
        (LoRA(), "has no adapters .give a rank"),
        (Rows(1) + Rows(1, rescale=True), "both with and without rescale"),
        (Full() + Rows(1, rescale=True), "both with and without rescale"),
        (Columns(1, rescale=True) + Full(), "both with and without rescale"),
    ],
)
def test_selections_that_cannot_be_made_are_refused(bert, space, message):
    with pytest.raises(SelectionError, match=message):
        space.maps(bert)


@pytest.mark.parametrize(
    ("name", "space", "missing", "left"),
    [
        (
            *("llama-lm", Head(), "LlamaForCausalLM has no head parameters"),
            "full, rows, columns, lora, norm, embeddings.",
        ),
        (
            *("llama", Bias(), "LlamaForSequenceClassification has no bias parameters"),
            "full, rows, columns, lora, norm, embeddings, head.",
        ),
        (
            *("mlp", Norm(), "Sequential has no norm parameters"),
            "full, rows, columns, lora, bias, head.",
        ),
        (
            *("mlp", Embeddings(), "Sequential has no embeddings"),
            "full, rows, columns, lora, bias, head.",
        ),
        ("bare", Rows(1), "has no linear layers", "full, bias"),
        ("llama", LoRA(), "has no adapters (give a rank, LoRA(8)", "full, rows"),
    ],
)
def test_spaces_that_a_model_does_not_have_are_refused(name, space, missing, left):
    with pytest.raises(SelectionError) as refused:
        space.maps(BY_NAME[name].build())
    assert str(refused.value).startswith(f"space '{space}' selects nothing: ")
    assert missing in str(refused.value)
    assert f"select some of its parameters: {left}" in str(refused.value)


def test_the_model_is_named_not_the_readout_around_it():
    prompted = Prompted(BY_NAME["llama-lm"].build())
    with pytest.raises(SelectionError, match="LlamaForCausalLM has no bias parameters"):
        Bias().maps(prompted)


def test_a_space_without_parameters_in_the_layers_is_refused():
    with pytest.raises(SelectionError, match="no embeddings in these layers"):
        Embeddings().layers(0).maps(BY_NAME["llama"].build())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Rows, r"needs either a count, as in Rows\(3\).*neither"),
        (lambda: Columns(2, indices=(1,)), "not both"),
        (lambda: Rows(1.5), r"count=1\.5 must be a whole number"),
        (lambda: Rows(True), "count=True must be a whole number"),
        (lambda: LoRA(0), "rank=0 must be at least 1"),
    ],
)
def test_spaces_that_make_no_sense_are_refused(make, message):
    with pytest.raises(SelectionError, match=message):
        make()


# Orientation and fused weights.


def test_rows_of_conv1d_are_output_features():
    family = BY_NAME["gpt2"]
    model, inputs = family.build(), family.inputs()
    gradients = dense.gradients(model, inputs)
    rows, columns = [], []
    for name, g in gradients.items():
        if (
            ".h." in name
            and name.endswith(("c_attn.weight", "c_fc.weight"))
            or (".h." in name and name.endswith("c_proj.weight"))
        ):
            # Stored (inputs, outputs); c_attn holds query, key and value in turn.
            third = g.shape[-1] // 3
            starts = (0, third, 2 * third) if "c_attn" in name else (0,)
            index = [start + i for start in starts for i in range(2)]
            rows.append(g[..., index])
            columns.append(g[..., :3, :])
    assert len(rows) == 8
    result = compute(model, inputs, spaces={"r": Rows(2), "c": Columns(3)})
    assert_close(result.kernels["r"], dense.kernel(rows))
    assert_close(result.kernels["c"], dense.kernel(columns))
    assert result.sizes["r"] == 2 * (3 * 2 * 16 + 2 * 16 + 2 * 16 + 2 * 64)


@pytest.mark.parametrize("name", ["gpt-neox", "bloom"])
def test_rows_of_interleaved_heads(name):
    """Each of two heads holds eight features of q, then of k, then of v."""
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    index = [0, 1, 8, 9, 16, 17]
    gradients = dense.gradients(model, inputs)
    fused = [
        g[..., index, :]
        for n, g in gradients.items()
        if n.endswith("query_key_value.weight")
    ]
    result = empirical_ntk(model, inputs, space=Rows(2).at("query_key_value"))
    assert_close(result, dense.kernel(fused))


# Known answers.


def test_kernels_add_over_layers(bert):
    inputs = BY_NAME["bert"].inputs()
    outside = "*.embeddings.*", "pooler", "classifier"
    spaces = {
        "first": Full().layers(0),
        "second": Full().layers(1),
        "outside": Full().at(*outside),
        "all": Full(),
    }
    result = compute(bert, inputs, spaces=spaces).kernels
    parts = result["first"] + result["second"] + result["outside"]
    assert_close(parts, result["all"])


def small_gpt2():
    """Fused weights of few rows."""
    config = GPT2.replace("n_embd=16", "n_embd=4")
    model = classifier("GPT2", config, n_inner=6)().double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_single_rows_and_columns_average_to_the_whole_weight(name):
    """Average over every selection of one row (column, pair): the exact expectation."""
    family = BY_NAME["mlp"]
    model, inputs = family.build(), family.inputs()
    outputs, width = model.get_parameter(name).shape
    rows = [Rows(indices=(i,), rescale=True).at(name) for i in range(outputs)]
    columns = [Columns(indices=(j,), rescale=True).at(name) for j in range(width)]
    pairs = [r + c for r, c in itertools.product(rows, columns)]
    spaces = {s.name: s for s in (*rows, *columns, *pairs)}
    result = compute(model, inputs, spaces=spaces).kernels
    whole = empirical_ntk(model, inputs, space=Full().at(name))
    for group in (rows, columns, pairs):
        mean = sum(result[s.name] for s in group) / len(group)
        assert_close(mean, whole)
        # Single selections must differ, or the mean is trivial.
        assert (result[group[0].name] - whole).norm() > 1e-3 * whole.norm()


def test_one_row_of_each_fused_part_averages_to_the_whole_weight():
    model, inputs = small_gpt2(), BY_NAME["gpt2"].inputs()
    name = "transformer.h.0.attn.c_attn.weight"
    triples = itertools.product(range(4), range(4, 8), range(8, 12))
    spaces = {
        str(i): Rows(indices=i, rescale=True).at(name) for i in map(tuple, triples)
    }
    result = compute(model, inputs, spaces=spaces).kernels
    whole = empirical_ntk(model, inputs, space=Full().at(name))
    assert_close(sum(result.values()) / len(result), whole)


def test_pairs_of_rows_average_to_the_whole_weight():
    family = BY_NAME["mlp"]
    model, inputs = family.build(), family.inputs()
    pairs = itertools.combinations(range(6), 2)
    spaces = {str(p): Rows(indices=p, rescale=True).at("0.weight") for p in pairs}
    result = compute(model, inputs, spaces=spaces).kernels
    whole = empirical_ntk(model, inputs, space=Full().at("0.weight"))
    assert_close(sum(result.values()) / len(result), whole)


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_averages_to_the_whole_weight(alpha):
    family = BY_NAME["mlp"]
    model, inputs = family.build(), family.inputs()
    name = "0.weight"
    spaces = {
        str(s): LoRA(2, seed=s, alpha=alpha, rescale=True).at(name) for s in range(4000)
    }
    result = torch.stack(list(compute(model, inputs, spaces=spaces).kernels.values()))
    whole = empirical_ntk(model, inputs, space=Full().at(name))
    deviation = result.std(dim=0) / len(result) ** 0.5
    assert ((result.mean(dim=0) - whole).abs() < 5 * deviation).all()
    assert deviation.max() < 0.02 * whole.abs().max()


# LoRA.


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_lora_is_the_kernel_of_a_fresh_peft_model(name):
    family = BY_NAME[name]
    inputs = family.inputs()
    space = LoRA(3, seed=5, alpha=12)
    plain = family.build()
    expected = empirical_ntk(plain, inputs, space=space)
    maps = space.maps(plain)
    options = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=[n.removesuffix(".weight") for n in maps],
        fan_in_fan_out=name == "gpt2",
    )
    adapted = peft.get_peft_model(family.build(), options).double()
    for parameter, (low_rank,) in maps.items():
        assert isinstance(low_rank, LowRank)
        layer = adapted.get_submodule(
            f"base_model.model.{parameter.removesuffix('.weight')}"
        )
        assert not layer.lora_B["default"].weight.any()
        layer.lora_A["default"].weight.data.copy_(low_rank.down)
    result = compute(adapted, inputs, spaces={"B": Full().at("lora_B"), "": LoRA()})
    assert_close(result.kernels["B"], expected)
    # At B = 0 the gradient of A is zero, so both factors give the same kernel.
    assert_close(result.kernels[""], expected)
    assert result.sizes["B"] == compute(plain, inputs, spaces={"": space}).sizes[""]
    every = dense.gradients(adapted, inputs)
    adapters = [g for name, g in every.items() if ".lora_" in name]
    assert_close(result.kernels[""], dense.kernel(adapters))


def test_existing_adapters_are_chosen():
    model = BY_NAME["gpt2-lora"].build()
    maps = LoRA().maps(model)
    names = [n for n, _ in model.named_parameters() if ".lora_" in n]
    assert list(maps) == names
    assert len(names) == 8
    assert set(maps.values()) == {(Whole(),)}
    # Frozen weights can still be selected.
    assert all(".base_layer." in n or "c_proj" in n for n in Rows(1).maps(model))


def test_lora_draws_a_from_its_own_seed(bert):
    first = LoRA(2).maps(bert)
    before = torch.random.get_rng_state()
    downs = [low_rank.down for (low_rank,) in first.values()]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all((d.abs() <= d.shape[1] ** -0.5).all() for d in downs)
    same_width = [d for d in downs if d.shape == downs[0].shape]
    assert all(not torch.equal(downs[0], d) for d in same_width[1:])
    again = LoRA(2).maps(bert)[QUERY][0].down
    assert torch.equal(downs[0], again)
    assert not torch.equal(downs[0], LoRA(2, seed=1).maps(bert)[QUERY][0].down)


def test_alpha_scales_by_its_square():
    result = kernels("t5", {"one": LoRA(4), "alpha": LoRA(4, alpha=8)})
    assert_close(result["alpha"], 4 * result["one"])
