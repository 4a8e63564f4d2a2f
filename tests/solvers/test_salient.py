"""Salient weights kept in full: picked by any score, in every solver, and counted in bits."""

from math import ceil, comb, log2

import pytest
import torch

import s3lab as s3
from s3lab.models.measure.layers import generate_layer
from s3lab.tensors.problem import Problem

KINDS = ("4:256", "8:256", "16:256", "1%", "5%")


def layer(M=4, K=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(600, K, generator=generator) * torch.logspace(-1, 1, K)
    return torch.randn(M, K, generator=generator), s3.hessian(X)


def masks_by(score, W, H, text):
    main, salient = text.split(" plus ")
    return s3.prune(W, main, H, score).mask, s3.prune(W, salient, H, score).mask


@pytest.mark.parametrize("solver", s3.SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_keeps_the_salient_weights_of_any_score(solver, kind):
    W, H = layer()
    text = f"8:16 plus {kind}"
    for score in ("magnitude", "ria"):
        found = s3.prune(W, text, H, solver, salient=score)
        _, salient = masks_by(score, W, H, text)
        assert (found.mask | ~salient).all()
        assert found.solver.endswith(f"salient by {s3.SOLVERS[score]()}")
        s3.parse(text).check(found.mask)
        rest = (found.mask & ~salient).view(4, -1, 16).sum(-1)
        assert torch.equal(rest, (~salient).view(4, -1, 16).sum(-1).clamp(max=8))


def test_a_score_alone_keeps_no_less_of_itself_than_with_its_highest_as_the_salient_ones():
    W, H = layer()
    for score in ("magnitude", "wanda", "ria", "obd"):
        worth = s3.SOLVERS[score]().score(Problem(W, H))
        own, told = (s3.prune(W, "8:16 plus 16:256", H, score, salient=by) for by in (None, score))
        assert worth[own.mask].sum() > worth[told.mask].sum()
        assert own.mask.sum() == told.mask.sum()


@pytest.mark.parametrize("main", ["2:4", "8:16", "2:4@1x2", "4:8@8x1 then 2:4"])
@pytest.mark.parametrize("solver", ["sparsegpt", "sobs", "admm"])
def test_weights_that_the_main_part_keeps_anyway_take_no_place_of_a_salient_one(solver, main):
    W, H = layer(M=16)
    own, told = (s3.prune(W, f"{main} plus 16:256", H, solver, salient=by) for by in (None, "obd"))
    assert own.error < told.error


def test_admm_ends_where_the_projection_would_move_on_for_ever():
    """Blocks of two beside single weights: what is kept, projected again, is not all kept, whatever ρ is."""
    drawn = generate_layer(32, 128, 1024)
    found = s3.prune(drawn.W, "2:4@1x2 plus 1:16", drawn.H, "admm")
    assert found.stats["changes"] > 0.001 * drawn.W.numel()
    assert 128 < found.stats["rho"] < 2 * 128


def test_salient_parts_of_salient_patterns_are_picked_by_the_score_too():
    W, H = layer()
    text = "8:16 plus 4:256 plus 1%"
    found = s3.prune(W, text, H, "sparsegpt", salient="magnitude")
    for kind in ("4:256", "1%"):
        assert (found.mask | ~s3.prune(W, kind, H, "magnitude").mask).all()


def test_the_whole_weight_is_kept_where_salient_weights_leave_no_more_than_the_rest_keeps():
    W, H = layer()
    found = s3.prune(W, "8:16 plus 15:16", H, "wanda", salient="ria")
    assert torch.equal(found.weight, W)


@pytest.mark.parametrize("kind", ["4:256", "8:256", "16:256"])
def test_bits_of_the_sum_are_those_of_its_parts(kind):
    N, M = map(int, kind.split(":"))
    bound = s3.parse(f"8:16 plus {kind}").bind((4, 512))
    assert bound.storage_bits == ceil(log2(comb(16, 8))) / 16 + ceil(log2(comb(M, N))) / M
    assert bound.density == 0.5 + N / M


def test_other_patterns_have_no_use_for_it():
    W, H = layer()
    plain, told = (s3.prune(W, "8:16", H, "wanda", salient=by) for by in (None, "ria"))
    assert torch.equal(plain.mask, told.mask) and plain.solver == told.solver


def test_a_solver_without_scores_picks_nothing():
    with pytest.raises(s3.SolveError, match="no score of their own: use one of magnitude, wanda, ria, obd"):
        s3.prune(*layer()[:1], "8:16 plus 16:256", layer()[1], salient="sobs")


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(s3.SpecError, match="200"):
        s3.prune(torch.ones(4, 200), "8:16 plus 16:256", torch.eye(200), "ria")
