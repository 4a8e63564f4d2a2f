from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from s3lab.errors import DataError
from s3lab.lab.draw import plot

CURVES = pd.DataFrame({"step": [0, 1, 0, 1], "loss": [3.0, 2.0, 4.0, 2.5], "split": ["train"] * 2 + ["test"] * 2})
BARS = pd.DataFrame(
    [(layer, spec, name, 10.0 + i) for layer in "ab" for spec in ("2:4", "block16") for i, name in enumerate("xyz")],
    columns=["layer", "pattern", "solver", "error_percent"],
)


def luminance(colour: str) -> float:
    return float(np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)))


def test_curves_are_the_table_line_by_line():
    fig = plot.curves(CURVES, "step", "loss", "split", log="y")
    (ax,) = fig.axes
    assert [line.get_label() for line in ax.lines] == ["train", "test"]
    assert [list(line.get_ydata()) for line in ax.lines] == [[3.0, 2.0], [4.0, 2.5]]
    assert ax.get_yscale() == "log" and ax.get_xscale() == "linear"


def test_curves_differ_in_more_than_colour():
    (ax,) = plot.curves(CURVES, "step", "loss", "split").axes
    assert len({line.get_linestyle() for line in ax.lines}) == len({line.get_marker() for line in ax.lines}) == 2


def test_every_row_of_a_table_is_a_bar_of_its_height_with_its_value():
    fig = plot.bars(BARS, "pattern", "error_percent", "solver", panel="layer")
    assert [ax.get_title() for ax in fig.axes] == ["a", "b"]
    for ax in fig.axes:
        assert sorted(bar.get_height() for bar in ax.patches) == [10, 10, 11, 11, 12, 12]
        assert sorted(text.get_text() for text in ax.texts) == [
            "10.0",
            "10.0",
            "11.0",
            "11.0",
            "12.0",
            "12.0",
        ]
        assert ax.get_ylabel() == "error (%)"


def test_bars_of_a_group_neither_overlap_nor_reach_the_next_group():
    (ax,) = plot.bars(BARS[BARS.layer == "a"], "pattern", "error_percent", "solver").axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches)
    assert all(left[1] < right[0] for left, right in pairwise(spans))


def test_bars_are_told_apart_by_hatch_as_well():
    (ax,) = plot.bars(BARS[BARS.layer == "a"], "pattern", "error_percent", "solver").axes
    assert len({bar.get_hatch() for bar in ax.patches}) == 3


def test_the_reference_stands_where_it_is_known():
    table = BARS[BARS.layer == "a"].assign(paper=[11.9, np.nan, np.nan] * 2)
    (ax,) = plot.bars(table, "pattern", "error_percent", "solver", reference="paper", reference_label="paper").axes
    marks = [segment for c in ax.collections if isinstance(c, LineCollection) for segment in c.get_segments()]
    assert {float(y) for segment in marks if segment.size for y in segment[:, 1]} == {11.9}
    assert "paper" in ax.get_legend_handles_labels()[1]


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(DataError, match="no column speed: it has step, loss, split"):
        plot.curves(CURVES, "step", "speed")


def test_two_rows_for_one_bar_are_refused():
    with pytest.raises(DataError, match="pattern, solver must tell"):
        plot.bars(BARS, "pattern", "error_percent", "solver")


def test_neighbouring_colours_differ_in_greyscale():
    light = [luminance(colour) for colour in plot.COLOURS]
    assert all(abs(a - b) > 0.08 for a, b in pairwise(light))


def test_an_interval_that_reaches_over_zero_is_hollow():
    table = pd.DataFrame(
        {"name": ["a", "b", "c"], "mean": [1.0, 0.5, -2.0], "low": [0.5, -1.0, -3.0], "high": [1.5, 2.0, -1.0]}
    )
    (ax,) = plot.intervals(table, "mean", "name", "low", "high").axes
    (bars,) = (c for c in ax.collections if isinstance(c, LineCollection))
    assert [[point[0] for point in bar] for bar in bars.get_segments()] == [[0.5, 1.5], [-1.0, 2.0], [-3.0, -1.0]]
    (marks,) = (c for c in ax.collections if not isinstance(c, LineCollection))
    assert [luminance(tuple(colour[:3])) > 0.99 for colour in marks.get_facecolors()] == [False, True, False]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_ratios_stand_on_a_logarithmic_axis_from_one_on():
    table = pd.DataFrame({"method": ["a", "b"], "text": ["one", "one"], "times": [1.5, 130.0]})
    (ax,) = plot.bars(table, "method", "times", "text", log=True).axes
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] == 1 and ax.get_ylim()[1] > 130


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_costs_and_what_they_buy_stand_on_the_axes_asked_for(log):
    table = pd.DataFrame({"cost": [1.0, 9.0], "left": [900.0, 3.0], "model": ["a", "b"], "frontier": [True, True]})
    (ax,) = plot.tradeoff(table, "cost", "left", "model", log=log).axes
    assert {"x": ax.get_xscale(), "y": ax.get_yscale()} == {axis: "log" if axis in log else "linear" for axis in "xy"}
