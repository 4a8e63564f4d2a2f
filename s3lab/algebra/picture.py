"""A pattern on a weight -> SVG: a colour for each block of a scope, an outline round each scope, a dot where pruned.

Legible without colour, on light and on dark paper: it takes JupyterLab's colours where it is shown there, and elsewhere
follows what the reader's system prefers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import isqrt
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from s3lab.algebra.partition import Partition

# Okabe and Ito's colours for all kinds of colour vision, ordered so that neighbours differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#000000")
_CYCLE = 7  # black is the colour of outlines
_WIDEST_PX, _CELL_PX = 640, 18
_STYLE = (
    "<style>.s3lab{--s3-ink:var(--jp-content-font-color0,#222);--s3-paper:var(--jp-layout-color0,#fff)}"
    "@media(prefers-color-scheme:dark){.s3lab{--s3-ink:var(--jp-content-font-color0,#eee);"
    "--s3-paper:var(--jp-layout-color0,#111)}}</style>"
)


@dataclass(frozen=True)
class Cells:
    """Weights in the order in which they are drawn, ``width`` of them in a row: of each its scope, block and fate.

    ``offset`` is a weight's place in the row-major matrix, ``block`` is counted within the scope.
    """

    width: int
    offset: Sequence[int]
    scope: Sequence[int]
    block: Sequence[int]
    kept: Sequence[bool]


def find_places(part: Partition, offsets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the scope and the block within it of the weights at these offsets of the row-major matrix.

    >>> from s3lab import parse
    >>> find_places(parse("2:4").bind((1, 8)), [0, 3, 6])
    ([0, 0, 1], [0, 3, 2])
    """
    size = part.shape[0] * part.shape[1]
    if len(offsets) < size // 16:
        number = part.layout.right_inverse()
        ranks = [number(offset) for offset in offsets]
    else:
        rank_of = [0] * size
        for rank, offset in enumerate(part.layout.offsets()):
            rank_of[offset] = rank
        ranks = [rank_of[offset] for offset in offsets]
    B, E = part.B, part.E
    return [rank // (B * E) for rank in ranks], [rank // E % B for rank in ranks]


def sample_mask(part: Partition, seed: int = 0) -> list[bool]:
    """Return a random mask that satisfies a partition, in row-major order.

    >>> from s3lab import parse
    >>> sum(sample_mask(parse("2:4").bind((2, 8))))
    8
    """
    random, mask, side = Random(seed), [False] * (part.shape[0] * part.shape[1]), isqrt(part.B)
    for s in range(part.S):
        if part.lines is None:
            chosen = random.sample(range(part.B), part.keep)
        else:  # the diagonals of a square hit each row and each column once
            rows, columns = (random.sample(range(side), side) for _ in range(2))
            chosen = [rows[i] * side + columns[(i + j) % side] for i in range(side) for j in range(part.lines)]
        for b in chosen:
            for e in range(part.E):
                mask[part.layout(s, b, e)] = True
    return mask


def draw_cells(cells: Cells, *, label: str, first: bool = True) -> str:
    """Return the SVG of some weights; ``label`` is its text for those who do not see it.

    A block of a scope has a colour, full where it is kept, pale and with a dot where it is pruned.  Scopes are
    outlined, and with ``first`` the scope of the first cell heavily.

    >>> cells = Cells(2, range(4), [0, 0, 1, 1], [0, 1, 0, 1], [True, False, False, True])
    >>> draw_cells(cells, label="1:2 on 2×2").count("<path")
    8
    """
    width, height = cells.width, -(-len(cells.offset) // cells.width)
    rows = [slice(start, start + width) for start in range(0, len(cells.offset), width)]
    painted: dict[tuple[int, bool], list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        for look, run in groupby(zip(cells.block[row], cells.kept[row], strict=True)):
            count = len([*run])
            painted.setdefault((look[0] % _CYCLE, bool(look[1])), []).append(f"M{x} {y}h{count}v1h-{count}z")
            x += count
    fills = "".join(
        _path("".join(runs), f'fill="{COLOURS[hue]}" fill-opacity="{1 if kept else 0.18}"')
        for (hue, kept), runs in painted.items()
    )
    dots = "".join(
        f"M{i % width + 0.41:g} {i // width + 0.41:g}h.18v.18h-.18z" for i, kept in enumerate(cells.kept) if not kept
    )
    pruned = _path(dots, 'fill="var(--s3-ink)"')
    blocks = [*zip(cells.scope, cells.block, strict=True)]
    strokes = [
        _path(_edges(blocks, width), 'stroke="var(--s3-paper)" stroke-width=".1"'),
        _path(_edges(cells.scope, width), 'stroke="var(--s3-ink)" stroke-width=".07"'),
    ]
    if first:
        inside = [scope == cells.scope[0] for scope in cells.scope]
        strokes.append(_path(_edges(inside, width), 'stroke="var(--s3-ink)" stroke-width=".2"'))
    cell = min(_CELL_PX, _WIDEST_PX / width)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="s3lab" role="img" aria-label="{escape(label)}" '
        f'width="{cell * (width + 0.3):.0f}" height="{cell * (height + 0.3):.0f}" '
        f'viewBox="-.15 -.15 {width + 0.3:g} {height + 0.3:g}">{_STYLE}{fills}{pruned}'
        f'<g fill="none" stroke-linecap="square">{"".join(strokes)}</g></svg>'
    )


def draw_corner(part: Partition, kept: Callable[[int], bool], *, rows: int = 32, columns: int = 64) -> str:
    """Return the SVG of a weight, or of its upper left corner if it has more ``rows`` or ``columns`` than these.

    ``kept`` says of an offset of the row-major matrix whether its weight is kept.
    """
    M, K = part.shape
    rows, columns = min(M, rows), min(K, columns)
    offsets = [m * K + k for m in range(rows) for k in range(columns)]
    places = find_places(part, offsets)
    return draw_cells(Cells(columns, offsets, *places, [kept(offset) for offset in offsets]), label=part.text)


def _path(d: str, look: str) -> str:
    return f'<path d="{d}" {look}/>' if d else ""


def _edges(labels: Sequence[object], width: int) -> str:
    """Return the edges between cells of unlike labels, and those round the whole."""
    rows = [labels[start : start + width] for start in range(0, len(labels), width)]
    out = []
    for y, row in enumerate(rows):
        above = rows[y - 1] if y else ()
        out += [f"M{x} {y}h1" for x, label in enumerate(row) if not y or above[x] != label]
        out += [f"M{x} {y}v1" for x, label in enumerate(row) if not x or row[x - 1] != label]
        out += [f"M{len(row)} {y}v1"]
    out += [f"M{x} {len(rows)}h1" for x in range(len(rows[-1]))]
    return "".join(out)
