"""The life of any study as a command: stopped, continued, refused, reported on."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from commands import exit_code, texts

from ntk import bench, compare
from ntk.reporting.page import Page
from ntk.studies.command import NAMES, StudyRun
from ntk.studies.fewshot.options import EvaluateOptions
from ntk.studies.folder import Key, Unit
from ntk.studies.protocol import cells
from rocoft import train
from rocoft.commands.folders import FolderKind, claimed
from rocoft.commands.main import Command

DONE = []
STOPS, FAILS = set(), set()


def squares(number, subjects):
    """Stand for hours of work."""
    if number in STOPS:
        raise KeyboardInterrupt
    if number in FAILS:
        raise ValueError(f"{number} has no square. Ask for another.")
    DONE.append((number, *subjects))
    return [{"value": number**2, "subject": subject} for subject in subjects]


def units(options, protocol):
    return [
        Unit(tuple(Key(cell, "square", s) for s in "ab"), squares, (cell.seed,))
        for cell in cells(options, protocol)
    ]


def roots(options, protocol, study):
    """Ask for more where there are first records."""
    return [
        Unit((Key(key.cell, "root", "a"),), squares, (found["value"],))
        for unit in units(options, protocol)
        for key in unit.keys[:1]
        if (found := study.read(key))
    ]


def collect(records, command, settings):
    return {
        "command": command,
        "settings": settings,
        "values": {f"{k.cell.seed} {k.subject}": r and r["value"] for k, r in records},
    }


def page(summary):
    answers = [f"{name} is {value}" for name, value in summary["values"].items()]
    return Page("Squares", "Which?", answers, [], [], [("command", "")], {}, {})


RUN = StudyRun(
    command="ntk.squares",
    units=units,
    collect=collect,
    tables=lambda summary: [],
    page=page,
    figures=lambda summary: {},
    settings={"study": "squares"},
)
COMMAND = Command(
    module="ntk.squares",
    options=EvaluateOptions,
    run="squares",
    description="",
    interrupted="the same command goes on with what is missing",
)


@pytest.fixture(autouse=True)
def squares_module(monkeypatch):
    """Let the command find its work."""
    module = SimpleNamespace(run=RUN)
    monkeypatch.setitem(sys.modules, "squares", module)
    return module


@pytest.fixture
def study(tmp_path):
    """A study of three splits that has not begun."""
    for each in (DONE, STOPS, FAILS):
        each.clear()
    asked = ("--shots", "2", "--test-size", "4", "--seeds", "3", "4", "5")
    asked += ("--output", tmp_path, "--name", "squares")
    return SimpleNamespace(
        run=partial(exit_code, COMMAND, *asked), folder=tmp_path / "squares"
    )


def values(study):
    return json.loads((study.folder / "report.json").read_text())["values"]


ALL = {"3 a": 9, "3 b": 9, "4 a": 16, "4 b": 16, "5 a": 25, "5 b": 25}


def test_a_second_run_makes_nothing_and_reports_the_same(study):
    assert study.run() == 0
    assert values(study) == ALL
    assert DONE == [(3, "a", "b"), (4, "a", "b"), (5, "a", "b")]
    assert {f.name for f in study.folder.iterdir()} >= {
        *("report.html", "report.md", "settings.json", "records")
    }
    before = texts(study.folder)
    assert study.run() == 0
    assert len(DONE) == 3
    assert texts(study.folder) == before


def test_the_end_is_printed_unless_it_is_quiet(study, capsys):
    assert study.run() == 0
    shown = capsys.readouterr().out
    assert "4 a is 16" in shown
    assert f"report: {study.folder / 'report.html'}" in shown
    assert study.run("--quiet") == 0
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_study_that_was_stopped_goes_on_with_what_is_missing(study, capsys):
    STOPS.add(4)
    assert study.run() == 130
    assert "the same command goes on with what is missing" in capsys.readouterr().err
    assert not (study.folder / "report.json").exists()
    STOPS.clear()
    assert study.run() == 0
    assert DONE == [(3, "a", "b"), (4, "a", "b"), (5, "a", "b")]
    assert values(study) == ALL


def test_a_record_cut_short_is_told_and_made_again(study, capsys):
    assert study.run() == 0
    before = texts(study.folder)
    cut, lost = sorted((study.folder / "records").rglob("*.json"))[1:3]
    cut.write_text(cut.read_text()[:20])
    lost.unlink()
    DONE.clear()
    assert study.run("--report-only") == 0
    assert f"{cut.name} is still not whole: left out" in capsys.readouterr().err
    assert DONE == []
    assert not lost.exists()
    assert list(values(study).values()).count(None) == 2
    assert study.run() == 0
    assert f"{cut.name} was not whole: made again" in capsys.readouterr().err
    assert [(number, len(subjects)) for number, *subjects in DONE] == [(3, 1), (4, 1)]
    assert {f: t for f, t in texts(study.folder).items() if "report" not in f} == {
        f: t for f, t in before.items() if "report" not in f
    }
    assert values(study) == ALL


def test_what_fails_is_told_and_the_rest_done(study, capsys):
    FAILS.add(3)
    assert study.run("--quiet") == 1
    error = capsys.readouterr().err
    assert "failed: reviews-2-3 square a and 1 more: 3 has no square." in error
    assert values(study) == ALL | {"3 a": None, "3 b": None}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--test-size", "5"), "was begun with other settings: test_size 4 there, 5"),
        (("--batch-size", "7", "--seeds", "3", "4", "5", "6"), None),
    ],
)
def test_other_settings_are_refused_and_more_splits_are_not(
    study, capsys, more, message
):
    assert study.run() == 0
    before = texts(study.folder)
    DONE.clear()
    code = study.run(*more)
    if message is None:
        assert code == 0
        assert DONE == [(6, "a", "b")]
        return
    assert code == 2
    assert message in capsys.readouterr().err
    assert DONE == []
    assert texts(study.folder) == before


def test_the_folder_of_another_study_is_left_alone(study, capsys):
    study.folder.mkdir()
    (study.folder / "thesis.tex").write_text("mine")
    assert study.run() == 2
    assert "holds files but no study. Give another --name" in capsys.readouterr().err
    assert [file.name for file in study.folder.iterdir()] == ["thesis.tex"]


def test_a_study_is_replaced_only_if_asked_and_if_it_is_one(study, capsys):
    assert study.run("--quiet") == 0
    before = texts(study.folder)
    assert study.run("--quiet", "--test-size", "5", "--overwrite") == 0
    assert texts(study.folder) != before
    assert len(DONE) == 6
    (study.folder / "notes.txt").write_text("mine")
    assert study.run("--quiet", "--overwrite") == 2
    assert "holds 'notes.txt', which ntk.squares did not" in capsys.readouterr().err
    assert (study.folder / "notes.txt").read_text() == "mine"


def test_an_overwritten_study_comes_back_if_nothing_comes_of_the_new(study, capsys):
    assert study.run("--quiet") == 0
    before = texts(study.folder)
    STOPS.add(3)
    assert study.run("--quiet", "--overwrite") == 130
    assert texts(study.folder) == before
    STOPS.clear()
    FAILS.update((3, 4, 5))
    assert study.run("--quiet", "--overwrite") == 1
    assert "so the earlier study stays" in capsys.readouterr().err
    assert texts(study.folder) == before
    assert [f.name for f in study.folder.parent.iterdir()] == ["squares"]


def test_a_stopped_study_leaves_no_settings_in_the_way(study):
    STOPS.add(3)
    assert study.run("--quiet") == 130
    assert not study.folder.exists()
    STOPS.clear()
    assert study.run("--quiet", "--test-size", "5") == 0


def test_two_at_once(study, capsys):
    kind = FolderKind("ntk.squares", "study", NAMES)
    with claimed(study.folder.parent, "squares", kind):
        assert study.run("--quiet") == 2
        assert "another process writes" in capsys.readouterr().err
    assert study.run("--quiet") == 0
    with claimed(study.folder.parent, "squares", kind):
        assert study.run("--quiet", "--report-only") == 0


def test_no_other_command_replaces_a_study(study, capsys):
    assert study.run("--quiet") == 0
    before = texts(study.folder)
    output = ("--output", study.folder.parent, "--name", "squares", "--overwrite")
    for command in (compare.main, bench.main, train.main):
        assert exit_code(command, *output) == 2
        assert "exists and is no earlier" in capsys.readouterr().err
    assert texts(study.folder) == before


def test_work_that_depends_on_first_records_follows_them(study, squares_module):
    squares_module.run = replace(RUN, then=roots)
    command, asked = partial(exit_code, COMMAND), study.run.args[1:]
    assert command(*asked, "--quiet") == 0
    assert DONE[3:] == [(9, "a"), (16, "a"), (25, "a")]
    assert len(values(study)) == 6
    DONE.clear()
    assert command(*asked, "--quiet") == 0
    assert DONE == []


def test_launched_processes_are_refused(study, monkeypatch, capsys):
    """Their trainings would be taken for shares of one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert study.run() == 2
    assert "has started 2 processes" in capsys.readouterr().err
    assert DONE == []
