"""The folder of a run: nothing of the user's is lost, whatever goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import checkpoint
from commands import exit_code
from tasks_on_disk import write_reviews

from rocoft import train
from rocoft.commands.folders import claimed
from rocoft.commands.main import DONE
from rocoft.training import run as running
from rocoft.training.checkpoints import search_folder
from rocoft.training.results import RECORD

run = partial(exit_code, train.main)
QUICK = ("--max_steps", "2", "--device", "cpu", "--rows", "1", "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(folder / "tiny-bert")[0]
    return ["--model", model, "--data", write_reviews(folder / "words.tsv")]


@pytest.fixture
def asked(place, tmp_path):
    return [*place, "--output_dir", tmp_path, *QUICK]


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A folder with one finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    options = [*place, *QUICK, "--lr", "1e-2", "--name", "a"]
    assert run(*options, "--output_dir", folder) == 0
    return folder


@pytest.fixture
def done(finished, asked, tmp_path):
    """The options of a finished run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return [*asked, "--lr", "1e-2", "--name", "a"]


def files(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


# Wrong arguments that only a library knows.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr_scheduler_type warmup_stable_decay", "another --lr-scheduler-type"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr"),
        ("--optim galore_adamw", "galore_torch"),
        ("--optim lomo", "lomo_optim"),
        ("--optim adamw_torch_8bit", "torchao"),
        ("--optim nonsense", "nonsense"),
        ("--warmup_steps -1", "warmup_steps"),
    ],
)
def test_a_refused_run_is_not_in_the_way_of_the_corrected_one(
    asked, tmp_path, capsys, flags, said
):
    assert run(*asked, "--lr", "1e-2", "--name", "a", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_run_that_diverged_is_not_in_the_way(asked, tmp_path, capsys):
    assert run(*asked, "--lr", "1e30", "--name", "a") == 2
    assert "training diverged" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_failed_overwrite_gives_the_earlier_run_back(
    done, asked, tmp_path, monkeypatch, capsys, error, code
):
    before = files(tmp_path)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(running, "load_backbone", fail)
    assert run(*asked, "--lr", "2e-2", "--name", "a", "--overwrite") == code
    assert files(tmp_path) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_an_overwritten_run_goes_when_the_new_one_is_finished(
    done, asked, tmp_path, monkeypatch
):
    before = files(tmp_path / "a")

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_results", stop)
        options = [*asked, "--lr", "2e-2", "--name", "a"]
        assert run(*options, "--overwrite") == 130
    assert (tmp_path / "a" / "search" / "lr-0.02.json").is_file()
    assert files(tmp_path / ".unfinished" / "a" / "old") == before
    assert run(*options, "--resume") == 0
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("what", ["notes.txt", "report.json"])
def test_what_the_user_put_there_is_not_overwritten(done, tmp_path, capsys, what):
    (tmp_path / "a" / what).write_text("mine")
    before = files(tmp_path)
    assert run(*done, "--overwrite") == 2
    assert f"holds '{what}', which rocoft.train did not" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_configuration_that_looks_like_ours_is_not_ours(asked, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text("num_train_epochs: 3\n")
    assert run(*asked, "--name", "a", "--overwrite") == 2
    assert "is no earlier run" in capsys.readouterr().err
    assert os.listdir(tmp_path / "a") == ["config.yaml"]


# Two at once.


def test_two_resumptions_at_once(asked, tmp_path, capsys):
    options = [*asked, "--lr", "1e-2", "--name", "a", "--resume"]
    with claimed(tmp_path, "a", running.FOLDER):
        assert run(*options) == 2
    assert "another process writes" in capsys.readouterr().err
    assert run(*options) == DONE


# Edited records and configurations.


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "null",
        lambda text: text.replace('"test"', '"tset"'),
        lambda text: text.replace('"trainable": ', '"trainable": "many", "x": '),
        lambda text: "[" * 100_000,
    ],
)
def test_an_edited_record_is_refused_by_name(done, tmp_path, capsys, edit):
    file = tmp_path / "a" / RECORD
    file.write_text(edit(file.read_text()))
    assert run(*done, "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error


@pytest.mark.parametrize("text", ["", "[]", "a: [", "x: 1", "num_train_epochs: {}"])
def test_an_edited_configuration_is_refused(done, tmp_path, capsys, text):
    (tmp_path / "a" / "config.yaml").write_text(text)
    assert run(*done, "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no earlier run" in error or "begun with other options" in error


def test_what_is_damaged_can_be_begun_again(done, tmp_path):
    (tmp_path / "a" / RECORD).write_text("{")
    (tmp_path / "a" / "config.yaml").write_text("a: [")
    assert run(*done, "--overwrite") == 0
    assert json.loads((tmp_path / "a" / RECORD).read_text())["steps"] == 2


# What others called their things.


@pytest.mark.parametrize("name", ["runs [old]", "[red]x[/red]", "[/x]", ":smile:"])
def test_paths_are_printed_as_they_are(place, tmp_path, capsys, name):
    output = tmp_path / name
    quick = [option for option in QUICK if option != "--quiet"]
    options = [*place, *quick, "--lr", "1e-2", "--output", output, "--name", name[:9]]
    if "/" in name:
        options[-1] = "a"
    assert run(*options) == 0
    folder = output / options[-1]
    assert folder.is_dir()
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {folder}"


def test_names_in_a_model_card_are_text(place, tmp_path):
    data = tmp_path / "a<script>*b*`c`\n---\n[d](e).tsv"
    data.write_bytes(Path(place[-1]).read_bytes())
    options = [*place[:2], "--data", data, *QUICK, "--lr", "1e-2", "--name", "a"]
    assert run(*options, "--output_dir", tmp_path) == 0
    card = (tmp_path / "a" / "adapter" / "README.md").read_text()
    head, text = card.split("\n---\n")[0:2]
    facts = yaml.safe_load(head.removeprefix("---\n"))
    dataset = facts["model-index"][0]["results"][0]["dataset"]["name"]
    assert dataset == r"a<script>*b*`c`\n---\n[d](e)"
    assert "<script" not in text
    assert r"a&lt;script>\*b\*\`c\`" in text
    assert "[d](e)" not in text


# What killed processes leave.


@pytest.mark.slow
def test_temporary_folders_of_the_dead_go_with_the_next_search(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    foreign = tmp_path / "rocoft-search-mine.part"
    foreign.mkdir()
    script = (
        "import os, signal, tempfile, sys; tempfile.tempdir = sys.argv[1]\n"
        "from rocoft.training.checkpoints import search_folder\n"
        "with search_folder(None) as folder:\n"
        "    folder.mkdir(); (folder / 'x').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("x"))) == 1
    with search_folder(None) as one, search_folder(None) as other:
        assert not list(tmp_path.rglob("x"))
        assert one != other
        assert one.parent.is_dir()
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.slow
def test_kills_leave_nothing_behind_that_the_next_run_does_not_sweep(asked, tmp_path):
    options = [*asked, "--lr", "1e-2", "2e-2", "3e-2", "--resume", "--name", "a"]
    command = [sys.executable, "-m", "rocoft.train", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in range(3):
        process = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[3]
        )
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if sum(len(names) for *_, names in os.walk(tmp_path)) > 8 * number:
                process.kill()
            time.sleep(0.002)
        process.wait()
    assert run(*options) == 0
    assert os.listdir(tmp_path) == ["a"]
    names = {path.name for path in (tmp_path / "a").rglob("*")}
    assert not [name for name in names if name.endswith(".part")]
    assert json.loads((tmp_path / "a" / RECORD).read_text())["steps"] == 2
