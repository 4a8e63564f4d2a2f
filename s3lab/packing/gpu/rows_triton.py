"""Products of a few tokens with a weight laid out by rows, on a GPU: what `decode.cpp` is on a CPU."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3lab.packing.gpu.tune_triton import tune
from s3lab.packing.rows import Rows
from s3lab.shapes import Float

_CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
    for rows, columns, warps in [(4, 256, 2), (1, 512, 2), (1, 1024, 4), (2, 512, 4), (8, 128, 2), (8, 256, 4)]
]


def multiply_rows(rows: Rows, x: Float[Tensor, "T K"]) -> Float[Tensor, "T M"]:
    """Return x Wᵀ (T, M) in float32: bits and values are read once, in order, and nothing else of the weight.

    Values in float32, float16 or bfloat16, x in the same; a program has a few rows.
    """
    (M, K), T = rows.shape, len(x)
    bits, run = (rows.bits, 1) if rows.runs is None else (rows.runs, 16)
    y = x.new_empty(T, M, dtype=torch.float32)
    _multiply[lambda sizes: (triton.cdiv(M, sizes["ROWS"]),)](
        bits, rows.starts, rows.values.decode(), x.contiguous(), y,
        M, K, bits.shape[1], T, RUN=run, TOKENS=triton.next_power_of_2(T),
    )  # fmt: skip
    return y


@tune(_CONFIGS, key=["M", "K", "RUN", "TOKENS"])
@triton.jit
@no_type_check
def _multiply(
    bits,
    starts,
    values,
    x,
    y,
    M,
    K,
    STRIDE,
    T,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    next_ = tl.load(starts + row, mask=row < M, other=0)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    RUNS: tl.constexpr = COLUMNS // RUN
    for first in range(0, K, COLUMNS):
        run = first // RUN + tl.arange(0, RUNS)[None, :]
        there = (row[:, None] < M) & (run * RUN < K)
        byte = tl.load(bits + row[:, None] * STRIDE + run // 8, mask=there, other=0).to(tl.int32)
        kept = (byte >> (run % 8)) & 1
        # where the values of a run begin: after all those before it in the row
        start = next_[:, None] + (tl.cumsum(kept, axis=1) - kept) * RUN
        at = start[:, :, None] + tl.arange(0, RUN)[None, None, :]
        found = tl.load(values + at, mask=(kept == 1)[:, :, None], other=0.0).to(tl.float32)
        weights = tl.reshape(found, (ROWS, COLUMNS))
        column = first + tl.arange(0, COLUMNS)
        inside = (token[:, None] < T) & (column[None, :] < K)
        tokens = tl.load(x + token[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(weights[:, None, :] * tokens[None, :, :], axis=2)
        next_ += tl.sum(kept, axis=1) * RUN
    out = token[None, :].to(tl.int64) * M + row[:, None]
    tl.store(y + out, total, mask=(row[:, None] < M) & (token[None, :] < T))
