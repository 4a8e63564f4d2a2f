"""SparseGPT: columns left to right, each pruned weight made good by the columns still to come."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.stage import Stage
from s3lab.errors import PatternError, SolveError
from s3lab.solvers import kernels
from s3lab.solvers.base import Bound, Solver, decide_rounds
from s3lab.tensors.incidence import arrange, link, share, tabulate
from s3lab.tensors.problem import Problem

_RUN = 16  # columns between two products: they are made good one by one in their run, at once in what is behind it


@dataclass(frozen=True)
class SparseGPT(Solver):
    """One Hessian for all rows, one pass over the columns through the upper R of H = RRᵀ, U = R⁻¹ that of H⁻¹ = UᵀU.

    When the first column of a scope is reached its blocks are scored by Σ (w_ij / U_jj)² with the weights as they are
    then, over all its rows, and the lowest go.  Columns are visited from the left, those that one scope links next
    to each other; a scope wider than ``width`` columns is decided window by window, each with its share of the
    budget, the sum exact.  ``width`` is also the lag of the updates and does not change the result for narrow scopes.

    impl
        ``"triton"`` sweeps a window in one kernel and raises SolveError where `kernels.refuse_sweep` has a reason not
        to; ``"torch"`` takes any pattern on any device; ``"auto"`` takes the kernel where it can and there is a GPU.

    A window J needs of all before it only Y = W₀ − Ŵ, what they have changed: it starts from W₀ + (R_JJ)⁻ᵀ Σ R_IJᵀ Y_I,
    one product, and no inverse but that of R_JJ is formed.  Cost: about M·K² + K³/3 operations.  Source: Frantar and
    Alistarh, *SparseGPT*, 2023, Algorithm 1, there through U, for N:M and unstructured masks.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "1:2@1x2", H, SparseGPT(width=8)).mask.sum().item()
    16
    """

    width: int = 128
    impl: kernels.Impl = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or self.width < 1:
            raise SolveError(f"SparseGPT(width={self.width!r}): a number of columns, at least 1, such as 128")
        kernels.check_impl(self.impl)

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        weight = problem.weight

        def decide(stage: Stage) -> Tensor:
            nonlocal weight
            mask, weight = self._sweep(problem, stage)
            return stage.gather(mask)

        return decide_rounds(problem, bound, decide), weight, {}

    def _sweep(self, problem: Problem, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return the mask and the weight after one pass over the columns, which decides a stage."""
        tiled = kernels.is_tiled(stage, self.width)
        in_kernel = kernels.takes_triton(self.impl, kernels.refuse_sweep(stage, tiled, problem.weight))
        plan = _Tiles(stage, self.width, in_kernel) if tiled else _Plan(stage, self.width)
        R = problem.factor(plan.order)
        W = problem.weight.T[plan.order].contiguous()  # (K, M): a column is a row
        board = _Board(W, stage.pruned, plan.order)
        for start, stop in plan.windows:
            window, scale = slice(start, stop), R.diagonal()[start:stop]
            U = solve_triangular(R[window, window], scale.diag(), upper=True).fill_diagonal_(1)
            before = R[:start, window].T @ W[:start]
            board.V[window] = torch.addmm(W[window] * scale[:, None], U.T, before)
            plan.sweep(board, U, start, stop)
            board.V[window] /= scale[:, None]
            W[window] -= board.V[window]
        back = plan.order.argsort()
        return (board.gone[back] == 0).T.contiguous(), board.V[back].T.contiguous()


def _sweep_window(board: _Board, U: Tensor, start: int, stop: int, plan: _Tiles | _Plan) -> None:
    """Decide and sweep a window: what goes of V_i is taken from all columns j to come, U_ij / U_jj times each."""
    V, lost = board.V[start:stop], torch.empty_like(board.V[start:stop])
    columns, gone, losses = V.unbind(), board.gone[start:stop].unbind(), lost.unbind()
    for a, b in pairwise(_runs(start, stop, plan.due)):
        for j in range(a, b):
            if j in plan.due:
                plan.decide(board, j)
            i, end = j - start, b - start
            torch.mul(columns[i], gone[i], out=losses[i])
            V[i:end].addr_(U[i, i:end], losses[i], alpha=-1)
        a, b = a - start, b - start
        V[b:].addmm_(U[a:b, b:].T, lost[a:b], alpha=-1)


def _runs(start: int, stop: int, due: Container[int]) -> list[int]:
    """Cut a window into runs of `_RUN` columns or a few more: never within columns that are decided in the same run."""
    cuts, decided = [start], True
    for j in range(start + 1, stop):
        if j - cuts[-1] >= _RUN and (decided or j in due):
            cuts.append(j)
            decided = True
        decided = decided and (j not in due or j == cuts[-1])
    return [*cuts, stop]


class _Board:
    """What a sweep works on, a row for each column: weights V in units of their score, and which are gone, as 0 or 1.

    Flat, both end in one more place, which stands for all that is not there.
    """

    def __init__(self, W: Tensor, pruned: Tensor | None, order: Tensor) -> None:
        self.flat, self.flat_gone = W.new_zeros(W.numel() + 1), W.new_zeros(W.numel() + 1)
        self.V, self.gone = self.flat[:-1].view(W.shape), self.flat_gone[:-1].view(W.shape)
        if pruned is not None:
            self.gone.copy_(pruned.T[order])


class _Tiles:
    """The plan where scopes are consecutive columns of one row: all rows decide at once, and nothing is looked up."""

    def __init__(self, stage: Stage, width: int, in_kernel: bool) -> None:
        self.in_kernel = in_kernel
        K, step = stage.shape[1], stage.B * stage.E
        self.extents, self.keep = (stage.B, stage.E), stage.B - int(stage.goes[0])
        self.order = torch.arange(K, device=stage.offsets.device)
        self.due = range(0, K, step)
        width = min(width, kernels.WINDOW) // step * step
        self.windows = [(start, min(start + width, K)) for start in range(0, K, width)]

    def sweep(self, board: _Board, U: Tensor, start: int, stop: int) -> None:
        """Decide and sweep a window."""
        if self.in_kernel:
            kernels.sweep_window(board.V[start:stop], U, board.gone[start:stop], *self.extents, self.keep)
        else:
            _sweep_window(board, U, start, stop, self)

    def decide(self, board: _Board, at: int) -> None:
        """Mark as gone the blocks of the scopes that begin at a column that cost least, of equals the last ones."""
        B, E = self.extents
        scope = slice(at, at + B * E)
        kept = keep_highest(board.V[scope].view(B, E, -1).square().sum(1).T, self.keep)
        board.gone[scope].view(B, E, -1).copy_(~kept.T.unsqueeze(1))


class _Decision(NamedTuple):
    """Scopes, or shares of scopes, that are decided together: where on the board, and how many blocks they keep."""

    places: Tensor  # (n, B, E)
    there: Tensor  # (n, B): which blocks there are
    keep: Tensor  # (n,)
    scopes: Tensor  # (n,)


class _Plan:
    """The order of the columns, their windows, and at which column which blocks are decided."""

    def __init__(self, stage: Stage, width: int) -> None:
        self.stage = stage
        columns = _place_columns(stage)
        group, whole = _group_columns(stage, columns, width)
        self.order, self.windows = arrange(group, width)
        position = self.order.argsort()
        begin = position[group[columns[..., 0]]]  # (S, B): where the group of a block's columns begins
        places = self._place_blocks(position)
        if whole:
            scopes = torch.arange(stage.S, device=places.device)
            decisions = _Decision(places, stage.present, stage.present.sum(1) - stage.goes, scopes)
            self._schedule(decisions, begin[:, 0])
        else:
            self._schedule(*self._cut_scopes(places, begin))

    def _place_blocks(self, position: Tensor) -> Tensor:
        """Return where the blocks are on the board, (S, B, E): in its last place what is not there."""
        M, K = self.stage.shape
        on_board = torch.arange(M * K + 1, device=position.device)
        on_board[:-1] = (position * M + torch.arange(M, device=position.device)[:, None]).view(-1)
        return on_board[self.stage.offsets]

    def _cut_scopes(self, places: Tensor, begin: Tensor) -> tuple[_Decision, Tensor]:
        """Return the shares of the scopes, one for each window with blocks of it, and the columns they are due at."""
        stage = self.stage
        starts = torch.tensor([start for start, _ in self.windows], device=places.device)
        window = torch.searchsorted(starts, begin, right=True) - 1
        numbers = torch.arange(begin.numel(), device=places.device).view(begin.shape)
        parts = tabulate(numbers[stage.present], (numbers // stage.B * len(starts) + window)[stage.present])
        scopes, own = parts.keys // len(starts), parts.keys % len(starts)
        keep = parts.counts - _share_budget(stage, window, len(starts))[scopes, own]
        nowhere = places.new_full((1, stage.E), stage.shape[0] * stage.shape[1])
        blocks = torch.cat([places.view(-1, stage.E), nowhere])[parts.items]
        return _Decision(blocks, parts.items >= 0, keep, scopes), starts[own]

    def _schedule(self, decisions: _Decision, when: Tensor) -> None:
        """Keep decisions by the columns (n,) that they are due at."""
        turn = when.argsort(stable=True)
        moments, counts = when[turn].unique_consecutive(return_counts=True)
        pieces = (part.index_select(0, turn).split(counts.tolist()) for part in decisions)
        self.due = dict(zip(moments.tolist(), map(_Decision, *pieces), strict=True))
        self.whole = bool(decisions.there.all())
        self.keep = int(decisions.keep[0]) if bool((decisions.keep == decisions.keep[0]).all()) else None

    def sweep(self, board: _Board, U: Tensor, start: int, stop: int) -> None:
        """Decide and sweep a window."""
        _sweep_window(board, U, start, stop, self)

    def decide(self, board: _Board, at: int) -> None:
        """Mark as gone, of the blocks that are due at a column, those that cost least, of equals the last ones."""
        due = self.due[at]
        cost = board.flat.take(due.places).square_().sum(-1)
        if self.stage.lines is not None:
            kept = self.stage.choose(cost, due.scopes)
        else:
            cost = cost if self.whole else cost.masked_fill_(~due.there, -torch.inf)
            kept = keep_highest(cost, due.keep if self.keep is None else self.keep)
        goes = (~kept).to(cost.dtype).unsqueeze(-1).expand_as(due.places)
        board.flat_gone.scatter_(0, due.places.reshape(-1), goes.reshape(-1))


def _place_columns(stage: Stage) -> Tensor:
    """Return the column of each element, (S, B, E): of what is not there the first of its block, or scope, which links
    nothing."""
    K, there = stage.shape[1], stage.offsets >= 0
    columns = torch.where(there, stage.offsets % K, K)
    of_block = columns.amin(2, keepdim=True)
    of_scope = of_block.amin(1, keepdim=True).clamp(max=K - 1)
    return torch.where(there, columns, torch.where(of_block < K, of_block, of_scope))


def _group_columns(stage: Stage, columns: Tensor, width: int) -> tuple[Tensor, bool]:
    """Return the group of each column (K,), and whether scopes link them, or blocks alone where that is too wide.

    Raises PatternError where scopes are too wide and cannot be decided in parts.
    """
    K = stage.shape[1]
    group = link(_neighbours(columns.view(stage.S, -1), K), K)
    if int(group.bincount().max()) <= width:
        return group, True
    if stage.lines is not None:
        raise PatternError(
            f"{stage.text} has scopes of more than {width} columns, which SparseGPT decides in parts, and what is "
            "kept each way has none: give a larger width"
        )
    return link(_neighbours(columns.view(-1, stage.E), K), K), False


def _neighbours(members: Tensor, count: int) -> Tensor:
    """The distinct pairs of neighbours in the rows of ``members``: they link what the rows link, and are few."""
    seen = torch.zeros(count * count, dtype=torch.bool, device=members.device)
    seen[members[:, :-1] * count + members[:, 1:]] = True
    pairs = seen.nonzero()
    return torch.cat([pairs // count, pairs % count], 1)


def _share_budget(stage: Stage, window: Tensor, windows: int) -> Tensor:
    """How many blocks each scope gives up in each window, (S, windows)."""
    counts = torch.zeros(stage.S, windows, dtype=torch.long, device=window.device)
    counts.scatter_add_(1, window, stage.present.long())
    return share(stage.goes, counts)
