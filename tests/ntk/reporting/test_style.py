import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from ntk.reporting.style import inline_svg, to_png, to_svg
from ntk.studies.comparison.figures import (
    PANELS,
    STYLED,
    draw_figures,
    plot_accuracy,
    plot_cumulative_power,
    plot_heatmap,
    plot_layer_shares,
    plot_spectrum,
)

NAN = float("nan")


@pytest.fixture
def ax():
    return Figure().subplots()


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def curves(ax):
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}


def test_a_spectrum_is_over_its_trace_and_zeros_are_left_out(ax):
    given = {"full": [6.0, 3.0, 1.0, 0.0], "zero": [0.0, 0.0], "nan": [NAN, None]}
    assert plot_spectrum(given, ax) is ax
    assert legend(ax) == ["full"]
    np.testing.assert_allclose(curves(ax)["full"], [0.6, 0.3, 0.1, NAN])
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel()
    assert ax.get_ylabel()


def test_of_many_curves_the_first_are_told_apart_and_the_rest_are_grey(ax):
    plot_cumulative_power({f"s{i}": [0.1, 0.5, 1.0] for i in range(30)}, ax)
    assert legend(ax) == [*(f"s{i}" for i in range(STYLED)), "22 more"]
    assert len(ax.lines) == 30
    first = ax.lines[:STYLED]
    assert len({line.get_color() for line in first}) == STYLED
    assert len({str(line._unscaled_dash_pattern) for line in first}) == STYLED
    assert len({line.get_color() for line in ax.lines[STYLED:]}) == 1


def test_a_heatmap_shows_the_kernel_and_parts_the_classes(ax):
    kernel = [[1.0, 0.2, NAN], [0.2, 1.0, -0.5], [NAN, -0.5, 1.0]]
    assert plot_heatmap(kernel, ["bad", "bad", "good"], ax) is ax
    (image,) = ax.images
    assert image.get_clim() == (-1, 1)
    np.testing.assert_array_equal(image.get_array().filled(NAN), kernel)
    assert [line.get_ydata()[0] for line in ax.lines] == [1.5, 0.0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["bad", "good"]


def test_layer_shares_are_percent_of_the_trace(ax):
    shares = {
        "full": {"head": 1.0, "layer 0": 2.0, "layer 1": 1.0, "embeddings": 0.0},
        "none": {"layer 0": NAN, "head": None},
    }
    assert plot_layer_shares(shares, ax) is ax
    bars = {c.get_label(): [p.get_width() for p in c] for c in ax.containers}
    assert bars == {"layer 0": [50, 0], "layer 1": [25, 0], "head": [25, 0]}
    assert list(bars) == ["layer 0", "layer 1", "head"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["full", "none"]


def test_accuracies_in_percent_with_levels(ax):
    given = {"full": {"ridge": 0.8, "svm": None}, "rows 3": {"ridge": NAN, "svm": 0.5}}
    levels = {"own": 0.6, "shuffled": NAN, "none": None}
    assert plot_accuracy(given, ax, levels=levels, examples=100) is ax
    assert legend(ax) == ["own", "ridge", "svm"]
    ridge, svm = ax.containers
    np.testing.assert_allclose(ridge.lines[0].get_xdata(), [80])
    np.testing.assert_allclose(svm.lines[0].get_xdata(), [50])
    (bar,) = svm.lines[2][0].get_segments()
    np.testing.assert_allclose(bar[:, 0], [45, 55])
    assert round(svm.lines[0].get_ydata()[0]) == 1


def test_a_record_without_numbers_has_no_figures():
    assert draw_figures({}) == {}
    space = {"name": "full", "eigenvalues": [], "classifiers": {"ridge": None}}
    assert draw_figures({"spaces": [space], "heatmap": {"kernels": {}}}) == {}


def test_figures_of_thirty_spaces():
    spaces = [
        {
            "name": f"rows:{i}",
            "label": "same",
            "role": "reference" if i == 29 else "requested",
            "eigenvalues": [3.0, 2.0, 1.0],
            "classifiers": {"ridge": {"accuracy": i / 30}, "logistic": None},
            "trace_by_layer": {f"layer {k}": 1.0 for k in range(24)},
        }
        for i in range(30)
    ]
    kernels = {f"rows:{i}": [[1.0, 0.0], [0.0, 1.0]] for i in range(30)}
    record = {"spaces": spaces, "heatmap": {"labels": [0, 1], "kernels": kernels}}
    figures = draw_figures(record)
    assert list(figures) == ["spectra", "heatmaps", "layers", "accuracy"]
    # Equal labels are told apart by their names; the reference is first.
    assert legend(figures["spectra"].axes[0])[0] == "rows:29"
    assert sum(bool(ax.images) for ax in figures["heatmaps"].axes) == PANELS
    for name, figure in figures.items():
        assert to_png(figure).startswith(b"\x89PNG"), name
        assert "</svg>" in to_svg(figure), name


def test_nothing_global_is_touched_and_svg_is_deterministic():
    before = dict(mpl.rcParams)
    texts = []
    for _ in range(2):
        figure = Figure()
        plot_spectrum({"a $x_ <b> & _": [2.0, 1.0]}, figure.subplots())
        texts.append(to_svg(figure))
    assert texts[0] == texts[1]
    assert "a $x_ &lt;b&gt; &amp; _" in texts[0]
    assert dict(mpl.rcParams) == before


def test_inline_svgs_do_not_share_ids():
    svg = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1">'
        '<metadata>\n<a href="http://x"/></metadata><style>*{a: b}</style>'
        '<g id="p" clip-path="url(#q)"><use xlink:href="#p"/></g></svg>'
    )
    assert inline_svg(svg, "one") == (
        '<svg role="img" aria-label="one" width="1">'
        "<style>#figure-one svg *{a: b}</style>"
        '<g id="one-p" clip-path="url(#one-q)"><use xlink:href="#one-p"/></g></svg>'
    )
