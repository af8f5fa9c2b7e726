"""The lambda study: its records against plain loops, their summary, the command."""

import copy
import json
import math
import pickle
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import BY_NAME
from checkpoints import checkpoint
from commands import exit_code
from tasks_on_disk import write_task

from ntk.linearization.closeness import lipschitz
from ntk.linearization.model import linearize
from ntk.linearization.tabulated import (
    TabulatedModel,
    exact_lipschitz,
    jacobian_rows,
    tabulated,
)
from ntk.linearize import main
from ntk.reporting.page import markdown
from ntk.spaces.kinds import Full
from ntk.studies.folder import Cell, Key, Study
from ntk.studies.lambdas.records import FRACTIONS, Training, bounds
from ntk.studies.lambdas.report import report_page
from ntk.studies.lambdas.run import units
from ntk.studies.lambdas.summary import MEASURES, SLOPES, collect
from ntk.studies.protocol import protocol_of
from rocoft.models.readouts import logits
from rocoft.training.anchor import Anchor
from rocoft.training.methods import apply_method, parse_method, trained_parameters
from rocoft.training.readout_trainer import ReadoutTrainer
from rocoft.training.trainer import fine_tune

FLOAT = torch.float64
CELL = Cell("words", 4, 13)
RATE, STEPS = 0.02, 6


run = partial(exit_code, main)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A tiny model and a task."""
    folder = tmp_path_factory.mktemp("linearize")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = checkpoint(folder / "tiny")[0]
    write_task(folder / "data")
    return SimpleNamespace(folder=folder, model=model)


def done(place, name, *more):
    """Run a study; return its options, records and folder."""
    asked = (
        *("--model", place.model, "--data-dir", str(place.folder / "data")),
        *("--tasks", "words", "--shots", "4", "--test-size", "20", "--dtype"),
        *("float64", "--methods", "lora:2", "--name", name, "--quiet", "--output"),
        *(str(place.folder / "runs"), *more),
    )
    assert run(*asked) == 0
    options = main.parse(asked)
    same = protocol_of(options)
    work = units(options, same)
    folder = place.folder / "runs" / name
    study = Study(folder)
    records = {k: study.read(k) for unit in work for k in unit.keys}
    assert all(records.values())
    return SimpleNamespace(
        asked=asked, folder=folder, records=records, protocol=same, work=work
    )


@pytest.fixture(scope="session")
def study(place):
    """Cross-entropy by AdamW in small batches."""
    return done(
        *(place, "entropy", "--seeds", "13", "21", "--lambdas", "0", "0.5", "2", "8"),
        *("--num-train-epochs", "2", "--per-device-train-batch-size", "4"),
    )


@pytest.fixture(scope="session")
def squared(place):
    """Squared loss by gradient descent on all examples."""
    return done(
        *(place, "squared", "--seeds", "13", "--lambdas", "0", "3", "--loss"),
        *("squared", "--optimizer", "sgd", "--lrs", f"lora:2={RATE}"),
        *("--num-train-epochs", str(STEPS), "--per-device-train-batch-size", "8"),
    )


def prepared(study):
    """Return the split, and the model as fine-tuning begins with it."""
    split = study.protocol.split(CELL)
    backbone = study.protocol.backbone(split)
    with torch.random.fork_rng():
        torch.manual_seed(CELL.seed)
        model = apply_method(
            copy.deepcopy(backbone.module), parse_method("lora:2"), train_head=True
        )
    return split, backbone, model.eval()


def encoded(backbone, examples):
    (batch,), order = backbone.encode(examples, len(examples))
    return batch, torch.tensor([examples[i].label for i in order])


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


# Rows of Jacobians.


def rows_by_hand(model, batch):
    """Return the outputs and the Jacobian, row by row."""
    outputs = logits(model(**batch))
    parameters = list(trained_parameters(model).values())
    rows = [
        flat(torch.autograd.grad(value, parameters, retain_graph=True))
        for value in outputs.flatten()
    ]
    return outputs.detach(), torch.stack(rows)


def test_rows_and_the_function_that_they_make(squared):
    split, backbone, model = prepared(squared)
    batch, _ = encoded(backbone, split.train)
    f0, J = rows_by_hand(model, batch)
    held, plain = tabulated(model), linearize(model, Full())
    assert type(held) is TabulatedModel
    torch.testing.assert_close(jacobian_rows(held, batch), J, rtol=1e-9, atol=1e-12)
    d = torch.randn(J.shape[1], dtype=FLOAT)
    with torch.no_grad():
        for each in (held, plain):
            each.delta.copy_(d)
    expected = f0 + (J @ d).view_as(f0)
    for each in (held, plain):
        each.train()
        outputs = each(**batch)
        torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-12)
        outputs.square().sum().backward()
        pulled = J.T @ (2 * expected).flatten()
        torch.testing.assert_close(each.delta.grad, pulled, rtol=1e-9, atol=1e-10)
    assert len(held.table) == len(split.train)
    with torch.no_grad():
        torch.testing.assert_close(held(**batch), expected, rtol=1e-9, atol=1e-12)


def test_examples_are_known_however_they_are_padded(squared, monkeypatch):
    split, backbone, model = prepared(squared)
    held = tabulated(model)
    short = min(split.train, key=lambda e: len(e.a))
    long = max(split.train, key=lambda e: len(e.a))
    alone, _ = encoded(backbone, [short])
    both, _ = encoded(backbone, [short, long])
    assert alone["input_ids"].shape[1] < both["input_ids"].shape[1]
    first = held(**alone)
    held(**both)
    assert len(held.table) == 2
    monkeypatch.setattr(held, "start", lambda *_: pytest.fail("computed again"))
    assert torch.equal(held(**alone), first)


def test_without_room_nothing_is_kept(squared):
    split, backbone, model = prepared(squared)
    batch, _ = encoded(backbone, split.train)
    held = tabulated(model)
    held.room = 2 * held.delta.nbytes * 3
    outputs = held(**batch)
    assert len(held.table) == 3
    torch.testing.assert_close(outputs, linearize(model, Full())(**batch))
    outputs.sum().backward()
    assert held.delta.grad.abs().max() > 0


def test_training_it_is_training_the_linearised_model(study):
    split, backbone, _ = prepared(study)
    options = {
        "lrs": [1e-2],
        "arguments": study.protocol.arguments,
        "seed": 13,
        "anchor": Anchor(0.5),
        "dropout": False,
        "keep": "last",
    }
    plain, held = (
        fine_tune(backbone, split, "lora:2", wrap=wrap, **options).model
        for wrap in (lambda model: linearize(model, Full()), tabulated)
    )
    assert plain.delta.norm() > 1e-3
    torch.testing.assert_close(held.delta, plain.delta, rtol=1e-8, atol=1e-11)


def test_exact_constants_are_those_of_power_iteration(monkeypatch):
    family = BY_NAME["bert"]
    linear, inputs = linearize(family.build(), Full()), [family.inputs()]
    points = [0.02 * torch.randn_like(linear.delta) for _ in range(2)]
    exact = asdict(exact_lipschitz(linear, inputs, points))
    found = lipschitz(linear, inputs, points, tolerance=1e-12, iterations=200)
    assert exact == pytest.approx(asdict(found), rel=1e-6)
    monkeypatch.setattr("ntk.linearization.tabulated.ROOM", 0)
    rough = exact_lipschitz(linear, inputs, points)
    assert rough == lipschitz(linear, inputs, points)


# Records.


def descended(model, batch, labels, strength):
    """Return where gradient descent by hand ends: the model, and its linear twin."""
    n, y = len(labels), torch.nn.functional.one_hot(labels).double()
    f0, J = rows_by_hand(model, batch)
    tuned = copy.deepcopy(model)
    parameters = list(trained_parameters(tuned).values())
    start, delta = flat(parameters), torch.zeros(J.shape[1], dtype=FLOAT)
    path = []
    for _ in range(STEPS):
        loss = (logits(tuned(**batch)) - y).square().sum() / n
        gradients = torch.autograd.grad(loss, parameters)
        moved = flat(parameters) - start
        place = start + moved - RATE * (flat(gradients) + strength * moved)
        with torch.no_grad():
            for p, piece in zip(
                parameters, place.split([p.numel() for p in parameters]), strict=True
            ):
                p.copy_(piece.view_as(p))
        path.append(flat(parameters) - start)
        f = f0 + (J @ delta).view_as(f0)
        pull = J.T @ (2 * (f - y) / n).flatten() + strength * delta
        delta = delta - RATE * pull
    return tuned, path, delta


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_record_is_what_gradient_descent_by_hand_comes_to(squared, strength):
    training = Training("lora:2", strength, "squared", "sgd")
    record = squared.records[Key(CELL, "squared", training.name)]
    split, backbone, model = prepared(squared)
    batch, labels = encoded(backbone, split.train)
    tuned, path, delta = descended(model, batch, labels, strength)
    moved = path[-1]
    close = lambda found, value: found == pytest.approx(float(value), rel=1e-7)
    for name, examples in (("train", split.train), ("test", split.test)):
        inputs, truth = encoded(backbone, examples)
        f0, J = rows_by_hand(model, inputs)
        with torch.no_grad():
            f = logits(tuned(**inputs))
        g = f0 + (J @ delta).view_as(f0)
        own = record[name]
        assert close(own["movement"], moved.norm())
        assert close(own["linear_movement"], delta.norm())
        assert close(own["parameter_distance"], (moved - delta).norm())
        assert close(own["output_distance"], (f - g).norm())
        assert close(own["mean_logit_distance"], (f - g).norm(dim=1).mean())
        assert close(own["relative_output_distance"], (f - g).norm() / (f - f0).norm())
        same = (f.argmax(1) == g.argmax(1)).double().mean()
        assert own["agreement"] == pytest.approx(float(same), abs=1e-12)
        for key, outputs in (
            ("start_accuracy", f0),
            ("accuracy", f),
            ("linear_accuracy", g),
        ):
            right = (outputs.argmax(1) == truth).double().mean()
            assert own[key] == pytest.approx(float(right), abs=1e-12)
    # What follows is on the training examples.
    f0, J = rows_by_hand(model, batch)
    f, there = rows_by_hand(tuned, batch)
    g, y = f0 + (J @ delta).view_as(f0), torch.nn.functional.one_hot(labels).double()
    expanded = f0 + (J @ moved).view_as(f0)
    ratio = (f - expanded).norm() / (f - f0).norm()
    assert close(record["taylor"]["ratios"][-1], ratio)
    places = {
        "start": (f0, J, torch.zeros_like(delta)),
        "tuned": (f, there, moved),
        "linear": (g, J, delta),
    }
    for name, (outputs, rows, place) in places.items():
        loss = (outputs - y).square().sum() / 8
        gradient = rows.T @ (2 * (outputs - y) / 8).flatten() + strength * place
        own = record["states"][name]
        assert close(own["loss"], loss)
        assert close(own["objective"], loss + strength / 2 * place.square().sum())
        assert close(own["gradient"], gradient.norm())
    assert record["outputs"]["tuned"] == pytest.approx(f.numpy(), rel=1e-7)
    assert record["outputs"]["linear"] == pytest.approx(g.numpy(), rel=1e-7)
    assert record["learning_rate"] == RATE
    assert record["steps"] == STEPS
    _check_bounds(record, model, path, delta, (batch, y, f0, f, J), strength)


def _constants(model, ends, J, batch):
    """Return the constants over the fractions of the lines to some ends."""
    linear = linearize(model, Full())
    norm = lambda rows: float(torch.linalg.matrix_norm(rows, 2))
    tops, slopes = [norm(J)], []
    for end in ends:
        for fraction in FRACTIONS:
            _, there = rows_by_hand(linear.model_at(fraction * end), batch)
            tops.append(norm(there))
            slopes.append(norm(there - J) / float((fraction * end).norm()))
    radius = max(float(end.norm()) for end in ends)
    return {
        "start": tops[0],
        "outputs": max(tops),
        "jacobian": max(slopes),
        "radius": radius,
    }


def _check_bounds(record, model, path, delta, data, strength):
    """See that bounds are those of the formulas, and bound."""
    batch, y, f0, f, J = data
    found, moved = record["bounds"], path[-1]
    at_end = _constants(model, [moved], J, batch)
    assert found["constants"] == pytest.approx(at_end, rel=1e-7)
    places = [path[round(STEPS * fraction) - 1] for fraction in (0.25, 0.5, 0.75, 1)]
    along = _constants(model, places, J, batch)
    assert found["path_constants"] == pytest.approx(along, rel=1e-7)
    start, L, B, D = along.values()
    r0, rho, t = float((f0 - y).norm()), 1 / 8, RATE * STEPS
    assert found["critical_strength"] == pytest.approx(2 * rho * L * r0 / D, rel=1e-7)
    assert found["time"] == pytest.approx(t)
    value = lambda name: found[name]["value"]
    if strength == 0:
        assert value("movement") == pytest.approx(2 * rho * L * r0 * t, rel=1e-7)
        for name in ("published", "published_simplified", "descent", "minimiser"):
            assert value(name) is None
            assert "vacuous: it takes lambda > 0" in found[name]["note"]
        assert float((moved - delta).norm()) <= value("flow") / start
        return
    s = strength / (2 * rho)
    faded = (1 - math.exp(-strength * t)) / s
    b = 2 * L**2 * r0 * (4 * B * r0 * rho / strength + 1)
    assert value("movement") == pytest.approx(faded * L * r0, rel=1e-7)
    assert value("published") == pytest.approx(b * (rho * t - faded / 2), rel=1e-7)
    B, D = at_end["jacobian"], at_end["radius"]
    left = sum(record["states"][end]["gradient"] for end in ("tuned", "linear"))
    distance = (B * D * float((f - y).norm()) + start * B * D**2 / 2) / s
    distance += left / strength
    assert value("parameters") == pytest.approx(distance, rel=1e-7)
    gap = start * distance + B * D**2 / 2
    assert value("minimiser") == pytest.approx(gap, rel=1e-7)
    assert value("descent") == pytest.approx(r0 / math.sqrt(s), rel=1e-7)
    assert value("movement") >= D
    assert value("descent") >= D
    assert float((moved - delta).norm()) <= value("parameters")
    assert record["train"]["output_distance"] <= value("minimiser")
    assert record["train"]["output_distance"] <= value("flow")


def test_both_models_see_the_same_examples_in_the_same_order(study, monkeypatch):
    seen = []
    compute = ReadoutTrainer.compute_loss

    def spied(self, model, inputs, *arguments, **options):
        if torch.is_grad_enabled():
            kind = type(model).__name__
            seen.append((kind, inputs["input_ids"].tolist(), self.anchor.strength))
        return compute(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(ReadoutTrainer, "compute_loss", spied)
    unit = next(unit for unit in study.work if "lambda=2" in unit.keys[0].subject)
    (record,) = unit()
    mine = study.records[unit.keys[0]]
    again = json.loads(json.dumps(record))
    timed = {"seconds": 0, "sha256": ""}  # The digest is of the seconds, too.
    assert {**again, **timed} == {**mine, **timed}
    kinds = list(dict.fromkeys(kind for kind, *_ in seen))
    assert kinds[1] == "TabulatedModel"
    tuned, linear = ([s[1:] for s in seen if s[0] == kind] for kind in kinds)
    assert tuned == linear
    assert len(tuned) == record["steps"] == 4
    assert "bounds" not in record


@pytest.fixture
def unreported(monkeypatch):
    """Records alone: drawing figures takes longer than tiny models do."""
    monkeypatch.setattr("ntk.studies.command.write_page", lambda *_: {"html": ""})


@pytest.mark.usefixtures("unreported")
def test_the_twin_has_the_learning_rate_that_fine_tuning_chose(place):
    more = ("--lrs", "lora:2=1e-9,3e-2", "--lambdas", "0.5", "--seeds", "13")
    own = done(place, "rates", *more, "--num-train-epochs", "3", "--selective")
    (record,) = own.records.values()
    dev = {float(rate): found["accuracy"] for rate, found in record["grid"].items()}
    assert set(dev) == {1e-9, 3e-2}
    assert record["learning_rate"] == max(dev, key=dev.get)
    assert record["selective"] is True
    assert "selective" in next(iter(own.records)).subject


def test_constants_of_another_path_say_nothing_of_the_flow(squared):
    """With another step size the replayed descent ends elsewhere."""
    training = Training("lora:2", 3.0, "squared", "sgd")
    record = squared.records[Key(CELL, "squared", training.name)]
    split, backbone, model = prepared(squared)
    batch, labels = encoded(backbone, split.train)
    _, path, _ = descended(model, batch, labels, 3.0)
    linear = linearize(model, Full())
    for rate, along in ((RATE, True), (0.5 * RATE, False)):
        other = {**record, "learning_rate": rate}
        result = bounds(other, linear, path[-1], [batch], labels)
        assert (result["path_constants"] is not None) == along
        assert (result["flow"]["value"] is not None) == along
    assert "may leave the ball" in result["flow"]["note"]


@pytest.mark.usefixtures("unreported")
def test_bounds_need_gradient_flow(place):
    """AdamW, and small batches, are no flow; what holds at minimisers remains."""
    common = ("--seeds", "13", "--lambdas", "1", "--loss", "squared")
    adamw = done(place, "adamw", *common, "--num-train-epochs", "2")
    batches = done(
        *(place, "batches", *common, "--optimizer", "sgd", "--lrs", "lora:2=0.01"),
        *("--num-train-epochs", "1", "--per-device-train-batch-size", "4"),
    )
    long = done(
        *(place, "long", *common, "--optimizer", "sgd", "--lrs", "lora:2=0.9"),
        *("--num-train-epochs", "1", "--per-device-train-batch-size", "8"),
    )
    for own, reason in (
        (adamw, "vacuous: AdamW follows no gradient flow"),
        (batches, "vacuous: steps on 4 of 8 examples follow no gradient flow"),
        (long, "are too long to follow a gradient flow"),
    ):
        (record,) = own.records.values()
        for name in ("movement", "published", "flow"):
            assert record["bounds"][name]["value"] is None
            assert reason in record["bounds"][name]["note"]
        minimiser = record["bounds"]["minimiser"]
        assert record["train"]["output_distance"] <= minimiser["value"]
        report = markdown(report_page(collect(list(own.records.items()), "", {})))
        assert reason.removeprefix("vacuous: ") in report
        assert "bounds that are vacuous at every lambda: movement under flow" in report


# The summary.


def summary_of(study):
    return json.loads((study.folder / "report.json").read_text())


def test_the_summary_says_what_the_records_do(study):
    summary = summary_of(study)
    (group,) = summary["groups"]
    assert [p["strength"] for p in group["points"]] == [0.0, 0.5, 2.0, 8.0]
    approx = lambda value: pytest.approx(value, rel=1e-5, abs=1e-12)
    for point in group["points"]:
        subject = Training("lora:2", point["strength"]).name
        several = [
            study.records[Key(Cell("words", 4, seed), "cross_entropy", subject)]
            for seed in (13, 21)
        ]
        for name, path in MEASURES.items():
            values = []
            for record in several:
                for part in path.split("."):
                    record = record[part]
                values.append(record)
            if None in values:
                assert name == "recovery"
                continue
            assert point[name]["values"] == approx(values), name
            assert point[name]["mean"] == approx(sum(values) / 2), name
            assert point[name]["deviation"] == approx(statistics.stdev(values)), name
        free = [
            study.records[Key(Cell("words", 4, seed), "cross_entropy", name)]
            for name in [Training("lora:2", 0.0).name]
            for seed in (13, 21)
        ]
        gaps = [
            math.dist(
                np.ravel(one["outputs"]["tuned"]), np.ravel(other["outputs"]["linear"])
            )
            for one, other in zip(several, free, strict=True)
        ]
        assert point["gap_to_free"]["values"] == approx(gaps)
        if point["strength"] == 0:
            assert point["gap_to_free"] == point["train_gap"]
            assert point["unfinished_tuned"]["mean"] is None
        else:
            left = [
                r["states"]["tuned"]["gradient"]
                / point["strength"]
                / r["test"]["movement"]
                for r in several
            ]
            assert point["unfinished_tuned"]["values"] == approx(left)


def test_slopes_are_those_of_straight_lines(study):
    (group,) = summary_of(study)["groups"]
    x = np.log([0.5, 2.0, 8.0])
    for measure in SLOPES:
        y = np.log([p[measure]["values"] for p in group["points"][1:]])
        slopes = [np.polyfit(x, column, 1)[0] for column in y.T]
        found = group["slopes"][measure]["over_all"]
        assert found["slope"] == pytest.approx(np.mean(slopes), rel=1e-4)
        error = statistics.stdev(slopes) / math.sqrt(2)
        assert found["standard_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)
        assert (found["from"], found["to"], found["lambdas"]) == (0.5, 8.0, 3)


# The command.


@pytest.mark.slow
def test_it_runs_on_the_embedded_reviews_and_goes_on(place, tmp_path, capsys):
    asked = (
        *("--model", place.model, "--shots", "4", "--seeds", "13", "--test-size"),
        *("12", "--lambdas", "0", "4", "--num-train-epochs", "2"),
        *("--output", tmp_path),
    )
    assert run(*asked) == 0
    shown = capsys.readouterr().out
    assert "reviews, by lambda: lora:8, 4 shots" in shown
    folder = tmp_path / "linearization"
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert {"report.json", "report.md", "report.html", "settings.json"} <= {
        f.name for f in before
    }
    lost = next(f for f in before if "lambda-4" in f.name)
    lost.unlink()
    assert run(*asked) == 0
    for file, content in before.items():
        if file == lost:
            again, held = json.loads(file.read_text()), json.loads(content)
            timed = {"seconds": 0, "sha256": ""}
            assert {**again, **timed} == {**held, **timed}
        else:
            assert file.read_bytes() == content, file
    report = json.loads((folder / "report.json").read_text())
    assert report["records"] == {"asked": 2, "there": 2}
    assert "seconds" not in json.dumps(report)


@pytest.mark.usefixtures("unreported")
def test_what_does_not_move_is_told(study, tmp_path, capsys):
    more = ("--lrs", "lora:2=0", "--lambdas", "1", "--seeds", "13")
    assert run(*study.asked, *more, "--output", tmp_path) == 1
    error = capsys.readouterr().err
    assert "fine-tuning by lora:2 did not move in 4 steps" in error


def test_units_can_be_sent_to_other_processes(study):
    for unit in study.work:
        assert pickle.loads(pickle.dumps(unit)) == unit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lambdas", "1", "-2"], "'-2' must be a finite number, at least 0"),
        (["--lambdas", "nan"], "'nan' must be a finite number, at least 0"),
        (["--lambdas", "much"], "much"),
        (["--lambdas", "1", "1.0"], "--lambdas holds 1.0 more than once"),
        (["--methods", "lora:8", "lora:8"], "--methods holds lora:8 more than once"),
        (["--methods", "lota:8"], "lota:8"),
        (["--methods", "probe"], "--methods probe has no steps to linearise"),
        (["--methods", "masked rows:2"], "trains parts of weights by masks"),
        (["--tasks", "wordz"], "wordz"),
        (["--loss", "hinge"], "hinge"),
        (["--optimizer", "sgd"], "--optimizer sgd has no learning rates of its own"),
        (
            ["--optimizer", "sgd", "--lrs", "lora:2=0.5", "--lambdas", "0", "4"],
            "--lambdas 4 with a learning rate of 0.5 overshoots the start",
        ),
        (["--lrs", "lora:2"], "--lrs 'lora:2' must read METHOD=LR,LR"),
        (["--seeds", "3", "3"], "--seeds holds 3 more than once"),
        (["--shots", "4000"], "shots=4000"),
        (["--evaluations", "3"], "--evaluations"),
        (["--choose-lr", "first"], "--choose-lr"),
        (["--coupled"], "--coupled"),
    ],
)
def test_bad_input(study, tmp_path, capsys, arguments, message):
    assert run(*study.asked, "--output", tmp_path / "runs", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_scores_are_refused(study, place, tmp_path, capsys):
    folder = tmp_path / "data" / "stsb"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        lines = [
            json.dumps({"text": f"the film {i}", "label": i / 7}) for i in range(40)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    more = ("--data-dir", tmp_path / "data", "--tasks", "stsb", "--output", tmp_path)
    assert run(*study.asked, *more) == 2
    assert "stsb has scores for labels" in capsys.readouterr().err


def test_defaults():
    options = main.parse([])
    lambdas = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    assert options.fine_tuning.lambdas == lambdas
    assert options.fine_tuning.methods == ("lora:8",)
    assert options.output.name == "linearization"


def test_it_is_a_module_and_a_function():
    done = subprocess.run(
        [sys.executable, "-m", "ntk.linearize", "--lambdas", "-1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "'-1' must be a finite number, at least 0" in done.stderr
    assert callable(linearize)
    assert replace(Training("lora:8", 0.5)).anchor == Anchor(0.5)


def test_one_task_and_one_method_may_be_named_as_such():
    asked = ["--task", "sst2", "--method", "rows:3", "--lambdas", "0"]
    options = main.parse(asked)
    assert options.splits.tasks == ("sst2",)
    assert options.fine_tuning.methods == ("rows:3",)
