"""Columns taken out of an inverse, from many rows at once: each row its own columns, of one inverse that all share."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

_TINY = 4  # up to this many columns, eliminating by hand is quicker than a library call per matrix


class Workspace:
    """Memory to use again, by name: on a CPU, fresh memory costs as much as what is done in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._parts: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of a shape that nobody else uses until the name is taken again."""
        part = self._parts.get(name)
        if part is None or part.numel() < prod(shape):
            part = self._parts[name] = self._like.new_empty(prod(shape))
        return part[: prod(shape)].view(shape)


class _Removal(NamedTuple):
    """Columns that went out of the open ones at once, of each group, and what that adds to L, L⁻¹ and L⁻¹W."""

    columns: Tensor  # (G, p), from the first open column
    factor: Tensor  # (G, p, n): the next rows of X, whose columns of what is lost later belong to L; none of the last
    inverse: Tensor  # (G, p, p): the diagonal block of L⁻¹
    weights: Tensor  # (G, p, R): the next rows of L⁻¹W


class Elimination:
    """C = (H on what is left)⁻¹ and the weights that go with it, for G groups of R rows that lose columns as one.

    With LLᵀ = C₀ on the columns r that a group has lost and X = L⁻¹C₀[r, :], C = C₀ − XᵀX and w = W − XᵀL⁻¹W[r].
    Only L⁻¹ is kept; X is solved for on the few columns that are looked at.  C₀ (K, K) is shared, W is (G, K, R).

    Columns are looked at in turn: `open` names a run of them, on which ``C`` and ``w`` are then at hand; `remove`, as
    often as one likes, takes some of them out of both; `close` keeps what was removed, for the runs to come.  `forget`
    comes before all, for columns that are lost from the start, and `dual` after all, for the weights that are left.

    Cost: r²n operations to open n columns after r are lost, r²/2 numbers of memory, per group.

    >>> both = Elimination(torch.ones(1, 2, 1), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> both.open(0, 2)
    >>> both.remove(torch.tensor([[0]]))
    >>> both.C[0, 1, 1].item(), both.w[0, 1, 0].item()
    (1.5, 0.5)
    """

    C: Tensor
    w: Tensor

    def __init__(self, W: Tensor, C0: Tensor, workspace: Workspace | None = None) -> None:
        self._W, self._C0, self._workspace = W, C0, workspace or Workspace(W)
        self._lost = torch.zeros(len(W), 0, dtype=torch.long, device=W.device)  # (G, r)
        self._lost_weights = W.new_zeros(len(W), 0, W.shape[2])  # L⁻¹W[r], (G, r, R)
        # for each block of p columns lost, (L_pp)⁻¹ (−L_pr, 1): the next rows of L⁻¹ from the r before and what is new
        self._inverse_rows: list[Tensor] = []
        self._removals: list[_Removal] = []  # since `open`

    def open(self, start: int, stop: int) -> None:
        """Look at columns ``start`` to ``stop``: C is (G, n, n) there, or (1, n, n) while it is the same for all."""
        (G, r), n = self._lost.shape, stop - start
        panel = self._workspace.take("panel", len(self._C0), n).copy_(self._C0[:, start:stop])
        self._start, self._X = start, self._workspace.take("X", G, r, n)
        torch.index_select(panel, 0, self._lost.flatten(), out=self._X.view(G * r, n))
        self._solve(self._X)
        self.C, self.w = panel[None, start:stop], self._W[:, start:stop]
        if r:
            self.C = torch.baddbmm(self.C, self._X.mT, self._X, alpha=-1, out=self._workspace.take("C", G, n, n))
            self.w = torch.baddbmm(self.w, self._X.mT, self._lost_weights, alpha=-1)

    def remove(self, columns: Tensor, last: bool = False) -> None:
        """Take open columns (G, p), padded with -1, out of C and w, which nobody looks at after the ``last``."""
        valid, columns = columns >= 0, columns.clamp(min=0)
        rows = _pick_rows(self.C, columns)
        inverse = _invert_factor(_pick_columns(rows, columns), valid)
        factor, weights = rows[:, :0] if last else inverse @ rows, inverse @ _pick_rows(self.w, columns)
        self._removals.append(_Removal(columns, factor, inverse, weights))
        if last:
            return
        if self.C.shape[0] < columns.shape[0]:
            self.C = self._workspace.take("C", len(columns), *self.C.shape[1:]).copy_(self.C)
        self.C.baddbmm_(factor.mT, factor, alpha=-1)
        # what is left of C there is rounding, and must stay positive
        self.C.diagonal(dim1=1, dim2=2).scatter_add_(1, columns, valid.to(self.C))
        self.w = torch.baddbmm(self.w, factor.mT, weights, alpha=-1)

    def close(self) -> None:
        """Keep what was removed since `open`: the next columns to be opened feel it."""
        if not self._removals:
            return
        columns = torch.cat([removal.columns for removal in self._removals], 1)
        inverse, factor = self._removals[0].inverse, self._removals[0].factor
        for removal in self._removals[1:]:  # the inverse of a factor grows by −(L_bb)⁻¹ L_b L⁻¹
            corner = removal.inverse
            below = corner.neg() @ _pick_columns(factor, removal.columns).mT @ inverse
            factor = torch.cat([factor, removal.factor], 1)
            inverse = torch.cat([pad(inverse, (0, corner.shape[1])), torch.cat([below, corner], 2)], 1)
        weights = torch.cat([removal.weights for removal in self._removals], 1)
        self._keep(columns + self._start, _pick_columns(self._X, columns), inverse, weights)
        self._removals = []

    def forget(self, gone: Tensor, width: int) -> None:
        """Take columns out that are lost from the start, bool (G, K), ``width`` at a time."""
        for columns in list_columns(gone).split(width, 1):
            valid, columns = columns >= 0, columns.clamp(min=0)
            X = self._solve(self._C0[self._lost[:, :, None], columns[:, None]])
            A = torch.baddbmm(self._C0[columns[:, :, None], columns[:, None]], X.mT, X, alpha=-1)
            inverse = _invert_factor(A, valid)
            weights = inverse @ torch.baddbmm(_pick_rows(self._W, columns), X.mT, self._lost_weights, alpha=-1)
            self._keep(columns, X, inverse, weights)

    def dual(self) -> Tensor:
        """Return Z (G, K, R), zero but on what is lost, that gives all weights that are left as W − C₀Z."""
        Z = self._lost_weights  # becomes L⁻ᵀ of them, block of rows by block of rows
        for rows in reversed(self._inverse_rows):
            stop = rows.shape[2]
            r = stop - rows.shape[1]
            new = rows.mT @ Z[:, r:stop]
            Z = torch.cat([Z[:, :r] + new[:, :r], new[:, r:], Z[:, stop:]], 1)
        return torch.zeros_like(self._W).scatter_add_(1, self._lost[..., None].expand_as(Z), Z)

    def _keep(self, columns: Tensor, X: Tensor, inverse: Tensor, weights: Tensor) -> None:
        G, r, p = X.shape
        rows = self._workspace.take(f"rows {len(self._inverse_rows)}", G, p, r + p)
        rows[:, :, :r] = torch.bmm(inverse.neg(), X.mT, out=self._workspace.take("new", G, p, r))
        rows[:, :, r:] = inverse
        self._inverse_rows.append(rows)
        self._lost = torch.cat([self._lost, columns], 1)
        self._lost_weights = torch.cat([self._lost_weights, weights], 1)

    def _solve(self, X: Tensor) -> Tensor:
        """L⁻¹X, in place, for X (G, r, n) on what is lost so far."""
        for rows in self._inverse_rows:
            G, p, stop = rows.shape
            X[:, stop - p : stop] = torch.bmm(rows, X[:, :stop], out=self._workspace.take("new", G, p, X.shape[2]))
        return X


def weigh(C: Tensor, w: Tensor, sets: Tensor) -> Tensor:
    """Return tr w_Pᵀ (C_PP)⁻¹ w_P, (G, m), for m sets P of columns each: (G, m, e), or (1, m, e) for all groups.

    ``sets`` is padded with -1; C is (G, n, n) or (1, n, n), w (G, n, R).

    >>> weigh(torch.eye(2)[None], torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[0, -1], [0, 1]]])).tolist()
    [[9.0, 25.0]]
    """
    (G, n, R), e = w.shape, sets.shape[-1]
    valid, sets = sets >= 0, sets.clamp(min=0)
    A = _pick_rows(C.flatten(1)[..., None], (sets[..., :, None] * n + sets[..., None, :]).flatten(1))
    A = A.view(A.shape[0], -1, e, e)
    v = _pick_rows(w, sets.flatten(1)).view(G, -1, e, R)
    if not valid.all():
        A = torch.where(valid[..., :, None] & valid[..., None, :], A, torch.eye(e, dtype=A.dtype, device=A.device))
        v = v * valid[..., None]
    if e > _TINY:
        wide = v.permute(1, 2, 0, 3).reshape(1, -1, e, G * R) if A.shape[0] == 1 else v
        found = solve_triangular(torch.linalg.cholesky(A), wide, upper=False).square().sum(-2)
        return found.view(-1, G, R).sum(-1).T if A.shape[0] == 1 else found.sum(-1)
    total = torch.zeros((), dtype=w.dtype, device=w.device)
    while v.shape[2]:  # by hand: a library call per tiny matrix would cost more
        pivot, first = A[:, :, 0, 0, None], v[:, :, 0]
        total = total + (first.square() / pivot).sum(-1)
        ratio = A[:, :, 1:, 0] / pivot
        v = v[:, :, 1:] - ratio[..., None] * first[:, :, None]
        A = A[:, :, 1:, 1:] - ratio[..., None] * A[:, :, None, 0, 1:]
    return total


def list_columns(gone: Tensor) -> Tensor:
    """Return the columns that each group loses, (G, p) padded with -1, of a bool (G, n).

    >>> list_columns(torch.tensor([[True, False, True], [False, True, False]])).tolist()
    [[0, 2], [1, -1]]
    """
    columns = (~gone).byte().argsort(dim=1, stable=True)[:, : int(gone.sum(1).max())]
    return columns.masked_fill(~gone.gather(1, columns), -1)


def _pick_rows(A: Tensor, rows: Tensor) -> Tensor:
    """A (G, n, k) at rows (G, p), either of them the same for all groups if of length 1: (G, p, k)."""
    if rows.shape[0] == 1:
        return A.index_select(1, rows[0])
    if A.shape[0] > 1:
        rows = rows + A.shape[1] * torch.arange(len(A), device=A.device)[:, None]
    return A.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, A.shape[2])


def _pick_columns(A: Tensor, columns: Tensor) -> Tensor:
    """A (G, k, n) at columns (G, p): (G, k, p)."""
    return A.gather(2, columns[:, None].expand(-1, A.shape[1], -1))


def _invert_factor(A: Tensor, valid: Tensor) -> Tensor:
    """L⁻¹ (G, p, p) of the factor of A, zero in rows and columns that are not ``valid`` (G, p)."""
    eye = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    if not valid.all():
        both = valid[:, :, None] & valid[:, None, :]
        factor = torch.linalg.cholesky(torch.where(both, A, eye))
        return solve_triangular(factor, eye.expand_as(factor), upper=False) * both
    factor = torch.linalg.cholesky(A)
    return solve_triangular(factor, eye.expand_as(factor), upper=False)
