"""Inputs pruned token by token: against a loop over single numbers, by the laws of the corrections, at the edges."""

import pytest
import torch

import s3lab as s3
from s3lab.tensors.activation import (
    bind_token,
    choose_features,
    find_centre,
    match_variance,
    prune_tokens,
    split_low_rank,
    weigh_columns,
)

PATTERNS = ["2:4", "1:4", "8:16", "2:4@1x2", "50%/row", "1:3", "(M,K/8,4,2):(K,8,1,4) / (1,1,1,1) / (1,1,1,2) keep 1"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_by_hand(scores, n, m):
    """N of every M of each row, of equals the first, one number after the other."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        for start in range(0, len(row), m):
            order = sorted(range(start, start + m), key=lambda k: (-row[k], k))
            for k in order[:n]:
                mask[t, k] = True
    return mask


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("8:16", 8, 16), ("50%/row", 24, 48)])
@pytest.mark.parametrize("criterion", ["act", "clact", "amber"])
def test_the_mask_of_each_criterion_is_the_loops(text, n, m, criterion):
    X, W = draw(7, 48), draw(5, 48, seed=1)
    X[0] = X[0].round()  # with ties
    part = bind_token(s3.parse(text), 48)
    if criterion == "act":
        factor, scores = None, X.abs()
    elif criterion == "clact":
        # the paper's own score, the token's norm and all
        factor = X.square().mean(0).sqrt()
        scores = X.abs() * X.norm(dim=0) / X.norm(dim=1, keepdim=True)
    else:
        factor = weigh_columns(W)
        low, high = W.flatten().sort().values[[1, -2]]  # 0.5 % of 240 weights, from either end
        clipped = W.clamp(low, high)
        scores = X.abs() * ((clipped - clipped.mean()) / clipped.std(correction=0)).square().sum(0).sqrt()
    assert torch.equal(choose_features(X, part, factor), mask_by_hand(scores, n, m))


@pytest.mark.parametrize("text", PATTERNS)
def test_a_token_is_pruned_alike_whatever_stands_beside_it(text):
    pattern, X = s3.parse(text), draw(6, 48)
    part = bind_token(pattern, 48)
    mask = choose_features(X, part)
    assert torch.equal(mask, pattern.bind((6, 48)).project(X.abs()))  # the spec of weights, applied to (T, K)
    pattern.check(mask)
    assert torch.equal(mask, torch.cat([choose_features(x[None], part) for x in X]))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("50%", "over several"),
        ("2:4@2x1", "does not fit"),
        ("tiles16", "does not fit"),
        ("50% columns", "over several"),
        ("(M,K):(K,1) / (1,1) / (1,M) keep 1", "over several"),
        ("2:4 each way", "one spec"),
        ("8:16 plus 16:256", "one spec"),
        ("block16", "does not fit"),
    ],
)
def test_a_pattern_that_is_not_of_one_token_is_refused(text, reason):
    with pytest.raises(s3.SpecError, match=reason):
        bind_token(s3.parse(text), 256)


def test_features_that_a_scope_does_not_divide_are_refused():
    with pytest.raises(s3.SpecError, match=r"'8:16' does not fit one token of 40 features"):
        bind_token(s3.parse("8:16"), 40)


@pytest.mark.parametrize("shift", [None, "median", "mean", "channel"])
@pytest.mark.parametrize("variance", [False, True])
def test_kept_features_are_scaled_about_the_shift_and_others_are_the_shift(shift, variance):
    X, part = draw(9, 32), bind_token(s3.parse("2:4"), 32)
    shift = draw(32, seed=2) if shift == "channel" else shift
    centre = (
        {None: torch.zeros(9, 1), "mean": X.mean(1, keepdim=True)}.get(shift) if not torch.is_tensor(shift) else shift
    )
    if isinstance(shift, str) and shift == "median":
        centre = X.sort(dim=1).values[:, 15:16]
    moved = X - centre
    kept = mask_by_hand(moved.abs(), 2, 4)
    pruned = torch.where(kept, moved, 0.0)
    ratio = (moved.var(1, correction=0) / pruned.var(1, correction=0)).sqrt()[:, None] if variance else 1.0
    torch.testing.assert_close(prune_tokens(X, part, shift=shift, variance=variance), ratio * pruned + centre)


def test_variance_is_restored_exactly():
    X, part = draw(50, 64, seed=3).double() + 0.7, bind_token(s3.parse("8:16"), 64)
    for shift in (None, "mean", "median"):
        found = prune_tokens(X, part, shift=shift, variance=True)
        torch.testing.assert_close(found.var(1), X.var(1), rtol=1e-12, atol=0)
    eta = draw(64, seed=4).double()
    found = prune_tokens(X, part, shift=eta, variance=True)
    torch.testing.assert_close((found - eta).var(1), (X - eta).var(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [None, "median", "mean"])
def test_constant_and_zero_rows_stay_finite(shift):
    X = torch.stack([torch.zeros(16), torch.full((16,), 0.1), torch.full((16,), -3e4), draw(16)])
    part = bind_token(s3.parse("2:4"), 16)
    found = prune_tokens(X, part, shift=shift, variance=True)
    assert found.isfinite().all() and not found[0].any()
    if shift is None:
        assert torch.equal(found[1], torch.where(choose_features(X, part)[1], X[1], 0.0))  # ν = 1
    else:
        torch.testing.assert_close(found[1:3], X[1:3])  # a constant is its own centre


def test_a_single_feature_has_no_variance():
    x = torch.tensor([[3.0], [0.0]])
    assert torch.equal(prune_tokens(x, bind_token(s3.parse("1:1"), 1), variance=True), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_float32_rounded(dtype):
    X, part = draw(2, 5, 32).to(dtype), bind_token(s3.parse("8:16"), 32)
    found = prune_tokens(X, part, draw(32, seed=5).abs(), "mean", True)
    assert found.dtype == dtype and found.shape == X.shape
    expected = prune_tokens(X.float(), part, draw(32, seed=5).abs(), "mean", True)
    torch.testing.assert_close(found.float(), expected.to(dtype).float(), rtol=1e-6, atol=1e-6)


def test_no_tokens_and_another_width():
    part = bind_token(s3.parse("2:4"), 8)
    assert prune_tokens(torch.zeros(0, 8), part, shift="median", variance=True).shape == (0, 8)
    assert prune_tokens(torch.zeros(3, 0, 8), part).shape == (3, 0, 8)
    with pytest.raises(s3.ShapeError, match="12 features where 2:4 is bound to 8"):
        prune_tokens(torch.zeros(3, 12), part)


def test_what_is_not_a_number_shows_in_the_output():
    X, part = draw(3, 8), bind_token(s3.parse("1:4"), 8)
    X[0, 2], X[1, 5] = torch.nan, -torch.inf
    found = prune_tokens(X, part)
    assert found[0, 2].isnan() and found[1, 5] == -torch.inf and torch.equal(found[2], prune_tokens(X[2:], part)[0])


def test_a_shift_has_its_gradient():
    X, part = draw(4, 8).double(), bind_token(s3.parse("2:4"), 8)
    shift = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    for variance in (False, True):
        assert torch.autograd.gradcheck(lambda eta, v=variance: prune_tokens(X, part, shift=eta, variance=v), shift)


def test_centres_and_the_nearest_matrix():
    X = draw(5, 8)
    assert torch.equal(find_centre(X, "median")[:, 0], X.sort(dim=1).values[:, 3])
    for W in (draw(6, 8, seed=1), draw(8, 6, seed=2)):
        for rank in (1, 3, 6):
            A, B = split_low_rank(W, rank)
            assert A.shape == (len(W), rank) and B.shape == (rank, W.shape[1])
            left = torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
            torch.testing.assert_close((W - A @ B).norm(), left, rtol=1e-4, atol=1e-5)
    with pytest.raises(s3.SpecError, match="give 1 to 6"):
        split_low_rank(W, 7)
    assert torch.equal(weigh_columns(torch.full((3, 4), 2.0)), torch.ones(4))
    assert torch.equal(match_variance(X, X), X)
