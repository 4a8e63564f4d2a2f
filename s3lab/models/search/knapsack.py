"""The multiple-choice knapsack: one rung of each ladder, the least loss in all, within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from s3lab.errors import SpecError

_SLACK = 1e-9  # of the budget: what sums of floats may be above it
_LEAST = 1e-12  # of the largest gain: what rounding may feign


@dataclass(frozen=True)
class Choice:
    """The rung of each item, what they cost and lose in all, and the price: loss per cost at the margin.

    No choice within the budget loses less than ``bound``.
    """

    rungs: tuple[int, ...]
    cost: float
    loss: float
    price: float
    bound: float


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> Choice:
    """Return a rung of each item that loses least, Σ costs ≤ budget.

    min Σᵢ lossᵢ(rᵢ)  s.t.  Σᵢ costᵢ(rᵢ) ≤ budget.  For a price λ the items part: each takes the rung of the least
    loss + λ·cost, which lies on the lower convex hull of its curve.  All hulls' steps, sorted by what they save per
    cost, give the choice of every price at once; the first that does not fit has the price that solves the dual, and
    the relaxed optimum ``bound``.  The repair then spends what is left: single changes of a rung, and pairs of them,
    as long as they lower the loss.  A budget that a price spends to the last is solved exactly; of any other the loss
    is at most that of one step above the optimum.

    Curves may rise and fall: a rung that costs more and loses more is never taken.  Raises SpecError where even the
    cheapest rungs are above the budget.

    Source: M. Dyer, *An O(n) algorithm for the multiple-choice knapsack linear program*, Math. Programming 29 (1984);
    here by sorting.  Cost: O(n log n) for n rungs in all, and as much for each exchange.

    >>> choose([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[9.0, 1.0, 0.0], [5.0, 4.0, 0.0]], 4.0).rungs
    (1, 1)
    """
    for number, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if len(cost) != len(loss) or not len(cost) or not np.isfinite([*cost, *loss]).all():
            raise SpecError(f"item {number} has costs {list(cost)} and losses {list(loss)}: give as many, all finite")
    hulls = [_find_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    rungs = [hull[0] for hull in hulls]
    least = sum(cost[rung] for cost, rung in zip(costs, rungs, strict=True))
    limit = budget + _SLACK * abs(budget)
    if least > limit:
        raise SpecError(f"a budget of {budget:g} is below {least:g}, what the cheapest rungs cost: give more")
    steps = sorted(
        ((losses[i][b] - losses[i][a]) / (costs[i][b] - costs[i][a]), i, b)
        for i, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    )
    spent, price = least, 0.0
    bound = sum(loss[rung] for loss, rung in zip(losses, rungs, strict=True))
    for slope, i, rung in steps:
        more = costs[i][rung] - costs[i][rungs[i]]
        if spent + more > limit:
            price, bound = -slope, bound + slope * max(budget - spent, 0.0)
            break
        bound += losses[i][rung] - losses[i][rungs[i]]
        rungs[i], spent = rung, spent + more
    rungs = _repair(costs, losses, rungs, limit)
    cost = sum(cost[rung] for cost, rung in zip(costs, rungs, strict=True))
    loss = sum(loss[rung] for loss, rung in zip(losses, rungs, strict=True))
    return Choice(tuple(rungs), float(cost), float(loss), float(price), float(min(bound, loss)))


def _find_hull(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
    """The rungs on the lower left hull of a curve, from the cheapest to the one of the least loss."""
    hull: list[int] = []
    for rung in sorted(range(len(cost)), key=lambda rung: (cost[rung], loss[rung])):
        if hull and loss[rung] >= loss[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(cost, loss, hull[-2], hull[-1], rung):
            hull.pop()
        hull.append(rung)
    return hull


def _is_above(cost: Sequence[float], loss: Sequence[float], a: int, b: int, c: int) -> bool:
    """Whether rung b lies on or above the line from a to c."""
    return (loss[b] - loss[a]) * (cost[c] - cost[a]) >= (loss[c] - loss[a]) * (cost[b] - cost[a])


def _repair(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], rungs: Sequence[int], limit: float
) -> list[int]:
    """Change the rung of one item, or of two, to what lowers the loss most within the limit, until nothing does."""
    costs, losses, rungs = [*costs, [0.0]], [*losses, [0.0]], [*rungs, 0]  # the last item lets another change alone
    item = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    start = np.searchsorted(item, np.arange(len(costs)))
    flat_cost, flat_loss = (np.concatenate([np.asarray(row, float) for row in table]) for table in (costs, losses))
    while True:
        at = start + np.asarray(rungs)
        more, gain = flat_cost - flat_cost[at][item], flat_loss - flat_loss[at][item]
        best = _find_exchange(item, more, gain, limit - flat_cost[at].sum())
        if best is None:
            return rungs[:-1]
        for move in best:
            rungs[item[move]] = int(move - start[item[move]])


def _find_exchange(item: np.ndarray, more: np.ndarray, gain: np.ndarray, left: float) -> tuple[int, int] | None:
    """The changes of two items, of which one may change nothing, that lower the loss most for no more than is left."""
    order = np.argsort(more, kind="stable")
    item, more, gain = item[order], more[order], gain[order]
    # Of all changes up to each cost, the best one, and the best one of another item than that.
    first, second = np.empty(len(order), int), np.empty(len(order), int)
    a = b = -1
    for n in range(len(order)):
        if a < 0 or gain[n] < gain[a]:
            b = a if a >= 0 and item[a] != item[n] else b
            a = n
        elif item[n] != item[a] and (b < 0 or gain[n] < gain[b]):
            b = n
        first[n], second[n] = a, b
    upto = np.searchsorted(more, left - more, side="right") - 1
    best, found = -_LEAST * np.abs(gain).max(), None
    for n in np.flatnonzero(upto >= 0):
        partner = first[upto[n]] if item[first[upto[n]]] != item[n] else second[upto[n]]
        if partner >= 0 and gain[n] + gain[partner] < best:
            best, found = gain[n] + gain[partner], (int(order[n]), int(order[partner]))
    return found
