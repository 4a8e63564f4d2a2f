"""Products with a weight whose rows are in pairs: tensor cores multiply half the rows, and each product is added to the
row that it is of."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3lab.packing.gpu.fragments import Fragments
from s3lab.packing.gpu.tune_triton import tune
from s3lab.shapes import Float

_SIZES = [(16, 16, 1, 4), (32, 16, 2, 4), (16, 32, 2, 4), (64, 16, 4, 4), (64, 64, 4, 3), (128, 64, 4, 3)]
_CONFIGS = [
    triton.Config({"PAIRS": pairs, "TOKENS": tokens}, num_warps=warps, num_stages=stages)
    for pairs, tokens, warps, stages in _SIZES
]


def multiply_fragments(fragments: Fragments, x: Float[Tensor, "T K"]) -> Float[Tensor, "T M"]:
    """Return x Wᵀ (T, M) in float32, of a weight and tokens in float16 or both in bfloat16."""
    (M, K), T = fragments.shape, len(x)
    y = x.new_empty(T, M, dtype=torch.float32)
    _multiply[lambda sizes: (triton.cdiv(M // 2, sizes["PAIRS"]), triton.cdiv(T, sizes["TOKENS"]))](
        fragments.operand, fragments.bits, fragments.pairs, x.contiguous(), y,
        M // 2, K, T, triton.next_power_of_2(T), RUN=fragments.run,
    )  # fmt: skip
    return y


@tune(_CONFIGS, key=["P", "K", "SIZE", "RUN"])
@triton.jit
@no_type_check
def _multiply(
    operand,
    bits,
    pairs,
    x,
    y,
    P,
    K,
    T,
    SIZE,
    RUN: tl.constexpr,
    PAIRS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    first = tl.zeros((PAIRS, TOKENS), dtype=tl.float32)
    second = tl.zeros((PAIRS, TOKENS), dtype=tl.float32)
    step = tl.arange(0, 16)
    for column in range(0, K, 16):
        there = column + step
        number = pair * (K // RUN) + column // RUN
        byte = tl.load(bits + number // 8, mask=pair < P, other=0).to(tl.int32)
        swaps = ((byte >> (number % 8).to(tl.int32)) & 1)[:, None] == 1
        left = tl.load(operand + pair[:, None] * K + there[None, :], mask=(pair < P)[:, None], other=0.0)
        right = tl.load(x + token[None, :] * K + there[:, None], mask=(token < T)[None, :], other=0.0)
        product = tl.dot(left, right)
        first += tl.where(swaps, 0.0, product)
        second += tl.where(swaps, product, 0.0)
    inside = (pair[:, None] < P) & (token[None, :] < T)
    out = y + token[None, :].to(tl.int64) * (2 * P)
    tl.store(out + tl.load(pairs + pair, mask=pair < P, other=0)[:, None], first, mask=inside)
    tl.store(out + tl.load(pairs + P + pair, mask=pair < P, other=0)[:, None], second, mask=inside)
