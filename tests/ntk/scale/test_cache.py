"""The cache: interrupted and resumed, damaged, of other content, locked."""

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import SPACES, as_planned, in_pairs, in_parts
from torch import nn

from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.scale.cache import BusyError, KernelCache, content_key
from ntk.scale.spill_plan import SpillPlan
from ntk.scale.storage import StorageError, load_kernels, save_kernels
from ntk.scale.work import Work
from ntk.spaces.kinds import Full, Rows
from ntk.spaces.resolution import resolve


def example():
    """Return a float32 model and its examples in batches of two."""
    model, batches = in_pairs("bert")
    return model.float(), batches


def many_passes(model, batches, right=2, *, spills=False):
    """Return a plan of several parts, with a file or without."""
    plan = in_parts(model, batches, right, SPACES, 5_000, columns=((0,), (1,)))
    file = SpillPlan(Path(tempfile.gettempdir()), 1, 2, 1)
    return replace(plan, spill=file if spills else None), resolve(SPACES, model)


def run(model, batches, cache, plan, resolved, stop_after=None):
    """Compute with a cache; raise an exception after ``stop_after`` parts."""
    with cache.held():
        plan, done, sums = cache.load(plan, resolved, cache.folder)

        def keep(number, sums):
            cache.store(plan, resolved, number, sums)
            if number == stop_after:
                raise KeyboardInterrupt

        return as_planned(
            model, batches, plan, spaces=SPACES, start=(sums, done), keep=keep
        )


def same(one, other):
    assert one.kernels.keys() == other.kernels.keys()
    for name, kernel in one.kernels.items():
        assert torch.equal(kernel, other.kernels[name]), name
    assert one.traces == other.traces
    assert one.sizes == other.sizes
    assert one.services == other.services


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "cache", "key", seconds=0)


def test_columns_and_passes_add_up_to_the_whole_kernel(cache):
    model, batches = example()
    model.double()
    plan, resolved = many_passes(model, batches)
    assert plan.passes > 5
    whole = compute(model, batches, 2, spaces=SPACES)
    found = run(model, batches, cache, plan, resolved)
    for name in SPACES:
        torch.testing.assert_close(found.kernels[name], whole.kernels[name])
        assert found.traces[name] == pytest.approx(whole.traces[name], rel=1e-9)
    assert found.sizes == whole.sizes


@pytest.mark.parametrize("spills", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(cache, tmp_path, stop, spills):
    model, batches = example()
    plan, resolved = many_passes(model, batches, spills=spills)
    alone = KernelCache(tmp_path, "alone", seconds=0)
    whole = run(model, batches, alone, plan, resolved)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, plan, resolved, stop_after=stop)
    # The cached plan is followed, not a new one.
    other = replace(plan, chunks=plan.chunks[:1], columns=((0, 1),), spill=None)
    again = replace(cache)
    same(run(model, batches, again, other, resolved), whole)
    assert again.parts_found == stop
    finished = replace(cache)
    same(run(model, batches, finished, plan, resolved, stop_after=1), whole)
    assert finished.parts_found == plan.parts


def test_resuming_with_a_file_needs_a_folder_with_room(cache, tmp_path):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    plan = replace(plan, spill=SpillPlan(tmp_path / "old", 1, 2, 1))
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, plan, resolved, stop_after=2)
    plain = replace(plan, spill=None)
    here = replace(plan, spill=replace(plan.spill, folder=tmp_path))
    assert cache.load(plain, resolved, tmp_path)[:2] == (here, 2)
    # Without a folder, or without room in it, the work starts again.
    assert cache.load(plain, resolved)[:2] == (plain, 0)
    large = replace(plan, spill=replace(plan.spill, bytes=2**60))
    other = replace(cache, key="large")
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, other, large, resolved, stop_after=2)
    assert other.load(plain, resolved, tmp_path)[1] == 0


def test_caches_written_before_there_were_files_are_read(cache):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, plan, resolved, stop_after=2)
    kernels, header = load_kernels(cache.path)
    del header["state"]["spill"]
    save_kernels(cache.path, kernels, header)
    assert cache.load(plan, resolved)[1] == 2


def test_a_cached_plan_beyond_the_budget_is_not_followed(cache):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, plan, resolved, stop_after=2)
    poor = replace(plan, budget=1)
    assert cache.load(poor, resolved)[:2] == (poor, 0)


def test_partly_computed_kernels_are_not_written_at_every_part(tmp_path):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    patient = KernelCache(tmp_path, "key", seconds=1e9)
    written, save = [], patient.store

    def store(*args):
        before = patient._written
        save(*args)
        written.append(patient._written != before)

    patient.store = store
    run(model, batches, patient, plan, resolved)
    assert written == [True, *[False] * (plan.passes - 2), True]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"no kernels"),
        lambda path: save_kernels(path, {"full": torch.zeros(1, 1)}, {}),
        lambda path: save_kernels(path, *_of_another(path)),
    ],
)
def test_files_that_are_damaged_or_foreign_are_computed_again(cache, damage):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    whole = run(model, batches, cache, plan, resolved)
    damage(cache.path)
    again = replace(cache)
    same(run(model, batches, again, plan, resolved), whole)
    assert again.parts_found == 0
    assert "could not be used and were computed again" in again.problem
    assert not cache.problem


def _of_another(path):
    kernels, header = load_kernels(path)
    return kernels, {**header, "key": "another"}


def test_a_full_disk_is_reported_and_work_can_be_resumed(cache, monkeypatch):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    whole = run(model, batches, KernelCache(cache.folder, "x"), plan, resolved)
    from ntk.scale import storage

    write, calls = storage.save_file, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run(model, batches, cache, plan, resolved)
    again = replace(cache)
    same(run(model, batches, again, plan, resolved), whole)
    assert again.parts_found == 3


def test_one_process_at_a_time(cache):
    other = replace(cache)
    refused = pytest.raises(BusyError, match="another process computes")
    with cache.held(), refused, other.held():
        pass
    with other.held():
        pass


def test_the_key_depends_on_everything_that_kernels_depend_on():
    model, batches = example()
    options = lambda **changes: {"options": KernelOptions(**changes)}

    def key(processes=1, **changes):
        given = {"batches": batches, "right": 1, "spaces": SPACES} | changes
        return content_key(Work(model, **given), processes=processes)

    first = key()
    assert key() == first
    keys = [
        key(right=2),
        key(**options(kind="signgd")),
        key(**options(reduce="trace")),
        key(readout="great terrible"),
        key(spaces={**SPACES, "full": Rows(1)}),
        key(batches=batches[:2]),
        key(batches=batches[::-1]),
    ]
    with torch.no_grad():
        weight = next(model.parameters())
        weight[0, 0] += 1
        keys.append(key())
        weight[0, 0] -= 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key())
    torch.set_num_threads(threads)
    assert len({first, *keys}) == 1 + len(keys)


def test_the_key_depends_on_activations_without_weights():
    batches = [torch.ones(2, 3)]

    def key(activation):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
        return content_key(Work(model, batches, 1, {"": Full()}))

    assert key(nn.Tanh()) == key(nn.Tanh())
    assert key(nn.Tanh()) != key(nn.ReLU())


KILLED = """
import sys, time
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
import test_cache as t
model, batches = t.example()
plan, resolved = t.many_passes(model, batches, spills={spills})
cache = t.KernelCache(t.sys.modules["pathlib"].Path({folder!r}), "key", seconds=0)
keep = cache.store
def slow(*args):
    time.sleep(0.1)
    keep(*args)
cache.store = slow
print("ready", flush=True)
result = t.run(model, batches, cache, plan, resolved)
t.save_kernels(t.sys.modules["pathlib"].Path({folder!r}) / "result", result.kernels,
               {{"found": cache.parts_found}})
"""


def test_a_cache_that_is_deleted_meanwhile_costs_nothing(cache):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    expected = run(model, batches, cache, plan, resolved)
    cache.path.unlink()
    with cache.held():

        def keep(number, sums):
            shutil.rmtree(cache.folder, ignore_errors=True)
            cache.store(plan, resolved, number, sums)

        found = as_planned(model, batches, plan, spaces=SPACES, keep=keep)
    assert same(found, expected) is None
    assert cache.load(plan, resolved)[1] == plan.parts


def test_parts_of_dead_processes_are_removed_and_others_are_not(cache):
    other, mine = "a" * 40, ".notes.part"
    cache.folder.mkdir(parents=True, exist_ok=True)
    dead = [
        cache.folder / f".{key}.safetensors.x.part" for key in (cache.key, "b" * 40)
    ]
    for file in (*dead, cache.folder / f"{'b' * 40}.lock", cache.folder / mine):
        file.touch()
    alive = cache.folder / f".{other}.safetensors.x.part"
    alive.touch()
    with KernelCache(cache.folder, other).held():
        # It is being written from here on.
        alive.touch()
        with cache.held():
            names = {file.name for file in cache.folder.iterdir()}
    assert names == {f"{cache.key}.lock", f"{other}.lock", alive.name, mine}


def test_a_lock_that_is_a_link_is_not_followed(cache, tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine")
    cache.folder.mkdir(parents=True, exist_ok=True)
    (cache.folder / f"{cache.key}.lock").symlink_to(thesis)
    with pytest.raises(StorageError, match="is no lock but a link"), cache.held():
        pass
    assert thesis.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("spills", [False, True])
def test_after_random_kills_the_kernel_has_the_same_bits(tmp_path, spills):
    script = KILLED.format(
        path=[str(Path(__file__).parent), *filter(None, sys.path)],
        folder=str(tmp_path),
        spills=spills,
    )
    command, moments = [sys.executable, "-c", script], random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    subprocess.run(command, check=True, capture_output=True)
    found, header = load_kernels(tmp_path / "result")
    assert header["found"] > 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, batches = example()
        plan, resolved = many_passes(model, batches, spills=spills)
        whole = run(model, batches, KernelCache(tmp_path, "whole"), plan, resolved)
    finally:
        torch.set_num_threads(threads)
    for name, kernel in whole.kernels.items():
        assert torch.equal(kernel, found[name]), name


def test_state_in_the_header_is_json(cache):
    model, batches = example()
    plan, resolved = many_passes(model, batches)
    run(model, batches, cache, plan, resolved)
    state = load_kernels(cache.path)[1]["state"]
    assert json.loads(json.dumps(state)) == state
    assert state["done"] == plan.passes
