"""Outputs that count unlike: the weighted error is what is least, told, and shared out over the rows."""

from itertools import combinations

import pytest
import torch

import s3lab as s3

PATTERNS = ["2:4", "50%", "1:2@2x2", "(M/2,2,K):(2*K,K,1) / (1,2,1) / (1,1,4) keep 2", "2:8 plus 2:4"]
COUNTS = torch.tensor([4.0, 0.25, 64.0, 1.0])  # powers of four, whose roots are exact


def draw(M=4, K=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(M, K, generator=generator, dtype=torch.float64)
    X = torch.randn(60, K, generator=generator, dtype=torch.float64) @ torch.randn(
        K, K, generator=generator, dtype=torch.float64
    )
    return W.to(dtype), s3.hessian(X).to(dtype)


def weighted_loss(W_hat, W, H, outputs):
    return sum(float(g * (a - b) @ H @ (a - b)) for g, a, b in zip(outputs, W_hat, W, strict=True))


def best_fit(W, H, mask):
    """The least error of each row on a support, by the normal equations."""
    fit = torch.zeros_like(W)
    for i, kept in enumerate(mask):
        fit[i, kept] = torch.linalg.solve(H[kept][:, kept], (H @ W[i])[kept])
    return fit


def all_halves(M, K):
    for kept in combinations(range(M * K), M * K // 2):
        mask = torch.zeros(M * K, dtype=torch.bool)
        mask[list(kept)] = True
        yield mask.view(M, K)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("solver", s3.SOLVERS)
def test_every_solver_prunes_rows_as_if_they_were_that_much_larger(solver, text):
    W, H = draw()
    roots = COUNTS.sqrt()[:, None]
    weighted, scaled = s3.prune(W, text, H, solver, outputs=COUNTS), s3.prune(W * roots, text, H, solver)
    assert torch.equal(weighted.mask, scaled.mask)
    assert torch.equal(weighted.weight * roots, scaled.weight)
    assert weighted.error == pytest.approx(scaled.error, rel=1e-9)


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "obd", "sparsegpt", "admm"])
def test_where_no_rows_compete_outputs_change_nothing(solver):
    W, H = draw()
    plain, weighted = s3.prune(W, "2:4", H, solver), s3.prune(W, "2:4", H, solver, outputs=COUNTS)
    assert torch.equal(plain.weight, weighted.weight) and torch.equal(plain.mask, weighted.mask)
    assert plain.error != weighted.error


@pytest.mark.parametrize("seed", range(4))
def test_half_of_a_matrix_is_the_best_half_by_the_weighted_error(seed):
    W, H = draw(3, 4, seed, torch.float64)
    outputs = torch.tensor([1.0, 9.0, 0.1], dtype=torch.float64)
    options = {"solver": "admm", "damp": 0.0, "refine": True}
    plain, weighted = s3.prune(W, "50%", H, **options), s3.prune(W, "50%", H, outputs=outputs, **options)
    least = min(weighted_loss(best_fit(W, H, mask), W, H, outputs) for mask in all_halves(3, 4))
    assert weighted_loss(weighted.weight, W, H, outputs) == pytest.approx(least, rel=1e-6)
    assert weighted_loss(plain.weight, W, H, outputs) > 1.2 * least


def test_two_tensors_share_a_budget_by_what_their_outputs_count():
    W, H = draw(2, 4, dtype=torch.float64)
    weights, moments = {"a": W[:1], "b": W[1:]}, dict.fromkeys("ab", H.diagonal().diag())
    outputs = {"a": torch.tensor([5.0]).double(), "b": torch.tensor([0.5]).double()}
    found = s3.prune(weights, "a: (1,1) | b: (1,1) keep 50%", moments, "obd", damp=0.0, outputs=outputs)
    joint = torch.cat([found["a"].weight, found["b"].weight])
    counts, H = torch.cat([outputs["a"], outputs["b"]]), moments["a"]
    least = min(weighted_loss(W * mask, W, H, counts) for mask in all_halves(2, 4))
    assert weighted_loss(joint, W, H, counts) == pytest.approx(least)


def test_errors_are_those_of_the_weighted_outputs():
    W, H = draw(dtype=torch.float64)
    outputs = torch.rand(4, generator=torch.Generator().manual_seed(5)).double()
    found = s3.prune(W, "2:4", H, "sobs", H_test=2 * H, outputs=outputs)
    expected = (weighted_loss(found.weight, W, H, outputs) / weighted_loss(W * 0, W, H, outputs)) ** 0.5
    assert found.error == pytest.approx(expected) and found.error_test == pytest.approx(expected)


@pytest.mark.parametrize("solver", s3.SOLVERS)
def test_rows_that_count_nothing_keep_the_values_of_what_is_kept(solver):
    W, H = draw()
    found = s3.prune(W.bfloat16(), "50%", H, solver, outputs=torch.tensor([1.0, 0.0, 3.0, 0.0]))
    idle = torch.tensor([1, 3])
    assert torch.equal(found.weight[idle], W.bfloat16()[idle] * found.mask[idle])
    assert found.mask[[0, 2]].all() and not found.mask[idle].any()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_only_the_ratio_of_the_counts_matters(factor):
    W, H = draw()
    found = [s3.prune(W, "50%", H, "sparsegpt", outputs=COUNTS.double() * f) for f in (1.0, factor)]
    assert torch.equal(found[0].mask, found[1].mask)
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=1e-4, atol=1e-5)
