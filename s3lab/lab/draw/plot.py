"""Table -> Figure: draws what it is given and computes nothing, in colours and marks that survive greyscale.

Every function returns a `matplotlib.figure.Figure` of its own; no global plotting state is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from s3lab.errors import DataError
from s3lab.lab.draw.style import COLOURS, COLUMN, DASHES, HATCHES, INK, MARKERS, PAGE, scale_by_logarithm, style
from s3lab.lab.draw.style import DPI as DPI  # figures are saved at it

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


def curves(
    df: DataFrame,
    x: str,
    y: str,
    hue: str | None = None,
    *,
    panel: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    log: str = "",
    width: float = COLUMN,
    columns: int = 4,
) -> Figure:
    """Draw column ``y`` over ``x``, one line per value of ``hue``.

    ``panel`` gives each of its values axes of their own, ``columns`` in a row, all of one scale.  ``log`` names the
    logarithmic axes, such as "y" or "xy".  Raises DataError if the table lacks a column.
    """
    _expect(df, x, y, hue, panel)
    panels = [(None, df)] if panel is None else list(df.groupby(panel, sort=False))
    names = [None] if hue is None else list(df[hue].unique())
    with style():
        fig, axes = _grid(len(panels), width, columns)
        for ax, (title, part) in zip(axes, panels, strict=True):
            for i, name in enumerate(names):
                rows = part if hue is None else part[part[hue] == name]
                few = len(rows) <= 25
                look = {"color": COLOURS[i % 8], "linestyle": DASHES[i % 4], "marker": MARKERS[i % 8] if few else None}
                ax.plot(rows[x], rows[y], label=name, clip_on=False, **look)  # a mark at the edge is whole
            ax.set(xlabel=xlabel or _words(x), ylabel=ylabel or _words(y), title="" if title is None else str(title))
            ax.grid(True)
            for axis in log:
                scale_by_logarithm(ax, axis)
        _legend(fig, axes, hue)
    return fig


def scatter(
    df: DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    panel: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    width: float = PAGE,
    columns: int = 3,
) -> Figure:
    """Draw column ``y`` against ``x`` of the same unit, a mark per row, and the line where they are equal.

    ``hue`` tells rows apart, ``panel`` gives each of its values axes of their own.  Raises DataError if the table
    lacks a column.
    """
    _expect(df, x, y, hue, panel)
    panels = [(None, df)] if panel is None else list(df.groupby(panel, sort=False))
    top = 1.05 * df[[x, y]].to_numpy().max()
    with style():
        fig, axes = _grid(len(panels), width, columns, tall=1.0)
        for ax, (title, part) in zip(axes, panels, strict=True):
            ax.plot([0, top], [0, top], color=INK, linewidth=0.6)
            for i, name in enumerate(df[hue].unique()):
                rows = part[part[hue] == name]
                ax.scatter(rows[x], rows[y], 14, color=COLOURS[i % 8], marker=MARKERS[i % 8], label=name)
            ax.set(xlim=(0, top), ylim=(0, top), aspect="equal", title="" if title is None else str(title))
            ax.set(xlabel=xlabel or _words(x), ylabel=ylabel or _words(y))
        _legend(fig, axes, hue)
    return fig


def tradeoff(
    df: DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    panel: str | None = None,
    frontier: str = "frontier",
    xlabel: str | None = None,
    ylabel: str | None = None,
    log: str = "x",
    width: float = PAGE,
    columns: int = 3,
) -> Figure:
    """Draw column ``y`` against the cost ``x``, a mark per row, those of the ``frontier`` joined.

    ``log`` names the logarithmic axes.  ``frontier`` names a column of bools.  ``hue`` tells rows apart,
    ``panel`` gives each of its values axes of their own.  Raises DataError if the table lacks a column.
    """
    _expect(df, x, y, hue, panel, frontier)
    panels = [(None, df)] if panel is None else list(df.groupby(panel, sort=False))
    with style({"axes.grid.axis": "both"}):
        fig, axes = _grid(len(panels), width, columns, tall=0.8, share_y=False)
        for ax, (title, part) in zip(axes, panels, strict=True):
            best = part.loc[part[frontier]].sort_values(by=x)
            ax.step(best[x], best[y], where="post", color=INK, linewidth=0.8, zorder=1)
            for i, name in enumerate(df[hue].unique()):
                rows = part[part[hue] == name]
                # more methods than colours: the second round is hollow
                filled = COLOURS[i % 8] if i < 8 else "white"
                ax.scatter(
                    rows[x], rows[y], 22, color=filled, edgecolor=COLOURS[i % 8], marker=MARKERS[i % 8], label=name
                )
            ax.set(title="" if title is None else str(title), xlabel=xlabel or _words(x), ylabel=ylabel or _words(y))
            for axis in log:
                scale_by_logarithm(ax, axis)
            ax.grid(True)
        _legend(fig, axes, hue)
        for ax in axes:
            ax.tick_params(labelleft=True)  # each has a scale of its own
    return fig


def dots(
    df: DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    xlabel: str | None = None,
    log: bool = False,
    width: float = COLUMN,
) -> Figure:
    """Draw column ``x`` as marks on one line per value of ``y``, from the top in order of appearance.

    ``hue`` tells the marks of a line apart; a thin line joins them.  Raises DataError if the table lacks a column.
    """
    _expect(df, x, y, hue)
    lines = list(df[y].unique())
    with style({"axes.grid.axis": "both"}):
        fig = Figure(figsize=(width, 0.17 * len(lines) + 0.8), layout="constrained")
        ax = fig.subplots()
        spans = df.groupby(y, sort=False)[x].agg(["min", "max"]).loc[lines]
        ax.hlines(range(len(lines)), spans["min"], spans["max"], color="#BBBBBB", linewidth=1)
        for i, name in enumerate(df[hue].unique()):
            rows = df[df[hue] == name]
            at = [lines.index(line) for line in rows[y]]
            ax.scatter(rows[x], at, 16, color=COLOURS[i % 8], marker=MARKERS[i % 8], label=name, zorder=3)
        ax.set_yticks(range(len(lines)), [str(line) for line in lines])
        ax.set(xlabel=xlabel or _words(x), ylim=(len(lines) - 0.5, -0.5))
        ax.tick_params(axis="y", length=0)
        ax.grid(True)
        if log:
            scale_by_logarithm(ax, "x")
        _legend(fig, [ax], hue)
    return fig


def intervals(
    df: DataFrame,
    x: str,
    y: str,
    low: str,
    high: str,
    *,
    xlabel: str | None = None,
    width: float = COLUMN,
) -> Figure:
    """Draw column ``x`` as a mark with a bar from ``low`` to ``high``, on a line per row, named by ``y``, from the top.

    A line stands at zero; intervals that reach over it are hollow.  Raises DataError if the table lacks a column.
    """
    _expect(df, x, y, low, high)
    with style({"axes.grid.axis": "both"}):
        fig = Figure(figsize=(width, 0.2 * len(df) + 0.6), layout="constrained")
        ax = fig.subplots()
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.hlines(range(len(df)), df[low], df[high], color=COLOURS[0], linewidth=1.6)
        sure = [COLOURS[0] if one > 0 or other < 0 else "white" for one, other in zip(df[low], df[high], strict=True)]
        ax.scatter(df[x], range(len(df)), 22, color=sure, edgecolor=COLOURS[0], zorder=3)
        ax.set_yticks(range(len(df)), [str(name) for name in df[y]])
        ax.set(xlabel=xlabel or _words(x), ylim=(len(df) - 0.5, -0.5))
        ax.tick_params(axis="y", length=0)
        ax.grid(True)
    return fig


def heat(
    df: DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    panel: str | None = None,
    label: str | None = None,
    digits: int = 0,
    width: float = PAGE,
) -> Figure:
    """Draw ``value`` as the colour of a cell at ``x`` and ``y``, with its number: blue above zero, orange below.

    ``panel`` gives each of its values axes of their own, side by side.  Raises DataError if the table lacks a column.
    """
    import seaborn as sns

    _expect(df, x, y, value, panel)
    panels = [(None, df)] if panel is None else list(df.groupby(panel, sort=False))
    most = np.abs(df[value].to_numpy()).max()
    tall = 0.3 * len(df[y].unique()) + 0.7
    with style({"axes.grid": False}):
        fig = Figure(figsize=(width, tall), layout="constrained")
        axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for i, (ax, (title, part)) in enumerate(zip(axes, panels, strict=True)):
            cells = part.pivot(index=y, columns=x, values=value).reindex(index=df[y].unique(), columns=df[x].unique())
            last = i + 1 == len(panels)
            sns.heatmap(
                cells, ax=ax, cmap="PuOr", vmin=-most, vmax=most, annot=True, fmt=f".{digits}f", annot_kws={"size": 6},
                linewidths=0.5, cbar=last, cbar_kws={"label": label or _words(value)} if last else None,
            )  # fmt: skip
            ax.set(xlabel=_words(x), ylabel=_words(y) if i == 0 else "", title="" if title is None else str(title))
            ax.tick_params(length=0)
            ax.tick_params(axis="y", labelrotation=0)
    return fig


def bars(
    df: DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    panel: str | None = None,
    reference: str | None = None,
    reference_label: str = "reference",
    ylabel: str | None = None,
    digits: int = 1,
    log: bool = False,
    width: float = PAGE,
) -> Figure:
    """Draw ``y`` as one bar per row, labelled with its value: grouped by ``x``, told apart by ``hue``.

    ``log`` has ratios on a logarithmic axis that begins at 1.  ``panel`` gives each of its values a row of axes of
    their own.  ``reference`` names a column of figures to
    compare with, drawn as marks across the bars where they are not missing.  Raises DataError if the table
    lacks a column or has two rows for one bar.

    >>> from pandas import DataFrame
    >>> table = DataFrame({"pattern": ["2:4", "2:4"], "solver": ["obd", "sobs"], "error_percent": [20.0, 10.0]})
    >>> [float(b.get_height()) for b in bars(table, "pattern", "error_percent", "solver").axes[0].patches]
    [20.0, 10.0]
    """
    _expect(df, x, y, hue, panel, reference)
    keys = [column for column in (panel, x, hue) if column is not None]
    if df.duplicated(keys).any():
        raise DataError(f"two rows of the table are one bar: {', '.join(keys)} must tell every row apart")
    panels = [(None, df)] if panel is None else list(df.groupby(panel, sort=False))
    groups, names = list(df[x].unique()), list(df[hue].unique())
    thick = 0.84 / len(names)
    with style():
        fig = Figure(figsize=(width, 0.35 + 1.75 * len(panels)), layout="constrained")
        axes = fig.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for ax, (title, rows) in zip(axes, panels, strict=True):
            for i, name in enumerate(names):
                some = rows[rows[hue] == name]
                at = np.array([groups.index(g) for g in some[x]]) + (i - (len(names) - 1) / 2) * thick
                _bars(ax, at, some[y], thick, i, str(name), digits)
                if reference is not None:
                    _marks(ax, at, some[reference], thick, reference_label if i == 0 else "")
            ax.set(ylabel=ylabel or _words(y), title="" if title is None else str(title))
            ax.set_xticks(range(len(groups)), [str(g) for g in groups])
            ax.tick_params(axis="x", length=0)
            ax.margins(x=0.01, y=0.14)
            ax.set(**({"yscale": "log", "ylim": (1, None)} if log else {}))
            ax.grid(True, axis="y")
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    return fig


def _grid(
    count: int, width: float, columns: int, tall: float = 0.68, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` axes of one scale, ``columns`` in a row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    fig = Figure(figsize=(width, tall * width / columns * rows + 0.3), layout="constrained")
    axes = fig.subplots(rows, columns, sharex=count > 1, sharey=share_y and count > 1, squeeze=False).ravel()
    for ax in axes[count:]:
        ax.set_axis_off()
    return fig, list(axes[:count])


def _legend(fig: Figure, axes: list[Axes], hue: str | None) -> None:
    if hue is not None:
        handles, labels = axes[0].get_legend_handles_labels()
        fits = int(17 * fig.get_figwidth() / (max(map(len, labels)) + 6))  # letters of the legend's size on a line
        fig.legend(handles, labels, ncols=max(1, min(len(labels), fits)), title=_words(hue), loc="outside upper center")
    if len(axes) > 1:
        for ax in axes:
            ax.label_outer()


def _bars(ax: Axes, at: np.ndarray, heights: Any, thick: float, i: int, name: str, digits: int) -> None:
    drawn = ax.bar(
        at, heights, 0.92 * thick, label=name, color=COLOURS[i % 8], hatch=HATCHES[i % 8], edgecolor=INK, linewidth=0.5
    )
    halo = [withStroke(linewidth=1.5, foreground="white")]
    ax.bar_label(drawn, fmt=f"%.{digits}f", fontsize=6, padding=1, path_effects=halo, zorder=4)


def _marks(ax: Axes, at: np.ndarray, levels: Any, thick: float, label: str) -> None:
    ax.hlines(levels, at - 0.5 * thick, at + 0.5 * thick, color="white", linewidth=3)
    ax.hlines(levels, at - 0.5 * thick, at + 0.5 * thick, color="black", linewidth=1.4, label=label)


def _words(column: str) -> str:
    """Turn a column's name into words: a trailing unit goes into brackets."""
    units = {"s": "s", "mib": "MiB", "percent": "%"}
    stem, _, unit = column.rpartition("_")
    return f"{stem.replace('_', ' ')} ({units[unit]})" if stem and unit in units else column.replace("_", " ")


def _expect(df: DataFrame, *columns: str | None) -> None:
    missing = [column for column in columns if column is not None and column not in df.columns]
    if missing:
        raise DataError(f"the table has no column {', '.join(missing)}: it has {', '.join(map(str, df.columns))}")
