"""SparseGPT on any round of decisions, against the method written down: an explicit inverse for every column."""

from itertools import combinations, product

import pytest
import torch

import s3lab as s3
from s3lab.algebra.compose import Salient
from s3lab.algebra.stage import Stage
from s3lab.solvers import kernels, sparsegpt
from s3lab.solvers.kernels import ref
from s3lab.tensors.joint import join

ROUNDS = {
    "2:4": (3, 8),
    "1:2@2x2": (4, 8),
    "coupled-2:4": (2, 16),
    "(K,M):(1,K) / (1,1) / (1,4) keep 1": (4, 6),
    "(M,K/8,4,2):(K,8,1,4) / (1,1,1,2) / (1,1,2,1) keep 1": (3, 16),
    "(M,K/8,4,2):(K,8,1,4) / (1,1,1,2) / (1,1,4,1) keep 2": (1, 16),
    "50% columns": (3, 6),
    "2:4 each way": (4, 12),
    "1:2 each way": (4, 6),
    "2:4@4x1 then 2:4": (4, 16),
    "2:4@1x2 then 1:2": (3, 16),
    "50% rows then 1:2": (4, 8),
    "2:4 plus 1:8": (3, 16),
    "1:2@2x2 plus 25%": (4, 8),
    "2:4@4x1 then 2:4 plus 1:8": (4, 16),
}
PAIRS = {
    "a: (1,1) & b: (1,1) / (1,4) keep 2": {"a": (3, 8), "b": (3, 8)},
    "a: (1,1) / (1,2) | b: (1,1) / (1,2) keep 2": {"a": (3, 4), "b": (3, 4)},
    "down: (M,1) & up: (1,K) keep 50%": {"up": (6, 4), "down": (5, 6)},
    "down: (M,1) & up: (1,K) follows keep 50%": {"up": (6, 4), "down": (5, 6)},
}


def small(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(40, K, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(K, K, generator=generator, dtype=torch.float64)
    return s3.Problem(torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / 40)


def join_columns(stage):
    """The sets of columns that scopes link, each ascending, by their first."""
    K = stage.shape[1]
    sets = [{j} for j in range(K)]
    for scope in stage.offsets.view(stage.S, -1).tolist():
        touched = {offset % K for offset in scope if offset >= 0}
        sets = [s for s in sets if not s & touched] + [set().union(touched, *(s for s in sets if s & touched))]
    return sorted(sorted(s) for s in sets if s)


def choose(stage, s, cost):
    """Which blocks of a scope stay, by trying all ways to choose: the first of the dearest."""
    present = [b for b in range(stage.B) if (stage.offsets[s, b] >= 0).any()]
    if stage.lines is None:
        ways = combinations(present, len(present) - int(stage.goes[s]))
    else:
        side = int(stage.B**0.5)
        lines = list(combinations(range(side), stage.lines))
        squares = [
            [i * side + j for i, line in enumerate(square) for j in line] for square in product(lines, repeat=side)
        ]
        ways = [w for w in squares if all(sum(b % side == j for b in w) == stage.lines for j in range(side))]
    return max(ways, key=lambda way: float(sum(cost[b] for b in way)))


def sweep(problem, stage):
    """The mask and the weight: of the inputs to come, the inverse of their H alone says what each costs."""
    M, K = stage.shape
    groups = join_columns(stage)
    order = [j for group in groups for j in group]
    H, W = problem.hessian[order][:, order], problem.weight[:, order].clone()
    inverses = [torch.linalg.inv(H[i:, i:]) for i in range(K)]
    mask = torch.ones(M, K, dtype=torch.bool) if stage.pruned is None else ~stage.pruned[:, order]
    position = 0
    for group in groups:
        cost = W**2 / torch.stack([inverse[0, 0] for inverse in inverses])
        for s, blocks in enumerate(stage.offsets.tolist()):
            spots = [[(o // K, order.index(o % K)) for o in block if o >= 0] for block in blocks]
            if any(order[j] in group for block in spots for _, j in block):
                stays = choose(stage, s, [sum(cost[i, j] for i, j in block) for block in spots])
                for b, block in enumerate(spots):
                    for i, j in block:
                        mask[i, j] = b in stays
        for i in range(position, position + len(group)):
            gain = inverses[i][:, 0] / inverses[i][0, 0]
            W[:, i:] -= torch.outer(W[:, i] * ~mask[:, i], gain)
        position += len(group)
    back = torch.tensor(order).argsort()
    return mask[:, back], W[:, back]


def resolve(problem, bound):
    last = problem.weight

    def decide(stage):
        nonlocal last
        mask, last = sweep(problem, stage)
        return stage.gather(mask)

    worth = problem.weight**2 / torch.linalg.inv(problem.hessian).diagonal()
    return bound.resolve(decide, worth), last


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("text", ROUNDS)
def test_every_program_of_rounds_is_the_methods(text, seed, width, monkeypatch):
    monkeypatch.setattr(sparsegpt, "_RUN", 3)  # how the products are cut must not matter
    problem, spec = small(*ROUNDS[text], seed), s3.parse(text)
    mask, weight = resolve(problem, spec.bind(problem.shape))
    found = s3.SparseGPT(width=width)(problem, spec)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-10)
    assert torch.equal(found.weight != 0, mask)


@pytest.mark.parametrize(("text", "width"), [("2:4", 128), ("1:4", 8), ("1:2@1x2", 6)])
def test_a_kernel_is_given_whole_windows_and_their_budget(text, width, monkeypatch):
    """Where there is a GPU; here its plain twin stands in for it."""

    def swept(V, U, gone, B, C, keep):
        found = ref.sweep(V, U, B, C, keep)
        V.copy_(found[0]), gone.copy_(found[1])

    problem, spec = small(3, 24), s3.parse(text)
    plain = s3.SparseGPT(width=width)(problem, spec)
    monkeypatch.setattr(kernels, "takes_triton", lambda *_: True)
    monkeypatch.setattr(kernels, "sweep_window", swept)
    found = s3.SparseGPT(width=width)(problem, spec)
    assert torch.equal(found.mask, plain.mask)
    torch.testing.assert_close(found.weight, plain.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_ragged_scopes_give_up_what_each_must(seed):
    """Blocks and scopes with holes, budgets of their own, weights gone before and weights that nobody decides on."""
    M, K, S, B, E = 3, 10, 4, 3, 2
    draw = torch.Generator().manual_seed(seed)
    offsets = torch.randperm(M * K, generator=draw)[: S * B * E].view(S, B, E)
    offsets = offsets.masked_fill(torch.rand(S, B, E, generator=draw) < 0.3, -1)
    pruned = torch.zeros(M * K, dtype=torch.bool)
    pruned[torch.randperm(M * K, generator=draw)[:12]] = True
    pruned[offsets[offsets >= 0]] = False
    present = (offsets >= 0).any(-1).sum(1)
    goes = (torch.rand(S, generator=draw) * (present + 1)).long()
    stage = Stage("ragged", (M, K), offsets, goes, pruned=pruned.view(M, K))
    problem = small(M, K, seed)
    mask, weight = sweep(problem, stage)
    found, found_weight, _ = s3.SparseGPT().solve(problem, stage)
    assert torch.equal(found, mask)
    torch.testing.assert_close(found_weight, weight, rtol=1e-8, atol=1e-10)
    kept = stage.gather(mask)
    assert torch.equal(kept.sum(1), present - goes) and not mask[stage.pruned].any()


@pytest.mark.parametrize("text", PAIRS)
def test_coupled_tensors_are_one_problem(text):
    spec = s3.parse(text)
    bound = spec.bind(PAIRS[text])
    problems = {name: small(*PAIRS[text][name], seed) for seed, name in enumerate(bound.leaders)}
    joint = join(problems, bound)
    mask, weight = sweep(joint.problem, joint.stage)
    masks, weights = bound.scatter(joint.stage.gather(mask)), joint.split(weight)
    found_masks, found, _ = s3.SparseGPT().solve_coupled(problems, bound)
    assert all(torch.equal(found_masks[name], masks[name]) for name in masks)
    for name in weights:
        torch.testing.assert_close(found[name], weights[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("text", ["50%/row", "50%", "25%/row@1x4", "50% rows", "2:4 plus 50%", "50%/row then 1:2"])
def test_wide_scopes_keep_their_sum_whatever_the_width(text):
    problem, spec = small(8, 48), s3.parse(text)
    for width in (8, 12, 128):
        found = s3.SparseGPT(width=width)(problem, spec)
        assert torch.equal(found.weight != 0, found.mask)  # and the mask passed the check of every solution
        whole = isinstance(spec.bind((8, 48)), Salient)
        assert whole or int(found.mask.sum()) == round(spec.bind((8, 48)).density * 8 * 48)


@pytest.mark.parametrize("K", [24, 20])  # windows of eight columns, the last one whole or of four
@pytest.mark.parametrize(("text", "rows"), [("50%/row", 1), ("50%", 2), ("50%/row@1x2", 1)])
def test_a_wide_scope_is_decided_window_by_window_each_with_its_share(text, rows, K):
    """As if each window had scopes of its own that give up half of their blocks."""
    problem, wide = small(2, K, seed=K), int(text[-1]) if "@" in text else 1
    scopes = [
        problem.weight.new_tensor([[i * K + j + e for e in range(wide)] for i in band for j in range(a, b, wide)])
        for a, b in [(start, min(start + 8, K)) for start in range(0, K, 8)]
        for band in torch.arange(2).split(rows)
    ]
    offsets = torch.full((len(scopes), max(map(len, scopes)), wide), -1)
    for s, blocks in enumerate(scopes):
        offsets[s, : len(blocks)] = blocks.long()
    windows = Stage("windows", (2, K), offsets, torch.tensor([len(blocks) // 2 for blocks in scopes]))
    mask, weight = sweep(problem, windows)
    found = s3.SparseGPT(width=8)(problem, s3.parse(text))
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-10)


def test_what_is_kept_each_way_cannot_be_decided_in_parts():
    problem = small(8, 16)
    with pytest.raises(s3.SolveError, match="larger width"):
        s3.SparseGPT(width=4)(problem, s3.parse("2:8 each way"))
    assert s3.SparseGPT(width=8)(problem, s3.parse("2:8 each way")).mask.sum() == 32
