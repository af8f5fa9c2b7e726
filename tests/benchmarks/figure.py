"""The figure of the cost record: ratio to the floor against the number of examples."""

import io

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Points = dict[int, dict[str, float]]

MARKERS = "sD^vPX*"


def draw(record: dict) -> str:
    """Return the figure as SVG, the same text for the same record."""
    style = {"svg.hashsalt": "cost", "font.size": 9, "axes.spines.top": False}
    with mpl.rc_context(style | {"axes.spines.right": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11.5, 4.4), layout="constrained"
        )
        _kernels(left, record)
        _tools(right, record)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _kernels(axes: Axes, record: dict) -> None:
    sizes = record["sizes"]
    cases = {
        name: {row["n"]: row["ratio_to_floor"][name] for row in sizes}
        for name in sizes[0]["ratio_to_floor"]
    }
    lean = [name for name, points in cases.items() if "limit" in _any(points)]
    limit = _any(cases[lean[0]])["limit"]
    label = f"{len(lean)} kernels of rows, columns, LoRA, biases"
    for name in lean:
        _line(axes, cases[name], label, "tab:blue", "o", linewidth=0.8, markersize=3)
        label = "_"
    axes.axhline(
        limit, color="tab:blue", linestyle=":", label=f"their limit, {limit:g} floors"
    )
    _line(axes, cases["thirty"], "thirty spaces at once", "tab:green", "D")
    _line(axes, cases["full"], "full", "tab:red", "s")
    bound = {row["n"]: row["bound_to_floor"]["median"] for row in sizes}
    factor = sizes[0]["full_to_floor_and_operations"]["limit"]
    axes.plot(
        bound.keys(),
        bound.values(),
        color="tab:red",
        linestyle="--",
        label=f"limit of full, {factor:g} (floor + counted operations)",
    )
    axes.set_ylim(bottom=0)
    _finish(axes, list(bound), "kernels of this package")
    axes.legend(frameon=False, fontsize=8)


def _tools(axes: Axes, record: dict) -> None:
    ours = {row["n"]: row["ratio_to_floor"]["full"] for row in record["sizes"]}
    _line(axes, ours, "this package, full", "tab:red", "s")
    names = [name for row in record["peers"] for name in row["tools"]]
    number = 0
    for name in dict.fromkeys(names):
        points = {
            row["n"]: row["tools"][name]["ratio_to_floor"]
            for row in record["peers"]
            if "ratio_to_floor" in row["tools"].get(name, {})
        }
        if not points or name in ("floor", "ours"):
            continue
        shown = "this package, trace" if name == "ours, trace" else name
        colour = "tab:pink" if name == "ours, trace" else f"C{4 + number}"
        if name != "ours, trace":
            number += 1
        if colour == "C6":  # As pink as ours.
            colour = "black"
        _line(axes, points, shown, colour, MARKERS[number % len(MARKERS)])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    _finish(axes, list(ours), "the same kernel by other tools")
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(frameon=False, fontsize=8, **beside)


def _line(
    axes: Axes, points: Points, label: str, colour: str, marker: str, **style: float
) -> None:
    """Draw medians with bars from minimum to maximum."""
    middle = [p["median"] for p in points.values()]
    down = [p["median"] - p["min"] for p in points.values()]
    up = [p["max"] - p["median"] for p in points.values()]
    axes.errorbar(
        list(points),
        middle,
        [down, up],
        label=label,
        color=colour,
        marker=marker,
        elinewidth=0.8,
        **{"markersize": 5, "linewidth": 1.4, **style},
    )


def _any(points: Points) -> dict[str, float]:
    return next(iter(points.values()))


def _finish(axes: Axes, sizes: list[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("examples n")
    axes.set_ylabel("time, in floors (forward and two backwards)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
