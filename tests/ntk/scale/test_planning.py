"""A memory budget: plans, kernels that do not depend on them, memory of a real run."""

import gc
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from commands import held_by_compare
from covering import pairs
from dense import assert_close
from parts import SPACES, as_planned, in_pairs, plan_of

from ntk.kernels.empirical import compute
from ntk.kernels.options import KernelOptions
from ntk.scale import planning as memory
from ntk.scale.estimate import PlanCost
from ntk.scale.planning import MemoryBudgetError
from ntk.scale.units import in_units, parse_bytes
from ntk.scale.work import Work
from ntk.spaces.resolution import resolve


@pytest.fixture
def bare(monkeypatch):
    """Count only the memory of features and factors."""
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "_activations", lambda work, batches: 0)
    monkeypatch.setattr(memory, "block_entries", lambda gradients: 0)
    monkeypatch.setattr(memory, "SUMS", 0)
    monkeypatch.setattr(memory, "SLACK", 0)


@pytest.mark.parametrize(
    ("expected", "reduce", "right"),
    pairs(
        [(8.0, 1, 1), (2.0, 2, 1), (1.0, 4, 1), (0.5, 3, 2)], ["full", "trace"], [2, 3]
    ),
)
def test_kernels_do_not_depend_on_the_plan(bare, expected, reduce, right):
    share, chunks, columns = expected
    model, batches = in_pairs("bert", 6)
    whole = compute(
        model, batches, right, spaces=SPACES, options=KernelOptions(reduce=reduce)
    )
    arguments = {"spaces": SPACES, "reduce": reduce}
    roomy = plan_of(model, batches, right, memory=10**9, **arguments)
    # Room for the largest map of all right examples, and as much for left ones.
    positions = sum(map(memory.count_positions, batches[:right]))
    size = memory.PassSize.of(model, batches, KernelOptions(reduce=reduce))
    largest = memory._largest(
        resolve(SPACES, model),
        memory.Architecture(model),
        replace(size, positions=positions),
    )
    budget = int(share * largest * (1 if right == len(batches) else 2)) + 8
    plan = plan_of(model, batches, right, memory=budget, **arguments)
    assert len(roomy.chunks) == len(roomy.columns) == 1
    assert len(plan.chunks) >= chunks
    assert len(plan.columns) >= columns
    assert plan.passes == len(plan.chunks) * len(plan.columns)
    found = as_planned(model, batches, plan, **arguments)
    for name in SPACES:
        assert_close(found.kernels[name], whole.kernels[name], 1e-12, of=name)
        assert found.traces[name] == pytest.approx(whole.traces[name], rel=1e-9)
    assert found.sizes == whole.sizes
    assert found.services == whole.services


def test_the_same_plan_gives_the_same_bits(bare):
    model, batches = in_pairs("bert", 6)
    model.float()
    plan = plan_of(model, batches, 3, spaces=SPACES, memory=40_000)
    one, other = (as_planned(model, batches, plan, spaces=SPACES) for _ in range(2))
    for name in SPACES:
        assert torch.equal(one.kernels[name], other.kernels[name])


def test_a_budget_that_is_too_small_names_a_sufficient_one():
    model, batches = in_pairs("bert", 4)
    with pytest.raises(MemoryBudgetError, match="too little") as refused:
        plan_of(model, batches, 1, spaces=SPACES, memory=2**20)
    advised = str(refused.value).split("Give about ")[1].split(",")[0]
    enough = int(1.05 * parse_bytes(advised))
    assert plan_of(model, batches, 1, spaces=SPACES, memory=enough).chunks


def test_without_a_budget_free_memory_is_used():
    model, batches = in_pairs("bert", 4)
    plan = plan_of(model, batches, 1, spaces=SPACES)
    assert plan.held < plan.budget
    assert plan.passes == 1
    assert plan.peak < plan.budget


def test_the_plan_as_text_names_passes_routes_and_time():
    model, batches = in_pairs("bert", 4)
    plan = plan_of(model, batches, 1, spaces=SPACES)
    cost = PlanCost.of(Work(model, batches, 1, SPACES), plan)
    text = "\n".join(cost.lines())
    assert "kernels 4 x 2; every example passes 1 x" in text
    assert "pass 1:" in text
    assert "contracted by positions" in text or "contracted by blocks" in text
    assert text.endswith("s in all")
    slow = replace(cost, seconds_per_example=10.0)
    assert slow.seconds == pytest.approx(40, rel=0.1)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4GiB", 2**32),
        ("4 gib", 2**32),
        ("1.5MiB", 3 * 2**19),
        ("500MB", 5 * 10**8),
        ("2e9 B", 2 * 10**9),
        ("100k", 10**5),
    ],
)
def test_amounts_of_memory_are_read(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["2", "1e9", " 4 "])
def test_a_bare_number_is_refused_with_the_reason(text):
    with pytest.raises(ValueError, match="has no unit"):
        parse_bytes(text)


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


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_stays_within_its_budget(tmp_path):
    budget = "1.1GiB"
    options = ["--rows", "3", "--shots", "16", "--test-size", "30", "--quiet"]
    options += ["--memory", budget, "--batch-size", "16", "--output", tmp_path]
    # Without a file: whether there is one depends on the disk.
    peak = held_by_compare(*options, "--no-spill")
    assert peak < 1.1 * parse_bytes(budget)
    (report,) = tmp_path.glob("*/report.json")
    assert json.loads(report.read_text())["kernel"]["passes"] > 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_amount_that_an_error_names_is_enough(tmp_path):
    options = ["--rows", "3", "--shots", "16", "--test-size", "30", "--quiet"]
    options += ["--no-cache", "--batch-size", "16", "--no-spill", "--output", tmp_path]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        held_by_compare(*options, "--memory", "0.8GiB")
    named = re.search(r"Give about ([\d.]+) (\w+)", failed.value.stderr)
    assert failed.value.returncode == 2
    held_by_compare(*options, "--memory", "".join(named.groups()))


def test_planning_keeps_no_activations():
    model, batches = in_pairs("bert", 6)
    before = None
    for _ in range(3):
        plan_of(model, batches, 3, spaces=SPACES, memory=10**9)
        gc.collect()
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        assert before is None or tensors <= before
        before = tensors


def test_freed_memory_is_returned_if_the_budget_is_tight(bare, monkeypatch):
    model, batches = in_pairs("bert", 6)
    trimmed, reports = [], []

    class Library:
        malloc_trim = staticmethod(trimmed.append)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    for budget, times in ((10**9, 0), (40_000, None)):
        plan = plan_of(model, batches, 3, spaces=SPACES, memory=budget)
        progress = lambda *report: reports.append(report)
        trimmed.clear()
        as_planned(model, batches, plan, spaces=SPACES, progress=progress)
        assert len(trimmed) == (
            times if times is not None else len(batches) * plan.passes
        )
        assert ("passes", 2, 6) in reports
        reports.clear()
