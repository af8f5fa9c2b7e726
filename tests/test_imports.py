"""Imports go downwards between sub-packages, and no study imports another."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = {
    "rocoft": ["commands", "data", "models", "adapter", "training"],
    "ntk": [
        *("measures", "spaces", "gradients", "kernels", "scale", "classifiers"),
        *("linearization", "layer_selection", "reporting", "studies"),
    ],
}
"""The sub-packages of each package, the lowest first."""
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def module(path):
    """Return the parts of a file's dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return tuple(part for part in parts if part != "__init__")


MODULES = {module(path) for path in FILES}


def imported(source):
    """Return the modules of this project that a source imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for name in names:
        parts = tuple(name.split("."))
        while parts and parts not in MODULES:
            parts = parts[:-1]
        if parts:
            found.add(parts)
    return sorted(found)


IMPORTS = {module(path): imported(path.read_text()) for path in FILES}


def place(parts):
    """Return how high a module stands: its package, then its sub-package."""
    package, *rest = parts
    order = ORDER[package]
    inner = len(parts) > 1 and (ROOT / package / rest[0]).is_dir()
    return list(ORDER).index(package), order.index(rest[0]) if inner else len(order)


def cycle(graph):
    """Return a cycle of a graph, or nothing."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        done.add(node)
        path.append(node)
        for other in graph[node]:
            if found := visit(other):
                return found
        path.pop()
        return []

    return next((found for node in graph if (found := visit(node))), [])


def test_imported_finds_imports_inside_functions():
    source = (
        "def f():\n    from ntk.spaces.maps import Whole\nimport torch, ntk.measures\n"
    )
    assert imported(source) == [("ntk", "measures"), ("ntk", "spaces", "maps")]


def test_cycle_finds_one():
    assert cycle({1: [2], 2: [3], 3: [2]}) == [2, 3]
    assert cycle({1: [2, 3], 2: [3], 3: []}) == []


@pytest.mark.parametrize("name", [pytest.param(m, id=".".join(m)) for m in IMPORTS])
def test_module_imports_downwards(name):
    for other in IMPORTS[name]:
        assert place(other) <= place(name), f"imports {'.'.join(other)}, which is above"


@pytest.mark.parametrize("package", ORDER)
def test_every_sub_package_has_a_place(package):
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert folders == set(ORDER[package])


@pytest.mark.parametrize(
    "package", [f"{top}.{inner}" for top, order in ORDER.items() for inner in order]
)
def test_sub_package_has_no_cycle(package):
    parts = tuple(package.split("."))
    inside = {m: IMPORTS[m] for m in IMPORTS if m[: len(parts)] == parts}
    graph = {m: [o for o in others if o in inside] for m, others in inside.items()}
    assert not cycle(graph)


def test_no_study_imports_another():
    for name, others in IMPORTS.items():
        for other in others:
            if name[:2] == other[:2] == ("ntk", "studies") and len(other) > 3:
                assert name[:3] == other[:3] or len(name) < 4, f"{name} imports {other}"


@pytest.mark.parametrize("package", ["measures", "classifiers"])
def test_every_module_imports_without_transformers(package):
    names = [".".join(m) for m in sorted(MODULES) if m[:2] == ("ntk", package)]
    code = f"import sys, {', '.join(names)}; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_packages_import_without_what_is_slow():
    code = "import sys, ntk, rocoft; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("package", [m for m in sorted(MODULES) if len(m) <= 2])
def test_exports_are_there_and_no_module_has_the_name_of_one(package):
    folder = ROOT.joinpath(*package)
    if (folder / "__init__.pyi").is_file():
        module = importlib.import_module(".".join(package))
        assert module.__all__
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert (*package, name) not in MODULES


FIRST = sorted(
    {m for m in MODULES if m[0] == "rocoft"}
    | {next(m for m in sorted(MODULES) if m[:2] == p) for p in MODULES if len(p) == 2}
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [".".join(m) for m in FIRST])
def test_module_can_be_the_first_that_a_process_imports(name):
    code = f"import {name}, peft; print('ROCOFT' in peft.PeftType.__members__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    # A module of ntk alone need not import rocoft.
    registered = str("rocoft" in name)
    assert done.stdout.strip() in {registered, "True"}, done.stderr


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
)
def test_benchmark_imports(name):
    importlib.import_module(f"tests.benchmarks.{name}")
