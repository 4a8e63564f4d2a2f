"""SparseGPT: columns left to right, each pruned weight made good by the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.errors import SolveError
from s3lab.solvers.base import Solver
from s3lab.tensors.incidence import arrange, link, offsets, share, tabulate
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class SparseGPT(Solver):
    """One Hessian for all rows, one pass over the columns through the upper factor U of H⁻¹ = UᵀU.

    When the first column of a scope is reached its blocks are scored by Σ (w_ij / U_jj)² with the weights as they are
    then, over all its rows, and the lowest go.  Columns are visited from the left, those that one scope links next
    to each other; a scope wider than ``width`` columns is decided window by window, each with its share of the
    budget, the sum exact.  ``width`` is also the lag of the updates and does not change the result for narrow scopes.

    Cost: about M·K² + K³ operations.  Source: Frantar and Alistarh, *SparseGPT*, 2023, Algorithm 1, there for N:M and
    unstructured masks.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "1:2@1x2", H, SparseGPT(width=8)).mask.sum().item()
    16
    """

    width: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or self.width < 1:
            raise SolveError(f"SparseGPT(width={self.width!r}): a number of columns, at least 1, such as 128")

    def solve(self, problem: Problem, part: Partition) -> tuple[Tensor, Tensor, dict[str, Any]]:
        M, K = part.shape
        plan = _Plan(part, self.width, problem.W.device)
        U = problem.inverse_factor(plan.order)
        W = problem.weight.T[plan.order].contiguous()  # (K, M): a column is a row, updates are contiguous
        pruned = torch.zeros(K, M, dtype=torch.bool, device=W.device)
        for start, stop in plan.windows:
            lost = torch.empty(stop - start, M, dtype=W.dtype, device=W.device)
            scale = U.diagonal()[start:stop, None]
            for j in range(start, stop):
                if j in plan.decisions:
                    blocks, share_pruned = plan.decisions[j]
                    plan.decide(blocks, share_pruned, W[start:stop] / scale, pruned, start)
                lost[j - start] = W[j] * pruned[j] / U[j, j]
                W[j:stop].addr_(U[j, j:stop], lost[j - start], alpha=-1)
            W[stop:].addmm_(U[start:stop, stop:].T, lost, alpha=-1)
        back = plan.order.argsort()
        return ~pruned[back].T.contiguous(), W[back].T.contiguous(), {}


class _Plan:
    """The order of the columns, their windows, and at which column which blocks are decided."""

    def __init__(self, part: Partition, width: int, device: torch.device) -> None:
        K = part.shape[1]
        places = offsets(part, device)
        columns = places % K
        by_scope = link(columns.view(part.S, -1), K)
        narrow = int(by_scope.unique(return_counts=True)[1].max()) <= width
        labels = by_scope if narrow else link(columns.reshape(-1, part.E), K)

        self.order, self.windows = arrange(labels, width)
        position = self.order.argsort()
        first = position[labels[columns[..., 0]]]  # (S, B): where the group of a block's columns begins
        starts = torch.tensor([start for start, _ in self.windows], device=device)
        window = torch.searchsorted(starts, first, right=True) - 1
        budget = _budgets(part, window, len(self.windows))
        when = first if narrow else starts[window]

        self.rows, self.positions = (places // K).view(-1, part.E), position[columns].view(-1, part.E)
        numbers = torch.arange(part.S * part.B, device=device)
        scope = numbers // part.B
        moments = tabulate(numbers, when.reshape(-1))
        self.decisions = {}
        for at, blocks in zip(moments.keys.tolist(), moments.items, strict=True):
            blocks = blocks[blocks >= 0]
            table = tabulate(blocks, scope[blocks])
            self.decisions[at] = table.items, budget[table.keys, window.view(-1)[table.items[:, 0]]]

    def decide(self, blocks: Tensor, budget: Tensor, scaled: Tensor, pruned: Tensor, start: int) -> None:
        """Mark as pruned the ``budget`` blocks of each row of the table that cost least, of equals the last ones."""
        rows, positions = self.rows[blocks], self.positions[blocks]
        cost = scaled[positions - start, rows].square().sum(-1).masked_fill(blocks < 0, -torch.inf)
        rank = cost.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        kept = (blocks >= 0).sum(1) - budget
        goes = (rank >= kept[:, None]) & (blocks >= 0)
        pruned[positions[goes], rows[goes]] = True


def _budgets(part: Partition, window: Tensor, windows: int) -> Tensor:
    """How many blocks each scope gives up in each window, (S, windows)."""
    counts = torch.zeros(part.S, windows, dtype=torch.long, device=window.device)
    counts.scatter_add_(1, window, torch.ones_like(window))
    return share(part.B - part.keep, counts)
