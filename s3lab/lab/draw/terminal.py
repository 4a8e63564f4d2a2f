"""Pattern -> what a terminal shows: a letter for each kept weight, a dot for each pruned one, in colour where there is.

Colour only repeats what the letters say: blocks of a scope differ in letter, the first scope stands in capitals, and
rules part the scopes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from matplotlib.colors import to_rgb
from rich.table import Table
from rich.text import Text
from torch import Tensor

from s3lab.algebra.compose import Bound
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.fit import describe as describe
from s3lab.algebra.fit import fit
from s3lab.algebra.partition import Partition
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import DataError, SpecError
from s3lab.files import replacing
from s3lab.lab.draw import diagram, plot

Shape = tuple[int, int]

_LISTED: Shape = (256, 768)
_MOST_ROWS = 64
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEGEND = "a letter for each block of a scope that is kept, · pruned; capitals and ○: the first scope"


@dataclass(frozen=True)
class Picture:
    """What there is to see of one weight: labels (M, K) of scope and block, the mask (M, K), and a title."""

    title: str
    part: Partition
    scope: Tensor
    block: Tensor
    mask: Tensor


def bind(pattern: Pattern, shapes: dict[str, Shape] | Shape | None = None) -> Bound | CoupledPartition:
    """Bind a pattern to a shape (M, K), or to shapes by name; to the smallest of some that fit where None is given.

    Raises SpecError or ShapeError where it does not fit.
    """
    if shapes is not None:
        if isinstance(shapes, dict) and not pattern.names:
            raise SpecError(f"{pattern} is of one weight: give --shape MxK, without the name {', '.join(shapes)}")
        return pattern.bind(shapes)
    try:
        return fit(pattern)
    except SpecError as error:
        told = "--shape NAME=MxK, for each" if pattern.names else "--shape MxK"
        raise SpecError(f"{error}: give one with {told}") from None


def project(bound: Bound | CoupledPartition, seed: int = 0) -> list[Picture]:
    """Return what a pattern keeps of normal random weights, by magnitude; a picture for each of its weights.

    Blocks and scopes of a composed pattern are those of its first part; those of a coupled one have the same letters
    in all its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(bound, CoupledPartition):
        mask = bound.project(torch.randn(bound.shape, generator=generator).abs())
        return [_picture("", bound.first_part, mask)]
    masks = bound.project({name: torch.randn(shape, generator=generator).abs() for name, shape in bound.shapes.items()})
    pictures, first = [], 0
    for group in bound.groups:
        for name, part in group:
            told = "follows" if name in bound.followers else "leads"
            pictures.append(_picture(f"{name} {told}", part, masks[name], first))
        first += group[0][1].B
    return pictures


def _picture(title: str, part: Partition, mask: Tensor, first: int = 0) -> Picture:
    scope = part.scatter(torch.arange(part.S)[:, None].expand(part.S, part.B))
    block = part.scatter(first + torch.arange(part.B).expand(part.S, part.B))
    return Picture(title, part, scope, block, mask)


def draw(picture: Picture, width: int = 80, ascii_only: bool = False) -> Text:
    """Return a picture as lines of text at most ``width`` wide; what does not fit is left out, and said."""
    M, K = picture.mask.shape
    across, down = _boundaries(picture.scope), _boundaries(picture.scope.T)
    ends = {cell: list(accumulate(cell + rule for rule in _ruled(across, K))) for cell in (2, 1)}
    cell = 2 if ends[2][-1] <= width else 1
    columns = sum(end <= width for end in ends[cell])
    rows = min(M, _MOST_ROWS)
    text, rules = Text(no_wrap=True), _ruled(down, M)
    ruled = _ruled(across, K)[:columns]
    for m in range(rows):
        for k in range(columns):
            text.append(*_cell(picture, m, k, cell))
            if ruled[k]:
                text.append("│" if across[m, k] else " ")
        text.append("\n")
        if rules[m] and m + 1 < rows:
            for k in range(columns):
                text.append(("─" if down[k, m] else " ") * cell)
                if ruled[k]:
                    text.append("┼" if down[k, m] else "│")
            text.append("\n")
    if (rows, columns) != (M, K):
        text.append(f"… {rows}×{columns} of {M}×{K}: a wider terminal, or --out FILE, shows more\n")
    text.right_crop(1)
    return Text(text.plain.translate(_ASCII), spans=text.spans, no_wrap=True) if ascii_only else text


_ASCII = str.maketrans("·○│─┼…×", ".o|-+~x")


def _boundaries(scope: Tensor) -> Tensor:
    """Return where a scope ends before the next column, (M, K) with a last column of False."""
    inside = scope[:, 1:] != scope[:, :-1]
    return torch.cat([inside, torch.zeros_like(scope[:, :1], dtype=torch.bool)], dim=1)


def _ruled(boundaries: Tensor, extent: int) -> list[bool]:
    """Return after which columns to draw a rule: after none where scopes are one wide, and rules would say nothing."""
    if extent > 1 and bool(boundaries[:, :-1].all()):
        return [False] * extent
    return boundaries.any(0).tolist()


def _cell(picture: Picture, m: int, k: int, width: int) -> tuple[str, str]:
    """Return the signs of a weight and their style."""
    first, block = int(picture.scope[m, k]) == 0, int(picture.block[m, k])
    if not picture.mask[m, k]:
        return ("○" if first else "·").ljust(width), "bold" if first else "dim"
    letter = _LETTERS[block % len(_LETTERS)]
    colour = plot.COLOURS[block % 7]
    style = f"{ink_on(colour)} on {colour}"
    return (letter.upper() if first else letter).ljust(width), f"bold {style}" if first else style


def ink_on(colour: str) -> str:
    """Return whether black or white is easier to read on a colour, by its relative luminance (WCAG 2.2).

    >>> ink_on("#F0E442"), ink_on("#0072B2")
    ('black', 'white')
    """
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    luminance = sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def save(pictures: Sequence[Picture], text: str, path: Path) -> None:
    """Draw the pictures of a pattern into a PNG or SVG file; DataError for another suffix."""
    if path.suffix not in (".png", ".svg"):
        raise DataError(f"--out {path}: a pattern is drawn as .png or .svg")
    with plot.style({"svg.hashsalt": text}), replacing(path) as part:
        items = [(picture.title or text, picture.part, picture.mask) for picture in pictures]
        fig = diagram.draw_patterns(items, columns=1, width=plot.COLUMN)
        metadata = {"Software": None} if path.suffix == ".png" else {"Date": None}
        fig.savefig(part, format=path.suffix[1:], dpi=plot.DPI, metadata=metadata)


def list_patterns() -> Table:
    """Return a table of the named patterns: text, density and bits of index a weight, on a weight of 256×768."""
    table = Table("name", box=None, pad_edge=False)
    table.add_column("kept", justify="right")
    table.add_column("index bits", justify="right")
    table.add_column("text", overflow="fold")
    for name, text in PATTERNS.items():
        bound = parse(name).bind(_LISTED)
        table.add_row(name, f"{100 * bound.density:.4g}%", f"{bound.storage_bits:.3g}", text)
    return table
