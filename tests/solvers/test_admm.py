"""ADMM: near the brute-force optimum on tiny problems, below S-OBS on larger ones, and nothing but a projection."""

import pytest
import torch

import s3lab as s3
from s3lab.models.layers import generate_layer

TINY = ["2:4", "1:4", "1:2@2x2", "50%/row", "50%"]


def small(seed, M=2, K=8):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(40, K, generator=generator, dtype=torch.float64) @ torch.randn(
        K, K, generator=generator, dtype=torch.float64
    )
    return torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / 40


@pytest.mark.parametrize("text", TINY)
def test_its_weight_is_the_optimum_of_its_support(text):
    for seed in range(4):
        W, H = small(seed)
        found = s3.prune(W, text, H, "admm")
        again = s3.Refit()(s3.Problem(W, H), found.mask)
        torch.testing.assert_close(found.weight, again.weight, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("text", ["2:4", "2:4@1x2", "coupled-2:4", "8:16", "50%/row"])
def test_its_error_is_below_that_of_sobs_and_far_below_sparsegpts(text, decay):
    layer = generate_layer(64, 256, 2048, decay=decay)
    error = {name: s3.prune(layer.W, text, layer.H, name).error for name in ("sparsegpt", "sobs", "admm")}
    assert error["admm"] < error["sobs"] and error["admm"] < 0.95 * error["sparsegpt"]


@pytest.mark.parametrize("text", ["2:4", "8:16", "block16"])
def test_more_effort_finds_a_lower_error(text):
    layer = generate_layer(64, 256, 2048)
    quick, balanced, thorough = (
        s3.prune(layer.W, text, layer.H, s3.ADMM(effort=effort)).error for effort in ("quick", "balanced", "thorough")
    )
    assert thorough <= 1.001 * balanced <= 1.002 * quick


def test_options_take_the_place_of_the_efforts():
    W, H = small(0)
    told = s3.ADMM(effort="quick", rho=0.07, growth=1.3, hold=3)
    assert torch.equal(s3.prune(W, "2:4", H, told).weight, s3.prune(W, "2:4", H, "admm").weight)
    assert s3.prune(W, "2:4", H, s3.ADMM(max_steps=2)).stats["steps"] == 2


def test_uncorrelated_inputs_leave_nothing_to_make_good():
    """With a diagonal H the best support is that of the largest w²h, and its weights stay as they are."""
    W, _ = small(1, 16, 32)
    H = torch.diag(torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1)
    for text in TINY:
        found, best = (s3.prune(W, text, H, name) for name in ("admm", "obd"))
        assert best.error <= found.error * (1 + 1e-9) and found.error <= 1.05 * best.error
        torch.testing.assert_close(found.weight, W * found.mask)


def test_inputs_that_repeat_each_other_need_no_more_damping():
    """In float32, whose Cholesky fails at a ρ this small, and at the damping that was asked for."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(512, 4, generator=generator).double() @ torch.randn(4, 256, generator=generator).double()
    W, H = torch.randn(8, 256, generator=generator), X.T @ X / 512
    found, coarse = (s3.prune(W, "2:4", H, name, damp=1e-7) for name in ("admm", "wanda"))
    assert found.stats["damp"] == 1e-7 and found.error < 0.1 * coarse.error


def test_it_says_how_it_ended():
    layer = generate_layer(32, 64, 512)
    stats = s3.prune(layer.W, "2:4", layer.H, "admm").stats
    assert stats["changes"] <= 1e-4 * 32 * 64 and stats["rho"] > 0.07 and 3 < stats["steps"] < 500
    assert stats["residual"] <= 3e-4


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"growth": 1.0}, {"hold": -2}, {"max_steps": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(s3.SolveError, match=str(next(iter(options)))):
        s3.ADMM(**options)
