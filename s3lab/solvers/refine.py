"""Local search: exchange a kept block of a solver's support for a pruned one where that lowers the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.shapes import Bool
from s3lab.solvers.base import Bound
from s3lab.solvers.refit import Refit
from s3lab.tensors.incidence import link
from s3lab.tensors.meter import free_memory
from s3lab.tensors.problem import Problem

_NEAREST = 8  # blocks of either kind that are weighed against each other in a scope; all of them up to 8:16
_CPU_ROOM = 256 * 2**20


@dataclass(frozen=True)
class Refine:
    """Group coordinate descent on the support: in each scope, the exchange of two blocks that gains most.

    With P = (H_SS)⁻¹ on a row's support S, u = P H_Sq and s = H_qq − H_qS u, taking a pruned block q in and a kept
    block p out, all others refitted, lowers the row's loss by exactly

        g_qᵀ s⁻¹ g_q − ŵ_pᵀ (P_pp + u_p s⁻¹ u_pᵀ)⁻¹ ŵ_p,   ŵ_p = w_p − u_p s⁻¹ g_q,   g = ((W−Ŵ)H)_q.

    A sweep weighs all scopes; rows that no scope ties together then make their best exchanges at once, are refitted,
    and go back and try half as many where their loss has not fallen.  So the loss never rises, and ends where no
    single exchange within a scope of one row lowers it.  In scopes of more blocks than 16 the eight nearest to a change
    of each kind are weighed; in scopes over several rows, blocks of one row as if the other stayed as it is.

    Cost of a sweep: about K³ operations a row, in chunks of rows of bounded memory.  Raises SolveError for composed
    specs, for what is kept each way, and for blocks whose rows have unequal numbers of columns.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "2:4", H, "magnitude", refine=True).mask.sum().item()
    16
    """

    sweeps: int = 30

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise SolveError(f"{self}: sweeps is at least 1")

    def __call__(
        self, problem: Problem, bound: Bound, mask: Bool[Tensor, "M K"]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return a mask of no higher loss, its exact weights, and how many sweeps and exchanges that took."""
        search = _Search(problem, bound, mask)
        sweeps = 0
        while sweeps < self.sweeps and problem.processes.max(float(search.active.any())):
            search.sweep()
            sweeps += 1
        return search.mask, search.weight, {"sweeps": sweeps, "exchanges": problem.processes.total(search.exchanges)}


class _Search:
    """A support under way: which components, rows that scopes tie together, may still gain, by how many exchanges."""

    def __init__(self, problem: Problem, bound: Bound, mask: Tensor) -> None:
        stage = bound.stage(problem.weight) if isinstance(bound, Partition) else bound
        if not isinstance(stage, Stage) or stage.lines is not None:
            raise SolveError(f"{bound.text}: local search exchanges blocks of one view, block and scope, kept by count")
        M, K = problem.shape
        self.problem, self.stage, self.K = problem, stage, K
        self.keep = stage.B - int(stage.goes[0])
        offsets = stage.offsets.sort(-1).values
        pieces = int((offsets[0, 0] // K).unique().numel())
        self.places = offsets.view(stage.S, stage.B, pieces, -1)  # a piece is what a block has in one row
        self.rows = self.places[..., 0] // K
        if not torch.equal(self.places // K, self.rows[..., None].expand_as(self.places)):
            raise SolveError(f"{bound.text} has blocks with unequal rows: local search needs as many columns in each")
        labels = link(self.rows.view(stage.S, -1), M)
        self.component = labels.unique(return_inverse=True)[1]  # of each row
        self.home = self.component[self.rows[:, 0, 0]]  # of each scope
        count = int(self.component.max()) + 1
        self.active = torch.ones(count, dtype=torch.bool, device=mask.device)
        self.quota = self.home.bincount(minlength=count).div(4, rounding_mode="floor").clamp(min=1)
        self.exchanges = 0
        self.mask, self.weight = mask, Refit()(problem, mask).weight
        self.loss = self._measure(self.weight)

    def sweep(self) -> None:
        """Make the best exchanges of every active component, and keep them where its loss falls."""
        gain, goes, comes = self._weigh()
        order = gain.argsort(descending=True, stable=True)
        order = order[self.home[order].argsort(stable=True)]
        start = self.home.bincount(minlength=len(self.quota)).cumsum(0) - self.home.bincount(minlength=len(self.quota))
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - start[self.home[order]]
        chosen = ((gain > 0) & (rank < self.quota[self.home])).nonzero()[:, 0]
        tried = torch.zeros_like(self.active)
        tried[self.home[chosen]] = True
        self.active &= tried

        mask = self.mask.clone()
        mask.view(-1)[self.places[chosen, goes[chosen]].flatten()] = False
        mask.view(-1)[self.places[chosen, comes[chosen]].flatten()] = True
        weight = Refit()(self.problem, mask, start=self.weight).weight
        loss = self._measure(weight)
        better = loss < self.loss * (1 - 1e-6)
        takes = better[self.component][:, None]
        self.mask, self.weight = torch.where(takes, mask, self.mask), torch.where(takes, weight, self.weight)
        self.loss = torch.where(better, loss, self.loss)
        self.exchanges += int(better[self.home[chosen]].sum())
        self.active &= better | (self.quota > 1)
        self.quota = torch.where(better, self.quota, self.quota // 2).clamp(min=1)

    def _measure(self, weight: Tensor) -> Tensor:
        """The loss of each component."""
        apart = self.problem.weight - weight
        rows = ((apart @ self.problem.hessian) * apart).sum(1)
        return rows.new_zeros(len(self.active)).index_add_(0, self.component, rows)

    def _weigh(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gain of the best exchange of each scope, and the blocks that go and come, (S,) each."""
        S, B = self.stage.S, self.stage.B
        kept = self.mask.view(-1)[self.places[..., 0, 0]]
        slope = (self.problem.weight - self.weight) @ self.problem.hessian
        cost, worth = slope.new_zeros(S, B), slope.new_zeros(S, B)
        near = min(_NEAREST, self.keep), min(_NEAREST, B - self.keep)
        alone = bool((self.rows == self.rows[:, :1, :1]).all())  # each scope in one row
        gain = slope.new_full((S,), -torch.inf)
        goes, comes = torch.zeros(2, S, dtype=torch.long, device=slope.device)
        if min(near) == 0:
            return gain, goes, comes
        for rows in self._chunks():
            local = torch.full((len(self.mask),), -1, device=slope.device)
            local[rows] = torch.arange(len(rows), device=slope.device)
            mine = local[self.rows] >= 0  # (S, B, pieces)
            table = _Rows(self.problem.hessian, self.weight[rows], slope[rows], self.mask[rows])
            at, columns = local[self.rows[mine]], self.places[mine] % self.K
            stays = kept[..., None].expand_as(mine)[mine]
            value = table.weigh_pieces(at, columns, stays)
            scope, block, _ = mine.nonzero(as_tuple=True)
            cost.index_put_((scope[stays], block[stays]), value[stays], accumulate=True)
            worth.index_put_((scope[~stays], block[~stays]), value[~stays], accumulate=True)
            if alone:
                own = mine[:, 0, 0].nonzero()[:, 0]
                out, new = _nearest(cost[own], worth[own], kept[own], near)
                pick = torch.arange(len(own), device=own.device)[:, None]
                cut, put = (self.places[own][pick, which, 0] % self.K for which in (out, new))
                net = table.weigh_exchanges(local[self.rows[own, 0, 0]], cut, put)
                gain[own], best = net.flatten(1).max(1)
                goes[own] = out.gather(1, (best // near[1])[:, None])[:, 0]
                comes[own] = new.gather(1, (best % near[1])[:, None])[:, 0]
        if not alone:
            out, new = _nearest(cost, worth, kept, (1, 1))
            goes, comes = out[:, 0], new[:, 0]
            gain = (worth.gather(1, new) - cost.gather(1, out))[:, 0]
        return gain, goes, comes

    def _chunks(self) -> tuple[Tensor, ...]:
        """The rows of active components, as many at a time as fit the memory that is meant for them."""
        rows = self.active[self.component].nonzero()[:, 0]
        if not len(rows):
            return ()
        device, size = self.mask.device, self.problem.weight.element_size()
        room = free_memory(device) // 4 if device.type == "cuda" else _CPU_ROOM
        return rows.split(max(1, room // (size * 3 * self.K * self.K)))


class _Rows:
    """The inverses of H on the supports of some rows, and what a change of those supports costs or gains."""

    def __init__(self, H: Tensor, weight: Tensor, slope: Tensor, mask: Tensor) -> None:
        self.H, self.weight, self.slope = H, weight, slope
        size = int(mask.sum(1).max())
        self.support = (~mask).byte().argsort(dim=1, stable=True)[:, :size]
        there = mask.gather(1, self.support)
        eye = torch.eye(size, dtype=H.dtype, device=H.device)
        inside = H[self.support[:, :, None], self.support[:, None, :]]
        inside = torch.where(there[:, :, None] & there[:, None, :], inside, eye)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(inside)) * there[:, None, :] * there[:, :, None]
        self.beside = H[self.support] * there[..., None]  # (R, size, K)
        self.through = self.inverse @ self.beside
        self.position = torch.zeros_like(mask, dtype=torch.long)
        self.position.scatter_(1, self.support, torch.arange(size, device=H.device).expand_as(self.support))

    def weigh_pieces(self, row: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
        """What the removal of kept pieces costs, and what taking the others in gains; row (n,), columns (n, c)."""
        at = self.position[row[:, None], columns]
        removal = self.inverse[row[:, None, None], at[:, :, None], at[:, None, :]]
        matrix = torch.where(kept[:, None, None], removal, self._schur(row, columns))
        vector = torch.where(kept[:, None], self.weight[row[:, None], columns], self.slope[row[:, None], columns])
        return (vector * torch.linalg.solve(matrix, vector)).sum(-1)

    def weigh_exchanges(self, row: Tensor, cut: Tensor, put: Tensor) -> Tensor:
        """What each exchange gains, (n, p, q): pieces ``cut`` (n, p, c) for pieces ``put`` (n, q, c) of one row."""
        n, p, c = cut.shape
        q = put.shape[1]
        slope = self.slope[row[:, None, None], put]
        schur = self._schur(row.repeat_interleave(q), put.view(n * q, c)).view(n, q, c, c)
        step = torch.linalg.solve(schur, slope)  # the values that the new piece takes
        at = self.position[row[:, None, None], cut]
        u = self.through[row[:, None, None, None, None], at[:, :, None, :, None], put[:, None, :, None, :]]
        moved = self.weight[row[:, None, None], cut][:, :, None] - (u @ step[:, None, ..., None])[..., 0]
        inside = self.inverse[row[:, None, None, None], at[..., :, None], at[..., None, :]]
        inside = inside[:, :, None] + u @ torch.linalg.solve(schur[:, None].expand(n, p, q, c, c), u.mT)
        return (slope * step).sum(-1)[:, None] - (moved * torch.linalg.solve(inside, moved)).sum(-1)

    def _schur(self, row: Tensor, columns: Tensor) -> Tensor:
        """What is left of H on pieces, (n, c, c), once the support answers for its part."""
        beside = self.beside[row[:, None], :, columns]  # (n, c, size)
        through = self.through[row[:, None], :, columns]
        left = self.H[columns[:, :, None], columns[:, None, :]] - beside @ through.mT
        # a piece of the support itself leaves nothing, and is not asked for
        taken = left.diagonal(dim1=1, dim2=2) <= 1e-6 * self.H[columns, columns]
        return left + torch.diag_embed(taken.to(left))


def _nearest(cost: Tensor, worth: Tensor, kept: Tensor, near: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The kept blocks of least cost and the pruned ones of most worth of each scope, (n, near) each."""
    out = cost.masked_fill(~kept, torch.inf).topk(near[0], dim=1, largest=False).indices
    return out, worth.masked_fill(kept, -torch.inf).topk(near[1], dim=1).indices
