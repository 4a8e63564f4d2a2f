"""How many masks a scope has, and how many bits tell which."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import comb, isqrt, lgamma, log

COUNTED_SIDE = 12  # in a fifth of a second; 16 takes half a minute
_COUNTED_BLOCKS = 4096  # binomials above have thousands of digits, and rounding up is nothing to them


def index_bits(blocks: int, keep: int, lines: int | None = None) -> float:
    """Return the bits that tell the mask of a scope: ⌈log2 of the number of its masks⌉.

    >>> index_bits(4, 2), index_bits(16, 8), index_bits(16, 8, lines=2)
    (3, 14, 7)
    """
    if lines is not None:
        side = isqrt(blocks)
        rows = side * (comb(side, lines) - 1).bit_length()
        return rows if side > COUNTED_SIDE else (count_squares(side, lines) - 1).bit_length()
    if blocks <= _COUNTED_BLOCKS:
        return (comb(blocks, keep) - 1).bit_length()
    return (lgamma(blocks + 1) - lgamma(keep + 1) - lgamma(blocks - keep + 1)) / log(2)


@lru_cache(maxsize=64)
def count_squares(side: int, lines: int) -> int:
    """Return the number of 0/1 squares with ``lines`` ones in each row and each column.

    Row by row over how many columns still want how many ones.  Cost: 0.2 s for 12 and 6, half a minute for 16 and 8.

    >>> count_squares(4, 2), count_squares(8, 4)
    (90, 116963796250)
    """
    ways = {(0,) * lines + (side,): 1}  # wanting[n]: columns that still want n
    for _ in range(side):
        after: dict[tuple[int, ...], int] = {}
        for wanting, count in ways.items():
            for taken in _picks(wanting, lines):
                left = [n - t for n, t in zip(wanting, (0, *taken), strict=True)]
                for ones, t in enumerate(taken):
                    left[ones] += t
                times = count
                for n, t in zip(wanting[1:], taken, strict=True):
                    times *= comb(n, t)
                after[tuple(left)] = after.get(tuple(left), 0) + times
        ways = after
    return ways[(side, *(0,) * lines)]


def _picks(wanting: tuple[int, ...], lines: int) -> Iterator[tuple[int, ...]]:
    """Yield how many columns of each want above 0 the next row takes, ``lines`` in all."""
    for taken in product(*(range(min(n, lines) + 1) for n in wanting[1:])):
        if sum(taken) == lines:
            yield taken
