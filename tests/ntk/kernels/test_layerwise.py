"""Kernels of layers: their sum, their parameters and their cost."""

import peft
import pytest
import torch
from adapted import adapted
from cases import BY_NAME
from dense import assert_close, gradients, kernel

from ntk.kernels import accumulator, engine
from ntk.kernels.contraction import Contraction
from ntk.kernels.empirical import compute, empirical_ntk
from ntk.kernels.layerwise import (
    LayerKernel,
    combined,
    gram_matrices,
    layer_kernels,
    layer_spaces,
)
from ntk.kernels.options import KernelOptions
from ntk.measures.gram import reduced
from ntk.measures.spectrum import NotSymmetricError
from ntk.spaces.kinds import Bias, Columns, Full, LoRA, Rows
from rocoft.models.architecture import SelectionError

SPACES = {
    "full": Full(),
    "rows": Rows(2, strategy="max") + Bias(),
    "columns": Columns(1) + Rows(1),
    "lora": LoRA(2, seed=3),
    "some": Full().at("query", "key").layers(-1),
}
GROUPINGS = ["layer", "kind", "module"]


def built(name, n=3):
    return BY_NAME[name].build(), BY_NAME[name].inputs(n)


def adapter_of(model, **options):
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", **options
    )
    return peft.get_peft_model(model, config)


# Additivity


@pytest.mark.parametrize("by", GROUPINGS)
@pytest.mark.parametrize("space", SPACES)
def test_layers_add_up_to_the_whole(space, by):
    model, inputs = built("bert")
    layers = layer_kernels(model, inputs, space=SPACES[space], by=by)
    whole = compute(model, inputs, spaces={"whole": SPACES[space]})
    assert_close(combined(layers), whole.kernels["whole"], 1e-10)
    assert sum(each.parameters for each in layers.values()) == whole.sizes["whole"]
    assert len(layers) == 1 if (space, by) == ("some", "layer") else len(layers) > 1


@pytest.mark.parametrize(
    "name", ["gpt2", "albert", "t5-generation", "deberta", "llama-lm", "mlp", "bare"]
)
def test_layers_of_other_families_add_up(name):
    family = BY_NAME[name]
    model, inputs = built(name)
    for by in GROUPINGS:
        layers = layer_kernels(
            model, inputs, by=by, options=KernelOptions(outputs=family.outputs)
        )
        expected = empirical_ntk(model, inputs, outputs=family.outputs)
        assert_close(combined(layers), expected, 1e-10, of=by)


def test_layers_of_an_adapted_model_add_up():
    """LoRA with both matrices trained, and RoCoFT."""
    model, inputs = built("bert")
    lora = adapter_of(model)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    for tuned in (lora.double().eval(), adapted(BY_NAME["bert"].build()).double()):
        layers = layer_kernels(tuned, inputs)
        assert_close(combined(layers), empirical_ntk(tuned, inputs), 1e-10)
        blocks = [layers[name].kernel for name in ("0", "1")]
        assert all(float(each.abs().max()) > 0 for each in blocks)


@pytest.mark.parametrize("kind", ["sgd", "signgd", "asymmetric_signgd"])
def test_reductions_and_kinds_add_up(kind):
    model, inputs = built("bert")
    space, options = Rows(2), {"kind": kind, "batch_size": 2}
    full = combined(
        layer_kernels(model, inputs, space=space, options=KernelOptions(**options))
    )
    expected = empirical_ntk(model, inputs, space=space, **options)
    assert_close(full, expected, 1e-10)
    if kind == "asymmetric_signgd":
        return  # The sign of a margin's gradient is another kernel.
    options = KernelOptions(reduce="trace", **options)
    trace = layer_kernels(model, inputs, space=space, options=options)
    assert_close(combined(trace), reduced(full, "trace"), 1e-10)
    assert {each.kernel.shape for each in trace.values()} == {(3, 3)}


def test_two_sides_are_slices_of_one():
    model, inputs = built("bert")
    few = {key: value[1:] for key, value in inputs.items()}
    whole = layer_kernels(model, inputs, space=LoRA(2))
    sides = layer_kernels(model, inputs, few, space=LoRA(2))
    for name, each in sides.items():
        assert_close(each.kernel, whole[name].kernel[:, 1:], of=name)
        assert each.parameters == whole[name].parameters


# Each layer


def test_a_layer_is_the_kernel_of_its_own_parameters():
    model, inputs = built("bert")
    found = gradients(model, inputs)
    layers = layer_kernels(model, inputs)
    assert list(layers) == ["embeddings", "0", "1", "other", "head"]
    for name, part in (
        ("embeddings", "embeddings."),
        ("0", "layer.0."),
        ("1", "layer.1."),
        ("other", "pooler."),
        ("head", "classifier."),
    ):
        own = [gradient for n, gradient in found.items() if part in n]
        assert_close(layers[name].kernel, kernel(own), of=name)
        sizes = [g[0, 0].numel() for g in own]
        assert layers[name].parameters == sum(sizes)


@pytest.mark.parametrize("space", [Rows(2), LoRA(2), Columns(1) + Rows(1)])
def test_a_layer_is_the_space_restricted_to_it(space):
    model, inputs = built("bert")
    layers = layer_kernels(model, inputs, space=space)
    assert list(layers) == ["0", "1"]
    for i in (0, 1):
        alone = empirical_ntk(model, inputs, space=space.layers(i))
        assert_close(layers[str(i)].kernel, alone, 1e-12)
    kinds = layer_kernels(model, inputs, space=space, by="kind")
    assert_close(
        kinds["attention.self.query"].kernel,
        empirical_ntk(model, inputs, space=space.at("query")),
        1e-12,
    )


def test_names_of_groups():
    model = BY_NAME["bert"].build()
    kinds = [
        *("attention.self.query", "attention.self.key", "attention.self.value"),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    ]
    assert list(layer_spaces(model, Rows(1), by="kind")) == kinds
    modules = [f"{i}.{kind}" for i in (0, 1) for kind in kinds]
    assert list(layer_spaces(model, Rows(1), by="module")) == modules
    outside = layer_spaces(model, by="kind").keys() - kinds
    assert "bert.embeddings.word_embeddings" in outside
    assert "attention.output.LayerNorm" in outside
    assert "classifier" in outside


def test_groups_of_other_families():
    names = lambda family, by="layer": list(
        layer_spaces(BY_NAME[family].build(), by=by)
    )
    assert names("gpt2") == ["embeddings", "0", "1", "other", "head"]
    assert names("albert") == ["embeddings", "0", "other", "head"]
    assert names("t5-generation") == ["embeddings", "0", "1", "other"]
    assert names("mlp") == ["other", "head"]
    assert "layer.0.SelfAttention.q" in names("t5-generation", "kind")
    assert "attention.self" in names("deberta", "kind")  # q_bias and v_bias
    assert names("bare", "kind") == ["token", "product", "shift", "scale", "head"]
    model = BY_NAME["deberta-v2"].build()
    tables = layer_spaces(model)["embeddings"].maps(model)
    assert "deberta.encoder.rel_embeddings.weight" in tables  # It follows the blocks.


def test_an_adapter_is_in_the_group_of_its_module():
    kinds = layer_spaces(BY_NAME["gpt2-lora"].build(), LoRA(), by="kind")
    assert list(kinds) == ["attn.c_attn", "mlp.c_fc"]
    (first, *_) = kinds.values()
    maps = first.maps(BY_NAME["gpt2-lora"].build())
    assert len(maps) == 4  # A and B of two blocks
    model = adapter_of(BY_NAME["bert"].build())
    assert list(layer_spaces(model)) == ["0", "1", "head"]
    modules = list(layer_spaces(model, by="module"))
    assert modules[:2] == ["0.attention.self.query", "0.attention.self.value"]
    assert modules[-1] == "base_model.model.classifier"
    rocoft = layer_spaces(adapted(BY_NAME["bert"].build()), by="kind")
    assert "attention.self.query" in rocoft


# Cost


@pytest.mark.parametrize("space", SPACES)
def test_layers_cost_as_much_as_the_whole(space, monkeypatch):
    """A contraction counts with the size of its operands."""
    model, inputs = built("bert")
    seen = []
    model.register_forward_hook(lambda *_: seen.append(("pass",)))
    compute(model, inputs, spaces={"": Full()})  # Caches the verdicts.

    def watch(owner, name):
        call = getattr(owner, name)

        def watched(*arguments):
            seen.append((name, *map(_size, arguments)))
            return call(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(engine, "gram")
    watch(Contraction, "grams")
    watch(Contraction, "gram")
    # Without stacks, which would count as one contraction.
    monkeypatch.setattr(accumulator, "SMALL_FEATURES", 0)

    def cost(spaces):
        seen.clear()
        compute(model, inputs, spaces=spaces)
        return sorted(seen)

    alone = cost({"whole": SPACES[space]})
    assert alone.count(("pass",)) == 1
    weights = len(compute(model, inputs, spaces={"": SPACES[space]}).traces[""])
    assert len(alone) > weights
    for by in GROUPINGS:
        layers = layer_spaces(model, SPACES[space], by=by)
        assert cost(layers) == alone
        assert cost({"whole": SPACES[space], **layers}) == alone


def _size(argument):
    """Return the number of entries of features or factors, else 0."""
    if isinstance(argument, torch.Tensor):
        return argument.numel()
    if isinstance(argument, list):
        return sum(each.g[0].numel() for batch in argument for each in batch)
    return 0


# Shares


def test_gram_matrices_are_example_major():
    model, inputs = built("bert")
    layers = layer_kernels(model, inputs, space=Rows(1))
    gram = gram_matrices(layers)["1"]
    assert gram.shape == (6, 6)
    assert gram[1, 4] == pytest.approx(float(layers["1"].kernel[0, 2, 1, 0]))


# What is refused


def test_bad_groupings_and_sums_are_refused():
    model, inputs = built("bert")
    with pytest.raises(ValueError, match="by='block' must be one of layer, kind"):
        layer_spaces(model, by="block")
    with pytest.raises(SelectionError, match="layers=.* 2 blocks"):
        layer_kernels(model, inputs, space=Rows(1).layers(7))
    layers = layer_kernels(model, inputs, space=Rows(1))
    for names in ([], ["0", "0"], ["2"]):
        with pytest.raises(SelectionError, match="must be different ones.* of 0, 1"):
            combined(layers, names)
    with pytest.raises(ValueError, match="`layers` has kernels of shapes .*all of the"):
        gram_matrices({**layers, "2": LayerKernel(torch.eye(2), 1)})
    with pytest.raises(ValueError, match="`layers` has kernels of shapes"):
        gram_matrices({})
    with pytest.raises(NotSymmetricError, match=r"`layers\['0'\]` is not symmetric"):
        gram_matrices({"0": LayerKernel(torch.eye(2).cumsum(0), 1)})
