"""Which damping a layer wants: the one whose solution errs least on tokens that it was not solved on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from s3lab.errors import SolveError
from s3lab.solvers.base import Solution

LADDER = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def climb(loss: Callable[[float], float], ladder: Sequence[float] = LADDER) -> dict[float, float]:
    """Return the losses of the rungs of a ladder that were tried on the way to the least, which is among them.

    Starts in the middle and goes to the neighbour with the lower loss as long as there is one.  The held-out error
    over the damping falls, as less noise of the calibration tokens is fitted, and then rises, as less of their signal
    is.  Cost: three to five solves of the five.

    >>> climb(lambda damp: abs(damp - 0.1))
    {0.001: 0.099, 0.01: 0.09000000000000001, 0.1: 0.0, 1.0: 0.9}
    """
    tried: dict[int, float] = {}

    def at(rung: int) -> float:
        if not 0 <= rung < len(ladder):
            return float("inf")
        if rung not in tried:
            tried[rung] = loss(ladder[rung])
        return tried[rung]

    rung = len(ladder) // 2
    while (best := min((rung, rung - 1, rung + 1), key=at)) != rung:
        rung = best
    return {ladder[rung]: tried[rung] for rung in sorted(tried)}


def measure_held_out(solutions: Iterable[Solution]) -> float:
    """Return the root of the sum of the squared held-out errors; SolveError where nothing was held out."""
    errors = [solution.error_test for solution in solutions if solution.error_test is not None]
    if not errors:
        raise SolveError("damp='auto' picks the damping by the error on held-out tokens: give H_test, or hold some out")
    return sum(value**2 for value in errors) ** 0.5
