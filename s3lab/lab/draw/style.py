"""How the project's figures look: sizes, colours, marks and fonts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.ticker import LogLocator, NullFormatter

from s3lab.algebra.picture import COLOURS as COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

COLUMN, PAGE = 3.4, 7.0  # inches: the width of a column and of a page in a two-column paper
DPI = 200
HATCHES = ("", "////", "....", "xxxx", "----", "++++", "oooo", "****")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK = "#222222"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "savefig.facecolor": "white",
}


def style(more: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Return the context in which the project's figures are drawn and saved."""
    settings: Any = _STYLE | dict(more or {})
    return matplotlib.rc_context(settings)


def scale_by_logarithm(ax: Axes, name: str) -> None:
    """Make an axis logarithmic, labelled at 1, 2 and 5 of each power of ten where its data span but few of them."""
    ax.set(**{f"{name}scale": "log"})
    axis: Axis = getattr(ax, f"{name}axis")
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_data_interval()
    if high < 50 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
