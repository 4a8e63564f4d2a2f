"""Spec on a small weight -> Figure: its blocks, its scopes and what a mask keeps, legible without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from s3lab.lab.draw import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from s3lab.algebra.compose import Bound
    from s3lab.algebra.partition import Partition
    from s3lab.algebra.spec import Spec


def draw_pattern(
    bound: Bound,
    mask: Tensor | None = None,
    *,
    title: str = "",
    width: float = plot.COLUMN,
) -> Figure:
    """Draw a spec on a weight, cell by cell: a colour for each block of a scope, an outline round each scope.

    With a ``mask`` (M, K) the kept cells are filled and the pruned ones pale, with a dot.  The first scope's
    outline is heavy, to show which cells belong together where the view scatters them.  Of a composed pattern, blocks
    and scopes are those of its first part.

    >>> from s3lab import parse
    >>> draw_pattern(parse("2:4").bind((4, 8)), title="2 of 4").axes[0].get_title()
    '2 of 4'
    """
    with plot.style():
        rows, columns = bound.shape
        fig = Figure(figsize=(width, width * rows / columns + 0.35), layout="constrained")
        _draw(fig.subplots(), bound, mask, title=title)
    return fig


def draw_patterns(
    items: Sequence[tuple[str, Bound, Tensor | None]], *, columns: int = 2, width: float = plot.PAGE
) -> Figure:
    """Draw several patterns, (title, bound, mask) each, on one page."""
    lines = -(-len(items) // columns)
    tallest = max(bound.shape[0] / bound.shape[1] for _, bound, _ in items)
    with plot.style():
        fig = Figure(figsize=(width, lines * (width / columns * tallest + 0.2)), layout="constrained")
        axes = fig.subplots(lines, columns, squeeze=False).ravel()
        for ax, (title, bound, mask) in zip(axes, items, strict=False):
            _draw(ax, bound, mask, title=title)
        for ax in axes[len(items) :]:
            ax.set_axis_off()
    return fig


def draw_steps(spec: Spec, shape: tuple[int, int], mask: Tensor | None = None, *, width: float = plot.PAGE) -> Figure:
    """Draw how a spec reads a small weight (M, K): view, block, scope, and with a mask what is kept.

    A cell's number is its place in the view's order, then that of its block, then that of its scope.
    """
    partition = spec.bind(shape)
    scope, block = _places(partition)
    order = np.empty(scope.size, dtype=int)
    order[list(spec.view.on(*shape).offsets())] = np.arange(scope.size)
    order = order.reshape(shape)
    shades = 1 - 0.75 * order[..., None] / order.max() * np.ones(3)
    apart = scope * partition.B + block
    with plot.style():
        steps = 3 if mask is None else 4
        fig = Figure(figsize=(width, steps * (width * shape[0] / shape[1] + 0.32)), layout="constrained")
        axes = fig.subplots(steps, squeeze=False)[:, 0]
        _paint(axes[0], shades, f"view {spec.view}: the order of reading", order)
        _paint(axes[1], _colours(block), f"block {spec.block}: cells of a number live or die together", apart)
        _outline(axes[1], apart, "white")
        _paint(axes[2], _colours(block), f"scope {spec.scope}: blocks of a number compete", scope)
        _outline(axes[2], scope, plot.INK, 1.2)
        if mask is not None:
            _draw(axes[3], partition, mask, title="kept, and pruned with a dot")
    return fig


def _draw(ax: Axes, bound: Bound, mask: Tensor | None = None, *, title: str = "") -> None:
    """Draw a spec on the given axes, as `draw_pattern` does."""
    partition = bound.first_part
    scope, block = _places(partition)
    kept = np.ones_like(scope, dtype=bool) if mask is None else mask.cpu().numpy().astype(bool)
    colours = _colours(block)
    _paint(ax, np.where(kept[..., None], colours, 1 - 0.18 * (1 - colours)), title or bound.text)
    dots = [Rectangle((k + 0.42, m + 0.42), 0.16, 0.16) for m, k in zip(*np.nonzero(~kept), strict=True)]
    ax.add_collection(PatchCollection(dots, facecolor=plot.INK, linewidth=0, rasterized=True))
    _outline(ax, scope * partition.B + block, "white")
    _outline(ax, scope, plot.INK, 0.8)
    _outline(ax, scope == 0, "black", 2.2)


def _places(partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """Return the scope of each cell and its block within the scope, (M, K) each."""
    scope, block, _ = np.indices((partition.S, partition.B, partition.E)).reshape(3, -1)
    back = np.argsort(list(partition.layout.offsets()))
    return scope[back].reshape(partition.shape), block[back].reshape(partition.shape)


def _colours(block: np.ndarray) -> np.ndarray:
    return np.array([to_rgb(c) for c in plot.COLOURS[:7]])[block % 7]


def _paint(ax: Axes, colours: np.ndarray, title: str, numbers: np.ndarray | None = None) -> None:
    M, K = colours.shape[:2]
    ax.imshow(colours, extent=(0, K, M, 0), aspect="equal")
    for (m, k), number in [] if numbers is None else np.ndenumerate(numbers):
        dark = colours[m, k] @ (0.2126, 0.7152, 0.0722) < 0.5
        ax.text(k + 0.5, m + 0.52, number, fontsize=5, ha="center", va="center", color="white" if dark else plot.INK)
    ax.set(xlim=(-0.15, K + 0.15), ylim=(M + 0.15, -0.15), xticks=[], yticks=[], title=title)
    ax.set_frame_on(False)


def _outline(ax: Axes, label: np.ndarray, colour: str, thick: float = 0.6) -> None:
    lines = LineCollection(_edges(label), colors=colour, linewidths=thick, capstyle="projecting", rasterized=True)
    ax.add_collection(lines)


def _edges(label: np.ndarray) -> list[list[tuple[int, int]]]:
    """Return the cell edges, as segments, between unequal labels and round the whole."""
    padded = np.pad(label.astype(int), 1, constant_values=-1 if label.dtype != bool else 0)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    return [[(k, m), (k + 1, m)] for m, k in level.tolist()] + [[(k, m), (k, m + 1)] for m, k in upright.tolist()]
