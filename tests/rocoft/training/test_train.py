"""The command: its files, its options, its exit codes, and a run that was killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import yaml
from checkpoints import checkpoint
from commands import exit_code
from peft import PeftModel
from safetensors.torch import load_file
from tasks_on_disk import write_reviews

from rocoft import train
from rocoft.commands.options import OptionError
from rocoft.data.tasks import PROMPTS, Prompt
from rocoft.models.location import locate
from rocoft.models.readouts import MeanPooled
from rocoft.training.grid import EXTENSIONS, grid_end
from rocoft.training.run import summary

QUICK = ["--lr", "1e-2", "--num_train_epochs", "2", "--device", "cpu"]


run = partial(exit_code, train.main)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint and examples for it."""
    folder = tmp_path_factory.mktemp("train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(folder / "tiny-bert")[0]
        masked = checkpoint(folder / "tiny-masked", "BertForMaskedLM")[0]
    data = write_reviews(folder / "words.tsv")
    return SimpleNamespace(folder=folder, model=model, masked=masked, data=data)


@pytest.fixture
def asked(place, tmp_path):
    """The options that every run here has."""
    return ["--model", place.model, "--data", place.data, "--output_dir", tmp_path]


def base(place, seed=0):
    """Return the model as the command starts with it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.AutoModelForSequenceClassification.from_pretrained(
            place.model, num_labels=2
        ).eval()


def predictions(folder):
    return load_file(folder / "predictions.safetensors")


def logits_of(model, place, folder):
    """Return a model's logits of the test examples, by their texts."""
    from rocoft.data.splits import full_split
    from rocoft.data.tasks import load_file

    split = full_split(load_file(place.data), seed=0)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([e.a for e in split.test], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


# One run.


def test_a_run_leaves_an_adapter_a_record_and_predictions(asked, place, capsys):
    assert run(*asked, *QUICK, "--lr", "1e-2", "3e-2", "--rows", 2, "--name", "a") == 0
    folder = asked[-1] / "a"
    names = {"adapter", "config.yaml", "predictions.safetensors", "results.json"}
    assert {p.name for p in folder.iterdir()} == {*names, ".written-by.json"}
    assert {f.name for f in folder.rglob("*") if not f.stat().st_mode & 0o044} == set()
    record = json.loads((folder / "results.json").read_text())
    rates = [r["learning_rate"] for r in record["learning_rates"]]
    # The best of two is at an end: there are more.
    assert rates[:2] == [0.01, 0.03]
    assert 3 <= len(rates) <= 2 + 2 * EXTENSIONS
    dev = {r["learning_rate"]: r["dev"]["accuracy"] for r in record["learning_rates"]}
    assert record["dev"]["accuracy"] == max(dev.values())
    assert record["rate_at_end"] == grid_end(dev)
    assert dev[record["learning_rate"]] == max(dev.values())
    # Two rows of 6 weights in 2 blocks of 16 inputs, the last of 24; a head of 17 x 2.
    body = 2 * 2 * (5 * 16 + 24)
    assert record["parameters"]["without_head"] == body
    assert record["parameters"]["trainable"] == body + 34
    assert record["seconds_per_step"] > 0
    assert record["peak_memory_bytes"] > 2**20
    printed = capsys.readouterr().out
    assert f"trainable parameters: {body + 34:,} with the head, {body:,}" in printed
    assert f"accuracy {100 * record['test']['accuracy']:.1f} %" in printed
    assert "learning rate 0.03: dev accuracy" in printed
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == [0.01, 0.03]


@pytest.mark.parametrize("spec", ["rows:2", "columns:1+bias", "lora:2", "dora:2"])
def test_adapters_load_in_plain_peft(asked, place, spec):
    assert run(*asked, *QUICK, "--method", spec, "--name", "a", "--quiet") == 0
    folder = asked[-1] / "a"
    model = PeftModel.from_pretrained(base(place), folder / "adapter").eval()
    expected = predictions(folder)["logits"]
    torch.testing.assert_close(
        logits_of(model, place, folder / "adapter"), expected, rtol=1e-5, atol=1e-6
    )
    start = logits_of(base(place), place, folder / "adapter")
    assert (start - expected).abs().max() > 1e-3, "nothing was trained"


@pytest.mark.parametrize("spec", ["full", "bitfit", "head", "probe", "masked rows:2"])
def test_models_load_in_plain_transformers(asked, place, spec):
    assert run(*asked, *QUICK, "--method", spec, "--name", "a", "--quiet") == 0
    folder = asked[-1] / "a"
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.testing.assert_close(
        logits_of(model.eval(), place, folder / "model"),
        predictions(folder)["logits"],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_prompted_model_is_saved_as_the_language_model_it_is(asked, place):
    options = ["--template", "{a} it {mask}", "--label_words", "dull", "fine"]
    asked[1] = place.masked
    for method in ("full", "rows:2"):
        name = method.replace(":", "")
        code = run(*asked, *QUICK, *options, "--method", method, "--name", name)
        assert code == 0
        folder = asked[-1] / name
        record = json.loads((folder / "results.json").read_text())
        assert record["readout"] == "masked"
        if method == "full":
            model = tf.AutoModelForMaskedLM.from_pretrained(folder / "model")
        else:
            model = tf.AutoModelForMaskedLM.from_pretrained(place.masked)
            model = PeftModel.from_pretrained(model, folder / "adapter")
        kind = "model" if method == "full" else "adapter"
        tokenizer = tf.AutoTokenizer.from_pretrained(folder / kind)
        from rocoft.data.splits import full_split
        from rocoft.data.tasks import load_file

        split = full_split(load_file(place.data), seed=0)
        text = f"{split.test[0].a} it [MASK]"
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**batch).logits[0]
        at = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        words = tokenizer.convert_tokens_to_ids(["dull", "fine"])
        expected = predictions(folder)["logits"][0]
        torch.testing.assert_close(logits[at, words], expected, rtol=1e-5, atol=1e-5)


def test_without_model_and_task_the_embedded_ones_and_it_says_so(tmp_path, capsys):
    few = ["--shots", 4, "--test_size", 8, "--lr", "1e-3", "--max_steps", 2]
    assert run(*few, "--output_dir", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "model: embedded MiniLM-L6" in printed
    assert "task: embedded reviews" in printed
    folder = tmp_path / "minilm-reviews-rows-3-seed0"
    record = json.loads((folder / "results.json").read_text())
    assert record["parameters"]["without_head"] == 62_208
    body = tf.AutoModel.from_pretrained(locate(None).path)
    body.pooler = None
    model = PeftModel.from_pretrained(MeanPooled(body, 2), folder / "adapter").eval()
    from rocoft.data.splits import few_shot
    from rocoft.data.tasks import load_task

    split = few_shot(load_task("reviews"), 4, 8, 0, dev_shots=4)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "adapter")
    texts = [e.a for e in split.test]
    with torch.no_grad():
        found = model(**tokenizer(texts, padding=True, return_tensors="pt"))
    torch.testing.assert_close(found, predictions(folder)["logits"], rtol=0, atol=1e-5)
    card = (folder / "adapter" / "README.md").read_text()
    assert "import rocoft" in card
    assert "locate('minilm').path" in card


def test_json_is_the_record_alone(asked, capsys):
    assert run(*asked, *QUICK, "--json", "--rows", 1, "--name", "a") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "rows:1"
    assert record["command"].startswith("python -m rocoft.train --model")


# A run that was killed.

LONG = ["--lr", "1e-2", "2e-2", "--max_steps", "60", "--eval_strategy", "steps"]
LONG += ["--eval_steps", "7", "--per_device_train_batch_size", "4", "--quiet"]
LONG += ["--early_stopping_patience", "5"]


def command(*arguments):
    return [sys.executable, "-m", "rocoft.train", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["rows:2+columns:2", "full"])
def test_a_killed_run_goes_on_to_the_same_weights(asked, spec):
    options = [*asked, *LONG, "--method", spec, "--resume", "--name"]
    assert run(*options, "whole") == 0
    # 43 training examples make 11 steps an epoch: 7 and 14 are in the middle of one.
    killed = asked[-1] / "killed"
    waited = "search/lr-0.02/checkpoint-14/trainer_state.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    process = subprocess.Popen(command(*options, "killed"), env=environment, cwd=root)
    end = time.monotonic() + 120
    while not (killed / waited).is_file() and time.monotonic() < end:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (killed / "search" / "lr-0.01.json").is_file()
    assert not (killed / "results.json").is_file()
    assert run(*options, "killed") == 0
    place = "model" if spec == "full" else "adapter"
    weights = "model.safetensors" if spec == "full" else "adapter_model.safetensors"
    for name in (f"{place}/{weights}", "predictions.safetensors"):
        pair = [load_file(asked[-1] / run / name) for run in ("whole", "killed")]
        assert pair[0].keys() == pair[1].keys()
        for key in pair[0]:
            assert torch.equal(pair[0][key], pair[1][key]), (name, key)
    records = [
        json.loads((asked[-1] / run / "results.json").read_text())
        for run in ("whole", "killed")
    ]
    for one, other in zip(*(r["learning_rates"] for r in records), strict=True):
        assert one["history"] == other["history"]
        assert one["dev"] == other["dev"]
        assert one["train_loss"] == other["train_loss"]
    timed = records[1]["learning_rates"][1]["steps_timed"]
    assert timed < records[0]["learning_rates"][1]["steps_timed"], "it began anew"


def test_overwriting_costs_no_run_by_accident(asked, capsys):
    options = [*asked, *QUICK, "--name", "a", "--quiet"]
    assert run(*options, "--rows", 1) == 0
    made = (asked[-1] / "a" / "results.json").read_bytes()
    assert run(*options, "--rows", 1, "--overwrite", "--resume") == 2
    assert "--overwrite removes an earlier run" in capsys.readouterr().err
    assert run(*options, "--method", "nothing", "--overwrite") == 2
    assert "'nothing' is none of rows" in capsys.readouterr().err
    assert (asked[-1] / "a" / "results.json").read_bytes() == made


def test_scores_are_shown_in_percent_but_log_likelihoods():
    record = {
        "parameters": {"trainable": 3, "total": 4, "without_head": 2},
        "learning_rates": [
            {"learning_rate": 1e-3, "dev": {"log_likelihood": -1.25}, "steps": 7}
        ],
        "learning_rate": 1e-3,
        "metric": "log_likelihood",
        "test": {"log_likelihood": -1.5, "exact_match": 0.8125},
        "examples": {"test": 16},
    }
    lines = summary(record)
    assert "learning rate 0.001: dev log_likelihood -1.2500, 7 steps, chosen" in lines
    assert lines[-1].endswith(": log_likelihood -1.5000, exact_match 81.2 %")


def test_a_finished_run_is_shown_again(asked, capsys):
    options = [*asked, *QUICK, "--rows", 1, "--name", "a"]
    assert run(*options) == 0
    first = capsys.readouterr().out
    made = (asked[-1] / "a" / "results.json").read_bytes()
    assert run(*options, "--resume") == 0
    again = capsys.readouterr().out
    assert "this run is finished" in again
    assert first.splitlines()[-2] in again
    assert (asked[-1] / "a" / "results.json").read_bytes() == made


def test_an_earlier_run_is_not_lost_by_accident(asked, capsys):
    options = [*asked, *QUICK, "--rows", 1, "--name", "a", "--quiet"]
    assert run(*options) == 0
    assert run(*options) == 2
    assert "holds an earlier run. Go on with --resume" in capsys.readouterr().err
    assert run(*options, "--resume", "--seed", 5) == 2
    error = capsys.readouterr().err
    assert "begun with other options: seed 0 there, 5 now" in error
    assert run(*options, "--overwrite", "--seed", 5) == 0
    config = yaml.safe_load((asked[-1] / "a" / "config.yaml").read_text())
    assert config["seed"] == 5
    (asked[-1] / "mine").mkdir()
    (asked[-1] / "mine" / "config.yaml").write_text("theirs: 1\n")
    assert run(*options[:-3], "--name", "mine", "--overwrite") == 2
    assert "exists and is no earlier run" in capsys.readouterr().err


# Options.


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rows: 5\nlr: [1.0e-3, 2.0e-3]\nnum-train-epochs: 7\nbf16: true\n")
    options = train.main.parse(["--config", str(file), "--lr", "3e-3"])
    assert options.spec() == "rows:5"
    assert options.training.lr == (3e-3,)
    assert options.training.num_train_epochs == 7.0
    assert options.training.bf16
    assert not train.main.parse(
        ["--config", str(file), "--bf16", "False"]
    ).training.bf16


def test_words_of_the_file_are_words(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "label_words: [Yes, No]\nbf16: yes\nseed: 012\ntemplate: ~\nshots: null\n"
        "test_size:\nlr: []\n"
    )
    options = train.main.parse(["--config", str(file)])
    assert options.task.label_words == ("Yes", "No")
    assert options.training.bf16
    assert options.task.seed == 12
    assert options.task.template is options.task.shots is options.task.test_size is None


def test_flags_and_file_are_judged_together(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("eval_strategy: steps\n")
    options = train.main.parse(["--config", str(file), "--eval_steps", "5"])
    assert options.training.eval_steps == 5
    file.write_text("resume: true\n")
    with pytest.raises(OptionError, match="Give one of them"):
        train.main.parse(["--config", str(file), "--overwrite"])


def test_the_resolved_options_are_a_configuration(asked):
    options = [*asked, *QUICK, "--columns", 1, "--name", "a", "--quiet"]
    assert run(*options) == 0
    file = asked[-1] / "a" / "config.yaml"
    again = train.main.parse(["--config", str(file)])
    assert again.resolved() == train.main.parse([str(o) for o in options]).resolved()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: 1", "'nonsense' is no option"),
        ("- 1", "must map options to values"),
        ("a: [", "cannot be read"),
    ],
)
def test_refused_files(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        train.main.parse(["--config", str(file)])


@pytest.mark.parametrize(
    ("flags", "spec"),
    [
        ("", "rows:3"),
        ("--rows 2 --columns 2", "rows:2+columns:2"),
        ("--columns 1 --strategy random --seed 4", "columns:1/strategy=random/seed=4"),
        ("--lora 8", "lora:8"),
        ("--method bitfit", "bitfit"),
    ],
)
def test_methods_by_flags(flags, spec):
    assert train.main.parse(flags.split()).spec() == spec


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rows 2 --lora 2", "one run trains one method"),
        ("--lora 2 --strategy max", "one run trains one method"),
        ("--method nothing", "'nothing' is none of rows, columns"),
        ("--rows 99", "99 .* 16"),
        ("--lr 0", "--lr: '0' must be a number above 0"),
        ("--shots 0", "--shots: '0' must be a whole number"),
        ("--num_train_epochs -1", "must be a number above 0"),
        ("--task sst2", "both name examples"),
        ("--readout masked", "readout='masked' needs a prompt"),
        ("--label_words good", "one of --label-words for each of the labels 0, 1"),
        ("--lr_scheduler_type sideways", "sideways"),
        ("--strategy best", "best"),
        ("--model /nowhere/at/all", "could not be loaded"),
        ("--eval_strategy steps --eval_steps 5 --device nowhere", "device='nowhere'"),
        ("--eval_steps 5", "--eval-steps 5 has no meaning with --eval-strategy epoch"),
        ("--data_dir elsewhere", "--data-dir 'elsewhere' both name examples"),
        ("--report_to pigeon", "tracker 'pigeon' of report_to cannot be used"),
    ],
)
def test_refused_options(asked, capsys, flags, message):
    assert run(*asked, "--name", "a", *flags.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (asked[-1] / "a").exists(), "a false start is in the way"


def test_prompts_need_a_language_model(tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    options = ["--data", file, "--output_dir", tmp_path, "--quiet"]
    assert run(*options, "--name", "a") == 2
    assert "which the embedded MiniLM cannot complete" in capsys.readouterr().err
    for name, value in (
        ("--shots", 4),
        ("--head-init", "probe"),
    ):
        assert run(*options, "--name", "b", name, value) == 2
        assert f"{name} has no meaning" in capsys.readouterr().err
    for name, value in (("--task", "sst2"), ("--data-dir", ".")):
        assert run(*options, "--name", "b", name, value) == 2
        assert f"{name} '{value}' both name examples" in capsys.readouterr().err


# Prompts.


def task_of(folder, name, *options):
    """Return a task with two pairs of texts as the command reads it."""
    place = folder / name
    place.mkdir(exist_ok=True)
    rows = [{"text_a": "a", "text_b": "b", "label": i} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "train.jsonl").write_text(text)
    given = ["--task", name, "--data_dir", str(folder), *options]
    return train.main.parse(given).task.load(regression=True)


def test_other_label_words_keep_the_causal_prompt(tmp_path):
    words = ["--label_words", "True", "Perhaps", "False"]
    prompt = task_of(tmp_path, "mnli", *words).prompt
    assert prompt == replace(PROMPTS["mnli"], words=("True", "Perhaps", "False"))
    template = ["--template", "{a} So {b}? {mask}"]
    prompt = task_of(tmp_path, "mnli", *template).prompt
    assert prompt == Prompt(template[1], PROMPTS["mnli"].words, "{a} So {b}?")


def test_a_causal_model_must_see_the_whole_example(place, tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(tmp_path / "model", "BertLMHeadModel", is_decoder=True)[0]
    words = ["--label_words", "dull", "fine"]
    asked = ["--model", model, "--output_dir", tmp_path, *QUICK, *words, "--quiet"]
    pairs = tmp_path / "pairs.tsv"
    rows = [f"film {i}\tplay\t{i % 2}\n" for i in range(40)]
    pairs.write_text("text_a\ttext_b\tlabel\n" + "".join(rows))
    for data, template, lost in (
        (place.data, "{mask} {a}", "{a}"),
        (pairs, "{a} {mask} {b}", "{b}"),
        (pairs, "it was {mask} {a} {b}", "{a} and {b}"),
    ):
        options = [*asked, "--data", data, "--template", template, "--name", "a"]
        assert run(*options) == 2
        error = capsys.readouterr().err
        assert f"has no {lost} before {{mask}}" in error, error
    options = [*asked, "--data", pairs, "--template", "{a} {b} it {mask}"]
    assert run(*options, "--name", "b") == 0
