"""Nested tuples of integers: the form of shapes, strides and coordinates, and its text."""

from __future__ import annotations

from collections.abc import Iterator

from s3lab.algebra.sizes import DEEPEST, DIGITS
from s3lab.errors import SpecError

Ints = int | tuple["Ints", ...]


def check(value: object, what: str, least: int) -> Ints:
    """Return ``value``, lists as tuples; SpecError unless its leaves are integers of at least ``least``."""
    if isinstance(value, tuple | list) and value:
        return tuple(check(entry, what, least) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise SpecError(
        f"{value!r} is no {what} of a layout: give an integer of at least {least}, or a nested tuple of such"
    )


def flatten(ints: Ints) -> list[int]:
    """Return the integers from left to right."""
    return [ints] if isinstance(ints, int) else [leaf for entry in ints for leaf in flatten(entry)]


def rebuild(form: Ints, leaves: Iterator) -> Ints:
    """Nest the leaves, in order, the way ``form`` is nested.

    >>> rebuild((0, (0, 0)), iter([1, 2, 3]))
    (1, (2, 3))
    """
    return next(leaves) if isinstance(form, int) else tuple(rebuild(entry, leaves) for entry in form)


def write(ints: Ints) -> str:
    """Return the text that `read` reads: ``4``, ``(4)``, ``(4,(2,3))``."""
    return str(ints) if isinstance(ints, int) else f"({','.join(map(write, ints))})"


def read(text: str, at: int = 0, depth: int = 0) -> tuple[Ints, int]:
    """Read nested integers from column ``at`` on, ``depth`` deep; return them and the column of what follows.

    Raises SpecError with a caret under the first column that cannot be read, or begins what is too deep or too long.

    >>> read("(4, (2,3)) : 1")
    ((4, (2, 3)), 11)
    """
    at = _skip_blanks(text, at)
    if text[at : at + 1] == "(":
        if depth == DEEPEST:
            raise refuse(text, at, f"integers at most {DEEPEST} deep")
        entries: list[Ints] = []
        while not entries or text[at : at + 1] == ",":
            entry, at = read(text, at + 1, depth + 1)
            entries.append(entry)
        if text[at : at + 1] != ")":
            raise refuse(text, at, "',' or ')'")
        return tuple(entries), _skip_blanks(text, at + 1)
    end = at
    while text[end : end + 1].isdecimal() and text[end].isascii():
        end += 1
    if end == at or end > at + DIGITS:
        raise refuse(text, at, f"an integer of at most {DIGITS} digits, or '('")
    return int(text[at:end]), _skip_blanks(text, end)


def refuse(text: str, at: int, expected: str) -> SpecError:
    """Return the error that says what was expected at a column, with a caret under it."""
    found = repr(text[at]) if at < len(text) else "the end of the text"
    return SpecError(
        f"cannot read the layout at column {at + 1}: expected {expected}, found {found}\n    {text}\n    {' ' * at}^"
    )


def _skip_blanks(text: str, at: int) -> int:
    return len(text) - len(text[at:].lstrip())
