"""Which rows and columns of a weight the blocks and scopes of a partition touch.

Solvers walk over columns; these few facts, read off the canonical layout, tell them in which order and how far apart
they may.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from s3lab.shapes import Integer


@lru_cache(maxsize=4)
def link(members: Integer[Tensor, "N n"], count: int) -> Integer[Tensor, " count"]:
    """Return the smallest item that each of ``count`` items is linked to; a row of ``members`` links all its items.

    >>> link(torch.tensor([[0, 2], [2, 3]]), 5).tolist()
    [0, 1, 0, 0, 4]
    """
    label = torch.arange(count, device=members.device)
    while True:
        least = label[members].amin(1, keepdim=True).expand_as(members)
        new = label.scatter_reduce(0, members.reshape(-1), least.reshape(-1), "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def arrange(labels: Integer[Tensor, " count"], width: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return an order of items that puts equal labels together, ascending, and the windows to take of it.

    A window (start, stop) holds at most ``width`` items; a label is never cut, and one with more items makes a window
    of its own.

    >>> arrange(torch.tensor([0, 2, 0, 2, 4, 4]), 4)
    (tensor([0, 2, 1, 3, 4, 5]), [(0, 4), (4, 6)])
    """
    windows: list[tuple[int, int]] = []
    for size in labels.unique(return_counts=True)[1].tolist():
        start, stop = windows[-1] if windows else (0, 0)
        if windows and stop + size - start <= width:
            windows[-1] = start, stop + size
        else:
            windows.append((stop, stop + size))
    return labels.argsort(stable=True), windows


class Table(NamedTuple):
    """Items put in rows by a key: ``items`` (rows, longest) padded with -1, and the key of each row, ascending."""

    items: Tensor
    keys: Tensor

    @property
    def counts(self) -> Tensor:
        """How many items each row holds."""
        return (self.items >= 0).sum(1)


def tabulate(items: Integer[Tensor, " n"], keys: Integer[Tensor, " n"]) -> Table:
    """Return the items as rows of equal key, in order within each.

    >>> tabulate(torch.tensor([5, 6, 7]), torch.tensor([1, 0, 1]))
    Table(items=tensor([[ 6, -1],
            [ 5,  7]]), keys=tensor([0, 1]))
    """
    order = keys.argsort(stable=True)
    rows, row, counts = keys[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(items), device=items.device) - (counts.cumsum(0) - counts)[row]
    table = items.new_full((len(rows), int(counts.max())), -1)
    table[row, place] = items[order]
    return Table(table, rows)


def share(totals: Integer[Tensor, " N"], counts: Integer[Tensor, "N n"]) -> Integer[Tensor, "N n"]:
    """Split each row's total over its parts in proportion to their counts, exactly and never above a part's count.

    >>> share(torch.tensor([3]), torch.tensor([[2, 2, 2]])).tolist()
    [[1, 1, 1]]
    """
    whole = counts.sum(1, keepdim=True).clamp(min=1)
    reached = counts.cumsum(1) * totals[:, None] // whole
    return reached.diff(dim=1, prepend=torch.zeros_like(whole))
