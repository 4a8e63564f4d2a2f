"""Layouts: functions from coordinates to offsets, given by a shape and a stride, and the algebra on them.

**Order.**  Coordinates count lexicographically (row-major, as in torch): the rightmost mode is the fastest.
CuTe counts colexicographically; reverse the modes at every level to go from one to the other.

A layout of leaves (s₁, …, s_r) : (d₁, …, d_r) sends the index i, of digits c₁ … c_r in the mixed radix
s₁ … s_r, to the offset Σ c_k d_k, with d_k ≥ 0.  Nesting groups leaves into modes and moves no offset.

Source: the layout algebra of CuTe (NVIDIA CUTLASS); here every operation is exact or raises SpecError.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from s3lab.algebra import nested
from s3lab.algebra.nested import Ints
from s3lab.errors import SpecError


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Layout:
    """A function from coordinates to offsets, shape : stride, two nested tuples of integers of one form.

    Without a stride it is compact and row-major.  Raises SpecError on an extent below 1, a stride below 0, or
    forms that differ.  Costs O(leaves), as do its operations.

    >>> Layout((2, 3)), Layout((2, 3), (1, 2))(1, 2), Layout((4, (2, 3)))(1, 5)
    (Layout('(2,3):(3,1)'), 5, 11)
    """

    shape: Ints
    stride: Ints

    def __init__(self, shape: Ints, stride: Ints | None = None) -> None:
        shape = nested.check(shape, "extent", least=1)
        if stride is None:
            stride = nested.rebuild(shape, iter(_weights(nested.flatten(shape))))
        stride = nested.check(stride, "stride", least=0)
        if _form(shape) != _form(stride):
            text = f"{nested.write(shape)}:{nested.write(stride)}"
            raise SpecError(f"the two sides of {text} are not nested alike: give one stride per extent")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "stride", stride)

    @classmethod
    def of(cls, *modes: Layout) -> Layout:
        """Return the layout of these modes, of(A, B)(i, j) = A(i) + B(j); SpecError without any.

        >>> Layout.of(Layout(4, 6), Layout((2, 3)))
        Layout('(4,(2,3)):(6,(3,1))')
        """
        return cls(tuple(m.shape for m in modes), tuple(m.stride for m in modes))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a layout from ``shape:stride``, or from its shape alone; SpecError with a caret if it cannot.

        >>> Layout.parse("(4, (2,3)) : (6, (3,1))") == Layout((4, (2, 3)), (6, (3, 1)))
        True
        """
        shape, at = nested.read(text)
        stride, expected = None, "':' or the end of the text"
        if text[at : at + 1] == ":":
            stride, at = nested.read(text, at + 1)
            expected = "the end of the text"
        if at < len(text):
            raise nested.refuse(text, at, expected)
        return cls(shape, stride)

    @property
    def flat(self) -> tuple[tuple[int, int], ...]:
        """The leaves from left to right, as pairs (extent, stride)."""
        return tuple(zip(nested.flatten(self.shape), nested.flatten(self.stride), strict=True))

    @property
    def modes(self) -> tuple[Layout, ...]:
        """The top-level modes; a layout whose shape is an integer is its own one mode."""
        if isinstance(self.shape, int) or isinstance(self.stride, int):
            return (self,)
        return tuple(Layout(s, d) for s, d in zip(self.shape, self.stride, strict=True))

    @property
    def rank(self) -> int:
        """Number of top-level modes."""
        return len(self.modes)

    @property
    def size(self) -> int:
        """Number of coordinates, Π s_k."""
        return prod(nested.flatten(self.shape))

    @property
    def cosize(self) -> int:
        """One more than the largest offset, 1 + Σ (s_k − 1) d_k."""
        return 1 + sum((extent - 1) * stride for extent, stride in self.flat)

    @property
    def is_injective(self) -> bool:
        """Whether no two coordinates share an offset, decided exactly.

        Two do just if Σ c_k d_k = 0 for some |c_k| < s_k, not all 0: searched from the largest stride, within
        what the smaller ones can make up.  No search where each stride exceeds the reach of those below.

        >>> Layout((2, 3), (3, 2)).is_injective, Layout((3, 4), (3, 2)).is_injective
        (True, False)
        """
        falling = [(extent, stride) for stride, extent, _ in reversed(self._rising())]
        if self.size > self.cosize or any(stride == 0 for _, stride in falling):
            return False
        return not _vanishes(falling, total=0, trivial=True)

    @property
    def is_bijective(self) -> bool:
        """Whether the offsets are 0 to size − 1, each once."""
        return self.cosize == self.size and self.is_injective

    def __getitem__(self, mode: int) -> Layout:
        return self.modes[mode]

    def __iter__(self) -> Iterator[Layout]:
        return iter(self.modes)

    def __call__(self, *coordinate: Ints) -> int:
        """Return the offset at a coordinate; an integer may stand for a nested mode, or for all of them.

        Raises SpecError where a coordinate is outside its mode's extent or of another form.
        """
        return self._offset(coordinate[0] if len(coordinate) == 1 else coordinate)

    def _offset(self, coordinate: Ints, path: tuple[int, ...] = ()) -> int:
        place = f"mode {'.'.join(map(str, path))} = {self}" if path else f"the layout {self}"
        if isinstance(coordinate, int):
            if not 0 <= coordinate < self.size:
                raise SpecError(f"index {coordinate} is outside {place}: its extent is {self.size}")
            return sum(c * d for c, (_, d) in zip(self._digits(coordinate), self.flat, strict=True))
        if isinstance(self.shape, int) or len(coordinate) != self.rank:
            raise SpecError(
                f"the coordinate {nested.write(coordinate)} does not fit {place}: give one index below "
                f"{self.size}, or one entry per mode"
            )
        return sum(mode._offset(coordinate[i], (*path, i)) for i, mode in enumerate(self))

    def _digits(self, index: int) -> list[int]:
        extents = nested.flatten(self.shape)
        return [index // weight % extent for extent, weight in zip(extents, _weights(extents), strict=True)]

    def coordinates(self, index: int) -> Ints:
        """Return the nested coordinate of an index, layout(coordinates(i)) = layout(i); SpecError outside.

        >>> Layout((4, (2, 3))).coordinates(11)
        (1, (1, 2))
        """
        if not 0 <= index < self.size:
            raise SpecError(f"index {index} is outside the layout {self}: its extent is {self.size}")
        return nested.rebuild(self.shape, iter(self._digits(index)))

    def offsets(self) -> Iterator[int]:
        """Yield the offset of every index in order, in O(size · leaves)."""
        steps = ([c * stride for c in range(extent)] for extent, stride in self.flat)
        return map(sum, itertools.product(*steps))

    def coalesce(self) -> Layout:
        """Return the same function of the index in the fewest leaves, without nesting.

        >>> Layout((2, (1, 6)), (6, (7, 1))).coalesce(), Layout((2, 6), (1, 2)).coalesce()
        (Layout('12:1'), Layout('(2,6):(1,2)'))
        """
        return _merge(self.flat)

    def compose(self, other: Layout) -> Layout:
        """Return R = self ∘ other, R(i) = self(other(i)), with the modes of ``other``.

        The offsets of ``other`` are sums; self is linear on them while no digit in its mixed radix carries.
        A leaf of ``other`` is cut where its steps carry; SpecError if that leaves a remainder, if leaves of
        ``other`` carry together, or if it reaches past self.size.

        >>> Layout((4, 4), (8, 1)).compose(Layout(4, 5)), Layout((4, 4), (8, 1)).compose(Layout(8, 2))
        (Layout('4:9'), Layout('(4,2):(8,2)'))
        """
        if other.cosize > self.size:
            raise SpecError(f"{self} ∘ {other} is no layout: {other.cosize - 1} is past size {self.size}")
        source = self.coalesce()
        room = [extent - 1 for extent, _ in source.flat]
        leaves: list[Layout] = []
        for extent, step in other.flat:
            left, pieces = extent, []
            while left > 1 and step:
                digits = source._digits(step)
                run = min(left, *(free // c + 1 for free, c in zip(room, digits, strict=True) if c))
                if run == 1 or left % run:
                    raise SpecError(
                        f"{self} ∘ {other} is no layout: {left} steps of {step} carry between the leaves "
                        f"of {source}; use extents that divide or fill those"
                    )
                room = [free - (run - 1) * c for free, c in zip(room, digits, strict=True)]
                pieces.insert(0, Layout(run, source(step)))
                left, step = left // run, step * run
            pieces = pieces or [Layout(extent, 0)]
            leaves.append(Layout.of(*pieces) if len(pieces) > 1 else pieces[0])
        return Layout(
            nested.rebuild(other.shape, (leaf.shape for leaf in leaves)),
            nested.rebuild(other.shape, (leaf.stride for leaf in leaves)),
        )

    def complement(self, size: int) -> Layout:
        """Return the layout C, of rising offsets, for which of(C, self) reaches 0 to size − 1, each once.

        Raises SpecError where there is none: by rising stride, each leaf must start at a multiple of where
        the one below ends, and ``size`` be a multiple of where the last one ends.

        >>> Layout(2, 4).complement(24)
        Layout('(3,4):(8,1)')
        """
        end, gaps = 1, []
        for stride, extent, _ in self._rising():
            if stride == 0 or stride % end:
                raise SpecError(f"{self} has no complement: stride {stride} is no multiple of {end} above 0")
            gaps.insert(0, (stride // end, end))
            end = stride * extent
        if size < 1 or size % end:
            raise SpecError(f"{self} has no complement in {size}: give a multiple of {end} above 0")
        return _merge([(size // end, end), *gaps])

    def divide(self, tile: Layout) -> Layout:
        """Return (rest, tile), which tile and then where in it: self ∘ of(tile.complement(self.size), tile).

        Raises SpecError where the complement or the composition does not exist.

        >>> Layout((4, 8)).divide(Layout((2, 2), (8, 1)))
        Layout('((2,4),(2,2)):((16,2),(8,1))')
        """
        return self.compose(Layout.of(tile.complement(self.size), tile))

    def zipped_divide(self, extents: Sequence[int]) -> Layout:
        """Cut each top-level mode into runs of its extent; return ((rest, …), (tile, …)), one entry per mode.

        Raises SpecError unless there is one extent per mode and each divides its mode.

        >>> Layout((4, 8)).zipped_divide((2, 4))
        Layout('((2,2),(2,4)):((16,4),(8,1))')
        """
        if len(extents) != self.rank:
            raise SpecError(f"{len(extents)} extents for the {self.rank} modes of {self}: give one each")
        cut = [mode.divide(Layout(extent)) for mode, extent in zip(self, extents, strict=True)]
        return Layout.of(Layout.of(*(c[0] for c in cut)), Layout.of(*(c[1] for c in cut)))

    def product(self, other: Layout) -> Layout:
        """Return (copies, self), self repeated on the offsets it leaves free, arranged as ``other``.

        product(other)(j, i) = C(other(j)) + self(i), where C is the complement of self in a size that holds
        all copies.  Raises SpecError where the complement or the composition does not exist.

        >>> Layout(2, 4).product(Layout(8))
        Layout('((2,4),2):((8,1),4)')
        """
        end = max((stride * extent for stride, extent, _ in self._rising()), default=1)
        return Layout.of(self.complement(end * other.cosize).compose(other), self)

    def right_inverse(self) -> Layout:
        """Return R with self(R(i)) = i for all i < R.size; for an injective layout, the longest such.

        >>> Layout((2, 3), (1, 2)).right_inverse(), Layout((3, 4), (8, 1)).right_inverse()
        (Layout('(3,2):(1,3)'), Layout('4:1'))
        """
        end, modes = 1, []
        for stride, extent, weight in self._rising():
            if stride == end:
                modes.insert(0, (extent, weight))
                end *= extent
        return _merge(modes)

    def left_inverse(self) -> Layout:
        """Return R with R(self(i)) = i for all i < self.size.

        Raises SpecError unless, by rising stride, each is a multiple of the one below and not under its end.

        >>> Layout((3, 4), (8, 1)).left_inverse()
        Layout('(3,8):(4,1)')
        """
        below, end, top, modes = 1, 1, (1, 0), []
        for stride, extent, weight in self._rising():
            if stride < end or stride % below:
                raise SpecError(f"{self} has no left inverse: stride {stride} is no multiple of {below} from {end} on")
            modes.insert(0, (stride // below, top[1]))
            below, end, top = stride, stride * extent, (extent, weight)
        return _merge([top, *modes])

    def _rising(self) -> list[tuple[int, int, int]]:
        """Return (stride, extent, weight in the index) of each leaf longer than 1, by rising stride."""
        extents = nested.flatten(self.shape)
        leaves = zip(nested.flatten(self.stride), extents, _weights(extents), strict=True)
        return sorted(leaf for leaf in leaves if leaf[1] > 1)

    def __str__(self) -> str:
        return f"{nested.write(self.shape)}:{nested.write(self.stride)}"

    def __repr__(self) -> str:
        return f"Layout({str(self)!r})"


def _form(ints: Ints) -> Ints:
    return nested.rebuild(ints, itertools.repeat(0))


def _weights(extents: Sequence[int]) -> list[int]:
    """Return what a step in each leaf adds to the index: the product of the extents to its right."""
    return [prod(extents[k + 1 :]) for k in range(len(extents))]


def _merge(leaves: Iterable[tuple[int, int]]) -> Layout:
    """Return the layout of these leaves, less those of extent 1, joined where one goes on from the next."""
    merged: list[tuple[int, int]] = []
    for extent, stride in leaves:
        if extent > 1 and merged and merged[-1][1] == extent * stride:
            merged[-1] = (merged[-1][0] * extent, stride)
        elif extent > 1:
            merged.append((extent, stride))
    if len(merged) < 2:
        return Layout(*(merged or [(1, 0)])[0])
    return Layout(tuple(s for s, _ in merged), tuple(d for _, d in merged))


def _vanishes(falling: Sequence[tuple[int, int]], total: int, trivial: bool) -> bool:
    """Return whether total + Σ c_k d_k = 0 for some |c_k| < s_k, that are not all 0 if ``trivial``."""
    if not falling:
        return total == 0 and not trivial
    (extent, stride), *rest = falling
    reach = sum((s - 1) * d for s, d in rest)
    lowest = 0 if trivial else max(1 - extent, -((reach + total) // stride))
    highest = min(extent - 1, (reach - total) // stride)
    return any(_vanishes(rest, total + c * stride, trivial and c == 0) for c in range(lowest, highest + 1))
