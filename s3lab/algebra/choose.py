"""Which blocks of a scope stay: the ones with the highest scores, said in the methods of the tensors that come in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def keep_highest(scores: Tensor, keep: int | Tensor) -> Tensor:
    """Return which scores (n, B) are among the ``keep`` highest of their row, bool (n, B), of equals the first ones.

    ``keep`` is one count for all rows, or one for each, long (n,).
    """
    rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    return rank < (keep if isinstance(keep, int) else keep[:, None])
