"""S-OBS on rounds of every kind, against Brain Surgeon as it is written down: all choices, an inverse for each row."""

from itertools import combinations

import pytest
import torch

import s3lab as s3
from s3lab.algebra.stage import Stage
from s3lab.solvers import sobs

ONE_BY_ONE = s3.SOBS(batch=1, order="left")
M, K = 4, 12


def problem_of(seed, M=M, K=K, damp=1e-2):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator, dtype=torch.float64)
    X = torch.randn(60, K, generator=generator, dtype=torch.float64) @ mix
    return s3.Problem(torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / 60, damp=damp)


def textbook(problem, stage, way="joint"):
    """The blocks that stay, (S, B), scope by scope from the left, and the weights that are left.

    Those that go are the cheapest together, or "one by one", or each of them the cheapest "alone".
    """
    W, H, K = problem.weight.clone(), problem.hessian, problem.shape[1]
    rows = []
    for i in range(len(W)):
        C = torch.linalg.inv(H)
        lost = [] if stage.pruned is None else stage.pruned[i].nonzero()[:, 0].tolist()
        rows.append(remove(W[i], C, lost) if lost else C)
    kept = stage.present.clone()
    first = torch.where(stage.offsets < 0, K, stage.offsets % K).flatten(1).amin(1)
    for scope in first.argsort(stable=True).tolist():
        goes = int(stage.goes[scope])

        def price(choice, scope=scope):
            places = stage.offsets[scope, list(choice)].flatten()
            places = places[places >= 0]
            parts = [(i, (places[places // K == i] % K).tolist()) for i in set((places // K).tolist())]
            return sum(float(W[i, P] @ torch.linalg.solve(rows[i][P][:, P], W[i, P])) for i, P in parts), parts

        for _ in range(goes if way == "one by one" else 1):
            there = [(b,) for b in kept[scope].nonzero()[:, 0].tolist()]
            if way == "alone":
                choice = sum(sorted(there, key=lambda one: price(one)[0])[:goes], ())
            else:
                ways = there if way == "one by one" else combinations((b for (b,) in there), goes)
                choice = min(ways, key=lambda some: price(some)[0])
            for i, P in price(choice)[1]:
                rows[i] = remove(W[i], rows[i], P)
            kept[scope, list(choice)] = False
    return kept, W


def remove(w, C, P):
    gain = C[:, P] @ torch.linalg.inv(C[P][:, P])
    w -= gain @ w[P]
    w[P] = 0
    return C - gain @ C[P]


def agrees_with_the_textbook(problem, bound, solver=ONE_BY_ONE, way="joint"):
    left = []

    def decide(stage):
        kept, W = textbook(problem, stage, way)
        left.append(W)
        return kept

    mask, weight, _ = solver.solve(problem, bound)
    expected = bound.resolve(decide, problem.weight**2 / problem.inverse.diagonal())
    assert torch.equal(mask, expected)
    torch.testing.assert_close(weight, left[-1], rtol=1e-7, atol=1e-9)


def ragged(seed, tall=1, wide=1, B=4, salient=0.2, pruned=0.2):
    """Scopes of up to B blocks of ``tall`` × ``wide`` weights, some of them salient or gone, as many to go as may."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(M * K).view(M // tall, tall, K // (B * wide), B, wide)
    offsets = numbers.permute(0, 2, 3, 1, 4).reshape(-1, B, tall * wide)
    fate = torch.rand(offsets.shape, generator=generator)
    gone = torch.zeros(M * K, dtype=torch.bool)
    gone[offsets[fate < pruned]] = True
    offsets = offsets.masked_fill(fate < pruned + salient, -1)
    present = (offsets >= 0).any(-1).sum(1)
    goes = (torch.rand(len(offsets), generator=generator) * (present + 1)).long()
    return Stage("ragged", (M, K), offsets, goes, pruned=gone.view(M, K) if pruned else None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "kind",
    [
        {"pruned": 0.0, "salient": 0.0},
        {"pruned": 0.0},
        {"salient": 0.0},
        {},
        {"wide": 3},
        {"tall": 2},
        {"tall": 4, "wide": 3, "salient": 0.5},
        {"B": 12, "salient": 0.5},
    ],
    ids=str,
)
def test_salient_pruned_and_absent_weights_and_budgets_of_all_sizes(kind, seed):
    agrees_with_the_textbook(problem_of(seed), ragged(seed, **kind))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "text",
    [
        "2:4@4x1 then 1:2",
        "2:3@1x2 then 2:4",
        "1:4 plus 2:12",
        "2:4@1x2 plus 3:6",
        "2:4@4x1 then 1:2 plus 1:12",
    ],
)
def test_programs_of_rounds(text, seed):
    agrees_with_the_textbook(problem_of(seed, K=24), s3.parse(text).bind((M, 24)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("text", "numbers"), [("2:4", 6 * 2 * 2), ("1:4", 4 * 3 * 3), ("2:4@1x2", 6 * 4 * 4)])
def test_blocks_go_one_by_one_where_the_matrices_of_all_choices_are_too_many_numbers(monkeypatch, text, numbers, seed):
    problem, bound = problem_of(seed, K=24), s3.parse(text).bind((M, 24))
    for room, way in ((numbers, "joint"), (numbers - 1, "one by one")):
        monkeypatch.setattr(sobs, "_ROOM", room)
        agrees_with_the_textbook(problem, bound, s3.SOBS(batch=1, order="left", rounds=99), way)


@pytest.mark.parametrize("text", ["2:4", "1:4@1x2", "1:2@2x2"])
def test_blocks_are_taken_by_their_own_costs_where_asked(text):
    solver = s3.SOBS(batch=1, order="left", scoring="independent")
    agrees_with_the_textbook(problem_of(0, K=24), s3.parse(text).bind((M, 24)), solver, "alone")


@pytest.mark.parametrize("panel", [2, 6])
@pytest.mark.parametrize("kind", [{}, {"tall": 2}, {"wide": 3}], ids=str)
def test_what_is_gone_from_the_start_may_go_in_any_number_of_parts(monkeypatch, kind, panel):
    monkeypatch.setattr(sobs, "_PANEL", panel)
    for seed in range(2):
        agrees_with_the_textbook(problem_of(seed), ragged(seed, pruned=0.4, **kind))


@pytest.mark.parametrize("seed", range(3))
def test_tensors_along_a_diagonal_are_pruned_as_if_alone(seed):
    """Two layers, one wider, in one weight: their blocks compete apart, and nothing of one reaches the other."""
    alone = [problem_of(seed, 4, 12, damp=0.0), problem_of(seed + 9, 6, 8, damp=0.0)]
    W, H = (torch.block_diag(*(getattr(p, name) for p in alone)) for name in ("W", "H"))
    numbers = torch.arange(10 * 20).view(10, 20)
    offsets = torch.cat([numbers[:4, :12].reshape(-1, 4, 1), numbers[4:, 12:].reshape(-1, 4, 1)])
    stage = Stage("both", (10, 20), offsets, torch.full((len(offsets),), 2))
    mask, weight, _ = ONE_BY_ONE.solve(s3.Problem(W, H, damp=0.0), stage)
    singly = [ONE_BY_ONE.solve(p, s3.parse("2:4").bind(p.shape)) for p in alone]
    outside = torch.block_diag(*(torch.ones(p.shape) for p in alone)) == 0
    assert torch.equal(mask & ~outside, torch.block_diag(*(own[0] for own in singly)).bool())
    torch.testing.assert_close(weight, torch.block_diag(*(own[1] for own in singly)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [s3.SOBS(), s3.SOBS(rows=1)])
@pytest.mark.parametrize("text", ["1:2 each way", "2:4 each way", "2:4@2x2 each way"])
def test_lines_are_kept_and_pay(text, solver):
    problem = problem_of(0, 16, 16)
    found = solver(problem, s3.parse(text))
    s3.parse(text).check(found.mask)
    assert found.error < s3.Magnitude()(problem, s3.parse(text)).error


@pytest.mark.parametrize("kind", [{}, {"tall": 2}], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_of_rows_change_no_round(rows, kind):
    for seed in range(3):
        problem, stage = problem_of(seed), ragged(seed, **kind)
        whole, chunked = (s3.SOBS(rows=n).solve(problem, stage) for n in (None, rows))
        assert torch.equal(whole[0], chunked[0])
        torch.testing.assert_close(whole[1], chunked[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("widths", [[3, 3, 2, 4, 9, 1, 1, 6, 1], [9, 9], [1] * 15, [7]], ids=str)
def test_panels_are_as_wide_as_may_be_and_no_wider_but_for_one_batch(widths):
    panels = sobs._join(widths, 7)
    assert [t for start, stop in panels for t in range(start, stop)] == list(range(len(widths)))
    for start, stop in panels:
        assert sum(widths[start:stop]) <= 7 or stop == start + 1
        assert stop == len(widths) or sum(widths[start : stop + 1]) > 7


def test_a_round_in_which_nothing_goes_changes_nothing():
    problem = problem_of(0)
    stage = Stage("idle", (M, K), torch.arange(M * K).view(-1, 4, 1), torch.zeros(M * K // 4, dtype=torch.long))
    mask, weight, _ = s3.SOBS().solve(problem, stage)
    assert mask.all() and torch.equal(weight, problem.weight)
