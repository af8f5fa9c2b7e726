"""Plots of a few-shot study on given axes: kernels against fine-tuning, by task.

Spaces of one family share a colour and differ in their markers; the method that trains
the same parameters has the same marker, but open. The figure holds the legend.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from ntk.reporting import COLOURS, LINE, Style, Styles, light_grid, name_rows, plain
from ntk.studies.fewshot.against_tuning import THRESHOLD
from ntk.studies.order import SAME_PARAMETERS, family, order_of_task


class Point(NamedTuple):
    """A number and its error, None if unknown."""

    value: float
    error: float | None = None


Points = Mapping[str, Point]
"""Points by task."""
Series = Mapping[str, Points]
"""Points by space or method, then task."""

SPACES = {method: space for space, method in SAME_PARAMETERS.items()}
"""Spaces of the methods that have another name, by method."""

BLACK, BLUE, RED, GREEN, PINK, SKY, ORANGE, GREY = COLOURS
LOOKS = {
    "full": (BLACK, "o"),
    "rows": (BLUE, "sDp"),
    "columns": (RED, "^v8"),
    "rows+columns": (PINK, "P"),
    "lora": (GREEN, "H"),
    "bias": (SKY, "<"),
    "head": (ORANGE, ">"),
}
"""Colour and markers of a family."""
OTHER_LOOKS = (GREY, "*dh")


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each space or method.

    Args:
        names: Names of spaces and methods; a family's markers are assigned in this
            order and reused if there are too few.
    """
    members: dict[str, list[str]] = defaultdict(list)
    looks = {}
    for name in names:
        space = SPACES.get(name, name)
        group = family(space)
        if space not in members[group]:
            members[group].append(space)
        colour, markers = LOOKS.get(group, OTHER_LOOKS)
        marker = markers[members[group].index(space) % len(markers)]
        looks[name] = Style(colour, marker)
    return looks


def plot_scatter(
    kernels: Series, tuned: Series, ax: Axes, looks: Styles, named: str = "full"
) -> Axes:
    """Draw scores of kernels against those of fine-tuning the same parameters.

    Args:
        kernels: Scores in percent by space.
        tuned: Scores in percent by the same spaces.
        ax: The axes; both scores are equal on the diagonal.
        looks: Styles by space.
        named: The space whose points are labelled with their tasks.

    Returns:
        The same axes, with one collection of points per space.
    """
    values: list[float] = []
    for space, of_tasks in kernels.items():
        tasks = [task for task in of_tasks if task in tuned.get(space, {})]
        pairs = [(tuned[space][task].value, of_tasks[task].value) for task in tasks]
        values += [value for pair in pairs for value in pair]
        ax.scatter(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            marker=looks[space].marker,
            color=looks[space].colour,
            s=34,
            linewidths=0.4,
            edgecolors="white",
            zorder=3,
        )
    low, high = min(values, default=0) - 3, max(values, default=100) + 3
    ax.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.plot([low, high], [low, high], color=LINE, linewidth=0.9, zorder=1)
    both = kernels.get(named, {}).keys() & tuned.get(named, {}).keys()
    places = {t: (tuned[named][t].value, kernels[named][t].value) for t in both}
    _name_beside(ax, places)
    ax.set_xlabel("fine-tuning the same parameters, test score (%)")
    ax.set_ylabel("kernel, test score (%)")
    light_grid(ax)
    return ax


def plot_scores(
    kernels: Series,
    tuned: Series,
    own: Points,
    ax: Axes,
    looks: Styles,
) -> Axes:
    """Draw the scores of kernels and of fine-tuning by task, with error bars.

    Args:
        kernels: Scores in percent by space.
        tuned: Scores in percent by method; open markers.
        own: Scores of the model before training, drawn as lines.
        ax: The axes.
        looks: Styles by space and method.

    Returns:
        The same axes, with one row per task from top to bottom.
    """
    lanes = list(dict.fromkeys([*kernels, *(SPACES.get(m, m) for m in tuned)]))
    tasks = tasks_of(*kernels.values(), *tuned.values(), own)
    for space, points in kernels.items():
        _dots(ax, points, tasks, looks[space], _lane(space, lanes), filled=True)
    for method, points in tuned.items():
        lane = _lane(SPACES.get(method, method), lanes)
        _dots(ax, points, tasks, looks[method], lane, filled=False)
    for task, point in own.items():
        row = tasks.index(task)
        ends = [row - 0.45, row + 0.45]
        ax.plot([point.value] * 2, ends, color=LINE, linewidth=1.1, zorder=1)
    ax.set_xlabel("test score (%), bars: standard deviation over seeds")
    _rows(ax, tasks)
    return ax


def plot_ratio(ratios: Series, ax: Axes, looks: Styles) -> Axes:
    """Draw the ratio of each kernel's score to that of full fine-tuning, by task.

    Args:
        ratios: Ratios by space, 1 for equal scores.
        ax: The axes; a dashed line marks `THRESHOLD`.
        looks: Styles by space.

    Returns:
        The same axes, with one row per task from top to bottom.
    """
    spaces, tasks = list(ratios), tasks_of(*ratios.values())
    ax.axvline(1, color=LINE, linewidth=0.9, zorder=1)
    ax.axvline(THRESHOLD, color=LINE, linewidth=0.9, linestyle=(0, (6, 3)), zorder=1)
    for space, points in ratios.items():
        _dots(ax, points, tasks, looks[space], _lane(space, spaces), filled=True)
    ax.set_xlabel("kernel / full fine-tuning, bars: standard error over seeds")
    _rows(ax, tasks)
    return ax


def plot_growth(
    curves: Mapping[str, Mapping[int, Point]], ax: Axes, looks: Styles
) -> Axes:
    """Draw a measure of kernels against the number of examples.

    Args:
        curves: Values by space and number of examples.
        ax: The axes.
        looks: Styles by space.

    Returns:
        The same axes, with one line per space.
    """
    for space, points in curves.items():
        errors = [point.error or 0 for point in points.values()]
        ax.errorbar(
            list(points),
            [point.value for point in points.values()],
            yerr=errors if any(errors) else None,
            color=looks[space].colour,
            marker=looks[space].marker,
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
        )
    sizes = sorted({size for points in curves.values() for size in points})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    light_grid(ax)
    return ax


def plot_change(changes: Series, ax: Axes, looks: Styles) -> Axes:
    """Draw how far fine-tuning moves the full kernel, by method.

    Args:
        changes: Kernel distances S = 1 - cosine by method.
        ax: The axes.
        looks: Styles by method.

    Returns:
        The same axes, with one row per method from top to bottom: a dot per task and a
        bar at the median.
    """
    for row, (method, points) in enumerate(changes.items()):
        values = [point.value for point in points.values()]
        # Spread vertically, so that equal values do not overlap.
        places = row + np.linspace(-0.22, 0.22, len(values) + 2)[1:-1]
        ax.scatter(
            values,
            places,
            marker=looks[method].marker,
            s=22,
            facecolors="white",
            edgecolors=looks[method].colour,
            linewidths=1.1,
            zorder=3,
        )
        ends = [row - 0.34, row + 0.34]
        ax.plot([float(np.median(values))] * 2, ends, color=BLACK, linewidth=1.6)
    if all(p.value > 0 for points in changes.values() for p in points.values()):
        ax.set_xscale("log")
    ax.set_xlabel("kernel distance S = 1 - cosine; dots: tasks, bar: their median")
    _rows(ax, list(changes))
    return ax


def tasks_of(*series: Points) -> list[str]:
    """Return the tasks of several series in display order.

    Args:
        *series: Points by task.
    """
    return sorted({task for points in series for task in points}, key=order_of_task)


def _dots(
    ax: Axes,
    points: Points,
    tasks: Sequence[str],
    style: Style,
    offset: float,
    *,
    filled: bool,
) -> None:
    """Draw the points of one series, each in its task's row."""
    ax.errorbar(
        [point.value for point in points.values()],
        [tasks.index(task) + offset for task in points],
        xerr=[point.error or 0 for point in points.values()],
        fmt=style.marker,
        color=style.colour,
        markersize=4.6,
        markerfacecolor=style.colour if filled else "white",
        markeredgewidth=0.9,
        elinewidth=0.7,
        zorder=3 if filled else 2.5,
    )


def _lane(name: str, lanes: Sequence[str]) -> float:
    return (lanes.index(name) - (len(lanes) - 1) / 2) * 0.84 / len(lanes)


def _rows(ax: Axes, names: Sequence[str]) -> None:
    """Label the rows and shade every other one."""
    name_rows(ax, names)
    for row in range(0, len(names), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=-1)
    ax.spines[["top", "right", "left"]].set_visible(False)


def _name_beside(ax: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Label points at the right margin, sorted by height and without overlap."""
    low, high = ax.get_ylim()
    gap = (high - low) / 26
    ordered = sorted(places.items(), key=lambda item: (item[1][1], item[0]))
    heights: list[float] = []
    for _, (_, y) in ordered:
        heights.append(max(y, heights[-1] + gap) if heights else y)
    # Push labels down that lie above the top.
    limit = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    for (name, place), height in zip(ordered, heights, strict=True):
        ax.annotate(
            plain(name),
            xy=place,
            xytext=(1.03, height),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            arrowprops={
                "arrowstyle": "-",
                "color": "#b5b5b5",
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
            },
            zorder=2,
        )
