"""The report of a study, on records made up here whose numbers are known."""

import io
import json
import math
import random
from statistics import fmean, stdev

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from pages import Page
from rich.console import Console

from ntk.classifiers.agreement import (
    agreement,
    bootstrap_difference,
    kappa,
    margin_correlation,
)
from ntk.reporting.page import html, markdown, write_page
from ntk.reporting.scores import select
from ntk.reporting.style import to_png
from ntk.reporting.tables import KERNEL_OVER
from ntk.scale.storage import StorageError
from ntk.studies.fewshot.against_tuning import _SCORES, _resamples, _terms, compare
from ntk.studies.fewshot.figures import draw_figures
from ntk.studies.fewshot.plots import Point, plot_change, plot_scores, styles
from ntk.studies.fewshot.report import (
    collect,
    report_page,
    tables,
)
from ntk.studies.fewshot.slices import slices
from ntk.studies.fewshot.tables import (
    kernel_scores,
    report_tables,
    tuned_scores,
)
from ntk.studies.folder import Cell, Key, Study
from ntk.studies.order import order_of_subject, same_parameters
from ntk.studies.overview import DIGITS
from rocoft.data.metrics import scores

SEEDS = (13, 21, 42)
CLASSES = {"sst2": 2, "trec": 3, "mrpc": 2}
METRICS = {"mrpc": ("f1", "accuracy"), "cola": ("matthews_correlation", "accuracy")}
SPACES = ("full", "rows:3", "bias", "head")
METHODS = ("full", "rows:3", "bitfit", "head")
EXAMPLES = 24
COMMAND = "python -m ntk.evaluate --tasks sst2 mrpc trec"
SETTINGS = {"model": None, "versions": {"torch": "2.13.0"}, "arguments": {}}
ROUNDED = 10.0**-DIGITS * 10


def written(summary, folder):
    """Return the files of a report, as the command writes it."""
    return write_page(report_page(summary), summary, draw_figures(summary), folder)


def labels_of(task):
    classes = CLASSES.get(task, 2)
    return np.arange(EXAMPLES) % classes


def generator_of(*parts):
    return np.random.default_rng([ord(c) for c in "/".join(map(str, parts))])


def common(task, shots):
    classes = CLASSES.get(task, 2)
    return {
        "model": "a tiny model",
        "readout": "head",
        "task": task,
        "task_labels": [f"label {i}" for i in range(classes)],
        "metric": METRICS.get(task, ("accuracy",))[0],
        "examples": [shots * classes, shots * classes, EXAMPLES],
        "labels": labels_of(task).tolist(),
        "notes": ["new head: classifier.weight (probe)"],
    }


def predicted(task, generator, quality=1.0):
    """Return outputs and their scores."""
    labels = labels_of(task)
    outputs = generator.normal(size=(EXAMPLES, CLASSES.get(task, 2)))
    outputs[np.arange(EXAMPLES), labels] += quality
    found = scores(outputs, labels, METRICS.get(task, ("accuracy",)))
    return {"test": found, "outputs": outputs.tolist()}


def kernel_record(task, shots, seed, space, kind="sgd"):
    generator = generator_of(task, shots, seed, space, kind)
    record = common(task, shots)
    own = predicted(task, generator_of(task, shots, seed), 0.3)
    distance = 0.1 * SPACES.index(space) + 0.01 * seed / 100
    # The asymmetric kernels' only classifier, as the study has it.
    asymmetric = kind == "asymmetric_signgd"
    names = ("asymmetric",) if asymmetric else ("ridge", "logistic", "svm")
    record |= {
        "kernel": kind,
        "f0": {"dev": 0.5, "test": own["test"]},
        "seconds_of_pass": random.random(),
        "space": space,
        "parameters": 1000 - 100 * SPACES.index(space),
        "share": 0.25,
        "classifiers": {
            name: {
                "dev": 0.5 + 0.25 * int(generator.integers(0, 3)),
                "regularisation": 0.1,
                "offset_scale": float(generator.choice([0.0, 0.01])),
                **predicted(task, generator),
            }
            for name in names
        },
    }
    if asymmetric:
        return record
    return record | {
        "distance": {
            "frobenius": distance,
            "frobenius_rescaled": distance / 2,
            "cosine": 1 - distance,
            "cka": None if space == "head" else math.nan,
            "overlap": 0.5,
            "trace_ratio": 0.125,
        },
        "spectrum": {"effective_dimension": 8.0 + seed, "entropy_rank": 4.0},
        "alignment": 0.25,
        "growth": [
            {"size": 4, "mean": distance / 4, "std": 0.01},
            {"size": 8, "mean": distance / 2, "std": None},
        ],
        "shuffled": {"ridge": 0.5, "draws": 5},
    }


def grid_of(metric, best):
    """Return the dev scores of three rates, as records from before their ends were."""
    return {
        f"{rate:g}": {"step": 3, metric: 0.75 if rate == best else 0.5}
        for rate in (1e-4, 1e-3, 1e-2)
    }


def tuned_record(task, shots, seed, method):
    generator = generator_of(task, shots, seed, "tuned", method)
    record = common(task, shots)
    return record | {
        "method": method,
        **predicted(task, generator, 1.3),
        "dev": {"step": 3, record["metric"]: 0.75},
        "learning_rate": 1e-3 if seed == 13 else 1e-4,
        "grid": grid_of(record["metric"], 1e-3 if seed == 13 else 1e-4),
        "steps": 30,
        "parameters": {"trainable": 10, "head": 1, "without_head": 9, "total": 1000},
        "kernel_change": {
            "distance": 0.001 * seed,
            "norm_ratio": 1.5,
            "measures": {"frobenius": 0.3, "cka": None, "overlap": 0.5},
            "rank": 3,
            "alignment_before": 0.1,
            "alignment_after": 0.3,
        },
        "seconds": random.random(),
    }


def study(tasks=tuple(CLASSES), shots=(4,), kinds=("sgd",), methods=METHODS):
    """Return all records of a study in the order in which it makes them."""
    found = {}
    for task in tasks:
        for number in shots:
            for seed in SEEDS:
                cell = Cell(task, number, seed)
                for kind in kinds:
                    for space in SPACES:
                        key = Key(cell, f"kernel-{kind}", space)
                        found[key] = kernel_record(task, number, seed, space, kind)
                for method in methods:
                    record = tuned_record(task, number, seed, method)
                    found[Key(cell, "finetune", method)] = record
    return found


def summarised(records):
    return collect(list(records.items()), COMMAND, SETTINGS)


def kernel(records, task, seed, space, shots=4, kind="sgd"):
    return records[Key(Cell(task, shots, seed), f"kernel-{kind}", space)]


def tuned(records, task, seed, method, shots=4):
    return records[Key(Cell(task, shots, seed), "finetune", method)]


def ratio_of_sums(pairs):
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def jackknife(units, function):
    """Return the standard error of a function of units, leaving out each."""
    n = len(units)
    left = [function(units[:i] + units[i + 1 :]) for i in range(n)]
    return math.sqrt((n - 1) / n * sum((x - fmean(left)) ** 2 for x in left))


def only(rows, **where):
    (row,) = select(rows, **where)
    return row


def best(record):
    """Return the classifier chosen on dev, by a loop."""
    found = None
    for name in ("ridge", "logistic", "svm"):
        classifier = record["classifiers"][name]
        if found is None or classifier["dev"] > found["dev"]:
            found = classifier
    return found


@pytest.fixture(scope="module")
def records():
    return study()


@pytest.fixture(scope="module")
def summary(records):
    return summarised(records)


@pytest.fixture(scope="module")
def partial():
    """A study that is not finished."""
    found = study(shots=(4, 8))
    for key in list(found):
        cell = key.cell
        if cell.task == "trec" and cell.shots == 8:
            del found[key]
        elif cell.task == "sst2" and cell.seed == 42 and key.subject == "full":
            found[key] = None
        elif cell.task == "mrpc" and key.kind == "finetune" and cell.shots == 4:
            del found[key]
    return found


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("space", SPACES)
def test_the_score_is_that_of_the_classifier_chosen_on_dev(
    records, summary, task, space
):
    row = only(summary["kernels"], task=task, space=space)
    metric = METRICS.get(task, ("accuracy",))[0]
    own = [best(kernel(records, task, seed, space)) for seed in SEEDS]
    values = [classifier["test"][metric] for classifier in own]
    assert row["seeds"] == list(SEEDS)
    assert row["test"]["values"] == pytest.approx(values, rel=ROUNDED)
    assert row["test"]["mean"] == pytest.approx(fmean(values), rel=ROUNDED)
    assert row["test"]["deviation"] == pytest.approx(stdev(values), rel=ROUNDED)
    for name, found in row["classifiers"].items():
        each = [
            kernel(records, task, seed, space)["classifiers"][name]["test"][metric]
            for seed in SEEDS
        ]
        assert found["test"]["mean"] == pytest.approx(fmean(each), rel=ROUNDED)
    f0 = [kernel(records, task, seed, space)["f0"]["test"][metric] for seed in SEEDS]
    split = only(summary["splits"], task=task)
    assert split["f0"]["values"] == pytest.approx(f0, rel=ROUNDED)
    assert row["measures"]["spectrum.effective_dimension"]["mean"] == pytest.approx(
        8 + fmean(SEEDS), rel=ROUNDED
    )
    # Never known of any, so that there is no number.
    assert row["measures"]["distance.cka"] == {"mean": None, "deviation": None}


def test_equal_dev_scores_are_settled_in_a_fixed_order():
    key = Key(Cell("sst2", 4, 13), "kernel-sgd", "full")
    record = kernel_record("sst2", 4, 13, "full")
    for dev, name in (((0.5, 0.5, 0.5), "ridge"), ((0.5, 0.75, 0.75), "logistic")):
        for classifier, value in zip(record["classifiers"].values(), dev, strict=True):
            classifier["dev"] = value
        # The order of the classifiers in the record does not matter.
        record["classifiers"] = dict(reversed(record["classifiers"].items()))
        (row,) = summarised({key: record})["kernels"]
        assert row["chosen"] == [name]
        record["classifiers"] = dict(reversed(record["classifiers"].items()))


def test_fine_tuning_is_collected(records, summary):
    row = only(summary["tuned"], task="mrpc", method="bitfit")
    values = [tuned(records, "mrpc", s, "bitfit")["test"]["f1"] for s in SEEDS]
    full = [tuned(records, "mrpc", s, "full")["test"]["f1"] for s in SEEDS]
    assert row["test"]["values"] == pytest.approx(values, rel=ROUNDED)
    points = [100 * (a - b) for a, b in zip(values, full, strict=True)]
    assert row["points_to_full"]["values"] == pytest.approx(points, rel=ROUNDED)
    assert row["learning_rates"] == [1e-3, 1e-4, 1e-4]
    distances = [0.001 * seed for seed in SEEDS]
    change = row["kernel_change"]["distance"]
    assert change["mean"] == pytest.approx(fmean(distances), rel=ROUNDED)
    assert change["deviation"] == pytest.approx(stdev(distances), rel=ROUNDED)
    assert row["rates_at_end"] == [None, "lowest", "lowest"]


def test_each_space_meets_the_method_of_the_same_parameters_and_full(summary):
    pairs = [
        (row["space"], row["method"])
        for row in select(summary["comparisons"], task="sst2")
    ]
    assert pairs == [
        *(("full", "full"), ("rows:3", "rows:3"), ("rows:3", "full")),
        *(("bias", "bitfit"), ("bias", "full"), ("head", "head"), ("head", "full")),
    ]
    assert same_parameters("rows:3+columns:3") == "rows:3+columns:3"


@pytest.mark.parametrize("task", CLASSES)
def test_ratio_and_agreement_are_over_the_seeds_in_common(records, summary, task):
    row = only(summary["comparisons"], task=task, space="bias", method="bitfit")
    metric = METRICS.get(task, ("accuracy",))[0]
    ours = [best(kernel(records, task, seed, "bias")) for seed in SEEDS]
    theirs = [tuned(records, task, seed, "bitfit") for seed in SEEDS]
    both = list(zip(ours, theirs, strict=True))
    pairs = [(a["test"][metric], b["test"][metric]) for a, b in both]
    ratio = ratio_of_sums(pairs)
    assert row["ratio"]["mean"] == pytest.approx(ratio, rel=ROUNDED)
    error = jackknife(pairs, ratio_of_sums)
    assert row["ratio"]["standard_error"] == pytest.approx(error, rel=ROUNDED)
    assert row["ratio"]["reached"] == (ratio >= 0.9)
    points = [100 * (a["test"][metric] - b["test"][metric]) for a, b in both]
    assert row["points"]["values"] == pytest.approx(points, rel=ROUNDED)
    assert row["interval"]["estimate"] == pytest.approx(fmean(points), rel=ROUNDED)
    assert row["interval"]["low"] <= fmean(points) <= row["interval"]["high"]
    labels = labels_of(task)
    outputs = [(np.array(a["outputs"]), np.array(b["outputs"])) for a, b in both]
    for name, measure in (
        ("agreement", agreement),
        ("kappa", kappa),
        ("kendall", lambda a, b: margin_correlation(a, b, labels, correct_class=True)),
    ):
        values = [measure(*pair) for pair in outputs]
        assert row[name]["mean"] == pytest.approx(fmean(values), rel=ROUNDED), name
        assert row[name]["deviation"] == pytest.approx(stdev(values), rel=ROUNDED)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("task", ["trec", "mrpc", "cola"])
def test_a_metric_of_resamples_is_that_of_the_repeated_examples(task):
    metric = METRICS.get(task, ("accuracy",))[0]
    labels = labels_of(task)
    outputs = [np.array(tuned_record(task, 4, s, "full")["outputs"]) for s in SEEDS]
    terms = _terms([found.argmax(axis=1) for found in outputs], labels, metric)
    weights = _resamples(EXAMPLES)[:20]
    # A resample with one label alone, and one where nothing is predicted as it.
    alone = (labels == 0) / (labels == 0).sum()
    weights = np.concatenate([weights, [alone]])
    for shares, found in zip(weights, _SCORES[metric](weights @ terms), strict=True):
        counts = np.rint(shares * EXAMPLES).astype(int)
        if shares is weights[-1]:
            counts = (shares > 0).astype(int)
        drawn = np.repeat(np.arange(EXAMPLES), counts)
        expected = [scores(o[drawn], labels[drawn], [metric])[metric] for o in outputs]
        assert found == pytest.approx(fmean(expected), abs=1e-12)


def test_the_interval_is_the_paired_bootstrap_over_examples():
    ours, theirs = (
        kernel_record("trec", 4, 13, "full"),
        tuned_record("trec", 4, 13, "full"),
    )
    found = compare({13: ours}, {13: theirs})["interval"]
    outputs = best(ours)["outputs"], theirs["outputs"]
    twin = bootstrap_difference(*outputs, labels_of("trec"), seed=1)
    assert found["estimate"] == pytest.approx(100 * twin.estimate, abs=1e-9)
    # Of other resamples: alike within a twentieth of the width, or one example.
    near = max(5 * (twin.high - twin.low), 100 / EXAMPLES)
    assert found["low"] == pytest.approx(100 * twin.low, abs=near)
    assert found["high"] == pytest.approx(100 * twin.high, abs=near)
    assert (found["level"], found["draws"]) == (twin.level, 2000)


def test_seeds_that_predict_the_same_do_not_narrow_the_interval():
    """The same examples are resampled for all seeds: copies are no new examples."""
    one = kernel_record("sst2", 4, 13, "full")
    other = tuned_record("sst2", 4, 13, "full")
    alone = compare({13: one}, {13: other})["interval"]
    copied = compare(dict.fromkeys(SEEDS, one), dict.fromkeys(SEEDS, other))
    assert alone["low"] < alone["high"]
    assert copied["interval"] == pytest.approx(alone, abs=1e-9)
    assert copied["points"]["deviation"] == 0


def test_a_score_of_zero_has_no_ratio(records):
    changed = dict(records)
    key = Key(Cell("mrpc", 4, 13), "finetune", "full")
    changed[key] = records[key] | {"test": {"f1": 0.0, "accuracy": 0.5}}
    summary = summarised(changed)
    row = only(summary["comparisons"], task="mrpc", space="full", method="full")
    assert row["ratio"] is None
    assert row["points"]["mean"] is not None
    over = only(summary["over_tasks"]["comparisons"], space="full", method="full")
    assert over["ratio"]["tasks"] == ["sst2", "trec"]
    text = "\n".join(report_page(summary).lines)
    assert "mrpc, 4 shots: fine-tuning full has a score of 0 or less" in text


def test_one_seed_has_no_spread(records):
    one = {key: record for key, record in records.items() if key.cell.seed == 13}
    summary = summarised(one)
    row = only(summary["comparisons"], task="sst2", space="full", method="full")
    ours = best(kernel(records, "sst2", 13, "full"))["test"]["accuracy"]
    theirs = tuned(records, "sst2", 13, "full")["test"]["accuracy"]
    assert row["ratio"]["mean"] == pytest.approx(ours / theirs, rel=ROUNDED)
    assert row["ratio"]["standard_error"] is row["ratio"]["p_value"] is None
    assert row["points"]["deviation"] is None
    over = only(summary["over_tasks"]["comparisons"], space="full", method="full")
    assert over["tested"] == over["surely_reached"] == 0
    assert "significantly" not in report_page(summary).lines[0]
    # A ratio over tasks has an error whatever the number of seeds.
    recovery, table, *_ = report_tables(slices(summary)[0])
    assert "±" not in "".join(cell for row in table.rows for cell in row)
    assert "±" in recovery.rows[0][2]
    assert summary["reliability"] == []


def test_the_answers_are_means_over_tasks(records, summary):
    (answer,) = summary["answers"]
    scored, points = [], []
    for task in CLASSES:
        metric = METRICS.get(task, ("accuracy",))[0]
        full = [best(kernel(records, task, s, "full"))["test"][metric] for s in SEEDS]
        few = [best(kernel(records, task, s, "rows:3"))["test"][metric] for s in SEEDS]
        theirs = [tuned(records, task, s, "full")["test"][metric] for s in SEEDS]
        start = [kernel(records, task, s, "full")["f0"]["test"][metric] for s in SEEDS]
        scored.append([fmean(start), fmean(full), fmean(theirs)])
        points.append(fmean(100 * (a - b) for a, b in zip(few, full, strict=True)))
    total = lambda rows, i: sum(row[i] for row in rows)
    gain = lambda rows, i: total(rows, i) - total(rows, 0)
    recovery = lambda rows: gain(rows, 1) / gain(rows, 2)
    of_f0 = lambda rows: total(rows, 0) / total(rows, 2)
    ratio = lambda rows: total(rows, 1) / total(rows, 2)
    for units, function, found in (
        (scored, recovery, answer["recovery_of_full"]),
        (scored, of_f0, answer["ratio_of_f0"]),
        (scored, ratio, answer["ratio_of_full"]),
        (points, fmean, answer["points_of_few_rows"]),
    ):
        assert found["mean"] == pytest.approx(function(units), rel=ROUNDED)
        error = jackknife(units, function)
        assert found["standard_error"] == pytest.approx(error, rel=ROUNDED)
        assert found["tasks"] == list(CLASSES)
    reached = sum(row[1] / row[2] >= 0.9 for row in scored)
    first, control, second, *_ = report_page(summary).lines
    # Recovery comes first, f0 beside it.
    assert f"recovers {recovery(scored):.2f} ± " in first
    assert f"f0), which alone has {of_f0(scored):.3f} ± " in first
    assert "ratio of means over 3 tasks, standard error by the jackknife" in first
    assert f"reaches {ratio(scored):.3f} ± " in control
    assert f"at least 90 % of it on {reached} of 3" in control
    (table, *_) = report_tables(slices(summary)[0])
    assert table.rows[0][2].startswith(f"{recovery(scored):.2f} ± ")
    side = "above" if fmean(points) > 0 else "below"
    assert f"rows:3 is {abs(fmean(points)):.1f} ± " in second
    assert f"points {side} the full kernel" in second


def test_the_order_of_the_records_does_not_matter(partial):
    shuffled = list(partial.items())
    expected = collect(shuffled, COMMAND, SETTINGS)
    for seed in range(3):
        random.Random(seed).shuffle(shuffled)
        again = collect(shuffled, COMMAND, SETTINGS)
        assert json.dumps(again) == json.dumps(expected)


def test_times_are_told_nowhere(records, summary):
    later = {
        key: {n: v + 1 if "seconds" in n else v for n, v in record.items()}
        for key, record in records.items()
    }
    assert json.dumps(summarised(later)) == json.dumps(summary)
    assert "seconds" not in json.dumps(summary)


def test_outputs_are_not_in_the_summary_and_all_is_json(summary):
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    assert '"outputs"' not in text


def test_records_read_from_disk_give_the_same(records, summary, tmp_path):
    place = Study(tmp_path)
    for key, record in records.items():
        place.write(key, record)
    again = {key: place.read(key) for key in records}
    assert json.dumps(summarised(again)) == json.dumps(summary)


def test_what_is_missing_is_told(partial):
    summary = summarised(partial)
    # Five splits, for sst2 and trec at 4 shots not all that mrpc and others have.
    assert summary["records"] == {"asked": 5 * 3 * 8, "there": 5 * 3 * 8 - 4 - 12}
    rows = summary["missing"]
    assert sum(len(row["seeds"]) for row in rows) == 4 + 12
    assert only(rows, task="sst2", shots=4, kind="kernel-sgd") == {
        **{"task": "sst2", "shots": 4, "kind": "kernel-sgd", "subject": "full"},
        "seeds": [42],
    }
    assert [r["subject"] for r in select(rows, task="mrpc")] == list(METHODS)
    # Nothing of it at all, and nobody asked.
    assert not select(rows, task="trec")
    row = only(summary["kernels"], task="sst2", shots=4, space="full")
    assert row["seeds"] == [13, 21]
    head = only(summary["kernels"], task="sst2", shots=4, space="head")
    assert head["points_to_full"]["values"][2] is None
    pair = {"space": "full", "method": "full"}
    assert only(summary["comparisons"], **pair, task="sst2", shots=4)["seeds"] == [
        *(13, 21),
    ]
    over = only(summary["over_tasks"]["comparisons"], **pair, shots=4)
    assert over["ratio"]["tasks"] == ["sst2", "trec"]
    text = "\n".join(report_page(summary).lines)
    assert "16 of 120 records are missing" in text
    assert "kernel-sgd full (seeds 42; sst2 at 4 shots, sst2 at 8 shots)" in text
    assert "finetune rows:3 (seeds 13, 21, 42; mrpc at 4 shots)" in text
    table = kernel_scores(slices(summary)[0])
    column = table.columns.index("full")
    assert [row[column].endswith(" (2)") for row in table.rows] == [True, False, False]


def test_a_task_without_any_record_is_missing_if_it_was_asked_for(records):
    asked = dict(records) | dict.fromkeys(study(tasks=("qnli",)))
    summary = summarised(asked)
    assert {row["task"] for row in summary["missing"]} == {"qnli"}
    assert summary["records"]["asked"] - summary["records"]["there"] == 24


def test_a_whole_study_says_so(summary):
    assert "All 72 requested records are present." in report_page(summary).lines
    assert summary["missing"] == []


def test_means_over_tasks_are_over_those_that_all_columns_have(partial):
    few, many = slices(summarised(partial))
    # mrpc was not fine-tuned.
    assert tuned_scores(few).means[0][0] == "mean of 2"
    assert kernel_scores(few).means[0][0] == "mean of 3"
    assert kernel_scores(many).means[0][0] == "mean of 2"
    table = kernel_scores(few)
    column = table.columns.index("rows:3")
    values = [float(row[column].partition(" ")[0]) for row in table.rows]
    assert float(table.means[0][column]) == pytest.approx(fmean(values), abs=0.1)


def test_a_diverged_training_has_no_score_and_is_left_out(records):
    changed = dict(records)
    key = Key(Cell("sst2", 4, 13), "finetune", "full")
    outputs = [[None, None]] * EXAMPLES
    changed[key] = records[key] | {"test": {"accuracy": None}, "outputs": outputs}
    summary = summarised(changed)
    row = only(summary["tuned"], task="sst2", method="full")
    assert row["test"]["values"][0] is None
    rest = [tuned(records, "sst2", s, "full")["test"]["accuracy"] for s in SEEDS[1:]]
    assert row["test"]["mean"] == pytest.approx(fmean(rest), rel=ROUNDED)
    pair = only(summary["comparisons"], task="sst2", space="full", method="full")
    assert pair["ratio"]["seeds"] == 2
    assert pair["interval"]["estimate"] == pytest.approx(pair["points"]["mean"])


def test_a_regression_has_a_ratio_but_no_classes_to_agree_on():
    found = {}
    for seed in SEEDS:
        cell = Cell("stsb", 16, seed)
        labels = [0.5 * i for i in range(EXAMPLES)]
        outputs = generator_of(seed).normal(size=(EXAMPLES, 1)).tolist()
        same = {"metric": "pearson", "labels": labels, "task_labels": ["score"]}
        ours = kernel_record("stsb", 16, seed, "full") | same
        ours["f0"] = {"dev": 0.1, "test": {"pearson": 0.2}}
        for classifier in ours["classifiers"].values():
            classifier |= {"test": {"pearson": 0.4}, "outputs": outputs}
        theirs = tuned_record("stsb", 16, seed, "full") | same
        theirs |= {"test": {"pearson": 0.5}, "outputs": outputs}
        theirs |= {"dev": {"pearson": 0.3}, "grid": grid_of("pearson", 1e-3)}
        found |= {Key(cell, "kernel-sgd", "full"): ours}
        found |= {Key(cell, "finetune", "full"): theirs}
    summary = summarised(found)
    (row,) = summary["comparisons"]
    assert row["ratio"]["mean"] == pytest.approx(0.8)
    assert row["interval"] is row["agreement"]["mean"] is None
    text = "\n".join(report_page(summary).lines)
    assert "pearson for stsb" in text
    assert "predict the same class" not in text
    Page(html(report_page(summary), {}))


def test_records_of_other_test_examples_are_refused(records):
    changed = dict(records)
    key = Key(Cell("trec", 4, 42), "finetune", "head")
    changed[key] = records[key] | {"labels": records[key]["labels"][::-1]}
    with pytest.raises(StorageError, match="different test examples of task 'trec'"):
        summarised(changed)


def test_kinds_of_kernel_are_kept_apart():
    kinds = ("asymmetric_signgd", "sgd")
    summary = summarised(study(tasks=("sst2", "trec"), kinds=kinds, methods=("full",)))
    assert summary["kinds"] == ["sgd", "asymmetric_signgd"]
    sgd, asymmetric = slices(summary)
    assert sgd.title == "4 shots, sgd"
    assert [r["kind"] for r in summary["answers"]] == summary["kinds"]
    row = only(asymmetric.kernels, task="sst2", space="full")
    assert set(row["chosen"]) == {"asymmetric"}
    assert row["shuffled"]["mean"] is row["measures"]["alignment"]["mean"] is None
    names = [table.name for table in report_tables(asymmetric)]
    assert "kernels" in names
    assert "measures" not in names
    assert "distances" not in names
    assert len(names) == len(set(names))
    assert {"scores-4-sgd", "scores-4-asymmetric_signgd", "change-4"} <= set(
        draw_figures(summary)
    )


def test_the_order_of_spaces():
    shown = (
        *("full", "rows:1", "rows:3", "rows:16", "columns:1", "rows:3+columns:3"),
        *("lora:8", "dora:8", "bias", "bitfit", "head", "probe", "zebra"),
    )
    assert tuple(sorted(set(shown), key=order_of_subject)) == shown


def printed(summary):
    console = Console(width=110, file=io.StringIO(), color_system=None)
    for table in tables(summary):
        console.print(table)
    return console.file.getvalue()


def test_the_terminal_shows_all_scores(summary):
    text = printed(summary)
    for table in (kernel_scores(slices(summary)[0]), tuned_scores(slices(summary)[0])):
        for row in [*table.rows, *table.means]:
            for cell in row:
                assert cell.replace(" ± ", "±") in text
    assert text.count("ratio") == len(METHODS)
    assert "4 shots" in text


def test_wide_tables_are_parted_to_fit_a_terminal():
    spaces = [f"rows:3@query,value/strategy=random/seed={i}" for i in range(9)]
    found = {}
    for space in spaces:
        for seed in SEEDS:
            cell = Cell("a_task_with_a_long_name", 4, seed)
            record = kernel_record(cell.task, 4, seed, "rows:3")
            found[Key(cell, "kernel-sgd", space)] = record
            tuned = tuned_record(cell.task, 4, seed, space)
            found[Key(cell, "finetune", space)] = tuned
    summary = summarised(found)
    text = printed(summary)
    assert max(map(len, text.splitlines())) <= 110
    assert "…" not in text
    assert len(tables(summary)) > 2
    assert sum(line.count("/seed=8") for line in text.splitlines()) == 4
    # A ratio stands beside what it is of.
    for table in tables(summary):
        headings = [str(column.header) for column in table.columns]
        assert headings[1] != "ratio"


def test_markdown_holds_every_table(summary):
    text = markdown(report_page(summary))
    for part in slices(summary):
        for table in report_tables(part):
            assert f"### {table.title}" in text.replace("\\", "")
            width = len(table.columns) + 1
            for row in [*table.rows, *table.means]:
                (line,) = {
                    line
                    for line in text.splitlines()
                    if line.replace("\\", "") == f"| {' | '.join(row)} |"
                }
                assert line.count("|") == width
    assert COMMAND in text.replace("\\", "")


def test_every_table_has_numbers_and_a_unique_name(summary):
    (part,) = slices(summary)
    found = report_tables(part)
    assert [table.name for table in found if not table.folded] == [
        *("recovery", "kernels", "tuned", "ratios", "rule", "reliability"),
        *(
            "kernels-to-full",
            "tuned-to-full",
            "controls",
            "measures",
            "growth-4-8",
            "change",
            "classifiers",
        ),
    ]
    assert [table.name for table in found if table.folded] == [
        *("distances", "change-by-task", "agreement-full", "agreement-rows-3"),
        *("agreement-bias", "agreement-head", "rates"),
    ]
    for table in found:
        for row in [*table.rows, *table.means]:
            assert len(row) == len(table.columns), table.name
        assert any(any(map(str.isdigit, cell)) for cell in table.rows[0][1:]), (
            table.name
        )


def test_tables_hold_the_numbers_of_the_summary(summary):
    by_name = {table.name: table for table in report_tables(slices(summary)[0])}

    def cell(table, label, title):
        (row,) = [r for r in by_name[table].rows if r[0] == label]
        return row[by_name[table].columns.index(title)]

    row = only(summary["comparisons"], task="trec", space="rows:3", method="rows:3")
    assert (
        cell("tuned", "trec", f"{KERNEL_OVER}rows:3") == f"{row['ratio']['mean']:.2f}"
    )
    low, high = row["interval"]["low"], row["interval"]["high"]
    expected = f"{low:+.1f} to {high:+.1f}"
    assert cell("agreement-rows-3", "trec", "95 % interval") == expected
    assert cell("agreement-rows-3", "trec", "agree %") == (
        f"{100 * row['agreement']['mean']:.1f}"
    )
    over = only(summary["over_tasks"]["comparisons"], space="bias", method="bitfit")
    assert cell("rule", "bias / bitfit", "reach 90 %") == f"{over['reached']} of 3"
    assert cell("controls", "sst2", "shuffled labels") == "50.0 ± 0.0"
    distance = fmean(0.1 + 0.01 * seed / 100 for seed in SEEDS)
    assert cell("measures", "rows:3", "diff %") == f"{100 * distance:.1f}"
    assert cell("measures", "rows:3", "CKA") == "–"
    assert cell("growth-4-8", "rows:3", "n = 4") == f"{25 * distance:.1f}"
    assert cell("change", "full", "S").startswith(f"{0.001 * fmean(SEEDS):.3g}")
    # The lowest of three, so that it is marked; the middle one is not.
    assert cell("rates", "head", "0.0001") == "6†"
    assert cell("rates", "head", "0.001") == "3"
    used = sum(
        row["classifiers"][name]["offset_scale"][i] > 0
        for row in select(summary["kernels"], space="full")
        for i, name in enumerate(row["chosen"])
    )
    assert cell("classifiers", "full", "from f0") == str(used)
    assert cell("classifiers", "full", "splits") == "9"


@pytest.mark.parametrize("whole", [True, False])
def test_write_study(summary, partial, tmp_path, whole):
    summary = summary if whole else summarised(partial)
    folder = tmp_path / "new" / "study"
    files = written(summary, folder)
    kinds = ("scatter", "scores", "ratio", "growth", "change")
    names = {f"{kind}-{shots}" for kind in kinds for shots in summary["shots"]}
    assert set(files) == {"json", "markdown", "html"} | {
        f"{name}.{end}" for name in names for end in ("svg", "png")
    }
    assert {p for p in folder.rglob("*") if p.is_file()} == set(files.values())
    assert json.loads(files["json"].read_text()) == summary
    if whole:
        first = {name: path.read_bytes() for name, path in files.items()}
        written(json.loads(files["json"].read_text()), folder)
        assert first == {name: path.read_bytes() for name, path in files.items()}
    page = Page(files["html"].read_text())
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids
    assert "script" not in page.tags
    assert "svg" in page.tags
    words = page.words.replace("\u00a0", " ")
    for line in report_page(summary).lines:
        assert line in words
    for part in slices(summary):
        for table in report_tables(part):
            assert f"{table.name}-{part.name}" in page.ids
            assert table.caption in words


def test_a_page_escapes_every_text(records):
    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return f"{value}<script>" if isinstance(value, str) else value

    poisoned = {}
    for key, record in records.items():
        cell = Cell(key.cell.task + "<script>", key.cell.shots, key.cell.seed)
        texts = {
            name: poison(record[name]) for name in ("model", "task_labels", "notes")
        }
        poisoned[Key(cell, key.kind, key.subject)] = record | texts
    summary = collect(list(poisoned.items()), "<script>", {"<script>": ["<script>"]})
    page = Page(html(report_page(summary), {}))
    assert "script" not in page.tags
    assert "<script>" in page.words
    assert "<script" not in markdown(report_page(summary))


def test_no_records_at_all(tmp_path):
    summary = collect([], COMMAND, SETTINGS)
    assert report_page(summary).lines == ["There are no records yet."]
    assert tables(summary) == []
    files = written(summary, tmp_path)
    assert set(files) == {"json", "markdown", "html"}
    Page(files["html"].read_text())


def test_only_kernels_or_only_fine_tuning(records):
    for tuning in (True, False):
        some = {k: r for k, r in records.items() if (k.kind == "finetune") == tuning}
        summary = summarised(some)
        assert summary["comparisons"] == []
        assert len(tables(summary)) == 1
        shown = {"scores-4", "change-4"} if tuning else {"scores-4", "growth-4"}
        assert set(draw_figures(summary)) == shown
        Page(html(report_page(summary), {}))


def test_fourteen_tasks_are_drawn_in_two_columns():
    tasks = [f"task {i:02d}" for i in range(14)]
    summary = summarised(study(tasks=tasks))
    figures = draw_figures(summary)
    assert len(figures["scores-4"].axes) == len(figures["ratio-4"].axes) == 2
    named = [
        text.get_text()
        for ax in figures["scores-4"].axes
        for text in ax.get_yticklabels()
    ]
    assert named == tasks
    # Names beside the points do not lie upon each other.
    figure = figures["scatter-4"]
    to_png(figure)
    (ax,) = figure.axes
    # An annotation's own extent has its line in it.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_figures_show_the_scores(summary):
    ax = draw_figures(summary)["scatter-4"].axes[0]
    shown = np.concatenate([c.get_offsets() for c in ax.collections])
    rows = select(summary["comparisons"], same_parameters=True)
    expected = {(100 * row["tuned"], 100 * row["kernel"]) for row in rows}
    assert {tuple(point) for point in shown.tolist()} == expected


def test_a_space_looks_alike_in_all_figures():
    looks = styles(["full", "rows:1", "rows:3", "bias", "rows:3", "bitfit", "odd"])
    assert looks["bias"] == looks["bitfit"]
    assert looks["rows:1"].colour == looks["rows:3"].colour
    assert looks["rows:1"].marker != looks["rows:3"].marker
    assert len({style.colour for style in looks.values()}) == 4


def test_scores_are_drawn_in_their_rows():
    figure = draw_figures(collect([], "", {}))
    assert figure == {}
    ax = Figure().subplots()
    kernels = {"bias": {"sst2": Point(80.0, 2.0), "trec": Point(50.0)}}
    tuned = {"bitfit": {"trec": Point(60.0, 1.0)}}
    looks = styles(["bias", "bitfit"])
    assert plot_scores(kernels, tuned, {"sst2": Point(55.0)}, ax, looks) is ax
    filled, open_ = ax.containers
    assert list(filled.lines[0].get_xdata()) == [80, 50]
    assert list(filled.lines[0].get_ydata()) == [0, 1]
    assert list(open_.lines[0].get_xdata()) == [60]
    assert list(open_.lines[0].get_ydata()) == [1]
    assert open_.lines[0].get_markerfacecolor() == "white"
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["sst2", "trec"]


@pytest.mark.parametrize(("least", "scale"), [(0.001, "log"), (0.0, "linear")])
def test_kernel_change_is_drawn_on_a_scale_that_it_fits(least, scale):
    ax = Figure().subplots()
    changes = {"full": {"sst2": Point(least), "trec": Point(0.1), "mr": Point(0.01)}}
    plot_change(changes, ax, styles(changes))
    assert ax.get_xscale() == scale
    middle = ax.lines[0].get_xdata()
    assert middle[0] == 0.01


def test_rates_at_an_end_are_marked_wherever_they_were_chosen(records):
    """Old records say it by their grid; a repeated one by that of the first seed."""
    changed = dict(records)
    for seed in SEEDS:
        key = Key(Cell("sst2", 4, seed), "finetune", "full")
        record = changed[key] | {"learning_rate": 1e-4}
        alone = {"0.0001": record["dev"]}
        record["grid"] = grid_of("accuracy", 1e-4) if seed == 13 else alone
        changed[key] = record
    row = only(summarised(changed)["tuned"], task="sst2", method="full")
    assert row["rates_at_end"] == ["lowest"] * 3
    # A tie with a rate inside is not an end.
    key = Key(Cell("sst2", 4, 13), "finetune", "full")
    tied = changed[key]["grid"] | {"0.001": {"accuracy": 0.75}}
    changed[key] = changed[key] | {"grid": tied}
    row = only(summarised(changed)["tuned"], task="sst2", method="full")
    assert row["rates_at_end"] == [None] * 3
    # A record that says it is believed.
    changed[key] = changed[key] | {"rate_at_end": "highest"}
    row = only(summarised(changed)["tuned"], task="sst2", method="full")
    assert row["rates_at_end"][0] == "highest"


def test_a_study_whose_rates_are_inside_has_no_dagger(records, summary):
    inside = {
        key: record | ({"rate_at_end": None} if key.kind == "finetune" else {})
        for key, record in records.items()
    }
    for marked, of in ((True, summary), (False, summarised(inside))):
        text = markdown(report_page(of))
        assert ("†" in text) == marked
        assert ("a better one may lie beyond" in text) == marked
