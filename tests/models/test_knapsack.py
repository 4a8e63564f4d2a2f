"""The knapsack against every choice there is."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lab.errors import SpecError
from s3lab.models.search.knapsack import choose

numbers = st.integers(0, 40).map(float)
ladders = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)
EPS = 1e-6


def every_choice(costs, losses):
    """All choices, as (cost, loss)."""
    for rungs in product(*(range(len(cost)) for cost in costs)):
        yield (
            sum(cost[r] for cost, r in zip(costs, rungs, strict=True)),
            sum(loss[r] for loss, r in zip(losses, rungs, strict=True)),
        )


def split(items):
    return [[cost for cost, _ in item] for item in items], [[loss for _, loss in item] for item in items]


@settings(max_examples=150, deadline=None)
@given(ladders, st.floats(0, 1))
def test_a_choice_is_within_one_step_of_the_best_one_and_never_below_its_bound(items, share):
    costs, losses = split(items)
    all_choices = list(every_choice(costs, losses))
    least, most = min(cost for cost, _ in all_choices), max(cost for cost, _ in all_choices)
    budget = least + share * (most - least)
    best = min(loss for cost, loss in all_choices if cost <= budget + EPS)
    found = choose(costs, losses, budget)
    assert found.cost <= budget + EPS
    assert (found.cost, found.loss) == pytest.approx(
        tuple(sum(table[r] for table, r in zip(rows, found.rungs, strict=True)) for rows in (costs, losses))
    )
    widest = max(max(loss) - min(loss) for loss in losses)
    assert found.bound <= best + EPS and best - EPS <= found.loss <= best + widest + EPS


@settings(max_examples=150, deadline=None)
@given(ladders, st.floats(0.05, 20))
def test_a_budget_that_a_price_spends_to_the_last_is_solved_exactly(items, price):
    costs, losses = split(items)
    rungs = [
        min(range(len(c)), key=lambda r, c=c, lo=lo: (lo[r] + price * c[r], c[r]))
        for c, lo in zip(costs, losses, strict=True)
    ]
    budget, loss = (sum(t[r] for t, r in zip(rows, rungs, strict=True)) for rows in (costs, losses))
    best = min(other for cost, other in every_choice(costs, losses) if cost <= budget)
    assert loss == pytest.approx(best)  # what a price chooses is best for what it costs
    found = choose(costs, losses, budget)
    assert found.loss == pytest.approx(best) and found.bound == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=2), st.floats(0, 1))
def test_of_two_ladders_the_exchange_finds_the_best(items, share):
    costs, losses = split(items)
    all_choices = list(every_choice(costs, losses))
    least, most = min(cost for cost, _ in all_choices), max(cost for cost, _ in all_choices)
    budget = least + share * (most - least)
    best = min(loss for cost, loss in all_choices if cost <= budget + EPS)
    assert choose(costs, losses, budget).loss == pytest.approx(best)


def test_a_curve_that_falls_off_and_rises_is_taken_at_its_bottom():
    assert choose([[1.0, 2.0, 3.0]], [[5.0, 1.0, 4.0]], 100.0).rungs == (1,)


def test_what_is_left_is_spent_by_exchanges_that_no_price_makes():
    # a price takes both first steps or none: 3 of the budget of 4 would stay unspent
    costs, losses = [[0.0, 3.0], [0.0, 4.0]], [[10.0, 0.0], [11.0, 0.0]]
    assert choose(costs, losses, 4.0).rungs == (0, 1)


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        ([[2.0, 3.0]], [[1.0, 0.0]], "below 2"),
        ([[2.0]], [[1.0, 0.0]], "give as many"),
        ([[]], [[]], "give as many"),
        ([[float("nan")]], [[1.0]], "all finite"),
    ],
)
def test_what_cannot_be_chosen_from_is_told(costs, losses, message):
    with pytest.raises(SpecError, match=message):
        choose(costs, losses, 1.0)
