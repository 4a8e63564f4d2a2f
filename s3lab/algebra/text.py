"""The text of a spec: a small grammar, read by recursive descent and written back in its shortest form.

    spec    = ratio [ "@" tile ]                         keep N of M blocks along the inputs
            | percent [ "/row" | "/column" ] [ "@" tile ]
            | percent ( "rows" | "columns" )
            | sizes ":" sizes "/" sizes "/" sizes "keep" ( INT | percent )
    ratio   = INT ":" INT
    percent = NUMBER [ "/" INT ] "%"
    tile    = INT "x" INT
    sizes   = "(" entry { "," entry } ")"
    entry   = sizes | term { ( "*" | "/" ) term }
    term    = INT | "M" | "K"

The four groups of the last form are the view's shape and stride, the block and the scope.  This module knows
sizes and budgets only; `s3lab.algebra.spec` gives them their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

from s3lab.errors import SpecError


@dataclass(frozen=True, slots=True)
class Size:
    """A symbolic extent or stride, ``coefficient · M^rows · K^inputs``, that becomes an integer on a shape.

    >>> str(Size.of("K/16")), Size.of("K/16").on(8, 64), Size.of(3).on(8, 64)
    ('K/16', 4, 3)
    """

    coefficient: Fraction
    rows: int = 0
    inputs: int = 0

    @classmethod
    def of(cls, value: int | str | Size) -> Size:
        """Read a size from an integer or from text such as ``"16*K"`` or ``"M/16"``; SpecError if it is neither."""
        if isinstance(value, Size):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(Fraction(value))
        if isinstance(value, str):
            return _Reader(value).whole(_Reader.size)
        raise SpecError(f"{value!r} is no size: give an integer or text such as 'K/16'")

    def __mul__(self, other: Size) -> Size:
        return Size(self.coefficient * other.coefficient, self.rows + other.rows, self.inputs + other.inputs)

    def __truediv__(self, other: Size) -> Size:
        if other.coefficient == 0:
            raise SpecError(f"the size {self}/{other} divides by zero")
        return self * Size(1 / other.coefficient, -other.rows, -other.inputs)

    def on(self, M: int, K: int) -> int:
        """Return the integer this size stands for on a weight (M, K); SpecError unless it is whole."""
        value = self.coefficient * Fraction(M) ** self.rows * Fraction(K) ** self.inputs
        if value.denominator != 1:
            raise SpecError(f"the size {self} is not whole on a weight of M = {M} rows and K = {K} inputs")
        return value.numerator

    def __str__(self) -> str:
        powers = (("M", self.rows), ("K", self.inputs))
        above = [name for name, power in powers for _ in range(power)]
        below = [name for name, power in powers for _ in range(-power)]
        if self.coefficient.numerator != 1 or not above:
            above.insert(0, str(self.coefficient.numerator))
        if self.coefficient.denominator != 1:
            below.insert(0, str(self.coefficient.denominator))
        return "/".join(["*".join(above), *below])


T = TypeVar("T")
Sizes = tuple["Size | Sizes", ...]
Keep = int | Fraction

ONE, ROWS, INPUTS = Size(Fraction(1)), Size(Fraction(1), rows=1), Size(Fraction(1), inputs=1)
IDENTITY: tuple[Sizes, Sizes] = ((ROWS, INPUTS), (INPUTS, ONE))


class Parts(NamedTuple):
    """What a spec's text says: the view's shape and stride, block, scope (all in sizes), and the budget."""

    shape: Sizes
    stride: Sizes
    block: Sizes
    scope: Sizes
    keep: Keep


def read(text: str) -> Parts:
    """Parse the text of a spec; SpecError with a caret under the first column that cannot be read.

    >>> read("2:4").keep, write(read("(M,K):(K,1) / (1,1) / (1,4) keep 2"))
    (2, '2:4')
    """
    return _Reader(text).whole(_Reader.spec)


def write(parts: Parts) -> str:
    """Return the shortest text that `read` turns into the same parts."""
    return _write_short(parts) or (
        f"{write_sizes(parts.shape)}:{write_sizes(parts.stride)} / {write_sizes(parts.block)}"
        f" / {write_sizes(parts.scope)} keep {write_keep(parts.keep)}"
    )


def write_sizes(sizes: Sizes) -> str:
    """Return a group of sizes as text, nested as it is."""
    return "(" + ",".join(str(s) if isinstance(s, Size) else write_sizes(s) for s in sizes) + ")"


def write_keep(keep: Keep) -> str:
    """Return a budget as text: a count, or an exact percentage."""
    if isinstance(keep, int):
        return str(keep)
    percent = keep * 100
    decimal = f"{float(percent):f}".rstrip("0").rstrip(".")
    return f"{decimal}%" if Fraction(decimal) == percent else f"{percent}%"


def _write_short(parts: Parts) -> str | None:
    """Return the short form whose reading gives these very parts, if there is one."""
    budget = write_keep(parts.keep)
    forms = [f"{budget} rows", f"{budget} columns"]
    if all(isinstance(s, Size) and s.rows == s.inputs == 0 for s in parts.block) and len(parts.block) == 2:
        tile = "" if parts.block == (ONE, ONE) else "@{}x{}".format(*parts.block)
        forms += [f"{budget}{tile}", f"{budget}/row{tile}", f"{budget}/column{tile}"]
        forms += [f"{budget}:{parts.scope[-1]}{tile}"]
    for form in forms:
        try:
            if read(form) == parts:
                return form
        except SpecError:
            continue
    return None


class _Token(NamedTuple):
    text: str
    column: int


class _Reader:
    """Recursive descent over the tokens of one text, remembering the column of each."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_split(text))
        self.at = 0

    def whole(self, rule: Callable[[_Reader], T]) -> T:
        result = rule(self)
        if self.peek():
            raise self.error("the end of the spec")
        return result

    def peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def accept(self, *expected: str) -> str:
        """Take the next token if it is one of those expected, else return an empty string."""
        if self.peek() in expected and self.peek():
            self.at += 1
            return self.tokens[self.at - 1].text
        return ""

    def expect(self, *expected: str) -> str:
        token = self.accept(*expected)
        if not token:
            raise self.error(" or ".join(repr(e) for e in expected))
        return token

    def error(self, expected: str, at: int | None = None) -> SpecError:
        at = self.at if at is None else at
        column = self.tokens[at].column if at < len(self.tokens) else len(self.text)
        found = repr(self.tokens[at].text) if at < len(self.tokens) else "the end of the text"
        return SpecError(
            f"cannot read the spec at column {column + 1}: expected {expected}, found {found}\n"
            f"    {self.text}\n    {' ' * column}^"
        )

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
        start = self.at
        self.number("a count of blocks, or a percentage")
        keep = self.percent(start) if self.peek() in ("%", "/") else self.count(start)
        return Parts(shape, stride, block, scope, keep)

    def short(self) -> Parts:
        start = self.at
        self.number("a spec such as '2:4', '50%' or '(M,K):(K,1) / (1,1) / (1,4) keep 2'")
        if self.accept(":"):
            keep = self.count(start)
            width = self.integer("the number of blocks in a scope")
            return Parts(*IDENTITY, self.tile(), (ONE, width), keep)
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
        if not text.isdigit() or int(text) == 0:
            raise self.error("a whole number of blocks to keep, at least 1", at=start)
        return int(text)

    def percent(self, start: int, otherwise: str = "'%'") -> Fraction:
        """Finish the percentage whose number was token `start`."""
        value = Fraction(self.tokens[start].text)
        if self.accept("/"):
            value /= int(self.integer("the divisor of the percentage").coefficient)
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

    def sizes(self) -> Sizes:
        self.expect("(")
        entries: list[Size | Sizes] = [self.entry()]
        while self.expect(",", ")") == ",":
            entries.append(self.entry())
        return tuple(entries)

    def entry(self) -> Size | Sizes:
        return self.sizes() if self.peek() == "(" else self.size()

    def size(self) -> Size:
        size = self.term()
        while sign := self.accept("*", "/"):
            size = size * self.term() if sign == "*" else size / self.term()
        return size

    def term(self) -> Size:
        if name := self.accept("M", "K"):
            return ROWS if name == "M" else INPUTS
        return self.integer("an integer, 'M' (rows) or 'K' (inputs)")

    def integer(self, what: str) -> Size:
        if not self.peek().isdigit():
            raise self.error(what)
        if int(self.peek()) == 0:
            raise self.error(f"{what}, at least 1")
        return Size(Fraction(int(self.number(what))))

    def number(self, what: str) -> Fraction:
        if not self.peek()[:1].isdigit():
            raise self.error(what)
        self.at += 1
        return Fraction(self.tokens[self.at - 1].text)


def _split(text: str):
    """Yield the tokens of a text: numbers, words of letters, and single signs."""
    column = 0
    while column < len(text):
        end = column + 1
        if text[column].isdecimal() and text[column].isascii():
            while end < len(text) and (text[end].isdecimal() or (text[end] == "." and "." not in text[column:end])):
                end += 1
        elif text[column].isalpha():
            while end < len(text) and text[end].isalpha():
                end += 1
        token = text[column:end]
        if not token.isspace():
            yield _Token(token, column)
        column = end
