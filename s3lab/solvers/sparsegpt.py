"""SparseGPT: columns left to right, each pruned weight made good by the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.solvers.base import Bound, Solver, decide_rounds
from s3lab.tensors.incidence import arrange, link, share, tabulate
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

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        weight = problem.weight

        def decide(stage: Stage) -> Tensor:
            nonlocal weight
            mask, weight = self._sweep(problem, stage)
            return stage.gather(mask)

        return decide_rounds(problem, bound, decide), weight, {}

    def _sweep(self, problem: Problem, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the mask and the weight after one pass over the columns, which decides a stage."""
        M, K = stage.shape
        plan = _Plan(stage, self.width)
        U = problem.inverse_factor(plan.order)
        W = problem.weight.T[plan.order].contiguous()  # (K, M): a column is a row, updates are contiguous
        pruned = torch.zeros(K, M, dtype=torch.bool, device=W.device)
        if stage.pruned is not None:
            pruned |= stage.pruned.T[plan.order]
        for start, stop in plan.windows:
            lost = torch.empty(stop - start, M, dtype=W.dtype, device=W.device)
            scale = U.diagonal()[start:stop, None]
            for j in range(start, stop):
                if j in plan.decisions:
                    plan.decide(j, W[start:stop] / scale, pruned, start)
                lost[j - start] = W[j] * pruned[j] / U[j, j]
                W[j:stop].addr_(U[j, j:stop], lost[j - start], alpha=-1)
            W[stop:].addmm_(U[start:stop, stop:].T, lost, alpha=-1)
        back = plan.order.argsort()
        return ~pruned[back].T.contiguous(), W[back].T.contiguous()


class _Plan:
    """The order of the columns, their windows, and at which column which blocks are decided."""

    def __init__(self, stage: Stage, width: int) -> None:
        K = stage.shape[1]
        self.stage, self.there = stage, (stage.offsets >= 0).view(-1, stage.E)
        present = stage.present
        # what is not there stands with the first column of its block, or of its scope, and so links nothing
        columns = torch.where(stage.offsets >= 0, stage.offsets % K, K)
        least = columns.amin(2, keepdim=True)
        least = torch.where(least < K, least, least.amin(1, keepdim=True).clamp(max=K - 1))
        columns = torch.where(columns < K, columns, least)

        by_scope = link(columns.view(stage.S, -1), K)
        self.narrow = int(by_scope.unique(return_counts=True)[1].max()) <= width
        if not self.narrow and stage.lines is not None:
            raise SolveError(
                f"{stage.text} has scopes of more than {width} columns, which SparseGPT decides in parts, and what is "
                "kept each way has none: give a larger width"
            )
        labels = by_scope if self.narrow else link(columns.reshape(-1, stage.E), K)
        self.order, self.windows = arrange(labels, width)
        position = self.order.argsort()
        first = position[labels[columns[..., 0]]]  # (S, B): where the group of a block's columns begins
        starts = torch.tensor([start for start, _ in self.windows], device=columns.device)
        self.window = torch.searchsorted(starts, first, right=True) - 1
        self.budget = _share_budget(stage, self.window, len(self.windows))

        self.rows = stage.offsets.clamp(min=0).div(K, rounding_mode="floor").view(-1, stage.E)
        self.positions = position[columns].view(-1, stage.E)
        numbers = torch.arange(stage.S * stage.B, device=columns.device).view(stage.S, stage.B)
        when = first if self.narrow else starts[self.window]
        moments = tabulate(numbers[present], when[present])
        self.decisions = dict(zip(moments.keys.tolist(), moments.items, strict=True))

    def decide(self, column: int, scaled: Tensor, pruned: Tensor, start: int) -> None:
        """Mark as pruned, of the blocks that are due at a column, those that cost least, of equals the last ones."""
        blocks = self.decisions[column]
        blocks = blocks[blocks >= 0]
        terms = scaled[self.positions[blocks] - start, self.rows[blocks]].square()
        scopes, row = (blocks // self.stage.B).unique(return_inverse=True)
        cost = terms.new_full((len(scopes), self.stage.B), -torch.inf)
        cost[row, blocks % self.stage.B] = (terms * self.there[blocks]).sum(-1)
        if self.narrow:
            kept = self.stage.choose(cost, scopes)
        else:
            window = self.window.view(-1)[blocks[0]]
            goes = self.budget[scopes, window]
            kept = keep_highest(cost, (cost > -torch.inf).sum(1) - goes)
        goes = blocks[~kept[row, blocks % self.stage.B]]
        there = self.there[goes]
        pruned[self.positions[goes][there], self.rows[goes][there]] = True


def _share_budget(stage: Stage, window: Tensor, windows: int) -> Tensor:
    """How many blocks each scope gives up in each window, (S, windows)."""
    counts = torch.zeros(stage.S, windows, dtype=torch.long, device=window.device)
    counts.scatter_add_(1, window, stage.present.long())
    return share(stage.goes, counts)
