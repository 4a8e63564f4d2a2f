"""A sparse core between block-diagonal matrices: no step raises the loss, and what can be said exactly is found."""

from dataclasses import replace

import pytest
import torch

import s3lab as s3
from s3lab.models.measure.layers import generate_layer
from s3lab.tensors.wraps import Wraps, to_left, to_right

PATTERNS = ["2:4", "1:4", "2:4@1x2", "50%/row", "1:2@4x4", "4:8@8x1 then 2:4", "2:4 each way"]


def small(seed, M=16, K=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, K, generator=generator, dtype=dtype) @ torch.randn(K, K, generator=generator, dtype=dtype)
    return torch.randn(M, K, generator=generator, dtype=dtype), X.T @ X / 200


def block_diagonal(blocks):
    return torch.block_diag(*blocks)


def test_blocks_multiply_as_the_whole_matrix_does():
    generator = torch.Generator().manual_seed(0)
    x, left, right = (torch.randn(*shape, generator=generator) for shape in ((8, 12), (2, 4, 4), (3, 4, 4)))
    torch.testing.assert_close(to_left(left, x), block_diagonal(left) @ x)
    torch.testing.assert_close(to_right(x, right), x @ block_diagonal(right))
    wraps, inputs = Wraps(left, right), torch.randn(5, 12, generator=generator)
    torch.testing.assert_close(wraps.around(x), block_diagonal(left) @ x @ block_diagonal(right))
    torch.testing.assert_close(wraps.after(wraps.before(inputs) @ x.T), inputs @ wraps.around(x).T)
    assert wraps.numbers == 2 * 16 + 3 * 16


@pytest.mark.parametrize("text", PATTERNS)
def test_no_step_raises_the_loss_and_the_core_keeps_its_pattern(text):
    """By the loss as it is written down, with H damped as every solver has it."""
    for seed in range(2):
        W, H = small(seed)
        problem, bound = s3.Problem(W, H), s3.parse(text).bind(W.shape)
        mask, core, _ = s3.SparseGPT().solve(problem, bound)
        damped = H + 1e-2 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        losses = []

        def decide(new, bound=bound):
            return s3.SparseGPT().solve(new, bound)[0]

        for told, parts in s3.Wrap(block=4, renew=2).descend(problem, core, mask, decide):
            apart = W - block_diagonal(parts.left) @ parts.core @ block_diagonal(parts.right)
            assert told == pytest.approx(float(torch.trace(apart @ damped @ apart.T)))
            assert not parts.core[~parts.mask].any()
            bound.check(parts.mask)
            losses.append(told)
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["magnitude", "sparsegpt", "admm"])
def test_it_is_never_above_its_solver(solver, dtype):
    layer = generate_layer(32, 64, 512, seed=1)
    W = layer.W.to(dtype)
    alone = s3.prune(W, "2:4", layer.H, solver)
    found = s3.wrap(W, "2:4", layer.H, solver, H_test=layer.H_test)
    assert found.error < alone.error and found.core.dtype == W.dtype == found.left.dtype
    assert found.error == s3.output_error(found.dense, W, layer.H)
    assert found.error_test == s3.output_error(found.dense, W, layer.H_test)
    s3.parse("2:4").check(found.core != 0)


@pytest.mark.parametrize("side", ["left", "right", "core"])
def test_each_part_becomes_the_least_squares_solution(side):
    """The normal equations of a part alone, by lstsq on the whole matrix of its coefficients."""
    W, H = small(3, 8, 8)
    generator = torch.Generator().manual_seed(5)
    problem, mask = s3.Problem(W, H, damp=0.0), s3.parse("2:4").bind((8, 8)).project(W.abs())
    left, right = (
        torch.eye(4, dtype=W.dtype) + 0.3 * torch.randn(2, 4, 4, generator=generator, dtype=W.dtype) for _ in "AB"
    )
    *_, (_, first) = s3.Wrap(block=4, sweeps=1, steps=1, renew=9).descend(problem, W * mask, mask, lambda new: mask)
    parts = replace(first, left=left, right=right, core=W * mask, steps=200)
    found = getattr(parts, f"fit_{side}")()

    root = torch.linalg.cholesky(H)
    where = {"left": torch.block_diag(*[torch.ones(4, 4)] * 2), "core": mask}.get(
        side, torch.block_diag(*[torch.ones(4, 4)] * 2)
    )
    places = where.nonzero().tolist()
    A, S, B = block_diagonal(left), W * mask, block_diagonal(right)
    columns = []
    for i, j in places:
        unit = torch.zeros(8, 8, dtype=W.dtype)
        unit[i, j] = 1
        product = {"left": unit @ S @ B, "right": A @ S @ unit, "core": A @ unit @ B}[side]
        columns.append((product @ root).flatten())
    basis, goal = torch.stack(columns, 1), (W @ root).flatten()
    solved = torch.linalg.lstsq(basis, goal, driver="gelsd").solution
    best = float((goal - basis @ solved).square().sum())
    assert found.loss == pytest.approx(best, rel=1e-6)


def test_what_can_be_said_exactly_is_found_from_near_by():
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    left, right = (torch.eye(4, dtype=torch.float64) + 0.05 * draw(n, 4, 4) for n in (4, 8))
    core = draw(16, 32)
    core = core.sign() * (core.abs() + 1)
    mask = s3.parse("2:4").bind((16, 32)).project(draw(16, 32))
    W = to_right(to_left(left, core * mask), right)
    H, options = torch.eye(32, dtype=torch.float64), s3.Wrap(block=4, sweeps=100, steps=20, renew=999)
    found = s3.wrap(W, "2:4", H, "magnitude", damp=0.0, options=options)
    assert torch.equal(found.mask, mask)
    assert found.error < 1e-4 < 0.05 < s3.prune(W, "2:4", H, "magnitude").error


@pytest.mark.parametrize("solver", ["magnitude", "admm"])
def test_outputs_count_as_they_are_told(solver):
    """In what is least: so that its error is below that of a wrap which does not know of them, and the other way."""
    W, H = small(2, 16, 32, torch.float32)
    outputs = torch.logspace(-3, 3, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    knows = s3.wrap(W, "2:4", H, solver, outputs=outputs, block=8)
    not_told = s3.wrap(W, "2:4", H, solver, block=8)
    assert knows.error == s3.output_error(knows.dense, W, H, outputs)
    assert knows.error < 0.9 * s3.output_error(not_told.dense, W, H, outputs)
    assert not_told.error < 0.9 * s3.output_error(knows.dense, W, H)
    equal = s3.wrap(W, "2:4", H, solver, outputs=torch.full((16,), 4.0), block=8)
    torch.testing.assert_close(equal.dense, not_told.dense, atol=2e-2, rtol=0)


def test_an_output_that_counts_nothing_is_not_lost():
    W, H = small(4, 16, 32, torch.float32)
    found = s3.wrap(W, "2:4", H, outputs=torch.ones(16).index_fill(0, torch.tensor([3, 9]), 0.0), block=4)
    assert s3.output_error(found.dense[[3, 9]], W[[3, 9]], H) < 0.7
    nothing = s3.wrap(W, "2:4", H, outputs=torch.zeros(16), block=4)
    assert s3.output_error(nothing.dense, W, H) < s3.prune(W, "2:4", H).error


@pytest.mark.parametrize("solver", ["sparsegpt", "admm"])
def test_a_new_mask_is_worth_more_than_more_sweeps_on_the_old_one(solver):
    layer = generate_layer(64, 128, 1024, seed=2)
    alone = s3.prune(layer.W, "2:4", layer.H, solver)
    anew, kept = (s3.wrap(layer.W, "2:4", layer.H, solver, options=s3.Wrap(8, 12, renew=n)) for n in (2, 999))
    assert torch.equal(kept.mask, alone.mask) and not torch.equal(anew.mask, alone.mask)
    assert alone.error - anew.error > 1.2 * (alone.error - kept.error)


def test_a_pattern_that_keeps_all_is_exact():
    W, H = small(6, dtype=torch.float32)
    assert s3.wrap(W, "4:4", H, block=4).error < 1e-5


def test_what_cannot_be_wrapped_is_told():
    W, H = small(0)
    with pytest.raises(s3.ShapeError, match="divisor of both"):
        s3.wrap(W, "2:4", H, block=5)
    with pytest.raises(s3.SpecError, match="one weight is wrapped at a time"):
        s3.wrap(W, "q: (1,1) & k: (1,1) keep 50%", H)
    with pytest.raises(s3.SolveError, match="at least 1"):
        s3.Wrap(sweeps=0)
