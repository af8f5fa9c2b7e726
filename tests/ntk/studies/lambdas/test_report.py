"""A lambda study's summary of records whose powers of lambda are known; its report."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import numpy as np
import pytest
from pages import Page
from rich.console import Console

from ntk.reporting.page import html, markdown, write_page
from ntk.reporting.style import to_svg
from ntk.studies.folder import Cell, Key
from ntk.studies.lambdas.figures import draw_figures
from ntk.studies.lambdas.records import BOUNDED, Training
from ntk.studies.lambdas.report import (
    QUESTION,
    explained_from,
    report_page,
    tables,
)
from ntk.studies.lambdas.summary import MEASURES, collect
from ntk.studies.lambdas.tables import slices


def written(summary, folder):
    """Return the files of a report, as the command writes it."""
    return write_page(report_page(summary), summary, draw_figures(summary), folder)


def made(tasks=("cola", "sst2"), seeds=(13, 21, 42), loss="squared"):
    """Return records whose movement and gap are powers of lambda, -1 and -2."""
    generator = np.random.default_rng(0)
    found = []
    for task in tasks:
        for seed in seeds:
            for strength in (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0):
                training = Training("lora:8", strength, loss)
                factor = 1 + generator.uniform() / 10
                moved = factor / max(strength, 0.05)
                gap = moved**2 / 3
                close = {
                    **dict.fromkeys(MEASURES, 0.5),
                    "movement": moved,
                    "linear_movement": moved,
                    "parameter_distance": gap,
                    "relative_parameter_distance": gap / moved,
                    "change": moved,
                    "mean_logit_distance": gap / 4,
                    "output_distance": gap,
                    "relative_output_distance": gap / moved,
                    "kl_divergence": gap**2,
                    "agreement": 1 / (1 + gap),
                    "accuracy": 0.5 + moved / 100,
                    "recovery": None,
                }
                bound = {"value": 2 * gap, "note": "", "conditions": "c", "source": "s"}
                bad = {**bound, "value": None, "note": "vacuous: no flow & <b>"}
                state = {"loss": 0.1, "objective": 0.2, "gradient": 1e-9}
                record = {
                    "model": "tiny",
                    "metric": "accuracy",
                    "notes": [],
                    **asdict(training),
                    **{"learning_rate": 0.1, "steps": 40, "batch": 8},
                    **{"examples": [32, 32, 1000], "parameters": 1234},
                    **{"test": close, "train": close},
                    "taylor": {"ratios": [0.1, 0.2]},
                    "states": dict.fromkeys(("start", "tuned", "linear"), state),
                    "outputs": {
                        "tuned": [[moved, -moved]] * 32,
                        "linear": [[1.0, 2.0]] * 32,
                    },
                    "seconds": generator.uniform(),
                }
                if loss == "squared":
                    record["bounds"] = {
                        **{"constants": {}, "critical_strength": 0.5, "time": None},
                        **dict.fromkeys(BOUNDED, bad),
                        "minimiser": bound,
                        "parameters": {**bound, "value": gap / 2},
                        "descent": bound if strength else bad,
                    }
                found.append((Key(Cell(task, 16, seed), loss, training.name), record))
    return found


COMMAND = "python -m ntk.linearize --tasks cola sst2"


@pytest.fixture(scope="module")
def summary():
    return collect(made(), COMMAND, {"study": "linearization"})


def test_the_order_and_the_times_of_records_do_not_matter(summary):
    changed = [(key, {**record, "seconds": 7}) for key, record in reversed(made())]
    assert collect(changed, COMMAND, {"study": "linearization"}) == summary


def test_powers_of_lambda_are_found(summary):
    for group in summary["groups"]:
        for measure, power in (("movement", -1), ("gap", -2), ("relative_gap", -1)):
            row = group["slopes"][measure]["strongest"]
            assert row["slope"] == pytest.approx(power, abs=0.05)
            assert row["lambdas"] == 4
            assert row["from"] == 1.0
    single = collect(made(seeds=(13,)), COMMAND, {})["groups"][0]
    points = single["points"][2:]
    x, y = (np.log([p[k] if k == "strength" else p[k]["mean"] for p in points])
            for k in ("strength", "movement"))  # fmt: skip
    (_, cov) = np.polyfit(x, y, 1, cov=True)
    row = single["slopes"]["movement"]["strongest"]
    assert row["standard_error"] == pytest.approx(math.sqrt(cov[0, 0]), rel=1e-3)
    assert row["seeds"] == 1


def test_few_lambdas_have_no_slope():
    few = [(k, r) for k, r in made() if r["strength"] in {0.0, 1.0, 10.0}]
    summary = collect(few, COMMAND, {})
    assert summary["groups"][0]["slopes"]["gap"]["over_all"] is None
    assert "powers of lambda" not in " ".join(report_page(summary).lines)


def test_a_free_twin_with_other_steps_is_not_compared():
    other = [
        (k, {**r, "learning_rate": 0.2} if r["strength"] == 0 else r) for k, r in made()
    ]
    points = collect(other, COMMAND, {})["groups"][0]["points"]
    assert points[0]["gap_to_free"]["mean"] is not None
    assert points[1]["gap_to_free"]["mean"] is None


def test_bounds_stand_beside_what_they_bound(summary):
    group = summary["groups"][0]
    for point in group["points"]:
        found = point["bounds"]
        assert found["minimiser"]["held"] == found["minimiser"]["compared"] == 3
        assert found["minimiser"]["measured"] == point["train_gap"]
        assert found["parameters"]["held"] == 0
        assert found["published"]["measured"] == point["gap_to_free"]
        assert found["published"]["compared"] == 0
        assert found["published"]["vacuous"] == ["vacuous: no flow & <b>"]


# The report.


def test_what_explains_is_said(summary):
    group = summary["groups"][0]
    point = explained_from(group)
    # The relative gap is a third of the movement, about 1 / lambda.
    assert point["strength"] == 10.0
    never = {**group, "points": group["points"][:2]}
    assert explained_from(never) is None
    lines = report_page(summary).lines
    assert "from lambda = 10 on the linearised model explains fine-tuning" in lines[0]
    assert lines[0].startswith("sst2 (lora:8, 16 shots, squared loss, AdamW): ")
    text = " ".join(lines)
    slope = group["slopes"]["movement"]["strongest"]["slope"]
    assert f"over the largest 4 from 1 to 1000: {slope:.2f} ± " in text
    assert "lambda belongs to the mean loss; for the sum it is 32 times" in text
    assert "corrected, at the minimisers (of the gap) holds in 18 of 18" in text
    assert "corrected, of parameters (of the parameter distance) holds in 0 of" in text
    assert "vacuous at every lambda: movement under flow, published" in text
    some = [(k, r) for k, r in made() if r["strength"] < 1]
    (line, *_) = report_page(collect(some, COMMAND, {})).lines
    assert "at no lambda does the linearised model explain fine-tuning" in line


def test_with_cross_entropy_no_bound_is_claimed():
    summary = collect(made(loss="cross_entropy"), COMMAND, {})
    assert "no bounds are shown" in " ".join(report_page(summary).lines)
    names = [table.name for s in report_page(summary).sections for table in s.tables]
    assert not [name for name in names if name.startswith(("bounds", "vacuous"))]


def test_the_page_holds_every_table_and_needs_nothing_else(summary):
    page = report_page(summary)
    text = markdown(page)
    for task in ("cola", "sst2"):
        for title in ("by lambda", "bounds by lambda", "vacuous bounds"):
            assert f"### {task}, {title}" in text
    assert "### Slopes against lambda" in text
    assert "violated 3 times" in text
    assert "no flow &amp; &lt;b>" in text
    figures = {name: to_svg(figure) for name, figure in draw_figures(summary).items()}
    shown = Page(html(page, figures))
    assert QUESTION in shown.words
    assert "no flow & <b>" in shown.words
    assert len(shown.ids) == len(set(shown.ids))
    for link in shown.links:
        assert link.startswith("#"), link
        assert link[1:] in shown.ids
    for name, svg in figures.items():
        ElementTree.fromstring(svg)
        assert f"figure-{name}" in shown.ids


def test_the_table_has_the_numbers_of_the_summary(summary):
    text = markdown(report_page(summary))
    group = summary["groups"][0]
    for point in group["points"]:
        (line,) = [
            line
            for line in text.split("### ")[1].splitlines()
            if line.startswith(f"| {point['strength']:g} |")
        ]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        moved, gap = point["movement"], point["relative_gap"]
        assert cells[1] == f"{moved['mean']:.2g} ± {moved['deviation']:.2g}"
        assert cells[3] == f"{100 * gap['mean']:.2g} ± {100 * gap['deviation']:.2g}"


def test_tables_fit_a_terminal(summary):
    console = Console(width=110, record=True)
    found = tables(summary)
    assert len(found) == 2
    for table in found:
        assert console.measure(table).maximum <= 110
        console.print(table)
    assert "…" not in console.export_text()


def test_figures_show_bounds_where_they_hold(summary):
    figures = draw_figures(summary)
    (part,) = slices(summary)
    assert set(figures) == {f"distance-{part.name}", f"accuracy-{part.name}"}
    labels = {
        line.get_label()
        for ax in figures[f"distance-{part.name}"].axes
        for line in ax.lines
    }
    bounds = {label for label in labels if label.startswith("bound: ")}
    assert bounds == {
        "bound: movement at the minimiser",
        "bound: corrected, at the minimisers",
    }
    for ax, group in zip(
        figures[f"accuracy-{part.name}"].axes, part.groups, strict=True
    ):
        drawn = [tuple(line.get_ydata()) for line in ax.lines]
        means = [100 * p["accuracy"]["mean"] for p in group["points"]]
        assert tuple(means[1:]) in drawn
        assert (means[0],) in drawn


def test_the_same_records_give_the_same_files(tmp_path):
    summary = collect(made(tasks=("sst2",), seeds=(13,)), COMMAND, {})
    one = written(summary, tmp_path / "one")
    other = written(summary, tmp_path / "other")
    assert {"json", "markdown", "html"} <= one.keys()
    for kind, file in one.items():
        assert file.read_bytes() == other[kind].read_bytes(), kind


def test_a_study_without_records_has_a_report(tmp_path):
    empty = collect([], COMMAND, {})
    written(empty, tmp_path)
    assert report_page(empty).lines == ["There are no records yet."]
