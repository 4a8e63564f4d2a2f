"""View, Block, Scope and the Spec they make: a pattern of structured sparsity, before any shape is known.

Source: A. Ghriss, *S³: Structured Sparsity Specification*, arXiv 2604.11315.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import gcd
from typing import Any

from s3lab.algebra import fit, text
from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.algebra.sizes import IDENTITY, ONE, Keep, Size, Sizes, write_keep, write_sizes
from s3lab.algebra.text import Parts
from s3lab.errors import ShapeError, SpecError

_NEAR = 1000


def read_sizes(values: object, what: str) -> Sizes:
    """Return a group of sizes from tuples of integers and text; SpecError, saying what it is of, if it is none."""
    if not isinstance(values, tuple | list) or not values:
        raise SpecError(f"{what} {values!r} is no group of sizes: give a tuple such as (1, 'K/16')")
    return tuple(read_sizes(v, what) if isinstance(v, tuple | list) else Size.of(v) for v in values)


def check_shape(shape: object, whose: str = "a weight") -> tuple[int, int]:
    """Return a shape as (M, K); ShapeError, saying whose it is, unless it is two positive integers."""
    if isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape):
        return shape[0], shape[1]
    raise ShapeError(f"{whose} has a shape (M, K) of two positive extents, not {shape!r}")


def bind_sizes(sizes: Sizes, M: int, K: int) -> tuple:
    """Return the integers that a group of sizes stands for on a weight (M, K), nested alike."""
    return tuple(s.on(M, K) if isinstance(s, Size) else bind_sizes(s, M, K) for s in sizes)


def _profile(sizes: Sizes) -> tuple:
    return tuple(() if isinstance(s, Size) else _profile(s) for s in sizes)


@dataclass(frozen=True)
class View:
    """A layout, shape : stride in sizes, that says in which order a weight (M, K) is looked at.

    Shape and stride are tuples of integers and of text in ``M`` and ``K``, nested alike; the default is the
    matrix itself, ``(M,K):(K,1)``.  Raises SpecError where they are not nested alike.

    >>> str(View(("M", "K/16", 8, 2), ("K", 16, 1, 8)))
    '(M,K/16,8,2):(K,16,1,8)'
    """

    shape: Sizes = IDENTITY[0]
    stride: Sizes = IDENTITY[1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", read_sizes(self.shape, "the view's shape"))
        object.__setattr__(self, "stride", read_sizes(self.stride, "the view's stride"))
        if _profile(self.shape) != _profile(self.stride):
            raise SpecError(f"the view {self} has a shape and a stride that are not nested alike")

    def on(self, M: int, K: int) -> Layout:
        """Return the layout on a weight (M, K); SpecError unless it reaches each of the M·K weights just once."""
        layout = Layout(bind_sizes(self.shape, M, K), bind_sizes(self.stride, M, K))
        if layout.size != M * K:
            raise SpecError(
                f"the view {self} holds {layout.size} elements on a weight ({M}, {K}) of {M * K}: its shape must "
                f"multiply to M*K"
            )
        if not layout.is_bijective:
            raise SpecError(
                f"the view {self}, {layout} on a weight ({M}, {K}), overlaps or leaves gaps: its offsets must be "
                f"0 to {M * K - 1}, each once"
            )
        return layout

    def __str__(self) -> str:
        return f"{write_sizes(self.shape)}:{write_sizes(self.stride)}"


MATRIX = View()


@dataclass(frozen=True)
class Block:
    """The atom of pruning, kept or pruned whole: its extent along each mode of the view.

    Raises SpecError for what is no group of sizes.

    >>> str(Block((1, 1, 1, 2)))
    '(1,1,1,2)'
    """

    shape: Sizes = (ONE, ONE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", read_sizes(self.shape, "the block"))

    def __str__(self) -> str:
        return write_sizes(self.shape)


@dataclass(frozen=True)
class Scope:
    """The blocks that compete: how many along each mode of the grid of blocks, and how many of them are kept.

    ``keep`` is a count (int), or a share above 0 and below 1 (Fraction or float) of the scope's blocks, rounded
    to the nearest count, halves up.  With ``each_way`` a scope is a square of blocks, and each of its rows and each
    of its columns keeps that count: transposable N:M.  Raises SpecError for a budget that is neither.

    >>> str(Scope((1, 4), keep=2)), str(Scope(("M", "K"), keep=0.5)), str(Scope((4, 4), keep=2, each_way=True))
    ('(1,4) keep 2', '(M,K) keep 50%', '(4,4) keep 2 each way')
    """

    shape: Sizes
    keep: Keep = field(kw_only=True)
    each_way: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", read_sizes(self.shape, "the scope"))
        keep = Fraction(str(self.keep)) if isinstance(self.keep, float) else self.keep
        counted = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
        shared = isinstance(keep, Fraction) and 0 < keep < 1
        if not (counted or shared):
            raise SpecError(
                f"keep {self.keep!r} is no budget: give a count of blocks, at least 1, or a share above 0 and below 1"
            )
        if self.each_way and not counted:
            raise SpecError(f"keep {write_keep(keep)} each way: give a count of blocks of each row and column")
        object.__setattr__(self, "keep", keep)

    def count(self, blocks: int) -> int:
        """Return how many of a scope's blocks are kept; SpecError where there are none or not so many."""
        keep = self.keep if isinstance(self.keep, int) else int(self.keep * blocks + Fraction(1, 2))
        if not 1 <= keep <= blocks:
            raise SpecError(
                f"keep {write_keep(self.keep)} is {keep} of the {blocks} blocks of a scope "
                f"{write_sizes(self.shape)}: a budget lies between 1 and {blocks}"
            )
        return keep

    def side(self, extents: Sequence[int]) -> int:
        """Return the side of the square of blocks that a scope of these extents is; SpecError where it is none."""
        sides = [n for n in extents if n > 1]
        if len(sides) != 2 or sides[0] != sides[1]:
            raise SpecError(
                f"the scope {self} has {' by '.join(map(str, extents))} blocks: what is kept each way needs a square, "
                "such as (4,4)"
            )
        return sides[0]

    def __str__(self) -> str:
        each_way = " each way" if self.each_way else ""
        return f"{write_sizes(self.shape)} keep {write_keep(self.keep)}{each_way}"


class Pattern(ABC):
    """What `parse` gives: an immutable, hashable description that binds to the shape of a weight, or of several.

    ``str(pattern)`` is its shortest text, and `parse` reads it back.  A notebook shows it as a small drawing.  `Spec`,
    `Then`, `Plus` and `Coupled` are the kinds.  ``bind`` and ``check`` raise SpecError where the pattern does not fit.

    >>> from s3lab import parse
    >>> isinstance(parse("2:4"), Pattern), parse("2:4 each way").names, parse("q: (1,1) & k: (1,1) keep 50%").names
    (True, (), ('q', 'k'))
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors that it couples; none where it is of one weight."""
        return ()

    @abstractmethod
    def bind(self, shape: Any) -> Any:
        """Return the pattern on a weight of ``shape`` (M, K), or on the shapes of several by name."""

    def check(self, mask: Any) -> None:
        """Raise SpecError, naming the place, unless ``mask`` (M, K), or one by name, keeps what this asks for."""
        self.bind(mask.shape).check(mask)

    @abstractmethod
    def __str__(self) -> str: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def _repr_html_(self) -> str | None:
        return fit.show(self)


@dataclass(frozen=True, repr=False)
class Spec(Pattern):
    """A pattern of structured sparsity: a view, cut into blocks, that compete in scopes.

    The modes of block and scope are those of the view: SpecError where their numbers differ.

    >>> str(Spec(View(), Block((1, 1)), Scope((1, 4), keep=2)))
    '2:4'
    >>> Spec(View(), Block((1, 2)), Scope((1, 4), keep=2)).bind((8, 32)).layout
    Layout('((8,4),(1,4),(1,2)):((32,8),(0,2),(0,1))')
    """

    view: View
    block: Block
    scope: Scope

    def __post_init__(self) -> None:
        modes = len(self.view.shape)
        for part in (self.block, self.scope):
            if len(part.shape) != modes:
                raise SpecError(
                    f"the {type(part).__name__.lower()} {write_sizes(part.shape)} has {len(part.shape)} modes and "
                    f"the view {self.view} has {modes}: give one extent per mode"
                )
            if any(not isinstance(size, Size) for size in part.shape):
                raise SpecError(
                    f"the {type(part).__name__.lower()} {write_sizes(part.shape)} is nested: give one extent per mode"
                )

    @property
    def keep(self) -> Keep:
        """The budget of a scope: a count of blocks, or a share."""
        return self.scope.keep

    def bind(self, shape: Sequence[int]) -> Partition:
        """Return the canonical layout on a weight of ``shape`` (M, K).

        Raises ShapeError unless the shape is two positive integers, SpecError where the view does not cover the
        weight or a mode is not divided exactly.
        """
        return _bind_spec(self, check_shape(shape))

    def __str__(self) -> str:
        scope = self.scope
        return text.write(
            Parts(self.view.shape, self.view.stride, self.block.shape, scope.shape, scope.keep, scope.each_way)
        )


@lru_cache(maxsize=256)
def _bind_spec(spec: Spec, shape: tuple[int, int]) -> Partition:
    grid, block = cut(spec.view.on(*shape), bind_sizes(spec.block.shape, *shape), "block", str(spec))
    extents = bind_sizes(spec.scope.shape, *shape)
    scopes, blocks = cut(grid, extents, "scope", str(spec))
    layout = Layout.of(scopes, blocks, block)
    if not spec.scope.each_way:
        return Partition(str(spec), shape, layout, spec.scope.count(layout[1].size))
    side = spec.scope.side(extents)
    lines = spec.scope.count(side)
    return Partition(str(spec), shape, layout, lines * side, lines)


def cut(layout: Layout, extents: tuple[int, ...], what: str, whose: str) -> tuple[Layout, Layout]:
    """Cut each mode of a layout, exactly, and return the modes of the rest and of the tile.

    ``what`` is "block" or "scope", and ``whose`` the text it is of: both for the SpecError where it leaves a remainder.
    """
    units = "elements" if what == "block" else "blocks"
    for mode, extent in enumerate(extents):
        size = layout[mode].size
        if not 1 <= extent <= size or size % extent:
            raise SpecError(
                f"the {what} of {whose} takes {extent} of the {size} {units} along mode {mode} of the view and leaves "
                f"a remainder: use a divisor of {size}, such as {_find_divisor(size, extent)}"
            )
    divided = layout.zipped_divide(extents)
    return divided[0], divided[1]


def _find_divisor(size: int, extent: int) -> int:
    """The largest divisor of a size up to an extent, as far as it is near enough to be found at once."""
    most = min(max(extent, 1), size)
    near = range(most, most - _NEAR, -1)
    return next((n for n in near if size % n == 0), gcd(size, most))
