"""Trainings that did not move, and what is said of them."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from checkpoints import checkpoint, reviews
from commands import exit_code
from tasks_on_disk import write_reviews

from rocoft import train
from rocoft.models.backbone import load_backbone
from rocoft.training.history import warnings
from rocoft.training.methods import trained_parameters
from rocoft.training.run import summary
from rocoft.training.search import TrainingError
from rocoft.training.trainer import fine_tune

run = partial(exit_code, train.main)
NEVER = r"training never moved: the chosen weights \(learning rate {}, step {} of {}\)"


@pytest.fixture(scope="module")
def split():
    return replace(reviews(24, test=12), dev=reviews(32, test=0).train[24:])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("model"))[0]
    return load_backbone(folder, split, head="random")


def tuned(backbone, split, rates, method="rows:2", **arguments):
    return fine_tune(
        backbone, split, method, lrs=rates, extensions=0, arguments=arguments
    )


def outputs_before(backbone, split):
    batches, order = backbone.encode(split.test, 64)
    with torch.no_grad():
        found = torch.cat([backbone.module(**batch).logits for batch in batches])
    return found[torch.tensor(order).argsort()]


@pytest.mark.parametrize("method", ["rows:2", "full", "lora:2", "head"])
def test_a_rate_of_zero_never_moves(backbone, split, method):
    result = tuned(backbone, split, [0.0], method, num_train_epochs=2)
    (text,) = result.record["warnings"]
    assert re.match(NEVER.format("0.0", 2, 4), text)
    assert result.record["distance_from_start"] == 0
    torch.testing.assert_close(result.logits, outputs_before(backbone, split))
    assert summary(result.record)[0] == f"warning: {text}"


def test_the_checkpoint_before_any_update_is_named(backbone, split):
    # The warm-up's first step has the rate 0; what follows is worse on dev.
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    result = tuned(backbone, split, [1e-7], warmup_steps=2, **arguments)
    assert result.record["dev"]["step"] == 1
    (text,) = result.record["warnings"]
    assert re.match(NEVER.format("1e-07", 1, 3), text)
    assert result.record["distance_from_start"] == 0


def test_the_distance_is_that_of_the_trained_parameters(backbone, split):
    result = tuned(backbone, split, [1e-2])
    after = trained_parameters(result.model)
    # RoCoFT's differences start at zero, the head where the backbone has it.
    squares = [
        float((p - _start(backbone, name)).double().square().sum())
        for name, p in after.items()
    ]
    assert result.record["distance_from_start"] == pytest.approx(sum(squares) ** 0.5)
    assert result.record["distance_from_start"] > 0
    assert not any("moved" in text for text in result.record["warnings"])


def _start(backbone, name):
    if ".rocoft_" in name:
        return torch.zeros(1)
    return backbone.module.get_parameter(f"classifier.{name.rpartition('.')[2]}")


def test_rates_too_small_to_change_an_output(backbone, split):
    result = tuned(backbone, split, [1e-30, 1e-29], num_train_epochs=2)
    first, second = result.record["warnings"]
    assert first.startswith("training changed no output: the loss on dev is ")
    assert "at all 4 evaluations" in first
    assert second.startswith("all 2 learning rates have the same accuracy on dev, ")
    assert result.record["distance_from_start"] > 0


def of(rate, score, *losses):
    dev = None if score is None else {"step": 2, "accuracy": score}
    history = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    return {"learning_rate": rate, "dev": dev, "steps": 4, "history": history}


@pytest.mark.parametrize(
    ("runs", "distance", "starts"),
    [
        ([of(0.1, 0.5, 1.0, 2.0)], 1.0, []),
        ([of(0.1, 0.5, 1.0, 1.0)], 1.0, ["training changed no output"]),
        ([of(0.1, 0.5, 1.0, 1.0)], 0.0, ["training never moved"]),
        ([of(0.1, 0.5, 1.0), of(0.2, 0.5, 2.0)], 1.0, ["all 2 learning rates"]),
        ([of(0.1, 0.5, 1.0), of(0.2, 0.6, 2.0)], 1.0, []),
        ([of(0.1, 0.5, 1.0), of(0.2, None, None)], 1.0, []),
        (
            [of(0.1, 0.5, 1.0), of(0.2, 0.5, 1.0)],
            0.0,
            ["training never moved", "all 2 learning rates"],
        ),
    ],
)
def test_what_is_said(runs, distance, starts):
    found = warnings(runs, runs[0], "accuracy", distance)
    assert len(found) == len(starts)
    for text, start in zip(found, starts, strict=True):
        assert text.startswith(start)


# Warm-up.


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 1},
        {"max_steps": 1, "warmup_steps": 0.5},
        {"max_steps": 2, "warmup_steps": 0.99},
        {"num_train_epochs": 0.01},
        {"max_steps": 3, "warmup_steps": 0.9, "lr_scheduler_type": "cosine"},
    ],
)
def test_a_warm_up_leaves_a_step_at_the_full_rate(backbone, split, arguments):
    result = tuned(backbone, split, [1e-2], **arguments)
    assert result.record["distance_from_start"] > 0
    assert not any("moved" in text for text in result.record["warnings"])
    assert result.record["arguments"]["warmup_steps"] == arguments.get(
        "warmup_steps", 0.06
    )


@pytest.mark.parametrize("steps", [3, 4, 100])
@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup"])
def test_a_warm_up_of_all_steps_is_refused(backbone, split, steps, scheduler):
    with pytest.raises(TrainingError, match=f"warmup_steps={steps} .* all 3 steps"):
        tuned(
            backbone,
            split,
            [1e-2],
            max_steps=3,
            warmup_steps=steps,
            lr_scheduler_type=scheduler,
        )


def test_a_schedule_without_warm_up_takes_any_number(backbone, split):
    arguments = {"max_steps": 2, "warmup_steps": 9, "lr_scheduler_type": "constant"}
    result = tuned(backbone, split, [1e-2], **arguments)
    assert result.record["distance_from_start"] > 0


# The command.


def test_the_command_says_it_first_in_the_record_and_on_the_card(tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(tmp_path / "tiny")[0]
    data = write_reviews(tmp_path / "words.tsv")
    options = ["--model", model, "--data", data, "--output_dir", tmp_path / "out"]
    options += ["--rows", 2, "--max-steps", 3, "--eval-strategy", "steps"]
    options += ["--eval-steps", 1, "--warmup-steps", 2, "--lr", "1e-9", "--name", "a"]
    assert run(*options) == 0
    lines = capsys.readouterr().out.splitlines()
    (said,) = [i for i, line in enumerate(lines) if "training never moved" in line]
    assert lines[said].startswith("warning: ")
    scores = [
        i for i, line in enumerate(lines) if line.startswith(("learning", "test"))
    ]
    assert said < min(scores)
    record = json.loads((tmp_path / "out" / "a" / "results.json").read_text())
    assert record["distance_from_start"] == 0
    assert lines[said] == f"warning: {record['warnings'][0]}"
    card = (tmp_path / "out" / "a" / "adapter" / "README.md").read_text()
    assert "Warning: training never moved" in card
    assert run(*options[:-2], "--warmup-steps", 3) == 2
    assert "warmup_steps=3 would take all 3 steps" in capsys.readouterr().err
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["a"]
