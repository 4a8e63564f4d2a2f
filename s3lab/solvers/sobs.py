"""S-OBS: the true Optimal Brain Surgeon, every row with its own inverse Hessian, none of them ever formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.solvers.base import Bound, Solver
from s3lab.solvers.eliminate import take_cheapest
from s3lab.solvers.elimination import Elimination, Workspace, list_columns, weigh
from s3lab.solvers.fields import Choices, Field, find_fields, find_groups, make_batches
from s3lab.solvers.refit import Refit
from s3lab.tensors.incidence import arrange, link
from s3lab.tensors.meter import free_memory
from s3lab.tensors.problem import Problem

_SUBSETS = 70  # of 4:8; scopes with more ways to choose are emptied in rounds
_ROOM = 2**14  # numbers in the matrices of all choices that a row weighs at once
_CPU_ROOM = 128 * 2**20
_PANEL = 96  # columns whose C is formed at once: the matrix products want them wide, their square costs memory


@dataclass(frozen=True)
class SOBS(Solver):
    """Remove blocks P of least w_Pᵀ (C_PP)⁻¹ w_P, where each row's C is the inverse of H on what the row still keeps.

    Columns are visited in batches of whole scopes, in one order for all rows.  With L the factor of C₀ on what a row
    has removed so far and X = L⁻¹C₀, C = C₀ − XᵀX: of each row only L is kept, and X is solved for on the panel of
    batches at hand.  The weights are last: `Refit` on the final support, of which they are the exact optimum, from
    those that L gives.  Rows that share all their blocks share one C, and rows of unlike columns have each their own.

    batch
        columns visited together, at least one scope; smaller is closer to one scope at a time.
    order
        ``"cost"``, scopes of the largest mean w²/C₀_jj first, or ``"left"``, by first column.
    scoring
        ``"joint"`` weighs all choices within a scope where there are at most 70, and otherwise empties it in
        ``rounds``, re-scored between them; ``"independent"`` removes the blocks of least own score at once, as is
        always done where a scope has lines.
    rows
        row groups worked on at a time; None takes what a quarter of the free memory of a GPU holds, or 128 MiB of a
        CPU's, where small is quick.  A scope over more rows than that is split over them, each with its share of
        the budget by w²/C₀_jj.

    Cost: K³/12 operations and K²/8 numbers a row for narrow scopes, K³ and 3K² for scopes as wide as the weight,
    where the textbook method takes K³ and K².  Raises SolveError for options that cannot be.

    Source: Ghriss, arXiv 2604.11315, section on S-OBS; Hassibi and Stork, *Optimal Brain Surgeon*, 1993.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "1:2@1x2", H, SOBS(batch=8, order="left")).mask.sum().item()
    16
    """

    batch: int = 8
    order: Literal["cost", "left"] = "cost"
    scoring: Literal["joint", "independent"] = "joint"
    rounds: int = 16
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ("cost", "left") or self.scoring not in ("joint", "independent"):
            raise SolveError(f"{self}: order is 'cost' or 'left', scoring is 'joint' or 'independent'")
        if self.batch < 1 or self.rounds < 1 or (self.rows is not None and self.rows < 1):
            raise SolveError(f"{self}: batch, rounds and rows, if given, are at least 1")

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        W, C = problem.weight, problem.inverse
        walks: list[_Walk] = []

        def decide(stage: Stage) -> Tensor:
            if not stage.goes.any():
                return stage.present
            walks.append(_Walk(self, stage, problem))
            return walks[-1].run()

        mask = bound.resolve(decide, W**2 / C.diagonal())
        fit = Refit()(problem, mask, W - walks[-1].dual @ C if walks else W)
        chunks = sum(len(walk.chunks) for walk in walks)
        return mask, fit.weight, {"chunks": chunks, "refit_steps": fit.steps, "residual": fit.residual}


class _Walk:
    """One stage decided, chunk by chunk of row groups, batch by batch of columns."""

    def __init__(self, options: SOBS, stage: Stage, problem: Problem) -> None:
        self.options, self.stage, self.problem = options, stage, problem
        self.W, self.C = W, C = problem.weight, problem.inverse
        self.dual = torch.zeros_like(W)
        blocks, group = find_groups(stage)
        order, batches = self._visit()
        fields = find_fields(blocks, group, order, batches)
        widths = [max(f.windows[t][1] - f.windows[t][0] for f in fields) for t in range(len(batches))]
        self.panels = _join(widths, _PANEL)
        self.chunks, self.due = self._cut_rows(fields, group, max(sum(widths[a:b]) for a, b in self.panels))
        weighed = options.scoring == "joint" and stage.lines is None
        sizes = self.due.unique().tolist()
        self.choices = Choices.of(stage.B, sizes, _SUBSETS, W.device) if weighed else None
        self.fields = make_batches(fields, stage.B, self.choices, _ROOM)
        self.inverses = [C.index_select(0, f.columns).index_select(1, f.columns) for f in fields]

    def run(self) -> Tensor:
        """Return which blocks stay, bool (S, B), and leave in ``dual`` what gives the weights of that."""
        stays = torch.ones(self.stage.S * self.stage.B, dtype=torch.bool, device=self.W.device)
        workspaces = [Workspace(self.W) for _ in self.fields]
        for chunk, due in zip(self.chunks, self.due.expand(len(self.chunks), -1), strict=True):
            pieces = [
                _Piece(field.cut(chunk), self.W, inverse, workspace)
                for field, inverse, workspace in zip(self.fields, self.inverses, workspaces, strict=True)
                if chunk[field.groups].any()
            ]
            for first, stop in self.panels:
                for piece in pieces:
                    piece.open(first, stop)
                if all(piece.alone for piece in pieces):
                    for piece in pieces:
                        piece.take_cheapest()
                else:
                    for t in range(first, stop):
                        self._decide(t, pieces, due, last=t + 1 == stop)
                for piece in pieces:
                    piece.part.close()
            for piece in pieces:
                stays[piece.field.blocks[piece.lost].long()] = False
                self.dual[piece.field.rows[:, :, None], piece.field.columns] = piece.part.dual().transpose(1, 2)
        return stays.view(self.stage.S, self.stage.B)

    def _decide(self, t: int, pieces: list[_Piece], due: Tensor, last: bool) -> None:
        """Decide batch ``t`` and take what goes out of the open panels."""
        B, choices = self.stage.B, self.choices if pieces[0].field.batches[t].joint else None
        scopes, there, places = _gather([piece.field.blocks[:, slice(*piece.field.windows[t])] for piece in pieces], B)
        due = torch.where(scopes < 0, 0, due[scopes])
        at_once = choices is not None or self.options.scoring == "independent" or self.stage.lines is not None
        rounds = min(1 if at_once else self.options.rounds, int(due.max()))
        out = torch.zeros_like(there)
        for turn in range(rounds):
            if choices is not None:
                homes = [own // B for own in places]
                out = choices.best(self._weigh(t, pieces, homes, (len(scopes), len(choices.slots))), there, due)
            else:
                cost = self._weigh(t, pieces, places, (there.numel(), 1)).view_as(there)
                quota = due * (turn + 1) // rounds - due * turn // rounds
                out = out | self._pick(cost, there & ~out, scopes, quota)
            for piece, own in zip(pieces, places, strict=True):
                piece.take(t, out.view(-1)[own], last and turn + 1 == rounds)

    def _weigh(self, t: int, pieces: list[_Piece], homes: list[Tensor], shape: tuple[int, int]) -> Tensor:
        """What the sets of batch ``t`` cost, summed into a table of that shape whose rows ``homes`` name."""
        cost = self.W.new_zeros(shape[0] + 1, shape[1])  # the last row is for what is not there
        for piece, home in zip(pieces, homes, strict=True):
            piece.add_cost(t, home, cost)
        return cost[:-1]

    def _pick(self, cost: Tensor, there: Tensor, scopes: Tensor, quota: Tensor) -> Tensor:
        """Which blocks go next, bool (n, B), of those that are ``there``: the cheapest, or what lines do not keep."""
        if self.stage.lines is not None:
            return there & ~self.stage.choose(cost, scopes)
        return _take_least(cost.masked_fill(~there, torch.inf), quota)

    def _visit(self) -> tuple[Tensor, list[tuple[int, int]]]:
        """The columns with a block in the order of their visits, and the batches that are decided together."""
        stage, K = self.stage, self.stage.shape[1]
        columns = _fill((stage.offsets % K).view(stage.S, -1), (stage.offsets >= 0).view(stage.S, -1))
        labels = link(columns, K)
        seen = torch.zeros(K, dtype=torch.bool, device=columns.device)
        seen[stage.offsets[stage.offsets >= 0] % K] = True
        if self.options.order == "cost":
            cost = self.problem.processes.sum((self.W**2).sum(0, dtype=torch.float64)) / self.C.diagonal()
            names, place = labels.unique(return_inverse=True)
            mean = cost.new_zeros(len(names)).index_add_(0, place, cost) / place.bincount()
            labels = mean.argsort(descending=True, stable=True).argsort()[place]
        order, batches = arrange(labels[seen], self.options.batch)
        return seen.nonzero()[:, 0][order], batches

    def _cut_rows(self, fields: list[Field], group: Tensor, width: int) -> tuple[list[Tensor], Tensor]:
        """The chunks of row groups worked on together, bool over groups, and how many blocks each scope gives up in
        each, (chunks, S), or (1, S) where scopes lie in one chunk."""
        stage, there = self.stage, self.stage.offsets >= 0
        members = _fill(group[stage.offsets // stage.shape[1]].view(stage.S, -1), there.view(stage.S, -1))
        limit = self._row_limit(fields, width)
        together = _link_groups(members, int(group.max()) + 1)
        whole = stage.lines is not None or int(together.unique(return_counts=True)[1].max()) <= limit
        if not whole:  # only what shares a block stays together
            members = _fill(members.view(-1, stage.E), there.view(-1, stage.E))
            together = link(members, len(together))
        order, windows = arrange(together, limit)
        chunk_of = torch.empty_like(order)
        for number, (start, stop) in enumerate(windows):
            chunk_of[order[start:stop]] = number
        chunks = list(torch.arange(len(windows), device=order.device)[:, None] == chunk_of)
        if whole:
            return chunks, stage.goes[None]
        return chunks, self._share_out(chunk_of[members[:, 0].view(stage.S, stage.B)], len(chunks))

    def _share_out(self, chunk: Tensor, chunks: int) -> Tensor:
        """How many blocks each scope gives up in each chunk, (chunks, S), by the ``chunk`` of each block, (S, B).

        As many as would go there if the whole scope were decided at once by w²/C₀_jj.
        """
        stage = self.stage
        goes = ~stage.choose(stage.blocks(self.W**2 / self.C.diagonal()).sum(-1)) & stage.present
        due = torch.zeros(chunks, stage.S, dtype=torch.long, device=chunk.device)
        return due.scatter_add_(0, chunk.T, goes.long().T)

    def _row_limit(self, fields: list[Field], width: int) -> int:
        """How many row groups fit the memory that is meant for them."""
        if self.options.rows is not None:
            return self.options.rows
        shared = [len(field.columns) for field in fields if not field.single]
        if not shared:
            return len(self.W)
        K, device = max(shared), self.W.device
        group = self.W.element_size() * (K * K // 8 + K * width // 2 + 4 * width * width)
        room = free_memory(device) // 4
        return max(1, (room if self.W.is_cuda else min(room, _CPU_ROOM)) // group)


class _Piece:
    """A field in a chunk while its columns go: the elimination, and what is ``lost`` so far, bool (G, k)."""

    def __init__(self, field: Field, W: Tensor, inverse: Tensor, workspace: Workspace) -> None:
        self.field = field
        self.part = Elimination(W[field.rows[:, :, None], field.columns].transpose(1, 2), inverse, workspace)
        self.lost = torch.zeros_like(field.blocks, dtype=torch.bool)
        if field.taken is not None:
            self.part.forget(field.taken, _PANEL // 2)

    def open(self, first: int, stop: int) -> None:
        """Look at the columns of batches ``first`` to ``stop``."""
        self.batches = range(first, stop)
        self.start = self.field.windows[first][0]
        self.part.open(self.start, self.field.windows[stop - 1][1])

    @property
    def alone(self) -> bool:
        """Whether in all open batches each unit takes its cheapest set, and no more needs to be asked."""
        return all(self.field.batches[t].alone for t in self.batches)

    def weigh(self, t: int) -> Tensor:
        """Return what the sets of batch ``t`` cost, (G, u, c)."""
        start, stop = (at - self.start for at in self.field.windows[t])
        sets = self.field.batches[t].sets
        cost = weigh(self.part.C[:, start:stop, start:stop], self.part.w[:, start:stop], sets.flatten(1, 2))
        return cost.unflatten(1, sets.shape[1:3])

    def take_cheapest(self) -> None:
        """Take from each unit of the open batches the set that costs least."""
        windows = [self.field.windows[t] for t in self.batches]
        sets = [self.field.batches[t].sets + self.field.windows[t][0] - self.start for t in self.batches]
        found = take_cheapest(self.part.C, self.part.w, sets, [stop - self.start for _, stop in windows])
        if found is not None:
            columns = [_pick_sets(own, best) for own, best in zip(sets, found, strict=True)]
            self._lose(torch.cat(columns, 1), last=True)
            return
        for t, own in zip(self.batches, sets, strict=True):
            self._lose(_pick_sets(own, self.weigh(t).argmin(-1)), last=t + 1 == self.batches.stop)

    def add_cost(self, t: int, homes: Tensor, cost: Tensor) -> None:
        """Add what the sets of batch ``t`` cost to the rows of ``cost`` that its columns belong to, (G, n)."""
        units = self.field.batches[t].units
        homes = homes.gather(1, units.clamp(min=0).expand(len(homes), -1))
        homes = homes.masked_fill(units < 0, len(cost) - 1)
        cost.index_add_(0, homes.flatten(), self.weigh(t).flatten(0, 1))

    def take(self, t: int, out: Tensor, last: bool) -> None:
        """Take the columns ``out`` (G, n) of batch ``t`` from the open panel, those that are not out of it yet."""
        start, stop = self.field.windows[t]
        fresh = out & ~self.lost[:, start:stop] & (self.field.blocks[:, start:stop] >= 0)
        self.lost[:, start:stop] |= fresh
        wide = stop - start > _PANEL and stop == self.field.windows[-1][1]
        if not (last and wide):  # the weights feel the rest soon enough, in the refit
            columns = list_columns(fresh)
            self._remove(torch.where(columns < 0, -1, columns + start - self.start), last)

    def _lose(self, columns: Tensor, last: bool) -> None:
        self.lost[:, self.start :].scatter_(1, columns, True)
        self._remove(columns, last)

    def _remove(self, columns: Tensor, last: bool) -> None:
        if columns.shape[1] and not self.field.single:
            self.part.remove(columns, last)


def _pick_sets(sets: Tensor, best: Tensor) -> Tensor:
    """The columns (G, u·e) of the sets (G, u, c, e), or (1, u, c, e), whose numbers are ``best`` (G, u)."""
    places = best[..., None, None].expand(-1, -1, 1, sets.shape[3])
    return sets.expand(len(best), -1, -1, -1).gather(2, places).flatten(1)


def _join(widths: list[int], most: int) -> list[tuple[int, int]]:
    """Put neighbouring batches together to panels of at most ``most`` columns, or of one batch."""
    panels, filled = [(0, 1)], widths[0]
    for t, width in enumerate(widths[1:], 1):
        fits = filled + width <= most
        filled = filled + width if fits else width
        panels[-1:] = [(panels[-1][0], t + 1)] if fits else [panels[-1], (t, t + 1)]
    return panels


def _gather(blocks: list[Tensor], B: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Bring the blocks of columns, a tensor (G, k) for each piece, to a table with a row of B blocks for each scope.

    Returns the scopes (n,), -1 for that of columns without a block, which blocks of them are there, bool (n, B), and
    for each piece the places (G, k) of its columns in the flat table.
    """
    joined = torch.cat([own.flatten() for own in blocks])
    scopes, row = (joined // B).unique(return_inverse=True)
    place = row * B + joined % B
    there = torch.zeros(len(scopes), B, dtype=torch.bool, device=joined.device)
    there.view(-1)[place] = joined >= 0
    places = place.split([own.numel() for own in blocks])
    return scopes, there, [own.view_as(like) for own, like in zip(places, blocks, strict=True)]


def _link_groups(members: Tensor, count: int) -> Tensor:
    """A number for each of so many groups, the same for those that a row of ``members`` (S, n) names together."""
    if torch.equal(members, members[:, :1].expand_as(members)):
        return torch.arange(count, device=members.device)
    return link(members, count)


def _fill(values: Tensor, there: Tensor) -> Tensor:
    """The values (N, n), and the first of a row that is there in place of those that are not."""
    if there.all():
        return values
    return torch.where(there, values, values.gather(1, there.byte().argmax(1, keepdim=True)))


def _take_least(cost: Tensor, quota: Tensor) -> Tensor:
    """Return which are the ``quota`` (n,) least of each row of ``cost`` (n, B), bool, of equals the last ones."""
    rank = cost.flip(1).sort(dim=1, stable=True).indices.argsort(1).flip(1)
    return (rank < quota[:, None]) & cost.isfinite()
