"""Symbolic sizes in M and K, and the reading of text token by token with a caret where it cannot go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
            reader = Reader(value)
            return reader.whole(reader.size)
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


# What a text may ask for at most: far beyond any layer, and little enough to be read and bound at once.
LONGEST, DIGITS, DEEPEST, PARTS = 20_000, 100, 16, 32

T = TypeVar("T")
Sizes = tuple["Size | Sizes", ...]
Keep = int | Fraction

ONE, ROWS, INPUTS = Size(Fraction(1)), Size(Fraction(1), rows=1), Size(Fraction(1), inputs=1)
IDENTITY: tuple[Sizes, Sizes] = ((ROWS, INPUTS), (INPUTS, ONE))


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


_DECIMALS = frozenset("0123456789")


class Token(NamedTuple):
    text: str
    column: int


class Reader:
    """Recursive descent over the tokens of one text, remembering the column of each.

    Raises SpecError for a text, a number or a nesting beyond `LONGEST`, `DIGITS` and `DEEPEST`.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise SpecError(f"a spec of {len(text)} characters is too long: give at most {LONGEST}")
        self.text = text
        self.tokens = list(split(text))
        self.at = self.depth = 0

    def whole(self, rule: Callable[[], T]) -> T:
        result = rule()
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

    def sizes(self) -> Sizes:
        if self.depth == DEEPEST:
            raise self.error(f"groups of sizes at most {DEEPEST} deep")
        self.depth += 1
        self.expect("(")
        entries: list[Size | Sizes] = [self.entry()]
        while self.expect(",", ")") == ",":
            entries.append(self.entry())
        self.depth -= 1
        return tuple(entries)

    def entry(self) -> Size | Sizes:
        return self.sizes() if self.peek() == "(" else self.size()

    def size(self) -> Size:
        start, size = self.at, self.term()
        while sign := self.accept("*", "/"):
            size = size * self.term() if sign == "*" else size / self.term()
        self.bounded(size.coefficient, start)
        return size

    def term(self) -> Size:
        if name := self.accept("M", "K"):
            return ROWS if name == "M" else INPUTS
        return self.integer("an integer, 'M' (rows) or 'K' (inputs)")

    def integer(self, what: str) -> Size:
        start = self.at
        if not _DECIMALS.issuperset(self.peek() or "-"):
            raise self.error(what)
        if (value := self.number(what)) == 0:
            raise self.error(f"{what}, at least 1", at=start)
        return Size(value)

    def number(self, what: str) -> Fraction:
        if self.peek()[:1] not in _DECIMALS:
            raise self.error(what)
        if len(self.peek()) > DIGITS:
            raise self.error(f"{what}, of at most {DIGITS} digits")
        self.at += 1
        return Fraction(self.tokens[self.at - 1].text)

    def bounded(self, value: Fraction, start: int) -> Fraction:
        """Return a value that was read from token `start` on, if it can be written and read back."""
        if max(value.numerator, value.denominator) >= 10**DIGITS:
            raise self.error(f"numbers that make one of at most {DIGITS} digits", at=start)
        return value


def split(text: str) -> Iterator[Token]:
    """Yield the tokens of a text: numbers in ASCII digits, words of letters, and single signs."""
    column, tile = 0, False
    while column < len(text):
        end = column + 1
        if text[column] in _DECIMALS:
            while text[end : end + 1] in _DECIMALS or (text[end : end + 1] == "." and "." not in text[column:end]):
                end += 1
        elif text[column] == '"' and '"' in text[end:]:
            end = text.index('"', end) + 1
        elif text[column].isalpha() and not tile:
            while end < len(text) and (text[end].isalnum() or text[end] in "._"):
                end += 1
        token = text[column:end]
        if not token.isspace():
            yield Token(token, column)
        tile = token[0] in _DECIMALS and text[end : end + 1] == "x"
        column = end


def is_name(token: str) -> bool:
    return token[:1].isalpha() or (len(token) > 2 and token[0] == '"' == token[-1])
