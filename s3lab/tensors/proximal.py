"""Thresholds and proximal steps over the blocks of a bound pattern, on one tensor or on several coupled ones.

All of it is said of block arrays (S, B, E) and given back by `scatter`, so that a block's weights may lie anywhere.
A level, the λ of the formulas, is a number or a tensor that broadcasts to (S, B): one for each scope is (S, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.linalg import vector_norm

from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.partition import Partition
from s3lab.errors import ShapeError, SolveError, SpecError
from s3lab.shapes import Float

_CHUNK = 1 << 18  # weights at a time: what is made of them on the way stays in the caches

Blocked = Partition | CoupledPartition
Weights = TypeVar("Weights", Tensor, Mapping[str, Tensor])


@torch.no_grad()
def block_norms(W: Weights, bound: Blocked) -> Float[Tensor, "S B"]:
    """Return the Euclidean norm of each block, over all tensors of a coupling, in float32 (float64 for float64).

    Raises ShapeError where W does not fit the pattern or holds NaN or Inf, SpecError for a composed pattern, which
    has no one set of blocks.

    >>> from s3lab import parse
    >>> block_norms(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), parse("1:2@1x2").bind((1, 4)))
    tensor([[5., 2.]])
    """
    return vector_norm(_gather(W, bound), dim=-1)


def kth_norm(W: Weights, bound: Blocked, k: int | None = None) -> Float[Tensor, " S"]:
    """Return the ``k``-th largest block norm of each scope, and 0 for k = B + 1.

    By default k is one more than the pattern keeps: a hard threshold at that level leaves just the budget, unless
    norms are equal.  Raises SpecError for a k outside 1 to B + 1, and for the default where rows and columns of a
    scope have budgets of their own; else as `block_norms`.

    >>> from s3lab import parse
    >>> part, W = parse("2:4").bind((1, 4)), torch.tensor([[1.0, -4.0, 3.0, -2.0]])
    >>> hard_threshold(W, part, kth_norm(W, part)[:, None])
    tensor([[ 0., -4.,  3.,  0.]])
    """
    norms = block_norms(W, bound)
    if k is None and isinstance(bound, Partition) and bound.lines is not None:
        raise SpecError(f"{bound.text} keeps {bound.lines} in each row and column, which no level does: project it")
    k = bound.keep + 1 if k is None else k
    if not 1 <= k <= bound.B + 1:
        raise SpecError(f"k = {k} of the {bound.B} blocks of a scope of {bound.text}: give 1 to {bound.B + 1}")
    return torch.nn.functional.pad(norms, (0, 1)).topk(k, dim=1).values[:, -1]


@torch.no_grad()
def hard_threshold(W: Weights, bound: Blocked, level: float | Tensor) -> Weights:
    """Return W without its blocks of norm up to λ: min_u ½‖u − v‖² + ½λ²·[u ≠ 0] for each block v.

    W is (M, K), or one by name for a coupling, of any real dtype and device; what comes back has the same, and no
    autograd history.  Raises as `block_norms`, ShapeError for levels that do not broadcast to (S, B), SolveError for
    a level that is negative or NaN.  Cost: some three passes over W.

    >>> from s3lab import parse
    >>> hard_threshold(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), parse("1:2@1x2").bind((1, 4)), 2.0)
    tensor([[3., 4., 0., 0.]])
    """
    v = _gather(W, bound)
    return _scatter(v.masked_fill((vector_norm(v, dim=-1) <= _levels(level, v))[..., None], 0), bound, W)


@torch.no_grad()
def soft_threshold(W: Weights, bound: Blocked, level: float | Tensor, h: Weights | None = None) -> Weights:
    """Return the proximal step of the group lasso: min_u ½(u − v)ᵀ diag(h) (u − v) + λ‖u‖ for each block v.

    Without h, which is h = 1, u = (1 − λ/‖v‖)₊ v.  Else u = h/(h + μ)·v with μ·‖h/(h + μ)·v‖ = λ, so μ = λ/‖u‖, and
    u = 0 where ‖h·v‖ ≤ λ.  A weight with h = 0 costs nothing to move and becomes zero.

    W as in `hard_threshold`; h ≥ 0 broadcasts to W, each to its own in a coupling: (K,) is the diagonal of a second
    moment.  ‖u‖ is found to the precision of W's dtype, at least float32, by Newton's method on all blocks at once.
    Raises as `hard_threshold`, ShapeError for an h of another shape, negative or not finite.  Cost: a dozen passes
    over W for each of some 5 steps; some three passes without h.

    >>> from s3lab import parse
    >>> soft_threshold(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), parse("1:2@1x2").bind((1, 4)), 2.5)
    tensor([[1.5000, 2.0000, 0.0000, 0.0000]])
    >>> h = torch.tensor([0.25, 0.5, 1.0, 2.0])
    >>> u = soft_threshold(torch.ones(1, 4), parse("1:1@1x4").bind((1, 4)), 1.0, h)
    >>> print(f"μ = {1 / u.norm():.5f}")
    μ = 1.16917
    """
    v = _gather(W, bound)
    levels = _levels(level, v)
    if h is None:
        norms = vector_norm(v, dim=-1)
        left = (1 - levels / norms).where(norms > levels, 0)
        return _scatter(v * left[..., None], bound, W)
    return _scatter(_shrink(v, _metric(h, W, bound).to(v), levels), bound, W)


@torch.no_grad()
def hard_threshold_(W: Weights, bound: Blocked, level: float | Tensor) -> Weights:
    """Do `hard_threshold` in place, on parameters too, and return W."""
    return _copy(hard_threshold(W, bound, level), W)


@torch.no_grad()
def soft_threshold_(W: Weights, bound: Blocked, level: float | Tensor, h: Weights | None = None) -> Weights:
    """Do `soft_threshold` in place, on parameters too, and return W.

    >>> from s3lab import parse
    >>> W = torch.nn.Parameter(torch.tensor([[3.0, 4.0, 0.0, 2.0]]))
    >>> soft_threshold_(W, parse("1:2@1x2").bind((1, 4)), 2.5) is W, W.tolist()
    (True, [[1.5, 2.0, 0.0, 0.0]])
    """
    return _copy(soft_threshold(W, bound, level, h), W)


def _shrink(v: Float[Tensor, "S B E"], h: Float[Tensor, "S B E"], level: Float[Tensor, "S B"]) -> Tensor:
    """Return the minimiser of each block (S, B, E): zero where the pull h·v of the metric is no stronger than λ."""
    out = v.new_zeros(v.shape)
    count = max(1, _CHUNK // v.shape[-1])
    for own, metric, limit, found in zip(*(t.flatten(0, 1).split(count) for t in (v, h, level, out)), strict=True):
        strength = vector_norm(metric * own, dim=-1)
        alive = strength > limit
        columns = own[alive].T.contiguous(), metric[alive].T.contiguous()
        found[alive] = _solve_secular(*columns, limit[alive], strength[alive]).T
    return out


def _solve_secular(
    v: Float[Tensor, "E n"], h: Float[Tensor, "E n"], level: Float[Tensor, " n"], strength: Float[Tensor, " n"]
) -> Float[Tensor, "E n"]:
    """Return the minimisers of blocks that are columns, as sums over few elements are best taken; strength = ‖h·v‖ > λ.

    u = h·r/(h·r + λ)·v with r = ‖u‖.  In ν = r/λ this is the secular equation of a trust region, ‖v/(1/h + ν)‖ = λ:
    the inverse of its left side is concave and rises with ν, so that Newton's steps from 0 rise to the root and never
    pass it (Moré & Sorensen, 1983).  In r they allow for λ = 0, and end in one step where h is constant.
    """
    tiny, told_apart = torch.finfo(v.dtype).tiny, 1 + 4 * torch.finfo(v.dtype).eps
    norm = (strength - level) / (h * (h * v / strength).square()).sum(0)
    while True:
        scale = h * norm / (h * norm + level).clamp(min=tiny)
        u = scale * v
        reached = u.square().sum(0).sqrt()
        larger = norm + (reached - norm) / (scale * (u / reached).square()).sum(0)
        if not bool((larger > norm * told_apart).any()):
            return u
        norm = norm.maximum(larger)


def _gather(W: Tensor | Mapping[str, Tensor], bound: Blocked, what: str = "the weight") -> Float[Tensor, "S B E"]:
    """Return the blocks of W, in float64 if any of it is and else in float32."""
    if not isinstance(bound, Partition | CoupledPartition):
        raise SpecError(f"{bound} has no one set of blocks: take the step on one of its parts")
    named = _named(W)
    shapes = {"": bound.shape} if isinstance(bound, Partition) else bound.shapes
    given = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if given != shapes:
        told, expected = (", ".join(f"{name} {shape}".strip() for name, shape in d.items()) for d in (given, shapes))
        raise ShapeError(f"{what} is {told} where {bound.text} is bound to {expected}")
    if not all(bool(tensor.isfinite().all()) for tensor in named.values()):
        raise ShapeError(f"{what} holds NaN or Inf: it has no blocks of a norm")
    wide = any(tensor.dtype == torch.float64 for tensor in named.values())
    named = {name: tensor.to(torch.float64 if wide else torch.float32) for name, tensor in named.items()}
    return bound.blocks(named[""]) if isinstance(bound, Partition) else bound.blocks(named)


def _scatter(values: Float[Tensor, "S B E"], bound: Blocked, W: Weights) -> Weights:
    """Return the weights whose blocks are ``values``, in the form and the dtypes of W."""
    found = _named(bound.scatter(values))
    named = {name: found[name].to(tensor.dtype) for name, tensor in _named(W).items()}
    return cast(Weights, named[""] if isinstance(W, Tensor) else named)


def _copy(found: Weights, W: Weights) -> Weights:
    for name, tensor in _named(W).items():
        tensor.copy_(_named(found)[name])
    return W


def _levels(level: float | Tensor, v: Float[Tensor, "S B E"]) -> Float[Tensor, "S B"]:
    """Return the level of each block; ShapeError or SolveError where there is none."""
    levels = torch.as_tensor(level, dtype=v.dtype, device=v.device)
    if not bool((levels >= 0).all()):
        raise SolveError(f"level = {level}: a threshold is at least 0")
    return _expand(levels, v.shape[:2], "level")


def _metric(h: Tensor | Mapping[str, Tensor], W: Tensor | Mapping[str, Tensor], bound: Blocked) -> Tensor:
    """Return h on the blocks of W; ShapeError unless it is a metric there."""
    named, weights = _named(h), _named(W)
    if set(named) != set(weights):
        raise ShapeError(f"h is given for {sorted(named)} where W is {sorted(weights)}: give one for each tensor")
    full = {name: _expand(named[name], tensor.shape, f"h {name}".strip()) for name, tensor in weights.items()}
    if any(bool((tensor < 0).any()) for tensor in full.values()):
        raise ShapeError("h holds negative values: the metric of a proximal step is at least 0")
    return _gather(full, bound, "h")


def _expand(values: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    try:
        return values.expand(shape)
    except RuntimeError:
        raise ShapeError(f"{what} of shape {tuple(values.shape)} does not broadcast to {tuple(shape)}") from None


def _named(W: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights by name, a single one under the empty name."""
    return {"": W} if isinstance(W, Tensor) else W
