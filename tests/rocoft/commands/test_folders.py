"""Folders of results: whose they are, replaced if asked, whole after any kill."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from rocoft.commands import folders
from rocoft.commands.folders import FolderKind, claimed, is_taken, read_mark
from rocoft.commands.options import OptionError

KIND = FolderKind("some.command", "result", ("report", "figures"))
OTHER = FolderKind("another.command", "study", ("report", "figures"))
claim = claimed


def write(output, text, name="a", **options):
    """Write a result as a command does, and return where it is."""
    with claim(output, name, KIND, **options) as place:
        place.check()
        with place.filled() as part:
            (part / "report").write_text(text)
    return place.folder


def text_of(folder):
    return (folder / "report").read_text()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_result_is_marked_and_nothing_else_is_left(tmp_path):
    folder = write(tmp_path / "new" / "runs", "one")
    assert names(folder) == [".written-by.json", "report"]
    assert names(folder.parent) == ["a"]
    mark = json.loads((folder / ".written-by.json").read_text())
    assert mark == {"command": "some.command", "version": "0.1.0", "finished": True}


def test_it_is_replaced_only_if_asked(tmp_path):
    write(tmp_path, "one")
    with pytest.raises(OptionError, match="holds an earlier result"):
        write(tmp_path, "two")
    assert text_of(tmp_path / "a") == "one"
    assert text_of(write(tmp_path, "two", overwrite=True)) == "two"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder.mkdir() or (folder / "report").write_text("mine"),
        lambda folder: folder.write_text("mine"),
        lambda folder: folder.symlink_to(folder.parent / "elsewhere"),
        lambda folder: folder.symlink_to("absent"),
        lambda folder: folder.mkdir() or OTHER.mark(folder, finished=True),
        lambda folder: (
            folder.mkdir()
            or (folder / ".written-by.json").write_text('["some.command"]')
        ),
        lambda folder: (
            folder.mkdir() or (folder / ".written-by.json").write_text("[" * 100_000)
        ),
        lambda folder: folder.mkdir() or (folder / ".written-by.json").mkdir(),
    ],
)
def test_what_the_command_did_not_write_is_never_replaced(tmp_path, make):
    write(tmp_path, "theirs", name="elsewhere")
    make(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match="is no earlier result"):
        write(tmp_path, "two", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert text_of(tmp_path / "elsewhere") == "theirs"


@pytest.mark.parametrize("theirs", ["notes.txt", ".hidden", "report2"])
def test_what_someone_put_into_a_result_is_not_lost(tmp_path, theirs):
    folder = write(tmp_path, "one")
    (folder / theirs).write_text("mine")
    with pytest.raises(OptionError, match=rf"holds '{theirs}', which some.command did"):
        write(tmp_path, "two", overwrite=True)
    assert (folder / theirs).read_text() == "mine"


def test_a_name_that_is_taken_gets_a_number(tmp_path):
    found = [write(tmp_path, str(i), numbered=True).name for i in range(3)]
    assert found == ["a", "a-2", "a-3"]
    # Of another that is not there yet, too.
    with (
        claim(tmp_path, "b", KIND, numbered=True) as first,
        claim(tmp_path, "b", KIND, numbered=True) as second,
    ):
        assert (first.folder.name, second.folder.name) == ("b", "b-2")


def test_one_process_at_a_time(tmp_path):
    with claim(tmp_path, "a", KIND) as place:
        with pytest.raises(OptionError, match="another process writes"):
            write(tmp_path, "two")
        write(tmp_path, "other", name="b")
        with place.filled() as part:
            (part / "report").write_text("one")
    assert text_of(tmp_path / "a") == "one"
    assert names(tmp_path) == ["a", "b"]


def test_a_place_that_was_taken_meanwhile_is_left_alone(tmp_path):
    with claim(tmp_path, "a", KIND) as place, place.filled() as part:
        (part / "report").write_text("one")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").touch()
    assert place.folder == tmp_path / "a-2"
    assert text_of(tmp_path / "a-2") == "one"
    assert names(tmp_path / "a") == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_fails_leaves_the_old_and_nothing_else(tmp_path, error):
    write(tmp_path, "one")

    def fail():
        with (
            claim(tmp_path, "a", KIND, overwrite=True) as place,
            place.filled() as part,
        ):
            (part / "report").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["a"]
    assert text_of(tmp_path / "a") == "one"
    with pytest.raises(error), claim(tmp_path / "new" / "runs", "a", KIND):
        raise error
    assert names(tmp_path) == ["a"]


def killed_after(steps, work, output):
    """Let a process work that ends before its next change of a folder; whether it did.

    It ends as by SIGKILL: nothing more is run, and the system frees its locks.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    count = itertools.count()

    def until(change):
        def changing(*args, **options):
            if next(count) >= steps:
                os._exit(KILLED)
            return change(*args, **options)

        return changing

    try:
        for name in ("rename", "mkdir", "rmdir", "unlink"):
            setattr(Path, name, until(getattr(Path, name)))
        shutil.rmtree = until(shutil.rmtree)
        folders.write_text = until(folders.write_text)
        work(output)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


KILLED = 9


def replace(output):
    with claim(output, "a", KIND, overwrite=True) as place:
        with place.filled() as part:
            (part / "report").write_text("new")
        (output / "said").touch()


def replace_in_place(output):
    with claim(output, "a", KIND, overwrite=True) as place:
        with place.begun() as new:
            (new / "report").write_text("new")
        place.finish()
        (output / "said").touch()


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_at_any_step_loses_neither_old_nor_new(tmp_path, first):
    ends, killed = [], True
    while killed:
        steps = len(ends)
        output = tmp_path / str(steps)
        output.mkdir()
        if not first:
            write(output, "old")
        killed = killed_after(steps, replace, output)
        said = (output / "said").exists()
        (output / "said").unlink(missing_ok=True)
        write(output, "b", name="b")
        assert names(output) == (["a", "b"] if is_taken(output / "a") else ["b"]), steps
        if is_taken(output / "a"):
            assert read_mark(output / "a")["finished"]
            ends.append(text_of(output / "a"))
        else:
            ends.append(None)
        assert ends[-1] == "new" or (killed and not said)
        assert text_of(write(output, "newer", overwrite=True)) == "newer"
    before = None if first else "old"
    turn = ends.index("new")
    assert 4 < turn < len(ends) - 4
    assert ends == [before] * turn + ["new"] * (len(ends) - turn)


def test_a_kill_loses_no_folder_that_is_replaced_in_its_place(tmp_path):
    ends, killed = [], True
    while killed:
        steps = len(ends)
        output = tmp_path / str(steps)
        output.mkdir()
        write(output, "old")
        killed = killed_after(steps, replace_in_place, output)
        (output / "said").unlink(missing_ok=True)
        with claim(output, "a", KIND) as place:
            unfinished = not read_mark(place.folder).get("finished")
            # Nobody but its user knows that the new one is not to be gone on with.
            assert unfinished == place.replaces
            ends.append("begun" if unfinished else text_of(place.folder))
            if unfinished:
                place.abandon()
        if unfinished and is_taken(output / "a"):
            assert "old" in {text_of(p.parent) for p in output.rglob("report")}
    assert sorted({*ends}) == ["begun", "new", "old"]
    assert ends == sorted(ends, key=["old", "begun", "new"].index)


def test_an_abandoned_folder_gives_back_what_it_was_to_replace(tmp_path):
    write(tmp_path, "old")
    with claim(tmp_path, "a", KIND, overwrite=True) as place:
        with place.begun() as new:
            (new / "report").write_text("new")
        assert place.replaces
        place.abandon()
    assert text_of(tmp_path / "a") == "old"
    assert names(tmp_path) == ["a"]


def test_an_unfinished_folder_can_be_begun_again_without_losing_the_finished(tmp_path):
    write(tmp_path, "old")

    def stopped(text):
        with claim(tmp_path, "a", KIND, overwrite=True) as place:
            with place.begun() as new:
                (new / "report").write_text(text)
            raise KeyboardInterrupt

    for text in ("first", "second"):
        with pytest.raises(KeyboardInterrupt):
            stopped(text)
        assert text_of(tmp_path / "a") == text
        assert text_of(tmp_path / ".unfinished" / "a" / "old") == "old"
    write(tmp_path, "b", name="b")  # which puts in order, and leaves that
    assert text_of(tmp_path / ".unfinished" / "a" / "old") == "old"
    with claim(tmp_path, "a", KIND) as place:
        place.finish()
    assert names(tmp_path) == ["a", "b"]
    assert text_of(tmp_path / "a") == "second"


def test_a_folder_with_something_of_others_is_not_abandoned(tmp_path):
    with claim(tmp_path, "a", KIND) as place:
        with place.begun():
            pass
        (place.folder / "notes").write_text("mine")
        place.abandon()
    assert (tmp_path / "a" / "notes").read_text() == "mine"


def test_what_is_no_room_is_left_alone(tmp_path):
    room = tmp_path / ".unfinished"
    (room / "mine" / "new").mkdir(parents=True)
    (room / "file").touch()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "new").mkdir(parents=True)
    (elsewhere / "lock").touch()
    (room / "linked").symlink_to(elsewhere)
    write(tmp_path, "one")
    assert names(room) == ["file", "linked", "mine"]
    assert names(elsewhere) == ["lock", "new"]
    shutil.rmtree(room)
    room.symlink_to(elsewhere)
    with pytest.raises(OptionError, match="cannot be written to"):
        write(tmp_path, "two", name="b")
    assert names(elsewhere) == ["lock", "new"]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_lock_that_is_none_is_refused(tmp_path, kind):
    room = tmp_path / ".unfinished" / "a"
    room.mkdir(parents=True)
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine")
    {
        "link": lambda lock: lock.symlink_to(thesis),
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
    }[kind](room / "lock")
    with pytest.raises(OptionError, match="is no lock but a link or something else"):
        write(tmp_path, "one")
    assert thesis.read_text() == "mine"


KILL = """
import os, signal, sys, shutil
from pathlib import Path
from rocoft.commands.folders import FolderKind, claimed
KIND = FolderKind("some.command", "result", ("report", "figures"))
rename, left = Path.rename, int(sys.argv[2])
def killing(self, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killing
with claimed(Path(sys.argv[1]), "a", KIND, overwrite=True) as place:
    with place.filled() as part:
        (part / "report").write_text("new")
"""


@pytest.mark.slow
@pytest.mark.parametrize("renames", range(3))
def test_a_real_kill_between_the_renames(tmp_path, renames):
    write(tmp_path, "old")
    done = subprocess.run([sys.executable, "-c", KILL, tmp_path, str(renames)])
    assert done.returncode == -signal.SIGKILL
    kept = {text_of(p.parent) for p in tmp_path.rglob("report")}
    assert kept == {"old", "new"}
    write(tmp_path, "b", name="b")
    assert names(tmp_path) == ["a", "b"]
    assert text_of(tmp_path / "a") == ("old" if renames == 0 else "new")


WAITS = """
import sys, time
from pathlib import Path
from rocoft.commands.folders import FolderKind, claimed
with claimed(Path(sys.argv[1]), "a", FolderKind("some.command", "result", ())) as place:
    with place.filled() as part:
        (part / "report").write_text("half")
        print("here", flush=True)
        time.sleep(60)
"""


def test_a_living_process_keeps_its_room_and_a_dead_one_does_not(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    with pytest.raises(OptionError, match="another process writes"):
        write(tmp_path, "two")
    write(tmp_path, "b", name="b")
    assert text_of(tmp_path / ".unfinished" / "a" / "new") == "half"
    process.kill()
    process.wait()
    process.stdout.close()
    assert names(tmp_path) == [".unfinished", "b"]
    write(tmp_path, "c", name="c")
    assert names(tmp_path) == ["b", "c"]
