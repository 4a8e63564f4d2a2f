"""Transposable N:M: the best mask of a square that keeps as many in every row as in every column.

Everything is said in the methods of the tensors that come in, so that the algebra needs no tensor library.  Squares
stand side by side along the last mode, (side, side, n), where steps of one are vectorised best.
"""

from __future__ import annotations

from math import isqrt, log
from typing import TYPE_CHECKING

from s3lab.algebra.choose import keep_highest
from s3lab.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 19  # scores at a time, so that what is made of them on the way stays in the caches
_TEMPERATURES = (1.0, 0.3, 0.1)  # of the transport, in mean deviations of a square's scores
_STEPS = 4  # of the transport at each of them
_WHOLE = 1 << 51  # sums of whole numbers up to here, and their differences, are exact in float64


def choose_lines(scores: Tensor, keep: int) -> Tensor:
    """Return the best masks of squares: ``keep`` in each row and each column, bool (n, side²), True = kept.

    max Σ P_ij scores_ij over P in [0, 1] with row and column sums ``keep``, a transport whose vertices are masks:
    exactly, up to 2^-51·side of a square's largest deviation.  Entropic transport with capacities gives the columns
    prices; each row keeps its best at these; what a column then holds too much passes on to others along the
    exchanges that lose least, which keeps the mask the best one of its column sums, until those are ``keep``.

    ``scores`` is real (n, side²), the squares row-major; the same scores give the same masks, ties included.  Raises
    ShapeError for scores that are no squares or not finite, SpecError for a ``keep`` that is not 1 to the side.
    Cost: some 30·side³ operations a square, in bounded memory; 65,536 squares of 16 in 5 s on 2 cores.

    Source: the transport is TSENOR's (arXiv 2505.23949), which rounds and searches among 2×2 exchanges where this
    goes on to the optimum by successive shortest paths (Busacker & Gowen, 1961).

    >>> from s3lab import parse
    >>> parse("2:4 each way").bind((4, 4))
    """
    side = isqrt(scores.shape[-1])
    if scores.ndim != 2 or side * side != scores.shape[1]:
        raise ShapeError(f"scores of shape {tuple(scores.shape)} are no squares: expected (n, side*side), row-major")
    if not 1 <= keep <= side:
        raise SpecError(f"keep {keep} of each row and column of a square of side {side}: give between 1 and {side}")
    if not scores.isfinite().all():
        raise ShapeError("scores of squares hold NaN or Inf: clean the weight or the Hessian")
    kept = scores.new_ones(scores.shape).bool()
    if keep < side:
        size = max(1, _CHUNK // side**2)
        for some, out in zip(scores.split(size), kept.split(size), strict=True):
            squares = some.double().T.reshape(side, side, -1)
            out.copy_(_choose(squares, keep).reshape(side * side, -1).T)
    return kept


def _choose(scores: Tensor, keep: int) -> Tensor:
    side, _, n = scores.shape
    scores = scores - scores.mean((0, 1))
    spread = scores.abs().mean((0, 1))
    worth = scores / spread.masked_fill(spread == 0, 1)
    worth = worth - _prices(worth.float(), keep)
    worth = (worth * (_WHOLE // side / worth.abs().amax((0, 1)).clamp(min=1))).round()
    rows = worth.permute(2, 0, 1).reshape(n * side, side)
    kept = keep_highest(rows, keep).view(n, side, side).permute(1, 2, 0).contiguous()
    while True:
        surplus = kept.sum(0) - keep
        open_ = (surplus > 0).any(0).nonzero().squeeze(1)
        if not len(open_):
            return kept
        LOG.append((len(open_), int(surplus.clamp(min=0).sum())))
        kept[..., open_] = _move(worth[..., open_], kept[..., open_], surplus[:, open_])


LOG = []


def _prices(shares: Tensor, keep: int) -> Tensor:
    side, _, n = shares.shape
    rows, columns = shares.new_zeros(side, 1, n), shares.new_zeros(1, side, n)
    target = log(keep / (side - keep))
    for t in _TEMPERATURES:
        for _ in range(_STEPS):
            for line, dim in (rows, 1), (columns, 0):
                filled = (shares - rows).sub_(columns).mul_(1/t).sigmoid_().mean(dim, True)
                line += t * (filled.logit(1e-6) - target)
    return columns


def _move(worth: Tensor, kept: Tensor, surplus: Tensor) -> Tensor:
    side, _, n = worth.shape
    never = -float("inf")
    gains = worth.masked_fill(kept, never)
    losses = worth.neg().masked_fill(~kept, never)
    edges = losses[0, :, None] + gains[0, None]
    for i in range(1, side):
        edges = edges.maximum(losses[i, :, None] + gains[i, None])
    reach = worth.new_zeros(surplus.shape).masked_fill(surplus <= 0, never)
    me = surplus.new_ones(surplus.shape).cumsum(0) - 1
    origin = me
    while True:
        best, source = (reach[:, None] + edges).max(0)
        better = best > reach
        if not better.any():
            break
        reach = best.where(better, reach)
        origin = source.where(better, origin)
    root = origin
    for _ in range(side.bit_length()):
        root = root.gather(0, root)
    # root[c] of column c; pick for each root its best sink
    ends = (root[None] == me[:, None]) & (surplus < 0)[None]   # (source, column, n)
    value, at = reach.expand(side, -1, -1).masked_fill(~ends, never).max(1)
    walking = ends.any(1)
    kept = kept.clone()
    while True:
        came = origin.gather(0, at)
        walking = walking & (came != at)
        if not walking.any():
            return kept
        source, square = walking.nonzero(as_tuple=True)
        l, j = at[source, square], came[source, square]
        row = (gains[:, l, square] + losses[:, j, square]).argmax(0)
        kept[row, l, square] = True
        kept[row, j, square] = False
        at = came
