"""An ablation's summary against plain loops, and its report."""

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Page
from rich.console import Console

from ntk.reporting.page import html, markdown, write_page
from ntk.reporting.scores import select
from ntk.reporting.style import to_svg
from ntk.studies.ablation.figures import draw_figures
from ntk.studies.ablation.gains import MEASURES, combined
from ntk.studies.ablation.records import AXES, FULL, Selection, selections
from ntk.studies.ablation.report import (
    QUESTION,
    collect,
    report_page,
    tables,
    verdict,
)
from ntk.studies.folder import Cell, Key

COMMAND = "python -m ntk.ablate --tasks sst2 trec"
SETTINGS = {"study": "ablation", "model": None}
TASKS, SEEDS, COUNTS, DRAWS = ("sst2", "trec"), (13, 21, 42), (1, 4, 16), 4
STRATEGIES = ("first", "random", "max", "activation", "gradient")
LAYERS = ("layer 0", "layer 1", "layer 10")


def written(summary, folder):
    """Return the files of a report, as the command writes it."""
    return write_page(report_page(summary), summary, draw_figures(summary), folder)


def view(distance, score):
    return {
        "distance": {"frobenius": 1 - distance / 4, "frobenius_rescaled": distance},
        "alignment": 1 - distance,
        "test": {"accuracy": score},
        "dev": score,
    }


def records(tasks=TASKS, seeds=SEEDS, shots=16):
    """Return an ablation's records with random numbers."""
    generator = np.random.default_rng(0)
    found = []
    chosen = selections(AXES, COUNTS, STRATEGIES, DRAWS)
    for task in tasks:
        for seed in seeds:
            cell = Cell(task, shots, seed)
            common = {"model": "tiny", "metric": "accuracy", "notes": []}
            for name in ("full", "all", *(each.name for each in chosen)):
                far, score = generator.uniform(0.1, 0.9, 2)
                record = {**common, "space": name, "parameters": 100, "share": 0.25}
                if name == "full":
                    record["own_outputs"] = {"test": {"accuracy": 0.5}}
                    record["head"] = {"test": {"accuracy": 0.625}}
                elif name != "all":
                    each = Selection.of(name)
                    record |= {"axis": each.axis, "count": each.count}
                    record |= {"strategy": each.strategy, "seed": each.seed}
                record["body"] = view(far, score)
                record["whole"] = view(far / 2, generator.uniform(0.5, 0.9))
                found.append((Key(cell, "selection", name), record))
            for each in chosen:
                if each.is_estimate:
                    record = {**common, "axis": each.axis, "count": each.count}
                    record |= {"strategy": "random", "seed": each.seed}
                    record |= {"expected": 1 / each.count, "extreme": 0.5}
                    record["measured"] = generator.uniform(0.5, 1.5) / each.count
                    found.append((Key(cell, "variance", each.estimate), record))
            trace = {
                "query": dict(zip(LAYERS, (1.0, 2.0, 3.0), strict=True)),
                "head": {"head": 2.0},
            }
            sizes = {"query": dict.fromkeys(LAYERS, 30), "head": {"head": 10}}
            cosine = {
                "kind": {"query": 0.9, "head": None},
                "layer": {**dict.fromkeys(LAYERS, 0.8), "head": None},
            }
            record = {**common, "trace": trace, "parameters": sizes, "cosine": cosine}
            found.append((Key(cell, "origin", FULL), record))
            tuned = {**common, "test": {"accuracy": generator.uniform(0.5, 0.9)}}
            found.append((Key(cell, "finetune", "rows:4"), tuned))
    return found


@pytest.fixture(scope="module")
def made():
    return records()


@pytest.fixture(scope="module")
def summary(made):
    return collect(made, COMMAND, SETTINGS)


def value(records, task, split, measure, /, **selection):
    """Return a measure of one selection, looked up by a loop."""
    path = MEASURES[measure].path.replace("METRIC", "accuracy").split(".")
    for key, record in records:
        place = key.kind, key.cell.task, key.cell.seed
        same = all(record.get(k) == v for k, v in selection.items())
        if same and place == ("selection", task, split):
            for part in path:
                record = record[part]
            return record
    return None


def differences(records, measure, axis, count, strategy, task, splits=SEEDS):
    """Return D of one point and task, ``(draws, splits)``."""
    at = {"axis": axis, "count": count}
    own = [value(records, task, k, measure, **at, strategy=strategy) for k in splits]
    at["strategy"] = "random"
    random = [
        [value(records, task, k, measure, **at, seed=j) for k in splits]
        for j in range(DRAWS)
    ]
    columns = list(zip(*random, strict=True))
    unit = math.sqrt(statistics.mean(map(statistics.variance, columns)))
    better = MEASURES[measure].better
    return [
        [better * (a - b) / unit for a, b in zip(own, row, strict=True)]
        for row in random
    ]


def gain_and_error(D):
    """Return the mean of D and its error, as they are defined."""
    J, K = len(D), len(D[0])
    by_draw = [sum(row) / K for row in D]
    by_split = [sum(row[k] for row in D) / J for k in range(K)]
    variance = statistics.variance(by_draw) / J + statistics.variance(by_split) / K
    return sum(by_draw) / J, math.sqrt(variance)


# Numbers.


@pytest.mark.parametrize("measure", MEASURES)
def test_gains_on_one_task(made, summary, measure):
    where = {"measure": measure, "strategy": "gradient", "axis": "columns"}
    (row,) = select(summary["gains"], task="trec", **where)
    whole = np.zeros((DRAWS, 3))
    assert row["counts"] == list(COUNTS)
    for i, count in enumerate(COUNTS):
        D = differences(made, measure, "columns", count, "gradient", "trec")
        gain, error = gain_and_error(D)
        assert row["gain"][i] == pytest.approx(gain, rel=1e-5)
        assert row["error"][i] == pytest.approx(error, rel=1e-5)
        beaten = np.mean(np.array(D) > 0)
        assert row["wins"][i] == pytest.approx(beaten, rel=1e-5)
        whole += np.array(D) / len(COUNTS)
    gain, error = gain_and_error(whole.tolist())
    over = row["over_counts"]
    assert over["gain"] == pytest.approx(gain, rel=1e-5)
    assert over["error"] == pytest.approx(error, rel=1e-5)
    assert (over["tasks"], over["splits"], over["draws"]) == (1, 3, DRAWS)


def test_gains_over_tasks_and_axes(made, summary):
    where = {"measure": "score", "strategy": "max", "task": None}
    by_axis = []
    for axis in AXES:
        tasks = [
            np.mean(
                [differences(made, "score", axis, c, "max", t) for c in COUNTS], axis=0
            )
            for t in TASKS
        ]
        D = np.concatenate(tasks, axis=1)
        by_axis.append(D)
        (row,) = select(summary["gains"], **where, axis=axis)
        gain, error = gain_and_error(D.tolist())
        assert row["over_counts"]["gain"] == pytest.approx(gain, rel=1e-5)
        assert row["over_counts"]["error"] == pytest.approx(error, rel=1e-5)
        assert row["over_counts"]["tasks"] == 2
        assert row["over_counts"]["splits"] == 6
    (row,) = select(summary["gains"], **where, axis=None)
    gain, error = gain_and_error(np.mean(by_axis, axis=0).tolist())
    assert row["over_counts"]["gain"] == pytest.approx(gain, rel=1e-5)
    assert row["over_counts"]["error"] == pytest.approx(error, rel=1e-5)
    assert "gain" not in row


@given(
    st.integers(2, 5),
    st.integers(1, 4),
    # A gain so small that half of it is zero would be none.
    st.integers(-3000, 3000).map(lambda i: i / 1000),
    st.floats(0.1, 3),
)
def test_a_gain_without_noise_has_no_error(draws, splits, gain, scale):
    """What differs neither by selection nor by split is known exactly."""
    values = {
        (draw, ("t", split)): gain for draw in range(draws) for split in range(splits)
    }
    found = combined({"t": [values, {at: scale * v for at, v in values.items()}]})
    assert found["gain"] == pytest.approx(gain * (1 + scale) / 2, abs=1e-12)
    assert found["error"] == pytest.approx(0, abs=1e-12)
    assert found["wins"] == (0.5 if gain == 0 else float(gain > 0))


def test_a_choice_like_another_draw_gains_nothing_on_average():
    """A fixed selection that is one more random one has a gain of zero in the mean."""
    generator = np.random.default_rng(0)
    gains, errors = [], []
    for _ in range(400):
        effects = generator.normal(size=6)
        noise = 0.3 * generator.normal(size=(6, 3))
        scores = effects[:, None] + noise
        D = {
            (j, ("t", k)): scores[5, k] - scores[j, k]
            for j in range(5)
            for k in range(3)
        }
        found = combined({"t": [D]})
        gains.append(found["gain"])
        errors.append(found["error"])
    assert abs(np.mean(gains)) < 0.15
    # The error is that of the random mean: the choice itself is fixed.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(
        math.sqrt((1 + 0.09 / 3) / 5 + 0.09 * (1 + 1 / 5) / 3), rel=0.1
    )


def test_curves(made, summary):
    (row,) = select(
        summary["curves"], task="sst2", axis="both", strategy="random", shots=16
    )
    at = {"axis": "both", "count": 4, "strategy": "random"}
    values = [
        [value(made, "sst2", k, "rescaled", **at, seed=j) for j in range(DRAWS)]
        for k in SEEDS
    ]
    assert row["counts"] == list(COUNTS)
    assert row["rescaled"]["mean"][1] == pytest.approx(np.mean(values), rel=1e-5)
    spread = math.sqrt(np.mean([statistics.variance(own) for own in values]))
    assert row["rescaled"]["deviation"][1] == pytest.approx(spread, rel=1e-5)
    (row,) = select(summary["curves"], task="sst2", axis="rows", strategy="max")
    own = [
        value(made, "sst2", k, "score", axis="rows", count=16, strategy="max")
        for k in SEEDS
    ]
    assert row["score"]["mean"][2] == pytest.approx(statistics.mean(own), rel=1e-5)
    assert row["score"]["deviation"][2] == pytest.approx(
        statistics.stdev(own), rel=1e-5
    )


def test_variance(made, summary):
    own = [r for k, r in made if k.kind == "variance" and k.cell.task == "trec"]
    own = [r for r in own if (r["axis"], r["count"]) == ("rows", 4)]
    by_draw = [
        statistics.mean(r["measured"] for r in own if r["seed"] == j)
        for j in range(DRAWS)
    ]
    (row,) = select(summary["variance"], task="trec", axis="rows", count=4)
    assert row["expected"] == 0.25
    assert row["extreme"] == 0.5
    assert row["measured"]["mean"] == pytest.approx(statistics.mean(by_draw), rel=1e-5)
    error = statistics.stdev(by_draw) / math.sqrt(DRAWS)
    assert row["measured"]["standard_error"] == pytest.approx(error, rel=1e-5)
    ratios = [
        statistics.mean(
            r["measured"] / r["expected"]
            for k, r in made
            if k.kind == "variance" and (r["axis"], r["seed"]) == ("columns", j)
        )
        for j in range(DRAWS)
    ]
    (row,) = select(summary["variance_ratios"], axis="columns")
    assert row["mean"] == pytest.approx(statistics.mean(ratios), rel=1e-5)


def test_origins_references_and_tuned(made, summary):
    (row,) = select(summary["origins"], task="sst2")
    assert row["trace"]["query"]["layer 10"] == pytest.approx(3 / 8)
    assert row["share"]["head"]["head"] == pytest.approx(0.1)
    assert row["cosine"]["kind"] == {"query": 0.9, "head": None}
    (head,) = select(summary["references"], task="sst2", name="head")
    assert head["score"]["mean"] == 0.625
    (row,) = select(summary["tuned"], task="trec")
    tuned = [r["test"]["accuracy"] for k, r in made if k.kind == "finetune"][3:]
    kernels = [value(made, "trec", k, "score", space="rows:4") for k in SEEDS]
    assert row["score"]["mean"] == pytest.approx(statistics.mean(tuned), rel=1e-5)
    points = [100 * (a - b) for a, b in zip(kernels, tuned, strict=True)]
    assert row["points"]["mean"] == pytest.approx(statistics.mean(points), rel=1e-4)


def test_the_order_of_records_does_not_matter(made, summary):
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(made))
        shuffled = [made[i] for i in order]
        assert collect(shuffled, COMMAND, SETTINGS) == summary
    json.dumps(summary, allow_nan=False)


# What is missing.


def test_what_is_missing_is_said_and_left_out(made):
    lost = Key(Cell("sst2", 16, 21), "selection", "rows:4/strategy=random/seed=2")
    some = [(key, None if key == lost else record) for key, record in made]
    summary = collect(some, COMMAND, SETTINGS)
    (row,) = summary["missing"]
    assert (row["subject"], row["seeds"]) == (lost.subject, [21])
    where = {"measure": "raw", "strategy": "max", "axis": "rows", "task": "sst2"}
    (row,) = select(summary["gains"], **where)
    # The split without it goes out, at that size and where sizes are averaged.
    assert row["over_counts"]["splits"] == 2
    kept = differences(made, "raw", "rows", 4, "max", "sst2", (13, 42))
    assert row["gain"][1] == pytest.approx(np.mean(kept), rel=1e-5)
    assert any("records is missing" in line for line in report_page(summary).lines)


def test_equal_random_selections_have_no_spread_to_measure_by(made):
    flat = []
    for key, record in made:
        if record.get("count") == 4 and key.kind == "selection":
            record = {**record, "whole": view(0.5, 0.75)}
        flat.append((key, record))
    summary = collect(flat, COMMAND, SETTINGS)
    where = {"measure": "score", "strategy": "max", "axis": "rows", "task": "sst2"}
    (row,) = select(summary["gains"], **where)
    assert row["gain"][1] is None
    assert row["error"][1] is None
    assert row["over_counts"]["gain"] is not None
    assert all(tables(summary))


def test_a_measure_without_a_value(made):
    odd = []
    for key, record in made:
        if record.get("strategy") == "max" and key.cell.seed == 13:
            body = {**record["body"], "alignment": None} if "body" in record else None
            record = {**record, "body": body}
            if body:
                body["distance"] = {**body["distance"], "frobenius": math.nan}
        odd.append((key, record))
    summary = collect(odd, COMMAND, SETTINGS)
    for measure in ("alignment", "raw"):
        where = {"measure": measure, "strategy": "max", "axis": "both", "task": None}
        (row,) = select(summary["gains"], **where)
        assert row["over_counts"]["splits"] == 4
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("kind", ["selection", "variance", "origin", "finetune", None])
def test_reports_of_a_part(made, kind, tmp_path):
    """One kind of records alone, or none at all."""
    some = [(k, r if k.kind == kind else None) for k, r in made]
    summary = collect(some, COMMAND, SETTINGS)
    files = written(summary, tmp_path)
    Page(files["html"].read_text())
    assert summary["records"]["there"] == sum(r is not None for _, r in some)
    expected = {
        "selection": {"gain-16", "distance-16", "score-16", "alone-16"},
        "variance": {"variance-16"},
        "origin": {"origin-16"},
    }
    assert set(draw_figures(summary)) == expected.get(kind, set())


def test_without_random_selections_there_is_no_verdict(made):
    some = [(k, r) for k, r in made if "random" not in k.subject]
    summary = collect(some, COMMAND, SETTINGS)
    assert all(row["over_counts"]["gain"] is None for row in summary["gains"])
    assert not any("spread" in line for line in report_page(summary).lines)
    assert draw_figures(summary)


# Reports.


@pytest.mark.parametrize(
    ("gain", "error", "said"),
    [(2, 0.4, "yes"), (2, 0.6, "open"), (0.5, 0.2, "no"), (-3, 1.5, "no")]
    + [(-3, 0.9, "worse"), (1, 0.0, "open"), (-1, 0.0, "no")],
)
def test_verdicts(gain, error, said):
    over = {"gain": gain, "error": error}
    assert verdict({**over, "splits": 2}) == said
    assert verdict({**over, "splits": 1}) == "open"


def test_the_question_is_answered_in_numbers(made):
    better = []
    for key, record in made:
        if record.get("strategy") == "gradient" and "body" in record:
            record = {**record, "body": view(0.01, 0.99)}
        better.append((key, record))
    summary = collect(better, COMMAND, SETTINGS)
    answer, *_ = report_page(summary).lines
    names = "(gradient of rows, gradient of columns, gradient of both)"
    assert f"by the distance, best scale 3 of 9 {names}" in answer
    lines = " ".join(report_page(summary).lines)
    (row,) = select(
        summary["gains"],
        measure="rescaled",
        strategy="gradient",
        axis="rows",
        task=None,
    )
    over = row["over_counts"]
    text = f"gradient of rows {over['gain']:+.1f} ± {over['error']:.1f} (yes)"
    assert text in lines
    assert "2 tasks, 6 splits and 4 random selections" in lines


def test_tables_fit_a_terminal(summary):
    console = Console(width=110, record=True)
    found = tables(summary)
    for table in found:
        assert console.measure(table).maximum <= 110
        console.print(table)
    text = console.export_text()
    for axis in (*AXES, "all axes"):
        assert f"{axis}, gradient" in text
    assert "…" not in text


def test_markdown_has_every_table(summary):
    text = markdown(report_page(summary))
    for title in (
        "Gain over random selection",
        "Gain by size: score",
        "Gain by task: distance",
        "Distance, best scale by size",
        "Error of random selections",
        "Contributions to the full kernel by layer",
        "Fine-tuning",
    ):
        assert f"### {title}" in text
    lines = text.splitlines()
    rows = [i for i, line in enumerate(lines) if line.startswith("|---")]
    for i in rows:
        width = lines[i].count("|")
        for line in lines[i - 1 : i + 2]:
            assert line.count("|") - line.count("\\|") == width, line
    layers = [line.split(" |")[0] for line in lines if line.startswith("| layer ")]
    assert layers == ["| layer", *(f"| {layer}" for layer in LAYERS)]


def test_the_page_needs_nothing_else(summary):
    figures = {name: to_svg(figure) for name, figure in draw_figures(summary).items()}
    text = html(report_page(summary), figures)
    page = Page(text)
    assert QUESTION in page.words
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith(("#", "data:")), link
        if link.startswith("#"):
            assert link[1:] in page.ids
    assert "script" not in page.tags
    assert text.count("<figure ") == len(figures) == 6
    assert COMMAND in page.words


def test_words_of_others_are_escaped(made):
    some = [(k, {**r, "model": "<b>model</b>|"}) for k, r in made]
    summary = collect(some, "python -m ntk.ablate '<script>'", SETTINGS)
    assert "script" not in Page(html(report_page(summary), {})).tags
    assert "<b>" not in markdown(report_page(summary))


def test_every_figure_is_drawn(summary):
    for name, figure in draw_figures(summary).items():
        svg = to_svg(figure)
        ElementTree.fromstring(svg)
        for task in TASKS if name not in {"gain-16", "origin-16"} else ():
            assert f">{task}</text>" in svg, name
    curves = draw_figures(summary)["distance-16"]
    assert len(curves.axes) == 6
    assert {len(ax.lines) for ax in curves.axes} == {len(STRATEGIES) + 1}


def test_of_many_tasks_the_mean_is_drawn():
    many = records(tasks=("a", "b", "c", "d", "e"), seeds=(13, 21))
    summary = collect(many, COMMAND, SETTINGS)
    figure = draw_figures(summary)["distance-16"]
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title() == "mean of 5 tasks"
    (line,) = [ln for ln in figure.axes[0].lines if ln.get_label() == "max"]
    rows = select(summary["curves"], axis="rows", strategy="max")
    mean = np.mean([row["rescaled"]["mean"] for row in rows], axis=0)
    np.testing.assert_allclose(line.get_ydata(), 100 * mean, rtol=1e-5)


def test_the_same_records_give_the_same_files(made, tmp_path):
    some = [(k, r) for k, r in made if r.get("axis", "rows") == "rows"]
    summary = collect(some, COMMAND, SETTINGS)
    one = written(summary, tmp_path / "one")
    other = written(summary, tmp_path / "other")
    for kind, file in one.items():
        assert file.read_bytes() == other[kind].read_bytes(), kind
