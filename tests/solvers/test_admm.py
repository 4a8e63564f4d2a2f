"""ADMM: the iteration as it is written down, the optimum of its support, and errors below S-OBS on larger problems."""

from itertools import product

import pytest
import torch

import s3lab as s3
from s3lab.models.measure.layers import generate_layer

TINY = ["2:4", "1:4", "1:2@2x2", "50%/row", "50%"]


def small(seed, M=2, K=8):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(40, K, generator=generator, dtype=torch.float64) @ torch.randn(
        K, K, generator=generator, dtype=torch.float64
    )
    return torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / 40


def damped(H):
    return H + 1e-2 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def best_fit(W, H, mask):
    """The least loss on a support, by least squares on a square root of H, row by row."""
    root, fit = torch.linalg.cholesky(H).T, torch.zeros_like(W)
    for i, support in enumerate(mask):
        fit[i, support] = torch.linalg.lstsq(root[:, support], root @ W[i]).solution
    return fit


def written_down(W, H, part, rho, growth, hold, steps):
    """The mask after some steps of ADMM as it is written down: Ŵ, D, and the dual V, in units of unit diagonal."""
    unit = H.diagonal().sqrt()
    H, W = H / unit / unit[:, None], W * unit
    V, D, mask = torch.zeros_like(W), W, torch.ones(W.shape, dtype=torch.bool)
    for step in range(steps):
        if step and step % hold == 0:
            rho *= growth
        found = (W @ H + rho * D - V) @ torch.linalg.inv(H + rho * torch.eye(len(H), dtype=H.dtype))
        mask = part.project((found + V / rho) ** 2)
        D = (found + V / rho) * mask
        V = V + rho * (found - D)
    return mask


@pytest.mark.parametrize("text", TINY)
def test_its_weight_is_the_optimum_of_its_support(text):
    for seed in range(4):
        W, H = small(seed)
        found = s3.prune(W, text, H, "admm")
        torch.testing.assert_close(found.weight, best_fit(W, damped(H), found.mask), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("hold", [1, 2, 3])
@pytest.mark.parametrize("text", ["2:4", "1:4@1x2", "50%/row"])
def test_each_iteration_is_the_one_written_down_while_rho_grows(text, hold):
    """The dual is V, not V/ρ: as ρ grows, the share V/ρ of it in what is projected falls; without inertia."""
    for seed, steps in product(range(3), (1, 4, 9)):
        W, H = small(seed, 6, 16)
        told = s3.ADMM(rho=0.05, growth=1.6, hold=hold, inertia=0.0, max_steps=steps)
        found = s3.prune(W, text, H, told)
        part, grown = s3.parse(text).bind(W.shape), (found.stats["steps"] - 1) // hold
        first = found.stats["rho"] / 1.6**grown
        expected = written_down(W, damped(H), part, first, 1.6, hold, found.stats["steps"])
        assert torch.equal(found.mask, expected)
        assert found.stats["steps"] == steps or found.stats["changes"] == 0


@pytest.mark.parametrize(("text", "width"), [("2:4", 1), ("2:4@1x2", 2), ("1:2@1x8", 8), ("1:2@2x4", 4)])
def test_the_first_rho_rises_with_the_width_of_blocks_and_falls_with_flat_directions(text, width):
    """ρ·width^¼ on inputs that do not repeat each other; less by the harmonic mean of eigenvalues on others."""
    W, H = small(0, 8, 64)
    first = s3.ADMM(rho=0.08, max_steps=1)
    diagonal = torch.diag(H.diagonal())
    assert s3.prune(W, text, diagonal, first).stats["rho"] == pytest.approx(0.08 * width**0.25)
    unit = damped(H).diagonal().sqrt()
    harmonic = 64 / torch.linalg.inv(damped(H) / unit / unit[:, None]).trace()
    assert 6 * harmonic < 1
    expected = 0.08 * width**0.25 * 6 * float(harmonic)
    assert s3.prune(W, text, H, first).stats["rho"] == pytest.approx(expected, rel=0.2)  # the trace is an estimate


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("text", ["2:4", "2:4@1x2", "coupled-2:4", "8:16", "50%/row"])
def test_its_error_is_below_that_of_sobs_and_far_below_sparsegpts(text, decay):
    layer = generate_layer(64, 256, 2048, decay=decay)
    error = {name: s3.prune(layer.W, text, layer.H, name).error for name in ("sparsegpt", "sobs", "admm")}
    assert error["admm"] < error["sobs"] and error["admm"] < 0.95 * error["sparsegpt"]


def test_more_effort_takes_more_steps_and_finds_a_lower_error():
    """More steps each time; a lower error in the mean over layers, as a single one may go the other way."""
    errors = {"quick": 1.0, "balanced": 1.0, "thorough": 1.0}
    for text, seed in product(["2:4", "8:16", "block16"], range(3)):
        layer, steps = generate_layer(32, 128, 1024, seed=seed), []
        for effort in errors:
            found = s3.prune(layer.W, text, layer.H, s3.ADMM(effort=effort))
            errors[effort] *= found.error
            steps.append(found.stats["steps"])
        assert steps == sorted(set(steps))
    assert errors["thorough"] < errors["balanced"] < errors["quick"]


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


def twice(white, seed):
    """A layer whose inputs come twice, and the error that its S-OBS leaves."""
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(32, 64, generator=generator), torch.randn(200, 64, generator=generator)
    X = X if white else X @ torch.randn(64, 64, generator=generator)
    X[:, 32:] = X[:, :32]
    return W, s3.hessian(X)


@pytest.mark.parametrize("text", ["block16", "50% columns"])
@pytest.mark.parametrize("white", [False, True])
def test_of_two_inputs_that_repeat_each_other_it_keeps_one(text, white):
    """Half of the weights are enough for most of the layer; to take both copies or none leaves far more."""
    for seed in range(2):
        W, H = twice(white, seed)
        found, alike = (s3.prune(W, text, H, s3.ADMM(inertia=inertia)) for inertia in (0.5, 0.0))
        assert found.error < 0.05 < 0.1 < alike.error


@pytest.mark.parametrize("text", ["2:4", "block16", "50%/row"])
def test_inputs_without_correlation_leave_inertia_no_hold(text):
    W, H = small(2, 16, 32)
    H = torch.diag(H.diagonal())
    found, alike = (s3.prune(W, text, H, s3.ADMM(inertia=inertia)) for inertia in (0.9, 0.0))
    assert torch.equal(found.weight, alike.weight) and found.stats["steps"] == alike.stats["steps"]


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"growth": 1.0}, {"hold": 0}, {"max_steps": 0}, {"inertia": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(s3.SolveError, match=str(next(iter(options)))):
        s3.ADMM(**options)


@pytest.mark.parametrize("text", ["2:4", "8:16", "block16"])
def test_many_rows_are_solved_for_as_few_are(text):
    """Iterations of parts that know nothing of each other: by products where rows are many, by solves where few."""
    layer = generate_layer(128, 64, 512)
    some = s3.ADMM(max_steps=4, inertia=0.0)
    whole = s3.prune(layer.W, text, layer.H, some)
    parts = [s3.prune(rows, text, layer.H, some).mask for rows in layer.W.split(32)]
    assert (whole.mask != torch.cat(parts)).double().mean() < 1e-3
