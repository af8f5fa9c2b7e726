"""Kept kernels: killed and continued, damaged, of other content, in use elsewhere."""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import SPACES, in_pairs, in_parts
from torch import nn

from ntk.cache import BusyError, KernelCache, content_key
from ntk.kernel import compute
from ntk.memory import compute_as_planned
from ntk.resolution import resolve
from ntk.spaces import Full, Rows
from ntk.spill_plan import SpillPlan
from ntk.storage import StorageError, load_kernels, save_kernels


def example():
    """Return a float32 model and its examples in batches of two."""
    model, batches = in_pairs("bert")
    return model.float(), batches


def many_passes(model, batches, right=2, *, spills=False):
    """Return a plan of several parts, with a file or not, whatever memory there is."""
    how = in_parts(model, batches, right, SPACES, 5_000, columns=((0,), (1,)))
    file = SpillPlan(Path(tempfile.gettempdir()), 1, 2, 1, 1.0, 2.0)
    return replace(how, spill=file if spills else None), resolve(SPACES, model)


def run(model, batches, cache, how, resolved, stop_after=None):
    """Compute with a cache; stop after some passes as an exception does."""
    with cache.held():
        how, done, found = cache.load(how, resolved, cache.folder)

        def keep(number, sums):
            cache.store(how, resolved, number, sums)
            if number == stop_after:
                raise KeyboardInterrupt

        return compute_as_planned(
            model, batches, how, spaces=SPACES, start=(found, done), keep=keep
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


def test_several_columns_and_passes_are_the_whole_kernel(cache):
    model, batches = example()
    model.double()
    how, resolved = many_passes(model, batches)
    assert how.passes > 5
    whole = compute(model, batches, 2, spaces=SPACES)
    found = run(model, batches, cache, how, resolved)
    for name in SPACES:
        torch.testing.assert_close(found.kernels[name], whole.kernels[name])
        assert found.traces[name] == pytest.approx(whole.traces[name], rel=1e-9)
    assert found.sizes == whole.sizes


@pytest.mark.parametrize("spills", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_going_on_gives_the_bits_of_an_undisturbed_run(cache, tmp_path, stop, spills):
    model, batches = example()
    how, resolved = many_passes(model, batches, spills=spills)
    alone = KernelCache(tmp_path, "alone", seconds=0)
    whole = run(model, batches, alone, how, resolved)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, how, resolved, stop_after=stop)
    # Whatever would be planned now, the plan that was begun is followed.
    other = replace(how, chunks=how.chunks[:1], columns=((0, 1),), spill=None)
    again = replace(cache)
    same(run(model, batches, again, other, resolved), whole)
    assert again.found == stop
    finished = replace(cache)
    same(run(model, batches, finished, how, resolved, stop_after=1), whole)
    assert finished.found == how.parts


def test_what_was_begun_with_a_file_needs_a_folder_with_room(cache, tmp_path):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    how = replace(how, spill=SpillPlan(tmp_path / "old", 1, 2, 1, 1.0, 2.0))
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, how, resolved, stop_after=2)
    plain = replace(how, spill=None)
    here = replace(how, spill=replace(how.spill, folder=tmp_path))
    assert cache.load(plain, resolved, tmp_path)[:2] == (here, 2)
    # Without a folder, or without room in it, the work begins anew.
    assert cache.load(plain, resolved)[:2] == (plain, 0)
    large = replace(how, spill=replace(how.spill, bytes=2**60))
    other = replace(cache, key="large")
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, other, large, resolved, stop_after=2)
    assert other.load(plain, resolved, tmp_path)[1] == 0


def test_kernels_kept_before_there_were_files_are_found(cache):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, how, resolved, stop_after=2)
    kernels, header = load_kernels(cache.path)
    del header["state"]["spill"]
    save_kernels(cache.path, kernels, header)
    assert cache.load(how, resolved)[1] == 2


def test_a_plan_that_would_hold_more_than_the_budget_is_not_followed(cache):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    with pytest.raises(KeyboardInterrupt):
        run(model, batches, cache, how, resolved, stop_after=2)
    poor = replace(how, budget=1)
    assert cache.load(poor, resolved)[:2] == (poor, 0)


def test_half_done_kernels_are_not_written_all_the_time(tmp_path):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    patient = KernelCache(tmp_path, "key", seconds=1e9)
    written, save = [], patient.store

    def store(*args):
        before = patient._written
        save(*args)
        written.append(patient._written != before)

    patient.store = store
    run(model, batches, patient, how, resolved)
    assert written == [True, *[False] * (how.passes - 2), True]


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
    how, resolved = many_passes(model, batches)
    whole = run(model, batches, cache, how, resolved)
    damage(cache.path)
    again = replace(cache)
    same(run(model, batches, again, how, resolved), whole)
    assert again.found == 0
    assert "could not be used and were computed again" in again.problem
    assert not cache.problem


def _of_another(path):
    kernels, header = load_kernels(path)
    return kernels, {**header, "key": "another"}


def test_a_folder_without_room_is_said_and_work_goes_on_later(cache, monkeypatch):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    whole = run(model, batches, KernelCache(cache.folder, "x"), how, resolved)
    from ntk import storage

    write, calls = storage.save_file, []

    def full(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run(model, batches, cache, how, resolved)
    again = replace(cache)
    same(run(model, batches, again, how, resolved), whole)
    assert again.found == 3


def test_one_process_at_a_time(cache):
    other = replace(cache)
    refused = pytest.raises(BusyError, match="another process computes")
    with cache.held(), refused, other.held():
        pass
    with other.held():
        pass


def test_the_key_is_of_everything_that_kernels_depend_on():
    model, batches = example()
    resolved = resolve(SPACES, model)
    plain = lambda **changes: content_key(
        **{"model": model, "batches": batches, "right": 1, "resolved": resolved}
        | changes
    )
    first = plain()
    assert plain() == first
    keys = [
        plain(right=2),
        plain(kind="signgd"),
        plain(reduce="trace"),
        plain(readout="great terrible"),
        plain(resolved=resolve({**SPACES, "full": Rows(1)}, model)),
        plain(batches=batches[:2]),
        plain(batches=batches[::-1]),
    ]
    with torch.no_grad():
        weight = next(model.parameters())
        weight[0, 0] += 1
        keys.append(plain())
        weight[0, 0] -= 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(plain())
    torch.set_num_threads(threads)
    assert len({first, *keys}) == 1 + len(keys)


def test_the_key_knows_activations_that_have_no_weights():
    batches = [torch.ones(2, 3)]

    def key(activation):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
        return content_key(model, batches, 1, resolve({"": Full()}, model))

    assert key(nn.Tanh()) == key(nn.Tanh())
    assert key(nn.Tanh()) != key(nn.ReLU())


KILLED = """
import sys, time
import torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
import test_cache as t
model, batches = t.example()
how, resolved = t.many_passes(model, batches, spills={spills})
cache = t.KernelCache(t.sys.modules["pathlib"].Path({folder!r}), "key", seconds=0)
keep = cache.store
def slow(*args):
    time.sleep(0.1)
    keep(*args)
cache.store = slow
print("ready", flush=True)
result = t.run(model, batches, cache, how, resolved)
t.save_kernels(t.sys.modules["pathlib"].Path({folder!r}) / "result", result.kernels,
               {{"found": cache.found}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("spills", [False, True])
def test_killed_at_random_moments_the_kernel_has_the_same_bits(tmp_path, spills):
    script = KILLED.format(
        path=[p for p in sys.path if p], folder=str(tmp_path), spills=spills
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
        how, resolved = many_passes(model, batches, spills=spills)
        whole = run(model, batches, KernelCache(tmp_path, "whole"), how, resolved)
    finally:
        torch.set_num_threads(threads)
    for name, kernel in whole.kernels.items():
        assert torch.equal(kernel, found[name]), name


def test_state_in_the_header_is_json(cache):
    model, batches = example()
    how, resolved = many_passes(model, batches)
    run(model, batches, cache, how, resolved)
    state = load_kernels(cache.path)[1]["state"]
    assert json.loads(json.dumps(state)) == state
    assert state["done"] == how.passes
