"""A window of a SparseGPT sweep in one kernel: decisions and the columns' updates, a tile of rows in each program."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from s3lab.shapes import Float

_ROWS = 16  # of the weight in a program of 8 warps: its tiles of 128 columns fill 117 registers of a thread (sm_90)


def sweep(
    V: Float[Tensor, "n M"], U: Float[Tensor, "n n"], gone: Float[Tensor, "n M"], B: int, C: int, keep: int
) -> None:
    """Sweep a window in place, as `s3lab.solvers.kernels.ref.sweep` does: V changed, ``gone`` set, both contiguous.

    float32.  n is a multiple of B·C, and at most 128 for speed.  Sums are in another order than the twin's: where two
    blocks cost the same but for rounding, the other one may go.
    """
    n, M = V.shape
    _sweep[(triton.cdiv(M, _ROWS),)](
        *(V, U, gone, M, n, U.stride(0), U.stride(1), B, C, keep, _ceil(n), _ROWS),
        num_warps=8,  # pyright: ignore[reportCallIssue]
    )


def _ceil(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


# A column is picked out of the tile by a sum in which the others are zero: registers have no index.
@triton.jit
@no_type_check
def _sweep(
    V,
    U,
    gone,
    M,
    n,
    u_row,
    u_column,
    B: tl.constexpr,
    C: tl.constexpr,
    KEEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, COLUMNS)[:, None]
    inside = (row < M) & (column < n)
    at = column * M + row
    v = tl.load(V + at, mask=inside, other=0.0)
    out = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    block = column % (B * C) // C
    for start in range(0, n, B * C):
        here = (column >= start) & (column < start + B * C)
        cost = tl.where(here, v * v, 0.0)
        if C > 1:
            terms = cost
            cost = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for b in range(B):
                whole = tl.sum(tl.where(block == b, terms, 0.0), axis=0)[None, :]
                cost += tl.where(here & (block == b), whole, 0.0)
        rank = tl.zeros((COLUMNS, ROWS), dtype=tl.int32)
        for b in range(B):
            other = tl.sum(tl.where(column == start + b * C, cost, 0.0), axis=0)[None, :]
            rank += ((other > cost) | ((other == cost) & (b < block))).to(tl.int32)
        out = tl.where(here & (rank >= KEEP), 1.0, out)
        for j in range(start, start + B * C):
            lost = tl.sum(tl.where(column == j, v * out, 0.0), axis=0)[None, :]
            u = tl.load(U + j * u_row + column * u_column, mask=(column >= j) & (column < n), other=0.0)
            v -= u * lost
    tl.store(V + at, v, mask=inside)
    tl.store(gone + at, out, mask=inside)
