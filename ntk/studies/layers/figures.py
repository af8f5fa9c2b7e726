"""Figures of a study of layers.

The target-aware rule is green in all figures, each baseline has its own colour, random
selection is grey.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ntk.reporting import (
    COLOURS,
    DASHES,
    LINE,
    MARKERS,
    Row,
    as_float,
    legend_below,
    light_grid,
    name_rows,
    new_figure,
    plain,
)
from ntk.studies.layers.predictors import PREDICTORS
from ntk.studies.layers.predictors import TARGET_AWARE as PREDICTED
from ntk.studies.layers.records import HEAD
from ntk.studies.layers.subsets import BASELINES, RANDOM, TARGET_AWARE
from ntk.studies.layers.summary import ALL, NONE
from ntk.studies.layers.tables import Slice, slices

BLACK, BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY = COLOURS
LOOKS = {
    TARGET_AWARE: (GREEN, "D"),
    **dict(
        zip(
            BASELINES,
            ((RED, "^"), (BLUE, "s"), (PINK, "P"), (SKY, "<"), (ORANGE, ">")),
            strict=True,
        )
    ),
    RANDOM: (GREY, "o"),
}
"""Colour and marker of a rule."""
REFERENCES: dict[str, Any] = {ALL: "-", NONE: DASHES[1]}
GOAL = 0.8
"""Rank correlation from which a measure is good enough to choose layers by."""
COLUMNS = 4
"""Maximal number of panels in a row."""


def draw_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the figures for which a summary has numbers.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Some of ``layers``, ``scores``, ``correlations`` and ``sets`` for each number
        of shots, by names such as ``layers-16``.
    """
    figures: dict[str, Figure] = {}
    for part in slices(summary):
        if part.rows("layers"):
            figures[f"layers-{part.name}"] = _draw_layers(part)
        if part.verified:
            figures[f"scores-{part.name}"] = _draw_scores(part)
        if part.rows("correlations"):
            figures[f"correlations-{part.name}"] = _draw_correlations(part)
            figures[f"sets-{part.name}"] = _draw_sets(part)
    return figures


def plot_layers(layers: Sequence[Row], ax: Axes) -> Axes:
    """Draw the drop of each layer alone.

    Args:
        layers: Rows of one task, see `summary.collect`.
        ax: The axes.

    Returns:
        The same axes, with one bar per layer in order.
    """
    rows = [row for row in layers if row["layer"] != HEAD]
    ax.bar(
        range(len(rows)),
        [100 * as_float(row["drop"]["mean"]) for row in rows],
        yerr=[100 * (row["drop"]["deviation"] or 0) for row in rows],
        color=GREEN,
        error_kw={"elinewidth": 0.9, "ecolor": BLACK},
    )
    light_grid(ax)
    ax.grid(visible=False, axis="x")
    return ax


def plot_choices(rules: Sequence[Row], layers: Sequence[str], ax: Axes) -> Axes:
    """Draw how often each rule chose each layer, as shades.

    Args:
        rules: Rows of one task, see `summary.collect`.
        layers: Names of the layers in order.
        ax: The axes.

    Returns:
        The same axes, with one row per rule from top to bottom.
    """
    shares = np.array(
        [
            [
                np.mean([name in each for sets in row["chosen"] for each in sets])
                for name in layers
            ]
            for row in rules
        ]
    )
    ax.imshow(shares, cmap="Greens", vmin=0, vmax=1.25, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        if 0 < share < 1:
            ax.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(layers)), layers)
    ax.set_yticks(range(len(rules)), [row["rule"] for row in rules])
    ax.tick_params(length=0)
    ax.set_xticks(np.arange(len(layers)) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rules)) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_correlations(
    rows: Sequence[Row], kind: str, tasks: Sequence[str], ax: Axes
) -> Axes:
    """Draw each predictor's correlation with the score, a dot for each task.

    Args:
        rows: Correlations, see `summary.collect`; bars show the interval of the mean
            over tasks, or of a single task.
        kind: ``"plain"`` or a name of `predictors.CONTROLS`.
        tasks: Names of the tasks in order.
        ax: The axes.

    Returns:
        The same axes, with one row per predictor from top to bottom.
    """
    names = [name for name in PREDICTORS if any(r["predictor"] == name for r in rows)]
    ax.axvline(0, color=LINE, linewidth=0.8, zorder=1)
    for sign in (-1, 1):
        ax.axvline(sign * GOAL, color=LINE, linestyle=DASHES[2], linewidth=0.9)
    for i, name in enumerate(names):
        by_task = {row["task"]: row[kind] for row in rows if row["predictor"] == name}
        for j, task in enumerate(tasks):
            if task in by_task and by_task[task]["spearman"] is not None:
                shift = 0.5 * ((j + 0.5) / len(tasks) - 0.5)
                colour, mark = _look(j)
                at = by_task[task]["spearman"], i + shift
                ax.plot(*at, mark, color=colour, markersize=4.5, zorder=3)
        mean = by_task.get(None if tasks[1:] else tasks[0])
        if mean is not None and mean["spearman"] is not None:
            if mean["low"] is not None:
                ax.plot([mean["low"], mean["high"]], [i, i], color=BLACK, linewidth=1.1)
            ax.plot(mean["spearman"], i, "|", color=BLACK, markersize=13, zorder=4)
    name_rows(ax, [f"{n} ({'+' if PREDICTORS[n].sign > 0 else '−'})" for n in names])
    ax.set_xlim(-1.03, 1.03)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def plot_sets(subsets: Sequence[Row], predictor: str, ax: Axes) -> Axes:
    """Draw the score of sets of layers against a predictor.

    Args:
        subsets: Rows of one task, see `summary.collect`.
        predictor: Name of the predictor.
        ax: The axes.

    Returns:
        The same axes, with one point per set, labelled with its layers.
    """
    for row in subsets:
        x, y = row["predictors"][predictor], 100 * as_float(row["score"]["mean"])
        error = 100 * (row["score"]["deviation"] or 0)
        ax.errorbar(
            x, y, yerr=error, fmt="o", color=GREEN, ecolor="#b5d9cc", markersize=4
        )
        text = _short(row["layers"])
        ax.annotate(text, (x, y), (3, 3), textcoords="offset points", fontsize=6.5)
    light_grid(ax)
    ax.margins(x=0.12)
    return ax


def _draw_layers(part: Slice) -> Figure:
    tasks = part.tasks
    columns = min(COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    depth = max(len(part.rows("layers", task=task)) for task in tasks)
    width = max(2.0, 0.34 * depth)
    figure = _grid_of(1.6 + width * columns, 3.4 * lines)
    panels = figure.subplots(
        2 * lines, columns, squeeze=False, sharex="col", height_ratios=[1, 1] * lines
    )
    for place in range(columns * lines):
        line, column = divmod(place, columns)
        bars, choices = panels[2 * line, column], panels[2 * line + 1, column]
        if place >= len(tasks):
            bars.remove()
            choices.remove()
            continue
        rows = part.rows("layers", task=tasks[place])
        names = [row["layer"] for row in rows if row["layer"] != HEAD]
        plot_layers(rows, bars)
        plot_choices(part.rows("rules", task=tasks[place]), names, choices)
        bars.tick_params(axis="x", length=0, labelbottom=False)
        choices.tick_params(axis="x", labelbottom=True)
        bars.set_title(plain(tasks[place]), fontsize=10)
        choices.set_xlabel("layer")
        if column == 0:
            bars.set_ylabel("drop (%)")
        else:
            choices.set_yticklabels([])
    return figure


def _draw_scores(part: Slice) -> Figure:
    tasks = part.tasks
    figure = _grid_of(8.4, 1.4 + 0.75 * len(tasks))
    ax = figure.subplots()
    lane = 0.7 / len(LOOKS)
    for i, task in enumerate(tasks):
        for row in part.rows("references", task=task):
            if row["score"]["mean"] is not None:
                ax.plot(
                    [100 * row["score"]["mean"]] * 2,
                    [i - 0.42, i + 0.42],
                    color=LINE,
                    linestyle=REFERENCES[row["name"]],
                    linewidth=1.3,
                )
        for j, (rule, (colour, mark)) in enumerate(LOOKS.items()):
            (row,) = part.rows("rules", task=task, rule=rule)
            if row["score"]["mean"] is not None:
                ax.errorbar(
                    100 * row["score"]["mean"],
                    i + lane * (j - (len(LOOKS) - 1) / 2),
                    xerr=100 * (row["score"]["deviation"] or 0),
                    fmt=mark,
                    color=colour,
                    markersize=5,
                    elinewidth=0.8,
                )
    name_rows(ax, tasks)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("test score (%); bars: standard deviation over splits")
    shown = [_marker(rule, *look) for rule, look in LOOKS.items()]
    shown += [
        Line2D([], [], color=LINE, linestyle=style, label=name)
        for name, style in REFERENCES.items()
    ]
    legend_below(figure, {}, *shown)
    return figure


def _draw_correlations(part: Slice) -> Figure:
    tasks = [row["task"] for row in part.rows("noise")]
    figure = _grid_of(9.6, 1.4 + 0.34 * len(PREDICTORS))
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"plain": "rank correlation", "beyond_depth": "beyond the mean layer"}
    for ax, (kind, title) in zip(panels, titles.items(), strict=True):
        plot_correlations(part.rows("correlations"), kind, tasks, ax)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("Spearman, with the test score")
    shown = [_marker(task, *_look(j)) for j, task in enumerate(tasks)]
    several = "mean of tasks" if tasks[1:] else tasks[0]
    shown.append(Line2D([], [], color=BLACK, label=f"95 % of the {several}"))
    shown.append(Line2D([], [], color=LINE, linestyle=DASHES[2], label=f"±{GOAL:g}"))
    legend_below(figure, {}, *shown)
    return figure


def _draw_sets(part: Slice) -> Figure:
    tasks = [row["task"] for row in part.rows("noise")]
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = _grid_of(0.6 + 4.4 * columns, 0.4 + 3.2 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, task in zip(panels, tasks, strict=False):
        plot_sets(part.rows("subsets", task=task), PREDICTED, ax)
        ax.set_title(plain(task), fontsize=10)
        ax.set_xlabel("target-aware score")
        ax.set_ylabel("test score (%)")
    for ax in panels[len(tasks) :]:
        ax.remove()
    return figure


def _grid_of(width: float, height: float) -> Figure:
    return new_figure(max(width, 5.2), height)


def _look(place: int) -> tuple[str, str]:
    return COLOURS[1 + place % (len(COLOURS) - 1)], MARKERS[place % len(MARKERS)]


def _marker(label: str, colour: str, mark: str) -> Line2D:
    return Line2D(
        [], [], color=colour, marker=mark, linestyle="none", label=plain(label)
    )


def _short(layers: Sequence[str]) -> str:
    """Return layers as text; runs of more than two as ranges."""
    numbers = list(map(int, layers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [
        f"{run[0]}–{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
        for run in runs
    ]
    return ",".join(texts)
