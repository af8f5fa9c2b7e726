"""Work that processes share: killed ones, interruptions, mistakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ntk.studies.folder import Cell, Key, Study, Unit
from ntk.studies.workers import WorkError, results


def work(unit):
    """Do as a unit's name says."""
    what, value = unit
    if what == "kill":
        os.kill(os.getpid(), getattr(signal, value))
    if what == "exit":
        os._exit(value)
    if what == "memory":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    if what == "mistake":
        raise KeyError(value)
    return value, os.getpid()


GOOD = [("give", number) for number in range(3)]


def found(units, jobs):
    """Return results by unit, without the processes that had them."""
    return {
        unit: result if isinstance(result, WorkError) else result[0]
        for unit, result in results(units, work, jobs)
    }


@pytest.mark.parametrize("jobs", [1, 2])
def test_known_errors_cost_their_own_unit(jobs):
    units = [("memory", 0), *GOOD[:1]]
    answers = found(units, jobs)
    assert "there is not enough memory" in str(answers.pop(("memory", 0)))
    assert answers == {("give", 0): 0}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_mistake_of_the_program_is_not_hidden(jobs):
    with pytest.raises((KeyError, RuntimeError), match="this one"):
        found([("mistake", "this one"), *GOOD[:1]], jobs)


def test_a_process_that_is_killed_costs_its_own_unit():
    killed = [("kill", "SIGKILL"), ("kill", "SIGSEGV"), ("exit", 3)]
    answers = found([killed[0], GOOD[0], killed[1], GOOD[1], killed[2], GOOD[2]], 2)
    assert [str(answers.pop(unit)) for unit in killed] == [
        "its process was ended by SIGKILL, perhaps for lack of memory; fewer --jobs "
        "need less.",
        "its process was ended by SIGSEGV.",
        "its process ended with exit code 3.",
    ]
    assert answers == {("give", number): number for number in range(3)}


def test_no_process_is_left_when_the_results_are_not_taken():
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    taken = results(GOOD, work, 2)
    _, (_, process) = next(taken)
    taken.close()
    assert not psutil.pid_exists(process)
    left = {p for p in psutil.Process().children(recursive=True) if p.pid not in before}
    # One process of the standard library serves all others, and goes with this one.
    assert len([p for p in left if "resource_tracker" not in str(p.cmdline())]) == 0


INTERRUPTED = """
import sys, types
from pathlib import Path
sys.path[:0] = {path!r}
import test_workers as t
from rocoft.commands.main import Command
from ntk.studies.bench.options import BenchOptions

def run(options, command):
    return t.study(options.output.output).run(t.units(), 2)

if __name__ == "__main__":
    sys.modules["work_of_a_test"] = types.SimpleNamespace(run=run)
    command = Command("some.command", BenchOptions, "work_of_a_test", "what it is")
    sys.exit(command(["--output", sys.argv[1]], is_process=True))
"""


def study(folder):
    found = Study(Path(folder) / "study")
    found.begin({})
    return found


def units():
    key = lambda number: (Key(Cell("t", 16, 13), "kernel", str(number)),)
    return [Unit(key(number), sleeping, (number,)) for number in range(6)]


def sleeping(number, subjects):
    if number > 1:
        time.sleep(60)
    return [{"process": os.getpid()} for _ in subjects]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["SIGINT", "SIGTERM"])
def test_an_interruption_ends_all_processes_in_five_seconds(tmp_path, stopped):
    script = tmp_path / "run.py"
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    script.write_text(INTERRUPTED.format(path=path))
    process = subprocess.Popen(
        [sys.executable, script, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A terminal interrupts all processes of the group.
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    group = psutil.Process(process.pid)
    records = tmp_path / "study" / "records"
    end = time.monotonic() + 120
    while len(list(records.rglob("*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    workers = group.children(recursive=True)
    assert len(workers) >= 2
    start = time.monotonic()
    os.killpg(process.pid, getattr(signal, stopped))
    out, err = process.communicate(timeout=60)
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert time.monotonic() - start < 5
    assert not alive
    assert out == ""
    if stopped == "SIGINT":
        assert process.returncode == 130
        assert err == "interrupted; nothing was written\n"
    assert len(list(records.rglob("*.json"))) == 2
