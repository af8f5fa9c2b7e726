import io
import json
import math
import re
import statistics

import pytest
from pages import Page
from rich.console import Console

from ntk.reporting.page import to_json
from ntk.scale.storage import StorageError
from ntk.studies.comparison.findings import question, summary_lines
from ntk.studies.comparison.report import html, markdown, rows, table, write_report
from rocoft.commands import show_json, show_tables

NAN = float("nan")
NORMS = ("entrywise1", "frobenius", "spectral", "nuclear")
SCRIPT = "<script>alert('x')</script> | *a* & b"


def distances(difference):
    return {
        **dict.fromkeys(NORMS, 0.9),
        **{f"{norm}_rescaled": difference + i / 100 for i, norm in enumerate(NORMS)},
        "frobenius_rescaled": difference,
        "best_scale": 2.5,
        "cosine": math.sqrt(1 - difference**2),
        "cka": 0.98 - difference,
        "trace_ratio": 0.4,
        "overlap": NAN,
    }


def space(name, label, role, parameters, difference, accuracy, **others):
    eigenvalues = [100 * (i + 1) ** (-1.2 - difference) for i in range(40)]
    return {
        "name": name,
        "label": label,
        "role": role,
        "parameters": parameters,
        "share": parameters / 124_645_632,
        "distance": distances(difference),
        "body_distance": distances(min(1.0, 2.5 * difference)),
        "spectrum": {
            "trace": sum(eigenvalues),
            "largest_eigenvalue": eigenvalues[0],
            "entropy_rank": 21.25 - 10 * difference,
            "numerical_rank": 40,
            "decay_exponent": NAN,
        },
        "eigenvalues": eigenvalues,
        "cumulative_power": [1 - (1 - difference) / (i + 1) for i in range(40)],
        "alignment": {"value": 0.31, "null_mean": 0.02, "null_std": 0.01},
        "classifiers": {
            "ridge": {
                "accuracy": accuracy,
                "regularisation": 0.1,
                "selection": 0.7,
                "correct": [[int(i < 200 * accuracy) for i in range(200)]],
            },
            "logistic": {"accuracy": NAN, "regularisation": None, "selection": NAN},
            "svm": None,
        },
        "certificate": {"entries": 5, "relative_error": 1e-7 * (1 + difference)},
        "trace_by_layer": {
            "embeddings": 5.0,
            **{f"layer {i}": 1.0 + i for i in range(6)},
            "head": 20.0,
            "other": 0.0,
        },
        "a later field": {"of": "no concern"},
        **others,
    }


@pytest.fixture
def record():
    cosines = [[1 - abs(i - j) / 20 for j in range(12)] for i in range(12)]
    cosines[3][4] = NAN
    return {
        "version": "0.1.0",
        "command": "python -m ntk.compare --rows 3",
        "created": "2026-11-22T02:50:00+00:00",
        "versions": {"torch": "2.13.0"},
        "model": {
            "name": "roberta-base",
            "parameters": 124_645_632,
            "readout": "head",
            "new_head": True,
            "notes": [SCRIPT],
            "dtype": "float32",
        },
        "task": {
            "name": "sst2",
            "labels": ["bad <b>", "good $x"],
            "source": "hub",
            "seed": 2026,
            "shots": 16,
            "train": 12,
            "test": 200,
            "outputs": 2,
        },
        "kernel": {
            "kind": "sgd",
            "implementation": "factors",
            "services": {
                "batch": 198,
                "single": [],
                "definition": [f"odd.{i}" for i in range(7)],
                "unused": ["pooler.weight"],
            },
        },
        "f0": {"accuracy": 0.545},
        "spaces": [
            space("head", "head only", "control", 1_538, 0.61, 0.64),
            space("rows:3+head", "rows 3", "requested", 413_186, 0.123, 0.71),
            space("full", "full", "reference", 124_645_632, 0.0, 0.705),
            space("lora:8+head", "lora 8", "requested", 589_826, 0.05, 0.45),
            {
                "name": "bias",
                "label": "bias only",
                "role": "control",
                "parameters": 102_914,
                "share": NAN,
                "distance": None,
                "body_distance": None,
                "spectrum": None,
                "eigenvalues": [],
                "cumulative_power": [],
                "alignment": None,
                "classifiers": {"ridge": {"accuracy": None}},
                "certificate": None,
                "trace_by_layer": None,
            },
        ],
        "random": [
            {
                "axis": "rows",
                "count": 3,
                "seeds": 5,
                "frobenius_rescaled": {"mean": 0.14, "std": 0.012},
                "cosine": {"mean": 0.98, "std": NAN},
                "ridge": {"mean": 0.69, "std": 0.021},
            }
        ],
        "shuffled": {"ridge": {"mean": 0.502, "std": 0.03, "draws": 5}},
        "heatmap": {"labels": [0] * 6 + [1] * 6, "kernels": {"rows:3+head": cosines}},
        "timing": {"load": 1.5, "kernels": 61.25, "measures": NAN},
    }


def printed(record, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table(record))
    return console.file.getvalue()


def test_rows_hold_the_numbers_of_the_record(record):
    titles, body = rows(record)
    assert titles[:4] == ["parameters", "%", "diff %", "body %"]
    # Nothing was computed for them.
    assert not {"logistic %", "svm %"} & set(titles)
    cells = {row.label: {t: row.cell(t)[0] for t in titles} for row in body}
    assert cells["rows 3"] == {
        "parameters": "413,186",
        "%": "0.331",
        "diff %": "12.3",
        "body %": "30.8",
        "cosine": f"{math.sqrt(1 - 0.123**2):.3f}",
        "CKA": "0.857",
        "rank": "20.0",
        "align.": "0.310",
        "ridge %": "71.0",
    }
    assert set(cells["bias only"].values()) == {"102,914", "–"}
    random = next(row for row in body if row.label == "3 random rows (5 seeds)")
    assert random.cell("diff %") == ("14.0", "1.2")
    assert random.cell("cosine") == ("0.980", "")
    assert cells["model's own outputs"]["ridge %"] == "54.5"
    assert cells["shuffled labels (5 draws)"]["ridge %"] == "50.2"


def test_rows_are_in_sections_reference_first(record):
    sections = [row.section for row in rows(record)[1]]
    assert sections == ["reference", "requested", "requested", *["control"] * 5]


def test_a_column_without_any_number_is_hidden(record):
    for one in record["spaces"]:
        one["body_distance"] = None
    assert "body %" not in rows(record)[0]
    assert "body" not in printed(record)


def test_the_table_fits_a_hundred_columns(record):
    # The largest model and the longest label; all columns filled.
    for one in record["spaces"]:
        for kind in ("logistic", "svm"):
            one["classifiers"][kind] = {"accuracy": 1.0}
        one["parameters"] = 7_241_732_096
    record["spaces"][1]["label"] = "rows 3 of query, value in layers 0 to 11 [bold]"
    lines = printed(record).splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "…" not in text
    assert text.count("7,241,732,096") == 5
    assert text.count("100.0") >= 10
    assert "[bold]" in re.sub(r"\s+", "", "".join(line[:24] for line in lines))


def test_the_sentence_of_a_requested_space(record):
    # 142 and 141 examples are right: the classifiers differ on one of 200.
    differences = [1] + [0] * 199
    error = 100 * statistics.stdev(differences) / math.sqrt(200)
    assert summary_lines(record)[0] == (
        "The kernel over 3 rows (0.33 % of the parameters) differs from the full "
        "kernel by 12 % (Frobenius, best scale; 31 % without the head's block) and "
        "its ridge classifier is 0.5 points above it (71.0 % against 70.5 %; paired "
        f"standard error {error:.1f}, one split, 200 test examples: within two "
        "standard errors)."
    )


def test_a_difference_beyond_noise_is_called_that(record):
    line = summary_lines(record)[1]
    assert "LoRA of rank 8" in line
    differences = [1] * 51 + [0] * 149
    error = 100 * statistics.stdev(differences) / math.sqrt(200)
    assert "25.5 points below it" in line
    assert f"paired standard error {error:.1f}, one split" in line
    assert "beyond two standard errors" in line


def test_equal_accuracies_are_said_to_be_equal(record):
    record["spaces"][1]["classifiers"]["ridge"]["accuracy"] = 0.705
    assert "is as accurate (70.5 % against 70.5 %" in summary_lines(record)[0]


def test_the_other_sentences(record):
    text = "\n".join(summary_lines(record))
    assert "ridge reaches 64.0 % over the head" in text
    assert "69.0 ± 2.1 % over 3 random rows (5 seeds)" in text
    assert "50.2 ± 3.0 % with shuffled labels" in text
    assert "own outputs, before any training, reach 54.5 %" in text
    assert "198 parameter tensors" in text
    assert "odd.4 and 2 more" in text
    assert "pooler.weight" in text
    assert "20 random entries" in text
    assert "1.6e-07 (the worst: head only)" in text
    assert SCRIPT in text


def test_a_certificate_that_failed_is_not_hidden(record):
    record["spaces"][1]["certificate"]["relative_error"] = NAN
    assert "Recomputing entries gave no number for rows 3." in summary_lines(record)
    for one in record["spaces"]:
        one["certificate"] = None
    assert any("exactness was not checked" in line for line in summary_lines(record))


def test_an_estimated_kernel_is_called_that(record):
    assert not any("estimate" in line for line in summary_lines(record))
    record["kernel"]["estimate"] = {"entries": 4096, "relative_error": 0.0123}
    (line,) = (line for line in summary_lines(record) if "estimate" in line)
    assert "4,096 numbers" in line
    assert "about 1.2 %" in line


def test_the_question(record):
    assert question(record) == (
        "Are the kernels over 3 rows and LoRA of rank 8 close to the full kernel, and "
        "do they classify as well?"
    )


def test_an_asymmetric_kernel_has_no_distances(record):
    for one in record["spaces"]:
        one |= {"distance": None, "body_distance": None, "spectrum": None}
    assert "no distance to the full kernel" in summary_lines(record)[0]
    titles, _ = rows({**record, "random": []})
    assert not {"diff %", "cosine", "rank"} & set(titles)


def test_markdown_escapes_and_keeps_the_table(record):
    text = markdown(record)
    assert "<script" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert any("rows 3" in line and "| 413,186 |" in line for line in lines)
    assert "14.0 ± 1.2" in text
    assert "seed 2026" in text


def test_json_is_the_record(record):
    text = to_json(record)
    expected = json.dumps(record).replace("NaN", "null")
    assert json.dumps(json.loads(text)) == expected
    assert '"labels": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]' in text


def test_write_report(record, tmp_path):
    folder = tmp_path / "new" / "report"
    files = write_report(record, folder)
    names = {"spectra", "power", "heatmaps", "layers", "accuracy"}
    assert set(files) == {"json", "markdown", "html"} | {
        f"{name}.{kind}" for name in names for kind in ("svg", "png")
    }
    # Nothing else is left, no temporary file.
    assert {p for p in folder.rglob("*") if p.is_file()} == set(files.values())
    for name in names:
        assert files[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in files[f"{name}.svg"].read_text()
    first = {name: path.read_bytes() for name, path in files.items()}
    write_report(record, folder)
    assert first == {name: path.read_bytes() for name, path in files.items()}


def test_the_page_is_whole_and_needs_nothing_else(record, tmp_path):
    text = write_report(record, tmp_path)["html"].read_text()
    page = Page(text)
    assert "svg" in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.removeprefix("#") in page.ids
    assert "script" not in page.tags
    assert "<script" not in text
    assert "bad <b>" in page.words
    assert "<?xml" not in text
    assert text.lower().count("<!doctype") == 1
    assert not re.search(r"(?:\W)(?:nan|None|inf)(?:\W)", page.words)
    for line in (question(record), *summary_lines(record)):
        assert line in page.words.replace("\u00a0", " ")
    assert "413,186" in page.words


def test_a_page_escapes_every_text(record):
    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return f"{value}<script>" if isinstance(value, str) else value

    poisoned = poison(record)
    for one, clean in zip(poisoned["spaces"], record["spaces"], strict=True):
        one["role"] = clean["role"]
        one["trace_by_layer"] = {"<script>": 1.0}
    assert "script" not in Page(html(poisoned, {})).tags


HOSTILE = "[/x] [red] :x: $\\frac$ \x1b[2J\x9b31m\u202e\r\n- | <script> --> ![](x) `"


def test_names_that_are_obeyed_nowhere(record, tmp_path, capsys):
    for place in (record["model"], record["task"]):
        place["name"] = HOSTILE
    record["task"]["labels"] = [HOSTILE, "_hidden"]
    for one in record["spaces"]:
        one["name"] = one["label"] = f"{HOSTILE}{one['label']}"
    files = write_report(record, tmp_path)
    show_tables([table(record)], summary_lines(record))
    show_json(to_json(record))
    texts = [file.read_text() for k, file in files.items() if not k.endswith("png")]
    for text in (capsys.readouterr().out, *texts):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert "[/x]" in text.replace("\\", "")
    page = Page(files["html"].read_text())
    assert "script" not in page.tags
    assert "[/x] [red] :x:" in page.words
    assert r"\x1b[2J\x9b31m\u202e" in page.words


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"spaces": []},
        {"spaces": [{"name": "full"}], "model": None, "f0": None, "shuffled": None},
        {"spaces": [{"name": "rows:3", "role": "requested"}], "random": [{}]},
    ],
)
def test_a_record_that_lacks_almost_all(record, tmp_path):
    files = write_report(record, tmp_path)
    Page(files["html"].read_text())
    printed(record)


def test_a_folder_that_cannot_be_made(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--output"):
        write_report(record, tmp_path / "file")
