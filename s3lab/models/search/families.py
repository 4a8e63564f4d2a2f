"""Families of specs: a text with one place left open, such as ``{n}:16``, and the rungs that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from s3lab.errors import SpecError

MOST = 256  # rungs that are tried on one matrix
_STEP, _WHOLE = 5, 100  # of percentages, where the text tells no range


@dataclass(frozen=True)
class Family:
    """A text around one open place, and the whole numbers that may stand there: all from ``first`` to ``last``.

    Where ``open``, the text told no range, and numbers whose spec does not fit a matrix are no rungs of it; without a
    ``last`` they go on from 1 as long as it fits.

    >>> family = read_family("{n in 4..8 by 2}:16")
    >>> list(family), str(family)
    (['4:16', '6:16', '8:16'], '{n in 4..8 by 2}:16')
    """

    text: str
    before: str
    after: str
    first: int
    last: int | None
    step: int
    open: bool = False

    def __iter__(self) -> Iterator[str]:
        """Yield the specs, from the sparsest on."""
        last = self.first + (MOST - 1) * self.step if self.last is None else self.last
        return (f"{self.before}{value}{self.after}" for value in range(self.first, last + 1, self.step))

    def __str__(self) -> str:
        return self.text


def read_family(text: str) -> Family:
    """Return the family of a text with one open place:

    =====================  ========================================================
    ``{n}``                1, 2, 3, …, as long as the spec fits
    ``{p}``                5, 10, …, 95, those that fit: a percentage
    ``{n in 4..12}``       4, 5, …, 12
    ``{p in 40..60 by 2}`` 40, 42, …, 60
    =====================  ========================================================

    The rest is a spec as `parse` reads it, or a structure such as ``mlp-channels keep {p}%``; that all is kept is a
    rung of each family, too, and is not told.  Raises SpecError for a text without an open place, with a second one,
    or with one that is none of the above.

    >>> [*read_family("{p}%/row")][-2:]
    ['90%/row', '95%/row']
    """
    before, opened, rest = text.partition("{")
    place, closed, after = rest.partition("}")
    if not (opened and closed) or {"{", "}"} & {*before, *after}:
        raise SpecError(f"the family {text!r} leaves no place open, or more than one: write one, such as '{{n}}:16'")
    name, *words = place.split() or [""]
    if name not in ("n", "p") or (words and words[0] != "in"):
        raise _refuse(text, place)
    if not words:
        first, last, step = (1, None, 1) if name == "n" else (_STEP, _WHOLE - _STEP, _STEP)
    else:
        first, last, step = _read_range(text, place, words[1:])
    return Family(text.strip(), before.lstrip(), after.rstrip(), first, last, step, not words)


def _read_range(text: str, place: str, words: list[str]) -> tuple[int, int, int]:
    """The numbers of ``4..12`` and ``40..60 by 2``."""
    ends, step = words[0].split("..") if words else [], "1"
    if len(words) == 3 and words[1] == "by":
        step = words[2]
    elif len(words) != 1:
        raise _refuse(text, place)
    numbers = [*ends, step]
    if len(numbers) != 3 or not all(n.isascii() and n.isdecimal() and len(n) < 10 and int(n) for n in numbers):
        raise _refuse(text, place)
    first, last, by = map(int, numbers)
    if first > last or (last - first) // by >= MOST:
        raise SpecError(f"{{{place}}} in the family {text!r} holds no number, or more than {MOST}: give another range")
    return first, last, by


def _refuse(text: str, place: str) -> SpecError:
    return SpecError(
        f"{{{place}}} in the family {text!r} is no open place: write {{n}} for a count, {{p}} for a percentage, or a "
        "range such as {n in 4..12} or {p in 40..60 by 2}"
    )
