"""The rule of a scope, against sorting in Python."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from s3lab.algebra.choose import _sorting_network, keep_highest

ROWS = st.integers(1, 20).flatmap(
    lambda B: st.lists(st.lists(st.integers(-2, 2), min_size=B, max_size=B), min_size=1, max_size=6)
)


def highest(row, keep):
    chosen = sorted(range(len(row)), key=lambda b: (-row[b], b))[:keep]
    return [b in chosen for b in range(len(row))]


@given(ROWS, st.data())
def test_the_highest_are_kept_and_of_equals_the_first(rows, data):
    scores, counts = torch.tensor(rows).double(), st.integers(0, len(rows[0]))
    keep = data.draw(counts)
    assert keep_highest(scores, keep).tolist() == [highest(row, keep) for row in rows]
    own = data.draw(st.lists(counts, min_size=len(rows), max_size=len(rows)))
    assert keep_highest(scores, torch.tensor(own)).tolist() == [highest(r, k) for r, k in zip(rows, own, strict=True)]


def test_what_is_not_there_is_never_kept_before_what_is():
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]])
    assert keep_highest(scores, 2).tolist() == [[False, True, False, True]]


def test_the_network_sorts_everything():
    """A network that sorts all rows of zeros and ones sorts all rows (Knuth, TAOCP 3, 5.3.4 Z)."""
    for size in range(1, 15):
        items = list((torch.arange(2**size) >> torch.arange(size)[:, None] & 1).unbind())
        for high, low in _sorting_network(size):
            items[high], items[low] = items[high].maximum(items[low]), items[high].minimum(items[low])
        assert all((a >= b).all() for a, b in pairwise(items))
