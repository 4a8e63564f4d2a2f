"""`then` and `plus`: masks against naive readings of what they say, and their figures."""

import math
from itertools import combinations, product

import pytest
import torch

import s3lab as s3

SCORES = torch.rand(128, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "V", "M", "columns"), [("4:8@64x1 then 2:4", 64, 8, 4), ("4:16@128x1 then 2:4", 128, 16, 4)]
)
def test_v_n_m_keeps_columns_of_a_tile_and_then_two_of_four(text, V, M, columns):
    mask = s3.parse(text).bind(SCORES.shape).project(SCORES)
    for i in range(0, 128, V):
        for j in range(0, 256, M):
            tile = SCORES[i : i + V, j : j + M]
            kept = tile.sum(0).argsort(descending=True)[:columns].sort().values
            expected = torch.zeros(V, M, dtype=torch.bool)
            for row in range(V):
                expected[row, kept[tile[row, kept].argsort(descending=True)[:2]]] = True
            assert torch.equal(mask[i : i + V, j : j + M], expected)


def test_kept_rows_are_laid_side_by_side_too():
    mask = s3.parse("50% rows then 1:4").bind((8, 16)).project(SCORES[:8, :16])
    rows = SCORES[:8, :16].sum(1).argsort(descending=True)[:4].sort().values
    assert mask.any(1).nonzero().flatten().tolist() == rows.tolist()
    assert torch.equal(mask[rows], s3.parse("1:4").bind((4, 16)).project(SCORES[rows, :16]))


def test_three_parts_nest_to_the_right():
    spec = s3.parse("50% rows then 50% columns then 1:2")
    assert str(spec) == "50% rows then 50% columns then 1:2" and str(spec.second) == "50% columns then 1:2"
    bound = spec.bind((8, 16))
    mask = bound.project(SCORES[:8, :16])
    assert bound.density == 1 / 8 and mask.sum() == 16
    assert mask.any(1).sum() == 4 and mask.any(0).sum() <= 8 and (mask.sum(1).unique() == torch.tensor([0, 4])).all()


@pytest.mark.parametrize("text", ["8:16 plus 16:256", "2:4 plus 4:256", "8:16 plus 1%", "2:4@1x2 plus 8:256"])
def test_salient_weights_that_are_fixed_stay_and_the_rest_has_its_pattern(text):
    main, salient = (s3.parse(part) for part in text.split(" plus "))
    worth = SCORES[:4]
    mask = s3.parse(text).bind((4, 256)).fix(worth).project(worth)
    kept = salient.bind((4, 256)).project(worth)
    assert mask[kept].all()
    part = main.bind((4, 256))
    for block_scores, chosen, reserved in zip(
        part.blocks(worth.where(~kept, 0)).sum(-1), part.blocks(mask), part.blocks(kept), strict=True
    ):
        free = ~reserved.all(-1)
        best = [b for b in block_scores.argsort(descending=True).tolist() if free[b]][: part.keep]
        assert all(chosen[b].all() for b in best)
        assert chosen.sum() == sum(int(reserved[b].sum()) if b not in best else part.E for b in range(part.B))
    s3.parse(text).check(mask)
    assert abs(float(mask.double().mean()) - s3.parse(text).bind((4, 256)).density) < 1e-2


@pytest.mark.parametrize("text", ["1:2 plus 1:4", "2:4 plus 3:8", "1:4 plus 2:8", "1:2 plus 1:4 plus 1:8"])
@pytest.mark.parametrize("seed", range(5))
def test_no_mask_with_salient_weights_keeps_a_higher_score(text, seed):
    """Every choice of salient weights, layer by layer, and the best of the rest in each scope, by brute force."""
    worth = torch.rand(8, generator=torch.Generator().manual_seed(seed)).tolist()
    main, *salient = ([int(n) for n in part.split(":")] for part in text.split(" plus "))

    def best(layers, taken):
        if layers:
            N, M = layers[-1]
            free = [[i for i in range(start, start + M) if i not in taken] for start in range(0, 8, M)]
            choices = product(*(combinations(scope, min(N, len(scope))) for scope in free))
            return max(best(layers[:-1], taken.union(*picked)) for picked in choices)
        N, M = main
        scopes = [[worth[i] for i in range(start, start + M) if i not in taken] for start in range(0, 8, M)]
        return sum(worth[i] for i in taken) + sum(sum(sorted(scope)[-N:]) for scope in scopes)

    scores = torch.tensor([worth], dtype=torch.float64)
    kept = s3.parse(text).bind((1, 8)).project(scores)
    assert float(scores[kept].sum()) == pytest.approx(best(salient, frozenset()))


@pytest.mark.parametrize("seed", range(5))
def test_the_dense_tiles_are_those_that_two_of_four_would_cost_the_most(seed):
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)).double() ** 3
    mask = s3.parse("2:4 plus 50%@4x4").bind((8, 8)).project(scores)
    tiles = scores.view(2, 4, 2, 4).transpose(1, 2).reshape(4, 4, 4)
    thin = tiles.topk(2).values.sum((1, 2))
    totals = [
        sum(float(tile.sum() if t in dense else thin[t]) for t, tile in enumerate(tiles))
        for dense in combinations(range(4), 2)
    ]
    assert float(scores[mask].sum()) == pytest.approx(max(totals))


def test_tiles_are_dense_or_two_of_four():
    bound = s3.parse("2:4 plus 50%@16x16").bind((64, 64))
    mask = bound.project(SCORES[:64, :64])
    tiles = mask.view(4, 16, 4, 16).transpose(1, 2).reshape(16, 256).sum(1)
    assert sorted(tiles.tolist()) == [128] * 8 + [256] * 8
    assert bound.density == 0.75 == float(mask.double().mean())
    assert bound.storage_bits == 0.5 * 0.75 + s3.parse("50%@16x16").bind((64, 64)).storage_bits


def test_a_chain_may_have_salient_weights():
    bound = s3.parse("4:8@16x1 then 2:4 plus 1:32").bind((32, 64))
    mask, chain = (pattern.project(SCORES[:32, :64]) for pattern in (bound, bound.main))
    salient = s3.parse("1:32").bind((32, 64)).project(SCORES[:32, :64] * ~chain)
    assert mask[salient].all()
    assert bound.density == 0.25 + 1 / 32


def test_salient_parts_that_are_fixed_stay_whatever_the_rest_is_worth():
    bound = s3.parse("2:4 plus 4:32 plus 1:16").bind((4, 64))
    worth, other = SCORES[:4, :64], SCORES[4:8, :64]
    mask = bound.fix(worth).project(other)
    for text in ("4:32", "1:16"):
        assert mask[s3.parse(text).bind((4, 64)).project(worth)].all()


def test_the_index_is_told_round_by_round():
    bound = s3.parse("4:8@16x1 then 2:4 plus 1:32").bind((32, 64))
    first, second, salient = (s3.parse(text).bind((32, 64)) for text in ("4:8@16x1", "2:4", "1:32"))
    rounds = dict(bound.storage_rounds)
    assert rounds == {"1:32": salient.storage_bits, "4:8@16x1": first.storage_bits, "2:4": second.storage_bits / 2}
    assert bound.storage_bits == pytest.approx(sum(rounds.values()))


def test_figures_are_those_of_the_papers():
    assert s3.parse("8:16 plus 16:256").bind((4, 256)).storage_bits == pytest.approx(0.875 + 0.328, abs=1e-3)
    vnm = s3.parse("4:8@64x1 then 2:4").bind((64, 8))
    assert vnm.density == 0.25
    assert vnm.mask_count == math.comb(8, 4) * 6**64
    assert vnm.storage_bits == (7 + 64 * 3) / (64 * 8)
    assert vnm.bitmask_bits == (8 + 64 * 4) / (64 * 8)


def test_ways_of_a_small_chain_give_all_its_masks():
    """3 of 4 columns, then 1 of 3 in each row: every mask with one weight a row, in three columns at most."""
    bound = s3.parse("3:4@2x1 then 1:3").bind((2, 4))
    masks = set()
    for columns in combinations(range(4), 3):
        for first in columns:
            for second in columns:
                masks.add((first, second))
    assert bound.mask_count == 4 * 9 >= len(masks) == 16


@pytest.mark.parametrize("text", ["4:8@8x1 then 2:4", "2:4 plus 1:16", "2:4 plus 50%@8x8", "50% rows then 2:4"])
def test_check_tells_a_mask_of_the_pattern_from_others(text):
    spec = s3.parse(text)
    mask = spec.bind((16, 32)).project(SCORES[:16, :32])
    spec.check(mask)
    for wrong in (torch.ones_like(mask), torch.zeros_like(mask)):
        with pytest.raises(s3.SpecError):
            spec.check(wrong)


def test_check_names_the_first_scope_with_weights_in_too_many_blocks():
    spec = s3.parse("2:4@4x1 then 1:2")
    mask = spec.bind((4, 16)).project(SCORES[:4, :16])
    mask[0, 8:12] = True
    with pytest.raises(s3.SpecError, match="at scope 2 of 2:4@4x1: weights are kept in 4 of its blocks, not in 2"):
        spec.check(mask)


def test_check_names_the_first_scope_with_too_few_whole_blocks():
    spec = s3.parse("2:4 plus 1:16")
    mask = spec.bind((2, 16)).project(SCORES[:2, :16])
    mask[0, 8:12] = False
    with pytest.raises(
        s3.SpecError,
        match=r"breaks 2:4 plus 1:16 on \(2, 16\) at scope 2 of 2:4: it keeps 0 whole blocks of 4, fewer than 2",
    ):
        spec.check(mask)


@pytest.mark.parametrize(
    "text",
    ["coupled-2:4 then 2:4", "(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 2 then 2:4"],
)
def test_what_cannot_be_composed_is_refused(text):
    with pytest.raises(s3.SpecError):
        s3.parse(text)


def test_a_second_part_that_does_not_fit_the_survivors_is_refused():
    with pytest.raises(s3.SpecError, match="remainder"):
        s3.parse("2:4@4x1 then 2:3").bind((8, 16))


@pytest.mark.parametrize("name", s3.SOLVERS)
@pytest.mark.parametrize(
    "text", ["4:8@8x1 then 2:4", "2:4 plus 1:16", "2:4 plus 50%@8x8", "2:4 each way", "2:4@1x2 plus 1:16"]
)
def test_every_solver_takes_composed_specs(name, text):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 32, generator=generator)
    X = torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    found = s3.prune(W, text, s3.hessian(X), solver=name)
    s3.parse(text).check(found.mask)
    assert torch.equal(found.weight != 0, found.mask)
    assert 0 < found.error < 1
