"""The text of a spec: a small grammar, read by recursive descent and written back in its shortest form.

    pattern  = sum | coupling
    sum      = chain { "plus" spec }                     salient blocks, kept in full
    chain    = spec { "then" spec }                      decides among what the one before kept
    spec     = ratio [ "@" tile ] [ "each" "way" ]       keep N of M blocks along the inputs, or along both
             | percent [ "/row" | "/column" ] [ "@" tile ]
             | percent ( "rows" | "columns" )
             | sizes ":" sizes "/" sizes "/" sizes "keep" ( INT [ "each" "way" ] | percent )
    coupling = group { "|" group } "keep" ( INT | percent )        groups share a budget, scope by scope
    group    = tensor { "&" tensor } [ "/" sizes ]                 tensors share the fate of their blocks
    tensor   = name ":" [ sizes ":" sizes "/" ] sizes [ "by" "(" INT { "," INT } ")" ] [ "follows" ]
    name     = word | '"' anything else '"'
    ratio    = INT ":" INT
    percent  = NUMBER [ "/" INT ] "%"
    tile     = INT "x" INT
    sizes    = "(" entry { "," entry } ")"
    entry    = sizes | term { ( "*" | "/" ) term }
    term     = INT | "M" | "K"

The four groups of sizes of a spec are the view's shape and stride, the block and the scope.  Those of a tensor are
its view, if it is not the matrix itself, and its block; after them comes the scope of the group, the whole grid of
blocks if it is missing.  This module knows sizes and budgets only; `spec`, `compose` and `couple` give them their
meaning.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from s3lab.algebra.sizes import (
    IDENTITY,
    INPUTS,
    ONE,
    PARTS,
    ROWS,
    Keep,
    Reader,
    Size,
    Sizes,
    is_name,
    split,
    write_keep,
    write_sizes,
)
from s3lab.errors import SpecError


class Parts(NamedTuple):
    """What a spec's text says: the view's shape and stride, block, scope (all in sizes), and the budget."""

    shape: Sizes
    stride: Sizes
    block: Sizes
    scope: Sizes
    keep: Keep
    each_way: bool = False


class Chain(NamedTuple):
    """What the text of ``first then second`` says."""

    first: Parts
    second: Parts | Chain


class Sum(NamedTuple):
    """What the text of ``main plus salient`` says."""

    main: Parts | Chain | Sum
    salient: Parts


class Member(NamedTuple):
    """What is said of one tensor of a coupling; ``order`` is empty where its grid is taken as it is."""

    name: str
    shape: Sizes
    stride: Sizes
    block: Sizes
    order: tuple[int, ...]
    follows: bool


class Coupling(NamedTuple):
    """What the text of a coupling says: groups of tensors, each with its scope or None, and the budget."""

    groups: tuple[tuple[tuple[Member, ...], Sizes | None], ...]
    keep: Keep


Tree = Parts | Chain | Sum | Coupling


def read(text: str) -> Tree:
    """Parse the text of a pattern; SpecError with a caret under the first column that cannot be read.

    >>> read("2:4").keep, write(read("(M,K):(K,1) / (1,1) / (1,4) keep 2"))
    (2, '2:4')
    """
    reader = _Reader(text)
    return reader.whole(reader.pattern)


def write(parts: Parts) -> str:
    """Return the shortest text that `read` turns into the same parts."""
    return _write_short(parts) or (
        f"{write_sizes(parts.shape)}:{write_sizes(parts.stride)} / {write_sizes(parts.block)}"
        f" / {write_sizes(parts.scope)} keep {write_keep(parts.keep)}{' each way' if parts.each_way else ''}"
    )


def write_member(member: Member) -> str:
    """Return what is said of one tensor of a coupling as text."""
    tokens = [token.text for token in split(member.name)]
    name = member.name if tokens == [member.name] and is_name(member.name) else f'"{member.name}"'
    view = (member.shape, member.stride)
    told = "" if view == IDENTITY else f"{write_sizes(member.shape)}:{write_sizes(member.stride)} / "
    order = f" by ({','.join(map(str, member.order))})" if member.order else ""
    return f"{name}: {told}{write_sizes(member.block)}{order}{' follows' if member.follows else ''}"


def _write_short(parts: Parts) -> str | None:
    """Return the short form whose reading gives these very parts, if there is one."""
    budget = write_keep(parts.keep)
    forms = [f"{budget} rows", f"{budget} columns"]
    if all(isinstance(s, Size) and s.rows == s.inputs == 0 for s in parts.block) and len(parts.block) == 2:
        tile = "" if parts.block == (ONE, ONE) else "@{}x{}".format(*parts.block)
        forms += [f"{budget}{tile}", f"{budget}/row{tile}", f"{budget}/column{tile}"]
        forms += [f"{budget}:{parts.scope[-1]}{tile}", f"{budget}:{parts.scope[-1]}{tile} each way"]
    for form in forms:
        try:
            if read(form) == parts:
                return form
        except SpecError:
            continue
    return None


class _Reader(Reader):
    """Recursive descent over the grammar above."""

    parts = 0

    def pattern(self) -> Tree:
        if is_name(self.peek()):
            return self.coupling()
        pattern: Parts | Chain | Sum = self.chain()
        while self.accept("plus"):
            pattern = Sum(pattern, self.part())
        return pattern

    def chain(self) -> Parts | Chain:
        first = self.part()
        return Chain(first, self.chain()) if self.accept("then") else first

    def part(self) -> Parts:
        """Read a spec that may be one of several: a pattern of too many would be bound one inside the other."""
        self.parts += 1
        if self.parts > PARTS:
            raise self.error(f"at most {PARTS} specs in a pattern")
        return self.spec()

    def coupling(self) -> Coupling:
        groups = [self.group()]
        while self.expect("|", "keep") == "|":
            groups.append(self.group())
        return Coupling(tuple(groups), self.budget())

    def group(self) -> tuple[tuple[Member, ...], Sizes | None]:
        members = [self.member()]
        while self.accept("&"):
            members.append(self.member())
        return tuple(members), self.sizes() if self.accept("/") else None

    def member(self) -> Member:
        name = self.peek()
        if not is_name(name):
            raise self.error("the name of a tensor, in double quotes if it is no plain word")
        self.at += 1
        self.expect(":")
        view, block = IDENTITY, self.sizes()
        if self.accept(":"):
            view = block, self.sizes()
            self.expect("/")
            block = self.sizes()
        order = self.order() if self.accept("by") else ()
        return Member(name.strip('"'), *view, block, order, bool(self.accept("follows")))

    def order(self) -> tuple[int, ...]:
        self.expect("(")
        modes = []
        while not modes or self.expect(",", ")") == ",":
            if "." in self.peek():
                raise self.error("the number of a mode, from 0 on")
            modes.append(int(self.number("the number of a mode, from 0 on")))
        return tuple(modes)

    def spec(self) -> Parts:
        return self.full() if self.peek() == "(" else self.short()

    def full(self) -> Parts:
        shape = self.sizes()
        self.expect(":")
        stride = self.sizes()
        self.expect("/")
        block = self.sizes()
        self.expect("/")
        scope = self.sizes()
        self.expect("keep")
        keep = self.budget()
        return Parts(shape, stride, block, scope, keep, isinstance(keep, int) and self.each_way())

    def budget(self) -> Keep:
        start = self.at
        self.number("a count of blocks, or a percentage")
        return self.percent(start) if self.peek() in ("%", "/") else self.count(start)

    def each_way(self) -> bool:
        return bool(self.accept("each") and self.expect("way"))

    def short(self) -> Parts:
        start = self.at
        self.number("a spec such as '2:4', '50%' or '(M,K):(K,1) / (1,1) / (1,4) keep 2'")
        if self.accept(":"):
            keep = self.count(start)
            width = self.integer("the number of blocks in a scope")
            block, each_way = self.tile(), self.each_way()
            return Parts(*IDENTITY, block, (width if each_way else ONE, width), keep, each_way)
        keep = self.percent(start, otherwise="':' or '%'")
        if self.accept("rows"):
            return Parts(*IDENTITY, (ONE, INPUTS), (ROWS, ONE), keep)
        if self.accept("columns"):
            return Parts(*IDENTITY, (ROWS, ONE), (ONE, INPUTS), keep)
        along = self.expect("row", "column") if self.accept("/") else ""
        block = self.tile()
        grid = ROWS / block[0], INPUTS / block[1]
        scope = {"": grid, "row": (ONE, grid[1]), "column": (grid[0], ONE)}[along]
        return Parts(*IDENTITY, block, scope, keep)

    def count(self, start: int) -> int:
        """Return the number that is token `start`, if it counts blocks."""
        text = self.tokens[start].text
        if "." in text or int(text) == 0:
            raise self.error("a whole number of blocks to keep, at least 1", at=start)
        return int(text)

    def percent(self, start: int, otherwise: str = "'%'") -> Fraction:
        """Finish the percentage whose number was token `start`."""
        value = Fraction(self.tokens[start].text)
        if self.accept("/"):
            value /= self.integer("the divisor of the percentage").coefficient
        self.bounded(value, start)
        if not self.accept("%"):
            raise self.error(otherwise)
        if not 0 < value < 100:
            raise self.error("a percentage above 0 and below 100, the share that is kept", at=start)
        return value / 100

    def tile(self) -> tuple[Size, Size]:
        if not self.accept("@"):
            return ONE, ONE
        rows = self.integer("the rows of a block, as in '@1x2'")
        self.expect("x")
        return rows, self.integer("the columns of a block, as in '@1x2'")
