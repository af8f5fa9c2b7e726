"""How every figure looks: colours, marks, text, axes, files.

Nothing global is touched: figures are made without pyplot.
"""

import io
import math
import re
from collections.abc import Sequence
from numbers import Real

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), without the yellow that a white ground swallows.
COLOURS = (
    "#000000",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#7F7F7F",
)
DASHES = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
    (0, (9, 3)),
    (0, (1, 1)),
    (0, (3, 3)),
)
MARKERS = "osD^vPX*"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure on white that lays itself out.

    Args:
        width: In inches.
        height: In inches.
    """
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows of horizontal bars, the first at the top.

    Args:
        ax: Where.
        names: Of the rows.
    """
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    ax.set_axisbelow(True)


def light_grid(ax: Axes) -> None:
    """Draw a light grid below everything, without a frame above and at the right.

    Args:
        ax: Where.
    """
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def as_float(value: object) -> float:
    """Return a number, NaN for what is none.

    Args:
        value: Any.
    """
    return float(value) if isinstance(value, Real) else math.nan


def as_floats(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers, NaN for those that are none.

    Args:
        values: Any.
    """
    return np.array([as_float(value) for value in values])


def plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics or hide.

    Args:
        text: Any; what is too long for an axis is cut.
    """
    text = text if len(text) <= 34 else f"{text[:33]}…"
    return text.replace("$", r"\$").lstrip("_")


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG: the same text for the same numbers, text as text."""
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ntk", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG at 150 dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """Return an SVG to stand in a page beside others, its ids begun with a name."""
    svg = svg[max(svg.find("<svg"), 0) :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # Its rule for every element would be one for the whole page.
    svg = re.sub(r"(<style[^>]*>)\s*\*", rf"\1#figure-{name} svg *", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
