"""Where the bits of a packed weight go, as a bar: its values, and the index of each round of its pattern."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from s3lab.algebra.picture import COLOURS

if TYPE_CHECKING:
    from s3lab.algebra.compose import Bound
    from s3lab.algebra.coupled import CoupledPartition

# Bits of a value and of the dense one that it stands for; a scale of 16 bits is shared by 128 integers.
STORED = {
    "bfloat16": (16.0, 16.0),
    "float32": (32.0, 32.0),
    "int8": (8 + 16 / 128, 16.0),
    "int4": (4 + 16 / 128, 16.0),
}


def split_bits(bound: Bound | CoupledPartition, stored: str) -> list[tuple[str, float]]:
    """Return what a weight's bits are spent on, and how many a weight: its values, then the index round by round.

    ``stored`` is a key of `STORED`.

    >>> from s3lab import parse
    >>> split_bits(parse("4:8@64x1 then 2:4").bind((64, 16)), "bfloat16")
    [('values', 4.0), ('index of 4:8@64x1', 0.013671875), ('index of 2:4', 0.375)]
    """
    index = [(f"index of {text}", bits) for text, bits in bound.storage_rounds]
    return [("values", bound.density * STORED[stored][0]), *index]


def draw_bits(bound: Bound | CoupledPartition, stored: str) -> str:
    """Return the bits of a weight as HTML: a bar as wide as the dense weight's, and a line for each part of it."""
    dense, parts = STORED[stored][1], split_bits(bound, stored)
    total = sum(bits for _, bits in parts)
    widest = max(dense, total)
    cells, lines = [], []
    for number, (name, bits) in enumerate(parts):
        colour = COLOURS[number % len(COLOURS)]
        cells.append(f'<div style="width:{100 * bits / widest:.4g}%;background:{colour}" title="{escape(name)}"></div>')
        mark = f'<span style="display:inline-block;width:0.8em;height:0.8em;background:{colour}"></span>'
        lines.append(f"<div>{mark} {escape(name)}: {bits:.4g}</div>")
    told = f"{total:.4g} bits a weight, dense {dense:.4g}: {100 * total / dense:.3g}%"
    bar = f'<div style="display:flex;height:0.9em;border:1px solid currentColor">{"".join(cells)}</div>'
    return f'<div style="line-height:1.4"><div>{told}</div>{bar}{"".join(lines)}</div>'
