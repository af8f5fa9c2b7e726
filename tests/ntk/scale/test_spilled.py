"""Features and factors in a file: the same kernels, one pass, the same bits."""

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
from hypothesis import given
from hypothesis import strategies as st
from parts import SPACES, as_planned, in_pairs, in_parts, plan_of
from torch import nn

from ntk.gradients import coverage
from ntk.gradients.coverage import Service
from ntk.gradients.factors import Matrix, Table, Vector
from ntk.gradients.function import take
from ntk.scale import factor_file, spill_plan
from ntk.scale import planning as memory
from ntk.scale.estimate import PlanCost
from ntk.scale.factor_file import FactorFile
from ntk.scale.spill_plan import SpillPlan, room_on_disk
from ntk.scale.storage import StorageError
from ntk.scale.units import in_units, parse_bytes
from ntk.scale.work import Work
from ntk.spaces.kinds import Full, Rows

EVERYTHING = {"full": Full()}


def planned(
    model, batches, right, spaces, folder, *, parts=6, columns=None, examples=2
):
    """Return a plan of several parts, and the same one with a file."""
    whole = in_parts(model, batches, right, spaces, sys.maxsize)
    entries = whole.chunks[0].entries // parts
    plan = in_parts(model, batches, right, spaces, entries, columns)
    return plan, replace(plan, spill=SpillPlan(folder, 1, examples, 1))


@pytest.fixture
def short(monkeypatch):
    """Plan with little memory, none of it taken by the process itself."""
    monkeypatch.setattr(memory, "held", lambda device: 0)
    monkeypatch.setattr(memory, "_activations", lambda work, batches: 0)
    monkeypatch.setattr(memory, "block_entries", lambda gradients: 0)
    monkeypatch.setattr(memory, "SUMS", 0)

    def planned_in(folder, budget=120_000):
        model, batches = in_pairs("bert", 12)
        return plan_of(model, batches, 6, spaces=SPACES, memory=budget, spill=folder)

    return planned_in


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
def test_kernels_equal_those_of_several_passes(family, right, tmp_path):
    model, batches = in_pairs(family)
    spaces = SPACES
    if family in {"cnn", "mixture"}:
        spaces = EVERYTHING
    elif family == "llama":
        # Its layers have no biases.
        spaces = {"full": Full(), "some": SPACES["both"]}
    plan, spilled = planned(model, batches, right, spaces, tmp_path)
    assert len(plan.chunks) > 1
    one, other = (
        as_planned(model, batches, each, spaces=spaces) for each in (plan, spilled)
    )
    same(one, other)
    assert not list(tmp_path.iterdir())


class Tripled(nn.Module):
    """A weight in an operation without a rule, beside layers with rules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 2)
        self.odd = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * torch.cumsum(self.odd, dim=0))


def test_parameters_served_by_the_definition_are_not_in_the_file(tmp_path):
    model = Tripled().double()
    batches = list(torch.randn(6, 8, dtype=torch.float64).split(2))
    plan, spilled = planned(model, batches, 2, EVERYTHING, tmp_path, parts=3)
    assert len(plan.chunks) > 1
    one, other = (
        as_planned(model, batches, each, spaces=EVERYTHING) for each in (plan, spilled)
    )
    assert one.services["odd"] is Service.DEFINITION
    same(one, other)


@pytest.mark.parametrize("family", ["bert", "cnn", "t5"])
def test_batches_may_be_cut_if_a_whole_one_does_not_fit(family, tmp_path):
    model, whole = BY_NAME[family].build(), BY_NAME[family].inputs(7)
    batches = [take(whole, slice(i, j)) for i, j in ((0, 3), (3, 4), (4, 7))]
    cut = lambda k: planned(model, batches, 2, EVERYTHING, tmp_path, examples=k)
    passed = as_planned(model, batches, cut(1)[0], spaces=EVERYTHING)
    for k in (1, 2, 3, 4):
        found = as_planned(model, batches, cut(k)[1], spaces=EVERYTHING)
        same(found, passed)


@pytest.mark.parametrize("kind", ["signgd", "asymmetric_signgd"])
@pytest.mark.parametrize("reduce", ["trace", "margin"])
def test_other_kinds_and_reductions(kind, reduce, tmp_path):
    model, batches = in_pairs("bert")
    plan, spilled = planned(model, batches, 2, SPACES, tmp_path)
    arguments = {"spaces": SPACES, "kind": kind, "reduce": reduce}
    same(
        as_planned(model, batches, plan, **arguments),
        as_planned(model, batches, spilled, **arguments),
    )


@pytest.mark.parametrize("columns", [((0,), (1,)), ((1,), (0,), (2,))])
def test_columns_and_groups_of_left_examples(columns, tmp_path):
    model, batches = in_pairs("bert", 10)
    plan, spilled = planned(
        model, batches, len(columns), SPACES, tmp_path, columns=columns
    )
    for left_bytes in (2**31, 20_000):
        one, other = (
            as_planned(
                model, batches, replace(each, left_bytes=left_bytes), spaces=SPACES
            )
            for each in (plan, spilled)
        )
        same(one, other)


def test_half_precision_is_stored_as_it_is(tmp_path):
    model, batches = in_pairs("bert")
    model.bfloat16()
    plan, spilled = planned(model, batches, 2, SPACES, tmp_path)
    same(
        as_planned(model, batches, plan, spaces=SPACES),
        as_planned(model, batches, spilled, spaces=SPACES),
        1e-6,
    )


@pytest.mark.parametrize(
    ("family", "stop"), [("bert", 1), ("bert", 3), ("bert", 5), ("t5", 3)]
)
def test_resuming_runs_the_passes_once_and_gives_the_same_bits(family, stop, tmp_path):
    model, batches = in_pairs(family)
    model.float()
    _, spilled = planned(model, batches, 2, SPACES, tmp_path)
    assert spilled.passes == 1
    whole = as_planned(model, batches, spilled, spaces=SPACES)
    kept = {}

    def keep(number, sums):
        if number == stop:
            kept["start"] = sums, number
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_planned(model, batches, spilled, spaces=SPACES, keep=keep)
    reports = []
    # Forget the verdicts, as a new process would.
    coverage._known.clear()
    again = as_planned(
        *(model, batches, spilled),
        spaces=SPACES,
        start=kept["start"],
        progress=lambda *report: reports.append(report),
    )
    for name, kernel in whole.kernels.items():
        assert torch.equal(again.kernels[name], kernel), name
    assert again.traces == whole.traces
    # Every example has passed once, for all remaining parts.
    done = [number for step, number, total in reports if step == "passes"]
    assert done == sorted(set(done))
    assert done[-1] in {6, 12}


class Routed(nn.Module):
    """An expert used only by examples with a negative first feature."""

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
def test_resuming_in_another_column_compares_on_the_same_examples(file, tmp_path):
    model = Routed()
    batches = [torch.randn(3, 6).abs() * sign for sign in (-1, 1)]
    columns = ((0,), (1,))
    plan, spilled = planned(
        model, batches, 2, EVERYTHING, tmp_path, parts=3, columns=columns
    )
    plan = spilled if file else plan
    coverage._known.clear()
    whole = as_planned(model, batches, plan, spaces=EVERYTHING)
    for stop in range(1, plan.parts):
        kept = {}

        def keep(number, sums, stop=stop, kept=kept):
            if number == stop:
                kept["start"] = sums, number
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            as_planned(model, batches, plan, spaces=EVERYTHING, keep=keep)
        coverage._known.clear()
        again = as_planned(model, batches, plan, spaces=EVERYTHING, start=kept["start"])
        assert torch.equal(again.kernels["full"], whole.kernels["full"])
        assert again.services == whole.services


def test_many_batches_take_few_open_files(tmp_path):
    model, whole = BY_NAME["bert"].build(), BY_NAME["bert"].inputs(24)
    batches = [take(whole, slice(i, i + 1)) for i in range(24)]
    plan, spilled = planned(model, batches, 24, EVERYTHING, tmp_path, examples=1)
    passed = as_planned(model, batches, plan, spaces=EVERYTHING)
    used = psutil.Process().num_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, hard))
    try:
        found = as_planned(model, batches, spilled, spaces=EVERYTHING)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    same(found, passed)


def test_the_file_is_as_large_as_planned(short, monkeypatch, tmp_path):
    nested = {f"rows {k}": Rows(k) for k in range(2, 9)} | {"full": Full()}
    model, batches = in_pairs("bert", 12)
    plan = plan_of(model, batches, 6, spaces=nested, memory=100_000, spill=tmp_path)
    written = []

    class File(FactorFile):
        def __exit__(self, *what):
            written.append(self._end)
            super().__exit__(*what)

    monkeypatch.setattr(memory, "FactorFile", File)
    as_planned(model, batches, plan, spaces=nested)
    # Numbers are in float64 here, and shared inputs are written once.
    assert 0.5 * plan.spill.bytes < written[0] / 2 <= 1.05 * plan.spill.bytes


def test_the_longest_examples_decide_how_many_pass_at_a_time(
    short, monkeypatch, tmp_path
):
    model = BY_NAME["bert"].build()
    batches = [text(8, 5), text(2, 15)]
    spill_of = lambda batches: (
        plan_of(
            *(model, batches, len(batches)),
            spaces=SPACES,
            memory=90_000,
            spill=tmp_path,
        ).spill
    )
    long, short_ones = spill_of(batches), spill_of(batches[:1])
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
        as_planned(model, batches, spilled, spaces=SPACES)
    assert refused.value.__cause__.errno == errno.ENOSPC
    assert str(tmp_path) in str(refused.value)


def test_a_file_replaces_further_passes(short, tmp_path):
    plan = short(tmp_path)
    assert plan.parts > 1
    assert plan.passes == 1
    # The parts are those of a plan without a file.
    without = short(None)
    assert plan.chunks == without.chunks
    assert without.passes == without.parts
    assert plan.spill.held <= plan.peak <= plan.budget
    assert plan.spill.examples == 2
    less = short(tmp_path, 60_000)
    assert less.spill.examples == 1
    assert less.spill.held < plan.spill.held


def test_no_file_without_need_or_room(short, monkeypatch, tmp_path):
    assert short(tmp_path, 10**9).spill is None
    monkeypatch.setattr(spill_plan, "room_on_disk", lambda folder: 1000)
    assert short(tmp_path).spill is None


def test_no_file_if_the_folder_cannot_be_created(short, tmp_path):
    (tmp_path / "file").write_text("")
    assert short(tmp_path / "file" / "folder").spill is None


def test_the_plan_as_text_names_the_file(short, monkeypatch, tmp_path):
    plan = short(tmp_path)
    model, batches = in_pairs("bert", 12)
    work = Work(model, batches, 6, SPACES)
    text = "\n".join(PlanCost.of(work, plan).lines())
    assert "every example passes 1 x" in text
    assert f"kept in a file, {in_units(plan.spill.bytes)} in" in text
    assert "part 2:" in text


def test_a_disk_in_memory_has_no_room(tmp_path, monkeypatch):
    class Mount:
        mountpoint, fstype, device = str(tmp_path), "tmpfs", "none"

    assert room_on_disk(tmp_path) > 0
    assert room_on_disk(tmp_path / "not" / "there") > 0
    monkeypatch.setattr(spill_plan.psutil, "disk_partitions", lambda all: [Mount])  # noqa: A006
    (tmp_path / "within").mkdir()
    for fstype, device in (("tmpfs", "none"), ("ext4", "/dev/zram0")):
        Mount.fstype, Mount.device = fstype, device
        assert room_on_disk(tmp_path / "within") == 0
        assert room_on_disk(tmp_path / "within" / "not there") == 0
    Mount.fstype, Mount.device = "ext4", "/dev/sda1"
    assert room_on_disk(tmp_path / "within") > 0


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    c=st.integers(1, 3),
    p=st.integers(1, 2000),
    dtype=st.sampled_from(DTYPES),
)
def test_features_are_read_back_unchanged(tmp_path_factory, lengths, c, p, dtype):
    with FactorFile(tmp_path_factory.mktemp("file")) as file:
        parts = [torch.randn(p, n, c).to(dtype).permute(2, 1, 0) for n in lengths]
        pieces = [file.write(part) for part in parts]
        found = file.read(pieces)
        assert torch.equal(found, torch.cat(parts, dim=1))
        found.zero_()
        assert torch.equal(file.read(pieces), torch.cat(parts, dim=1))


def test_factors_are_read_back_and_shared_tensors_are_written_once(tmp_path):
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
        # Changing a mapped tensor does not change the file.
        first.x.zero_()
        assert torch.equal(file.read([query])[0][0].x, x)
        # A later batch may reuse the memory of an earlier one.
        file.begin()
        x.fill_(7)
        assert torch.equal(file.read([file.write([[Matrix(x, g)]])])[0][0].x, x)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_run_stays_within_its_budget_with_a_file(tmp_path):
    budget = "1.1GiB"
    options = ["--rows", "3", "--shots", "16", "--test-size", "30", "--quiet"]
    options += ["--memory", budget, "--no-cache", "--batch-size", "8"]
    options += ["--output", tmp_path]
    reports = {}
    for name in ("--spill", "--no-spill"):
        named = [name, "--name", name.strip("-")]
        peak = held_by_compare(*options, *named)
        assert peak < 1.1 * parse_bytes(budget)
        report = tmp_path / name.strip("-") / "report.json"
        reports[name] = json.loads(report.read_text())
    spilled, passed = (reports[name] for name in ("--spill", "--no-spill"))
    assert spilled["kernel"]["passes"] == 1
    assert passed["kernel"]["passes"] == passed["kernel"]["parts"] > 1
    for one, other in zip(spilled["spaces"], passed["spaces"], strict=True):
        assert one["trace_by_layer"] == pytest.approx(other["trace_by_layer"])
