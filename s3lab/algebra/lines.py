"""Transposable N:M: the best mask of a square that keeps as many in every row as in every column.

Everything is said in the methods of the tensors that come in, so that the algebra needs no tensor library.  Inside,
squares lie along the last mode, (side, side, n): a step that all of them take is then one long run.
"""

from __future__ import annotations

from math import inf, isqrt, log
from typing import TYPE_CHECKING

from s3lab.algebra.choose import keep_highest
from s3lab.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 19  # scores at a time: what is made of them on the way stays in the caches
_TEMPERATURES = (1.0, 0.3, 0.1)  # of the transport, in mean deviations of a square's scores
_STEPS = 4  # of the transport at each temperature
_WHOLE = 1 << 51  # differences of whole numbers up to here are exact in float64


def choose_lines(scores: Tensor, keep: int) -> Tensor:
    """Return the best masks of squares that keep ``keep`` in each row and each column, bool (n, side²), True = kept.

    max Σ P_ij scores_ij over 0 ≤ P_ij ≤ 1 with all row and column sums ``keep``: a transport with capacities, whose
    vertices are the masks.  Its entropic form puts a price on each column; each row keeps its best at these prices;
    a column that is then kept too often passes places on, along the chain of exchanges within rows that loses least,
    to one that is kept too seldom.  At each step the mask is the best of its column sums, so the last is the optimum,
    as far as float64 tells the scores of a square apart.

    ``scores`` are real (n, side²), squares row-major, on any device; equal scores give equal masks, ties included.
    Raises ShapeError for scores that are no squares or not finite, SpecError unless 1 ≤ ``keep`` ≤ side.  Cost: some
    20·side³ operations a square, and bounded memory beside the mask; 65,536 squares of 16 take 7 s on 2 cores.

    Source: the transport is TSENOR's (arXiv 2505.23949, there solved by Dykstra's projections and rounded); the
    exchanges are successive shortest paths (Busacker & Gowen, 1961).

    >>> import torch
    >>> choose_lines(torch.tensor([[9.0, 8.0, 0.0, 8.0, 0.0, 1.0, 0.0, 1.0, 0.0]]), 1).view(3, 3).long()
    tensor([[0, 1, 0],
            [1, 0, 0],
            [0, 0, 1]])
    """
    side = isqrt(scores.shape[-1])
    if scores.ndim != 2 or side * side != scores.shape[1]:
        raise ShapeError(f"scores of shape {tuple(scores.shape)} are no squares: expected (n, side·side), row-major")
    if not 1 <= keep <= side:
        raise SpecError(f"keep {keep} in each row and column of a square of side {side}: give between 1 and {side}")
    if not scores.isfinite().all():
        raise ShapeError("the scores of squares hold NaN or Inf: clean the weight or the Hessian")
    kept = scores.new_ones(scores.shape).bool()
    if keep < side:
        count = max(1, _CHUNK // side**2)
        for some, out in zip(scores.split(count), kept.split(count), strict=True):
            squares = some.double().T.contiguous().view(side, side, -1)
            out.copy_(_keep_best(squares, keep).reshape(side * side, -1).T)
    return kept


def _keep_best(scores: Tensor, keep: int) -> Tensor:
    """Return the best masks (side, side, n)."""
    side, _, n = scores.shape
    worth = scores / _scale(scores.abs().amax((0, 1)))
    worth = worth - worth.mean((0, 1))
    worth = worth / _scale(worth.abs().mean((0, 1)))
    worth = worth - _price_columns(worth.float(), keep)
    worth = (worth * (_WHOLE // side) / _scale(worth.abs().amax((0, 1)))).round()
    rows = worth.permute(2, 0, 1).reshape(n * side, side)
    kept = keep_highest(rows, keep).view(n, side, side).permute(1, 2, 0).contiguous()
    while True:
        surplus = kept.sum(0) - keep
        uneven = surplus.any(0).nonzero().squeeze(1)
        if not len(uneven):
            return kept
        kept[..., uneven] = _exchange(worth[..., uneven], kept[..., uneven], surplus[:, uneven])


def _price_columns(worth: Tensor, keep: int) -> Tensor:
    """Return prices (1, side, n) at which the rows, each keeping its best, keep columns almost equally often.

    Max Σ P·worth + t·(entropy of P and 1 − P) is P = σ((worth − rows − columns) / t): prices move in turns to where
    the lines are as full as they shall be, exactly so if a line's scores were equal, while t falls.
    """
    side, _, n = worth.shape
    rows, columns = worth.new_zeros(side, 1, n), worth.new_zeros(1, side, n)
    full = log(keep / (side - keep))
    for t in _TEMPERATURES:
        for _ in range(_STEPS):
            for prices, across in (rows, 1), (columns, 0):
                filled = (worth - rows).sub_(columns).div_(t).sigmoid_().mean(across, keepdim=True)
                prices += t * (filled.logit(1e-6) - full)
    return columns


def _exchange(worth: Tensor, kept: Tensor, surplus: Tensor) -> Tensor:
    """Return masks after each column with a surplus (side, n), if any can be reached, gave one place to a short one.

    A row that keeps column j and not l may exchange them.  Longest paths from the columns with a surplus over the
    best exchanges make a forest; each tree sends one place to the short column where it arrives best.  As all that
    changes is on longest paths, the masks stay the best of their column sums.
    """
    gain, loss = worth.masked_fill(kept, -inf), worth.neg().masked_fill(~kept, -inf)
    exchange = loss[0, :, None] + gain[0, None]
    for row in range(1, len(worth)):
        exchange = exchange.maximum(loss[row, :, None] + gain[row, None])
    worth_of_path = worth.new_zeros(surplus.shape).masked_fill(surplus <= 0, -inf)
    column = surplus.new_ones(surplus.shape).cumsum(0) - 1
    before = column
    while True:
        longer, last = (worth_of_path[:, None] + exchange).max(0)
        better = longer > worth_of_path
        if not better.any():
            break
        worth_of_path, before = longer.where(better, worth_of_path), last.where(better, before)
    root = before
    for _ in range(len(worth).bit_length()):
        root = root.gather(0, root)
    ends = (root == column[:, None]) & (surplus < 0)
    end = worth_of_path.expand_as(ends).masked_fill(~ends, -inf).argmax(1)
    kept, going = kept.clone(), ends.any(1)
    while True:
        start = before.gather(0, end)
        going = going & (start != end)
        if not going.any():
            return kept
        tree, square = going.nonzero(as_tuple=True)
        to, off = end[tree, square], start[tree, square]
        row = (gain[:, to, square] + loss[:, off, square]).argmax(0)
        kept[row, to, square], kept[row, off, square] = True, False
        end = start


def _scale(sizes: Tensor) -> Tensor:
    """Return sizes to divide by: 1 where there is nothing to divide."""
    return sizes.masked_fill(sizes == 0, 1)
