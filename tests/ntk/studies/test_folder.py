"""Records on disk: made once, made again where they are not whole, kept apart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ntk.scale.storage import StorageError
from ntk.studies.command import NAMES
from ntk.studies.folder import SEALED, Cell, Key, NoRecord, Study, Unit
from rocoft.commands.folders import FolderKind, claimed

CELL = Cell("sst2", 16, 13)
DONE = []


def squares(base, subjects):
    DONE.append(tuple(subjects))
    return [{"value": base * int(subject)} for subject in subjects]


def failing(subjects):
    raise ValueError(f"{subjects[0]} cannot be had. Ask for another.")


def process(subjects):
    return [{"process": os.getpid(), "subject": subject} for subject in subjects]


def keys(*subjects, cell=CELL):
    return tuple(Key(cell, "kernel", subject) for subject in subjects)


@pytest.fixture
def study(tmp_path):
    DONE.clear()
    found = Study(tmp_path / "study")
    found.begin({"model": None})
    return found


def values(study, *subjects):
    return [(study.read(key) or {}).get("value") for key in keys(*subjects)]


def test_a_record_is_made_once(study):
    unit = Unit(keys("1", "2"), squares, (10,))
    assert study.run([unit]) == []
    assert values(study, "1", "2") == [10, 20]
    assert study.run([unit]) == []
    assert DONE == [("1", "2")]


def test_only_what_is_missing_is_made(study):
    study.run([Unit(keys("1"), squares, (10,))])
    study.run([Unit(keys("1", "2", "3"), squares, (10,))])
    assert DONE == [("1",), ("2", "3")]
    assert values(study, "1", "2", "3") == [10, 20, 30]


@pytest.mark.parametrize("text", ["", "{", '{"key": 3}', "[1]", '{"value": 10}\n'])
def test_a_record_that_is_not_whole_is_made_again(study, text):
    unit = Unit(keys("1", "2"), squares, (10,))
    study.run([unit])
    file = study.folder / "records" / keys("1")[0].file
    file.write_text(text)
    again = Study(study.folder)
    assert again.run([unit]) == []
    assert again.damaged == [keys("1")[0].file]
    assert DONE == [("1", "2"), ("1",)]
    assert values(again, "1", "2") == [10, 20]


def test_a_record_cut_anywhere_is_made_again(study):
    unit = Unit(keys("7"), squares, (10,))
    study.run([unit])
    file = study.folder / "records" / keys("7")[0].file
    whole = file.read_text().rstrip()
    for length in range(len(whole)):
        file.write_text(whole[:length])
        assert Study(study.folder).read(keys("7")[0]) is None
    file.write_text(whole)
    assert Study(study.folder).read(keys("7")[0]) == {"value": 70}


def test_a_record_of_another_key_does_not_count(study):
    study.run([Unit(keys("1"), squares, (10,))])
    folder = study.folder / "records"
    (folder / keys("1")[0].file).rename(folder / keys("2")[0].file)
    assert study.read(keys("2")[0]) is None
    assert study.damaged == [keys("2")[0].file]


@pytest.fixture
def sealed(tmp_path):
    """A study whose records all have a digest, with one record."""
    kind = FolderKind("ntk.evaluate", "study", NAMES)
    with (
        claimed(tmp_path, "sealed", kind) as place,
        place.begun(**{SEALED: True}) as new,
    ):
        Study(new).begin({"model": None})
    found = Study(tmp_path / "sealed")
    found.run([Unit(keys("1"), squares, (10,))])
    return found


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record | {"value": 11},
        lambda record: record | {"more": 1},
        lambda record: {k: v for k, v in record.items() if k != "value"},
        lambda record: {k: v for k, v in record.items() if k != "sha256"},
        lambda record: record | {"sha256": "0" * 64},
        lambda record: record | {"sha256": None},
        lambda record: [record],
    ],
)
def test_an_edited_record_is_made_again(sealed, edit):
    file = sealed.folder / "records" / keys("1")[0].file
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    again = Study(sealed.folder)
    assert again.read(keys("1")[0]) is None
    assert again.damaged == [keys("1")[0].file]
    assert again.run([Unit(keys("1"), squares, (10,))]) == []
    assert again.read(keys("1")[0]) == {"value": 10}


def test_records_of_earlier_versions_have_no_digest(study):
    study.run([Unit(keys("1"), squares, (10,))])
    file = study.folder / "records" / keys("1")[0].file
    record = json.loads(file.read_text())
    del record["sha256"]
    file.write_text(json.dumps(record))
    assert study.read(keys("1")[0]) == {"value": 10}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_damaged_settings_are_refused_by_name(sealed, text):
    (sealed.folder / "settings.json").write_text(text)
    with pytest.raises(StorageError, match=r"settings.json' is damaged"):
        Study(sealed.folder).begin({"model": None})


def test_settings_of_a_study_without_records_are_not_in_the_way(sealed):
    shutil.rmtree(sealed.folder / "records")
    Study(sealed.folder).begin({"model": "other"})
    settings = json.loads((sealed.folder / "settings.json").read_text())
    assert settings == {"model": "other"}


def test_settings_of_another_program_are_not_overwritten(tmp_path):
    (tmp_path / "settings.json").write_text('{"editor.tabSize": 4}')
    with pytest.raises(StorageError, match="begun with other settings"):
        Study(tmp_path).begin({"model": "tiny"})
    assert (tmp_path / "settings.json").read_text() == '{"editor.tabSize": 4}'


@pytest.mark.parametrize("task", ["../up", "/etc", "a/../../up", "..", "a/./b"])
def test_no_task_writes_outside_its_folder(study, task):
    (key,) = keys("1", cell=Cell(task, 16, 13))
    study.run([Unit((key,), squares, (10,))])
    (file,) = (study.folder / "records").rglob("*.json")
    assert file.resolve().is_relative_to((study.folder / "records").resolve())
    assert study.read(key) == {"value": 10}
    assert [f.name for f in study.folder.parent.iterdir()] == ["study"]


def some(subjects):
    return [NoRecord(f"{s} is zero.") if s == "0" else {"value": s} for s in subjects]


def test_a_subject_without_a_record_leaves_the_others_theirs(study):
    failed = study.run([Unit(keys("0", "1"), some, ())])
    assert failed == ["sst2-16-13 kernel 0: 0 is zero."]
    assert values(study, "0", "1") == [None, "1"]


def test_parts_of_a_killed_process_are_removed(study):
    study.run([Unit(keys("1"), squares, (10,))])
    folder = study.folder / "records" / CELL.name
    for part in (folder / ".x.json.abc.part", study.folder / ".report.md.x.part"):
        part.write_text("half")
    study.remove_parts()
    assert not list(study.folder.rglob("*.part"))
    assert values(study, "1") == [10]


def test_names_that_look_alike_have_files_of_their_own():
    subjects = ["rows:3", "rows-3", "rows 3", "rows:3@query", "rows:3" + "x" * 80]
    subjects += ["rows:3" + "x" * 81, "../up", "a/b"]
    files = {Key(CELL, "kernel", subject).file for subject in subjects}
    assert len(files) == len(subjects)
    assert all(file.count("/") == 1 and ".." not in file for file in files)


def test_what_fails_does_not_stop_the_rest(study):
    units = [
        Unit(keys("a", "b"), failing, ()),
        Unit(keys("1"), squares, (10,)),
    ]
    (failed,) = study.run(units)
    assert failed == (
        "sst2-16-13 kernel a and 1 more: a cannot be had. Ask for another."
    )
    assert values(study, "a", "1") == [None, 10]


def test_processes_share_the_work(study):
    units = [Unit(keys(str(i)), process, ()) for i in range(4)]
    units.append(Unit(keys("a"), failing, ()))
    steps = []
    failed = study.run(units, 2, lambda *step: steps.append(step))
    assert len(failed) == 1
    found = [study.read(key) for key in keys("0", "1", "2", "3")]
    assert [record["subject"] for record in found] == ["0", "1", "2", "3"]
    assert os.getpid() not in {record["process"] for record in found}
    assert steps[-1] == ("records", 5, 5)


def test_a_study_that_was_stopped_goes_on_with_what_is_missing(study, monkeypatch):
    units = [Unit(keys(str(i)), squares, (10,)) for i in range(4)]
    write, written = Study.write, []

    def stopping(self, key, record):
        write(self, key, record)
        written.append(key)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Study, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.run(units)
    assert Study(study.folder).run(units) == []
    assert DONE == [("0",), ("1",), ("2",), ("3",)]
    assert values(study, *"0123") == [0, 10, 20, 30]


def grow(base, before, subjects):
    DONE.append((base, before["value"], *subjects))
    return [{"value": base + before["value"]} for _ in subjects]


def test_what_needs_a_record_comes_after_it(study):
    (first,) = keys("1")
    later = Unit(keys("2"), grow, (5,), after=first)
    assert study.run([later, Unit((first,), squares, (10,))]) == []
    assert DONE == [("1",), (5, 10, "2")]
    assert values(study, "1", "2") == [10, 15]
    # What it needs cannot be had: it is told, and nothing is done.
    (lost,) = keys("a")
    failed = study.run(
        [Unit((lost,), failing, ()), Unit(keys("3"), grow, (5,), after=lost)]
    )
    assert [each.split(":")[0] for each in failed] == [
        "sst2-16-13 kernel a",
        "sst2-16-13 kernel 3",
    ]
    assert f"it needs {lost.file}" in failed[1]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {path!r})
import test_folder as t
from ntk.studies.folder import Study, Unit
if __name__ == "__main__":
    study = Study(Path({folder!r}))
    study.begin({{}})
    study.run([Unit(t.keys(str(i)), t.slow_process, ()) for i in range(20)], 2)
"""


def slow_process(subjects):
    time.sleep(0.3)
    return process(subjects)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_study_that_is_killed_goes_on_and_leaves_no_process(tmp_path):
    script = tmp_path / "run.py"
    folder = tmp_path / "study"
    script.write_text(
        KILLED.format(path=str(Path(__file__).parent), folder=str(folder))
    )
    killed = subprocess.Popen([sys.executable, script])
    while len(list(folder.rglob("*-16-13/*.json"))) < 3:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {f: f.stat().st_mtime_ns for f in folder.rglob("*-16-13/*.json")}
    study = Study(folder)
    found = [r for i in range(20) if (r := study.read(keys(str(i))[0]))]
    assert 3 <= len(found) < 20
    workers = {record["process"] for record in found}
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in workers)
    subprocess.run([sys.executable, script], check=True)
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    assert all(study.read(keys(str(i))[0]) for i in range(20))
    assert study.damaged == []


def test_other_settings_are_refused(study):
    Study(study.folder).begin({"model": None})
    with pytest.raises(StorageError, match=r"model None there, roberta-base now"):
        Study(study.folder).begin({"model": "roberta-base"})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="holds files but no study"):
        Study(tmp_path).begin({})
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_written_to(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match="Choose another folder with --output"):
        Study(file / "study").begin({})


def test_no_space_left(study, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ntk.studies.folder.write_text", full)
    with pytest.raises(StorageError, match=r"No space left.*finished records are kept"):
        study.run([Unit(keys("1"), squares, (10,))])


def test_values_that_json_lacks_become_null(study):
    study.write(keys("1")[0], {"cka": float("nan"), "list": [float("inf"), 1.0]})
    assert study.read(keys("1")[0]) == {"cka": None, "list": [None, 1.0]}
    text = (study.folder / "records" / keys("1")[0].file).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
