"""Thresholds and proximal steps: known answers, the conditions of an optimum, a minimiser by descent, and storage."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
from scipy.optimize import minimize

import s3lab as s3
from s3lab.tensors.proximal import (
    block_norms,
    hard_threshold,
    hard_threshold_,
    kth_norm,
    soft_threshold,
    soft_threshold_,
)

ONE = {
    "2:4": (3, 8),
    "2:4@1x2": (2, 16),
    "coupled-2:4": (2, 32),
    "50%@4x4": (8, 8),
    "25% columns": (3, 8),
    "(K,M):(1,K) / (2,1) / (1,4) keep 1": (8, 6),
}
COUPLED = {
    "down: (M,1) & up: (1,K) keep 50%": {"down": (6, 8), "up": (8, 5)},
    "q: (1,1) & k: (1,1) by (1,0) / (1,4) keep 2": {"q": (3, 8), "k": (8, 3)},
    "a: (1,1) & b: (1,1) / (1,2) | c: (1,2) / (1,1) keep 2": {"a": (2, 4), "b": (2, 4), "c": (2, 4)},
}
CASES = ONE | COUPLED


def draw_like(shapes, seed, sample=torch.randn):
    """A weight, or one by name, in float64."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(shapes, tuple):
        return sample(shapes, generator=generator, dtype=torch.float64)
    return {name: sample(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def each(function, W):
    return {name: function(w) for name, w in W.items()} if isinstance(W, dict) else function(W)


def tensors(W):
    return list(W.values()) if isinstance(W, dict) else [W]


def metric_like(shapes, seed, decades):
    return each(lambda u: 10 ** (decades * (u - 0.5)), draw_like(shapes, seed, torch.rand))


def bind(text):
    return s3.parse(text).bind(CASES[text])


@pytest.mark.parametrize(
    ("h", "mu"),
    [((0.25, 0.5, 1.0, 2.0), 1.1691705), ((0.49671415, 0.1382643, 0.64768854, 1.52302986), 1.6383774)],
)
def test_known_answers(h, mu):
    bound, v, h = s3.parse("1:1@1x4").bind((1, 4)), torch.ones(1, 4), torch.tensor(h)
    u = soft_threshold(v, bound, 1.0, h)
    assert 1 / float(u.norm()) == pytest.approx(mu, rel=1e-6)
    torch.testing.assert_close(u, h / (h + mu) * v, rtol=1e-6, atol=0)


@given(st.sampled_from(list(CASES)), st.integers(0, 99), st.sampled_from([0, 2, 12]), st.floats(0, 1.1))
def test_the_subgradient_holds_zero(text, seed, decades, share):
    bound, W, h = bind(text), draw_like(CASES[text], seed), metric_like(CASES[text], seed + 1, decades)
    v, metric = bound.blocks(W), bound.blocks(h)
    pull = torch.linalg.vector_norm(metric * v, dim=-1)
    level = share * pull.max(1, keepdim=True).values
    u = bound.blocks(soft_threshold(W, bound, level, h))
    norm = torch.linalg.vector_norm(u, dim=-1)
    assert torch.equal(norm == 0, pull <= level)
    gradient = metric * (u - v) + (level / norm)[..., None].nan_to_num(0, 0) * u
    residual = torch.linalg.vector_norm(gradient, dim=-1)
    assert (residual[norm > 0] <= 1e-13 * pull[norm > 0]).all()


@pytest.mark.parametrize("seed", range(5))
def test_descent_finds_the_same_minimiser(seed):
    bound, W = s3.parse("1:2@1x3").bind((1, 6)), draw_like((1, 6), seed)
    h, level = metric_like((1, 6), seed, 1), 0.4
    ours = bound.blocks(soft_threshold(W, bound, level, h))[0].numpy()
    for u, v, metric in zip(ours, bound.blocks(W)[0].numpy(), bound.blocks(h)[0].numpy(), strict=True):

        def objective(x, v=v, metric=metric):
            return 0.5 * np.sum(metric * (x - v) ** 2) + level * np.linalg.norm(x)

        found = minimize(objective, v, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000})
        assert u == pytest.approx(found.x, abs=1e-5)
        assert objective(u) <= found.fun + 1e-14


@pytest.mark.parametrize("text", CASES)
def test_without_a_metric_each_block_shrinks_by_the_level(text):
    bound, W = bind(text), draw_like(CASES[text], 0)
    v = bound.blocks(W)
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    level = float(norm.median())
    expected = (1 - level / norm).clamp(min=0) * v
    found = soft_threshold(W, bound, level)
    torch.testing.assert_close(bound.blocks(found), expected)
    ones = each(torch.ones_like, W)
    for same, u in zip(tensors(soft_threshold(W, bound, level, ones)), tensors(found), strict=True):
        torch.testing.assert_close(same, u)


@pytest.mark.parametrize("text", CASES)
def test_hard_thresholds_keep_or_drop_whole_blocks(text):
    bound, W = bind(text), draw_like(CASES[text], 0)
    norms = block_norms(W, bound)
    level = norms.flatten().sort().values[norms.numel() // 2]  # one block is just at it, and goes
    found = bound.blocks(hard_threshold(W, bound, level))
    for scope in range(bound.S):
        for block in range(bound.B):
            kept = float(bound.blocks(W)[scope, block].square().sum()) > float(level) ** 2 * (1 + 1e-12)
            assert torch.equal(found[scope, block], kept * bound.blocks(W)[scope, block])


@pytest.mark.parametrize("text", CASES)
def test_the_kth_norm_leaves_the_budget(text):
    bound, W = bind(text), draw_like(CASES[text], 0)
    masks = each(lambda w: w != 0, hard_threshold(W, bound, kth_norm(W, bound)[:, None]))
    assert all(map(torch.equal, tensors(masks), tensors(bound.project(each(torch.square, W)))))
    falling = block_norms(W, bound).sort(dim=1, descending=True).values
    for k in range(1, bound.B + 1):
        assert torch.equal(kth_norm(W, bound, k), falling[:, k - 1])
    assert torch.equal(kth_norm(W, bound, bound.B + 1), torch.zeros(bound.S, dtype=torch.float64))


@pytest.mark.parametrize("text", CASES)
def test_a_level_of_zero_changes_nothing_and_an_infinite_one_leaves_nothing(text):
    bound, W = bind(text), draw_like(CASES[text], 0)
    h = metric_like(CASES[text], 1, 4)
    for step in (hard_threshold, soft_threshold, lambda *args: soft_threshold(*args, h)):
        for before, after in zip(tensors(W), tensors(step(W, bound, 0.0)), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-15, atol=0)
        assert not any(w.any() for w in tensors(step(W, bound, torch.inf)))
    none = each(torch.zeros_like, W)
    assert not any(w.any() for w in tensors(soft_threshold(none, bound, 0.0, h)))


def test_weights_that_cost_nothing_to_move_go_first():
    bound, h = s3.parse("1:1@1x4").bind((1, 4)), torch.tensor([0.0, 0.0, 1.0, 2.0])
    for level in (0.0, 0.5):
        u = soft_threshold(torch.ones(1, 4), bound, level, h)
        assert u[0, :2].tolist() == [0, 0] and (u[0, 2:] > 0).all()
    rest = soft_threshold(torch.ones(1, 2), s3.parse("1:1@1x2").bind((1, 2)), 0.5, h[2:])
    torch.testing.assert_close(u[:, 2:], rest)


def test_the_diagonal_of_a_moment_is_a_metric_of_every_row():
    bound, W = s3.parse("2:4@1x2").bind((4, 16)), draw_like((4, 16), 0)
    h = draw_like((1, 16), 1, torch.rand)[0]
    assert torch.equal(soft_threshold(W, bound, 0.3, h), soft_threshold(W, bound, 0.3, h.expand(4, 16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_work_is_done_in_float32_at_least(dtype):
    bound, W, h = s3.parse("2:4@1x2").bind((4, 16)), draw_like((4, 16), 0).to(dtype), draw_like((4, 16), 1, torch.rand)
    assert block_norms(W, bound).dtype == torch.float32
    found = soft_threshold(W, bound, 0.3, h)
    expected = soft_threshold(W.double(), bound, 0.3, h)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=max(2e-6, torch.finfo(dtype).eps), atol=1e-7)


@pytest.mark.parametrize("step", [hard_threshold, soft_threshold])
def test_a_coupling_of_mixed_dtypes_is_worked_on_in_float64(step):
    text = "down: (M,1) & up: (1,K) keep 50%"
    wide = draw_like(CASES[text], 0)
    wide["up"] = wide["up"].float().double()
    mixed, h = wide | {"up": wide["up"].float()}, metric_like(CASES[text], 1, 4)
    level = kth_norm(wide, bind(text))[:, None]
    assert torch.equal(block_norms(mixed, bind(text)), block_norms(wide, bind(text)))
    options = {} if step is hard_threshold else {"h": h}
    found, expected = (step(W, bind(text), level, **options) for W in (mixed, wide))
    assert found["up"].dtype == torch.float32 and torch.equal(found["up"], expected["up"].float())
    assert found["down"].dtype == torch.float64 and torch.equal(found["down"], expected["down"])


@pytest.mark.parametrize("text", CASES)
def test_in_place_on_parameters(text):
    bound = bind(text)
    for step, in_place in ((hard_threshold, hard_threshold_), (soft_threshold, soft_threshold_)):
        W = each(lambda w: torch.nn.Parameter(w.T.contiguous().T), draw_like(CASES[text], 0))
        level = float(block_norms(W, bound).median())
        expected, before = step(W, bound, level), [w.data_ptr() for w in tensors(W)]
        assert not any(w.requires_grad for w in tensors(expected))
        assert any(not torch.equal(a, b) for a, b in zip(tensors(expected), tensors(W), strict=True))
        assert in_place(W, bound, level) is W
        for w, found, at in zip(tensors(W), tensors(expected), before, strict=True):
            assert torch.equal(w, found) and w.data_ptr() == at
            assert w.is_leaf and w.requires_grad and w.grad_fn is None


def test_soft_steps_of_one_level_after_another_shrink_on():
    bound, W = s3.parse("2:4@1x2").bind((4, 16)), draw_like((4, 16), 0)
    once = soft_threshold(W, bound, 0.5)
    torch.testing.assert_close(soft_threshold(soft_threshold(W, bound, 0.2), bound, 0.3), once)


def test_a_metric_is_given_for_each_tensor_of_a_coupling():
    text = "down: (M,1) & up: (1,K) keep 50%"
    W = draw_like(CASES[text], 0)
    with pytest.raises(s3.ShapeError, match=r"h is given for \['down'\] where W is \['down', 'up'\]"):
        soft_threshold(W, bind(text), 1.0, {"down": W["down"].square()})


FAULTS = {
    "another shape": (lambda b, W: hard_threshold(W.T, b, 1.0), s3.ShapeError, r"\(8, 4\) where 2:4 .* \(4, 8\)"),
    "NaN": (lambda b, W: block_norms(W * torch.nan, b), s3.ShapeError, "weight holds NaN"),
    "a negative level": (lambda b, W: hard_threshold(W, b, -1.0), s3.SolveError, "level = -1.0"),
    "a level that is none": (lambda b, W: soft_threshold(W, b, torch.nan), s3.SolveError, "at least 0"),
    "levels of a shape": (lambda b, W: soft_threshold(W, b, torch.ones(5)), s3.ShapeError, r"\(5,\) .* \(8, 4\)"),
    "h of a shape": (lambda b, W: soft_threshold(W, b, 1.0, torch.ones(5)), s3.ShapeError, r"h of shape \(5,\)"),
    "h below zero": (lambda b, W: soft_threshold(W, b, 1.0, W), s3.ShapeError, "h holds negative"),
    "h infinite": (lambda b, W: soft_threshold(W, b, 1.0, W * W / 0), s3.ShapeError, "h holds NaN or Inf"),
    "k of none": (lambda b, W: kth_norm(W, b, 0), s3.SpecError, "k = 0 of the 4 blocks"),
    "k beyond": (lambda b, W: kth_norm(W, b, 6), s3.SpecError, "give 1 to 5"),
    "names": (lambda b, W: hard_threshold({"a": W}, b, 1.0), s3.ShapeError, r"a \(4, 8\) where"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_has_no_step(fault):
    act, error, message = FAULTS[fault]
    with pytest.raises(error, match=message):
        act(s3.parse("2:4").bind((4, 8)), torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))


def test_patterns_without_one_threshold():
    W = torch.ones(16, 512)
    with pytest.raises(s3.SpecError, match="in each row and column"):
        kth_norm(W, s3.parse("2:4 each way").bind(W.shape))
    jaxtyping_config.update("jaxtyping_disable", True)  # the annotations refuse it, too
    with pytest.raises(s3.SpecError, match="one of its parts"):
        hard_threshold(W, s3.parse("8:16 plus 16:256").bind(W.shape), 1.0)
