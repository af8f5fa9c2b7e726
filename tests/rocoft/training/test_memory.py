"""How RoCoFT trains: gradients, optimizers, precisions, transforms of torch."""

from copy import deepcopy

import pytest
import torch
from adapted import AXES, FAMILIES, adapted, bert, layers, named, read
from cases import BY_NAME, SHORT, classifier
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from rocoft import RoCoFTConfig


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_slices_of_the_full_gradient(name, axis):
    family = BY_NAME[name]
    inputs, outputs = family.inputs(), read(family)
    twin = family.build()
    outputs(twin(**inputs)).square().sum().backward()
    model = adapted(family.build(), axis=axis, selection="random", filled=False)
    outputs(model(**inputs)).square().sum().backward()
    for module, layer in layers(model).items():
        of_weight = twin.get_submodule(module).weight.grad
        full = of_weight.t() if layer._transposed else of_weight
        kept = layer.tensors("default")
        rows = kept.get("rocoft_row_indices", torch.tensor([], dtype=torch.long))
        rest = torch.tensor([i for i in range(len(full)) if i not in rows.tolist()])
        if "rocoft_rows" in kept:
            found = layer.rocoft_rows["default"].grad
            torch.testing.assert_close(found, full[rows], rtol=1e-10, atol=1e-12)
        if "rocoft_columns" in kept:
            found = layer.rocoft_columns["default"].grad
            columns = full[rest][:, kept["rocoft_column_indices"]]
            torch.testing.assert_close(found, columns, rtol=1e-10, atol=1e-12)


class Masked(nn.Module):
    """The dumb twin: a whole difference to each weight whose gradient is masked."""

    def __init__(self, base, masks):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.masks = masks
        self.deltas = nn.ParameterList(map(torch.zeros_like, masks.values()))
        for delta, mask in zip(self.deltas, masks.values(), strict=True):
            delta.register_hook(lambda g, mask=mask: g * mask)

    def forward(self, **inputs):
        weights = {
            f"{name}.weight": self.base.get_submodule(name).weight + delta
            for name, delta in zip(self.masks, self.deltas, strict=True)
        }
        return functional_call(self.base, weights, (), inputs)


def masks_of(model):
    found = {}
    for name, layer in layers(model).items():
        kept = layer.tensors("default")
        mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
        if "rocoft_rows" in kept:
            mask[kept["rocoft_row_indices"]] = 1
        if "rocoft_columns" in kept:
            mask[:, kept["rocoft_column_indices"]] = 1
        found[name] = mask.t() if layer._transposed else mask
    return found


def train(model, outputs, inputs, parameters, steps=20):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = outputs(model(**inputs)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_twenty_adamw_steps_equal_masked_training(name, axis):
    family = BY_NAME[name]
    inputs, outputs = family.inputs(), read(family)
    model = adapted(family.build(), axis=axis, selection="random", filled=False)
    masks = masks_of(model)
    twin = Masked(family.build(), masks)
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = train(model, outputs, inputs, trainable)
    expected = train(twin, outputs, inputs, twin.deltas)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert found[-1] < 0.9 * found[0]
    for layer, mask, delta in zip(
        layers(model).values(), masks.values(), twin.deltas, strict=True
    ):
        own = layer.get_delta_weight("default")
        torch.testing.assert_close(own, delta, rtol=1e-7, atol=1e-9)
        # Not one number outside the selection has moved.
        assert not own[mask == 0].any()
        assert not delta[mask == 0].any()


@pytest.mark.parametrize("axis", ["row", "column", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_adamw_steps_equal_masked_training_bit_for_bit(axis, dtype):
    # Whole numbers, whose sums are exact in any order. Where the pretrained numbers are
    # zero, W + D rounds nothing either, so D is the trained weight itself.
    base = nn.Sequential(nn.Linear(6, 5, bias=False)).to(dtype)
    with torch.no_grad():
        base[0].weight.copy_(torch.randint(-4, 5, (5, 6)))
    x = torch.randint(-3, 4, (4, 6)).to(dtype)
    g = torch.randint(-3, 4, (4, 5)).to(dtype)
    config = RoCoFTConfig(r=2, axis=axis, selection="random", target_modules=["0"])
    model = get_peft_model(deepcopy(base), config)
    layer = layers(model)["0"]
    mask = masks_of(model)["0"].to(dtype)
    with torch.no_grad():
        for module in (base[0], layer.base_layer):
            module.weight.mul_(1 - mask)
    base[0].weight.register_hook(lambda gradient: gradient * mask)
    for module in (model, base):
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for step in range(20):
            optimizer.zero_grad()
            (module(x) * g * (step % 3 - 1)).sum().backward()
            optimizer.step()
    delta = layer.get_delta_weight("default")
    assert delta[mask == 1].abs().min() > 0
    layer.merge()
    assert torch.equal(layer.base_layer.weight, base[0].weight)


def loss_and_gradients(model, inputs, outputs, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = outputs(model(**inputs)).float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in named(model, ".rocoft_").items()}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    family = BY_NAME[name]
    model = adapted(family.build(), axis="both", selection="random")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs, outputs = family.inputs(), read(family)
    expected = loss_and_gradients(model, inputs, outputs)
    model.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    model.base_model.model.enable_input_require_grads()
    found = loss_and_gradients(model, inputs, outputs)
    assert torch.equal(found[0], expected[0])
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", ["row", "column", "both"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_autocast_trains_as_full_training_does_under_it(name, axis):
    family = BY_NAME[name]
    inputs, outputs = family.inputs(), read(family)
    model = adapted(family.build().float(), axis=axis, filled=False)
    twin = family.build().float()
    loss, gradients = loss_and_gradients(model, inputs, outputs, autocast=True)
    expected, _ = loss_and_gradients(twin, inputs, outputs, autocast=True)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for module, layer in layers(model).items():
        full = twin.get_submodule(module).weight.grad
        full = full.t() if layer._transposed else full
        side = "columns" if axis == "column" else "rows"
        gradient = gradients[f"base_model.model.{module}.rocoft_{side}.default"]
        rows = layer.tensors("default").get("rocoft_row_indices")
        slice_ = full[:, :2] if rows is None else full[rows]
        assert gradient.dtype == torch.float32
        assert (
            torch.cosine_similarity(gradient.flatten(), slice_.flatten(), dim=0) > 0.98
        )


def test_low_precision_base_keeps_slices_in_float32():
    family = BY_NAME["bert"]
    model = adapted(family.build().bfloat16(), axis="both")
    dtypes = {p.dtype for p in named(model, ".rocoft_").values()}
    assert dtypes == {torch.float32}
    logits = model(**family.inputs()).logits
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in named(model, "rocoft_").values())


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("bert", "row"),
        ("gpt2", "both"),
        pytest.param("bert", "column", marks=pytest.mark.slow),
        pytest.param("llama", "both", marks=pytest.mark.slow),
    ],
)
def test_whole_model_compiles_to_one_graph(name, axis):
    torch.compiler.reset()
    family = BY_NAME[name]
    inputs, outputs = family.inputs(), read(family)
    # Masks are made from data, which breaks graphs of every model alike.
    inputs = {"input_ids": inputs["input_ids"].clamp(min=4)}
    if name == "gpt2":
        inputs["input_ids"] = inputs["input_ids"][:1]
    model = adapted(family.build(), axis=axis, selection="random")
    expected = loss_and_gradients(model, inputs, outputs)
    body = model.base_model.model.base_model
    twin = deepcopy(model)
    hidden = body(**inputs).last_hidden_state
    body = twin.base_model.model.base_model
    compiled = torch.compile(body, backend="aot_eager", fullgraph=True)
    found = compiled(**inputs).last_hidden_state
    torch.testing.assert_close(found, hidden, rtol=1e-9, atol=1e-9)
    for m, out in ((model, hidden), (twin, found)):
        m.zero_grad()
        out.square().sum().backward()
    for key, parameter in named(twin, ".rocoft_").items():
        other = model.get_parameter(key).grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-9, atol=1e-9)
    assert expected[0].isfinite()


@pytest.mark.parametrize("axis", ["row", "column", "both"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_per_sample_gradients_by_vmap(name, axis):
    family = BY_NAME[name]
    model = adapted(family.build(), axis=axis)
    # Other attention branches on the values of masks.
    model.base_model.model.set_attn_implementation("eager")
    tokens = family.inputs()["input_ids"].clamp(min=4)
    slices = {n: p.detach() for n, p in named(model, ".rocoft_").items()}

    def loss(slices, tokens):
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": torch.ones_like(tokens)[None],
        }
        output = functional_call(model, slices, (), inputs)
        return read(family)(output).square().sum()

    found = vmap(grad(loss), (None, 0))(slices, tokens)
    for i in range(len(tokens)):
        model.zero_grad()
        loss({}, tokens[i]).backward()
        for key, parameter in named(model, ".rocoft_").items():
            torch.testing.assert_close(
                found[key][i], parameter.grad, rtol=1e-9, atol=1e-10
            )


def test_plain_checkpoint_function():
    layer = next(iter(layers(adapted(bert(), axis="both")).values()))
    x = torch.randn(3, 4, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(
        layer(x).tanh().sum(), [x, *layer.rocoft_rows.values()]
    )
    for reentrant in (False, True):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        x.grad = None
        layer.zero_grad()
        y.tanh().sum().backward()
        assert torch.equal(x.grad, expected[0])
        assert torch.equal(layer.rocoft_rows["default"].grad, expected[1])


def test_twenty_steps_of_a_real_classifier_lower_its_loss():
    torch.manual_seed(0)
    model = classifier("Roberta", SHORT)()
    config = RoCoFTConfig(r=3, axis="auto", task_type="SEQ_CLS")
    model = get_peft_model(model, config)
    tokens = torch.randint(4, 60, (8, 7))
    labels = torch.arange(8) % 2
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
