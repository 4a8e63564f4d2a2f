"""Squares that keep as many blocks in every row as in every column, as numbers: the rank of one among all of them."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from s3lab.algebra.count import complete_squares
from s3lab.errors import DataError

_CHUNK = 1 << 13  # squares at a time


def rank_squares(kept: Tensor, lines: int) -> Tensor:
    """Return the rank of each square, bool (S, side, side) with ``lines`` in each row and column, long (S,).

    Squares are in the order of their first rows, of equal ones in that of their second, and so on: a rank is the number
    of ways to complete the rows above with an earlier row, summed over the rows.  Cost: side·C(side, lines) steps over
    all squares; a side is at most 10.

    >>> rank_squares(torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]]), 1).tolist()
    [0, 1]
    """
    side = kept.shape[1]
    few, kept = (lines, kept) if 2 * lines <= side else (side - lines, ~kept)
    number = _rows(side, few)[1]
    ranks = torch.empty(len(kept), dtype=torch.long)
    for squares, out in zip(kept.split(_CHUNK), ranks.split(_CHUNK), strict=True):
        chosen = number[(squares.long() << torch.arange(side)).sum(2)]
        wanting, total = torch.full((len(squares), side), few), torch.zeros(len(squares), dtype=torch.long)
        for row in range(side):
            ways = _count_ways(wanting, few)
            total += ways.masked_fill(torch.arange(ways.shape[1]) >= chosen[:, row, None], 0).sum(1)
            wanting -= squares[:, row].long()
        out.copy_(total)
    return ranks


def unrank_squares(ranks: Tensor, side: int, lines: int) -> Tensor:
    """Return the squares of these ranks (S,), bool (S, side, side): the inverse of `rank_squares`.

    Raises DataError for a number that is no rank, naming the first such square.
    """
    few = lines if 2 * lines <= side else side - lines
    candidates = _rows(side, few)[0]
    kept = torch.empty(len(ranks), side, side, dtype=torch.bool)
    for start in range(0, len(ranks), _CHUNK):
        rest = ranks[start : start + _CHUNK].clone()
        wanting = torch.full((len(rest), side), few)
        for row in range(side):
            upto = _count_ways(wanting, few).cumsum(1)
            chosen = (upto <= rest.unsqueeze(1)).sum(1)
            if (over := chosen == len(candidates)).any():
                raise DataError(
                    f"the index of scope {start + int(over.long().argmax())} names no square of {lines} in each row "
                    "and column: the file is damaged, pack the model again"
                )
            before = upto.gather(1, (chosen - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
            rest -= before.masked_fill(chosen == 0, 0)
            kept[start : start + _CHUNK, row] = candidates[chosen]
            wanting -= candidates[chosen].long()
    return kept if few == lines else ~kept


def _count_ways(wanting: Tensor, lines: int) -> Tensor:
    """How many squares there are for each next row, (S, rows), where columns still want so many ones (S, side)."""
    side = wanting.shape[1]
    ways, power = _ways(side, lines)
    forbidden = 2 * len(ways)
    step = (power[(wanting - 1).clamp(min=0)] - power[wanting]).masked_fill(wanting == 0, forbidden)
    after = power[wanting].sum(1, keepdim=True) + (step.double() @ _rows(side, lines)[0].T.double()).long()
    return ways[after.clamp(max=len(ways) - 1)]


@lru_cache(maxsize=16)
def _rows(side: int, lines: int) -> tuple[Tensor, Tensor]:
    """All rows in order, bool (rows, side), and the number of each by its bits."""
    rows = torch.zeros(max(1, len(list(combinations(range(side), lines)))), side, dtype=torch.bool)
    for number, places in enumerate(combinations(range(side), lines)):
        rows[number, list(places)] = True
    number_of = torch.zeros(1 << side, dtype=torch.long)
    number_of[(rows.long() << torch.arange(side)).sum(1)] = torch.arange(len(rows))
    return rows, number_of


@lru_cache(maxsize=16)
def _ways(side: int, lines: int) -> tuple[Tensor, Tensor]:
    """The ways to complete a state, by Σ power[want] over its columns, with 0 at the end, and the powers."""
    power = torch.tensor([0, *((side + 1) ** want for want in range(lines))])
    ways = torch.zeros((side + 1) ** max(lines, 1) + 1, dtype=torch.long)
    for wanting, count in complete_squares(side, lines).items():
        ways[int((torch.tensor(wanting) * power).sum())] = count
    ways[-1] = 0
    return ways, power
