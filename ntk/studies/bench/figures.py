"""The figure of a benchmark: cost of kernels against examples, tokens and outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntk.reporting import COLOURS, DASHES, MARKERS, light_grid, new_figure, plain

__all__ = ["draw_growth"]


def draw_growth(record: Mapping[str, Any]) -> Figure:
    """Draw how the cost of each kernel grows with the number of examples.

    Args:
        record: Record of `python -m ntk.bench`.

    Returns:
        The figure: seconds at the left, ratios to the floor at the right; below, ratios
        against tokens or outputs if these were varied.
    """
    grown = {
        axis: some
        for axis, some in record.get("growth", {}).items()
        if axis != "models"
    }
    rows = 2 if grown else 1
    figure = new_figure(9.0, 4.0 * rows)
    axes = figure.subplots(rows, 2, squeeze=False)
    left, right = axes[0]
    for ax in axes[1:].flat[len(grown) :]:
        ax.set_axis_off()
    for ax, (axis, some) in zip(axes[1:].flat, grown.items(), strict=False):
        _draw_ratios(ax, axis, some)
    costs = record["costs"]
    n = [cost["examples"] for cost in costs]
    for number, name in enumerate(costs[0]["seconds"]):
        look = _look(number)
        left.plot(
            n, [cost["seconds"][name] for cost in costs], **look, label=plain(name)
        )
        if name in costs[0]["over_floor"]:
            right.plot(n, [cost["over_floor"][name] for cost in costs], **look)
    if costs[0]["operations"] is not None:
        bound = [
            cost["seconds"]["floor"]
            + cost["operations"] / cost["multiply_adds_per_second"]
            for cost in costs
        ]
        left.plot(n, bound, color="#7F7F7F", linewidth=0.8, label="bound of full")
    left.set(xscale="log", yscale="log", xlabel="examples", ylabel="seconds")
    right.set(xscale="log", xlabel="examples", ylabel="time over the floor")
    right.axhline(1, color="#000000", linewidth=0.6)
    for ax in (left, right):
        ax.set_xticks(n, [str(each) for each in n])
        ax.minorticks_off()
        light_grid(ax)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _draw_ratios(ax: Axes, axis: str, some: Sequence[Mapping[str, Any]]) -> None:
    """Draw ratios to the floor against tokens or outputs."""
    at = [one["at"] for one in some]
    for number, name in enumerate(some[0]["seconds"]):
        if name in some[0]["over_floor"]:
            ax.plot(at, [one["over_floor"][name] for one in some], **_look(number))
    ax.set(xscale="log", ylabel="time over the floor")
    ax.set_xlabel(f"{axis}, {some[0]['examples']} examples")
    ax.axhline(1, color="#000000", linewidth=0.6)
    ax.set_xticks(at, [str(each) for each in at])
    ax.minorticks_off()
    light_grid(ax)


def _look(number: int) -> dict[str, Any]:
    """Return the line style of the kernel with this index."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
    }
