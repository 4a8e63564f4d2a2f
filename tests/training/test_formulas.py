"""The gradient and the update of each method, by hand on tiny tensors, by brute force, and by another optimiser."""

from itertools import combinations, pairwise
from math import cos, pi

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import s3lab as s3

W = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.1, 0.4, -0.3, 0.2]], dtype=torch.float64)
KEPT = torch.tensor([[False, True, True, False], [False, True, True, False]])
X = torch.tensor([[1.0, 2.0, -1.0, 3.0], [0.5, -2.0, 1.0, 1.0], [2.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
Y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)


def layer_of(weight=W):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    return layer


def original(layer):
    return layer.parametrizations.weight.original


def own(layer):
    return layer.parametrizations.weight[0]


def loss(layer):
    return (layer(X) - Y).square().sum() / 2


def gradient(weight):
    """∂/∂Ŵ of ½ ‖X Ŵᵀ − Y‖², by hand."""
    return (X @ weight.T - Y).T @ X


def test_fixed_trains_what_is_kept_and_nothing_else():
    layer = layer_of()
    s3.sparse(layer, "2:4", s3.Fixed())
    assert torch.equal(own(layer).mask, KEPT)
    loss(layer).backward()
    torch.testing.assert_close(original(layer).grad, gradient(W * KEPT) * KEPT)


def test_a_given_mask_is_the_mask():
    layer = layer_of()
    s3.sparse(layer, "2:4", "fixed", masks={"": ~KEPT})
    assert torch.equal(layer.weight, W * ~KEPT)


@pytest.mark.parametrize("decay", [None, 0.0, 0.25])
def test_ste_and_srste_step_as_written(decay):
    """W ← W − lr (∂L/∂Ŵ + λ (1 − mask) ⊙ W), then the mask of the new W."""
    layer = layer_of()
    sparsity = s3.sparse(layer, "2:4", s3.STE() if decay is None else s3.SRSTE(decay=decay))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    sparsity.follow(optimizer)
    expected = W.clone()
    for _ in range(4):
        mask = s3.parse("2:4").bind((2, 4)).project(expected**2)
        assert torch.equal(own(layer).mask, mask)
        torch.testing.assert_close(layer.weight, expected * mask)
        optimizer.zero_grad()
        loss(layer).backward()
        torch.testing.assert_close(original(layer).grad, gradient(expected * mask))
        optimizer.step()
        expected = expected - 0.1 * (gradient(expected * mask) + (decay or 0.0) * ~mask * expected)
        torch.testing.assert_close(original(layer), expected)
    assert not torch.equal(own(layer).mask, KEPT)


def test_a_decay_is_added_once_however_often_a_step_is_prepared_or_gradients_are_scaled():
    layer = layer_of()
    sparsity = s3.sparse(layer, "2:4", s3.SRSTE(decay=0.5))
    (8 * loss(layer)).backward()
    original(layer).grad /= 8  # as a gradient scaler does before the optimiser's step
    sparsity.prepare()
    sparsity.prepare()
    torch.testing.assert_close(original(layer).grad, gradient(W * KEPT) + 0.5 * ~KEPT * W)


@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_gradual_keeps_what_the_cubic_says_and_never_takes_back(initial):
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = layer_of(weight)
    sparsity = s3.sparse(layer, "4:32", s3.Gradual(steps=10, every=3, start=2, initial=initial))
    before = own(layer).mask.clone()
    for step in range(1, 16):
        original(layer).data.add_(torch.randn(4, 32, generator=torch.Generator().manual_seed(step)))
        sparsity.step()
        mask = own(layer).mask
        last = max((t for t in (5, 8, 11, 12) if t <= step), default=2)
        sparse = 0.875 + (initial - 0.875) * (1 - (last - 2) / 10) ** 3
        assert mask.sum(1).tolist() == [max(4, round((1 - sparse) * 32))] * 4
        assert not (mask & ~before).any()
        if step in (5, 8, 11, 12):
            size = original(layer).abs().where(before, -1)  # what went was the least of what there was
            assert all(size[r][mask[r]].min() >= size[r][~mask[r]].amax(0) for r in range(4) if not mask[r].all())
        before = mask.clone()


@pytest.mark.parametrize("text", ["2:4@8x1 then 1:4", "1:4 each way", "1:8 plus 1:16", "block16"])
def test_gradual_ends_on_any_pattern_and_its_masks_are_nested(text):
    layer = layer_of(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    sparsity = s3.sparse(layer, text, s3.Gradual(steps=6, every=1))
    masks = [own(layer).mask.clone()]
    assert masks[0].all()
    for _ in range(8):
        sparsity.step()
        sparsity.check()
        masks.append(own(layer).mask.clone())
    s3.parse(text).check(masks[6])
    assert torch.equal(masks[6], masks[-1])
    counts = [int(mask.sum()) for mask in masks]
    assert (sorted(counts, reverse=True) == counts and len(set(counts)) > 2) or text == "block16"
    if "plus" not in text:  # a salient block is salient anew
        assert not any((later & ~earlier).any() for earlier, later in pairwise(masks))


@pytest.mark.parametrize("text", ["25%", "25%/row", "2:8", "25%@2x2"])
def test_rigl_drops_the_least_and_grows_where_the_gradient_is_largest(text):
    """Block by block in lists, as the paper says it; blocks just dropped may come back."""
    generator = torch.Generator().manual_seed(0)
    weight, target = (torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    layer, inputs = layer_of(weight), torch.randn(32, 16, generator=generator, dtype=torch.float64)
    sparsity = s3.sparse(layer, text, s3.RigL(steps=10, every=2, alpha=0.8))
    part = s3.parse(text).bind((8, 16))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    sparsity.follow(optimizer)
    for step in range(1, 12):
        mask, weights = own(layer).mask.clone(), (original(layer) * own(layer).mask).detach().clone()
        optimizer.zero_grad()
        (inputs @ (layer.weight - target).T).square().mean().backward()
        dense = original(layer).grad.clone()
        optimizer.step()
        if step % 2 or step >= 10:
            assert torch.equal(own(layer).mask, mask)
            torch.testing.assert_close(layer.weight, weights - 0.01 * dense * mask)
            continue
        kept, size, pull = (part.blocks(t.double()).square().sum(-1) for t in (mask, weights, dense))
        active = [(s, b) for s in range(part.S) for b in range(part.B) if kept[s, b]]
        active.sort(key=lambda at: size[at], reverse=True)
        stay = active[: len(active) - int(0.4 * (1 + cos(pi * step / 10)) * len(active))]
        new = set(stay)
        for s in range(part.S):
            others = sorted((b for b in range(part.B) if (s, b) not in new), key=lambda b: pull[s, b], reverse=True)
            new |= {(s, b) for b in others[: part.keep - sum(place == s for place, _ in stay)]}
        expected = part.scatter(torch.tensor([[(s, b) in new for b in range(part.B)] for s in range(part.S)]))
        assert torch.equal(own(layer).mask, expected)
        assert torch.equal(layer.weight, weights * expected)  # the weight took no step, what came is zero
    assert not torch.equal(own(layer).mask, mask) or step == 11


@pytest.mark.parametrize("text", ["1:2@1x2", "1:2@2x1", "(K,M):(1,K) / (2,1) / (1,2) keep 1"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
def test_a_proximal_step_is_the_optimum_that_scipy_finds(text, adaptive, trimmed):
    layer = layer_of()
    sparsity = s3.sparse(layer, text, s3.Proximal(3.0, trimmed=trimmed, adaptive=adaptive))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1e-3)
    loss(layer).backward()
    g = original(layer).grad.clone()
    optimizer.step()
    # the first step of Adam: both corrected moments are those of one gradient
    h = g.abs() + 1e-3 if adaptive else torch.ones_like(g)
    v = W - 0.1 * g / (g.abs() + 1e-3)
    torch.testing.assert_close(original(layer).detach(), v)
    sparsity.step(optimizer)
    part = s3.parse(text).bind((2, 4))
    blocks, metric, found = (part.blocks(t.detach()) for t in (v, h, original(layer)))
    spared = part.choose(blocks.square().sum(-1)) & trimmed
    for place in np.ndindex(part.S, part.B):
        near, scale, level = blocks[place].numpy(), metric[place].numpy(), 0.0 if spared[place] else 0.3

        def cost(u, near=near, scale=scale, level=level):
            return (scale * (u - near) ** 2).sum() / 2 + level * np.linalg.norm(u)

        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}
        best = min(minimize(cost, near * start, method="Nelder-Mead", options=options).fun for start in (1.0, 0.1))
        best = min(best, cost(np.zeros_like(near)))
        assert cost(found[place].numpy()) <= best + 1e-9
    assert bool((found.abs().sum(-1) == 0).any()) or not bool((blocks.norm(dim=-1) < 0.3).any())


def test_the_trimmed_penalty_spares_what_brute_force_would_spare():
    """Prox of the sum of all but the largest norms: over all choices of what is spared, the best is the pattern's."""
    v, level = W[0], 1.2
    layer = layer_of(v[None])
    sparsity = s3.sparse(layer, "2:4", s3.Proximal(1.2))
    sparsity.step(torch.optim.SGD(layer.parameters(), lr=1.0))

    def cost(u):
        return float((u - v).square().sum() / 2 + level * u.abs().sort().values[:2].sum())

    shrunk = v.sign() * (v.abs() - level).clamp(min=0)
    choices = []
    for spared in combinations(range(4), 2):
        u = shrunk.clone()
        u[list(spared)] = v[list(spared)]
        choices.append(cost(u))
    assert cost(original(layer).detach()[0]) == pytest.approx(min(choices))


def test_spp_multiplies_and_its_gradients_are_those_of_the_factors():
    layer = layer_of(torch.cat([W, W.flip(0)]))
    mask = torch.cat([KEPT, KEPT.flip(0)])
    s3.sparse(layer, "2:4", s3.SPP(rank=3, scale=0.5))
    alpha, beta, dense = own(layer).alpha, own(layer).beta, original(layer)
    assert torch.equal(layer.weight, dense * mask) and not dense.requires_grad
    with torch.no_grad():
        beta.copy_(torch.tensor([[1.0], [-2.0], [0.5], [3.0]]))
        factors = [[1 + 0.5 * float(beta[i, 0] * alpha[i % 3, j]) for j in range(4)] for i in range(4)]
    expected = dense * mask * torch.tensor(factors, dtype=torch.float64)
    torch.testing.assert_close(layer.weight, expected)
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (layer.weight * G).sum().backward()
    held = 0.5 * G * dense * mask
    torch.testing.assert_close(beta.grad, (held * alpha[[0, 1, 2, 0]]).sum(1, keepdim=True))
    torch.testing.assert_close(alpha.grad[0], held[0] * beta[0] + held[3] * beta[3])
    torch.testing.assert_close(alpha.grad[1:], held[1:3] * beta[1:3])
    assert dense.grad is None and torch.linalg.matrix_rank(beta * alpha[[0, 1, 2, 0]]) <= 3


def test_lora_adds_under_the_mask_and_its_gradients_are_those_of_the_factors():
    layer = layer_of()
    s3.sparse(layer, "2:4", s3.LoRA(rank=2, scale=0.5))
    A, B, dense = own(layer).A, own(layer).B, original(layer)
    assert torch.equal(layer.weight, dense * KEPT) and not dense.requires_grad and A.abs().max() <= 0.5
    with torch.no_grad():
        B.copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
        added = [[sum(float(B[i, r] * A[r, j]) for r in range(2)) for j in range(4)] for i in range(2)]
    torch.testing.assert_close(layer.weight, KEPT * (dense + 0.5 * torch.tensor(added, dtype=torch.float64)))
    G = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (layer.weight * G).sum().backward()
    torch.testing.assert_close(B.grad, 0.5 * (G * KEPT) @ A.T)
    torch.testing.assert_close(A.grad, 0.5 * B.T @ (G * KEPT))
    assert dense.grad is None


@pytest.mark.parametrize(("text", "slices"), [("50% rows", (0, slice(None))), ("2 of 4", (slice(None), [1, 2]))])
def test_s2ft_trains_its_slices_and_leaves_the_rest(text, slices):
    text = "(M,K):(K,1) / (M,1) / (1,4) keep 2" if text == "2 of 4" else text
    layer = layer_of()
    sparsity = s3.sparse(layer, text, s3.S2FT("largest"))
    chosen = torch.zeros(2, 4, dtype=torch.bool)
    chosen[slices] = True
    assert torch.equal(own(layer).mask, chosen) and torch.equal(layer.weight, W)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    sparsity.follow(optimizer)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 4
    loss(layer).backward()
    torch.testing.assert_close(own(layer).values.grad, gradient(W)[chosen])
    optimizer.step()
    torch.testing.assert_close(s3.densify(layer).weight.detach(), W - 0.1 * gradient(W) * chosen)


def test_s2ft_chooses_the_same_channels_in_all_layers_of_a_coupling():
    model = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
    sparsity = s3.sparse(model, "down: (M,1) & up: (1,K) follows keep 25%", "s2ft", seed=3)
    masks = sparsity.masks
    assert torch.equal(masks["down"][0], masks["up"][:, 0]) and masks["down"][0].sum() == 2
    assert masks["down"].all(0).sum() == masks["up"].all(1).sum() == 2
