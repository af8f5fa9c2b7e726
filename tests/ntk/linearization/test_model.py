"""The linearised model against finite differences, and as a module that trains."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from adapted import adapted
from cases import BY_NAME, Lambda
from checkpoints import checkpoint, reviews
from dense import assert_close, gradients
from peft import LoraConfig, get_peft_model
from torch import nn

from ntk.gradients.function import Float64Throughout, FunctionError, logits
from ntk.kernels.empirical import empirical_ntk
from ntk.linearization.model import linearize
from ntk.measures.gram import gram_matrix
from ntk.spaces.kinds import Bias, Columns, Full, Head, LoRA, Rows
from rocoft.models.architecture import SelectionError
from rocoft.models.backbone import load_backbone
from rocoft.models.merging import merged
from rocoft.training.anchor import Anchor
from rocoft.training.methods import apply_method, parse_method, trained_parameters
from rocoft.training.trainer import count_parameters, fine_tune

CASES = [
    ("bert", Full()),
    ("bert", Rows(2) + Columns(1) + Bias()),
    ("bert", Rows(1).layers(1) + Head()),
    ("gpt2", LoRA(2, alpha=3) + Bias()),
    ("gpt2-lora", LoRA()),
    ("bloom", Full()),
    ("llama", Full()),
    ("t5", Full()),
    ("deberta-v2", Full()),
    ("bert-mlm", Columns(2)),
    ("vit", Full()),
    ("cnn", Full()),
    ("mixture", Full()),
]


def called(model, inputs):
    return model(inputs) if isinstance(inputs, torch.Tensor) else model(**inputs)


def direction(linear):
    drawn = torch.randn_like(linear.delta)
    return drawn / drawn.norm()


def with_delta(linear, delta):
    with torch.no_grad():
        linear.delta.copy_(delta)
    return linear


def richardson(curve, h=2e-3):
    """Return the derivative at 0 by central differences, to fourth order."""
    slope = lambda step: (curve(step) - curve(-step)) / (2 * step)
    return (4 * slope(h / 2) - slope(h)) / 3


def outputs_of(model, inputs, outputs):
    with torch.no_grad(), Float64Throughout():
        return (outputs or logits)(called(model, inputs))


# The function.


@pytest.mark.parametrize(("name", "space"), CASES, ids=lambda case: str(case))
def test_it_is_the_tangent_by_finite_differences(name, space):
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs()
    linear = linearize(model, space, family.outputs)
    d = direction(linear)
    curve = lambda s: outputs_of(linear.model_at(s * d), inputs, family.outputs)
    expected = richardson(curve)
    assert expected.abs().max() > 1e-4
    assert_close(linear.jvp(inputs, d), expected, 1e-7, of=name)
    start = outputs_of(model, inputs, family.outputs)
    assert_close(called(linear, inputs).detach(), start, 1e-12)
    with_delta(linear, 3 * d)
    assert_close(called(linear, inputs).detach(), start + 3 * expected, 1e-7)
    # The transpose, by vjp and by backward.
    v = torch.randn_like(start)
    pulled = linear.vjp(inputs, v)
    torch.testing.assert_close((v * expected).sum(), pulled @ d, rtol=1e-7, atol=1e-9)
    (called(linear, inputs) * v).sum().backward()
    assert_close(linear.delta.grad, pulled)


@pytest.mark.parametrize("axis", ["row", "column", "both"])
def test_rocoft_adapters_are_linearised_in_their_own_parameters(axis):
    family = BY_NAME["bert"]
    model, inputs = adapted(family.build(), axis=axis), family.inputs()
    linear = linearize(model, Full())
    assert len(linear.delta) == sum(
        p.numel() for p in trained_parameters(model).values()
    )
    d = direction(linear)
    expected = richardson(lambda s: outputs_of(linear.model_at(s * d), inputs, None))
    assert_close(linear.jvp(inputs, d), expected, 1e-7)


def test_coordinates_move_what_their_space_says():
    family = BY_NAME["bert"]
    model = family.build()
    linear = linearize(model, Rows(2).at("query") + Bias())
    moved = dict(linear.model_at(torch.ones_like(linear.delta)).named_parameters())
    for name, start in model.named_parameters():
        expected = start.detach().clone()
        if name.endswith("query.weight"):
            expected[:2] += 1
        if name.endswith("bias"):
            expected += 1
        assert torch.equal(moved[name], expected), name


def test_the_kernel_is_that_of_the_coordinates():
    """J J' is the kernel, by unit vectors, for rescaled spaces too."""
    family = BY_NAME["mlp"]
    model, inputs = family.build(), family.inputs(4)
    for space in (Full(), Rows(2, rescale=True) + Head(), LoRA(2, rescale=True)):
        linear = linearize(model, space)
        eye = torch.eye(len(linear.delta), dtype=linear.delta.dtype)
        J = torch.stack([linear.jvp(inputs, one).flatten() for one in eye], dim=1)
        kernel = empirical_ntk(model, inputs, space=space)
        assert_close(J @ J.T, gram_matrix(kernel), of=str(space))
        again = empirical_ntk(linear.base, inputs, space=linear.space)
        assert torch.equal(again, kernel)


def test_batches_and_their_size_change_nothing():
    family = BY_NAME["bert"]
    inputs = family.inputs(5)
    linear = linearize(family.build(), Rows(2) + Head())
    d, v = direction(linear), torch.randn(5, 2, dtype=torch.float64)
    for method, value in ((linear.jvp, d), (linear.vjp, v), (linear.predict, d)):
        assert_close(method(inputs, value, batch_size=2), method(inputs, value))
    assert_close(linear.start(inputs, batch_size=2), linear.start(inputs))


def test_another_point_has_the_same_coordinates():
    family = BY_NAME["bert"]
    inputs = family.inputs()
    linear = linearize(family.build(), Rows(1, strategy="max") + Head())
    d, e = direction(linear), direction(linear)
    there = linear.at(5 * d)
    curve = lambda s: outputs_of(linear.model_at(5 * d + s * e), inputs, None)
    assert_close(there.jvp(inputs, e), richardson(curve), 1e-7)
    assert_close(
        there.model_at(-5 * d).state_dict()["classifier.weight"],
        linear.base.state_dict()["classifier.weight"],
        1e-14,
    )


def test_models_in_float32_are_linearised_in_float32():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs()
    wide = linearize(model, Full())
    narrow = linearize(copy.deepcopy(model).float(), Full())
    d = direction(wide)
    result = narrow.jvp(inputs, d.float())
    assert result.dtype is torch.float32
    assert_close(result.double(), wide.jvp(inputs, d), 1e-4)


# The module.


@pytest.mark.parametrize("name", ["bert", "bloom", "cnn"])
def test_the_model_is_left_as_it_was(name):
    family = BY_NAME[name]
    model, inputs = family.build().train(), family.inputs()
    next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    linear = linearize(model, Full()).train()
    assert not any(module.training for module in linear.base.modules())
    assert list(trained_parameters(linear)) == ["delta"]
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.1)
    called(linear, inputs).square().sum().backward()
    optimizer.step()
    for key, value in (*model.state_dict().items(), *linear.base.state_dict().items()):
        assert torch.equal(value, before[key]), key
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    back = linear.model_at()
    assert [p.requires_grad for p in back.parameters()] == flags
    # Training the model afterwards does not move the point of linearisation.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_close(
        linear.predict(inputs, torch.zeros_like(linear.delta)),
        linear.start(inputs),
        1e-12,
    )


def test_dropout_has_no_part_in_it():
    family = BY_NAME["bert"]
    model, inputs = family.build(), family.inputs()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    linear = linearize(model.train(), Full()).train()
    first = called(linear, inputs)
    assert torch.equal(first, called(linear, inputs))
    assert_close(first.detach(), called(model.eval(), inputs).logits.detach(), 1e-12)


def test_it_trains_where_the_model_has_no_forward_mode():
    """Bloom's GELU is a custom function; gradients must reach delta through it."""
    family = BY_NAME["bloom"]
    linear, inputs = linearize(family.build(), Full()), family.inputs()
    with_delta(linear, direction(linear))
    target = torch.tensor([0, 1, 1])
    F.cross_entropy(called(linear, inputs), target).backward()
    p = called(linear, inputs).detach().softmax(dim=1)
    v = (p - F.one_hot(target)) / 3
    assert_close(linear.delta.grad, linear.vjp(inputs, v))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    split = replace(reviews(12, test=6), dev=reviews(16, test=0).train[12:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("model"))[0]
    return load_backbone(folder, split, head="random"), split


def linearized(model):
    return linearize(model, Full())


@pytest.mark.parametrize("method", ["rows:2", "lora:2"])
def test_the_trainer_trains_it(backbone, method):
    """Steps of the Trainer are gradient descent on delta, anchored or not."""
    start, split = backbone
    arguments = {
        "optim": "sgd",
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": len(split.train),
    }
    tuned = fine_tune(
        start,
        split,
        method,
        lrs=[0.5],
        arguments=arguments,
        anchor=Anchor(0.3),
        wrap=linearized,
        seed=3,
    )
    linear = tuned.model
    (batch,), order = start.encode(split.train, len(split.train))
    labels = torch.tensor([split.train[i].label for i in order])
    delta = torch.zeros_like(linear.delta)
    for _ in range(3):
        p = linear.predict(batch, delta).softmax(dim=1)
        gradient = linear.vjp(batch, (p - F.one_hot(labels)) / len(labels))
        delta = delta - 0.5 * (gradient + 0.3 * delta)
    assert delta.norm() > 1e-2
    assert_close(linear.delta.detach(), delta, 1e-4)
    (batch,), order = start.encode(split.test, len(split.test))
    result = linear.predict(batch)
    expected = tuned.logits[torch.tensor(order)]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert tuned.record["wrapped"] == "linearized"
    prepared = copy.deepcopy(start.module)
    prepared = apply_method(prepared, parse_method(method), train_head=True)
    counts = count_parameters(prepared, start.module)
    assert tuned.record["parameters"] == counts
    assert counts["head"] == 34
    assert counts["trainable"] == len(linear.delta)


# Coordinates of fine-tuned models.


def trained(module, inputs, steps=2):
    """Return a module after some steps of plain gradient descent."""
    module = copy.deepcopy(module).eval()
    optimizer = torch.optim.SGD(trained_parameters(module).values(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        called(module, inputs).logits.square().sum().backward()
        optimizer.step()
    return module


@pytest.mark.parametrize(
    "method", ["full", "rows:2", "rows:1+columns:1", "lora:2", "bitfit", "head"]
)
def test_a_fine_tuned_model_has_coordinates(method):
    family = BY_NAME["bert"]
    inputs = family.inputs()
    module = apply_method(
        family.build(), parse_method(method), train_head=True
    ).double()
    tuned = trained(module, inputs)
    linear = linearize(module, Full())
    result = linear.coordinates(tuned)
    before, after = trained_parameters(module), trained_parameters(tuned)
    expected = torch.cat([(after[n] - before[n]).detach().flatten() for n in before])
    assert expected.norm() > 1e-3
    assert torch.equal(result, expected)
    back = dict(linear.model_at(result).named_parameters())
    for name, parameter in tuned.named_parameters():
        assert_close(back[name].detach(), parameter.detach(), 1e-14, of=name)


def test_rows_that_rocoft_trained_have_coordinates_in_the_plain_model():
    family = BY_NAME["bert"]
    plain, inputs = family.build(), family.inputs()
    method = parse_method("rows:2+columns:2")
    module = apply_method(copy.deepcopy(plain), method, train_head=True).double()
    tuned = merged(trained(module, inputs))
    for space in (
        Rows(2) + Columns(2) + Head(),
        Rows(2, rescale=True) + Columns(2, rescale=True) + Head().at("classifier"),
    ):
        linear = linearize(plain, space)
        moved = linear.parameters_at(linear.coordinates(tuned))
        for name, parameter in tuned.named_parameters():
            expected = parameter.detach()
            result = moved.get(name, plain.get_parameter(name).detach())
            assert_close(result, expected, 1e-14, of=name)


def test_what_has_no_coordinates_is_refused():
    family = BY_NAME["bert"]
    plain, inputs = family.build(), family.inputs()
    tuned = trained(plain, inputs)
    with pytest.raises(SelectionError, match="moved by up to .* outside of the space"):
        linearize(plain, Rows(2) + Head()).coordinates(tuned)
    with pytest.raises(SelectionError, match="moves the B of LoRA at a fixed A"):
        linearize(plain, LoRA(2)).coordinates(tuned)
    method = parse_method("lora:2")
    other = apply_method(copy.deepcopy(plain), method, train_head=True)
    with pytest.raises(SelectionError, match="have not the same parameters: only one"):
        linearize(plain, Full()).coordinates(other)


# LoRA's kernels.


@pytest.mark.parametrize("drawn", [True, False])
def test_kernels_of_lora_add_up_over_the_layers(drawn):
    family = BY_NAME["bert"]
    model, inputs, space = family.build(), family.inputs(), LoRA(2)
    if not drawn:
        options = LoraConfig(r=2, target_modules=["query", "value", "dense"])
        model, space = get_peft_model(model, options).double(), LoRA()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
    layers = {f"{i}": space.layers(i) for i in range(2)}
    if not drawn:
        layers["pooler"] = space.at("pooler")
    kernels = empirical_ntk(model, inputs, space={"all": space, **layers})
    whole = kernels.pop("all")
    assert_close(sum(kernels.values()), whole, 1e-10)
    assert all(kernel.abs().max() > 1e-6 for kernel in kernels.values())
    parts = [g for n, g in gradients(model, inputs).items() if "lora_" in n]
    if not drawn:
        twin = sum(
            torch.einsum("ncp,mdp->nmcd", g.flatten(2), g.flatten(2)) for g in parts
        )
        assert_close(whole, twin, 1e-10)


# What is refused.


def test_refused():
    family = BY_NAME["mlp"]
    model, x = family.build(), family.inputs()
    linear = linearize(model, Full())
    with pytest.raises(FunctionError, match="got 2 positional and 0 named"):
        linear(x, x)
    with pytest.raises(FunctionError, match="got 0 positional and 0 named"):
        linear()
    with pytest.raises(ValueError, match=r"delta has shape \(3,\); expected \(1"):
        linear.jvp(x, torch.zeros(3))
    with pytest.raises(SelectionError, match="no parameters that require a gradient"):
        linearize(model.requires_grad_(False), Full())
    unread = Lambda(lambda m, x: m.layer(x)[:, None], layer=nn.Linear(8, 2)).double()
    with pytest.raises(FunctionError, match=r"outputs must have shape \(n, c\)"):
        linearize(unread, Full()).start(x)
