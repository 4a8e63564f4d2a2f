"""The compiled walk over a panel, against the columns that are taken one batch after the other in plain torch."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers import eliminate, sobs

TEXTS = ["2:4", "4:8", "1:4", "2:4@1x2", "2:4@16x1", "1:2@4x2", "coupled-2:4"]
M, K = 32, 208  # two panels and a part of one


@pytest.fixture
def kernel():
    if eliminate.find_kernel() is None:
        pytest.skip("no C++ compiler")


def problem(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(600, K, generator=generator) @ torch.randn(K, K, generator=generator)
    return torch.randn(M, K, generator=generator).to(dtype), s3.hessian(X.to(dtype))


def take_out(C, w, P):
    """Brain Surgeon's C and w, with zeros in rows and columns that are gone."""
    gain = C[:, P] @ torch.linalg.inv(C[P][:, P])
    return C - gain @ C[P], w - gain @ w[P]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("G", "R", "alike"), [(5, 1, True), (3, 4, True), (4, 2, False), (1, 1, True)])
def test_the_kernel_takes_what_costs_least_of_what_is_left(dtype, G, R, alike):
    generator = torch.Generator().manual_seed(G)
    n, batches = 12, [(0, 4), (4, 6), (6, 12)]
    A = torch.randn(G, n, 2 * n, generator=generator, dtype=torch.float64)
    C, w = A @ A.mT, torch.randn(G, n, R, generator=generator, dtype=torch.float64)
    order = [torch.stack([torch.randperm(b - a, generator=generator) + a for _ in range(G)]) for a, b in batches]
    sets = [(own[:1] if alike else own).unflatten(1, (-1, 2, 1)) for own in order]
    found = eliminate.take_cheapest(C.to(dtype), w.to(dtype), sets, [b for _, b in batches])
    for g in range(G):
        left, weights = C[g], w[g]
        for own, best in zip(sets, found, strict=True):
            pairs = own[0 if alike else g, :, :, 0]
            cost = weights[pairs].square().sum(-1) / left.diagonal()[pairs]
            assert torch.equal(best[g], cost.argmin(1))
            left, weights = take_out(left, weights, pairs.gather(1, best[g][:, None])[:, 0])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", TEXTS)
def test_masks_are_those_without_a_kernel(text, dtype, monkeypatch):
    W, H = problem(dtype)
    found, calls = s3.prune(W, text, H, "sobs"), []
    monkeypatch.setattr(eliminate, "find_kernel", lambda: calls.append(1))
    plain = s3.prune(W, text, H, "sobs")
    assert calls
    assert torch.equal(found.mask, plain.mask) and torch.allclose(found.weight, plain.weight, rtol=1e-3, atol=1e-4)


def test_no_compiler_is_no_error(monkeypatch):
    def fail(*_):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(eliminate, "build", fail)
    eliminate.find_kernel.cache_clear()
    try:
        C, w, sets = torch.eye(2)[None], torch.ones(1, 2, 1), torch.zeros(1, 1, 1, 1).int()
        assert eliminate.take_cheapest(C, w, [sets], [2]) is None
        W, H = problem(torch.float32)
        assert s3.prune(W, "2:4", H, "sobs").error < s3.prune(W, "2:4", H, "wanda").error
    finally:
        eliminate.find_kernel.cache_clear()


def test_sets_of_unlike_sizes_and_dtypes_are_left_to_torch():
    C, w = torch.eye(4)[None], torch.ones(1, 4, 1)
    pair, single = torch.zeros(1, 1, 1, 2).int(), torch.zeros(1, 1, 1, 1).int()
    assert eliminate.take_cheapest(C, w, [pair, single], [2, 4]) is None
    assert eliminate.take_cheapest(C.half(), w.half(), [pair, pair], [2, 4]) is None


def test_s_obs_asks_for_the_kernel_a_panel_at_a_time(monkeypatch):
    widths = []
    monkeypatch.setattr(sobs, "take_cheapest", lambda C, *rest: widths.append(C.shape[-1]))
    W, H = problem(torch.float32)
    s3.prune(W, "2:4", H, "sobs")
    assert max(widths) > 64 and sum(widths) >= K
