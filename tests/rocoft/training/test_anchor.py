"""Training held at its start: the steps by hand, the minimiser, and resumption."""

import copy
from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, reviews
from torch import nn
from transformers import Trainer, TrainingArguments

from rocoft.models.backbone import load_backbone
from rocoft.training.anchor import Anchor, anchored, starting_point
from rocoft.training.methods import apply_method, parse_method, trained_parameters
from rocoft.training.search import TrainingError
from rocoft.training.trainer import fine_tune

FLOAT = torch.float64
QUICK = {"num_train_epochs": 2, "per_device_train_batch_size": 4}


class Regression(nn.Module):
    """Squared error of a small network, in the form that Trainer takes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.idle = nn.Linear(2, 2).double()
        self.net[0].bias.requires_grad_(False)

    def forward(self, x, labels):
        outputs = self.net(x)[:, 0]
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def examples(n):
    return [
        {"x": torch.randn(3, dtype=FLOAT), "labels": torch.randn((), dtype=FLOAT)}
        for _ in range(n)
    ]


def stacked(rows):
    return [torch.stack([row[key] for row in rows]) for key in ("x", "labels")]


def trainer(model, data, folder, anchor, **options):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **defaults | options)
    return anchored(Trainer, anchor)(model, arguments, train_dataset=data)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw_torch": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
}


def by_hand(model, data, anchor, *, optim, accumulate, clip, steps=4):
    """Train with the penalty in the loss; count the steps in which it pulled."""
    parameters = list(trained_parameters(model).values())
    start = [p.detach().clone() for p in parameters]
    optimizer, batches, pulled = OPTIMIZERS[optim](parameters), [], 0
    while len(batches) < steps:
        whole = [data[i : i + 2] for i in range(0, len(data), 2)]
        batches += [whole[i : i + accumulate] for i in range(0, len(whole), accumulate)]
    for group in batches[:steps]:
        losses = [model(x, labels)["loss"] for x, labels in map(stacked, group)]
        loss = sum(losses) / len(losses)
        slopes = torch.autograd.grad(
            loss, parameters, retain_graph=True, materialize_grads=True
        )
        moved = [p - q for p, q in zip(parameters, start, strict=True)]
        inner = sum((g * d).sum() for g, d in zip(slopes, moved, strict=True))
        if not anchor.selective or inner >= 0:
            loss = loss + anchor.strength / 2 * sum(d.square().sum() for d in moved)
            pulled += 1
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return pulled


@pytest.mark.parametrize("optim", list(OPTIMIZERS))
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize(("n", "accumulate"), [(6, 1), (6, 3), (7, 3)])
def test_steps_are_those_of_the_penalised_loss(tmp_path, optim, clip, n, accumulate):
    """Whatever the optimizer, the accumulation and the clipping."""
    model, data, anchor = Regression(), examples(n), Anchor(2.0)
    twin = copy.deepcopy(model)
    made = trainer(
        model,
        data,
        tmp_path,
        anchor,
        optim=optim,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
    )
    made.train()
    by_hand(twin, data, anchor, optim=optim, accumulate=accumulate, clip=clip)
    free = copy.deepcopy(made.start)
    for name, parameter in twin.named_parameters():
        found = model.get_parameter(name)
        torch.testing.assert_close(found, parameter, rtol=0, atol=1e-12, msg=name)
        if name in free and "idle" not in name:
            assert (found - free[name]).abs().max() > 1e-5, name
    assert set(free) == set(trained_parameters(twin))


def test_selective_pulls_only_where_the_loss_agrees(tmp_path):
    """Some steps pull and some do not, and each is that of the twin."""
    data, anchor = examples(6), Anchor(1.0, selective=True)
    counts = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Regression()
        twin = copy.deepcopy(model)
        options = {"optim": "sgd", "max_steps": 9}
        trainer(model, data, tmp_path, anchor, **options).train()
        pulled = by_hand(
            twin, data, anchor, optim="sgd", accumulate=1, clip=0.0, steps=9
        )
        counts.append(pulled)
        for name, parameter in twin.named_parameters():
            found = model.get_parameter(name)
            torch.testing.assert_close(found, parameter, rtol=0, atol=1e-12, msg=name)
    # The first step is at the start, where the product is zero.
    assert all(count >= 1 for count in counts)
    assert any(1 < count < 9 for count in counts)


def test_clipping_does_not_move_the_minimiser(tmp_path):
    """Where lambda ||theta - theta0|| = ||grad loss|| is far above what is clipped."""
    model, data, strength = Regression(), examples(6), 2.0
    for example in data:
        example["labels"] += 4
    made = trainer(
        model,
        data,
        tmp_path,
        Anchor(strength),
        optim="sgd",
        per_device_train_batch_size=6,
        learning_rate=0.05,
        max_grad_norm=0.5,
        max_steps=500,
    )
    made.train()
    model.zero_grad()
    model(*stacked(data))["loss"].backward()
    trained = trained_parameters(model.net)
    norm = torch.cat([p.grad.flatten() for p in trained.values()]).norm()
    assert norm > 2
    for name, parameter in trained.items():
        pull = strength * (parameter - made.start[f"net.{name}"])
        torch.testing.assert_close(pull, -parameter.grad, rtol=1e-6, atol=1e-6)


def test_a_pull_of_zero_changes_no_bit(tmp_path):
    model, data = Regression(), examples(6)
    twin = copy.deepcopy(model)
    trainer(model, data, tmp_path, Anchor(0.0)).train()
    plain = trainer(twin, data, tmp_path, Anchor(0.0))
    Trainer(twin, plain.args, train_dataset=data).train()
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_a_scaled_gradient_is_pulled_as_much():
    """As half precision scales losses, and unscales gradients before the step."""
    model = Regression()
    start = starting_point(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        (scale * model(torch.ones(2, 3, dtype=FLOAT), torch.ones(2))["loss"]).backward()
        assert Anchor(0.7).pull(model, start, scale=scale)
        grads = [p.grad for p in trained_parameters(model).values()]
        found.append(torch.cat([g.flatten() for g in grads]) / scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    # What the loss does not reach is pulled as well.
    expected = 0.7 * (model.idle.weight - start["idle.weight"])
    torch.testing.assert_close(model.idle.weight.grad / 1024, expected)


# Fine-tuning by every method.


@pytest.fixture(scope="module")
def split():
    return replace(reviews(16, test=6), dev=reviews(24, test=0).train[16:])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("model"))[0]
    return load_backbone(folder, split, head="random")


def started(backbone, method, seed):
    """Return what the method trains before the first step."""
    module = copy.deepcopy(backbone.module)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = apply_method(module, parse_method(method), train_head=True)
    return {n: p.detach().clone() for n, p in trained_parameters(module).items()}


@pytest.mark.parametrize("method", ["full", "rows:2", "lora:2"])
def test_the_start_is_what_each_method_begins_with(backbone, split, method):
    """Zero for RoCoFT's differences, the drawn A of LoRA, the start of a new head."""
    arguments = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "per_device_train_batch_size": 4,
    }
    options = {"lrs": [0.05], "arguments": arguments, "seed": 5}
    start, moved = started(backbone, method, 5), []
    for anchor in (None, Anchor(10.0)):
        tuned = fine_tune(backbone, split, method, anchor=anchor, **options)
        after = trained_parameters(tuned.model)
        assert start.keys() == after.keys()
        change = [(after[n] - start[n]).detach().flatten() for n in start]
        moved.append(float(torch.cat(change).norm()))
        expected = anchor and {"strength": 10.0, "selective": False}
        assert tuned.record["anchor"] == expected
    assert 0 < moved[1] < 0.7 * moved[0]
    if method == "lora:2":
        drawn = [v for n, v in start.items() if "lora_A" in n]
        assert min(v.abs().max() for v in drawn) > 0.1
        # Pulled to zero instead, A would have shrunk to nothing.
        for name, value in start.items():
            if "lora_A" in name:
                torch.testing.assert_close(after[name], value, rtol=0, atol=0.05)


@pytest.mark.parametrize("method", ["full", "lora:2"])
def test_a_resumed_training_is_anchored_where_it_began(
    backbone, split, method, tmp_path, monkeypatch
):
    options = {"lrs": [1e-2], "anchor": Anchor(0.1), "resume": True}
    options["arguments"] = {**QUICK, "num_train_epochs": 3}
    whole = fine_tune(backbone, split, method, folder=tmp_path / "a", **options)
    assert whole.record["dev"]["step"] == 12, "no step after the interruption counts"
    save = Trainer._save_checkpoint

    def killed(*args):
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(backbone, split, method, folder=tmp_path / "b", **options)
    assert list((tmp_path / "b").glob("lr-*/checkpoint-4"))
    resumed = fine_tune(backbone, split, method, folder=tmp_path / "b", **options)
    assert resumed.record["learning_rates"][0]["steps_timed"] == 8
    assert torch.equal(resumed.logits, whole.logits)
    for name, parameter in trained_parameters(whole.model).items():
        assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_another_anchor_or_wrapper_is_refused_on_resumption(backbone, split, tmp_path):
    options = {"lrs": [1e-2], "arguments": QUICK, "folder": tmp_path / "search"}
    fine_tune(backbone, split, "rows:1", anchor=Anchor(1.0), **options)
    for other in (None, Anchor(2.0), Anchor(1.0, selective=True)):
        with pytest.raises(TrainingError, match="other settings: anchor .* there"):
            fine_tune(backbone, split, "rows:1", anchor=other, resume=True, **options)
    options |= {"anchor": Anchor(1.0), "resume": True}
    with pytest.raises(TrainingError, match="wrapped None there, Sequential now"):
        fine_tune(backbone, split, "rows:1", wrap=nn.Sequential, **options)


def test_refused(backbone, split, tmp_path):
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a finite number of at least 0"):
            Anchor(strength)
    with pytest.raises(TrainingError, match="'probe' takes no steps"):
        fine_tune(backbone, split, "probe", anchor=Anchor(1.0))
    with pytest.raises(TrainingError, match="'probe' takes no steps"):
        fine_tune(backbone, split, "probe", wrap=nn.Sequential)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="model_init= makes another model"):
        anchored(Trainer, Anchor(1.0))(args=arguments, model_init=Regression)
