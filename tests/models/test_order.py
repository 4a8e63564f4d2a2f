"""Orders of channels: exact prices, the best order by brute force, and nothing lower than the start."""

from itertools import combinations

import pytest
import torch

from s3lab import PATTERNS, parse
from s3lab.models.basis import order as orders
from s3lab.models.basis.order import Rivals, Side, find_groups, find_order, is_alike

PRICED = ["2:4", "1:4", "3:4", "2:4@1x2", "2:4@4x1", "4:8@16x1", "tiles16", "coupled-2:4", "1:2@1x16"]


def draw(spec, M=32, K=64, seed=0):
    """A side whose channels are the columns of skewed scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(M, K, generator=generator).abs() * torch.randn(K, generator=generator).exp()
    places = torch.arange(K).unsqueeze(1) + torch.arange(M) * K
    return Side(parse(spec).bind((M, K)), scores, places)


def rows_of(spec, M, K, seed=0):
    """A side whose channels are the rows."""
    scores = torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).abs()
    return Side(parse(spec).bind((M, K)), scores, torch.arange(M * K).view(M, K))


def one_head(side):
    return torch.zeros(len(side.places), dtype=torch.long)


@pytest.mark.parametrize("spec", PRICED)
def test_the_price_of_an_exchange_is_what_the_pattern_then_keeps(spec):
    side = draw(spec)
    rivals = Rivals.of(side)
    assert rivals is not None
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(64, generator=generator)
    search = orders._Exchange([rivals], one_head(side), order, generator)
    places = torch.randperm(64, generator=generator)[:8]
    offers, base, met = search.offers(places), side.kept(order), 0
    for i in range(8):
        for j in range(i):
            if search.groups[places[i]] != search.groups[places[j]]:
                changed = order.clone()
                changed[places[[i, j]]] = order[places[[j, i]]]
                gain = offers[i, j] + offers[j, i] - offers[i, i] - offers[j, j]
                assert side.kept(changed) - base == pytest.approx(float(gain), abs=1e-3)
                met += 1
    assert met


def test_an_assignment_keeps_what_its_price_says():
    side = draw("2:4")
    search = orders._Exchange([Rivals.of(side)], one_head(side), torch.arange(64), torch.Generator().manual_seed(0))
    for places in search.draw(torch.arange(64)):
        offers, before = search.offers(places), search.order.clone()
        value = side.kept(before)
        search.assign(places)
        position = {int(channel): i for i, channel in enumerate(before[places])}
        taken = torch.tensor([position[int(channel)] for channel in search.order[places]])
        gain = float(offers.gather(1, taken[:, None]).sum() - offers.trace())
        assert side.kept(search.order) - value == pytest.approx(gain, abs=1e-3) and gain >= 0


@pytest.mark.parametrize("spec", ["2:4", "1:4", "3:4", "2:4@2x1"])
@pytest.mark.parametrize("seed", range(4))
def test_of_two_scopes_the_order_comes_near_the_best_of_all(spec, seed):
    side = draw(spec, 4, 8, seed)
    halves = [(0, *others) for others in combinations(range(1, 8), 3)]
    orders = [(*half, *(channel for channel in range(8) if channel not in half)) for half in halves]
    best = max(side.kept(torch.tensor(order)) for order in orders)
    found = side.kept(find_order([side], one_head(side)))
    assert 0.99 * best < found <= best * (1 + 1e-6)


@pytest.mark.parametrize("spec", [*PATTERNS, "8:16 plus 2:32", "50%/row", "1:2@1x16", "4:8@16x1 then 2:4"])
def test_no_pattern_keeps_less_than_before(spec):
    side = draw(spec, 128, 256)
    order = find_order([side], one_head(side), sweeps=1)
    assert order.sort().values.tolist() == list(range(256))
    assert side.kept(order) >= side.kept(torch.arange(256))


@pytest.mark.parametrize("spec", [*PRICED, "block16", "8:16 plus 2:32", "2:4 each way"])
def test_of_channels_in_skewed_order_more_is_kept(spec):
    side = draw(spec)
    assert side.kept(find_order([side], one_head(side))) > side.kept(torch.arange(64)) * 1.0001


def test_channels_stay_in_their_head():
    side, heads = draw("2:4"), torch.arange(64) // 16
    order = find_order([side], heads)
    assert torch.equal(heads[order], heads) and side.kept(order) > side.kept(torch.arange(64))


def test_sides_count_together():
    one, two = draw("2:4", seed=0), draw("1:4", seed=1)
    order = find_order([one, two], one_head(one))
    assert sum(s.kept(order) for s in (one, two)) > sum(s.kept(torch.arange(64)) for s in (one, two))


@pytest.mark.parametrize(("spec", "alike"), [("2:4", True), ("50%/row", True), ("2:4@1x2", True), ("4:8@16x1", False)])
def test_rows_are_alike_where_no_scope_reaches_over_two(spec, alike):
    side = rows_of(spec, 32, 64)
    assert is_alike(side) == alike
    orders = [torch.randperm(32, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert (len({round(side.kept(order), 3) for order in orders}) == 1) == alike


def test_groups_are_places_that_share_scopes():
    groups = find_groups([Rivals.of(draw("2:4"))])
    assert torch.equal(groups, torch.arange(64) // 4 * 4)
    wider = find_groups([Rivals.of(draw("2:4")), Rivals.of(draw("tiles16"))])
    assert torch.equal(wider, torch.arange(64) // 32 * 32)
