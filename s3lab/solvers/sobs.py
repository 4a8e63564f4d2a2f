"""S-OBS: the true Optimal Brain Surgeon, every row with its own inverse Hessian, none of them ever formed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from s3lab.algebra.partition import Partition
from s3lab.errors import SolveError
from s3lab.solvers.base import Solver
from s3lab.solvers.refit import Refit
from s3lab.tensors.incidence import alike_rows, arrange, link, offsets, tabulate
from s3lab.tensors.meter import free_memory
from s3lab.tensors.problem import Problem

_SUBSETS = 70  # of 4:8; scopes with more ways to choose are emptied in rounds
_CPU_ROOM = 64 * 2**20
_PANEL = 128  # columns whose C is formed at once: the matrix products want them wide, their square costs memory


@dataclass(frozen=True)
class SOBS(Solver):
    """Remove blocks P of least w_Pᵀ (C_PP)⁻¹ w_P, where each row's C is the inverse of H on what the row still keeps.

    Columns are visited in batches of whole scopes, in one order for all rows.  With U the factor of what a row has
    removed so far, C = C₀ − UUᵀ: a panel of batches needs its own rows of U, and U only rows for columns still to
    come.  The weights are last: `Refit` on the final support, of which they are the exact optimum.  Rows that share
    all their blocks share one C.

    batch
        columns visited together, at least one scope; smaller is closer to one scope at a time.
    order
        ``"cost"``, scopes of the largest mean w²/C₀_jj first, or ``"left"``, by first column.
    scoring
        ``"joint"`` weighs all choices within a scope where there are at most 70, and otherwise empties it in
        ``rounds``, re-scored between them; ``"independent"`` removes the blocks of least own score at once.
    rows
        row groups worked on at a time; None takes what a quarter of the free memory of a GPU holds, or 64 MiB of a
        CPU's, where small is quick.  A scope over more rows than that is split over them, each with its share of
        the budget by w²/C₀_jj.

    Cost: K³/12 operations and K²/8 numbers a row for narrow scopes, K³/4 and K² for scopes as wide as the weight,
    where the textbook method takes K³ and K².  Source: Ghriss, arXiv 2604.11315, section on S-OBS; Hassibi and
    Stork, *Optimal Brain Surgeon*, 1993.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "1:2@1x2", H, SOBS(batch=8, order="left")).mask.sum().item()
    16
    """

    batch: int = 32
    order: Literal["cost", "left"] = "cost"
    scoring: Literal["joint", "independent"] = "joint"
    rounds: int = 16
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ("cost", "left") or self.scoring not in ("joint", "independent"):
            raise SolveError(f"{self}: order is 'cost' or 'left', scoring is 'joint' or 'independent'")
        if self.batch < 1 or self.rounds < 1 or (self.rows is not None and self.rows < 1):
            raise SolveError(f"{self}: batch, rounds and rows, if given, are at least 1")

    def solve(self, problem: Problem, part: Partition) -> tuple[Tensor, Tensor, dict[str, Any]]:
        W, C = problem.weight, problem.inverse
        device = W.device
        order, batches = self._visits(W, C, part)
        numbers = part.scatter(torch.arange(part.S * part.B, device=device).view(part.S, part.B))
        groups = alike_rows(numbers)
        chunks, budgets = self._chunks(groups, W, C, part, batches)

        C = C[order][:, order]
        mask = torch.ones_like(numbers, dtype=torch.bool)
        for chunk, budget in zip(chunks, budgets, strict=True):
            rows = groups[chunk]
            weights = W[rows][:, :, order].transpose(1, 2)
            removed = torch.zeros(len(rows), part.shape[1], dtype=torch.bool, device=device)
            removed[:, order] = self._remove(numbers[rows[:, 0]][:, order], weights, C, batches, part.B, budget)
            mask[rows] = ~removed[:, None]
        fit = Refit()(problem, mask)
        return mask, fit.weight, {"chunks": len(chunks), "refit_steps": fit.steps, "residual": fit.residual}

    def _visits(self, W: Tensor, C: Tensor, part: Partition) -> tuple[Tensor, list[tuple[int, int]]]:
        """The order of the columns and the batches of columns that are decided together."""
        K = part.shape[1]
        labels = link((offsets(part, W.device) % K).view(part.S, -1), K)
        if self.order == "cost":
            cost = (W**2).sum(0) / C.diagonal()
            names, place = labels.unique(return_inverse=True)
            mean = cost.new_zeros(len(names)).index_add_(0, place, cost) / place.bincount()
            labels = mean.argsort(descending=True, stable=True).argsort()[place]
        return arrange(labels, self.batch)

    def _chunks(
        self, groups: Tensor, W: Tensor, C: Tensor, part: Partition, batches: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor]:
        """The row groups worked on together, and how many blocks each scope gives up in each chunk, (chunks, S)."""
        M, K = part.shape
        group_of = torch.empty(M, dtype=torch.long, device=W.device)
        group_of[groups] = torch.arange(len(groups), device=W.device)[:, None]
        members = group_of[offsets(part, W.device) // K]
        limit = self.rows or self._row_limit(W, batches)
        labels = link(members.view(part.S, -1), len(groups))
        whole = int(labels.unique(return_counts=True)[1].max()) <= limit
        if not whole:
            labels = link(members.reshape(-1, part.E), len(groups))
        order, windows = arrange(labels, limit)
        chunks = [order[start:stop] for start, stop in windows]

        chunk_of = torch.empty(len(groups), dtype=torch.long, device=W.device)
        for number, chunk in enumerate(chunks):
            chunk_of[chunk] = number
        goes = ~part.choose(part.blocks(W**2 / C.diagonal()).sum(-1))
        budgets = torch.zeros(len(chunks), part.S, dtype=torch.long, device=W.device)
        budgets.scatter_add_(0, chunk_of[members[..., 0]].T, goes.long().T)
        return chunks, budgets

    def _row_limit(self, W: Tensor, batches: list[tuple[int, int]]) -> int:
        """How many row groups fit the memory that is meant for them."""
        K = W.shape[1]
        panel = max(panel[-1][1] - panel[0][0] for panel in _join(batches, _PANEL))
        group = W.element_size() * (K * K // 8 + 4 * panel * panel)
        room = free_memory(W.device) // 4
        return max(1, (room if W.is_cuda else min(room, _CPU_ROOM)) // group)

    def _remove(
        self, numbers: Tensor, W: Tensor, C0: Tensor, batches: list[tuple[int, int]], B: int, budget: Tensor
    ) -> Tensor:
        """Return the columns that each row group loses, bool (G, K).

        ``numbers`` (G, K) names the block of each column, W (G, K, R) holds the rows of a group, C₀ (K, K) is shared,
        all in visiting order.  ``factors[t]`` (G, r, n) is Uᵀ on the columns of panel t, for the r removed so far.
        """
        G, K, R = W.shape
        removed = torch.zeros(G, K, dtype=torch.bool, device=W.device)
        panels = _join(batches, _PANEL)
        factors = [W.new_empty(G, 0, panel[-1][1] - panel[0][0]) for panel in panels]
        paid = W.new_empty(G, 0, R)  # L⁻¹ w of all that is removed: the weights are W − U·paid
        for t, panel in enumerate(panels):
            start, stop = panel[0][0], panel[-1][1]
            U = factors[t]
            factors[t] = U.new_empty(0)
            C = torch.baddbmm(C0[start:stop, start:stop].expand(G, -1, -1), U.mT, U, alpha=-1)
            w = torch.baddbmm(W[:, start:stop], U.mT, paid, alpha=-1)
            gone = self._decide(numbers[:, start:stop], C, w, [(a - start, b - start) for a, b in panel], B, budget)
            removed[:, start:stop] = gone
            if stop == K:
                break
            columns, inverse = _invert_factor(C, gone)
            at = columns[..., None]
            paid = torch.cat([paid, inverse @ w.gather(1, at.expand(-1, -1, R))], 1)
            U = U.gather(2, columns[:, None].expand(-1, U.shape[1], -1)).mT
            for later in range(t + 1, len(panels)):
                ahead = slice(panels[later][0][0], panels[later][-1][1])
                new = inverse @ torch.baddbmm(C0[start:stop, ahead][columns], U, factors[later], alpha=-1)
                factors[later] = torch.cat([factors[later], new], 1)
        return removed

    def _decide(
        self, numbers: Tensor, C: Tensor, w: Tensor, batches: list[tuple[int, int]], B: int, budget: Tensor
    ) -> Tensor:
        """Return which columns of a panel go, bool (G, n), batch by batch, by C (G, n, n) and weights w (G, n, R)."""
        gone = torch.zeros(numbers.shape, dtype=torch.bool, device=C.device)
        if len(batches) > 1 or self.scoring == "joint":
            C = C.clone()  # what follows removes in place, and the caller still needs the whole
        for a, b in batches:
            blocks, local = numbers[:, a:b].unique(return_inverse=True)
            scopes = tabulate(torch.arange(len(blocks), device=C.device), blocks // B)
            due = budget[scopes.keys]
            pieces = _Pieces.of(local, a)
            choice = _weigh_choices(pieces, scopes.items, due, C, w) if self.scoring == "joint" else None
            rounds = (
                1 if choice is not None or self.scoring == "independent" else min(self.rounds, max(1, int(due.max())))
            )
            out = torch.zeros(len(blocks), dtype=torch.bool, device=C.device)
            for turn in range(rounds):
                if choice is None:
                    quota = due * (turn + 1) // rounds - due * turn // rounds
                    fresh = _take_least(pieces.cost(C, w).masked_fill(out, torch.inf), scopes.items, quota)
                else:
                    fresh = choice
                out |= fresh
                lost = torch.zeros_like(gone)
                lost[:, a:b] = fresh[local]
                gone |= lost
                if turn + 1 < rounds or b < gone.shape[1]:
                    w = _eliminate(C, w, lost)
        return gone


def _join(batches: list[tuple[int, int]], width: int) -> list[list[tuple[int, int]]]:
    """Put neighbouring batches together to panels of at most ``width`` columns, or of one batch."""
    panels: list[list[tuple[int, int]]] = []
    for batch in batches:
        if panels and batch[1] - panels[-1][0][0] <= width:
            panels[-1].append(batch)
        else:
            panels.append([batch])
    return panels


def _take_least(cost: Tensor, scopes: Tensor, quota: Tensor) -> Tensor:
    """Return which blocks go, bool: of each row of the table the ``quota`` cheapest, of equals the last ones."""
    table = torch.where(scopes < 0, torch.inf, cost[scopes])
    rank = table.flip(1).sort(dim=1, stable=True).indices.argsort(1).flip(1)
    taken = torch.zeros_like(cost, dtype=torch.bool)
    taken[scopes[rank < quota[:, None]]] = True
    return taken


class _Pieces:
    """Blocks as they appear in row groups: a piece is the columns of one block in one group."""

    def __init__(self, columns: Tensor, block: Tensor, count: int) -> None:
        self.columns = columns  # (G, pieces, e), padded with -1
        self.block = block  # (G, pieces), padded with `count`
        self.count = count

    @classmethod
    def of(cls, local: Tensor, start: int) -> _Pieces:
        """Gather the pieces from the block of each column (G, n), numbered without a gap, from column ``start`` on."""
        G, n = local.shape
        count = int(local.max()) + 1
        group = torch.arange(G, device=local.device)[:, None].expand(G, n)
        table = tabulate(torch.arange(G * n, device=local.device), (group * count + local).view(-1))
        of_group = tabulate(torch.arange(len(table.keys), device=local.device), table.keys // count).items
        absent = of_group < 0
        columns = torch.where(table.items < 0, -1, table.items % n + start)[of_group].masked_fill(absent[..., None], -1)
        return cls(columns, (table.keys % count)[of_group].masked_fill(absent, count), count)

    def cost(self, C: Tensor, w: Tensor) -> Tensor:
        """Return Σ over rows and groups of w_Pᵀ (C_PP)⁻¹ w_P for each block."""
        pieces = _quadratic(*_cut(C, w, self.columns))
        return pieces.new_zeros(self.count + 1).index_add_(0, self.block.view(-1), pieces.view(-1))[:-1]


def _cut(C: Tensor, w: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """C and w on sets of columns (G, …, e), padded with -1: identity and zero there."""
    group = torch.arange(len(C), device=C.device).view(-1, *[1] * (columns.ndim - 1))
    valid = columns >= 0
    A = C[group[..., None], columns[..., :, None], columns[..., None, :]]
    eye = torch.eye(columns.shape[-1], dtype=C.dtype, device=C.device)
    return torch.where(valid[..., :, None] & valid[..., None, :], A, eye), w[group, columns] * valid[..., None]


def _quadratic(A: Tensor, v: Tensor) -> Tensor:
    """Return tr vᵀ A⁻¹ v of small matrices A (…, e, e) and v (…, e, R)."""
    if A.shape[-1] > 4:
        return solve_triangular(torch.linalg.cholesky(A), v, upper=False).square().sum((-2, -1))
    # a library call per tiny matrix costs more than eliminating in all of them at once
    total = v.new_zeros(v.shape[:-2])
    while v.shape[-2]:
        pivot, first = A[..., 0, 0, None], v[..., 0, :]
        total = total + (first.square() / pivot).sum(-1)
        ratio = A[..., 1:, 0] / pivot
        v = v[..., 1:, :] - ratio[..., None] * first[..., None, :]
        A = A[..., 1:, 1:] - ratio[..., None] * A[..., None, 0, 1:]
    return total


def _weigh_choices(pieces: _Pieces, scopes: Tensor, budget: Tensor, C: Tensor, w: Tensor) -> Tensor | None:
    """Return which blocks go, bool, if every scope lies in one row group and has few choices; else None."""
    G, count, e = pieces.columns.shape
    B, q = scopes.shape[1], int(budget.max())
    alike = bool((scopes >= 0).all() & (budget == q).all() & (pieces.columns >= 0).all())
    if not alike or q == 0 or comb(B, q) > _SUBSETS or count % B or G * count != pieces.count:
        return None
    homes = pieces.block.view(G, -1, B)
    scope_of = torch.empty_like(pieces.block.view(-1))
    scope_of[scopes] = torch.arange(len(scopes), device=C.device)[:, None]
    if not torch.equal(scope_of[homes], scope_of[homes[..., :1]].expand_as(homes)):
        return None
    # of equal choices the first wins: the one that keeps the first blocks
    choices = torch.tensor(list(combinations(range(B), q))[::-1], device=C.device)
    A, v = _cut(C, w, pieces.columns.view(G, -1, B * e))
    inside = (choices[..., None] * e + torch.arange(e, device=C.device)).view(len(choices), -1)
    A = A[:, :, inside[:, :, None], inside[:, None, :]]
    best = choices[_quadratic(A, v[:, :, inside]).argmin(-1)]
    gone = torch.zeros(pieces.count, dtype=torch.bool, device=C.device)
    gone[homes.gather(2, best)] = True
    return gone


def _invert_factor(C: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns that go (G, p) and L⁻¹ (G, p, p) of C on them, zero where a group has fewer than p."""
    p = int(gone.sum(1).max())
    columns = (~gone).byte().argsort(dim=1, stable=True)[:, :p]
    valid = gone.gather(1, columns)
    A = C.gather(1, columns[..., None].expand(-1, -1, C.shape[2])).gather(2, columns[:, None].expand(-1, p, -1))
    eye = torch.eye(p, dtype=C.dtype, device=C.device)
    both = valid[:, :, None] & valid[:, None, :]
    factor = torch.linalg.cholesky(torch.where(both, A, eye))
    return columns, solve_triangular(factor, eye.expand_as(factor), upper=False) * both


def _eliminate(C: Tensor, w: Tensor, gone: Tensor) -> Tensor:
    """Take the columns ``gone`` (G, n) out of C, in place, and return w without them."""
    columns, inverse = _invert_factor(C, gone)
    factor = inverse @ C.gather(1, columns[..., None].expand(-1, -1, C.shape[2]))
    paid = inverse @ w.gather(1, columns[..., None].expand(-1, -1, w.shape[2]))
    C.baddbmm_(factor.mT, factor, alpha=-1)
    C.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1)  # what is left of them is rounding, and must stay positive
    return torch.baddbmm(w, factor.mT, paid, alpha=-1)
