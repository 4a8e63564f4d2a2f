"""How many masks a scope has, and how many bits tell which."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import comb, isqrt, lgamma, log, prod

COUNTED_SIDE = 12  # in a fifth of a second; 16 takes half a minute
INDEXED_SIDE = 10  # the largest whose masks a word of 64 bits can number
_COUNTED_BLOCKS = 4096  # binomials above have thousands of digits, and rounding up is nothing to them


def index_bits(blocks: int, keep: int, lines: int | None = None) -> float:
    """Return the bits that tell the mask of a scope: ⌈log2 of the number of its masks⌉.

    With ``lines`` the scope is a square, which has one index up to a side of `INDEXED_SIDE` and above one for each row.

    >>> index_bits(4, 2), index_bits(16, 8), index_bits(16, 8, lines=2)
    (3, 14, 7)
    """
    if lines is not None:
        side = isqrt(blocks)
        if side <= INDEXED_SIDE:
            return (count_squares(side, lines) - 1).bit_length()
        return side * (comb(side, lines) - 1).bit_length()
    if blocks <= _COUNTED_BLOCKS:
        return (comb(blocks, keep) - 1).bit_length()
    return (lgamma(blocks + 1) - lgamma(keep + 1) - lgamma(blocks - keep + 1)) / log(2)


def count_squares(side: int, lines: int) -> int:
    """Return the number of 0/1 squares with ``lines`` ones in each row and each column.

    Cost: 0.2 s for 12 and 6, half a minute for 16 and 8.

    >>> count_squares(4, 2), count_squares(8, 4)
    (90, 116963796250)
    """
    return complete_squares(side, lines)[(*(0,) * lines, side)]


@lru_cache(maxsize=64)
def complete_squares(side: int, lines: int) -> dict[tuple[int, ...], int]:
    """Return in how many ways a square can be completed row by row, by how many columns still want 0, 1, … ones.

    Of the states that occur on the way down.

    >>> complete_squares(2, 1)
    {(2, 0): 1, (1, 1): 1, (0, 2): 2}
    """
    states: list[set[tuple[int, ...]]] = [{(*(0,) * lines, side)}]
    for _ in range(side):
        states.append({_take(wanting, taken) for wanting in states[-1] for taken in _picks(wanting, lines)})
    ways = dict.fromkeys(states[-1], 1)
    for level in reversed(states[:-1]):
        for wanting in level:
            ways[wanting] = sum(
                prod(map(comb, wanting[1:], taken)) * ways[_take(wanting, taken)] for taken in _picks(wanting, lines)
            )
    return ways


def _take(wanting: tuple[int, ...], taken: tuple[int, ...]) -> tuple[int, ...]:
    """What columns want after a row took one of so many of each want."""
    return tuple(n - t + more for n, t, more in zip(wanting, (0, *taken), (*taken, 0), strict=True))


def _picks(wanting: tuple[int, ...], lines: int) -> Iterator[tuple[int, ...]]:
    """Yield how many columns of each want above 0 the next row takes, ``lines`` in all."""
    for taken in product(*(range(min(n, lines) + 1) for n in wanting[1:])):
        if sum(taken) == lines:
            yield taken
