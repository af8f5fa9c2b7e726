"""What a Trainer of logits minimises, in which mode, and which weights it leaves."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from checkpoints import checkpoint, reviews

from rocoft.data.tasks import Example
from rocoft.models.backbone import load_backbone
from rocoft.training.anchor import Anchor
from rocoft.training.methods import trained_parameters
from rocoft.training.readout_trainer import readout_loss
from rocoft.training.search import TrainingError
from rocoft.training.trainer import fine_tune

FLOAT = torch.float64
PLAIN = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def split():
    return replace(reviews(24, test=12), dev=reviews(32, test=0).train[24:])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("model"))[0]
    return load_backbone(folder, split, head="random", dtype=FLOAT)


def weights(model):
    return {n: p.detach().clone() for n, p in trained_parameters(model).items()}


# Losses.


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_losses_by_hand(loss, smoothing):
    outputs, labels = torch.randn(5, 3, dtype=FLOAT), torch.tensor([0, 2, 1, 1, 0])
    found = readout_loss(outputs, labels, loss, smoothing=smoothing)
    total = 0.0
    for row, label in zip(outputs.tolist(), labels.tolist(), strict=True):
        norm = math.log(sum(map(math.exp, row)))
        for k, value in enumerate(row):
            target = (1 - smoothing) * (k == label) + smoothing / 3
            if loss == "squared":
                total += (value - target) ** 2
            else:
                total -= target * (value - norm)
    assert float(found) == pytest.approx(total / 5, rel=1e-12)
    assert readout_loss(outputs.bfloat16(), labels, loss).dtype == torch.float32


def test_scores_have_squared_errors_whatever_the_loss():
    outputs, labels = torch.randn(4, 1, dtype=FLOAT), torch.rand(4)
    expected = sum((outputs[i, 0] - labels[i]) ** 2 for i in range(4)) / 4
    for loss in ("cross_entropy", "squared"):
        assert readout_loss(outputs, labels, loss) == pytest.approx(float(expected))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_without_dropout_steps_are_gradient_descent_in_evaluation_mode(
    backbone, split, loss
):
    n = len(split.train)
    arguments = {**PLAIN, "max_steps": 3, "per_device_train_batch_size": n}
    arguments |= {"eval_strategy": "steps", "eval_steps": 3}
    options = {"lrs": [0.05], "arguments": arguments, "keep": "last", "loss": loss}
    tuned = fine_tune(backbone, split, "full", dropout=False, **options)
    module = copy.deepcopy(backbone.module).eval()
    dropouts = [m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)]
    assert max(dropouts) > 0
    (batch,), order = backbone.encode(split.train, n)
    labels = torch.tensor([split.train[i].label for i in order])
    for _ in range(3):
        found = readout_loss(module(**batch).logits, labels, loss)
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(found, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(0.05 * gradient)
    for (name, one), other in zip(
        tuned.model.named_parameters(), module.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)
    assert tuned.record["loss"] == loss
    assert tuned.record["dropout"] is False
    noisy = fine_tune(backbone, split, "full", dropout=True, **options)
    gap = (noisy.logits - tuned.logits).abs().max()
    assert gap > 1e-6


# Which weights count.

QUICK = {"num_train_epochs": 4, "per_device_train_batch_size": 4}


def test_the_last_weights_are_those_that_training_ends_with(
    backbone, split, monkeypatch
):
    """Dev scores that only fall make the first checkpoint the best."""
    import rocoft.training.trainer as module

    counted = iter(range(1000))

    def falling(outputs, labels, names):
        return dict.fromkeys(names, 1.0 - next(counted) / 1000)

    monkeypatch.setattr(module, "scores", falling)
    found = {
        keep: fine_tune(
            backbone, split, "rows:1", lrs=[2e-2], arguments=QUICK, keep=keep
        )
        for keep in ("best", "last")
    }
    assert found["best"].record["dev"]["step"] == 6
    assert found["last"].record["dev"]["step"] == 24
    assert found["last"].record["keep"] == "last"
    # The best of a training of one epoch with the same schedule is another run's.
    assert (found["best"].logits - found["last"].logits).abs().max() > 1e-4
    steps = [e["step"] for e in found["last"].record["learning_rates"][0]["history"]]
    assert steps == [6, 12, 18, 24]


def test_the_end_is_judged_though_no_evaluation_falls_on_it(backbone, split):
    arguments = {**QUICK, "eval_strategy": "steps", "eval_steps": 7}
    # An evaluation takes random numbers that dropout would get.
    options = {"lrs": [2e-2], "keep": "last", "dropout": False}
    tuned = fine_tune(backbone, split, "rows:1", arguments=arguments, **options)
    history = tuned.record["learning_rates"][0]["history"]
    assert [entry["step"] for entry in history] == [7, 14, 21, 24]
    assert tuned.record["dev"] == history[-1]
    without = {**QUICK, "eval_strategy": "no"}
    none = fine_tune(backbone, split, "rows:1", arguments=without, **options)
    assert torch.equal(none.logits, tuned.logits)
    assert none.record["dev"]["accuracy"] == tuned.record["dev"]["accuracy"]


def test_the_last_weights_after_an_end_that_was_not_recorded(
    backbone, split, tmp_path, monkeypatch
):
    """Killed after the last checkpoint, before what it came to was written."""
    import rocoft.training.search as module

    options = {"lrs": [2e-2], "arguments": QUICK, "keep": "last"}
    whole = fine_tune(backbone, split, "rows:1", **options)
    options |= {"folder": tmp_path / "search", "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fine_tune(backbone, split, "rows:1", **options)
    again = fine_tune(backbone, split, "rows:1", **options)
    assert torch.equal(again.logits, whole.logits)
    assert again.record["dev"] == whole.record["dev"]
    settings = json.loads((tmp_path / "search" / "settings.json").read_text())
    assert settings["keep"] == "last"
    with pytest.raises(TrainingError, match="keep last there, best now"):
        fine_tune(backbone, split, "rows:1", **{**options, "keep": "best"})


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "last", "patience": 2}, "patience=2 stops a training at its best"),
        (
            {"dropout": False, "arguments": {"gradient_checkpointing": True}},
            "gradient_checkpointing works in training mode only",
        ),
    ],
)
def test_what_does_not_go_together(backbone, split, options, message):
    with pytest.raises(TrainingError, match=message):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], **options)


@pytest.mark.parametrize(
    "option", [{"loss": "squared"}, {"dropout": False}, {"keep": "last"}]
)
def test_a_probe_takes_no_steps(backbone, split, option):
    with pytest.raises(TrainingError, match="'probe' takes no steps"):
        fine_tune(backbone, split, "probe", **option)


def test_scores_have_no_cross_entropy(backbone, split):
    task = replace(split.task, labels=("score",))
    with pytest.raises(TrainingError, match="loss='cross_entropy' is for classes"):
        fine_tune(backbone, replace(split, task=task), "rows:1", loss="cross_entropy")


@pytest.fixture(scope="module")
def precise(tmp_path_factory):
    split = replace(reviews(28, test=4), dev=reviews(32, test=0).train[28:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("precise"))[0]
    return split, folder


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        *(((size, number), {}) for size, number in ((5, 6), (27, 2), (1, 28))),
        ((16, 2), {}),
        ((16, 2), {"loss": "squared"}),
        ((16, 2), {"anchor": Anchor(0.5)}),
        ((16, 2), {"arguments": {"label_smoothing_factor": 0.2}}),
        ((16, 2), {"scored": True}),
    ],
)
def test_uneven_accumulated_batches_are_one_large_batch(precise, sizes, options):
    split, folder = precise
    if options.get("scored"):
        examples = {
            part: tuple(
                Example(e.a, None, -100.0 if i == 3 else i / 7)
                for i, e in enumerate(getattr(split, part))
            )
            for part in ("train", "dev", "test")
        }
        task = replace(
            split.task,
            labels=("score",),
            train=examples["train"],
            test=examples["test"],
        )
        split = replace(split, task=task, **examples)
    backbone = load_backbone(folder, split, head="random", dtype=torch.float64)
    start = weights(backbone.module)

    def step(size, accumulate):
        tuned = fine_tune(
            backbone,
            split,
            "full",
            lrs=[1e-2],
            keep="last",
            dropout=False,
            arguments={
                "optim": "sgd",
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "num_train_epochs": 1,
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": accumulate,
                **options.get("arguments", {}),
            },
            **{k: v for k, v in options.items() if k in ("loss", "anchor")},
        )
        (run,) = tuned.record["learning_rates"]
        assert run["steps"] == 1
        return weights(tuned.model), run["train_loss"]

    one, loss = step(28, 1)
    many, mean = step(*sizes)
    length = torch.cat([(one[n] - start[n]).flatten() for n in one]).norm()
    apart = torch.cat([(one[n] - many[n]).flatten() for n in one]).norm()
    assert length > 0
    assert apart <= 1e-9 * length
    assert mean == pytest.approx(loss, rel=1e-9)
