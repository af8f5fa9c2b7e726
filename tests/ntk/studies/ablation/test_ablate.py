"""The ablation as a command: its records, its resumption, its refusals."""

import json
import pickle
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import BY_NAME
from checkpoints import checkpoint
from commands import exit_code
from tasks_on_disk import write_task

from ntk import ablate
from ntk.classifiers.tuning import tune
from ntk.gradients.data_selection import calibrate
from ntk.kernels.empirical import empirical_ntk
from ntk.measures import distance
from ntk.scale import Resources, parts, planning
from ntk.spaces.kinds import Columns, Full, Head, Rows
from ntk.spaces.notation import parse_space
from ntk.spaces.restricted import Without
from ntk.studies.ablation.records import (
    ALL,
    AXES,
    FULL,
    Selection,
    origin,
    selection_records,
    selections,
)
from ntk.studies.ablation.run import units
from ntk.studies.ablation.variance import expected_error, scatters
from ntk.studies.folder import Cell, Key, Study
from ntk.studies.protocol import protocol_of
from rocoft.commands.choices import STRATEGIES
from rocoft.models.architecture import Architecture
from rocoft.models.readouts import logits
from rocoft.training.methods import parse_method

CELL = Cell("words", 4, 13)


run = partial(exit_code, ablate.main)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """One real ablation of a tiny model, and its options."""
    place = tmp_path_factory.mktemp("ablate")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(place / "tiny")[0]
    write_task(place / "data")
    asked = (
        *("--model", model, "--data-dir", str(place / "data"), "--tasks", "words"),
        *("--shots", "4", "--seeds", "13", "21", "--test-size", "20"),
        *("--counts", "1", "3", "all", "--random-seeds", "2", "--dtype", "float64"),
        *("--strategies", "first", "random", "max", "gradient"),
        *("--finetune-points", "rows:1", "--num-train-epochs", "1", "--lrs"),
        *("rows:1=1e-3", "--output", str(place / "runs"), "--quiet"),
    )
    assert run(*asked) == 0
    options = ablate.main.parse(asked)
    same = protocol_of(options)
    work = units(options, same)
    folder = place / "runs" / "ablation"
    records = {k: Study(folder).read(k) for unit in work for k in unit.keys}
    split = same.split(CELL)
    backbone = same.backbone(split)
    batches = []
    for part in (split.train, split.dev, split.test):
        batches += [backbone.encode([example], 1)[0][0] for example in part]
    return SimpleNamespace(
        asked=asked,
        folder=folder,
        records=records,
        work=work,
        protocol=same,
        split=split,
        backbone=backbone,
        batches=batches,
    )


def record(study, kind, subject):
    return study.records[Key(CELL, kind, subject)]


def margins(study, space, examples=8):
    """Return a kernel between so many examples and the training ones, anew."""
    batches = study.batches[:examples]
    module = study.backbone.module
    return empirical_ntk(
        module, batches, batches[:8], space=space, reduce="margin"
    ).numpy()


def own_outputs(study):
    with torch.no_grad():
        return torch.cat([logits(study.backbone.module(**b)) for b in study.batches])


def headless(study):
    head = Architecture(study.backbone.module).head
    return Without(Full(), tuple(head))


# Selections.


def test_selections_are_spaces_and_methods_by_name():
    found = selections(AXES, (1, 3), STRATEGIES, 4)
    assert len(found) == len({each.name for each in found}) == 3 * 2 * (7 + 4)
    for each in found:
        assert Selection.of(each.name) == each
        assert Selection.of(each.estimate) == each
        assert parse_space(each.name) == each.space
        method = parse_method(each.name)
        assert str(method) == each.name
        assert method.slices == {"rows": "row", "columns": "column"}.get(
            each.axis, "both"
        )


# Records.


def test_every_record_is_there(study):
    keys = [(k.cell.seed, k.kind, k.subject) for k in study.records]
    # Strategies, with two random ones; both references; and two axes of estimates.
    kernels, estimates = 3 * 2 * (3 + 2) + 2, 2 * 2 * 2
    assert len(keys) == len(set(keys)) == 2 * (kernels + estimates + 1 + 1)
    assert all(study.records.values())
    report = json.loads((study.folder / "report.json").read_text())
    assert report["missing"] == []
    assert report["records"]["there"] == len(keys)
    assert {f.name for f in study.folder.iterdir()} >= {"report.html", "report.md"}


@pytest.mark.parametrize(
    "name",
    [
        "rows:3",
        "columns:1/strategy=random/seed=1",
        "rows:1/strategy=max+columns:1/strategy=max",
    ],
)
def test_a_selection_is_compared_with_the_full_kernel(study, name):
    found = record(study, "selection", name)
    body, full, head = (
        margins(study, space) for space in (parse_space(name), headless(study), Head())
    )
    for own, reference, view in (
        (body, full, found["body"]),
        (body + head, full + head, found["whole"]),
    ):
        raw = np.linalg.norm(own - reference) / np.linalg.norm(reference)
        scaled = distance.relative_difference(reference, own, "frobenius", rescale=True)
        assert view["distance"]["frobenius"] == pytest.approx(raw, rel=1e-9)
        assert view["distance"]["frobenius_rescaled"] == pytest.approx(scaled, rel=1e-7)


def test_a_selection_is_classified_with(study):
    name = "rows:3/strategy=gradient"
    found = record(study, "selection", name)
    rows = 8 + 8 + 20
    train = study.batches[:8]
    space = calibrate(parse_space(name), study.backbone.module, train)
    body, head = (margins(study, s, rows) for s in (space, Head()))
    labels = [e.label for e in (*study.split.train, *study.split.dev)]
    f0 = own_outputs(study)
    truth = [e.label for e in study.split.test]
    judge = lambda f, y: float((f.argmax(axis=1) == y).mean())
    for view, kernel, start in (
        (found["body"], body, None),
        (found["whole"], body + head, f0.numpy()),
    ):
        tuned = tune(kernel, labels[:8], labels[8:], judge=judge, f0=start)
        assert view["test"]["accuracy"] == judge(tuned.test, truth)
        assert view["dev"] == tuned.dev_score
        assert view["regularisation"] == tuned.regularisation
        assert view["offset_scale"] == tuned.offset_scale


def test_all_is_every_row_and_every_column(study):
    found = record(study, "selection", ALL)
    architecture = Architecture(study.backbone.module)
    weights = architecture.targets
    full = margins(study, headless(study))
    for space in (
        Rows(indices={n: tuple(range(of.outputs)) for n, of in weights.items()}),
        Columns(indices={n: tuple(range(of.inputs)) for n, of in weights.items()}),
    ):
        own = margins(study, space)
        raw = np.linalg.norm(own - full) / np.linalg.norm(full)
        assert raw > 0.01, "the linear weights are not all"
        assert found["body"]["distance"]["frobenius"] == pytest.approx(raw, rel=1e-9)
    sizes = [architecture.parameters[name].numel() for name in weights]
    assert found["parameters"] == sum(sizes)


def test_the_full_record_has_the_controls(study):
    found = record(study, "selection", FULL)
    assert found["body"]["distance"]["frobenius"] == 0
    f0 = own_outputs(study)[16:]
    truth = torch.tensor([e.label for e in study.split.test])
    accuracy = float((f0.argmax(dim=1) == truth).double().mean())
    assert found["own_outputs"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert 0 <= found["head"]["test"]["accuracy"] <= 1


@pytest.mark.parametrize("axis", [Rows, Columns])
def test_a_variance_record_holds_the_error_and_its_expectation(study, axis):
    name = f"{axis.__name__.lower()}:3/strategy=random/seed=1/rescale"
    found = record(study, "variance", name)
    weights = Architecture(study.backbone.module).targets
    every = {n: tuple(range(of.outputs)) for n, of in weights.items()}
    whole = margins(study, Rows(indices=every))
    estimate = margins(study, axis(3, strategy="random", seed=1, rescale=True))
    norm = (whole**2).sum()
    error = ((estimate - whole) ** 2).sum() / norm
    assert found["measured"] == pytest.approx(error, rel=1e-9)
    drawn = scatters(
        study.backbone.module,
        study.batches[:8],
        axis(1),
        entries=10**9,
        reduce="margin",
    )
    assert found["expected"] == pytest.approx(expected_error(drawn, 3) / norm, rel=1e-9)


def test_the_origin_record_parts_the_full_kernel(study):
    found = record(study, "origin", FULL)
    full = margins(study, Full())
    assert total(found["trace"]) == pytest.approx(np.trace(full), rel=1e-9)
    parameters = Architecture(study.backbone.module).parameters
    assert total(found["parameters"]) == sum(p.numel() for p in parameters.values())
    query = Full().at("*.attention.self.query.weight")
    own = margins(study, query)
    assert sum(found["trace"]["attention.self.query"].values()) == pytest.approx(
        np.trace(own), rel=1e-9
    )
    cosine = distance.cosine(full, own)
    assert found["cosine"]["kind"]["attention.self.query"] == pytest.approx(cosine)
    cosine = distance.cosine(full, margins(study, Full().layers(1)))
    assert found["cosine"]["layer"]["layer 1"] == pytest.approx(cosine)


def total(nested):
    return sum(sum(by_layer.values()) for by_layer in nested.values())


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        (
            "bert",
            "attention.self.query attention.self.key attention.self.value "
            "attention.output.dense intermediate.dense output.dense "
            "bert.pooler.dense",
        ),
        ("gpt2", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        (
            "llama",
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "mlp.gate_proj mlp.up_proj mlp.down_proj",
        ),
    ],
)
def test_every_parameter_has_an_origin(family, kinds):
    architecture = Architecture(BY_NAME[family].build())
    origins = {name: origin(name, architecture) for name in architecture.parameters}
    special = {"head", "norms", "embeddings"}
    if family != "llama":
        special.add("biases")
    assert {kind for kind, _ in origins.values()} == {*kinds.split(), *special}
    for name, (kind, layer) in origins.items():
        block = architecture.block(name)
        if block is not None:
            assert layer == f"layer {block}"
        assert (kind == "head") == (name in architecture.head) == (layer == "head")


def test_fine_tuned_points_stand_beside_their_kernels(study):
    report = json.loads((study.folder / "report.json").read_text())
    (row,) = report["tuned"]
    scores = [
        study.records[Key(Cell("words", 4, seed), "finetune", "rows:1")]
        for seed in (13, 21)
    ]
    assert row["score"]["values"] == [
        pytest.approx(s["test"]["accuracy"], abs=1e-5) for s in scores
    ]
    kernels = [
        study.records[Key(Cell("words", 4, seed), "selection", "rows:1")]
        for seed in (13, 21)
    ]
    assert row["kernel"]["values"] == [
        pytest.approx(k["whole"]["test"]["accuracy"], abs=1e-5) for k in kernels
    ]


# Runs.


def texts(folder):
    """Return what a study leaves but its figures."""
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.suffix in {".json", ".md"} and "settings" not in file.name
    }


def without_seconds(texts):
    """Return texts without the times that fine-tuning took."""
    found = {}
    for name, text in texts.items():
        if "finetune" in name:
            held = json.loads(text)
            del held["seconds"]
            text = json.dumps(held)
        found[name] = text
    return found


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_reports_the_same(study, monkeypatch):
    before = texts(study.folder)
    monkeypatch.setattr(
        "ntk.studies.folder.Study.write", lambda *_: pytest.fail("computed")
    )
    assert run(*study.asked) == 0
    assert texts(study.folder) == before


@pytest.mark.slow
def test_records_that_are_lost_are_made_again_bit_by_bit(study, capsys):
    before = texts(study.folder)
    records = study.folder / "records"
    lost = [
        next(records.rglob(pattern))
        for pattern in ("selection-rows-3-*", "variance-columns-1-*", "origin-*")
    ]
    for file in lost:
        file.unlink()
    cut = next(records.rglob("selection-columns-3-strategy-gradient*"))
    cut.write_text(cut.read_text()[:200])
    assert run(*study.asked, "--report-only") == 0
    assert f"{cut.name} is still not whole: left out" in capsys.readouterr().err
    told = (study.folder / "report.md").read_text()
    assert re.search(r"4 of \d+ records are missing", told)
    assert not lost[0].exists()
    assert run(*study.asked) == 0
    assert f"{cut.name} was not whole: made again" in capsys.readouterr().err
    assert without_seconds(texts(study.folder)) == without_seconds(before)


def test_memory_changes_the_passes_alone(study, monkeypatch):
    names = (FULL, "rows:3", "columns:1/strategy=random")
    passes = []
    compute = parts.compute
    monkeypatch.setattr(
        parts, "compute", lambda *a, **k: passes.append(1) or compute(*a, **k)
    )
    # Count nothing but what passes keep.
    monkeypatch.setattr(planning, "held", lambda device: 0)
    monkeypatch.setattr(planning, "_activations", lambda work, batches: 0)
    monkeypatch.setattr(planning, "block_entries", lambda gradients: 0)
    monkeypatch.setattr(planning, "SUMS", 0)
    records = {}
    for memory in (10**9, 10**5):
        passes.clear()
        protocol = replace(study.protocol, resources=Resources(memory=memory))
        records[memory] = selection_records(protocol, CELL, names, names)
        assert (len(passes) > 4) == (memory == 10**5)
    for one, other in zip(*records.values(), strict=True):
        for view in ("body", "whole"):
            assert one[view]["distance"] == pytest.approx(
                other[view]["distance"], rel=1e-6, abs=1e-9, nan_ok=True
            )


def test_units_can_be_sent_to_other_processes(study):
    for unit in study.work:
        assert pickle.loads(pickle.dumps(unit)) == unit


@pytest.mark.slow
def test_a_prompted_model_has_no_head_of_its_own(study, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(tmp_path / "masked", "BertForMaskedLM")[0]
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for part in ("train", "test"):
        text = study.folder.parents[1] / "data" / "words" / f"{part}.jsonl"
        (tmp_path / "data" / "sst2" / f"{part}.jsonl").write_text(text.read_text())
    options = (
        *("--model", model, "--data-dir", tmp_path / "data", "--tasks", "sst2"),
        *("--shots", "4", "--seeds", "13", "--test-size", "8", "--axes", "rows"),
        *("--counts", "2", "--strategies", "first", "random", "--random-seeds", "2"),
        *("--output", tmp_path, "--quiet"),
    )
    assert run(*options) == 0
    report = json.loads((tmp_path / "ablation" / "report.json").read_text())
    assert {row["name"] for row in report["references"]} == {"full", "own outputs"}
    (curve, _) = report["curves"]
    assert curve["rescaled"] == curve["rescaled_with_head"]
    (gain,) = {
        json.dumps(row["over_counts"])
        for row in report["gains"]
        if (row["task"], row["axis"], row["measure"]) == (None, "rows", "raw")
    }
    assert json.loads(gain)["splits"] == 1
    assert json.loads(gain)["gain"] is not None


# Options.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--counts", "1", "99"], "rows=99 cannot be selected from"),
        (["--counts", "0"], "'0' must be a whole number of at least 1"),
        (["--counts", "some"], "--counts"),
        (["--counts", "1", "1"], "--counts holds 1 more than once"),
        (["--axes", "rows", "rows"], "--axes holds rows more than once"),
        (["--axes", "diagonals"], "diagonals"),
        (["--strategies", "best"], "best"),
        (["--random-seeds", "0"], "'0' must be a whole number of at least 1"),
        (["--memory", "0"], "'0' is no amount of memory"),
        (["--memory", "2"], "'2' has no unit"),
        (["--finetune-points", "rows"], "rows"),
        (["--finetune-points", "rows:1", "rows:1"], "--finetune-points holds rows:1"),
        (["--tasks", "nothing"], "nothing"),
        (["--seeds", "3", "3"], "--seeds holds 3 more than once"),
        (["--shots", "4000"], "shots=4000"),
        (["--spaces", "full"], "--spaces"),
        (["--kinds", "signgd"], "--kinds"),
        (["--coupled"], "--coupled"),
        (["--choose-lr", "first"], "--choose-lr"),
    ],
)
def test_bad_input(study, tmp_path, capsys, arguments, message):
    assert run(*study.asked, "--output", tmp_path / "runs", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_done(study, tmp_path, capsys):
    options = (*study.asked, "--seeds", "13", "--strategies", "first", "--axes", "rows")
    options += ("--counts", "1", "--finetune-points", "rows:99", "--output", tmp_path)
    assert run(*options) == 1
    assert "failed: words-4-13 finetune rows:99: " in capsys.readouterr().err
    report = json.loads((tmp_path / "ablation" / "report.json").read_text())
    assert [row["subject"] for row in report["missing"]] == ["rows:99"]


def test_defaults():
    options = ablate.main.parse([])
    assert options.splits.seeds == (13, 21, 42)
    assert options.measured.counts == (1, 2, 3, 5, 8, 16, 64, "all")
    assert options.measured.axes == AXES
    assert options.measured.strategies == STRATEGIES
    assert options.output.name == "ablation"
