"""Projection on scopes of consecutive weights in one kernel: sums of blocks, ranks by counting, and the mask."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from s3lab.errors import ShapeError
from s3lab.shapes import Bool, Float

_TILE = 8192  # comparisons, or weights, in a program


def project_consecutive(scores: Float[Tensor, "M K"], B: int, E: int, keep: int) -> Bool[Tensor, "M K"]:
    """Return the mask (M, K) that keeps in each scope of B·E consecutive scores the ``keep`` highest blocks of E.

    float32; of equals the first blocks stay.  Raises ShapeError where the scores hold NaN, as its twin
    `Partition.project` does.
    """
    if scores.isnan().any():
        raise ShapeError("the scores hold NaN: clean the weight or the Hessian")
    scores = scores.contiguous()
    mask = torch.empty_like(scores, dtype=torch.uint8)
    scopes = scores.numel() // (B * E)
    wide, deep = triton.next_power_of_2(B), triton.next_power_of_2(E)
    at_once = max(1, _TILE // (wide * max(wide, deep)))
    _project[(triton.cdiv(scopes, at_once),)](scores, mask, scopes, B, E, keep, at_once, wide, deep)
    return mask.view(torch.bool)


@triton.jit
@no_type_check
def _project(
    scores,
    mask,
    scopes,
    B: tl.constexpr,
    E: tl.constexpr,
    KEEP: tl.constexpr,
    SCOPES: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):
    scope = tl.program_id(0).to(tl.int64) * SCOPES + tl.arange(0, SCOPES)[:, None, None]
    block = tl.arange(0, WIDE)[None, :, None]
    element = tl.arange(0, DEEP)[None, None, :]
    inside = (scope < scopes) & (block < B) & (element < E)
    at = (scope * B + block) * E + element
    cost = tl.sum(tl.load(scores + at, mask=inside, other=0.0), axis=2)
    number = tl.arange(0, WIDE)
    cost = tl.where(number[None, :] < B, cost, -float("inf"))
    mine, other = cost[:, :, None], cost[:, None, :]
    first = number[None, None, :] < number[None, :, None]
    rank = tl.sum(((other > mine) | ((other == mine) & first)).to(tl.int32), axis=2)
    tl.store(mask + at, (rank < KEEP)[:, :, None].to(tl.uint8), mask=inside)
