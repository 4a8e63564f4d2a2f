"""Which rows and columns share their blocks, against a comparison of all pairs."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers.elimination import list_columns
from s3lab.solvers.fields import Choices, find_groups, find_pieces

SPECS = [
    "2:4",
    "2:4@1x2",
    "1:2@4x1",
    "1:2@2x4",
    "coupled-2:4",
    "50% columns",
    "50% rows",
    "(K,M):(1,K) / (2,1) / (1,2) keep 1",
]


def numbered(lines):
    """The number of the first line that is equal, counted without gaps."""
    firsts = [lines.index(line) for line in lines]
    return [sorted(set(firsts)).index(first) for first in firsts]


@pytest.mark.parametrize("text", SPECS)
def test_rows_and_columns_are_numbered_by_the_first_that_is_equal(text):
    part = s3.parse(text).bind((8, 32))
    stage = part.stage(torch.ones(1))
    blocks, group = find_groups(stage)
    expected = part.scatter(torch.arange(part.S * part.B).view(part.S, part.B))
    assert torch.equal(blocks.long(), expected)
    assert group.tolist() == numbered(expected.tolist())
    assert find_pieces(stage).tolist() == numbered(expected.T.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_columns_are_listed_in_order_and_padded(seed):
    gone = torch.rand(5, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    listed = [row.nonzero()[:, 0].tolist() for row in gone]
    longest = max(map(len, listed))
    assert list_columns(gone).tolist() == [row + [-1] * (longest - len(row)) for row in listed]
    assert list_columns(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0)


def test_choices_are_all_subsets_of_the_sizes_in_a_fixed_order_or_none():
    choices = Choices.of(4, [1, 2], 10, torch.device("cpu"))
    assert choices is not None and choices.B == 4 and not choices.alike
    assert choices.slots.tolist() == [
        [3, 4], [2, 4], [1, 4], [0, 4], [2, 3], [1, 3], [1, 2], [0, 3], [0, 2], [0, 1],
    ]  # fmt: skip
    assert [row.nonzero()[:, 0].tolist() for row in choices.taken] == [
        [b for b in slots if b < 4] for slots in choices.slots.tolist()
    ]
    assert Choices.of(4, [2], 6, torch.device("cpu")).alike
    assert Choices.of(4, [1, 2], 9, torch.device("cpu")) is None and Choices.of(4, [4], 3, torch.device("cpu")) is None
    assert Choices.of(4, [4], 4, torch.device("cpu")).slots.tolist() == [[0, 1, 2, 3]]
    nothing = Choices.of(4, [0], 4, torch.device("cpu"))
    assert nothing.slots.tolist() == [[4]] and not nothing.taken.any()
