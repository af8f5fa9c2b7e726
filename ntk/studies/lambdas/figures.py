"""Figures of a lambda study.

Fine-tuning is blue and filled, its linear twin red and open, references are grey, and
bounds are dashed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ntk.reporting import (
    COLOURS,
    DASHES,
    LINE,
    Row,
    as_float,
    as_floats,
    legend_below,
    light_grid,
    new_figure,
    plain,
)
from ntk.studies.lambdas.records import BOUNDED
from ntk.studies.lambdas.tables import Slice, slices

BLACK, BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY = COLOURS
LOOKS: dict[str, dict[str, Any]] = {
    "movement": {"color": BLUE, "marker": "o", "label": "fine-tuning"},
    "linear_movement": {
        "color": RED,
        "marker": "s",
        "markerfacecolor": "none",
        "label": "linearised",
    },
    "parameter_distance": {"color": BLACK, "marker": "D", "label": "between both"},
    "train_gap": {"color": BLACK, "marker": "D", "label": "same lambda"},
    "gap_to_free": {"color": ORANGE, "marker": "^", "label": "twin with lambda = 0"},
    "accuracy": {"color": BLUE, "marker": "o", "label": "fine-tuning"},
    "linear_accuracy": {
        "color": RED,
        "marker": "s",
        "markerfacecolor": "none",
        "label": "linearised",
    },
}
BOUND_COLOURS = {
    "movement": SKY,
    "descent": GREEN,
    "published": PINK,
    "published_simplified": RED,
    "flow": SKY,
    "minimiser": GREEN,
}
"""Colours of the bounds that are drawn; that of parameters is in the table only."""
OF_MOVEMENT = ("movement", "descent")
OF_GAP = ("published", "published_simplified", "flow", "minimiser")
ROWS = (
    (("movement", "linear_movement", "parameter_distance"), OF_MOVEMENT),
    (("train_gap", "gap_to_free"), OF_GAP),
)
"""Measures and bounds in each row of the figure of distances."""
BOUND = "bound: "
DECADES = 7.0
"""Largest extension of an axis for bounds, in decades."""


def draw_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the figures of a lambda study.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        ``distance`` and ``accuracy`` for each training, by names such as
        ``accuracy-lora-8``.
    """
    figures = {}
    for part in slices(summary):
        figures[f"distance-{part.name}"] = _draw_distances(part)
        figures[f"accuracy-{part.name}"] = _draw_accuracies(part)
    return figures


def plot_measures(
    points: Sequence[Row], measures: Sequence[str], ax: Axes, scale: float = 1.0
) -> Axes:
    """Draw measures against lambda on a log axis, with lambda = 0 apart at the left.

    Args:
        points: Points of a group, ascending in lambda.
        measures: Names of measures in `LOOKS`.
        ax: The axes.
        scale: Factor applied to the numbers.

    Returns:
        The same axes, with one line per measure.
    """
    places = _places(points)
    for measure in measures:
        look = LOOKS[measure]
        values = scale * as_floats([point[measure]["mean"] for point in points])
        errors = scale * np.nan_to_num(
            as_floats([point[measure]["deviation"] for point in points])
        )
        if ax.get_yscale() == "log":
            values[values <= 0] = np.nan
        held = np.array([point["strength"] > 0 for point in points])
        for some, line in ((~held, "none"), (held, "-")):
            if np.isfinite(values[some]).any():
                ax.errorbar(
                    places[some],
                    values[some],
                    yerr=errors[some] if errors[some].any() else None,
                    linestyle=line,
                    markersize=4.5,
                    linewidth=1.3,
                    elinewidth=0.8,
                    zorder=3,
                    **look,
                )
    ax.set_xscale("log")
    strengths = [point["strength"] for point in points]
    labels = [f"{s:g}" if s else "0" for s in strengths]
    ax.set_xticks(places, labels)
    ax.xaxis.set_minor_locator(NullLocator())
    if 0.0 in strengths and len(strengths) > 1:
        ax.axvline(float(np.sqrt(places[0] * places[1])), color="#e0e0e0", linewidth=3)
    light_grid(ax)
    return ax


def plot_bounds(points: Sequence[Row], names: Sequence[str], ax: Axes) -> Axes:
    """Draw bounds against lambda where their conditions hold.

    Args:
        points: Points of a group, ascending in lambda.
        names: Names of the bounds.
        ax: Axes with the measures.

    Returns:
        The same axes, with a dashed line for each bound that holds at some lambda.
    """
    places = _places(points)
    low, high = ax.get_ylim()
    largest = high
    for name in names:
        values = as_floats(
            [(p.get("bounds") or {}).get(name, _NONE)["value"]["mean"] for p in points]
        )
        if not np.isfinite(values).any():
            continue
        ax.plot(
            places,
            values,
            color=BOUND_COLOURS[name],
            linestyle=DASHES[1],
            linewidth=1.4,
            marker=".",
            label=_bound_label(name),
            zorder=2,
        )
        largest = max(largest, float(np.nanmax(values)))
    ax.set_ylim(low, min(1.5 * largest, high * 10**DECADES))
    return ax


_NONE = {"value": {"mean": None}}


def _bound_label(name: str) -> str:
    return f"{BOUND}{BOUNDED[name].title}"


def _draw_distances(part: Slice) -> Figure:
    columns = len(part.groups)
    figure = new_figure(max(7.6, 1.0 + 3.9 * columns), 6.6)
    panels = figure.subplots(len(ROWS), columns, squeeze=False, sharex="col")
    for j, group in enumerate(part.groups):
        points = group["points"]
        for i, (measures, bounds) in enumerate(ROWS):
            ax = panels[i, j]
            ax.set_yscale("log")
            plot_measures(points, measures, ax)
            plot_bounds(points, bounds, ax)
            if j == columns - 1:
                _legend_beside(ax)
        _guide(panels[0, j], points, "movement", -1)
        _guide(panels[1, j], points, "train_gap", -2)
        panels[0, j].set_title(plain(group["task"]), fontsize=10)
        panels[-1, j].set_xlabel("lambda")
    panels[0, 0].set_ylabel("distance of parameters")
    panels[1, 0].set_ylabel("gap, training examples")
    return figure


def _draw_accuracies(part: Slice) -> Figure:
    columns = len(part.groups)
    figure = new_figure(max(6.0, 1.0 + 3.9 * columns), 3.6)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for ax, group in zip(panels, part.groups, strict=True):
        points = group["points"]
        plot_measures(points, ("accuracy", "linear_accuracy"), ax, scale=100)
        start = as_float(points[0]["start_accuracy"]["mean"])
        ax.axhline(100 * start, color=LINE, linewidth=1.1, zorder=1)
        ax.set_title(plain(group["task"]), fontsize=10)
        ax.set_xlabel("lambda")
    panels[0].set_ylabel("test accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True)).values()
    line = Line2D([], [], color=LINE, linewidth=1.1, label="start")
    legend_below(figure, {}, *shown, line)
    return figure


def _places(points: Sequence[Row]) -> np.ndarray:
    """Return the positions of lambdas; 0 is one step left of the smallest, or at 1."""
    strengths = np.array([point["strength"] for point in points], dtype=float)
    above = strengths[strengths > 0]
    step = float(above[1] / above[0]) if len(above) > 1 else 3.0
    smallest = float(above[0]) if len(above) else step
    return np.where(strengths > 0, strengths, smallest / step)


def _guide(ax: Axes, points: Sequence[Row], measure: str, slope: int) -> None:
    """Draw the theoretical slope through the measure at the largest lambda."""
    above = [p for p in points if p["strength"] > 0 and p[measure]["mean"]]
    if len(above) < 2:
        return
    low, high = ax.get_ylim()
    end = above[-1]
    x = np.array([point["strength"] for point in above])
    y = end[measure]["mean"] * (x / end["strength"]) ** slope
    ax.plot(x, y, color=LINE, linewidth=0.9, zorder=1, label=f"slope {slope}")
    ax.set_ylim(low, high)
    if ax.get_legend():
        _legend_beside(ax)


def _legend_beside(ax: Axes) -> None:
    """Put a legend to the right of the axes, measures first, each label once."""
    handles, labels = ax.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    entries = dict(sorted(entries.items(), key=lambda item: item[0].startswith(BOUND)))
    ax.legend(
        entries.values(),
        entries.keys(),
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8.5,
    )
