"""The command: its files, its options, its exit codes, and what it leaves behind."""

import contextlib
import io
import json
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import checkpoint
from commands import exit_code

from ntk import compare
from ntk.kernels.empirical import empirical_ntk
from ntk.reporting.page import to_json
from ntk.scale.storage import load_kernels
from ntk.spaces.kinds import Bias, Columns, Embeddings, LoRA, Norm, Rows
from ntk.spaces.notation import parse_space
from ntk.studies.comparison import record as evaluation
from ntk.studies.comparison import report
from ntk.studies.comparison import run as running
from ntk.studies.comparison.run import requested_spaces
from ntk.studies.comparison.subject import Comparison
from rocoft.commands.options import OptionError
from rocoft.data.splits import few_shot
from rocoft.data.tasks import load_task
from rocoft.models import pretrained
from rocoft.models.backbone import load_backbone

TINY = ["--shots", "4", "--test-size", "8", "--rows", "1", "--layers", "0"]


run = partial(exit_code, compare.main)


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """One real run: its folder, its output and the evaluation behind it."""
    output = tmp_path_factory.mktemp("compare") / "new" / "runs"
    kept = []
    evaluate = evaluation.evaluate

    def keeping(*args, **options):
        kept.append(evaluate(*args, **options))
        return kept[-1]

    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        patch.setattr(evaluation, "evaluate", keeping)
        code = run(*TINY, "--output", output, "--name", "first")
    assert code == 0
    folder = output / "first"
    record = json.loads((folder / "report.json").read_text())
    return SimpleNamespace(
        folder=folder, printed=printed.getvalue(), record=record, evaluation=kept[0]
    )


@pytest.fixture
def again(monkeypatch, result):
    """Runs that take the evaluation from the first; what they asked for is kept."""
    asked = SimpleNamespace()

    def compared(backbone, split, spaces, **options):
        asked.split, asked.spaces, asked.options = split, spaces, options
        return SimpleNamespace(work=None, backbone=backbone)

    def write(record, folder):
        # Figures take long; the first run has them.
        (folder / "report.json").write_text(to_json(record))

    monkeypatch.setattr(Comparison, "of", compared)
    monkeypatch.setattr(running, "kernels", lambda work, resources, **options: None)
    monkeypatch.setattr(evaluation, "fold_kernels", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: result.evaluation)
    monkeypatch.setattr(report, "write_report", write)
    return asked


# One run.


def test_files(result):
    names = {p.name for p in result.folder.iterdir()}
    expected = ["figures", "kernels.safetensors", ".written-by.json"]
    assert names == {*expected, "report.html", "report.json", "report.md"}
    assert {p.name for p in result.folder.parent.iterdir()} == {"first", ".cache"}
    kept = list((result.folder.parent / ".cache").glob("*.safetensors"))
    assert len(kept) == 3  # of the fitted head, and of those fitted without a fold
    assert result.record["kernel"]["kept"] == {"found": 0, "problem": ""}
    assert max(file.stat().st_size for file in kept) < 10**6
    assert list((result.folder / "figures").glob("*.svg"))
    assert list((result.folder / "figures").glob("*.png"))
    assert "rows:1/layers=0" in (result.folder / "report.md").read_text()
    assert "<svg" in (result.folder / "report.html").read_text()


def test_files_can_be_read_by_whom_the_system_lets(result):
    files = [f for f in result.folder.rglob("*") if f.is_file()]
    assert {f.name for f in files if not f.stat().st_mode & 0o044} == set()


def test_record_has_an_entry_for_each_space(result):
    record = result.record
    labels = [entry["label"] for entry in record["spaces"]]
    assert labels == ["full", "rows:1/layers=0", "head", "bias"]
    for entry in record["spaces"]:
        assert entry["certificate"]["relative_error"] <= 1e-4, entry["label"]
        assert entry["certificate"]["entries"] >= 2
    assert (record["task"]["train"], record["task"]["test"]) == (8, 8)
    assert record["model"]["name"].startswith("MiniLM-L6")
    command = f"python -m ntk.compare {' '.join(TINY)}"
    assert record["command"].startswith(command)
    assert set(record["timing"]) >= {"load", "kernels", "certificate", "classifiers"}


def test_kernels_are_those_of_the_library(result):
    kernels, header = load_kernels(result.folder / "kernels.safetensors")
    assert list(header["spaces"]) == [e["label"] for e in result.record["spaces"]]
    assert header["command"] == result.record["command"]
    split = few_shot(load_task("reviews"), 4, 8, 0)
    model = load_backbone(None, split)
    examples = (*split.train, *split.test)
    batches = [model.encode([example], 1)[0][0] for example in examples]
    spaces = {k: parse_space(v) for k, v in header["spaces"].items() if k != "full"}
    # The training examples on the right are the first, the left ones are all of them.
    expected = empirical_ntk(
        model.module, batches, batches[:8], space=spaces, reduce="contrast"
    )
    for name, kernel in kernels.items():
        assert kernel.shape == (16, 8, 1, 1)
        assert kernel.dtype == torch.float64
        if name != "full":
            error = (kernel - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, name


def test_printed(result):
    assert "model: embedded MiniLM-L6" in result.printed
    assert "task: reviews" in result.printed
    assert "rows:1/layers=0" in result.printed
    assert f"report: {result.folder / 'report.html'}" in result.printed


# Options.


def test_record_is_json_for_any_reader(result):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (result.folder / "report.json").read_text()
    json.loads(text, parse_constant=refuse)


def test_json_alone_is_printed(again, result, tmp_path, capsys):
    assert run(*TINY, "--json", "--output", tmp_path) == 0
    printed = capsys.readouterr()
    (folder,) = tmp_path.iterdir()
    assert printed.out.strip() == (folder / "report.json").read_text().strip()
    assert json.loads(printed.out)["task"] == result.record["task"]
    assert printed.err == ""


def test_quiet(again, tmp_path, capsys):
    assert run(*TINY, "--quiet", "--output", tmp_path) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    (folder,) = tmp_path.iterdir()
    assert folder.match("minilm-reviews-[0-9]*-[0-9]*")


def test_an_earlier_result_is_replaced_if_asked(again, tmp_path, capsys):
    options = (*TINY, "--quiet", "--output", tmp_path, "--name", "same")
    assert run(*options) == 0
    first = (tmp_path / "same").stat().st_ino
    assert run(*options) == 2
    assert "holds an earlier result" in capsys.readouterr().err
    (tmp_path / "same" / "notes.txt").write_text("mine")
    assert run(*options, "--overwrite") == 2
    assert "holds 'notes.txt', which ntk.compare did not" in capsys.readouterr().err
    assert (tmp_path / "same" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "same").stat().st_ino == first
    (tmp_path / "same" / "notes.txt").unlink()
    assert run(*options, "--overwrite") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["same"]
    assert (tmp_path / "same").stat().st_ino != first


def test_flags_win_over_the_configuration(again, tmp_path, capsys):
    config = {"shots": 3, "test-size": 5, "seed": 2, "rows": [2, 3], "head": False}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**config, "quiet": True, "strategy": "max"}))
    output = tmp_path / "runs"
    assert run("--config", file, "--seed", 1, "--rows", 1, "--output", output) == 0
    assert tuple(capsys.readouterr()) == ("", "")
    task = load_task("reviews")
    assert again.split.train == few_shot(task, 3, 5, 1).train
    assert len(again.split.test) == 5
    assert again.spaces == [Rows(1, strategy="max", seed=1)]
    assert again.options["with_head"] is False


def test_own_data(again, tmp_path):
    file = tmp_path / "mine.csv"
    lines = [f"text {i},{'yes' if i % 2 else 'no'}" for i in range(20)]
    file.write_text("\n".join(["text,label", *lines]))
    options = ("--data", file, "--shots", 2, "--quiet", "--output", tmp_path / "runs")
    assert run(*options) == 0
    assert again.split.task.labels == ("no", "yes")
    assert len(again.split.test) == 16
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("minilm-mine-")


@pytest.mark.parametrize(
    ("arguments", "spaces"),
    [
        ("", [Rows(1), Rows(3), Columns(1), Columns(3)]),
        ("--rows 0", [Rows(0)]),
        ("--bias --norm --embeddings", [Norm(), Embeddings(), Bias()]),
        ("--lora 8 --seed 3 --rescale", [LoRA(8, seed=3, rescale=True)]),
        ("--space rows:3@key+bias full", None),
        (
            "--columns 2 --modules query value --layers 0 -1",
            [Columns(2).at("query", "value").layers(0, -1)],
        ),
        (
            "--rows 2 --strategy random --seed 4",
            [Rows(2, strategy="random", seed=4)],
        ),
    ],
)
def test_requested_spaces(arguments, spaces):
    found = requested_spaces(compare.main.parse(arguments.split()))
    if spaces is None:
        spaces = [parse_space("rows:3@key+bias"), parse_space("full")]
    assert found == spaces


def test_help_names_the_choices(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for choice in ("gradient", "asymmetric_signgd", "jvp", "rows:3@query"):
        assert choice in shown


@pytest.mark.parametrize(
    "arguments",
    ["--row 1", "--quie", "--rows one", "--shots 0", "--kind adam", "--nonsense", "x"],
)
def test_parser_refuses(arguments, capsys):
    assert run(*arguments.split()) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shotz: 3", "'shotz' is no option"),
        ("config: other.yaml", "'config' is no option"),
        ("help: true", "'help' is no option"),
        ("- shots", "must map options to values"),
        ("shots: [", "cannot be read"),
        (b"name: caf\xe9", "cannot be read"),
    ],
)
def test_refused_configurations(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match=message):
        compare.main.parse(["--config", str(file)])


def test_missing_configuration():
    with pytest.raises(OptionError, match="No such file"):
        compare.main.parse(["--config", "absent.yaml"])


# Failures.


def fails(capsys, output, *arguments):
    """Run, check that it fails as bad input does and leaves nothing; return why."""
    existed = output.exists()
    before = sorted(output.rglob("*")) if existed else None
    assert run("--shots", 2, "--test-size", 2, "--output", output, *arguments) == 2
    assert output.exists() == existed
    assert (sorted(output.rglob("*")) if existed else None) == before
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model no/such-model", "'no/such-model' could not be loaded"),
        ("--task nope", "task 'nope' is unknown"),
        ("--rows 0", "rows=0 cannot be selected"),
        ("--rows 385 --modules query", "Choose a number from 1 to 384"),
        ("--columns -1", "columns=-1 cannot be selected"),
        ("--rows 1 --modules nothing_here", "nothing_here"),
        ("--rows 1 --layers 6", "are not all among the model's 6 blocks, 0 to 5"),
        ("--space rowz:3", "'rowz' is none of full, rows"),
        ("--space lora", "give a rank"),
        ("--shots 5000", "fewer than shots=5000"),
        ("--data absent.csv", "does not exist"),
        ("--data-dir absent", "is not in data_dir='absent'"),
        ("--readout causal", "lack"),
        ("--label-words good", "one of --label-words for each of the labels"),
        ("--template {x}{mask} --label-words a b", "has a field other than"),
        ("--kind signgd --implementation jvp", "kind='signgd' needs every gradient"),
        ("--config absent.yaml", "cannot be read"),
        ("--device nonsense", "nonsense"),
        pytest.param(
            "--device cuda",
            "cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(pretrained, "_hub_is_known", lambda: False)
    monkeypatch.chdir(tmp_path)
    error = fails(capsys, tmp_path / "runs", *arguments.split())
    assert error.lstrip().startswith("error: ")
    assert message.lower() in error.lower()


def test_bad_file(capsys, tmp_path):
    file = tmp_path / "latin.csv"
    file.write_bytes("text,label\ncafé,0\n".encode("latin-1"))
    assert "not UTF-8" in fails(capsys, tmp_path / "runs", "--data", file)


def test_bad_configuration(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("shotz: 3")
    assert "'shotz' is no option" in fails(capsys, tmp_path / "runs", "--config", file)


def test_output_below_a_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        error = fails(capsys, output)
        assert "cannot be written to: Not a directory. Choose another" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written to" in fails(capsys, tmp_path / "runs")


def test_folder_that_is_no_result(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    error = fails(capsys, tmp_path, "--name", "mine")
    assert "exists and is no earlier result. Choose another --name" in error


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_interrupted(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "fold_kernels", interrupt)
    assert run(*TINY, "--output", tmp_path / "runs") == 130
    assert "interrupted; no report was written" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 2)]
)
def test_stopped_while_writing(again, tmp_path, monkeypatch, error, code):
    options = (*TINY, "--quiet", "--output", tmp_path, "--name", "same")
    assert run(*options) == 0
    before = (tmp_path / "same" / "report.json").read_bytes()

    def stop(record, folder):
        (folder / "report.json").write_text("half")
        raise error

    monkeypatch.setattr(report, "write_report", stop)
    assert run(*options, "--overwrite") == code
    assert [p.name for p in tmp_path.iterdir()] == ["same"]
    assert (tmp_path / "same" / "report.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("sketch:512", "512 numbers"),
        ("rows:64", "64 rows"),
        ("columns:64", "64 columns"),
    ],
)
def test_full_kernel_can_be_an_estimate(how, kept, tmp_path, capsys):
    code = run(*TINY, "--approximate", how, "--output", tmp_path, "--name", "a")
    assert code == 0
    record = json.loads((tmp_path / "a" / "report.json").read_text())
    estimate = record["kernel"]["estimate"]
    assert f"{estimate['entries']} {estimate['unit']}" == kept
    assert 0.003 < estimate["relative_error"] < 0.2
    full, rows = record["spaces"][:2]
    assert full["parameters"] > 22_000_000
    assert full["certificate"] is None
    assert rows["certificate"]["relative_error"] < 1e-4
    assert f"The full kernel is an estimate from {kept}" in capsys.readouterr().out
    kernel = load_kernels(tmp_path / "a" / "kernels.safetensors")[0]["full"]
    assert kernel.shape == (16, 8, 1, 1)


@pytest.mark.parametrize(
    "text", ["sketch", "sketch:", "row:8", "rows:3", "rows:", "sketch:3", "sketch:x"]
)
def test_an_estimate_that_cannot_be_made_is_refused(text, capsys):
    assert run("--approximate", text) == 2
    assert "--approximate" in capsys.readouterr().err


def test_a_failed_spot_check_has_its_own_exit_code_and_no_report(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluation, "tolerated_error", lambda options, dtype: -1.0)
    folder, _ = checkpoint(tmp_path / "model")
    options = ["--model", folder, "--rows", "1", "--shots", "4", "--test-size", "4"]
    options += ["--output", tmp_path / "runs", "--no-cache", "--quiet"]
    assert exit_code(compare.main, *options) == 3
    assert "plain autograd, differ from it" in capsys.readouterr().err
    assert not list((tmp_path / "runs").rglob("report.*"))
