"""Imports go up one list only; a file that is not listed fails."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROCOFT = """
architecture selection tasks splits readouts config functional slices on_use quantised
offloaded pretrained backbone layer model export metrics console files meter methods
anchor checkpoints search readout_trainer trainer language sft options results train
"""
NTK = """
function maps spaces resolution notation precision factors positions contraction rules
capture coverage passes jacobian features jobs accumulator engine processes sharding
storage factor_file spilling kernel approximation calibration importance certificate
spectrum distance risk bounds agreement sampling evolution chunks yardsticks rates
spill_plan memory estimate cost route_cost cache layerwise layer_budget layer_selection
kernel_classifier logistic classifiers asymmetric tuning linearize closed_form closeness
closeness_bounds comparison computation measurement evaluation drawing cost_plots plots
record_values findings report options compare bench_cases bench study protocol fewshot
study_options study_order study_scores study_records study_comparison study_summary
study_grids study_tables study_plots study_figures study_pages study_command
study_report evaluate_options evaluate selection_variance ablation ablation_gains
ablation_summary ablation_tables ablation_plots ablation_report ablation_options ablate
layers_records layers_subsets layers_predictors layers_correlation layers_summary
layers_tables layers_plots layers_report layers_options layers linearization_training
linearization linearization_summary linearization_tables linearization_plots
linearization_report linearization_options linearize.__main__
"""
ORDER = {"rocoft": ROCOFT.split(), "ntk": NTK.split()}
FILES = [
    pytest.param(package, path, id=f"{package}/{path.name}")
    for package in ORDER
    for path in sorted((ROOT / package).glob("**/*.py"))
    if path != ROOT / package / "__init__.py"
]


def module(package, path):
    """Return the name of a file's module within its package."""
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(source):
    """Return the modules of this project that a source imports, wherever it does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.split(".") for name in found if name.split(".")[0] in ORDER]


def test_imported_finds_imports_inside_functions():
    source = "def f():\n    from ntk.maps import Whole\nimport torch, ntk.spaces as s\n"
    assert imported(source) == [["ntk", "spaces"], ["ntk", "maps", "Whole"]]


@pytest.mark.parametrize(("package", "path"), FILES)
def test_file_imports_only_from_files_above_it(package, path):
    name = module(package, path)
    assert name in ORDER[package], f"{path} is not listed in ORDER"
    above = ORDER[package][: ORDER[package].index(name)]
    for other, *rest in imported(path.read_text()):
        if other == package:
            assert rest, f"{path.name} imports its own package"
            assert rest[0] in above, f"{path.name} imports {rest[0]}, which is below it"
        else:
            assert package == "ntk", f"rocoft/{path.name} imports ntk"
            assert rest, f"{path.name} imports rocoft as a whole"
            assert rest[0] in ORDER[other], f"rocoft.{rest[0]} is not listed in ORDER"


def test_rocoft_does_not_import_ntk():
    for path in (ROOT / "rocoft").glob("**/*.py"):
        assert all(name[0] != "ntk" for name in imported(path.read_text())), path


def test_ntk_does_not_import_matplotlib():
    code = "import sys, ntk; print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
