"""Variance correction: the exact moment, the mask left alone, and weights that do not vary."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers.variance import match_variance


def layer(M=6, K=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(64, K, generator=generator)
    return 0.3 + torch.randn(M, K, generator=generator), s3.hessian(X)


@pytest.mark.parametrize("text", ["2:4", "1:4", "8:16"])
@pytest.mark.parametrize("solver", ["magnitude", "ria", "sparsegpt"])
def test_rows_vary_as_much_as_before(text, solver):
    W, H = layer()
    plain, corrected = s3.prune(W, text, H, solver), s3.prune(W, text, H, s3.MatchVariance(s3.SOLVERS[solver]()))
    assert torch.equal(plain.mask, corrected.mask)
    torch.testing.assert_close(corrected.weight.var(1, correction=0), W.var(1, correction=0))
    ratio = (corrected.weight / plain.weight)[plain.mask].view(len(W), -1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_a_matrix_varies_as_much_as_before():
    W, H = layer()
    found = s3.prune(W, "2:4", H, s3.MatchVariance(s3.Wanda(), per="matrix"))
    torch.testing.assert_close(found.weight.var(correction=0), W.var(correction=0))


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
def test_what_does_not_vary_stays_as_it_is(per, value):
    W = torch.full((3, 8), value)
    pruned = W * (torch.arange(8) % 2)
    assert torch.equal(match_variance(pruned, W, per), pruned)
    assert torch.equal(match_variance(W, torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), per), W)


def test_a_row_of_zeros_is_no_matter_to_the_others():
    W, H = layer()
    W[2] = 0
    found = s3.prune(W, "2:4", H, s3.MatchVariance(s3.RIA()))
    assert not found.weight[2].any()
    torch.testing.assert_close(found.weight.var(1, correction=0), W.var(1, correction=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype):
    W, H = layer()
    found = s3.prune(W.to(dtype), "2:4", H, s3.MatchVariance(s3.Wanda()))
    assert found.weight.dtype == dtype
    torch.testing.assert_close(found.weight.double().var(1), W.to(dtype).double().var(1), rtol=0.02, atol=0)


def test_coupled_tensors_are_corrected_each():
    W = {"up": layer(8, 16)[0], "down": layer(6, 8)[0]}
    H = {"up": layer(8, 16)[1], "down": layer(6, 8)[1]}
    found = s3.prune(W, "down: (M,1) & up: (1,K) keep 50%", H, s3.MatchVariance(s3.Wanda(), per="matrix"))
    for name, solution in found.items():
        torch.testing.assert_close(solution.weight.var(correction=0), W[name].var(correction=0))
