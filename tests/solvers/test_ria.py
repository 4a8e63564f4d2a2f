"""RIA against a loop over its formula, where rows and columns are zero, and what it leaves to other scores."""

import pytest
import torch

import s3lab as s3


def layer(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(64, K, generator=generator) * torch.logspace(-1, 1, K)
    return torch.randn(M, K, generator=generator), X


def loop_mask(W, X, power, N, group):
    mask = torch.zeros(W.shape, dtype=torch.bool)
    for i in range(len(W)):
        for start in range(0, W.shape[1], group):
            scores = {}
            for j in range(start, start + group):
                row = sum(abs(float(w)) for w in W[i])
                column = sum(abs(float(w)) for w in W[:, j])
                strength = sum(float(x) ** 2 for x in X[:, j]) ** 0.5
                scores[j] = abs(float(W[i, j])) * (1 / row + 1 / column) * strength**power
            for j in sorted(scores, key=lambda j: -scores[j])[:N]:
                mask[i, j] = True
    return mask


@pytest.mark.parametrize(("N", "M"), [(2, 4), (1, 4), (8, 16)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_mask_is_that_of_a_loop_over_the_formula(N, M, power):
    W, X = layer(6, 32)
    found = s3.prune(W, f"{N}:{M}", s3.hessian(X), s3.RIA(power))
    assert torch.equal(found.mask, loop_mask(W, X, power, N, M))
    assert torch.equal(found.weight, W * found.mask)


def test_rows_and_columns_of_zeros_score_nothing():
    W, X = layer(4, 8)
    W[1], W[:, 3] = 0, 0
    scores = s3.RIA().score(s3.Problem(W, s3.hessian(X)))
    assert scores.isfinite().all() and not scores[1].any() and not scores[:, 3].any()
    assert s3.prune(W, "2:4", s3.hessian(X), "ria").mask.sum() == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_weights_do_not_overflow(dtype):
    W, X = layer(4, 8)
    found = s3.prune((1e3 * W).to(dtype), "2:4", s3.hessian(X), "ria")
    assert found.weight.dtype == dtype and found.weight.isfinite().all()


def test_it_seeds_a_fit_on_its_own_mask():
    W, X = layer(6, 32)
    alone, fitted = (s3.prune(W, "8:16", s3.hessian(X), "ria", refit=refit) for refit in (False, True))
    assert torch.equal(alone.mask, fitted.mask) and fitted.error < alone.error


def test_a_power_below_zero_is_refused():
    with pytest.raises(s3.SolveError, match="from 0"):
        s3.RIA(power=-1.0)
