"""The budget that knows nothing: the same share of each matrix."""

from __future__ import annotations

from collections.abc import Sequence

from s3lab.models.search.ladder import Ladder


def aim_at_shares(ladders: Sequence[Ladder], sparsity: Sequence[float]) -> list[list[float]]:
    """Return losses whose least sum takes from each ladder a part of its cost in proportion to ``sparsity``.

    cost · (1 − share)² / sparsity, of which the price of a share is 2 (1 − share) / sparsity: the same for all where
    1 − share ∝ sparsity.  Equal sparsities take the same from each, or what the two nearest rungs come to.

    >>> from s3lab.models.search.ladder import Rung
    >>> ladder = Ladder("o", 0, {}, (Rung("2:4", 4.0, None), Rung("dense", 8.0, None)))
    >>> aim_at_shares([ladder], [0.5])
    [[4.0, 0.0]]
    """
    return [
        [ladder.rungs[-1].cost * (1 - share) ** 2 / aim for share in ladder.shares]
        for ladder, aim in zip(ladders, sparsity, strict=True)
    ]


def find_plain(ladders: Sequence[Ladder], budget: float, tolerance: float) -> list[int] | None:
    """Return the rungs of the one spec that costs the budget when all have it, None where there is no such spec."""
    first = {rung.text: None for rung in ladders[0].rungs}
    for text in first:
        places = [next((n for n, r in enumerate(ladder.rungs) if r.text == text), None) for ladder in ladders]
        rungs = [place for place in places if place is not None]
        cost = sum(ladder.rungs[rung].cost for ladder, rung in zip(ladders, rungs, strict=False))
        if len(rungs) == len(ladders) and abs(cost - budget) <= tolerance * budget:
            return rungs
    return None
