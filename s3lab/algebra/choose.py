"""Which blocks of a scope stay: the ones with the highest scores, said in the methods of the tensors that come in."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NARROW = 8  # rows this short are sorted side by side, a column at a time: a sort of each costs several times more


def keep_highest(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Return which scores (n, B) are among the ``keep`` highest of their row, bool (n, B), of equals the first ones.

    ``keep`` is one count for all rows, or one for each, long (n,).  The scores hold no NaN.  Cost: n·B·log²B
    comparisons for one count and B up to 8, without a sort; else the selection, or sort, of rows.
    """
    least = _find_last_kept(scores, keep)
    kept = scores >= least
    if int(kept.count_nonzero()) == (keep * len(scores) if isinstance(keep, int) else int(keep.sum())):
        return kept
    above = scores > least
    room = keep - above.sum(1)
    return above | (kept & ((kept & ~above).cumsum(1) <= room.unsqueeze(1)))


def _find_last_kept(scores: Tensor, keep: int | Tensor) -> Tensor:
    """The lowest score that is kept in each row, (n, 1); where none is, the highest."""
    if not isinstance(keep, int):
        return scores.sort(dim=1, descending=True).values.gather(1, (keep.clamp(min=1) - 1).unsqueeze(1))
    place = max(keep, 1)
    if scores.shape[1] > _NARROW:
        return scores.topk(place, dim=1, sorted=False).values.amin(1, keepdim=True)
    columns = list(scores.unbind(1))
    for high, low in _sorting_network(len(columns)):
        columns[high], columns[low] = columns[high].maximum(columns[low]), columns[high].minimum(columns[low])
    return columns[place - 1].unsqueeze(1)


@lru_cache
def _sorting_network(size: int) -> tuple[tuple[int, int], ...]:
    """The pairs to put in order, one after the other, to sort ``size`` items (Batcher; Knuth, TAOCP 3, 5.2.2 M).

    >>> _sorting_network(3)
    ((0, 2), (0, 1), (1, 2))
    """
    pairs, top = [], 1 << max((size - 1).bit_length() - 1, 0)
    step = top
    while step:
        reach, offset, distance = top, 0, step
        while True:
            pairs += [(i, i + distance) for i in range(size - distance) if i & step == offset]
            if reach == step:
                break
            distance, reach, offset = reach - step, reach >> 1, step
        step >>= 1
    return tuple(pairs)
