"""damp="auto": the rung that errs least on held-out tokens, honest on a third part, and never worse than Wanda."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers.damping import LADDER, climb


def parts(tokens_per_input, K=64, M=32, seed=0):
    """A weight, and moments of three parts of one source: to solve on, to pick by, to measure on."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * torch.arange(1, K + 1) ** -0.5

    def moment(count):
        return s3.hessian(torch.randn(count, K, generator=generator) @ mix.T)

    tokens = int(tokens_per_input * K)
    return torch.randn(M, K, generator=generator), moment(tokens), moment(max(K, tokens // 2)), moment(64 * K)


@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
@pytest.mark.parametrize("tokens_per_input", [0.25, 0.5, 1, 2, 8])
def test_auto_is_near_the_best_rung_and_below_wanda_on_new_tokens(tokens_per_input, solver):
    W, H, H_test, H_new = parts(tokens_per_input)

    def error(**options):
        return s3.output_error(s3.prune(W, "2:4", H, H_test=H_test, **options).weight, W, H_new)

    auto = error(solver=solver, damp="auto")
    assert auto <= 1.02 * min(error(solver=solver, damp=damp) for damp in LADDER)
    assert auto <= error(solver="wanda")


@pytest.mark.parametrize("best", LADDER)
def test_the_climb_finds_the_bottom_of_any_valley(best):
    tried = climb(lambda damp: float(abs(LADDER.index(damp) - LADDER.index(best))))
    assert min(tried, key=tried.get) == best and len(tried) <= len(LADDER)


def test_a_solution_says_which_rungs_were_tried():
    W, H, H_test, _ = parts(1)
    found = s3.prune(W, "2:4", H, "sparsegpt", H_test=H_test, damp="auto")
    assert found.stats["damp"] in found.stats["damps"]
    assert found.error_test == min(found.stats["damps"].values())


def test_nothing_held_out_is_refused():
    W, H, _, _ = parts(1)
    with pytest.raises(s3.SolveError, match="H_test"):
        s3.prune(W, "2:4", H, damp="auto")


def test_couplings_are_damped_together():
    W, H, H_test, _ = parts(0.5)
    found = s3.prune(
        {"a": W, "b": W}, "a: (M,1) & b: (M,1) keep 50%", {"a": H, "b": H}, H_test={"a": H_test}, damp="auto"
    )
    assert found["a"].stats["damp"] == found["b"].stats["damp"]
