"""What a search leaves on disk, what it goes on with, and what it does not touch."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoints import checkpoint, reviews
from tasks_on_disk import write_reviews
from transformers import Trainer
from transformers.integrations import integration_utils

from rocoft import train
from rocoft.data.tasks import Prompt
from rocoft.models.backbone import load_backbone
from rocoft.training.checkpoints import last_checkpoint
from rocoft.training.meter import TrainLoss
from rocoft.training.readout_trainer import ReadoutTrainer
from rocoft.training.run import summary
from rocoft.training.search import TrainingError
from rocoft.training.trainer import fine_tune

QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def split():
    return replace(reviews(24, test=12), dev=reviews(32, test=0).train[24:])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = checkpoint(tmp_path_factory.mktemp("model"))[0]
    return load_backbone(folder, split, head="random")


# Folders.


@pytest.mark.parametrize("resume", [False, True])
def test_what_is_no_search_is_not_removed(backbone, split, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match="holds files but no earlier search"):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], folder=tmp_path, resume=resume)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ['{"editor.tabSize": 4}', "[]", "{", '{"seed": 0}'])
@pytest.mark.parametrize("resume", [False, True])
def test_settings_of_another_program_are_not_removed(
    backbone, split, tmp_path, text, resume
):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(TrainingError, match="no earlier search: settings.json"):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], folder=tmp_path, resume=resume)
    assert (tmp_path / "settings.json").read_text() == text


def test_what_someone_put_into_a_search_is_not_removed(backbone, split, tmp_path):
    options = {"arguments": QUICK, "folder": tmp_path, "lrs": [1e-2]}
    fine_tune(backbone, split, "rows:1", **options)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="no earlier search: notes.txt"):
        fine_tune(backbone, split, "rows:1", **options)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("end", ["json", "safetensors"])
@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"dev": 1}'])
def test_a_damaged_training_is_done_again(backbone, split, tmp_path, end, text):
    options = {"arguments": QUICK, "folder": tmp_path, "lrs": [1e-2], "resume": True}
    whole = fine_tune(backbone, split, "rows:1", **options)
    (tmp_path / f"lr-0.01.{end}").write_text(text)
    again = fine_tune(backbone, split, "rows:1", **options)
    assert torch.equal(again.logits, whole.logits)


def test_an_earlier_search_is_replaced_unless_it_is_resumed(backbone, split, tmp_path):
    options = {"arguments": QUICK, "folder": tmp_path}
    fine_tune(backbone, split, "rows:1", lrs=[1e-2], **options)
    fine_tune(backbone, split, "rows:1", lrs=[2e-2], **options)
    assert [file.name for file in tmp_path.glob("lr-*.json")] == ["lr-0.02.json"]


def test_other_settings_are_refused_on_resumption(backbone, split, tmp_path):
    options = {"arguments": QUICK, "folder": tmp_path / "search", "resume": True}
    fine_tune(backbone, split, "rows:1", lrs=[1e-2], **options)
    with pytest.raises(
        TrainingError, match="begun with other settings: seed 0 there, 1"
    ):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], seed=1, **options)
    with pytest.raises(TrainingError, match="name rows:1, tiny, .* there, columns:1"):
        fine_tune(backbone, split, "columns:1", lrs=[1e-2], **options)


def test_other_examples_are_refused_on_resumption(backbone, split, tmp_path):
    options = {"lrs": [1e-2], "arguments": QUICK, "folder": tmp_path / "search"}
    options["resume"] = True
    fine_tune(backbone, split, "rows:1", **options)
    first, *rest = split.train
    others = {
        "examples_sha256": replace(split, train=(replace(first, label=1), *rest)),
        "split_seed": replace(split, seed=7),
    }
    for name, other in others.items():
        with pytest.raises(TrainingError, match=f"other settings: {name} .* there"):
            fine_tune(backbone, other, "rows:1", **options)
    with pytest.raises(TrainingError, match="metric accuracy there, macro_f1 now"):
        fine_tune(backbone, split, "rows:1", metrics=["macro_f1"], **options)


def test_another_readout_is_refused_on_resumption(tmp_path):
    folder = checkpoint(tmp_path / "model", "BertForMaskedLM")[0]
    template = "{a} it was {mask}"
    prompts = [
        Prompt(template, words, "{a} it was")
        for words in (("terrible", "great"), ("dull", "fine"))
    ]
    options = {"lrs": [1e-2], "arguments": QUICK, "folder": tmp_path / "search"}
    options["resume"] = True
    splits = [reviews(16, prompt=prompt, test=4) for prompt in prompts]
    splits = [replace(split, dev=split.train[8:]) for split in splits]
    fine_tune(load_backbone(folder, splits[0]), splits[0], "rows:1", **options)
    backbone = load_backbone(folder, splits[1])
    # No example tells which the label words are.
    with pytest.raises(TrainingError, match="label_words .*'great'. there, .*'fine'"):
        fine_tune(backbone, splits[1], "rows:1", **options)
    file = tmp_path / "search" / "settings.json"
    file.write_text(file.read_text().replace('"masked"', '"causal"'))
    with pytest.raises(TrainingError, match="readout causal there, masked now"):
        fine_tune(load_backbone(folder, splits[0]), splits[0], "rows:1", **options)


# Checkpoints.


def test_a_checkpoint_that_is_not_whole_is_not_used(tmp_path):
    files = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
    cut = {5: None, 7: None, 10: "trainer_state.json", 12: "", 14: "optimizer.pt"}
    cut |= {15: "scheduler.pt", 16: "rng_state.pth", 17: "model.safetensors"}
    for step, missing in cut.items():
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        for name in (*files, "trainer_state.json"):
            if name != missing:
                (place / name).write_text('{"a":' if missing == "" else "{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")


@pytest.mark.parametrize("stopped_by", ["max_steps", "patience", "epochs"])
def test_a_run_killed_after_itslast_checkpoint_takes_no_more_steps(
    backbone, split, tmp_path, monkeypatch, stopped_by
):
    # Six steps are an epoch.
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    options = {"lrs": [3e-2], "resume": True, "arguments": arguments}
    if stopped_by == "max_steps":
        arguments |= {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 4}
    if stopped_by == "patience":
        arguments |= {"eval_strategy": "steps", "eval_steps": 4}
        options |= {"lrs": [0.0], "patience": 1}
    whole = fine_tune(backbone, split, "rows:2", folder=tmp_path / "a", **options)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finalize_training", killed)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(backbone, split, "rows:2", folder=tmp_path / "b", **options)
    assert list((tmp_path / "b").glob("lr-*/checkpoint-*"))
    resumed = fine_tune(backbone, split, "rows:2", folder=tmp_path / "b", **options)
    assert torch.equal(resumed.logits, whole.logits)
    one, other = (t.record["learning_rates"][0] for t in (whole, resumed))
    for key in ("dev", "steps", "epochs", "history", "train_loss"):
        assert one[key] == other[key], key
    assert other["steps_timed"] == 0
    assert other["peak_memory_bytes"] is None


@pytest.mark.parametrize(("killed_at", "accumulate"), [(1, 1), (7, 1), (11, 2)])
def test_the_training_loss_is_that_of_all_steps_though_interrupted(
    backbone, split, tmp_path, monkeypatch, killed_at, accumulate
):
    # Six batches are an epoch; checkpoints fall into epochs and on their ends.
    arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 3}
    arguments |= {"gradient_accumulation_steps": accumulate}
    arguments |= {"eval_strategy": "steps", "eval_steps": 2}
    options = {"lrs": [3e-2], "resume": True, "arguments": arguments}
    compute, losses = ReadoutTrainer.compute_loss, []

    def spied(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = compute(self, model, inputs, return_outputs, num_items_in_batch)
        if not return_outputs:
            losses.append(float(found.detach()))
            if len(losses) == killed_at:
                raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ReadoutTrainer, "compute_loss", spied)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(backbone, split, "rows:2", folder=tmp_path / "b", **options)
        assert len(losses) == killed_at
        losses.extend([0.0] * 99)
        before = len(losses)
        whole = fine_tune(backbone, split, "rows:2", folder=tmp_path / "a", **options)
    resumed = fine_tune(backbone, split, "rows:2", folder=tmp_path / "b", **options)
    one, other = (t.record["learning_rates"][0] for t in (whole, resumed))
    steps = len(losses[before:]) / accumulate
    assert one["train_loss"] == pytest.approx(sum(losses[before:]) / steps, rel=1e-12)
    assert one["train_loss"] == other["train_loss"]
    assert torch.equal(resumed.logits, whole.logits)


def test_rates_that_differ_in_the_eighth_digit_have_files_of_their_own(
    backbone, split, tmp_path
):
    rates = [0.1, 0.10000004, 0.1000000000000001]
    options = {"arguments": QUICK, "folder": tmp_path, "extensions": 0}
    tuned = fine_tune(backbone, split, "rows:1", lrs=rates, **options)
    assert [run["learning_rate"] for run in tuned.record["learning_rates"]] == rates
    for ending in ("json", "safetensors"):
        files = {f"lr-{rate!r}.{ending}" for rate in rates}
        assert {file.name for file in tmp_path.glob(f"lr-*.{ending}")} == files
    lines = [line for line in summary(tuned.record) if line.startswith("learning")]
    assert [line.split()[2] for line in lines] == [f"{rate!r}:" for rate in rates]


def test_a_checkpoint_without_the_losses_of_its_steps_gives_no_mean():
    losses = TrainLoss()
    losses.add(torch.tensor(3.0))
    losses.on_step_end()
    assert losses.mean(1) == 3.0
    assert math.isnan(losses.mean(7))


# Trackers.


class Writer:
    """Stands for TensorBoard's: one line a number."""

    def __init__(self, log_dir):
        self.folder = Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)

    def add_text(self, *_):
        pass

    def add_scalar(self, name, value, step):
        with (self.folder / "events").open("a") as file:
            file.write(json.dumps([name, value, step]) + "\n")

    def flush(self):
        pass

    close = flush


@pytest.fixture
def tensorboard(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


@pytest.mark.usefixtures("tensorboard")
def test_logs_outlive_the_checkpoints(backbone, split, tmp_path):
    arguments = {**QUICK, "report_to": ["tensorboard"]}
    rates = [1e-2, 2e-2]
    fine_tune(
        backbone, split, "rows:1", lrs=rates, arguments=arguments, folder=tmp_path
    )
    for rate in rates:
        assert not list(tmp_path.glob(f"lr-{rate:g}/*"))
        lines = (tmp_path / "logs" / f"lr-{rate:g}" / "events").read_text()
        names = {json.loads(line)[0] for line in lines.splitlines()}
        assert "eval/accuracy" in names


@pytest.mark.usefixtures("tensorboard")
def test_the_command_keeps_the_logs_with_the_results(tmp_path):
    model = checkpoint(tmp_path / "model")[0]
    data = write_reviews(tmp_path / "words.tsv")
    code = train.main(
        f"--model {model} --data {data} --rows 1 --lr 1e-2 --num_train_epochs 1 "
        f"--output_dir {tmp_path} --name a --quiet --report_to tensorboard".split()
    )
    assert code == 0
    assert (tmp_path / "a" / "logs" / "lr-0.01" / "events").is_file()
    assert not (tmp_path / "a" / "search").exists()


def test_a_tracker_that_is_not_installed_is_named(
    backbone, split, tmp_path, monkeypatch
):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    arguments = {**QUICK, "report_to": ["tensorboard"]}
    with pytest.raises(TrainingError, match="tracker 'tensorboard' of report_to"):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], arguments=arguments)
    arguments["report_to"] = ["pigeon"]
    with pytest.raises(TrainingError, match="'pigeon' of report_to cannot be used"):
        fine_tune(backbone, split, "rows:1", lrs=[1e-2], arguments=arguments)
