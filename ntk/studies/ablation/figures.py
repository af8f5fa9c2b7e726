"""Figures of an ablation.

A strategy has the same style in all figures; random selection is black and its spread
grey.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ntk.reporting import (
    COLOURS,
    DASHES,
    LINE,
    MARKERS,
    Row,
    ShotsSlice,
    as_floats,
    legend_below,
    light_grid,
    name_rows,
    new_figure,
    plain,
    select,
)
from ntk.studies.ablation.gains import RANDOM
from ntk.studies.ablation.records import ALL, AXES, FULL, HEAD
from ntk.studies.ablation.tables import TITLES, slices, total

BLACK, BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY = COLOURS
LOOKS: dict[str, tuple[str, str, Any]] = {
    RANDOM: (BLACK, "o", "-"),
    "gradient": (GREEN, "D", "-"),
    "activation": (BLUE, "s", "-"),
    "max": (RED, "^", "-"),
    "mixed": (PINK, "P", DASHES[1]),
    "min": (ORANGE, "v", DASHES[1]),
    "first": (SKY, "<", DASHES[2]),
    "last": (GREY, ">", DASHES[2]),
}
"""Colour, marker and dashes of a strategy."""
BAND = "#d9d9d9"
STAR: dict[str, Any] = {"color": BLACK, "marker": "*", "markersize": 9}
TASKS = 4
"""Maximal number of tasks with own panels; for more the mean is drawn."""
GAINS = ("rescaled", "score_of_body", "score")


def draw_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the figures for which a summary has numbers.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Some of ``gain``, ``distance``, ``score``, ``alone``, ``variance`` and
        ``origin`` for each number of shots, by names such as ``gain-16``.
    """
    figures: dict[str, Figure] = {}
    for part in slices(summary):
        if part.rows("gains"):
            figures[f"gain-{part.name}"] = _draw_gains(part)
        if part.rows("curves"):
            figures[f"distance-{part.name}"] = _draw_curves(part, "rescaled")
            figures[f"score-{part.name}"] = _draw_curves(part, "score")
            figures[f"alone-{part.name}"] = _draw_curves(part, "score_of_body")
        if part.rows("variance"):
            figures[f"variance-{part.name}"] = _draw_variance(part)
        if part.rows("origins"):
            figures[f"origin-{part.name}"] = _draw_origins(part)
    return figures


def plot_curves(
    curves: Sequence[Row],
    measure: str,
    counts: Sequence[int],
    levels: Mapping[str, float | None],
    whole: float | None,
    ax: Axes,
) -> Axes:
    """Draw a measure of each strategy against the size of the selection.

    Args:
        curves: Curves of one axis, see `summary.collect`.
        measure: Name of the measure.
        counts: Sizes, evenly spaced on the x axis.
        levels: Horizontal lines in percent, by name.
        whole: Value of all linear weights in percent, drawn after the last size.
        ax: The axes.

    Returns:
        The same axes, with one line per strategy.
    """
    place = {count: i for i, count in enumerate(counts)}
    for name, level in levels.items():
        if level is not None:
            style = DASHES[1] if name == HEAD else "-"
            ax.axhline(level, color=LINE, linewidth=1.0, linestyle=style, zorder=1)
    for row in sorted(curves, key=lambda row: row["strategy"] == RANDOM):
        strategy = row["strategy"]
        colour, marker, dashes = LOOKS[strategy]
        x = np.array([place[count] for count in row["counts"]])
        y = 100 * as_floats(row[measure]["mean"])
        ax.plot(
            x,
            y,
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=1.9 if strategy == RANDOM else 1.3 if dashes == "-" else 0.9,
            markersize=4.5 if dashes == "-" else 3.5,
            label=strategy,
            zorder=4 if strategy == RANDOM else 3,
        )
        if strategy == RANDOM:
            spread = 100 * as_floats(row[measure]["deviation"])
            ax.fill_between(
                x, y - spread, y + spread, color=BAND, linewidth=0, zorder=0
            )
    if whole is not None:
        ax.plot(len(counts), whole, **STAR, zorder=4)
    ends = [*map(str, counts), *([ALL] if whole is not None else [])]
    ax.set_xticks(range(len(ends)), ends)
    ax.set_xlim(-0.4, len(ends) - 0.6)
    light_grid(ax)
    return ax


def plot_gains(rows: Sequence[Row], ax: Axes) -> Axes:
    """Draw the gains over random selection and the spread of the latter.

    Args:
        rows: Gains of one measure over all tasks, by axis and strategy.
        ax: The axes.

    Returns:
        The same axes, with one row per strategy from top to bottom.
    """
    strategies = [name for name in LOOKS if any(r["strategy"] == name for r in rows)]
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    ax.axvspan(-1, 1, color=BAND, linewidth=0, zorder=0)
    ax.axvline(0, color=LINE, linewidth=0.8, zorder=1)
    for i, axis in enumerate(axes):
        over_counts = {
            row["strategy"]: row["over_counts"]
            for row in select(rows, axis=axis)
            if row["over_counts"]["gain"] is not None
        }
        known = [strategy for strategy in strategies if strategy in over_counts]
        ax.errorbar(
            [over_counts[strategy]["gain"] for strategy in known],
            [
                strategies.index(strategy) + 0.22 * (i - (len(axes) - 1) / 2)
                for strategy in known
            ],
            xerr=[2 * over_counts[strategy]["error"] for strategy in known],
            fmt=MARKERS[i],
            color=(BLUE, RED, GREEN)[AXES.index(axis)],
            markersize=5,
            elinewidth=1.0,
            label=axis,
            zorder=3,
        )
    name_rows(ax, strategies)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def _draw_gains(part: ShotsSlice) -> Figure:
    rows = part.rows("gains", task=None)
    strategies = {row["strategy"] for row in rows}
    figure = new_figure(9.6, 1.5 + 0.42 * len(strategies))
    panels = figure.subplots(1, len(GAINS), sharey=True)
    for ax, measure in zip(panels, GAINS, strict=True):
        plot_gains([r for r in select(rows, measure=measure) if r["axis"]], ax)
        ax.set_title(TITLES[measure], fontsize=10)
    # A label of the whole figure would overlap the legend.
    text = "gain over random selection, in spreads; bars: two standard errors"
    panels[len(GAINS) // 2].set_xlabel(text)
    shown: list[Any] = [*panels[0].get_legend_handles_labels()[0]]
    shown.append(Patch(color=BAND, label="one spread"))
    legend_below(figure, {}, *shown)
    return figure


def _draw_curves(part: ShotsSlice, measure: str) -> Figure:
    """Draw panels by axis and task, or by axis for the mean over tasks."""
    curves = part.rows("curves")
    axes = [axis for axis in AXES if select(curves, axis=axis)]
    counts = sorted({count for row in curves for count in row["counts"]})
    columns = [[task] for task in part.tasks if select(curves, task=task)]
    if len(columns) > TASKS:
        columns = [part.tasks]
    # The legend is cut off in narrower figures.
    figure = new_figure(max(7.0, 1.6 + 2.9 * len(columns)), 0.9 + 2.2 * len(axes))
    panels = figure.subplots(
        len(axes), len(columns), squeeze=False, sharex=True, sharey="col"
    )
    for j, tasks in enumerate(columns):
        references = [r for r in part.rows("references") if r["task"] in tasks]
        levels = {
            name: _level(references, name, measure)
            for name in ((FULL, HEAD) if measure == "score" else (FULL,))
            if measure != "rescaled"
        }
        whole = _level(references, ALL, measure)
        for i, axis in enumerate(axes):
            ax = panels[i, j]
            own = [r for r in select(curves, axis=axis) if r["task"] in tasks]
            plot_curves(_averaged(own, measure), measure, counts, levels, whole, ax)
            if i == 0:
                several = f"mean of {len(tasks)} tasks"
                ax.set_title(
                    plain(tasks[0]) if len(tasks) == 1 else several, fontsize=10
                )
            if j == 0:
                what = "distance" if measure == "rescaled" else "test score"
                ax.set_ylabel(f"{axis}\n{what} (%)")
        if measure == "rescaled":
            panels[0, j].set_ylim(bottom=0)
        panels[-1, j].set_xlabel("r, of each weight")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    shown: list[Any] = [found[name] for name in LOOKS if name in found]
    shown.append(Patch(color=BAND, label="random spread"))
    if levels.get(FULL) is not None:
        shown.append(Line2D([], [], color=LINE, label="full kernel"))
    if levels.get(HEAD) is not None:
        line = Line2D([], [], color=LINE, linestyle=DASHES[1], label="head alone")
        shown.append(line)
    if whole is not None:
        star = Line2D([], [], linestyle="", label="all linear weights", **STAR)
        shown.append(star)
    legend_below(figure, {}, *shown)
    return figure


def _averaged(rows: Sequence[Row], measure: str) -> list[Row]:
    """Return one curve for each strategy, the mean over tasks that have all sizes."""
    averaged = []
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        of_tasks = select(rows, strategy=strategy)
        longest = max((row["counts"] for row in of_tasks), key=len)
        complete = select(of_tasks, counts=longest)
        mean, deviation = (
            np.mean([as_floats(row[measure][key]) for row in complete], axis=0).tolist()
            for key in ("mean", "deviation")
        )
        curve = {"mean": mean, "deviation": deviation}
        averaged.append({"strategy": strategy, "counts": longest, measure: curve})
    return averaged


def _level(references: Iterable[Row], name: str, measure: str) -> float | None:
    """Return the mean over tasks of a reference's measure, in percent."""
    means = [row[measure]["mean"] for row in references if row["name"] == name]
    return 100 * sum(means) / len(means) if means and None not in means else None


def _draw_variance(part: ShotsSlice) -> Figure:
    """Draw the error of random selections and its expectation, by axis."""
    found = part.rows("variance")
    axes = [axis for axis in AXES if select(found, axis=axis)]
    figure = new_figure(max(6.0, 1.4 + 3.7 * len(axes)), 3.7)
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for ax, axis in zip(panels, axes, strict=True):
        for i, task in enumerate(part.tasks):
            rows = select(found, axis=axis, task=task)
            colour, marker = COLOURS[1 + i % 7], MARKERS[i % len(MARKERS)]
            counts = [row["count"] for row in rows]
            expected = np.sqrt(as_floats([row["expected"] for row in rows]))
            ax.plot(counts, 100 * expected, color=colour, linewidth=1.4, zorder=2)
            mean = as_floats([row["measured"]["mean"] for row in rows])
            error = as_floats([row["measured"]["standard_error"] for row in rows])
            low, high = (np.sqrt(np.clip(mean + e, 0, None)) for e in (-error, error))
            middle = np.sqrt(mean)
            ax.errorbar(
                counts,
                100 * middle,
                yerr=100 * np.nan_to_num(np.array([middle - low, high - middle])),
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=1.0,
                label=plain(task),
                zorder=3,
            )
        ax.set(xscale="log", yscale="log", title=axis)
        ax.set_xlabel(f"random {axis} of each weight, r")
        ticks = sorted({row["count"] for row in select(found, axis=axis)})
        ax.set_xticks(ticks, list(map(str, ticks)))
        ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        ax.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        light_grid(ax)
    panels[0].set_ylabel("root mean squared error (%)")
    handles, _ = panels[0].get_legend_handles_labels()
    line = Line2D([], [], color=LINE, linewidth=1.4, label="expected")
    legend_below(figure, {}, *handles, line)
    return figure


def _draw_origins(part: ShotsSlice) -> Figure:
    """Draw the share of the trace by kind of module and layer, mean over tasks."""
    origins = part.rows("origins")
    kinds = list(origins[0]["trace"])
    layers = list(origins[0]["cosine"]["layer"])
    shares = np.array(
        [
            [
                np.mean([row["trace"][kind].get(layer, math.nan) for row in origins])
                for layer in layers
            ]
            for kind in kinds
        ]
    )
    figure = new_figure(2.6 + 0.62 * len(layers) + 2.6, 1.6 + 0.36 * len(kinds))
    grid = figure.add_gridspec(1, 2, width_ratios=[0.62 * len(layers), 2.6])
    ax = figure.add_subplot(grid[0])
    values = np.ma.masked_invalid(100 * shares)
    ax.imshow(values, cmap="Blues", aspect="auto", vmin=0)
    dark = 0.6 * float(values.max())
    for (i, j), value in np.ndenumerate(100 * shares):
        if np.isfinite(value):
            text = "<0.1" if 0 < value < 0.05 else f"{value:.1f}"
            colour = "white" if value > dark else BLACK
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
    short = [layer.removeprefix("layer ") for layer in layers]
    ax.set_xticks(range(len(layers)), short, rotation=45, ha="right")
    ax.set_yticks(range(len(kinds)), [plain(kind) for kind in kinds])
    ax.tick_params(length=0)
    ax.set_title("share of the full kernel's trace (%) by layer", fontsize=10)
    bars = figure.add_subplot(grid[1])
    places = np.arange(len(kinds))
    of_trace = [
        100 * np.mean([total(row["trace"], "kind", k) for row in origins])
        for k in kinds
    ]
    of_size = [100 * total(origins[0]["share"], "kind", kind) for kind in kinds]
    bars.barh(places - 0.18, of_trace, height=0.34, color=BLUE, label="trace")
    bars.barh(places + 0.18, of_size, height=0.34, color=ORANGE, label="parameters")
    name_rows(bars, kinds)
    bars.set_yticklabels([])
    bars.set_title("of all (%)", fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    shown: list[Any] = [*bars.get_legend_handles_labels()[0]]
    legend_below(figure, {}, *shown)
    return figure
