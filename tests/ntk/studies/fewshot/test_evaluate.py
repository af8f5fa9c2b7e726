"""The few-shot study as a command: its records, its resumption, its refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from commands import exit_code, texts

from ntk import evaluate
from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.spaces.kinds import Full, Head, Rows
from ntk.studies.fewshot.records import kernel_records
from ntk.studies.fewshot.run import protocol, units
from ntk.studies.folder import Cell, Key, Study
from ntk.studies.protocol import Protocol
from rocoft.data.tasks import TaskError

TINY = (
    *("--shots", "4", "--test-size", "12", "--seeds", "13", "21"),
    *("--spaces", "full", "rows:1", "head", "--finetune", "head", "rows:1"),
    *("--num-train-epochs", "1", "--lrs", "head=1e-2", "rows:1=1e-3"),
)
CELL = Cell("reviews", 4, 13)


run = partial(exit_code, evaluate.main)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluate")
    assert run(*TINY, "--output", output, "--quiet") == 0
    folder = output / "fewshot"
    options = evaluate.main.parse(TINY)
    work = units(options, protocol(options))
    records = {k: Study(folder).read(k) for unit in work for k in unit.keys}
    return SimpleNamespace(folder=folder, records=records, output=output)


def test_every_record_is_there(study):
    subjects = [(k.cell.seed, k.kind, k.subject) for k in study.records]
    assert len(subjects) == len(set(subjects)) == 2 * (3 + 2)
    assert all(study.records.values())
    report = json.loads((study.folder / "report.json").read_text())
    assert "python -m ntk.evaluate" in report["command"]
    assert (study.folder / "report.html").is_file()


def test_a_kernel_record_holds_what_its_kernel_gives(study):
    (key,) = (
        k
        for k in study.records
        if (k.cell.seed, k.kind, k.subject) == (13, "kernel-sgd", "rows:1")
    )
    record = study.records[key]
    same = Protocol(test_size=12)
    split = same.split(CELL)
    assert record["labels"] == [e.label for e in split.test]
    assert record["examples"] == [8, 8, 12]
    backbone = same.backbone(split)
    spaces = {"full": Full(), "rows": Rows(1) + Head()}
    batches, order = backbone.encode(split.train, 8)
    options = KernelOptions(reduce="margin")
    kernels = compute(backbone.module, batches, spaces=spaces, options=options).kernels
    assert torch.equal(torch.tensor(order).sort().values, torch.arange(8))
    full, rows = kernels["full"].numpy(), kernels["rows"].numpy()
    cosine = (full * rows).sum() / np.linalg.norm(full) / np.linalg.norm(rows)
    assert record["distance"]["cosine"] == pytest.approx(cosine, rel=1e-4)
    for name in ("ridge", "logistic", "svm"):
        found = record["classifiers"][name]
        predicted = np.argmax(found["outputs"], axis=1)
        accuracy = (predicted == record["labels"]).mean()
        assert found["test"]["accuracy"] == pytest.approx(accuracy)


def test_a_fine_tuning_record_holds_what_was_tuned(study):
    for key, record in study.records.items():
        if key.kind != "finetune":
            continue
        predicted = np.argmax(record["outputs"], axis=1)
        accuracy = (predicted == record["labels"]).mean()
        assert record["test"]["accuracy"] == pytest.approx(accuracy)
        assert record["method"] == key.subject
        assert 0 <= record["kernel_change"]["distance"] < 1e-2


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_reports_the_same(study, monkeypatch):
    before = texts(study.folder)
    monkeypatch.setattr(
        "ntk.studies.folder.Study.write", lambda *_: pytest.fail("computed")
    )
    assert run(*TINY, "--output", study.output, "--quiet") == 0
    assert texts(study.folder) == before


@pytest.mark.slow
def test_a_record_cut_short_is_made_again_and_said_so(study, capsys):
    before = texts(study.folder)
    file = next((study.folder / "records").rglob("kernel*.json"))
    damaged = str(file.relative_to(study.folder))
    file.write_text(file.read_text()[:100])
    assert run(*TINY, "--output", study.output, "--quiet") == 0
    assert file.name in capsys.readouterr().err
    after = texts(study.folder)
    timed = "seconds_of_pass"
    for name, text in before.items():
        if name == damaged:
            old, new = json.loads(text), json.loads(after[name])
            assert old.pop(timed) != new.pop(timed)
            assert old.pop("spaces_of_pass") == 4
            assert new.pop("spaces_of_pass") == 2
            # The digest is of the whole record, with its seconds.
            assert old.pop("sha256") != new.pop("sha256")
            assert old == new
        else:
            assert after[name] == text


@pytest.mark.slow
def test_killed_and_started_again_it_ends_alike(tmp_path):
    # Another number of threads adds in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ntk.evaluate", *TINY, "--quiet", "--output"]
    whole, killed = ([*command, str(tmp_path / name)] for name in ("whole", "killed"))
    assert subprocess.run(whole, env=environment).returncode == 0
    records = tmp_path / "killed" / "fewshot" / "records"
    for count in (2, 4):
        process = subprocess.Popen(killed, env=environment)
        while len(list(records.rglob("*.json"))) < count and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in records.rglob("*.json")}
    assert 4 <= len(done) < 10
    assert subprocess.run(killed, env=environment).returncode == 0
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    expected, found = (
        json.loads((tmp_path / name / "fewshot" / "report.json").read_text())
        for name in ("whole", "killed")
    )
    assert expected.pop("command") != found.pop("command")
    assert found == expected


def test_kinds_of_kernel(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(tmp_path / "tiny")[0]
    same = Protocol(model=model, test_size=6)
    cell = Cell("reviews", 2, 13)
    (signs,) = kernel_records(same, cell, "signgd", ["head"])
    (asymmetric,) = kernel_records(same, cell, "asymmetric_signgd", ["head"])
    assert set(signs["classifiers"]) == {"ridge", "logistic", "svm"}
    assert set(asymmetric["classifiers"]) == {"asymmetric"}
    assert "distance" not in asymmetric


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "13", "13"], "--seeds holds 13 more than once"),
        (["--spaces", "rows:1", "rows:1"], "--spaces holds rows:1 more than once"),
        (["--tasks", "nothing"], "task 'nothing' is unknown"),
        (["--tasks", "reviews", "--shots", "2000"], "reviews"),
        (["--spaces", "rows:zero"], "rows:zero"),
        (["--finetune", "lora"], "lora"),
        (["--spaces", "--finetune"], "both empty"),
        (["--lrs", "rows=3"], "--lrs 'rows=3' must read METHOD=LR,LR"),
        (["--kinds", "adam"], None),
        (["--report-only", "--seed", "3"], None),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    code = run(*arguments, "--output", tmp_path / "runs", "--quiet")
    error = capsys.readouterr().err
    assert code == 2
    assert message is None or message in error
    assert not (tmp_path / "runs").exists()


def test_a_record_that_fails_is_told_and_the_others_made(tmp_path, capsys):
    options = (*TINY, "--spaces", "head", "rows:9999", "--finetune", "--seeds", "13")
    assert run(*options, "--output", tmp_path, "--quiet") == 1
    assert "failed: reviews-4-13 kernel-sgd head and 1 more" in capsys.readouterr().err
    assert (tmp_path / "fewshot" / "report.html").is_file()


def test_learning_rates_are_those_that_were_given(study):
    record = study.records[Key(CELL, "finetune", "head")]
    assert record["learning_rate"] == 1e-2
    assert list(record["grid"]) == ["0.01"]


def test_a_class_without_test_examples_is_refused(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    for name, some in (("train", rows), ("test", rows[::2])):
        lines = (json.dumps(row) for row in some)
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(TaskError, match="'1'"):
        Protocol(data_dir=tmp_path).split(Cell("odd", 4, 0))


def test_own_data_and_label_words_of_it(tmp_path, capsys):
    file = tmp_path / "mine.csv"
    lines = [f"text {i},{'yes' if i % 2 else 'no'}" for i in range(40)]
    file.write_text("\n".join(["text,label", *lines]))
    options = ("--data", file, "--shots", "2", "--seeds", "13", "--spaces", "head")
    options += ("--finetune", "--output", tmp_path)
    assert run(*options, "--json") == 0
    report = capsys.readouterr().out
    assert report == (tmp_path / "fewshot" / "report.json").read_text()
    records = (tmp_path / "fewshot" / "records").iterdir()
    assert [folder.name for folder in records] == ["mine-2-13"]
    assert run(*options, "--quiet", "--label-words", "bad") == 2
    assert "one of --label-words for each of the labels" in capsys.readouterr().err
    settings = json.loads((tmp_path / "fewshot" / "settings.json").read_text())
    assert settings["data"]["file"] == str(file)
    assert "template" not in settings
    file.write_text("\n".join(["text,label", *lines[:-2], "a,no", "b,yes"]))
    assert run(*options, "--quiet") == 2
    assert "was begun with other settings: data" in capsys.readouterr().err
    assert run(*options, "--quiet", "--overwrite") == 0


@pytest.mark.parametrize("name", ["report.json", "settings.json"])
def test_what_is_no_study_is_never_removed(tmp_path, capsys, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text("{}")
    options = (*TINY, "--overwrite", "--name", "theirs", "--output", tmp_path)
    assert run(*options) == 2
    assert "is no earlier study" in capsys.readouterr().err
    assert (tmp_path / "theirs" / name).read_text() == "{}"
