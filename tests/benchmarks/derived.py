"""Write again, in the committed summaries, what follows from their other rows.

    python -m tests.benchmarks.derived

For ``figures/fewshot*.json`` the ratios, recovery, reliability and ends of the grids of
learning rates, and the figures of ratios; for ``figures/layers.json`` the predictors
that need no kernel, the correlations given these, and their figure. The records
themselves are not needed. Where they are, ``--report-only`` of the study's command
makes the whole report again and says more: summaries lack the dev scores of learning
rates, so that a rate counts as an end here although one inside may equal it, and the
predictors of each split, so that the intervals of correlations given depth or the other
tasks are left out for them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ntk.reporting import points, select
from ntk.reporting.page import to_json
from ntk.reporting.style import to_svg
from ntk.studies.fewshot import figures as fewshot_figures
from ntk.studies.fewshot.against_tuning import ratio_to_tuned
from ntk.studies.fewshot.summary import derived
from ntk.studies.layers import figures as layers_figures
from ntk.studies.layers.predictors import DEPTH, PREDICTORS, STATIC
from ntk.studies.layers.ranking import KINDS, TunedSets, add_static, correlated
from ntk.studies.overview import rounded
from rocoft.training import grid_end

FIGURES = Path("figures")
Summary = dict[str, Any]


def fewshot(summary: Summary) -> Summary:
    """Return the summary of a few-shot study with what follows from its rows."""
    rates = summary["settings"]["rates"]
    for row in summary["tuned"]:
        row.pop("agreement_of_seeds", None)
        grid = rates.get(row["method"], [])
        row["rates_at_end"] = [
            grid_end({each: float(each == rate) for each in grid}) if grid else None
            for rate in row["learning_rates"]
        ]
    for row in summary["comparisons"]:
        where = {"task": row["task"], "shots": row["shots"]}
        kind, space = row["kind"], row["space"]
        ours = select(summary["kernels"], **where, kind=kind, space=space)
        theirs = select(summary["tuned"], **where, method=row["method"])
        start = select(summary["splits"], **where)
        kernel, tuned, f0 = (
            dict(zip(found["seeds"], found[field]["values"], strict=True))
            for (found,), field in ((ours, "test"), (theirs, "test"), (start, "f0"))
        )
        seeds = row["seeds"]
        row["f0"] = float(np.mean([f0[seed] for seed in seeds]))
        row["ratio"] = ratio_to_tuned((kernel[s], tuned[s]) for s in seeds)
        found = [points(kernel[s], tuned[s]) for s in seeds]
        assert np.allclose(found, row["points"]["values"], atol=1e-3)
    return dict(rounded(summary | derived(summary)))


def layers(summary: Summary) -> Summary:
    """Return the summary of a layer study with predictors that need no kernel."""
    for shots in summary["shots"]:
        of_shots = select(summary["subsets"], shots=shots)
        by_task = {}
        for task in dict.fromkeys(row["task"] for row in of_shots):
            rows = select(of_shots, task=task)
            sets = [tuple(row["layers"]) for row in rows]
            scores = np.array([row["score"]["values"] for row in rows])
            # Values are rounded, so that means which are equal would be no ties.
            means = np.array([row["score"]["mean"] for row in rows])
            scores += (means - scores.mean(axis=1))[:, None]
            for row, chosen in zip(rows, sets, strict=True):
                row["predictors"][DEPTH] = float(np.mean([int(n) for n in chosen]))
            values = {
                name: np.repeat(
                    np.array([[row["predictors"][name]] for row in rows]),
                    scores.shape[1],
                    axis=1,
                )
                for name in PREDICTORS
                if name != STATIC
            }
            by_task[task] = TunedSets(sets, values, scores)
        add_static(by_task)
        for task, tuned in by_task.items():
            rows = select(of_shots, task=task)
            for row, value in zip(rows, tuned.predictors.get(STATIC, ()), strict=False):
                row["predictors"][STATIC] = float(value[0])
        for row in correlated(by_task):
            where = {"task": row["task"], "shots": shots}
            old = select(summary["correlations"], **where, predictor=row["predictor"])
            if not old:
                summary["correlations"].append({**where, **row})
            elif row["predictor"] not in (DEPTH, STATIC):
                for kind in KINDS:
                    if kind not in old[0]:
                        old[0][kind] = row[kind] | {"low": None, "high": None}
    return dict(rounded(summary))


def main() -> None:
    """Write the summaries and the figures that show what is new in them."""
    for path in sorted(FIGURES.glob("fewshot*.json")):
        summary = fewshot(json.loads(path.read_text()))
        path.write_text(to_json(summary))
        _draw(fewshot_figures.draw_figures(summary), path, "ratio")
    path = FIGURES / "layers.json"
    summary = layers(json.loads(path.read_text()))
    path.write_text(to_json(summary))
    _draw(layers_figures.draw_figures(summary), path, "correlations")


def _draw(figures: dict[str, Any], path: Path, kind: str) -> None:
    """Write the figures of a kind where they are committed."""
    for name, figure in figures.items():
        what, _, part = name.partition("-")
        study = path.stem.partition("-")[0]
        for file in (f"{study}-{what}-{part}.svg", f"{study}-{what}.svg"):
            if what == kind and (FIGURES / file).is_file():
                (FIGURES / file).write_text(to_svg(figure))


if __name__ == "__main__":
    main()
