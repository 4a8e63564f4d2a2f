"""Inputs pruned token by token: which features of a row stay, and what makes up for those that go.

Source: arXiv 2509.22166, of which REFERENCES.md tells what was read and what is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.partition import Partition
from s3lab.algebra.spec import Pattern, Spec
from s3lab.errors import ShapeError, SpecError
from s3lab.shapes import Bool, Float

Centre = Literal["median", "mean"]


@dataclass(frozen=True, eq=False)
class TokenPattern:
    """A pattern on the ``K`` features of a token: each scope of ``B`` blocks of ``E`` features keeps ``keep`` blocks.

    ``order`` (K,) has the features scope by scope and block by block, None where that is how they stand.
    """

    text: str
    K: int
    B: int
    E: int
    keep: int
    order: Tensor | None


@lru_cache(maxsize=256)
def bind_token(pattern: Pattern, K: int) -> TokenPattern:
    """Return a pattern on the K features of one token, to be pruned alike whatever tokens stand beside it.

    A token is then pruned the same in a long prompt, in a padded batch, and alone beside a cache.  Raises SpecError,
    saying why, for a pattern that on two tokens is not that of one token twice: one whose blocks or scopes reach over
    several rows, or hang on their number, one that keeps as many each way, and one made of several patterns.

    >>> from s3lab import parse
    >>> bind_token(parse("2:4"), 8).B, bind_token(parse("50%/row"), 8).B
    (4, 8)
    >>> bind_token(parse("50%"), 8)
    Traceback (most recent call last):
    s3lab.errors.SpecError: '50%' prunes no token by itself: its scopes reach over several; use '50%/row' or N:M
    """
    if not isinstance(pattern, Spec) or pattern.scope.each_way:
        raise SpecError(f"'{pattern}' prunes no token by itself: give one spec that decides row by row, such as '8:16'")
    try:
        one, two = (pattern.bind((T, K)) for T in (1, 2))
    except SpecError as error:
        raise SpecError(f"'{pattern}' does not fit one token of {K} features: {error}") from error
    alone = _list_scopes(one)
    if one.keep != two.keep or _list_scopes(two) != alone | {
        frozenset(frozenset(k + K for k in block) for block in scope) for scope in alone
    }:
        raise SpecError(f"'{pattern}' prunes no token by itself: its scopes reach over several; use '50%/row' or N:M")
    order = torch.tensor(list(one.layout.offsets()))
    return TokenPattern(one.text, K, one.B, one.E, one.keep, order if (order.diff() != 1).any() else None)


def prune_tokens(
    x: Float[Tensor, "... K"],
    part: TokenPattern,
    factor: Float[Tensor, " K"] | None = None,
    shift: Float[Tensor, " K"] | Centre | None = None,
    variance: bool = False,
) -> Float[Tensor, "... K"]:
    """Return the tokens with some of their features put to η, zero without a shift, and the others scaled about it.

        x̂ = η + ν · mask ⊙ (x − η),    mask by |x − η| ⊙ f,    ν = √(Var(x − η) / Var(mask ⊙ (x − η))) or 1

    ``part`` is what `bind_token` gives, ``factor`` f what the criterion weighs the features by, ``shift`` η a vector,
    or "median" (of an even count the lower) or "mean" of each token.  With ``variance``, that of x − η over the
    features of a token is what it was before: the shift is left out of it, our reading.  A token whose variance is
    zero to float32, against its mean square, keeps ν = 1, and so does one of which nothing that varies is kept.

    Work is in float32, in float64 for float64, and the dtype of x is given back.  NaN and Inf are kept before all
    else, so that they show in the output as in the dense layer's.  Raises ShapeError where the widths differ.
    Differentiable in x, f aside, and in a shift that is a vector.

    >>> from s3lab import parse
    >>> prune_tokens(torch.tensor([[3.0, -1.0, 2.0, -4.0]]), bind_token(parse("2:4"), 4))
    tensor([[ 3.,  0.,  0., -4.]])
    """
    if x.shape[-1] != part.K:
        raise ShapeError(f"tokens of {x.shape[-1]} features where {part.text} is bound to {part.K}")
    if not x.numel():
        return x
    work = x.flatten(0, -2) if x.dtype == torch.float64 else x.flatten(0, -2).float()
    centre = find_centre(work, shift) if isinstance(shift, str) else shift
    moved = work if centre is None else work - centre
    pruned = moved.where(choose_features(moved.detach(), part, factor), 0)
    if variance:
        pruned = match_variance(pruned, moved)
    return (pruned if centre is None else pruned + centre).to(x.dtype).view(x.shape)


def choose_features(
    x: Float[Tensor, "T K"], part: TokenPattern, factor: Float[Tensor, " K"] | None = None
) -> Bool[Tensor, "T K"]:
    """Return the mask of the features that stay, by the sums of |x| ⊙ f over the blocks of each token."""
    scores = x.abs() if factor is None else x.abs() * factor.to(x.dtype)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    order = None if part.order is None else part.order.to(x.device)
    blocks = (scores if order is None else scores[:, order]).reshape(-1, part.B, part.E)
    kept = keep_highest(blocks.sum(-1), part.keep).unsqueeze(-1).expand_as(blocks).reshape(x.shape)
    return kept if order is None else torch.empty_like(kept).index_copy_(1, order, kept)


def find_centre(x: Float[Tensor, "T K"], kind: Centre) -> Float[Tensor, "T 1"]:
    """Return the median, of an even count the lower, or the mean of each token."""
    return x.median(-1, keepdim=True).values if kind == "median" else x.mean(-1, keepdim=True)


def match_variance(pruned: Float[Tensor, "T K"], x: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    """Return pruned tokens scaled to the variance of x over the features of each: √(Var x / Var pruned), or 1.

    1 for a token whose variance, before or after, is nothing but rounding against its mean square.

    >>> match_variance(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, -3.0], [1.0, 1.0]]))
    tensor([[6., 0.],
            [1., 0.]])
    """
    wanted, found = (t.var(-1, correction=0, keepdim=True) for t in (x, pruned))
    least = torch.finfo(torch.float32).eps
    real = (wanted > least * x.square().mean(-1, keepdim=True)) & (
        found > least * pruned.square().mean(-1, keepdim=True)
    )
    return pruned * (wanted.where(real, 1) / found.where(real, 1)).sqrt()


def weigh_columns(W: Float[Tensor, "M K"], clip: float = 0.005) -> Float[Tensor, " K"]:
    """Return Amber's factors of the features: the norms of the columns of a weight without its outliers.

        f_k = ‖(clamp(W) − mean) / std‖ over the outputs, mean and std of all of clamp(W)

    clamp bounds the weights by their quantiles ``clip`` and 1 − ``clip``, our reading of the robust norm of Amber
    Pruner (arXiv 2508.02128).  A weight that is constant gives ones.

    >>> weigh_columns(torch.tensor([[1.0, 3.0], [1.0, -5.0]]), clip=0.0)
    tensor([0.4714, 1.9437])
    """
    W = W.float()
    last = W.numel() - 1
    low, high = (W.flatten().kthvalue(1 + round(share * last)).values for share in (clip, 1 - clip))
    W = W.clamp(low, high)
    spread = W.std(correction=0)
    return ((W - W.mean()) / spread).norm(dim=0) if spread > 0 else torch.ones_like(W[0])


def split_low_rank(W: Float[Tensor, "M K"], rank: int) -> tuple[Float[Tensor, "M r"], Float[Tensor, "r K"]]:
    """Return A (M, r) and B (r, K) of the nearest AB to W: what W is on its first ``rank`` singular vectors.

    One of them is the vectors, U or Vᵀ of the shorter side, the other UᵀW or WV.  Raises SpecError for a rank that W
    cannot have.  Cost: the eigenvalues of a matrix of the shorter side, in float64.

    >>> A, B = split_low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (A @ B).abs().tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    M, K = W.shape
    if not 1 <= rank <= min(M, K):
        raise SpecError(f"rank = {rank} of a weight ({M}, {K}): give 1 to {min(M, K)}")
    short = (W if M <= K else W.T).double()
    vectors = torch.linalg.eigh(short @ short.T).eigenvectors[:, -rank:]
    pair = vectors.float().contiguous(), (vectors.T @ short).float()
    return pair if M <= K else (pair[1].T.contiguous(), pair[0].T.contiguous())


def _list_scopes(part: Partition) -> set[frozenset[frozenset[int]]]:
    """The scopes as sets of blocks, and these as sets of offsets."""
    offsets = torch.tensor(list(part.layout.offsets())).view(part.S, part.B, part.E).tolist()
    return {frozenset(map(frozenset, blocks)) for blocks in offsets}
