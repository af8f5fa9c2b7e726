"""Layers to tune as a command: its numbers by plain loops, its resumption, refusals."""

import json
import pickle
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from checkpoints import SPECIAL, WORDS
from commands import exit_code, texts
from scipy import stats
from tasks_on_disk import write_task

from ntk import layers
from ntk.kernels.empirical import empirical_ntk
from ntk.layer_selection.budget import Budget
from ntk.reporting.page import markdown
from ntk.spaces.kinds import Head, LoRA
from ntk.studies.folder import Cell, Key, Study
from ntk.studies.layers.correlation import (
    bootstrap,
    interval,
    noise,
    rank_correlation,
    reliability,
)
from ntk.studies.layers.figures import draw_figures
from ntk.studies.layers.predictors import PREDICTORS, explained, predictors
from ntk.studies.layers.records import LayerKernels
from ntk.studies.layers.report import report_page, tables
from ntk.studies.layers.run import fine_tuning_units, units
from ntk.studies.layers.subsets import Choice, layers_of, method_of, spread_subsets
from ntk.studies.layers.summary import collect
from ntk.studies.protocol import protocol_of
from rocoft.models.architecture import SelectionError
from rocoft.models.readouts import logits

DEPTH = 4
SPACE = "lora:2"
CELL = Cell("words", 4, 13)
NAMES = tuple(map(str, range(DEPTH)))
SEEDS = (13, 21)


run = partial(exit_code, layers.main)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny BERT with more layers than those of other tests."""
    folder = tmp_path_factory.mktemp("deep")
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}
    options = tf.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.BertModel(options).save_pretrained(folder)
    tf.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def study(tmp_path_factory, model):
    """One real study of a tiny model, and its options."""
    place = tmp_path_factory.mktemp("layers")
    for name in ("words", "others"):
        write_task(place / "data", name)
    train = place / "data" / "others" / "train.jsonl"
    train.write_text("\n".join(reversed(train.read_text().splitlines())) + "\n")
    asked = (
        *("--model", model, "--data-dir", str(place / "data")),
        *("--tasks", "words", "others", "--shots", "4", "--seeds", "13", "21"),
        *("--test-size", "20", "--dtype", "float64", "--space", SPACE, "--budget", "2"),
        *("--verify", "--subsets", "5", "--random-seeds", "2"),
        *(
            "--head-init",
            "random",
            "--evaluations",
            "2",
            "--num-train-epochs",
            "3",
            "--lrs",
        ),
        *(f"{SPACE}=5e-2", "head=5e-2", "--output", str(place / "runs"), "--quiet"),
    )
    assert run(*asked) == 0
    folder = place / "runs" / "layers"
    same = protocol_of(layers.main.parse(asked))
    records = {}
    for file in sorted((folder / "records").rglob("*.json")):
        record = json.loads(file.read_text())
        key = record.pop("key")
        cell = Cell(**key["cell"])
        records[Key(cell, key["kind"], key["subject"])] = record
    report = json.loads((folder / "report.json").read_text())
    found = same.split(CELL)
    return SimpleNamespace(
        asked=asked,
        folder=folder,
        records=records,
        report=report,
        split=found,
        backbone=same.backbone(found),
    )


@pytest.fixture(scope="session")
def by_definition(study):
    """Kernels of layers and head, residual and labels, example by example."""
    train, module = study.split.train, study.backbone.module
    batches = [study.backbone.encode([example], 1)[0][0] for example in train]
    margin = lambda space: empirical_ntk(
        module, batches, space=space, reduce="margin", implementation="jacobian"
    ).numpy()
    kernels = [margin(LoRA(2).layers(i)) for i in range(DEPTH)]
    with torch.no_grad():
        f0 = torch.cat([logits(module(**batch)) for batch in batches])
    y = np.array([example.label for example in train])
    r = y - torch.softmax(f0, dim=1)[:, 1].numpy()
    return SimpleNamespace(
        kernels=kernels, base=margin(Head()), r=r, labels=y - y.mean()
    )


def kernel_of(known, chosen):
    return known.base + sum(known.kernels[int(name)] for name in chosen)


def left(known, chosen, r):
    """Return r'(K_S + s I)^-1 r by an inverse."""
    whole = kernel_of(known, NAMES)
    s = 1e-3 * np.trace(whole) / len(whole)
    return r @ np.linalg.inv(kernel_of(known, chosen) + s * np.eye(len(r))) @ r


def record_of(study, cell=CELL):
    return study.records[Key(cell, "layers", SPACE)]


# Before training.


def test_layers_are_those_of_the_definition(study, by_definition):
    split = LayerKernels.of(record_of(study))
    assert tuple(split.layers) == NAMES
    for name, layer in split.layers.items():
        expected = by_definition.kernels[int(name)]
        np.testing.assert_allclose(layer.kernel, expected, rtol=1e-9, atol=1e-12)
        # Query, key, value, output, both of the feed-forward network; B and A.
        assert layer.parameters == 2 * (16 * 4 + 24 + 16) + 2 * (16 * 4 + 16 + 24)
    np.testing.assert_allclose(split.base, by_definition.base, rtol=1e-9)
    np.testing.assert_allclose(split.residual[:, 0], by_definition.r, rtol=1e-9)
    np.testing.assert_allclose(split.labels[:, 0], by_definition.labels, rtol=1e-12)
    assert split.outputs == 1


@pytest.mark.parametrize("chosen", [("0",), ("1", "3"), NAMES])
def test_predictors_are_those_of_plain_formulas(study, by_definition, chosen):
    split = LayerKernels.of(record_of(study))
    found = predictors(split, chosen, 1e-3)
    K, whole = kernel_of(by_definition, chosen), kernel_of(by_definition, NAMES)
    k = len(K)
    values = np.linalg.eigvalsh(K)[::-1]
    own, s = 1e-3 * np.trace(K) / k, 1e-3 * np.trace(whole) / k
    expected = {
        "effective dimension": sum(values / (values + own)),
        "condition number": (values[0] + own) / (values[-1] + own),
        "largest eigenvalue": values[0],
        "trace": np.trace(K),
        "parameters": 416 * len(chosen),
        "mean layer": np.mean([int(name) for name in chosen]),
        "gradient norm": np.sqrt(by_definition.r @ K @ by_definition.r),
    }
    H = K @ np.linalg.inv(K + s * np.eye(k))
    for end, r in (("", by_definition.r), (", labels", by_definition.labels)):
        share = 1 - left(by_definition, chosen, r) / left(by_definition, (), r)
        risk = np.mean((r - H @ r) ** 2) / (1 - np.trace(H) / k) ** 2
        aligned = r @ K @ r / (np.linalg.norm(K) * (r @ r))
        expected |= {f"target-aware{end}": share, f"GCV{end}": risk}
        expected[f"alignment{end}"] = aligned
    assert found.keys() == expected.keys() == PREDICTORS.keys() - {"other tasks"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-7), name
    assert explained(split, chosen, 1e-3) == found["target-aware"]
    assert explained(split, (), 1e-3) == 0


@pytest.mark.parametrize("reduction", ["trace", "full"])
def test_more_than_two_labels(reduction):
    """Three outputs, summed over or coupled."""
    rng = np.random.default_rng(0)
    J = rng.normal(size=(3, 6, 3, 5))
    equation = {"trace": "ncp,mcp->nm", "full": "ncp,mdp->ncmd"}[reduction]
    k = {"trace": 6, "full": 18}[reduction]
    head, *grams = (np.einsum(equation, j, j).reshape(k, k) for j in J)
    y, f0 = np.array([0, 1, 2, 0, 1, 1]), rng.normal(size=(6, 3))
    kernels = {"0": grams[0], "1": grams[1], "head": head}
    split = LayerKernels.of(
        {
            "reduction": reduction,
            "train_labels": y.tolist(),
            "own_outputs": f0.tolist(),
            "parameters": {"0": 5, "1": 5, "head": 5},
            "kernels": {
                name: [row[: i + 1] for i, row in enumerate(gram.tolist())]
                for name, gram in kernels.items()
            },
        }
    )
    r = np.eye(3)[y] - np.exp(f0) / np.exp(f0).sum(axis=1, keepdims=True)
    s = 1e-3 * np.trace(sum(kernels.values())) / k
    # Summed over, the kernel serves each output by itself.
    r = r if reduction == "trace" else r.reshape(-1, 1)
    left = lambda K: np.vdot(r, np.linalg.solve(K + s * np.eye(k), r))
    expected = 1 - left(head + grams[1]) / left(head)
    assert explained(split, ("1",), 1e-3) == pytest.approx(expected, rel=1e-9)
    assert split.outputs == k // 6
    orders = Choice("rows:1", Budget(layers=1))(split)
    drops = [1 - left(head + gram) / left(head) for gram in grams]
    assert orders["target-aware"].layers == (str(np.argmax(drops)),)


def test_the_table_of_layers(study, by_definition):
    rows = [r for r in study.report["layers"] if r["task"] == "words"]
    assert [row["layer"] for row in rows] == [*NAMES, "head"]
    traces = [np.trace(K) for K in (*by_definition.kernels, by_definition.base)]
    r = by_definition.r
    for i, row in enumerate(rows):
        K = (*by_definition.kernels, by_definition.base)[i]
        drop = 0.0
        if i < DEPTH:
            drop = 1 - left(by_definition, NAMES[i], r) / left(by_definition, (), r)
        expected = {
            "drop": drop,
            "trace_share": traces[i] / sum(traces),
            "largest_eigenvalue": np.linalg.eigvalsh(K)[-1],
            "alignment": r @ K @ r / (np.linalg.norm(K) * (r @ r)),
            "gradient_norm": np.sqrt(r @ K @ r),
        }
        for name, value in expected.items():
            assert row[name]["values"][0] == pytest.approx(value, rel=1e-5), name


def test_rules_choose_within_the_budget(study, by_definition):
    rows = {r["rule"]: r for r in study.report["rules"] if r["task"] == "words"}
    r = by_definition.r
    best = min(combinations(NAMES, 2), key=lambda c: left(by_definition, c, r))
    assert tuple(rows["target-aware"]["chosen"][0][0]) == best
    share = 1 - left(by_definition, best, r) / left(by_definition, (), r)
    assert rows["target-aware"]["explained"]["values"][0] == pytest.approx(share, 1e-5)
    norms = [r @ K @ r for K in by_definition.kernels]
    strongest = sorted(map(str, np.argsort(norms)[-2:]))
    assert rows["gradient norm"]["chosen"][0] == [strongest]
    tops = [
        np.linalg.eigvalsh(by_definition.base + K)[-1] for K in by_definition.kernels
    ]
    assert str(np.argmin(tops)) in rows["least growth"]["chosen"][0][0]
    assert rows["first"]["chosen"] == [[["0", "1"]]] * 2
    assert rows["last"]["chosen"] == [[["2", "3"]]] * 2
    assert [len(sets) for sets in rows["random"]["chosen"]] == [2] * 2
    assert all(
        len(each) == 2 for row in rows.values() for s in row["chosen"] for each in s
    )
    assert {row["parameters"]["mean"] for row in rows.values()} == {832}


def test_brackets_of_the_condition_number(study, by_definition):
    """Medians over the layers of one split."""
    one = [(Key(CELL, "layers", SPACE), record_of(study))]
    summary = collect(one, "command", {}, Choice(SPACE, Budget(layers=2)))
    (row,) = (r for r in summary["brackets"] if r["quantity"] == "condition number")
    whole = kernel_of(by_definition, NAMES)
    ridge = 1e-3 * np.trace(whole) / len(whole) * np.eye(len(whole))
    lower, upper = [], []
    for name in NAMES:
        K = kernel_of(by_definition, set(NAMES) - {name}) + ridge
        S = by_definition.kernels[int(name)]
        factor = 1 + np.linalg.eigvals(np.linalg.solve(K, S)).real.max()
        lower.append(max(np.linalg.cond(K) / factor, 1))
        upper.append(np.linalg.cond(K) * factor)
    assert (row["kernels"], row["conditions"]) == (DEPTH, {})
    assert row["lower"] == pytest.approx(np.median(lower), rel=1e-5)
    assert row["upper"] == pytest.approx(np.median(upper), rel=1e-5)
    expected = np.linalg.cond(whole + ridge)
    assert row["least"] == row["most"] == pytest.approx(expected, rel=1e-5)


def test_the_table_of_bounds_by_hand():
    """K is diag(2, 1.5) or diag(3, 1), K + S is diag(3, 1.5) and s is 1."""
    record = {
        "model": "none",
        "task": "words",
        "metric": "accuracy",
        "left_out": [],
        "reduction": "margin",
        "train_labels": [0, 1],
        "own_outputs": [[0.0, 0.0], [0.0, 0.0]],
        "parameters": {"0": 1, "1": 1, "head": 1},
        "kernels": {
            "0": [[1.0], [0.0, 0.0]],
            "1": [[0.0], [0.0, 0.5]],
            "head": [[2.0], [0.0, 1.0]],
        },
    }
    choice = Choice("rows:1", Budget(layers=1), epsilon=1 / 2.25)
    records = [(Key(CELL, "layers", "rows:1"), record)]
    summary = collect(records, "command", {}, choice)
    text = markdown(report_page(summary))
    for line in (
        "| task | quantity | bound | measured | conditions |",
        "| words | eigenvalue growth, theorem 6 | 0.5 to 1.5 | 1 to 1.5 | "
        "K definite: 2 of 2, η &lt; 1: 2 of 2 |",
        "| words | eigenvalue growth, ridge | 1 to 1.292 | 1 to 1.292 | none needed |",
        "| words | condition number | 1.3 to 2.05 | 1.6 | none needed |",
        "| words | effective dimension | 1.258 to 1.425 | 1.35 | none needed |",
    ):
        assert line in text
    titles = [str(table.title) for table in tables(summary)]
    title = "How one layer changes the spectrum: bounds and measured values"
    assert titles.count(f"{title}, 4 shots") == 1

    # Without a head K is singular: diag(0, 0.5) or diag(1, 0). l_1 grows 2- or 1-fold.
    record["kernels"] = {"0": [[1.0], [0.0, 0.0]], "1": [[0.0], [0.0, 0.5]]}
    text = markdown(report_page(collect(records, "command", {}, choice)))
    assert (
        "| words | eigenvalue growth, theorem 6 | – | 1.5 | "
        "K definite: 0 of 2, η &lt; 1: 0 of 2 |"
    ) in text
    # Nothing is left without the only layer.
    record["kernels"] = {"0": [[1.0], [0.0, 0.5]]}
    assert collect(records, "command", {}, choice)["brackets"] == []


def test_a_summary_without_brackets_is_still_reported():
    figures = Path(__file__).parents[4] / "figures"
    summary = json.loads((figures / "layers.json").read_text())
    assert "brackets" not in summary
    page = report_page(summary)
    assert not any(g.name == "bounds" for s in page.sections for g in s.tables)
    assert "### Scores of the chosen layers" in markdown(page)
    assert len(tables(summary)) >= 3
    assert draw_figures(summary).keys() == {
        f"{name}-64" for name in ("layers", "scores", "correlations", "sets")
    }


# Sets of layers.


@pytest.mark.parametrize(
    ("depth", "count"), [(6, 12), (6, 18), (6, 63), (12, 12), (3, 7)]
)
def test_spread_subsets_are_different_and_of_all_sizes(depth, count):
    names = tuple(map(str, range(depth)))
    found = spread_subsets(names, count)
    assert len(found) == len(set(found)) == count
    assert names in found
    assert all(list(each) == sorted(each, key=int) for each in found)
    assert sum(len(each) == 1 for each in found) == min(depth, count // 2)
    sizes = {len(each) for each in found}
    assert len(sizes) >= min(depth, 6)
    if count == 12 and depth == 6:
        assert sizes == set(range(1, 7))


def test_methods_say_which_layers_they_tune():
    for chosen in ((), ("2",), ("0", "3"), NAMES):
        method = method_of(chosen, SPACE, NAMES)
        assert layers_of(method, SPACE, NAMES) == chosen
    assert method_of(("3", "0"), "rows:3@query", NAMES) == "rows:3@query/layers=0,3"
    both = method_of(("1",), "rows:3+columns:3", NAMES)
    assert both == "rows:3/layers=1+columns:3/layers=1"
    with pytest.raises(SelectionError, match="--subsets 16 must be from 1 to 15"):
        spread_subsets(NAMES, 16)


# After training.


def test_what_was_chosen_was_tuned_once(study):
    tuned = [k for k in study.records if k.kind == "finetune"]
    assert len(tuned) == len(set(tuned))
    for cell in {key.cell for key in tuned}:
        split = LayerKernels.of(record_of(study, cell))
        orders = Choice(SPACE, Budget(layers=2), draws=2)(split).values()
        wanted = {tuple(sorted(order.layers)) for order in orders}
        wanted |= {(), NAMES, *spread_subsets(NAMES, 5)}
        methods = [method_of(each, SPACE, NAMES) for each in wanted]
        assert sorted(k.subject for k in tuned if k.cell == cell) == sorted(methods)
    for key in tuned:
        record = study.records[key]
        assert record["learning_rate"] == 5e-2
        of_layers = record["parameters"]["without_head"]
        # A and B train, of which the kernel at the start sees B alone.
        pairs = 2 * (16 * 4 + 24 + 16) + 2 * (16 * 5 + 24)
        assert of_layers == pairs * len(layers_of(key.subject, SPACE, NAMES))


def score_of(study, task, seed, chosen):
    method = method_of(chosen, SPACE, NAMES)
    record = study.records[Key(Cell(task, 4, seed), "finetune", method)]
    return record["test"]["accuracy"]


def test_scores_of_rules_are_those_of_what_they_chose(study):
    differences = {row["rule"]: [] for row in study.report["differences"]}
    for task in ("words", "others"):
        rows = {r["rule"]: r for r in study.report["rules"] if r["task"] == task}
        means = {}
        for rule, row in rows.items():
            means[rule] = [
                np.mean([score_of(study, task, seed, each) for each in sets])
                for seed, sets in zip(SEEDS, row["chosen"], strict=True)
            ]
            assert row["score"]["values"] == pytest.approx(means[rule], rel=1e-5)
        for rule, found in differences.items():
            gained = 100 * (np.array(means["target-aware"]) - means[rule])
            assert rows[rule]["points"]["values"] == pytest.approx(gained, abs=1e-4)
            found.append(gained.mean())
    for row in study.report["differences"]:
        pair = differences[row["rule"]]
        assert row["mean"] == pytest.approx(np.mean(pair), abs=1e-4)
        error = abs(pair[0] - pair[1]) / 2
        assert row["standard_error"] == pytest.approx(error, abs=1e-4)


def effects_by_hand(study, task, sets):
    """Return what layers' effects on one task, by normal equations, say of sets."""
    rows = [r for r in study.report["subsets"] if r["task"] == task]
    known = [tuple(row["layers"]) for row in rows]
    means = np.array(
        [np.mean([score_of(study, task, s, each) for s in SEEDS]) for each in known]
    )
    inside = lambda of: np.array([[n in each for n in NAMES] for each in of], float)
    design = np.column_stack([np.ones(len(known)), inside(known)])
    effects = np.linalg.pinv(design) @ ((means - means.mean()) / means.std())
    return inside(sets) @ effects[1:]


def test_correlations_are_those_of_scipy(study):
    for task in ("words", "others"):
        rows = [r for r in study.report["subsets"] if r["task"] == task]
        sets = [tuple(row["layers"]) for row in rows]
        assert set(spread_subsets(NAMES, 5)) <= set(sets)
        scores = np.array(
            [[score_of(study, task, seed, each) for seed in SEEDS] for each in sets]
        )
        splits = [LayerKernels.of(record_of(study, Cell(task, 4, s))) for s in SEEDS]
        by_name = {
            name: np.mean(
                [[predictors(each, s, 1e-3)[name] for s in sets] for each in splits], 0
            )
            for name in PREDICTORS
            if name != "other tasks"
        }
        other = "others" if task == "words" else "words"
        by_name["other tasks"] = effects_by_hand(study, other, sets)
        controls = {"size": "parameters", "depth": "mean layer"}
        controls["static"] = "other tasks"
        for name, values in by_name.items():
            (row,) = (
                r
                for r in study.report["correlations"]
                if (r["task"], r["predictor"]) == (task, name)
            )
            # Equal means may differ by rounding.
            values, means = (
                np.round(each / abs(each).max(), 9)
                for each in (values, scores.mean(axis=1))
            )
            ranks = stats.rankdata(values), stats.rankdata(means)
            for given, control in controls.items():
                held = stats.rankdata(np.round(by_name[control], 9))
                line = np.column_stack([np.ones(len(sets)), held])
                rests = [y - line @ np.linalg.lstsq(line, y)[0] for y in ranks]
                beyond = row[f"beyond_{given}"]["spearman"]
                if name == control:
                    assert beyond is None
                else:
                    rho = stats.pearsonr(*rests)[0]
                    assert beyond == pytest.approx(rho, abs=1e-5), (name, given)
            row = row["plain"]
            expected = stats.spearmanr(values, means).statistic
            assert np.isfinite(expected)
            assert row["spearman"] == pytest.approx(expected, abs=1e-5)
            assert row["towards"] == PREDICTORS[name].sign * row["spearman"]
            assert row["low"] <= row["high"]
        (row,) = (r for r in study.report["noise"] if r["task"] == task)
        assert row["p"] == pytest.approx(stats.friedmanchisquare(*scores).pvalue, 1e-4)
        assert row["subsets"] == len(sets)


def test_bootstrap_draws_sets_and_splits():
    rng = np.random.default_rng(0)
    quality = rng.normal(size=40)
    noisy = lambda scale: quality[:, None] + scale * rng.normal(size=(40, 5))
    exact, loose = (bootstrap(noisy(s), noisy(s)) for s in (0.1, 1.0))
    low, high = interval(loose)
    assert interval(exact)[0] > 0.9
    assert high - low > 3 * np.subtract(*interval(exact)[::-1])
    # Splits are drawn too: with one set of noise for all, they are what differs.
    predictor = np.tile(quality[:, None], 5)
    scores = np.column_stack([quality, quality, quality, -quality, -quality])
    low, high = interval(bootstrap(predictor, scores))
    assert low < -0.9 < 0.9 < high
    assert interval(np.full(10, np.nan)) is None
    assert rank_correlation(predictor, 0 * scores) is None


def test_noise_tells_whether_sets_differ():
    rng = np.random.default_rng(1)
    quality = rng.normal(size=(2000, 1))
    v = 0.5
    scores = quality + np.sqrt(v) * rng.normal(size=(2000, 6))
    found = noise(scores)
    assert found.p < 1e-6
    # Ranks of normal variables correlate a little less than their values.
    assert found.halves == pytest.approx(1 / (1 + v / 3), abs=0.03)
    assert found.ceiling == pytest.approx((1 / (1 + v / 6)) ** 0.5, abs=0.02)
    assert noise(rng.normal(size=(12, 3))).p > 0.01
    assert noise(scores[:, :1]).halves is None
    assert noise(np.ones((5, 3))).p == 1


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 3)])
def test_reliability_inverts_the_correlation_of_parts(first, second):
    v = 0.7
    r = ((1 + v / first) * (1 + v / second)) ** -0.5
    assert reliability(r, first, second) == pytest.approx(
        1 / (1 + v / (first + second))
    )
    if first == second:
        assert reliability(r, first, second) == pytest.approx(2 * r / (1 + r))


# The command.


def test_work_can_be_done_by_other_processes(study):
    options = layers.main.parse(study.asked)
    same = protocol_of(options)
    first = units(options, same)
    second = fine_tuning_units(options, same, Study(study.folder))
    assert [key.kind for unit in first for key in unit.keys] == ["layers"] * 4
    work = [*first, *second]
    assert {key for unit in work for key in unit.keys} == study.records.keys()
    for unit in work:
        assert pickle.loads(pickle.dumps(unit)) == unit


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_reports_the_same(study, monkeypatch):
    before = texts(study.folder)
    monkeypatch.setattr(
        "ntk.studies.folder.Study.write", lambda *_: pytest.fail("computed")
    )
    assert run(*study.asked) == 0
    assert texts(study.folder) == before


@pytest.mark.slow
def test_a_record_that_is_missing_is_made_again(study):
    before = texts(study.folder)
    lost = [
        next((study.folder / "records").rglob(f"{k}*.json")) for k in ("layers", "fine")
    ]
    for file in lost:
        file.unlink()
    others = {
        f: f.stat().st_mtime_ns for f in (study.folder / "records").rglob("*.json")
    }
    assert run(*study.asked) == 0
    assert all(file.stat().st_mtime_ns == when for file, when in others.items())
    after = texts(study.folder)
    assert before.keys() == after.keys()
    for name, text in before.items():
        old, new = json.loads(text), json.loads(after[name])
        assert old == new


def test_the_report_says_what_was_found(study):
    text = (study.folder / "report.md").read_text()
    page = (study.folder / "report.html").read_text()
    for heading in (
        "Scores of the chosen layers",
        "Which measure predicts the score",
        "Whether scores differ by more than noise",
        "How one layer changes the spectrum: bounds and measured values",
        "Layers, ranked: words",
        "Sets of layers: others",
    ):
        assert heading in text
        assert heading in page
    for name in ("layers-4", "scores-4", "correlations-4", "sets-4"):
        assert f'id="figure-{name}"' in page
        assert (study.folder / "figures" / f"{name}.png").stat().st_size > 5000
    lines = report_page(study.report).lines
    assert any("the target-aware rule chooses layers" in line for line in lines)
    assert any("differ by more than noise" in line for line in lines)
    assert any("the target-aware score is number" in line for line in lines)
    assert f"All {len(study.records)} requested records are present." in lines
    titles = [str(table.title) for table in tables(study.report)]
    assert titles == [
        "Which measure predicts the score, 4 shots",
        "Which measure predicts more than the mean index of the layers, 4 shots",
        "Scores of the chosen layers, 4 shots",
        "How one layer changes the spectrum: bounds and measured values, 4 shots",
    ]


def test_without_fine_tuning_the_ranking_is_told(study):
    choice = Choice(SPACE, Budget(parameters=600))
    kernels = [(k, r) for k, r in study.records.items() if k.kind == "layers"]
    summary = collect(kernels, "command", {}, choice)
    assert summary["noise"] == summary["correlations"] == summary["held"] == []
    titles = [str(table.title) for table in tables(summary)]
    assert titles[:2] == [
        "Layers, ranked: others, 4 shots",
        "What each rule chose: others, 4 shots",
    ]
    for row in summary["rules"]:
        assert all(len(each) == 1 for sets in row["chosen"] for each in sets)
    missing = collect([(kernels[0][0], None), *kernels[1:]], "command", {}, choice)
    assert "1 of 4 records is missing" in "\n".join(report_page(missing).lines)
    empty = collect([(key, None) for key, _ in kernels], "command", {}, choice)
    assert report_page(empty).lines == ["There are no records yet."]
    assert report_page(empty).sections == []


def test_a_study_of_the_embedded_task(tmp_path, capsys):
    """From the ranking alone on, with the options of the documentation."""
    asked = ("--task", "reviews", "--space", "rows:1", "--budget", "5000p")
    few = ("--shots", "2", "--seeds", "13", "--test-size", "6", "--output", tmp_path)
    assert run(*asked, *few) == 0
    said = capsys.readouterr().out
    assert "Layers, ranked: reviews, 2 shots" in said
    assert "budget 5,000 parameters" in " ".join(said.split())
    assert len(list((tmp_path / "layers" / "records").rglob("*.json"))) == 1
    report = json.loads((tmp_path / "layers" / "report.json").read_text())
    # 5 * 384 + 1536 of a layer: one fits.
    assert {row["parameters"]["mean"] for row in report["rules"]} == {3456}
    assert run(*asked, *few, "--report-only", "--quiet") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "13", "13"], "--seeds holds 13 more than once"),
        (["--tasks", "nothing"], "task 'nothing' is unknown"),
        (["--space", "layers:3"], "space 'layers:3' is unknown"),
        (["--space", "head"], "--space head has no layers to choose from: it reaches"),
        (["--space", "embeddings"], "it reaches embeddings alone"),
        (["--budget", "99p"], "--budget 99p has room for none of the 6 layers"),
        (["--budget", "0"], None),
        (["--budget", "many"], "must read 3 for three layers or 40000p"),
        (["--epsilon", "0"], "'0' must be a number above 0"),
        (["--subsets", "64"], "--subsets 64 must be from 1 to 63"),
        (["--space", "full", "--verify"], "can be ranked but not fine-tuned"),
        (["--space", "lora:8/seed=1", "--verify"], "can be ranked but not fine-tuned"),
        (["--shots", "2000"], "reviews"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    code = run(*arguments, "--output", tmp_path / "runs", "--quiet")
    error = capsys.readouterr().err
    assert code == 2
    assert message is None or message in error
    assert not (tmp_path / "runs").exists()
