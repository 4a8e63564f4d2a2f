"""N:M on the inputs of a linear layer in one kernel: centre, ranks, variance and the pruned token, one a program."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3lab.errors import ShapeError
from s3lab.shapes import Float
from s3lab.tensors.activation import Centre

_CENTRES = {None: 0, "mean": 1, "median": 2}
_VECTOR = 3


def prune_rows(
    x: Float[Tensor, "... K"],
    B: int,
    keep: int,
    factor: Float[Tensor, " K"] | None,
    shift: Float[Tensor, " K"] | Centre | None,
    variance: bool,
) -> Float[Tensor, "... K"]:
    """Return the tokens with ``keep`` of every ``B`` features, as `s3lab.tensors.activation.prune_tokens` does.

    float32, bfloat16 or float16, worked on in float32.  Means and variances are sums in another order than the twin's.
    Raises ShapeError where the widths differ.
    """
    K = x.shape[-1]
    vectors = [t for t in (factor, shift) if isinstance(t, Tensor)]
    if K % B or any(len(t) != K for t in vectors):
        raise ShapeError(f"tokens of {K} features for scopes of {B} and vectors of {[len(t) for t in vectors]}")
    x = x.contiguous()
    out = torch.empty_like(x)
    factor_at, shift_at = (t.contiguous() if isinstance(t, Tensor) else x for t in (factor, shift))
    centre = _VECTOR if isinstance(shift, Tensor) else _CENTRES[shift]
    scopes, wide = triton.next_power_of_2(K // B), triton.next_power_of_2(B)
    _prune[(x.numel() // K,)](
        x, factor_at, shift_at, out, K, B, keep, factor is not None, centre, variance, scopes, wide,
        num_warps=min(16, max(1, scopes * wide // 512)),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _prune(
    x,
    factor,
    shift,
    out,
    K,
    B: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHED: tl.constexpr,
    CENTRE: tl.constexpr,
    VARIANCE: tl.constexpr,
    SCOPES: tl.constexpr,
    WIDE: tl.constexpr,
):
    scope = tl.arange(0, SCOPES)[:, None]
    place = tl.arange(0, WIDE)[None, :]
    at = scope * B + place
    inside = (place < B) & (at < K)
    start = tl.program_id(0).to(tl.int64) * K
    moved = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    centre = tl.zeros((SCOPES, WIDE), dtype=tl.float32)
    if CENTRE == 1:
        centre += tl.sum(tl.sum(moved, axis=1), axis=0) / K
    if CENTRE == 2:
        centre += _find_median(moved, inside, K)
    if CENTRE == 3:
        centre += tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
    moved = tl.where(inside, moved - centre, 0.0)
    score = tl.abs(moved)
    if WEIGHED:
        score *= tl.load(factor + at, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(inside, score, -1.0)
    rank = tl.zeros((SCOPES, WIDE), dtype=tl.int32)
    for b in range(B):
        other = tl.max(tl.where(place == b, score, -1.0), axis=1)[:, None]
        rank += ((other > score) | ((other == score) & (b < place))).to(tl.int32)
    pruned = tl.where(rank < KEEP, moved, 0.0)
    if VARIANCE:
        pruned *= _match_variance(pruned, moved, inside, K)
    tl.store(out + start + at, (pruned + centre).to(out.dtype.element_ty), mask=inside)


# Bits of a float, the sign's turned, are in the order of the floats: the median is found bit by bit, by counting.
@triton.jit
@no_type_check
def _find_median(x, inside, K):
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    below = (K - 1) // 2
    found = tl.full((), -2147483648, dtype=tl.int32)
    for i in range(32):
        larger = found ^ (tl.full((), 1, dtype=tl.int32) << (31 - i))
        less = tl.sum(tl.sum((inside & (order < larger)).to(tl.int32), axis=1), axis=0)
        found = tl.where(less <= below, larger, found)
    return tl.where(found < 0, found ^ 0x7FFFFFFF, found).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _match_variance(pruned, x, inside, K):
    wanted, wanted_square = _measure(x, inside, K)
    found, found_square = _measure(pruned, inside, K)
    real = (wanted > 1.1920929e-07 * wanted_square) & (found > 1.1920929e-07 * found_square)
    return tl.where(real, tl.sqrt(wanted / tl.where(real, found, 1.0)), 1.0)


@triton.jit
@no_type_check
def _measure(x, inside, K):
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / K
    apart = tl.where(inside, x - mean, 0.0)
    return tl.sum(tl.sum(apart * apart, axis=1), axis=0) / K, tl.sum(tl.sum(x * x, axis=1), axis=0) / K
