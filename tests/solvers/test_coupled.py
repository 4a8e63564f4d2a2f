"""Every solver on couplings, against brute force over all masks and against what must come out when nothing couples."""

from itertools import combinations

import pytest
import torch

import s3lab as s3

SCORES_ONLY = ("magnitude", "wanda", "ria", "obd")
PAIR = {"up": (8, 6), "down": (5, 8)}
CASES = {
    "down: (M,1) & up: (1,K) follows keep 50%": PAIR,
    "down: (M,1) & up: (1,K) keep 50%": PAIR,
    "down: (M,2) & up: (2,K) keep 2": PAIR,
    "a: (1,1) & b: (1,1) / (1,4) keep 2": {"a": (4, 8), "b": (4, 8)},
    "a: (1,1) / (1,4) | b: (1,1) / (1,4) keep 4": {"a": (4, 8), "b": (4, 8)},
    "a: (1,1) | b: (1,1) keep 50%": {"a": (4, 8), "b": (6, 8)},
}


def layers(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    W = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    H = {}
    for name, (_, K) in shapes.items():
        mix = torch.randn(K, K, generator=generator, dtype=dtype)
        X = torch.randn(64, K, generator=generator, dtype=dtype) @ mix
        H[name] = X.T @ X / 64
    return W, H


def damped(H):
    return H + 1e-2 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def loss_of(W_hat, W, H):
    return float(torch.trace((W_hat - W) @ damped(H) @ (W_hat - W).T))


def best_loss(W, H, mask):
    root = torch.linalg.cholesky(damped(H)).T
    fit = torch.zeros_like(W)
    for i, support in enumerate(mask):
        fit[i, support] = torch.linalg.lstsq(root[:, support], root @ W[i]).solution
    return loss_of(fit, W, H)


@pytest.mark.parametrize("name", s3.SOLVERS)
@pytest.mark.parametrize("text", CASES)
def test_every_solver_takes_couplings(name, text):
    W, H = layers(CASES[text], dtype=torch.float32)
    spec = s3.parse(text)
    found = s3.prune(W, spec, {n: H[n] for n in spec.bind(CASES[text]).leaders}, solver=name, refit=True)
    spec.check({n: solution.mask for n, solution in found.items()})
    for n, solution in found.items():
        assert torch.equal(solution.weight != 0, solution.mask) and solution.weight.isfinite().all()
        assert (solution.error is None) == (n in spec.followers)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n in s3.SOLVERS if n not in SCORES_ONLY])
def test_the_sum_over_the_leaders_is_near_its_least(name, seed):
    """Of all choices of 4 of 8 hidden units, by brute force."""
    W, H = layers(PAIR, seed)
    text = "down: (M,1) & up: (1,K) keep 50%"
    losses = []
    for units in combinations(range(8), 4):
        kept = torch.zeros(8, dtype=torch.bool)
        kept[list(units)] = True
        masks = {"up": kept[:, None].expand(PAIR["up"]), "down": kept.expand(PAIR["down"])}
        losses.append(sum(best_loss(W[n], H[n], masks[n]) for n in PAIR))
    found = s3.prune(W, text, H, solver=name, refit=True)
    total = sum(loss_of(found[n].weight, W[n], H[n]) for n in PAIR)
    assert (
        min(losses) * (1 - 1e-9)
        <= total
        <= {"sobs": 1.2, "sparsegpt": 1.5, "admm": 2.0, "best": 1.5}[name] * min(losses)
    )


@pytest.mark.parametrize("name", s3.SOLVERS)
def test_a_follower_changes_nothing_for_its_leader(name):
    W, H = layers(PAIR)
    alone = s3.prune(W["down"], "50% columns", H["down"], solver=name)
    found = s3.prune(W, "down: (M,1) & up: (1,K) follows keep 50%", {"down": H["down"]}, solver=name)
    assert torch.equal(found["down"].mask, alone.mask)
    torch.testing.assert_close(found["down"].weight, alone.weight, rtol=1e-6, atol=1e-8)
    assert torch.equal(found["up"].mask, alone.mask.any(0)[:, None].expand(PAIR["up"]))
    assert torch.equal(found["up"].weight, W["up"] * found["up"].mask)


# ADMM, and so the best, has a ρ for each tensor, and RIA's scores are shares of a tensor's own columns
@pytest.mark.parametrize("name", [n for n in s3.SOLVERS if n not in ("admm", "best", "ria")])
@pytest.mark.parametrize("shared", [True, False])
def test_tensors_that_share_only_a_text_are_pruned_as_if_alone(name, shared):
    """Two tensors under one scope of their own each, told as a single larger tensor cut in two."""
    W, H = layers({"a": (4, 8), "b": (4, 8)})
    moments = {"a": H["a"], "b": H["a"] if shared else H["a"].clone()}
    found = s3.prune(W, "a: (1,1) | b: (1,1) keep 50%", moments, solver=name)
    whole = s3.prune(torch.cat([W["a"], W["b"]]), "50%", H["a"], solver=name)
    if shared or name in SCORES_ONLY:
        assert torch.equal(torch.cat([found["a"].mask, found["b"].mask]), whole.mask)
    kept = sum(int(solution.mask.sum()) for solution in found.values())
    assert kept == 32


def test_followers_need_no_moments_and_leaders_do():
    W, H = layers(PAIR)
    with pytest.raises(s3.SolveError, match="second moment"):
        s3.prune(W, "down: (M,1) & up: (1,K) keep 50%", {"down": H["down"]}, solver="obd")
    with pytest.raises(s3.SolveError, match="no weight"):
        s3.prune(W, "down: (M,1) & up: (1,K) keep 50%", {"side": H["down"]}, solver="obd")
