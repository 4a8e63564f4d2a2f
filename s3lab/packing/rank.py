"""Subsets as numbers: the rank of what a scope keeps in the combinatorial number system."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import comb

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.packing.bits import LIMB, limbs

_CHUNK = 1 << 22  # blocks at a time: what is made of them on the way stays small


def rank_subsets(kept: Tensor, present: Tensor | None, width: int) -> Tensor:
    """Return the ranks of subsets, bool (S, B), in limbs, long (S, limbs).

    Σ C(p_i, i) over the places p₁ < p₂ < … that are kept.  ``present``, bool (S, B), says which blocks there are, all
    if None; places count those only.  ``width`` bits hold the largest rank.  Cost: B·limbs steps over all scopes.
    Source: Knuth, TAOCP 4A, 7.2.1.3.

    >>> rank_subsets(torch.tensor([[True, True, False, False], [False, False, True, True]]), None, 3).tolist()
    [[0], [5]]
    """
    size = max(1, _CHUNK // kept.shape[1])
    parts = present.split(size) if present is not None else [None] * -(-len(kept) // size)
    found = [_rank(own, part, width) for own, part in zip(kept.split(size), parts, strict=True)]
    return torch.cat(found) if found else kept.new_zeros(0, limbs(width), dtype=torch.long)


def unrank_subsets(ranks: Tensor, blocks: int, keep: Tensor, present: Tensor | None, width: int) -> Tensor:
    """Return the subsets of ``keep`` (S,) of the present blocks that have these ranks: the inverse of `rank_subsets`.

    Raises DataError for a number that is no rank, naming the first such scope.

    >>> unrank_subsets(torch.tensor([[5]]), 4, torch.tensor([2]), None, 3).long().tolist()
    [[0, 0, 1, 1]]
    """
    kept = torch.empty(len(ranks), blocks, dtype=torch.bool)
    size = max(1, _CHUNK // blocks)
    for start in range(0, len(ranks), size):
        own = slice(start, start + size)
        part = None if present is None else present[own]
        kept[own], left = _unrank(ranks[own], blocks, keep[own], part, width)
        if left.any():
            raise DataError(
                f"the index of scope {start + int(left.long().argmax())} names no choice of blocks: "
                "the file is damaged, pack the model again"
            )
    return kept


def _rank(kept: Tensor, present: Tensor | None, width: int) -> Tensor:
    scopes, blocks = kept.shape
    most = int(kept.sum(1).max())
    table = _binomials(blocks, most, width)
    columns = kept.T.contiguous()
    order, total = kept.new_zeros(scopes, dtype=torch.long), [kept.new_zeros(scopes, dtype=torch.long) for _ in table]
    for own, start in zip(columns, _row_starts(present, blocks, most), strict=True):
        order += own
        at = order + start
        for limb, values in zip(total, table, strict=True):
            limb += values[at] * own
    for low, high in pairwise(total):
        high += low >> LIMB
        low &= (1 << LIMB) - 1
    return torch.stack(total, 1)


def _unrank(ranks: Tensor, blocks: int, keep: Tensor, present: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The subsets, and for which scopes something is left over."""
    most = int(keep.max())
    table = _binomials(blocks, most, width)
    rest = [limb.clone() for limb in ranks.T]
    left = keep.clone()
    kept = torch.zeros(blocks, len(ranks), dtype=torch.bool)
    starts = list(_row_starts(present, blocks, most))
    there = None if present is None else present.T.contiguous()
    for place in reversed(range(blocks)):
        at = left + starts[place]
        values = [limb[at] for limb in table]
        take = rest[0] >= values[0]
        for limb, value in zip(rest[1:], values[1:], strict=True):
            take = (limb > value) | ((limb == value) & take)
        take &= left > 0
        if there is not None:
            take &= there[place]
        for limb, value in zip(rest, values, strict=True):
            limb -= value * take
        for low, high in pairwise(rest):
            borrow = low < 0
            low += borrow.long() << LIMB
            high -= borrow.long()
        left -= take.long()
        kept[place] = take
    wrong = left != 0
    for limb in rest:
        wrong |= limb != 0
    return kept.T, wrong


def _row_starts(present: Tensor | None, blocks: int, most: int) -> list[int] | list[Tensor]:
    """Where the binomials of the place of each block begin in the table."""
    if present is None:
        return [place * (most + 1) for place in range(blocks)]
    places = (present.T.long().cumsum(0) - 1).clamp(min=0)
    return list(places * (most + 1))


@lru_cache(maxsize=64)
def _binomials(blocks: int, most: int, width: int) -> tuple[Tensor, ...]:
    """C(p, i) for p below ``blocks``, i up to ``most``, row by row: a tensor for each limb.

    What no rank of ``width`` bits reaches is cut down to what its limbs hold.
    """
    count = limbs(width)
    top = (1 << LIMB * count) - 1
    values = [min(comb(place, order), top) for place in range(blocks) for order in range(most + 1)]
    mask = (1 << LIMB) - 1
    return tuple(torch.tensor([value >> LIMB * limb & mask for value in values]) for limb in range(count))
