"""What passes leave in a file: the same kernels, one pass, the same bits again."""

import errno
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from cases import BY_NAME, text
from commands import held_by_compare
from dense import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import SPACES, in_pairs, in_parts
from torch import nn

from ntk import coverage, factor_file, memory, rates, spill_plan
from ntk.coverage import Service
from ntk.estimate import Estimate
from ntk.factor_file import FactorFile
from ntk.factors import Matrix, Table, Vector
from ntk.function import take
from ntk.memory import compute_as_planned, parse_bytes
from ntk.rates import Rates, room_on_disk
from ntk.spaces import Full, Rows
from ntk.spill_plan import SpillPlan
from ntk.storage import StorageError

EVERYTHING = {"full": Full()}
FAST = Rates(multiply_adds=1e6, written=1e12, read=1e12)


def planned(
    model, batches, right, spaces, folder, *, parts=6, columns=None, examples=2
):
    """Return a plan of several parts, and the same one with a file."""
    whole = in_parts(model, batches, right, spaces, sys.maxsize)
    entries = whole.chunks[0].entries // parts
    how = in_parts(model, batches, right, spaces, entries, columns)
    return how, replace(how, spill=SpillPlan(folder, 1, examples, 1, 1.0, 2.0))


@pytest.fixture
def short(monkeypatch):
    """Plan with little memory, of which the process itself holds none."""
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "_activations", lambda model, batches: 0)
    monkeypatch.setattr(memory, "block_entries", lambda gradients: 0)
    monkeypatch.setattr(memory, "SUMS", 0)

    def plan(folder, budget=120_000):
        model, batches = in_pairs("bert", 12)
        return memory.plan(
            model, batches, 6, spaces=SPACES, memory=budget, spill=folder
        )

    return plan


def same(one, other, tolerance=1e-12):
    assert one.kernels.keys() == other.kernels.keys()
    for name, kernel in one.kernels.items():
        assert_close(kernel, other.kernels[name], tolerance, of=name)
        assert one.traces[name] == pytest.approx(other.traces[name], rel=1e-9)
    assert one.sizes == other.sizes
    assert one.services == other.services


@pytest.mark.parametrize("right", [1, 3])
@pytest.mark.parametrize(
    "family",
    ["bert", "albert", "gpt2", "bloom", "llama", "t5", "cnn", "mixture", "twice"],
)
def test_kernels_are_those_of_passes(family, right, tmp_path):
    model, batches = in_pairs(family)
    spaces = SPACES
    if family in {"cnn", "mixture"}:
        spaces = EVERYTHING
    elif family == "llama":
        # Its layers have no biases.
        spaces = {"full": Full(), "some": SPACES["both"]}
    how, spilled = planned(model, batches, right, spaces, tmp_path)
    assert len(how.chunks) > 1
    one, other = (
        compute_as_planned(model, batches, each, spaces=spaces)
        for each in (how, spilled)
    )
    same(one, other)
    assert not list(tmp_path.iterdir())


class Tripled(nn.Module):
    """A weight within a product that no rule knows, beside layers that rules know."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 2)
        self.odd = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * torch.cumsum(self.odd, dim=0))


def test_what_the_definition_serves_does_not_wait_in_the_file(tmp_path):
    model = Tripled().double()
    batches = list(torch.randn(6, 8, dtype=torch.float64).split(2))
    how, spilled = planned(model, batches, 2, EVERYTHING, tmp_path, parts=3)
    assert len(how.chunks) > 1
    one, other = (
        compute_as_planned(model, batches, each, spaces=EVERYTHING)
        for each in (how, spilled)
    )
    assert one.services["odd"] is Service.DEFINITION
    same(one, other)


@pytest.mark.parametrize("family", ["bert", "cnn", "t5"])
def test_batches_may_be_cut_where_a_whole_one_has_no_room(family, tmp_path):
    model, whole = BY_NAME[family].build(), BY_NAME[family].inputs(7)
    batches = [take(whole, slice(i, j)) for i, j in ((0, 3), (3, 4), (4, 7))]
    cut = lambda k: planned(model, batches, 2, EVERYTHING, tmp_path, examples=k)
    passed = compute_as_planned(model, batches, cut(1)[0], spaces=EVERYTHING)
    for k in (1, 2, 3, 4):
        found = compute_as_planned(model, batches, cut(k)[1], spaces=EVERYTHING)
        same(found, passed)


@pytest.mark.parametrize("kind", ["signgd", "asymmetric_signgd"])
@pytest.mark.parametrize("reduce", ["trace", "margin"])
def test_so_are_they_of_other_kinds_and_reductions(kind, reduce, tmp_path):
    model, batches = in_pairs("bert")
    how, spilled = planned(model, batches, 2, SPACES, tmp_path)
    arguments = {"spaces": SPACES, "kind": kind, "reduce": reduce}
    same(
        compute_as_planned(model, batches, how, **arguments),
        compute_as_planned(model, batches, spilled, **arguments),
    )


@pytest.mark.parametrize("columns", [((0,), (1,)), ((1,), (0,), (2,))])
def test_so_are_they_of_columns_and_of_groups_of_left_examples(columns, tmp_path):
    model, batches = in_pairs("bert", 10)
    how, spilled = planned(
        model, batches, len(columns), SPACES, tmp_path, columns=columns
    )
    for left_bytes in (2**31, 20_000):
        one, other = (
            compute_as_planned(
                model, batches, replace(each, left_bytes=left_bytes), spaces=SPACES
            )
            for each in (how, spilled)
        )
        same(one, other)


def test_half_precision_waits_as_it_is(tmp_path):
    model, batches = in_pairs("bert")
    model.bfloat16()
    how, spilled = planned(model, batches, 2, SPACES, tmp_path)
    same(
        compute_as_planned(model, batches, how, spaces=SPACES),
        compute_as_planned(model, batches, spilled, spaces=SPACES),
        1e-6,
    )


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_going_on_runs_the_passes_once_more_and_has_the_same_bits(
    family, stop, tmp_path
):
    model, batches = in_pairs(family)
    model.float()
    _, spilled = planned(model, batches, 2, SPACES, tmp_path)
    assert spilled.passes == 1
    whole = compute_as_planned(model, batches, spilled, spaces=SPACES)
    kept = {}

    def keep(number, sums):
        if number == stop:
            kept["start"] = sums, number
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_as_planned(model, batches, spilled, spaces=SPACES, keep=keep)
    told = []
    # As in another process, which has found out nothing yet.
    coverage._known.clear()
    again = compute_as_planned(
        *(model, batches, spilled),
        spaces=SPACES,
        start=kept["start"],
        progress=lambda *what: told.append(what),
    )
    for name, kernel in whole.kernels.items():
        assert torch.equal(again.kernels[name], kernel), name
    assert again.traces == whole.traces
    # All examples have passed once, for all the parts that were left.
    done = [number for what, number, total in told if what == "passes"]
    assert done == sorted(set(done))
    assert done[-1] in {6, 12}


class Routed(nn.Module):
    """An expert that only examples with a negative first feature go to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2)
        self.expert = nn.Linear(6, 5)

    def forward(self, x):
        hidden = self.first(x)
        if bool((x[:, 0] < 0).any()):
            hidden = hidden + self.expert(x) * (x[:, :1] < 0)
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("file", [False, True])
def test_going_on_in_another_column_asks_the_same_examples(file, tmp_path):
    model = Routed()
    batches = [torch.randn(3, 6).abs() * sign for sign in (-1, 1)]
    columns = ((0,), (1,))
    how, spilled = planned(
        model, batches, 2, EVERYTHING, tmp_path, parts=3, columns=columns
    )
    how = spilled if file else how
    coverage._known.clear()
    whole = compute_as_planned(model, batches, how, spaces=EVERYTHING)
    for stop in range(1, how.parts):
        kept = {}

        def keep(number, sums, stop=stop, kept=kept):
            if number == stop:
                kept["start"] = sums, number
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compute_as_planned(model, batches, how, spaces=EVERYTHING, keep=keep)
        coverage._known.clear()
        again = compute_as_planned(
            model, batches, how, spaces=EVERYTHING, start=kept["start"]
        )
        assert torch.equal(again.kernels["full"], whole.kernels["full"])
        assert again.services == whole.services


def test_many_batches_take_few_open_files(tmp_path):
    model, whole = BY_NAME["bert"].build(), BY_NAME["bert"].inputs(60)
    batches = [take(whole, slice(i, i + 1)) for i in range(60)]
    how, spilled = planned(model, batches, 60, EVERYTHING, tmp_path, examples=1)
    passed = compute_as_planned(model, batches, how, spaces=EVERYTHING)
    used = psutil.Process().num_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
    try:
        found = compute_as_planned(model, batches, spilled, spaces=EVERYTHING)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    same(found, passed)


def test_the_file_is_as_large_as_planned(short, monkeypatch, tmp_path):
    monkeypatch.setattr(spill_plan.Rates, "of", lambda *_: FAST)
    nested = {f"rows {k}": Rows(k) for k in range(2, 9)} | {"full": Full()}
    model, batches = in_pairs("bert", 12)
    how = memory.plan(model, batches, 6, spaces=nested, memory=100_000, spill=tmp_path)
    written = []

    class File(FactorFile):
        def __exit__(self, *what):
            written.append(self._end)
            super().__exit__(*what)

    monkeypatch.setattr(memory, "FactorFile", File)
    compute_as_planned(model, batches, how, spaces=nested)
    # Numbers are in float64 here, and inputs that layers share are there once.
    assert 0.5 * how.spill.bytes < written[0] / 2 <= 1.05 * how.spill.bytes


def test_the_longest_examples_decide_how_many_pass_at_a_time(
    short, monkeypatch, tmp_path
):
    monkeypatch.setattr(spill_plan.Rates, "of", lambda *_: FAST)
    model = BY_NAME["bert"].build()
    batches = [text(8, 5), text(2, 15)]
    of = lambda some: (
        memory.plan(
            *(model, some, len(some)), spaces=SPACES, memory=90_000, spill=tmp_path
        ).spill
    )
    long, short_ones = of(batches), of(batches[:1])
    assert long.held / long.examples > 2 * short_ones.held / short_ones.examples


def test_a_full_disk_ends_the_work_with_a_clear_error(tmp_path, monkeypatch):
    model, batches = in_pairs("bert")
    _, spilled = planned(model, batches, 2, SPACES, tmp_path)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    opened = lambda **_: full.open("wb+", buffering=0)
    monkeypatch.setattr(factor_file.tempfile, "TemporaryFile", opened)
    with pytest.raises(StorageError, match=r"no room .* --no-spill") as refused:
        compute_as_planned(model, batches, spilled, spaces=SPACES)
    assert refused.value.__cause__.errno == errno.ENOSPC
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("measured", "spills"),
    [
        (FAST, True),
        (replace(FAST, written=1.0), False),
        (replace(FAST, read=1.0), False),
        (replace(FAST, multiply_adds=1e18), False),
    ],
)
def test_a_file_is_planned_where_it_takes_less_time(
    short, monkeypatch, tmp_path, measured, spills
):
    monkeypatch.setattr(spill_plan.Rates, "of", lambda *_: measured)
    how = short(tmp_path)
    assert how.parts > 1
    assert (how.spill is not None) == spills
    assert how.passes == (1 if spills else how.parts)
    # The parts are those of a plan without a file.
    assert how.chunks == short(None).chunks
    if spills:
        assert how.spill.seconds < how.spill.spared
        assert how.spill.held <= how.peak <= how.budget
        assert how.spill.examples == 2
        less = short(tmp_path, 60_000)
        assert less.spill.examples == 1
        assert less.spill.held < how.spill.held


def test_there_is_none_without_need_or_room(short, monkeypatch, tmp_path):
    monkeypatch.setattr(spill_plan.Rates, "of", lambda *_: FAST)
    assert short(tmp_path, 10**9).spill is None
    monkeypatch.setattr(spill_plan, "room_on_disk", lambda folder: 1000)
    assert short(tmp_path).spill is None


def test_there_is_none_where_the_folder_cannot_be_made(short, tmp_path):
    (tmp_path / "file").write_text("")
    assert short(tmp_path / "file" / "folder").spill is None


def test_the_plan_as_text_names_the_file(short, monkeypatch, tmp_path):
    monkeypatch.setattr(spill_plan.Rates, "of", lambda *_: FAST)
    how = short(tmp_path)
    model, batches = in_pairs("bert", 12)
    text = "\n".join(Estimate.of(model, batches, how).lines())
    assert "every example passes 1 x" in text
    assert f"waits in a file, {memory.in_units(how.spill.bytes)} in" in text
    assert "part 2:" in text
    slow = replace(how, spill=replace(how.spill, seconds=100.0))
    assert Estimate.of(model, batches, slow).seconds > 100


def test_rates_are_measured_once_a_day(tmp_path, monkeypatch):
    first = Rates.of(tmp_path / "new", torch.device("cpu"))
    assert min(first.multiply_adds, first.written, first.read) > 0
    with monkeypatch.context() as patch:
        patch.setattr(rates, "_disk", lambda folder: pytest.fail("measured again"))
        assert Rates.of(tmp_path / "new", torch.device("cpu")) == first
    with monkeypatch.context() as patch:
        later = rates.time.time() + 2 * rates.DAY
        patch.setattr(rates.time, "time", lambda: later)
        patch.setattr(rates, "_disk", lambda folder: (1.0, 2.0))
        assert Rates.of(tmp_path / "new", torch.device("cpu")).read == 2.0
    path = tmp_path / "new" / rates.FILE
    for damaged in ("{", "[1]", '{"some other machine": {}}'):
        path.write_text(damaged)
        Rates.of(tmp_path / "new", torch.device("cpu"))
        assert len(json.loads(path.read_text())) == 1 + ("machine" in damaged)


def test_a_disk_in_memory_has_no_room(tmp_path, monkeypatch):
    class Part:
        mountpoint, fstype, device = str(tmp_path), "tmpfs", "none"

    assert room_on_disk(tmp_path) > 0
    assert room_on_disk(tmp_path / "not" / "there") > 0
    monkeypatch.setattr(rates.psutil, "disk_partitions", lambda all: [Part])  # noqa: A006
    (tmp_path / "within").mkdir()
    for fstype, device in (("tmpfs", "none"), ("ext4", "/dev/zram0")):
        Part.fstype, Part.device = fstype, device
        assert room_on_disk(tmp_path / "within") == 0
        assert room_on_disk(tmp_path / "within" / "not there") == 0
    Part.fstype, Part.device = "ext4", "/dev/sda1"
    assert room_on_disk(tmp_path / "within") > 0


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    c=st.integers(1, 3),
    p=st.integers(1, 2000),
    dtype=st.sampled_from(DTYPES),
)
def test_features_are_read_as_they_were(tmp_path_factory, lengths, c, p, dtype):
    with FactorFile(tmp_path_factory.mktemp("file")) as file:
        parts = [torch.randn(p, n, c).to(dtype).permute(2, 1, 0) for n in lengths]
        pieces = [file.write(part) for part in parts]
        found = file.read(pieces)
        assert torch.equal(found, torch.cat(parts, dim=1))
        found.zero_()
        assert torch.equal(file.read(pieces), torch.cat(parts, dim=1))


def test_factors_are_read_as_they_were_and_what_they_share_is_kept_once(tmp_path):
    x, g = torch.randn(2, 3, 4), tuple(torch.randn(2, 3, 5) for _ in range(2))
    tokens = torch.tensor([[1, 2, 2], [0, 5, 3]])
    nothing = Matrix(torch.zeros(2, 0, 4), (torch.zeros(2, 0, 5),) * 2, output_dim=1)
    with FactorFile(tmp_path) as file:
        query = file.write([[Matrix(x, g), Table(tokens, g)]])
        key = file.write([[Matrix(x, g, rows=torch.arange(5))]])
        assert sum((query.sizes | key.sizes).values()) == (
            x.nbytes + tokens.nbytes + 3 * 2 * g[0].nbytes + 5 * 8
        )
        empty = file.write([[nothing]])
        assert sum(empty.sizes.values()) == 0
        (first, second), (third,), (fourth,), (vector,) = file.read(
            [query, key, empty, file.write(torch.ones(2, 3, 4))]
        )
        assert torch.equal(first.x, x)
        assert all(map(torch.equal, first.g, g))
        assert torch.equal(second.tokens, tokens)
        assert torch.equal(third.x, x)
        assert torch.equal(third.rows, torch.arange(5))
        assert (fourth.output_dim, fourth.x.shape) == (1, (2, 0, 4))
        assert isinstance(vector, Vector)
        # A mapped tensor may be changed; the file stays as it is.
        first.x.zero_()
        assert torch.equal(file.read([query])[0][0].x, x)
        # Another batch may have other numbers where the first had its own.
        file.begin()
        x.fill_(7)
        assert torch.equal(file.read([file.write([[Matrix(x, g)]])])[0][0].x, x)
    assert not list(tmp_path.iterdir())


FAST_DISK = """
from ntk import rates
rates.Rates.of = lambda *_: rates.Rates(1e6, 1e12, 1e12)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_keeps_its_budget_with_a_file(tmp_path):
    budget = "1.1GiB"
    options = ["--rows", "3", "--shots", "16", "--test-size", "30", "--quiet"]
    options += ["--memory", budget, "--no-cache", "--batch-size", "8"]
    options += ["--output", tmp_path]
    reports = {}
    for name in ("--spill", "--no-spill"):
        named = [name, "--name", name.strip("-")]
        peak = held_by_compare(*options, *named, before=FAST_DISK)
        assert peak < 1.1 * parse_bytes(budget)
        report = tmp_path / name.strip("-") / "report.json"
        reports[name] = json.loads(report.read_text())
    spilled, passed = (reports[name] for name in ("--spill", "--no-spill"))
    assert spilled["kernel"]["passes"] == 1
    assert passed["kernel"]["passes"] == passed["kernel"]["parts"] > 1
    for one, other in zip(spilled["spaces"], passed["spaces"], strict=True):
        assert one["trace_by_layer"] == pytest.approx(other["trace_by_layer"])
