"""How far a mean over a few seeds can be trusted: Student's interval, without a table."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, pi, sin, sqrt
from statistics import fmean, stdev

from s3lab.errors import DataError


def find_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean of values and the half width of its confidence interval, t · s / √n.

    t is the quantile of Student's distribution of n − 1 degrees of freedom that leaves 1 − ``level`` outside ±t.
    Raises DataError for fewer than two values, or a level that is none.

    >>> mean, half = find_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    if len(values) < 2 or not 0 < level < 1:
        raise DataError(f"{len(values)} values at the level {level}: give two or more, and a level between 0 and 1")
    return fmean(values), find_quantile(len(values) - 1, level) * stdev(values) / sqrt(len(values))


def find_quantile(degrees: int, level: float) -> float:
    """Return the t for which a share ``level`` of Student's distribution lies within ±t, by bisection.

    >>> round(find_quantile(4, 0.95), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while share_within(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle, degrees) < level else (low, middle)
    return high


def share_within(t: float, degrees: int) -> float:
    """Return the share of Student's distribution within ±t, as the finite sum that it is for whole degrees.

    Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4.
    """
    angle = atan(t / sqrt(degrees))
    first = degrees % 2
    term, total = (cos(angle) if first else 1.0), 0.0
    for step in range(first, degrees - 1, 2):
        total += term
        term *= cos(angle) ** 2 * (step + 1) / (step + 2)
    return 2 / pi * (angle + sin(angle) * total) if first else sin(angle) * total
