"""Fine-tuned models as plain ones."""

import copy
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from cases import BY_NAME
from checkpoints import SENTIMENT, checkpoint, outputs, pooling, reviews
from dense import assert_close, gradients, kernel
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ntk.kernels.empirical import empirical_ntk
from ntk.measures.change import kernel_change
from rocoft import RoCoFTConfig
from rocoft.models.backbone import load_backbone
from rocoft.models.merging import MergeError, merged
from rocoft.models.readouts import MeanPooled, Prompted
from rocoft.training.methods import apply_method, parse_method
from rocoft.training.trainer import fine_tune

seeds = st.integers(0, 2**32 - 1)
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
METHODS = ("full", "rows:2", "columns:2", "rows:1+columns:1", "rows:2+bias", "lora:2")
METHODS += ("dora:2", "bitfit", "head", "probe", "masked rows:2")


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def split():
    return replace(reviews(16, test=6), dev=reviews(24, test=0).train[16:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return checkpoint(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def backbone(folder, split):
    return load_backbone(folder, split, head="random", dtype=torch.float64)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = checkpoint(tmp_path_factory.mktemp("pooled"))[0]
    pooling(place, pooling_mode_mean_tokens=True)
    return load_backbone(place, split, head="random", dtype=torch.float64)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        place = checkpoint(tmp_path_factory.mktemp("masked"), "BertForMaskedLM")[0]
    prompt = replace(SENTIMENT, template="{a} it was {mask}")
    return load_backbone(place, prompted_split(prompt), dtype=torch.float64)


def prompted_split(prompt):
    drawn = reviews(16, prompt=prompt, test=6)
    return replace(drawn, dev=drawn.train[:8])


def tune(backbone, split, method, **arguments):
    rate = 1e-2 if method in ("full", "masked rows:2", "rows:2+bias") else 5e-2
    return fine_tune(
        backbone, split, method, lrs=[rate], arguments={**QUICK, **arguments}
    )


def state(model):
    """Return all that merging must leave alone."""
    return (
        [(n, type(m), m.training) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        {n: b.clone() for n, b in model.named_buffers()},
    )


def assert_same_state(one, other):
    assert one[0] == other[0]
    for (name, flag, value), (also, as_well, and_so) in zip(
        one[1], other[1], strict=True
    ):
        assert (name, flag) == (also, as_well)
        assert torch.equal(value, and_so), name
    assert all(torch.equal(one[2][n], other[2][n]) for n in one[2])


def assert_plain(plain, start):
    """Assert that a model is made as one that no method was applied to."""
    assert [(n, type(m)) for n, m in plain.named_modules()] == [
        (n, type(m)) for n, m in start.named_modules()
    ]
    for (name, found), (also, expected) in zip(
        plain.named_parameters(), start.named_parameters(), strict=True
    ):
        assert (name, found.shape) == (also, expected.shape)
        assert found.requires_grad, name


def assert_merges(backbone, split, method):
    tuned = tune(backbone, split, method).model
    before = state(tuned)
    plain = merged(tuned)
    assert_same_state(state(tuned), before)
    assert_plain(plain, backbone.module)
    assert not plain.training
    found, expected = (
        outputs(replace(backbone, module=m), split.test) for m in (plain, tuned)
    )
    assert_close(found, expected, 1e-9)
    start = outputs(backbone, split.test)
    assert (found - start).abs().max() > 1e-3
    return plain


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_tuned_model(backbone, split, method):
    plain = assert_merges(backbone, split, method)
    (batch,), _ = backbone.encode(split.train[:6], 6)
    same, before, after = (
        empirical_ntk(m, batch)
        for m in (merged(backbone.module), backbone.module, plain)
    )
    assert torch.equal(same, before)
    assert kernel_change(before, same, rank=3).distance == 0
    assert kernel_change(before, after, rank=3).distance > 1e-6


@pytest.mark.parametrize("method", ["full", "rows:2", "lora:2", "bitfit"])
def test_readouts_keep_their_place(pooled, prompted, split, method):
    assert_merges(pooled, split, method)
    assert isinstance(pooled.module, MeanPooled)
    plain = assert_merges(prompted, prompted_split(prompted.prompt), method)
    assert isinstance(plain, Prompted)
    # The label words' rows are still those of the embedding.
    tied = plain.model.get_input_embeddings().weight
    assert plain.model.get_output_embeddings().weight is tied


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", ["rows:2", "auto:2", "lora:2", "dora:2"])
def test_merged_weights_have_the_kernel_of_weights_changed_by_hand(family, method):
    start, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    tuned = apply_method(copy.deepcopy(start), parse_method(method), train_head=True)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain, by_hand = merged(tuned), copy.deepcopy(start)
    with torch.no_grad():
        for name, value in weights_by_hand(tuned.eval(), start).items():
            by_hand.get_parameter(name).copy_(value)
    expected = gradients(by_hand, inputs).values()
    assert_close(empirical_ntk(plain, inputs), kernel(list(expected)), 1e-9)


def weights_by_hand(tuned, start):
    """Return every weight of the plain model, read off what each layer does."""
    layers = {
        name.replace(".modules_to_save.default", ""): module
        for name, module in tuned.base_model.model.named_modules()
    }
    found = {}
    for path, module in start.named_modules():
        layer = layers[path]
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            kind = name.rpartition(".")[2]
            if kind == "weight" and hasattr(layer, "base_layer"):
                # A linear layer is its bias at zero, and its columns at the basis.
                d = layer.base_layer.weight.shape[int(isinstance(module, nn.Linear))]
                basis = torch.eye(d, dtype=parameter.dtype)
                columns = layer(basis) - layer(torch.zeros_like(basis))
                found[name] = columns.T if isinstance(module, nn.Linear) else columns
            else:
                found[name] = getattr(getattr(layer, "base_layer", layer), kind)
    return found


def test_two_adapters_merge_what_is_active():
    model = get_peft_model(BY_NAME["bert"].build(), RoCoFTConfig(r=2))
    model.add_adapter("second", RoCoFTConfig(r=2, selection="last"))
    for name, parameter in model.named_parameters():
        if ".rocoft_" in name:
            parameter.data.normal_()
    inputs = BY_NAME["bert"].inputs()
    found = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        with torch.no_grad():
            found[name] = merged(model)(**inputs).logits
            assert_close(found[name], model.eval()(**inputs).logits, 1e-9)
    assert (found["default"] - found["second"]).abs().max() > 1e-3


def test_training_mode_is_kept():
    model = apply_method(
        BY_NAME["bert"].build(), parse_method("rows:2"), train_head=True
    )
    assert all(module.training for module in merged(model.train()).modules())
    assert not any(module.training for module in merged(model.eval()).modules())


def test_wrappers_of_training_are_left_out():
    model = BY_NAME["bert"].build()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        plain = merged(wrapped)
        assert_plain(plain, model)
        assert plain is not model


def examples(count=16, length=7):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 60, (count, length), generator=generator)
    return [{"input_ids": t, "labels": int(t[0]) % 2} for t in tokens]


def trainer(model, place, *callbacks, **options):
    options = {"max_steps": 5, "learning_rate": 1e-2, **options}
    arguments = TrainingArguments(
        str(place),
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy=options.pop("save_strategy", "no"),
        **options,
    )
    return Trainer(
        model, arguments, train_dataset=examples(), callbacks=list(callbacks)
    )


def start(method="full"):
    """Return a model with dropout that trains by a method, in float64."""
    model = BY_NAME["bert"].build()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return apply_method(model, parse_method(method), train_head=True)


def inputs_of(count=4):
    return {"input_ids": torch.stack([e["input_ids"] for e in examples(count)])}


def test_mixed_precision_is_left_out(tmp_path):
    model, inputs = start().float(), inputs_of()
    trainer(model, tmp_path, max_steps=1, bf16=True).train()
    exact = start().float()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        rough = model.eval()(**inputs).logits
        assert torch.equal(
            merged(model)(**inputs).logits, exact.eval()(**inputs).logits
        )
        # The one that is trained goes on as before.
        assert torch.equal(model(**inputs).logits, rough)
        assert not torch.equal(rough, exact(**inputs).logits)


def test_what_cannot_be_merged_is_refused():
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(BY_NAME["bert"].build(), config)
    with pytest.raises(MergeError, match="adapter 'default' is of type .*PROMPT_TUNI"):
        merged(model)
    model = BY_NAME["bert"].build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    with pytest.raises(MergeError, match="has 2 adapted layers, such as 'bert.enc"):
        merged(model)
    quantised = nn.Linear(2, 2)
    quantised.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), False)
    with pytest.raises(MergeError, match=r"'weight' is quantised \(torch.int8\)"):
        merged(quantised)
