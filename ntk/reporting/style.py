"""Colours, markers, axes, legends and files of all figures.

Figures are made without pyplot, so no global state changes.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rocoft.commands import printable

# Okabe and Ito (2008) without yellow, which is hard to see on white.
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
LINE = "#8a8a8a"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure with constrained layout on white.

    Args:
        width: Width in inches.
        height: Height in inches.
    """
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Label the rows of horizontal bars, the first at the top.

    Args:
        ax: The axes.
        names: Row labels.
    """
    ax.set_yticks(range(len(names)), [plain(name) for name in names])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    ax.set_axisbelow(True)


def light_grid(ax: Axes) -> None:
    """Draw a light grid below the data and remove the top and right spines.

    Args:
        ax: The axes.
    """
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def as_float(value: object) -> float:
    """Return a number as float, anything else as NaN.

    Args:
        value: Any value.
    """
    return float(value) if isinstance(value, Real) else math.nan


def as_floats(values: Sequence[float | None]) -> np.ndarray:
    """Return an array with NaN for None.

    Args:
        values: Numbers or None.
    """
    return np.array([as_float(value) for value in values])


def plain(text: str) -> str:
    """Return a label that matplotlib neither reads as mathematics nor hides.

    Args:
        text: Any text; cut after 33 characters if longer than 34.
    """
    text = printable(text)
    text = text if len(text) <= 34 else f"{text[:33]}…"
    return text.replace("$", r"\$").lstrip("_")


def to_svg(figure: Figure) -> str:
    """Return a figure as reproducible SVG with text as text, not as paths."""
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ntk", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=no_metadata)
    return file.getvalue()


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG at 150 dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """Return an SVG for inlining: its ids start with the given name."""
    svg = svg[max(svg.find("<svg"), 0) :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    # Restrict the rule for "*" to this figure; inlined, it would apply to the page.
    svg = re.sub(r"(<style[^>]*>)\s*\*", rf"\1#figure-{name} svg *", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


class Style(NamedTuple):
    """Colour and marker of a space and of the method with the same parameters."""

    colour: str
    marker: str


Styles = Mapping[str, Style]


def legend_below(figure: Figure, looks: Styles, *others: Line2D) -> None:
    """Put a legend below all axes.

    Args:
        figure: A figure with constrained layout.
        looks: Styles by label.
        *others: Further labelled lines and markers.
    """
    if handles := [*(marker(name, style) for name, style in looks.items()), *others]:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            frameon=False,
            fontsize=8.5,
            ncols=min(5, len(handles)),
        )


def marker(label: str, style: Style, *, filled: bool = True) -> Line2D:
    """Return a legend entry.

    Args:
        label: Text.
        style: Colour and marker.
        filled: Whether the marker is filled, as for kernels; open for fine-tuning.
    """
    return Line2D(
        [],
        [],
        color=style.colour,
        marker=style.marker,
        markerfacecolor=style.colour if filled else "white",
        linestyle="none",
        label=plain(label),
    )
