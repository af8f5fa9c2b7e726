"""All commands: the same options mean the same, and answer before torch is imported."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from commands import exit_code

from ntk.__main__ import main as ntk
from rocoft.commands.failures import MEMORY
from rocoft.commands.main import Command
from rocoft.commands.options import OptionError, option, options_of, parse_options

MODULES = (
    *("ntk.compare", "ntk.evaluate", "ntk.ablate", "ntk.layers", "ntk.linearize"),
    *("ntk.bench", "rocoft.train"),
)
COMMANDS = {name: importlib.import_module(name).main for name in MODULES}
OPTIONS = {name: options_of(main.options) for name, main in COMMANDS.items()}
EVERYWHERE = {
    *("model", "readout", "head_init", "dtype", "device", "max_length"),
    *("data", "data_dir", "template", "label_words", "name", "output", "overwrite"),
    *("config", "quiet", "json"),
}
DIFFERENT = {
    "head_init": "kernels are taken at a fitted head, training starts at a random one",
    "dtype": "float16 computes kernels but cannot be trained",
    "data": "what is drawn from a file differs, and training reads prompts too",
    "shots": "studies take several numbers, training takes all examples by default",
    "test_size": "studies test on 1000, as published; one comparison on fewer",
    "seed": "of what there is to draw",
    "seeds": "the few-shot study has the five published ones",
    "name": "a study has one name, a comparison one for each time, a run its options'",
    "json": "a study prints its report",
    "overwrite": "a study that is not overwritten is continued",
    "rows": "several spaces are compared, one is trained",
    "columns": "several spaces are compared, one is trained",
    "lora": "several spaces are compared, one is trained",
    "num_train_epochs": "studies have the published protocol",
    "per_device_train_batch_size": "studies have the published protocol",
    "lrs": "what is chosen among them differs",
    "spaces": "the published study has others than a benchmark",
    "space": "several are compared, one ranks layers",
    "random_seeds": "of selections, and of choices of layers",
}
"""Options that differ between commands, and why."""


@pytest.fixture(params=MODULES)
def command(request):
    return COMMANDS[request.param]


def described(each):
    return each.type, each.several, each.default, each.choices, each.help


@pytest.mark.parametrize(
    "name", sorted({each.name for some in OPTIONS.values() for each in some})
)
def test_an_option_is_the_same_in_every_command(name):
    same = [each for some in OPTIONS.values() for each in some if each.name == name]
    found = set(map(described, same))
    assert (len(found) > 1) == (name in DIFFERENT), found


@pytest.mark.parametrize("module", MODULES)
def test_every_command_has_the_shared_options(module):
    names = {each.name for each in OPTIONS[module]}
    assert names >= EVERYWHERE
    assert names & {"task", "tasks"}
    if module != "rocoft.train":
        assert names >= {"load_in", "offload", "batch_size"}
    if module not in {"rocoft.train", "ntk.bench", "ntk.linearize"}:
        assert names >= {"memory", "cache", "spill", "precision"}


@pytest.mark.parametrize("module", MODULES)
def test_every_option_is_described(module):
    for each in OPTIONS[module]:
        assert len(each.help.split()) > 2, each.name


def test_both_spellings_are_accepted(command):
    for flag in ("--data-dir", "--data_dir"):
        options = command.parse([flag, "DATA", "--output_dir", "out"])
        group = options.splits if hasattr(options, "splits") else options.task
        assert group.data_dir == Path("DATA")
        assert options.output.output == Path("out")


def test_help_lists_every_option_once(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code(command, "--help") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for each in OPTIONS[command.module]:
        assert f"  {each.invocation}"[:80] in shown
        assert each.flag == f"--{each.name.replace('_', '-')}"
    flags = [line.split()[0] for line in shown.splitlines() if line[:4] == "  --"]
    assert len(flags) == len(set(flags)) == len(OPTIONS[command.module]) + 1
    assert "--output-dir" not in shown


def test_version(command, capsys):
    assert exit_code(command, "--version") == 0
    assert capsys.readouterr().out == "rocoft-ntk 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "--modell x",
            "error: --modell is no option. Did you mean --model? See --help.",
        ),
        ("--max_lenth 3", "--max_lenth is no option. Did you mean --max-length?"),
        ("--nonsense=1", "error: --nonsense is no option. See --help."),
        ("--mode x", "--mode is no option. Did you mean --model?"),
        ("--max-length 0", "--max-length: '0' must be a whole number of at least 1."),
        ("--max-length", "--max-length: expected 1 argument. See --help."),
        ("--dtype flaot32", "'flaot32' is none of float32, float64, bfloat16"),
        ("--dtype flaot32", "Did you mean float32? See --help."),
        ("--quiet much", "--quiet: 'much' is neither true nor false."),
        ("--quiet true much", "error: 'much' belongs to no option. See --help."),
        ("--name ../x", "--name: '../x' must be a name inside --output"),
        ("--name /x", "--name: '/x' must be a name inside --output"),
        ("--name ..", "--name: '..' must be a name inside --output"),
        ("--name .cache", "--name: '.cache' must be a name inside --output"),
        ("--task ../x", "'../x' must be the name of a task"),
        ("--data x.csv --task sst2", "'sst2' both name examples. Give one of them."),
        ("--config absent.yaml", "--config 'absent.yaml' cannot be read:"),
    ],
)
def test_a_mistake_is_answered_in_one_line(command, capsys, arguments, line):
    assert command(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert line in printed.err
    assert printed.err.count("\n") == 1


def test_memory_needs_a_unit(command, capsys):
    if "memory" not in {each.name for each in OPTIONS[command.module]}:
        pytest.skip("has no --memory")
    assert command.parse(["--memory", "4GiB"]).kernels.memory == 4 * 2**30
    assert command(["--memory", "2"]) == 2
    assert "--memory: '2' has no unit" in capsys.readouterr().err


# One reading of options.


@dataclass(frozen=True)
class Some:
    title: ClassVar[str] = "some"

    on: bool = option(True, "on unless it is not")
    off: bool = option(False, "off unless it is not")
    words: tuple[str, ...] = option((), "words of any kind")
    methods: tuple[str, ...] = option(
        ("full",), "may be none", may_be_empty=True, also=("method",)
    )
    rate: float | None = option(None, "a number", shown="none")
    kind: Literal["a", "b"] = option("a", "which one")
    config: Path | None = option(None, "YAML with the same names")


@dataclass(frozen=True)
class Options:
    some: Some


def parse(*given):
    return parse_options(Options, [str(text) for text in given]).some


def test_flags():
    assert parse() == Some()
    options = parse("--no-on", "--off", "--rate=1e-3", "--method", "x", "y", "--kind=b")
    assert options == Some(on=False, off=True, rate=1e-3, methods=("x", "y"), kind="b")
    assert parse("--no_on", "--on").on
    assert not parse("--off", "--no-off").off
    assert not parse("--on", "False").on
    assert parse("--methods").methods == ()
    assert parse("--words", "-1", "a b").words == ("-1", "a b")
    for arguments in (["--words"], ["--o"], ["--no-on=1"], ["--no-rate"], ["-1"]):
        with pytest.raises(OptionError, match="See --help|takes no value"):
            parse(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "words: [Yes, No, 012, null, ~]",
            Some(words=("Yes", "No", "012", "null", "~")),
        ),
        ("words: Yes", Some(words=("Yes",))),
        ("words: []", Some()),
        ("methods: []", Some(methods=())),
        ("method: x", Some(methods=("x",))),
        ("methods:", Some()),
        ("on: no\noff: true", Some(on=False, off=True)),
        ("on: null\nrate: ~", Some()),
        ("rate: 1e-3\nkind: b", Some(rate=1e-3, kind="b")),
        ("", Some()),
    ],
)
def test_a_file(tmp_path, text, expected):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    options = parse("--config", file)
    assert options == Some(**{**vars(expected), "config": file})


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("on: false\nmethod: x\nrate: 2\n")
    options = parse("--config", file, "--on", "--rate", "3")
    assert (options.on, options.methods, options.rate) == (True, ("x",), 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrods: 1", "'wrods' is no option. Did you mean words?"),
        ("config: x", "'config' is no option"),
        ("no_on: true", "'no_on' is no option"),
        ("kind: [a, b]", "'a b' are several values; it takes one"),
        ("kind: c", "kind: 'c' is none of a, b"),
        ("kind: {a: b}", "kind must be a value or a list of values"),
        ("- a", "must map options to values"),
        ("words: [", "cannot be read"),
    ],
)
def test_a_file_that_is_refused(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(OptionError) as refused:
        parse("--config", file)
    assert message in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


# Names of results.


def test_constants_are_those_of_the_modules_that_import_torch():
    from ntk.studies.ablation import options, records
    from ntk.studies.lambdas.records import OPTIMIZERS

    assert options.MeasuredOptions().axes == records.AXES
    assert records.ALL == options.ALL
    by_name = {each.name: each for each in OPTIONS["ntk.linearize"]}
    assert by_name["optimizer"].choices == tuple(OPTIMIZERS)


# Starting, and stopping.

NO_TORCH = """
import runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        assert not stopped.code, module
heavy = {"torch", "transformers", "numpy", "matplotlib", "rich", "sklearn", "jinja2"}
print("imported:", sorted(heavy & {*sys.modules}))
"""


def test_help_of_all_commands_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NO_TORCH, *MODULES],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
    assert done.stdout.count("usage:") == len(MODULES)


def test_help_in_this_process(capsys, monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        monkeypatch.delitem(sys.modules, module)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(module, run_name="__main__")
        assert not stopped.value.code
        assert f"python -m {module}" in capsys.readouterr().out


def test_interrupted_while_modules_are_imported():
    process = subprocess.Popen(
        [sys.executable, "-v", "-m", "ntk.compare", "--task", "absent"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background processes ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stderr:
        if line.startswith("import 'torch._C'") or "import 'torch.types'" in line:
            process.send_signal(signal.SIGINT)
            break
    said = [x for x in process.stderr.read().splitlines() if "interrupted" in x]
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 130
    assert said == ["interrupted"]


def fail(options, command):
    raise OSError("the disk is full")


def interrupt(options, command):
    raise KeyboardInterrupt


def raising(error):
    def run(options, command):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (lambda options, command: [], 0, ""),
        (lambda options, command: ["this"], 1, "failed: this\n"),
        (fail, 2, "error: the disk is full\n"),
        (raising(RuntimeError("can't allocate memory")), 2, f"error: {MEMORY}\n"),
        (raising(ImportError("no x")), 2, "error: no x. Install what is missing, or "),
        (raising(ValueError("a\nlabel\x1b[2J")), 2, "error: a label\\x1b[2J\n"),
        (raising(BrokenPipeError()), 141, ""),
        (interrupt, 130, "interrupted; nothing was written\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, run, code, said):
    module = type(sys)("work_of_a_test")
    module.run = run
    monkeypatch.setitem(sys.modules, "work_of_a_test", module)
    command = Command("some.command", Options, "work_of_a_test", "what it is")
    assert command([]) == code
    first = capsys.readouterr().err
    assert first.startswith(said)
    assert first.count("\n") == (said != "")
    monkeypatch.setenv("RANK", "1")
    assert command([]) == code
    again = capsys.readouterr().err
    assert again == (first if code == 1 else ""), "several processes say it again"


HEADS = """
import sys
from ntk.studies.options import StudyOutputOptions
from rocoft.commands import show_json, show_lines, show_tables
from rich.table import Table

def run(options, command):
    what = sys.argv[1]
    if what == "lines":
        show_lines("x" * 99 for _ in range(10_000))
    elif what == "tables":  # several: one write may seem whole
        table = Table("a")
        for _ in range(1_000):
            table.add_row("x" * 90)
        show_tables([table] * 3)
    else:
        show_json(["x" * 99] * 10_000)
    return ["a failure that nobody hears"]

if __name__ == "__main__":
    import types
    from rocoft.commands.main import Command
    from ntk.studies.bench.options import BenchOptions
    sys.modules["work_of_a_test"] = types.SimpleNamespace(run=run)
    command = Command("some.command", BenchOptions, "work_of_a_test", "what it is")
    sys.exit(command([], is_process=True))
"""


@pytest.mark.parametrize("what", ["lines", "tables", "json"])
def test_a_broken_pipe_is_silent(what):
    process = subprocess.Popen(
        [sys.executable, "-c", HEADS, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_what_the_encoding_of_the_terminal_lacks_is_written_out():
    shows = "from rocoft.commands.main import Command; from rocoft.commands import *\n"
    shows += "from rocoft.commands.main import _write_what_the_encoding_lacks as f\n"
    shows += "f(); show_lines(['70 \\u00b1 2', '\\ud800'])"
    done = subprocess.run(
        [sys.executable, "-c", shows],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout == "70 \\xb1 2\n\\ud800\n"


def test_one_command_for_all(capsys):
    assert ntk(["--help"]) == ntk([]) == 0
    shown = capsys.readouterr().out
    for name in (module.rpartition(".")[2] for module in MODULES):
        assert shown.count(f"\n  {name} ") == 2
    assert ntk(["--version"]) == 0
    assert ntk(["comprae"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "rocoft-ntk 0.1.0\n"
    assert printed.err == (
        "error: comprae is no command. Did you mean compare? See ntk --help.\n"
    )
    assert ntk(["train", "--row", "1"]) == 2
    assert "--row is no option. Did you mean --rows?" in capsys.readouterr().err
    assert exit_code(ntk, "bench", "--help") == 0
    assert "usage: ntk bench" in capsys.readouterr().out
