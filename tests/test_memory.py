"""A memory budget: the plan, the same kernels by it, and what a real run holds."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from commands import held_by_compare
from dense import assert_close
from parts import SPACES, in_pairs

from ntk import memory
from ntk.estimate import Estimate
from ntk.kernel import compute
from ntk.memory import MemoryBudgetError, compute_as_planned, in_units, parse_bytes


@pytest.fixture
def bare(monkeypatch):
    """Count nothing but what passes keep."""
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "_activations", lambda model, batches: 0)
    monkeypatch.setattr(memory, "block_entries", lambda gradients: 0)
    monkeypatch.setattr(memory, "SUMS", 0)
    monkeypatch.setattr(memory, "SLACK", 0)


@pytest.mark.parametrize("right", [2, 3])
@pytest.mark.parametrize("reduce", ["full", "trace"])
@pytest.mark.parametrize(
    ("share", "chunks", "columns"),
    [(8.0, 1, 1), (2.0, 2, 1), (1.0, 4, 1), (0.5, 3, 2)],
)
def test_kernels_are_the_same_by_every_plan(
    bare, share, chunks, columns, reduce, right
):
    model, batches = in_pairs("bert", 6)
    whole = compute(model, batches, right, spaces=SPACES, reduce=reduce)
    arguments = {"spaces": SPACES, "reduce": reduce}
    roomy = memory.plan(model, batches, right, memory=10**9, **arguments)
    # The room of the largest map of all right examples, and as much for left ones.
    positions = sum(map(memory.count_positions, batches[:right]))
    largest = memory._largest(
        memory.resolve(SPACES, model),
        memory.Architecture(model),
        replace(memory.PassSize.of(model, batches, reduce), positions=positions),
    )
    budget = int(share * largest * (1 if right == len(batches) else 2)) + 8
    how = memory.plan(model, batches, right, memory=budget, **arguments)
    assert len(roomy.chunks) == len(roomy.columns) == 1
    assert len(how.chunks) >= chunks
    assert len(how.columns) >= columns
    assert how.passes == len(how.chunks) * len(how.columns)
    found = compute_as_planned(model, batches, how, **arguments)
    for name in SPACES:
        assert_close(found.kernels[name], whole.kernels[name], 1e-12, of=name)
        assert found.traces[name] == pytest.approx(whole.traces[name], rel=1e-9)
    assert found.sizes == whole.sizes
    assert found.services == whole.services


def test_the_same_plan_gives_the_same_bits(bare):
    model, batches = in_pairs("bert", 6)
    model.float()
    how = memory.plan(model, batches, 3, spaces=SPACES, memory=40_000)
    one, other = (
        compute_as_planned(model, batches, how, spaces=SPACES) for _ in range(2)
    )
    for name in SPACES:
        assert torch.equal(one.kernels[name], other.kernels[name])


def test_a_budget_without_room_says_what_would_do():
    model, batches = in_pairs("bert", 4)
    with pytest.raises(MemoryBudgetError, match="too little") as refused:
        memory.plan(model, batches, 1, spaces=SPACES, memory=2**20)
    advised = str(refused.value).split("Give about ")[1].split(",")[0]
    enough = int(1.05 * parse_bytes(advised))
    assert memory.plan(model, batches, 1, spaces=SPACES, memory=enough).chunks


def test_without_a_budget_all_that_is_free_is_shared():
    model, batches = in_pairs("bert", 4)
    how = memory.plan(model, batches, 1, spaces=SPACES)
    assert how.held < how.budget
    assert how.passes == 1
    assert how.peak < how.budget


def test_the_plan_as_text_names_passes_routes_and_time():
    model, batches = in_pairs("bert", 4)
    how = memory.plan(model, batches, 1, spaces=SPACES)
    found = Estimate.of(model, batches, how)
    text = "\n".join(found.lines())
    assert "kernels 4 x 2; every example passes 1 x" in text
    assert "pass 1:" in text
    assert "contracted by positions" in text or "contracted by blocks" in text
    assert text.endswith("s in all")
    slow = replace(found, seconds_per_example=10.0)
    assert slow.seconds == pytest.approx(40, rel=0.1)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4GiB", 2**32),
        ("4 gib", 2**32),
        ("1.5MiB", 3 * 2**19),
        ("500MB", 5 * 10**8),
        ("2e9", 2 * 10**9),
        ("100k", 10**5),
        ("123", 123),
    ],
)
def test_amounts_of_memory_are_read(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "GiB", "-4GiB", "4XB", "0", "1.2.3GB", "0.1"])
def test_other_amounts_are_refused(text):
    with pytest.raises(ValueError, match="no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(2**30, "1 GiB"), (1.5 * 2**30, "1.5 GiB"), (2**20, "1 MiB"), (512, "0.5 KiB")],
)
def test_amounts_are_written(amount, text):
    assert in_units(amount) == text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_keeps_its_budget(tmp_path):
    budget = "1.1GiB"
    options = ["--rows", "3", "--shots", "16", "--test-size", "30", "--quiet"]
    options += ["--memory", budget, "--batch-size", "16", "--output", tmp_path]
    # With a file, which it depends on the disk whether there is, all pass once.
    peak = held_by_compare(*options, "--no-spill")
    assert peak < 1.1 * parse_bytes(budget)
    (report,) = tmp_path.glob("*/report.json")
    assert json.loads(report.read_text())["kernel"]["passes"] > 1


def test_memory_is_given_back_where_it_is_short(bare, monkeypatch):
    model, batches = in_pairs("bert", 6)
    trimmed, told = [], []

    class Library:
        malloc_trim = staticmethod(trimmed.append)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    for budget, times in ((10**9, 0), (40_000, None)):
        how = memory.plan(model, batches, 3, spaces=SPACES, memory=budget)
        progress = lambda *what: told.append(what)
        compute_as_planned(model, batches, how, spaces=SPACES, progress=progress)
        assert len(trimmed) == (
            times if times is not None else len(batches) * how.passes
        )
        assert ("passes", 2, 6) in told
        told.clear()
