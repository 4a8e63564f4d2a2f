"""Local search: the loss never rises, a gain is what brute force finds, and the end is a local optimum."""

from itertools import product

import pytest
import torch

import s3lab as s3
from s3lab.models.measure.layers import generate_layer
from s3lab.solvers.refine import _Search

ALONE = ["2:4", "1:4", "3:4", "2:4@1x2", "50%/row", "(M,K/4,2,2):(K,4,1,2) / (1,1,1,2) / (1,1,2,1) keep 1"]
TIED = ["block16", "50%", "1:2@4x4", "50% columns", "50% rows"]


def small(seed, M=3, K=8):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator, dtype=torch.float64)
    X = torch.randn(40, K, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / 40


def loss_on(problem, mask):
    apart = problem.weight - s3.Refit()(problem, mask).weight
    return float(((apart @ problem.hessian) * apart).sum())


def exchanges(part, mask):
    """Every mask that exchanges one kept block of one scope for one pruned block of it."""
    kept = part.blocks(mask)[..., 0]
    for scope in range(part.S):
        for p, q in product(kept[scope].nonzero()[:, 0], (~kept[scope]).nonzero()[:, 0]):
            other = kept.clone()
            other[scope, p], other[scope, q] = False, True
            yield scope, part.scatter(other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ALONE)
def test_the_gain_of_an_exchange_is_the_fall_of_the_loss(text, seed):
    W, H = small(seed)
    part, problem = s3.parse(text).bind(W.shape), s3.Problem(W, H)
    mask = part.project(W**2)
    gain, _, _ = _Search(problem, part, mask)._weigh()
    best = torch.full((part.S,), -torch.inf, dtype=torch.float64)
    for scope, other in exchanges(part, mask):
        best[scope] = max(float(best[scope]), loss_on(problem, mask) - loss_on(problem, other))
    torch.testing.assert_close(gain, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ALONE)
def test_at_the_end_no_exchange_in_a_scope_helps(text, seed):
    W, H = small(seed)
    part, problem = s3.parse(text).bind(W.shape), s3.Problem(W, H)
    found = s3.prune(W, text, H, "magnitude", refine=s3.Refine(sweeps=100))
    least = loss_on(problem, found.mask)
    assert all(loss_on(problem, other) >= least * (1 - 1e-5) for _, other in exchanges(part, found.mask))


@pytest.mark.parametrize("solver", ["magnitude", "sparsegpt", "sobs", "admm"])
@pytest.mark.parametrize("text", [*ALONE, *TIED])
def test_the_loss_never_rises_sweep_by_sweep(text, solver):
    layer = generate_layer(32, 64, 512)
    problem, part = s3.Problem(layer.W, layer.H), s3.parse(text).bind((32, 64))
    search = _Search(problem, part, s3.prune(layer.W, text, layer.H, solver).mask)
    before = search.loss.clone()
    for _ in range(5):
        if search.active.any():
            search.sweep()
        part.check(search.mask)
        assert bool((search.loss <= before).all())
        before = search.loss.clone()
    assert float(before.sum()) == pytest.approx(loss_on(problem, search.mask), rel=1e-3)


def test_it_lowers_the_error_of_every_start_and_says_how():
    layer = generate_layer(64, 256, 2048)
    for solver in ("sparsegpt", "sobs", "admm"):
        plain, better = (s3.prune(layer.W, "2:4", layer.H, solver, refit=not r, refine=r) for r in (False, True))
        assert better.error < plain.error
        assert better.stats["sweeps"] >= 1 and better.stats["exchanges"] >= 1 and "Refine" in better.solver


@pytest.mark.parametrize("text", [*ALONE, *TIED])
def test_it_ends_where_nothing_gains_and_not_later_than_told(text):
    layer = generate_layer(16, 64, 512)
    problem, part = s3.Problem(layer.W, layer.H), s3.parse(text).bind((16, 64))
    start = part.project(layer.W.abs())
    mask, _, told = s3.Refine(sweeps=1000)(problem, part, start)
    assert told["sweeps"] < 100
    first, _, once = s3.Refine(sweeps=1)(problem, part, start)
    assert once["exchanges"] == int((first ^ start).sum()) / (2 * part.E)
    again = s3.Refine(sweeps=1000)(problem, part, mask)
    assert torch.equal(again[0], mask) and again[2] == {"sweeps": again[2]["sweeps"], "exchanges": 0}
    search = _Search(problem, part, start)
    for limit in (1, 2):
        search.sweep()
        found, _, stats = s3.Refine(sweeps=limit)(problem, part, start)
        assert torch.equal(found, search.mask) and stats["sweeps"] == min(limit, told["sweeps"])
        assert stats["exchanges"] == search.exchanges


@pytest.mark.parametrize("text", ["1:1", "4:4"])
def test_where_all_is_kept_nothing_changes(text):
    W, H = small(0)
    found = s3.prune(W, text, H, "magnitude", refine=True)
    assert torch.equal(found.weight, W) and found.stats["exchanges"] == 0


@pytest.mark.parametrize("text", ["2:4 each way", "2:4 plus 1:16", "50% rows then 2:4"])
def test_what_it_cannot_search_is_refused(text):
    W, H = small(0, 16, 16)
    with pytest.raises(s3.SolveError, match=f"{text}: local search exchanges blocks"):
        s3.prune(W, text, H, "obd", refine=True)


def test_coupled_tensors_are_refused():
    W, H = small(0)
    with pytest.raises(s3.SolveError, match="couples"):
        s3.prune({"a": W}, "a: (1,1) keep 50%", {"a": H}, "obd", refine=True)
