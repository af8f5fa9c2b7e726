"""The figure of a benchmark: seconds of kernels against the number of examples."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ntk.drawing import COLOURS, DASHES, MARKERS, light_grid, new_figure, plain

__all__ = ["draw_growth"]


def draw_growth(record: Mapping[str, Any]) -> Figure:
    """Draw how the cost of each kernel grows with the number of examples.

    Args:
        record: Of `python -m ntk.bench`.

    Returns:
        Seconds at the left, ratios to the floor at the right.
    """
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    costs = record["costs"]
    n = [cost["examples"] for cost in costs]
    for number, name in enumerate(costs[0]["seconds"]):
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number % len(DASHES)],
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 4,
        }
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
