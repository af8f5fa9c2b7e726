"""Figures of a comparison.

Figures without data are left out. Curves and kernels keep their order; curves after the
first `STYLED` are thin and grey.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ntk.reporting import (
    COLOURS,
    DASHES,
    MARKERS,
    as_float,
    as_floats,
    name_rows,
    new_figure,
    plain,
)

STYLED = 8
"""Number of curves with their own colour and dash pattern."""

PANELS = 8
"""Maximal number of kernels drawn as heatmaps."""

OTHERS = "#c4c4c4"
BLOCKS = {"embeddings": "#E69F00", "head": "#D55E00", "other": "#9a9a9a"}
"""Colours of groups of parameters outside the transformer's blocks."""

CLASSIFIERS = ("ridge", "logistic", "svm")
ROLES = ("reference", "requested", "control")


def plot_spectrum(eigenvalues: Mapping[str, Sequence[float]], ax: Axes) -> Axes:
    """Draw each spectrum, normalised by its trace, against rank on log axes.

    Args:
        eigenvalues: Descending eigenvalues by space; only positive ones are drawn.
        ax: The axes.

    Returns:
        The same axes.
    """
    curves = {}
    for name, given in eigenvalues.items():
        values = as_floats(given)
        total = np.nansum(values)
        if total > 0:
            curves[name] = np.where(values > 0, values, np.nan) / total
    _draw_curves(curves, ax)
    ax.set(yscale="log", xlabel="rank", ylabel="eigenvalue / trace")
    return ax


def plot_cumulative_power(power: Mapping[str, Sequence[float]], ax: Axes) -> Axes:
    """Draw the share of the labels within the leading eigenvectors, against rank.

    Args:
        power: Shares in [0, 1] within the first 1, 2, ... eigenvectors, by space.
        ax: The axes.

    Returns:
        The same axes.
    """
    _draw_curves({name: as_floats(values) for name, values in power.items()}, ax)
    ax.set(
        ylim=(0, 1.03),
        xlabel="number of leading eigenvectors",
        ylabel="share of the labels captured",
    )
    return ax


def plot_heatmap(
    kernel: Sequence[Sequence[float]], labels: Sequence[object], ax: Axes
) -> Axes:
    """Draw a cosine-normalised kernel, with lines between classes.

    Args:
        kernel: ``(n, n)`` entries in [-1, 1], examples sorted by class.
        labels: ``(n,)`` class of each example.
        ax: The axes.

    Returns:
        The same axes; its only image is the kernel.
    """
    values = np.ma.masked_invalid(np.asarray(kernel, dtype=float))
    cmap = mpl.colormaps["RdBu_r"].with_extremes(bad="#bdbdbd")
    ax.imshow(values, cmap=cmap, vmin=-1, vmax=1, interpolation="none")
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    ends = np.cumsum([length for _, length in runs])
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="black", linewidth=0.7)
        ax.axvline(end - 0.5, color="black", linewidth=0.7)
    ax.set(xticks=[], yticks=[])
    if len(runs) <= 10:
        middles = [end - (n + 1) / 2 for end, (_, n) in zip(ends, runs, strict=True)]
        names = [plain(str(label)) for label, _ in runs]
        ax.set_yticks(middles, names, rotation=90, va="center", fontsize=8)
        ax.set_xticks(middles, names, fontsize=8)
        ax.tick_params(length=0)
    return ax


def plot_layer_shares(shares: Mapping[str, Mapping[str, float]], ax: Axes) -> Axes:
    """Draw the share of each layer in the kernels' traces as stacked bars.

    Args:
        shares: Traces by space and layer; normalised to a sum of one per space.
        ax: The axes.

    Returns:
        The same axes, with one bar per space from top to bottom.
    """
    values = {
        space: {k: v for k, v in parts.items() if _finite(v) and v > 0}
        for space, parts in shares.items()
    }
    layers = list(dict.fromkeys(k for v in shares.values() for k in v))
    body = [layer for layer in layers if layer not in BLOCKS]
    layers = ["embeddings", *body, "head", "other"]
    gradient = mpl.colormaps["viridis"](np.linspace(0, 0.95, max(len(body), 1)))
    colours: dict[str, Any] = BLOCKS | dict(zip(body, gradient, strict=False))
    used = [layer for layer in layers if any(layer in v for v in values.values())]
    places = np.arange(len(values))
    left = np.zeros(len(values))
    for layer in used:
        width = np.array(
            [v.get(layer, 0.0) / (sum(v.values()) or 1.0) for v in values.values()]
        )
        ax.barh(
            places,
            100 * width,
            left=100 * left,
            height=0.72,
            color=colours[layer],
            edgecolor="white",
            linewidth=0.4,
            hatch="///" if layer in BLOCKS else None,
            label=plain(layer),
        )
        left += width
    ax.set(xlim=(0, 100), xlabel="share of the kernel's trace (%)")
    name_rows(ax, list(values))
    ax.spines[["top", "right", "left"]].set_visible(False)
    if used:
        _legend(ax, columns=1 + (len(used) - 1) // max(14, len(values)))
    return ax


def plot_accuracy(
    accuracies: Mapping[str, Mapping[str, float | None]],
    ax: Axes,
    *,
    levels: Mapping[str, float | None] | None = None,
    examples: int | None = None,
) -> Axes:
    """Draw the accuracy of each classifier on each space's kernel.

    Args:
        accuracies: Accuracies in [0, 1] by space and classifier; None and NaN are left
            out.
        ax: The axes.
        levels: Accuracies drawn as vertical lines, by name.
        examples: Number of test examples m; if given, bars show the standard error
            sqrt(p (1 - p) / m).

    Returns:
        The same axes, with one row per space from top to bottom.
    """
    spaces = accuracies.values()
    kinds = list(dict.fromkeys(k for v in spaces for k in v if _finite(v[k])))
    for i, kind in enumerate(kinds):
        values = as_floats([space.get(kind) for space in spaces])
        known = np.flatnonzero(np.isfinite(values))
        p = np.clip(values[known], 0, 1)
        ax.errorbar(
            100 * values[known],
            known + (i - (len(kinds) - 1) / 2) * 0.22,
            xerr=100 * np.sqrt(p * (1 - p) / examples) if examples else None,
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[(i + 1) % len(COLOURS)],
            markersize=5,
            elinewidth=0.9,
            label=plain(kind),
        )
    for i, (name, level) in enumerate((levels or {}).items()):
        if _finite(level):
            style: Any = DASHES[(i + 1) % len(DASHES)]
            ax.axvline(
                100 * as_float(level),
                color=("#555555", "#999999")[i % 2],
                linestyle=style,
                linewidth=1.4,
                label=plain(name),
                zorder=0,
            )
    unit = "test accuracy (%)"
    ax.set(xlabel=f"{unit}, bars: one standard error" if examples else unit)
    name_rows(ax, list(accuracies))
    for row in range(0, len(accuracies), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=-1)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        _legend(ax)
    return ax


def draw_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Draw the figures for which a record has numbers.

    Args:
        record: The record of a comparison.

    Returns:
        Some of ``spectra``, ``power``, ``heatmaps``, ``layers``, ``accuracy``.
    """
    spaces = sorted(record.get("spaces") or [], key=_role)
    names = dict(zip((s["name"] for s in spaces), _titles(spaces), strict=True))

    def collect(field: str) -> dict[str, Any]:
        return {names[s["name"]]: s[field] for s in spaces if s.get(field)}

    figures = {}
    if eigenvalues := collect("eigenvalues"):
        figures["spectra"] = figure = new_figure(8.0, 4.2)
        plot_spectrum(eigenvalues, figure.subplots())
    if power := collect("cumulative_power"):
        figures["power"] = figure = new_figure(8.0, 4.2)
        plot_cumulative_power(power, figure.subplots())
    heatmap = record.get("heatmap") or {}
    if kernels := heatmap.get("kernels"):
        order = [name for name in names if name in kernels]
        order += [name for name in kernels if name not in names]
        titled = {names.get(name, name): kernels[name] for name in order}
        classes = (record.get("task") or {}).get("labels") or []
        figures["heatmaps"] = _draw_heatmaps(
            titled, [_class_name(i, classes) for i in heatmap.get("labels") or []]
        )
    if shares := collect("trace_by_layer"):
        figures["layers"] = figure = new_figure(8.0, max(3.2, 1.2 + 0.32 * len(shares)))
        plot_layer_shares(shares, figure.subplots())
    if accuracies := _accuracies(collect("classifiers")):
        height = max(2.6, 1.1 + 0.42 * len(accuracies))
        figures["accuracy"] = figure = new_figure(8.0, height)
        shuffled = ((record.get("shuffled") or {}).get("ridge") or {}).get("mean")
        plot_accuracy(
            accuracies,
            figure.subplots(),
            levels={
                "model's own outputs": (record.get("f0") or {}).get("accuracy"),
                "ridge, shuffled labels": shuffled,
            },
            examples=(record.get("task") or {}).get("test"),
        )
    return figures


def _draw_heatmaps(kernels: Mapping[str, Any], labels: Sequence[object]) -> Figure:
    """Return a figure of the first `PANELS` kernels on one colour scale."""
    shown = list(kernels.items())[:PANELS]
    columns = min(len(shown), 3 if len(shown) in {5, 6} else 4)
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(max(4.0, 2.4 * columns + 0.9), 2.5 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    images: list[AxesImage] = []
    for ax, (name, kernel) in zip(panels, shown, strict=False):
        images += plot_heatmap(kernel, labels, ax).images
        ax.set_title(plain(name), fontsize=9)
    for ax in panels[len(shown) :]:
        ax.remove()
    used = list(panels[: len(shown)])
    figure.colorbar(images[0], ax=used, label="cosine of the gradients", shrink=0.8)
    if len(kernels) > len(shown):
        rest = f"{len(kernels) - len(shown)} more kernels are not shown"
        figure.supxlabel(rest, fontsize=8)
    return figure


def _draw_curves(curves: Mapping[str, Any], ax: Axes) -> None:
    """Draw the first `STYLED` curves in their own styles, and the others in grey."""
    rest = len(curves) - STYLED
    for i, (name, values) in enumerate(curves.items()):
        ranks = np.arange(1, len(values) + 1)
        if i < STYLED:
            style: Any = DASHES[i]
            ax.plot(
                ranks,
                values,
                color=COLOURS[i],
                linestyle=style,
                linewidth=1.7,
                label=plain(name),
                zorder=2 + STYLED - i,
            )
        else:
            label = f"{rest} more" if i == STYLED else "_"
            ax.plot(ranks, values, color=OTHERS, linewidth=0.8, label=label, zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if curves:
        _legend(ax)


def _legend(ax: Axes, columns: int = 1) -> None:
    """Put the legend to the right of the axes."""
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        ncols=columns,
        handlelength=3.2,
    )


def _role(space: Mapping[str, Any]) -> int:
    role = space.get("role")
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _titles(spaces: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the labels of spaces, or their names where labels coincide."""
    labels = [str(space.get("label") or space["name"]) for space in spaces]
    return [
        label if labels.count(label) == 1 else str(space["name"])
        for label, space in zip(labels, spaces, strict=True)
    ]


def _class_name(label: object, classes: Sequence[object]) -> object:
    known = isinstance(label, int) and 0 <= label < len(classes)
    return classes[label] if known else label  # type: ignore[call-overload]


def _accuracies(
    classifiers: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """Return accuracies by space and classifier, for spaces that have any."""
    accuracies = {}
    for space, results in classifiers.items():
        kinds = [k for k in CLASSIFIERS if k in results]
        kinds += [k for k in results if k not in CLASSIFIERS]
        values = {k: as_float((results[k] or {}).get("accuracy")) for k in kinds}
        if any(map(_finite, values.values())):
            accuracies[space] = values
    return accuracies


def _finite(value: object) -> bool:
    return math.isfinite(as_float(value))
