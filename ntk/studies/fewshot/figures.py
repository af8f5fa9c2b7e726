"""Figures of a few-shot study, from its summary."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ntk.reporting import (
    LINE,
    Row,
    Style,
    Styles,
    legend_below,
    marker,
    new_figure,
    select,
    standard_error,
)
from ntk.studies.fewshot.plots import (
    GREY,
    SPACES,
    Point,
    Points,
    Series,
    plot_change,
    plot_growth,
    plot_ratio,
    plot_scatter,
    plot_scores,
    styles,
    tasks_of,
)
from ntk.studies.fewshot.slices import slices
from ntk.studies.fewshot.summary import Growth, growth_by_sizes

COLUMN = 8
"""Maximal number of tasks in one column of panels; more are split into two."""


def draw_figures(summary: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the figures for which a summary has numbers.

    Args:
        summary: The summary that `summary.collect` returns.

    Returns:
        Some of ``scatter``, ``scores``, ``ratio``, ``growth`` and ``change`` for each
        number of shots, by names such as ``scores-16``, or ``scores-16-signgd`` where
        there are several kinds of kernel.
    """
    looks = styles([*summary["spaces"], *summary["methods"]])
    figures: dict[str, Figure | None] = {}
    for part in slices(summary):
        tuned = _series(part.tuned, "method", ("test",), factor=100)
        kernels = _series(part.kernels, "space", ("test",), factor=100)
        own = {
            task: Point(100 * row["mean"])
            for task, row in part.f0.items()
            if row is not None and row["mean"] is not None
        }
        growth = growth_by_sizes(part.kernels)
        changes = _series(part.tuned, "method", ("kernel_change", "distance"))
        figures |= {
            f"scatter-{part.name}": _draw_scatter(part.comparisons, looks),
            f"scores-{part.name}": _draw_scores(kernels, tuned, own, looks),
            f"ratio-{part.name}": _draw_ratio(part.comparisons, looks),
            f"growth-{part.name}": _draw_growth(growth, looks),
            # The same for every kind of kernel.
            f"change-{part.shots}": _draw_change(changes, looks),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _draw_scatter(rows: Iterable[Row], looks: Styles) -> Figure | None:
    kernels: dict[str, dict[str, Point]] = defaultdict(dict)
    tuned: dict[str, dict[str, Point]] = defaultdict(dict)
    for row in select(rows, same_parameters=True):
        if row["kernel"] is not None and row["tuned"] is not None:
            kernels[row["space"]][row["task"]] = Point(100 * row["kernel"])
            tuned[row["space"]][row["task"]] = Point(100 * row["tuned"])
    if not kernels:
        return None
    figure = new_figure(7.0, 6.6)
    plot_scatter(kernels, tuned, figure.subplots(), looks)
    legend_below(figure, {space: looks[space] for space in kernels})
    return figure


def _draw_scores(
    kernels: Series, tuned: Series, own: Points, looks: Styles
) -> Figure | None:
    lanes = list(dict.fromkeys([*kernels, *(SPACES.get(m, m) for m in tuned)]))
    if not lanes:
        return None
    figure = _by_task(
        tasks_of(*kernels.values(), *tuned.values(), own),
        len(lanes),
        lambda tasks, ax: plot_scores(
            _of(tasks, kernels), _of(tasks, tuned), _only(tasks, own), ax, looks
        ),
    )
    shown = {
        lane: next(looks[n] for n in looks if SPACES.get(n, n) == lane)
        for lane in lanes
    }
    others = []
    if tuned:
        others.append(marker("fine-tuning (open)", Style(GREY, "o"), filled=False))
    if own:
        line = Line2D([], [], color=LINE, linewidth=1.1, label="model itself, f0")
        others.append(line)
    legend_below(figure, shown, *others)
    return figure


def _draw_ratio(rows: Iterable[Row], looks: Styles) -> Figure | None:
    full = select(rows, method="full")
    ratios = _series(full, "space", ("ratio",), error="standard_error")
    if not ratios:
        return None
    figure = _by_task(
        tasks_of(*ratios.values()),
        len(ratios),
        lambda tasks, ax: plot_ratio(_of(tasks, ratios), ax, looks),
    )
    legend_below(figure, {space: looks[space] for space in ratios})
    return figure


def _draw_growth(groups: Growth, looks: Styles) -> Figure | None:
    """Draw one panel per number of training examples."""
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(max(4.6, 2.9 * columns), 2.6 * lines + 0.8)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for ax, (sizes, spaces) in zip(panels, groups.items(), strict=False):
        curves = {
            space: {n: _mean(values.values()) for n, values in points.items()}
            for space, points in spaces.items()
        }
        plot_growth(curves, ax, looks)
        tasks = max(len(v) for points in spaces.values() for v in points.values())
        plural = "s" if tasks > 1 else ""
        ax.set_title(f"{sizes[-1]} examples, {tasks} task{plural}", fontsize=9)
        ax.set_xlabel("training examples")
    for ax in panels[len(groups) :]:
        ax.remove()
    # The panels share this axis, so set it after all are drawn.
    panels[0].set_ylim(bottom=0)
    figure.supylabel("distance to the full kernel", fontsize="medium")
    shown = dict.fromkeys(space for spaces in groups.values() for space in spaces)
    legend_below(figure, {space: looks[space] for space in shown})
    return figure


def _draw_change(changes: Series, looks: Styles) -> Figure | None:
    if not changes:
        return None
    figure = new_figure(8.0, 0.9 + 0.5 * len(changes))
    plot_change(changes, figure.subplots(), looks)
    return figure


def _by_task(
    tasks: Sequence[str], lanes: int, draw: Callable[[Sequence[str], Axes], object]
) -> Figure:
    """Draw rows of tasks, in two columns with a shared scale if there are many."""
    columns = 2 if len(tasks) > COLUMN else 1
    rows = math.ceil(len(tasks) / columns)
    figure = new_figure(
        8.0 if columns == 1 else 10.5, 1.2 + rows * (0.24 + 0.085 * lanes)
    )
    panels = figure.subplots(1, columns, squeeze=False, sharex=True).ravel()
    for i, ax in enumerate(panels):
        draw(tasks[i * rows : (i + 1) * rows], ax)
        # Rows of a shorter column keep their height.
        ax.set_ylim(rows - 0.5, -0.5)
    return figure


def _of(tasks: Sequence[str], series: Series) -> dict[str, Points]:
    return {name: _only(tasks, points) for name, points in series.items()}


def _only(tasks: Sequence[str], points: Points) -> Points:
    return {task: points[task] for task in tasks if task in points}


def _series(
    rows: Iterable[Row],
    field: str,
    path: Sequence[str],
    *,
    factor: float = 1,
    error: str = "deviation",
) -> Series:
    """Return the means that are not None, by a field of the rows and task."""
    series: dict[str, dict[str, Point]] = defaultdict(dict)
    for row in rows:
        spread: Any = row
        for key in path:
            spread = None if spread is None else spread[key]
        if spread is not None and spread["mean"] is not None:
            error_of = spread[error] and factor * spread[error]
            point = Point(factor * spread["mean"], error_of)
            series[row[field]][row["task"]] = point
    return dict(series)


def _mean(values: Iterable[float]) -> Point:
    values = list(values)
    return Point(fmean(values), standard_error(values))
